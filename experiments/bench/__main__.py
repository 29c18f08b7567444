"""Runs a bench, or lists what there is: `python -m experiments.bench [NAME] [key=value ...] [--docs]`."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.bench import BENCHES, peers
from upge.errors import ConfigError, UserError, nearest

DOCS = Path(__file__).parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- bench {}: begin (python -m experiments.bench {} --docs) -->", "<!-- bench {}: end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a bench's Markdown, or renews it in the docs; exit code 2 on bad input."""
    is_program = arguments is None
    arguments = list(sys.argv[1:] if is_program else arguments)
    try:
        if not arguments:
            print(listing())
            return 0
        name, *rest = arguments
        bench = _bench(name)
        if is_program and getattr(bench, "WITH_PEERS", False):
            peers.enter()
        made = bench.run(settings(bench, [argument for argument in rest if argument != "--docs"]))
        if "--docs" in rest:
            DOCS.write_text(renewed(DOCS.read_text("utf-8"), name, made), "utf-8")
        else:
            print(made)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def listing() -> str:
    """Every bench with its summary and its keys."""
    lines = ["Usage: python -m experiments.bench NAME [key=value ...] [--docs]\n"]
    for name in BENCHES:
        bench = _bench(name)
        keys = " ".join(f"{field.name}={field.default}" for field in dataclasses.fields(bench.Settings))
        lines.append(f"{name:12} {bench.SUMMARY}\n{'':12} {keys}")
    return "\n".join(lines)


def settings(bench: Any, arguments: Sequence[str]) -> Any:
    """The settings of a bench from key=value arguments.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    known, made = [field.name for field in dataclasses.fields(bench.Settings)], OmegaConf.structured(bench.Settings)
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in known:
            raise ConfigError(f"'{argument}': give key=value with one of the bench's keys; {nearest(key, known)}")
        try:
            made = OmegaConf.merge(made, OmegaConf.from_dotlist([argument]))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}: found '{value}'; {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(made)


def renewed(page: str, name: str, made: str) -> str:
    """The page's text with what stands between the bench's markers made anew.

    Raises:
        ConfigError: a marker is missing.
    """
    begin, end = BEGIN.format(name, name), END.format(name)
    before, found, rest = page.partition(begin)
    _, closing, after = rest.partition(end)
    if not found or not closing:
        raise ConfigError(f"{DOCS.name}: the lines '{begin}' and '{end}' are missing; put them where the figures go")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def _bench(name: str) -> Any:
    if name not in BENCHES:
        raise ConfigError(f"there is no bench '{name}'; {nearest(name, BENCHES)}")
    return importlib.import_module(BENCHES[name])


if __name__ == "__main__":
    sys.exit(main())
