"""Arguments of the form key=value, and how they are read."""

from __future__ import annotations

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
