"""Explain keys: `python -m experiments.explain optimizer.lr algo=grpo recipe=NAME`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

import algorithms
from experiments import cli, hints
from experiments.completion.keys import run_values
from experiments.config import CONFIGS, GROUPS, Composed, compose, known_keys, presets
from experiments.describe import correction_description
from experiments.explain.parts import Owner, owner
from experiments.keys import data_meaning, first_comment, shown
from upge.config import Setting, settings
from upge.errors import ConfigError
from upge.instantiate import TARGET
from upge.train.config import RunConfig

USAGE = """\
Usage: python -m experiments.explain KEY [KEY ...] [key=value ...]

Prints the value of each KEY in the run that these settings describe, where the value comes from (the default, a
preset, the algorithm's file, a recipe, the command line), which values are allowed, and what the key does. KEY may
also be a section such as optimizer, a part such as algo.terms.rl.estimator.mask, or algo, model, data, correction or
recipe.
"""
_ABSENT = object()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the explanations; return the exit code, 2 for a key that does not exist."""
    return cli.run_command(_explain, arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What --help prints."""
    return USAGE


def _explain(arguments: list[str]) -> int:
    wanted = [one for one in arguments if "=" not in one and not one.startswith("--")]
    if not wanted:
        raise ConfigError("there is no key to explain; give one, as in upge explain optimizer.lr algo=grpo")
    composed = compose([one for one in arguments if one not in wanted])
    print("\n\n".join("\n".join(explanation(composed, key)) for key in wanted))
    return cli.DONE


def explanation(composed: Composed, key: str) -> list[str]:
    """The lines on one key.

    Raises:
        ConfigError: the key does not exist.
    """
    value = _value(composed, key)
    if key in GROUPS:
        return [*_group(composed, key), *(_rows(composed, key) if key in ("algo", "model", "data") else [])]
    if value is _ABSENT:
        correction = key.split(".")[1] if key.startswith("correction.") else ""
        if correction in presets("correction"):
            raise ConfigError(f"{key}: the run has no correction '{correction}'; add correction={correction}")
        raise ConfigError(f"{key}: there is no such key; {hints.unknown(key, _known(composed))}")
    is_section = isinstance(value, Mapping) and key not in {one.name for one in settings(RunConfig)}
    lines = [key if is_section else f"{key} = {shown(value)}"]
    if not is_section:
        lines += _origin(composed, key)
    return [*lines, *_meaning(composed, key), *(_rows(composed, key) if is_section else [])]


def _value(composed: Composed, key: str) -> Any:
    """The resolved value of a key; _ABSENT if there is no such key."""
    node: Any = composed.tree
    if key.startswith("correction."):
        node = composed.tree["algo"]
    for name in key.split("."):
        if isinstance(node, Mapping) and name in node:
            node = node[name]
        elif isinstance(node, Sequence) and not isinstance(node, str) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            return _ABSENT
    return node


def origins(composed: Composed, key: str) -> list[tuple[str, Any]]:
    """(origin, value) of every layer that sets the key or something above it; the first one is in effect."""
    found = []
    for origin, layer in reversed(composed.layers):
        # On the command line a later argument replaces an earlier one.
        setting = [one for one in layer if one == key or key.startswith(f"{one}.")]
        if setting:
            found.append((origin, layer[setting[-1]] if setting[-1] == key else _ABSENT))
    return found


def _origin(composed: Composed, key: str) -> list[str]:
    """Where the value comes from and what it replaces."""
    found = origins(composed, key)
    if not found:
        return [_row("from", "the part itself")]
    (first, value), *before = found
    follows = _followed(key, value)
    lines = [_row("from", first + (f"; it follows {follows}" if follows else ""))]
    if before:
        words = (f"{_replaced(key, value)} ({origin})" if value is not _ABSENT else origin for origin, value in before)
        lines.append(_row("instead of", ", ".join(words)))
    return lines


def _replaced(key: str, value: Any) -> str:
    """A value that another one replaces."""
    follows = _followed(key, value)
    return f"the value of {follows}" if follows else _short(value)


def _followed(key: str, value: Any) -> str:
    """The key that a reference in a file points at; empty for any other value."""
    if not isinstance(value, str) or not value.startswith("${"):
        return ""
    if value.startswith("${oc.select:"):
        return value.removeprefix("${oc.select:").partition(",")[0].removesuffix("}")
    return algorithms.followed(tuple(key.split(".")), value) or ""


def _meaning(composed: Composed, key: str) -> list[str]:
    """Allowed values and meaning of a key."""
    head, *rest = key.split(".")
    if head in ("algo", "correction"):
        node = composed.tree["algo"] if head == "algo" else composed.tree["algo"][head]
        return _of_part(owner(node, rest))
    if head == "data":
        meaning = data_meaning(str(composed.names["data"]), rest[0]) if rest else ""
        return [_row("meaning", meaning)] if meaning else []
    for one in settings(RunConfig):
        if one.name == key:
            return [_row("values", _allowed(one)), _row("meaning", one.meaning)]
        if key.startswith(f"{one.name}."):
            return [_row("meaning", f"an entry of {one.name}: {one.meaning}")]
    return []


def _allowed(setting: Setting) -> str:
    """A setting's values in words, with the names that it knows."""
    names = [] if setting.values else run_values().get(setting.name, [])
    return f"{setting.allowed}; known names: {', '.join(names)}" if names else setting.allowed


def _of_part(found: Owner | None) -> list[str]:
    if found is None:
        return []
    lines = [_row("part", found.title + (f", setting {found.setting}" if found.setting else ""))]
    if found.kind:
        default = "" if found.default is MISSING else f"; the class's default is {_short(found.default)}"
        lines.append(_row("values", found.kind + default))
    if meaning := found.setting and found.meaning():
        lines.append(_row("meaning", meaning))
    return [*lines, *(f"    {line}".rstrip() for line in found.docs().splitlines())]


def _group(composed: Composed, key: str) -> list[str]:
    """The lines on a key that chooses a file by its name."""
    name = composed.names[key]
    lines = [f"{key} = {shown(name)}"]
    if key == "algo":
        lines.append(_row("meaning", algorithms.load(str(name)).description))
    elif key == "correction":
        lines += [_row(one, correction_description(one)) for one in str(name or "").split(",") if one]
    elif name in presets(key):
        lines.append(_row("meaning", first_comment(CONFIGS / key / f"{name}.yaml")))
    return [*lines, _row("values", ", ".join(presets(key)))]


def _rows(composed: Composed, key: str) -> list[str]:
    """A line for every key below a section: its value and where that comes from."""
    lines = []
    for name in _leaves(composed, key):
        found = origins(composed, name)
        origin = found[0][0] if found else ""
        lines.append(cli.help_row(f"{name}={_short(_value(composed, name))}", origin, 60))
    return ["", *lines] if lines else []


def _leaves(composed: Composed, key: str) -> Iterator[str]:
    value = _value(composed, key)
    for where, _ in algorithms.leaves(value if isinstance(value, Mapping) else {}):
        if where[-1] not in (TARGET, "description", "name") and algorithms.CORRECTION not in where[:1]:
            yield ".".join((key, *map(str, where)))


def _known(composed: Composed) -> set[str]:
    """Every key of the run that can be explained."""
    corrections = composed.tree["algo"].get(algorithms.CORRECTION, {})
    of_corrections = (f"correction.{'.'.join(map(str, where))}" for where, _ in algorithms.leaves(corrections))
    return {*known_keys(), *GROUPS, *_leaves(composed, "algo"), *_leaves(composed, "data"), *of_corrections}


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _row(left: str, right: str) -> str:
    return textwrap.fill(
        f"{left:<11} {right}", 118, initial_indent="    ", subsequent_indent=" " * 16, break_on_hyphens=False
    )


if __name__ == "__main__":
    sys.exit(main())
