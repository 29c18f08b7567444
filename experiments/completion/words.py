"""The words that can follow on a command line of `upge`. PyYAML is the only other package imported, if needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.cli import COMMANDS, ROOT

KEYS = Path(__file__).with_name("keys.json")
#: Name of a key → the folder whose YAML files it chooses.
_CONFIGS = ROOT / "experiments" / "configs"
FOLDERS = {
    "algo": ROOT / "algorithms",
    "algos": ROOT / "algorithms",
    "gates": ROOT / "algorithms",
    "correction": ROOT / "algorithms" / "corrections",
    **{name: _CONFIGS / name for name in ("model", "data", "recipe", "suite", "sweep")},
    "eval.suite": _CONFIGS / "suite",
}
#: Command → its flags, besides --help.
FLAGS = {
    "run": ("--dry-run",),
    "evaluate": ("--dry-run",),
    "sweep": ("--dry-run", "--report", "--docs"),
    "describe": ("--readme", "--docs"),
    "watch": ("--no-serve",),
    "push": ("--dry-run",),
    **dict.fromkeys(("bench", "faults", "referee", "regret", "scaling", "table1", "theory"), ("--docs",)),
}
#: Commands whose arguments are keys of a run.
OF_A_RUN = ("run", "explain", "sweep", "diagnose")


def candidates(line: str) -> list[str]:
    """The words that complete the last one of a command line, which may be empty.

    A word that ends in `=`, `.` or `,` is not complete yet.

    >>> candidates("upge run algo=gr")
    ['algo=grpo']
    """
    words = [_unquoted(word) for word in line.split()]
    last = "" if not words or line[-1].isspace() else words.pop()
    words = words[1:]
    if not words:
        return sorted(word for word in (*COMMANDS, "--help", "--version") if word.startswith(last))
    command, *given = words
    if last.startswith("-"):
        return sorted(word for word in (*FLAGS.get(command, ()), "--help") if word.startswith(last))
    if command == "completion":
        return [shell for shell in ("bash", "zsh") if shell.startswith(last)]
    if command == "bench" and not given:
        return sorted(name for name in _keys()["bench"] if name.startswith(last))
    if "=" in last:
        return _values(command, given, last)
    ending = "" if command == "explain" else "="
    return _next_parts([*_names(command, given)], last, ending)


def _unquoted(word: str) -> str:
    return word.replace("'", "").replace('"', "").replace("\\", "")


def _keys() -> dict[str, dict[str, Any]]:
    """Command → key → its values, as far as they can be listed; see `experiments.completion.keys`."""
    return json.loads(KEYS.read_text("utf-8"))


def _known(command: str, given: Sequence[str]) -> dict[str, list[str]]:
    """The keys of a command and their values."""
    keys = _keys()
    if command == "bench":
        return keys["bench"].get(given[0], {})
    return {**(keys["run"] if command in OF_A_RUN else {}), **keys.get(command, {})}


def _names(command: str, given: Sequence[str]) -> Iterator[str]:
    """Every key that the command takes, those of the chosen algorithm, corrections and data set included."""
    yield from _known(command, given)
    if command not in (*OF_A_RUN, "describe"):
        return
    chosen = dict(word.partition("=")[::2] for word in given if "=" in word)
    for key, _ in _parts(chosen):
        yield key
    if command != "describe":
        yield from (f"data.{key}" for key in _keys()["data"].get(chosen.get("data", "arithmetic"), ()))


def _parts(chosen: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of every setting in the chosen algorithm's file and in those of the corrections."""
    yield from _leaves(_file("algo", chosen.get("algo") or "hpt"), "algo")
    for name in filter(None, re.split(r"[\[\], ]", chosen.get("correction", ""))):
        path = _file("correction", name)
        yield from _leaves(path, f"correction.{path.stem}")


def _file(group: str, name: str) -> Path:
    """The file of a name; a name may also be the path of a file."""
    return Path(name).expanduser() if name.endswith((".yaml", ".yml")) else FOLDERS[group] / f"{name}.yaml"


def _leaves(path: Path, above: str) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        return
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    waiting: list[tuple[str, Any]] = [(above, yaml.load(path.read_text("utf-8"), loader))]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, dict):
            waiting += ((f"{key}.{name}", one) for name, one in node.items())
        elif not key.endswith((".description", "._target_")):
            yield key, node


def _next_parts(names: Sequence[str], typed: str, ending: str) -> list[str]:
    """The keys that begin with `typed`, each up to its next dot, so that a shell shows one level at a time."""
    found = set()
    for name in names:
        if name.startswith(typed):
            rest = name[len(typed) :]
            found.add(f"{typed}{rest.partition('.')[0]}." if "." in rest else f"{name}{ending}")
    # A single section is no choice, so go on to the keys below it.
    if len(found) == 1 and (only := next(iter(found))).endswith(".") and only != typed:
        return _next_parts(names, only, ending)
    return sorted(found)


def _values(command: str, given: Sequence[str], last: str) -> list[str]:
    """The values of key=value; of a list such as correction=[tis,kl_k3], those of its last entry."""
    key, _, typed = last.partition("=")
    start = max(typed.rfind("["), typed.rfind(",")) + 1
    taken = set(re.split(r"[\[,]", typed[:start]))
    values = [value for value in _listed(command, given, key) if value.startswith(typed[start:]) and value not in taken]
    return [f"{key}={typed[:start]}{value}" for value in values]


def _listed(command: str, given: Sequence[str], key: str) -> list[str]:
    """Every value of a key that can be listed."""
    if key in FOLDERS:
        return sorted(path.stem for path in FOLDERS[key].glob("*.yaml"))
    known = _known(command, given).get(key)
    if known:
        return known
    chosen = dict(word.partition("=")[::2] for word in given if "=" in word)
    is_switch = any(name == key and isinstance(value, bool) for name, value in _parts(chosen))
    return ["true", "false"] if is_switch else []
