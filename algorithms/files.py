"""The YAML files of this folder as trees: by name or path, with the algorithms that they name put in their place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from upge.errors import ConfigError, nearest

FOLDER = Path(__file__).parent
CORRECTIONS = FOLDER / "corrections"
_SUFFIXES = (".yaml", ".yml")
#: What users name in a file: these names are parts of keys and of references.
_NAMED = ("terms", "regularizers", "stages")
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def names() -> list[str]:
    """The algorithms that have a file here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def corrections() -> list[str]:
    """The corrections that have a file in corrections/."""
    return sorted(path.stem for path in CORRECTIONS.glob("*.yaml"))


def find(name: str, folder: Path = FOLDER, path: str = "algo", near: Path | None = None) -> Path:
    """The file of an algorithm (or, with another `folder`, of a correction), by name or by its own path; a relative
    path is looked for in the folder `near` first, then in the one that the user starts from.

    Raises:
        ConfigError: there is none, with the nearest name.
    """
    known = sorted(found.stem for found in folder.glob("*.yaml"))
    what = "algorithm" if folder == FOLDER else "correction"
    if str(name).endswith(_SUFFIXES):
        tried = [Path(name)] if near is None else [near / name, Path(name)]
        for file in tried:
            if file.is_file():
                return file
        where = "" if near is None or Path(name).is_absolute() else f" in {near} or where you start from"
        raise ConfigError(
            f"{path}: there is no file {name}{where}; give the path of a YAML file or one of {', '.join(known)}"
        )
    if name not in known:
        raise ConfigError(f"{path}: no {what} '{name}'; {nearest(str(name), known)} (or give the path of a YAML file)")
    return folder / f"{name}.yaml"


def stem(name: str) -> str:
    """What an algorithm or a correction is called: its name, or its file's name without the suffix."""
    return Path(name).stem if str(name).endswith(_SUFFIXES) else str(name)


def content(file: Path, path: str = "algo", key: str = "terms") -> dict[str, Any]:
    """What a YAML file says, interpolations as they are written; `key` is one that it must have, for the message.

    Raises:
        ConfigError: not YAML, or no mapping.
    """
    try:
        node = OmegaConf.load(file)
    except Exception as error:
        raise ConfigError(f"{path}: {file} is not valid YAML: {error}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: {file} holds no mapping; it must have the key `{key}`")
    return OmegaConf.to_container(node, resolve=False)


def header(file: Path) -> str:
    """The comment at the top of a file: what it is, its paper, and its choices."""
    lines = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return "\n".join(lines).strip()


def algorithm_slots(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(mapping, key, path) of every place in an algorithm's tree where another algorithm stands or is named."""
    if tree.get("validation") is not None:
        yield tree, "validation", "validation"
    interleaved_update, stages = tree.get("interleaved_update"), tree.get("stages")
    if isinstance(interleaved_update, dict) and interleaved_update.get("algorithm") is not None:
        yield interleaved_update, "algorithm", "interleaved_update.algorithm"
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict) and stage.get("algorithm") is not None:
            yield stage, "algorithm", f"stages.{name}.algorithm"


def inline(tree: dict[str, Any], path: str, above: tuple[Path, ...] = (), near: Path | None = None) -> None:
    """Puts, in place, the trees of the algorithms that `tree` names where it names them, so that overrides reach
    inside; each says in `name` what it was called. `above` are the files that it stands in, `near` is the folder that
    relative paths in `tree` start from.

    Raises:
        ConfigError: no such algorithm, or one that contains itself.
    """
    for owner, key, slot in algorithm_slots(tree):
        value, where = owner[key], f"{path}.{slot}"
        if isinstance(value, str) and not value.startswith("${"):
            file = find(value, path=where, near=near)
            if file.resolve() in above:
                raise ConfigError(f"{where}: '{value}' contains itself; name an algorithm that does not")
            owner[key] = {"name": stem(value), **content(file, where)}
            inline(owner[key], where, (*above, file.resolve()), file.parent)
        elif isinstance(value, dict):
            inline(value, where, above, near)


def check_names(tree: dict[str, Any], path: str) -> None:
    """Checks the names that users give to terms, regularizers and stages, and that each term is there.

    Raises:
        ConfigError: a name that no key can have, by its place; or a term that is nothing.
    """
    for section in _NAMED:
        named = tree.get(section)
        for name, value in named.items() if isinstance(named, dict) else ():
            if isinstance(name, bool):
                raise ConfigError(
                    f"{path}.{section}: found the name {name}, which is how YAML reads on, off, yes, no, true and "
                    "false; give another name, or write it in quotes"
                )
            if not _NAME.fullmatch(str(name)):
                raise ConfigError(
                    f"{path}.{section}: found the name '{name}', which cannot be part of a key; use letters, digits, _ "
                    "and -"
                )
            if section == "terms" and value is None:
                raise ConfigError(
                    f"{path}.terms.{name}: found None, expected a mapping with the keys coefficient, estimator, gate, "
                    f"reduction, source; a term is left out by its factor: {path}.terms.{name}.coefficient=0"
                )
    for owner, key, slot in algorithm_slots(tree):
        if isinstance(owner[key], dict):
            check_names(owner[key], f"{path}.{slot}")
