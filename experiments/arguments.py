"""Arguments of the form key=value: how they are read, and how a help text lists them."""

from __future__ import annotations

import textwrap
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from upge.errors import ConfigError


def split(argument: str) -> tuple[str, str]:
    """Key and value of key=value; ConfigError if it is none."""
    name, equals, value = argument.partition("=")
    if not equals or not name:
        raise ConfigError(f"'{argument}' is not of the form key=value; see --help for the keys")
    return name, value


def parse(name: str, text: str) -> Any:
    """The value that is written for the key `name`, read as YAML; ConfigError if it cannot be."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{name}: {text!r} cannot be read: {str(error).splitlines()[0]}") from error


def help_row(left: str, right: str, width: int = 36) -> str:
    """Two columns, at most 118 wide; a left side longer than `width` pushes the right one to the next line."""
    indent = " " * (width + 3)
    if len(left) > width:
        return "\n".join([*textwrap.wrap(left, 116, initial_indent="  ", subsequent_indent="    "), indent + right])
    return textwrap.fill(f"{left:<{width}} {right}", 118, initial_indent="  ", subsequent_indent=indent)
