"""The algorithms, a YAML file each: a file says everything that differs from another's, and nothing else.

    load("grpo", ["terms.rl.estimator.mask.high=0.28", "correction.tis.cap=3"], corrections=["tis"])

reads the file, puts the algorithms that it names in their place, applies the overrides, builds the algorithm and then
applies the corrections. So an override names a part as the algorithm's file does, whatever a correction wraps it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from algorithms.compose import CORRECTION, algorithm_slots, check_names, compose
from upge.algorithm import Algorithm
from upge.config import parse, plain, split
from upge.errors import ConfigError, nearest
from upge.instantiate import TARGET
from upge.pipeline import Pipeline

FOLDER = Path(__file__).parent
CORRECTIONS = FOLDER / "corrections"
_SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The algorithms that have a file here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def corrections() -> list[str]:
    """The corrections that have a file in corrections/."""
    return sorted(path.stem for path in CORRECTIONS.glob("*.yaml"))


def load(name: str, overrides: Sequence[str] = (), corrections: Sequence[str] = ()) -> Algorithm | Pipeline:
    """The algorithm `name` (or the path of a YAML file) with dot-list overrides, then corrections by name or path.

    An override `correction.NAME.KEY=VALUE` is one of a correction's settings.

    >>> load("grpo", ["terms.rl.estimator.mask.high=0.28"]).terms["rl"].estimator.mask.high
    0.28
    """
    return compose(override(read(name, corrections), overrides), stem(name))


def read(name: str, corrections: Sequence[str] = ()) -> DictConfig:
    """The configuration of an algorithm, by name or by the path of a YAML file, with corrections by name or path below
    the key `correction`.

    Raises:
        ConfigError: no such algorithm, correction or file, not YAML, or a correction that is given twice.
    """
    file = find(name)
    tree = content(file)
    if CORRECTION in tree:
        raise ConfigError(f"algo.{CORRECTION}: {file} has this key; leave it out and give correction=NAME instead")
    inline(tree, "algo", (file.resolve(),), file.parent)
    for correction in corrections:
        chosen = tree.setdefault(CORRECTION, {})
        if stem(correction) in chosen:
            raise ConfigError(f"{CORRECTION}: '{correction}' is given twice; once will do")
        chosen[stem(correction)] = _read_correction(correction)
    check_names(tree, "algo")
    return DictConfig(tree)


def _read_correction(name: str) -> dict[str, Any]:
    """`_target_` and settings of a correction, by name or by the path of a YAML file."""
    file = find(name, CORRECTIONS, CORRECTION)
    node = content(file, CORRECTION, TARGET)
    if TARGET not in node:
        found = f"has the keys {', '.join(map(str, node))}" if node else "is empty"
        raise ConfigError(
            f"{CORRECTION}: {file} {found}, but no `{TARGET}`; name a class such as upge.corrections.TIS, or one of "
            "your own, and give its settings beside it"
        )
    return {key: value for key, value in node.items() if key != "description"}


# Files.


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
    return plain(node)


def header(file: Path) -> str:
    """The comment at the top of a file: what it is, its paper, and its choices."""
    lines = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return "\n".join(lines).strip()


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


# Overrides.


def override(node: DictConfig, overrides: Sequence[str], path: str = "algo") -> DictConfig:
    """`node` with dot-list overrides such as `terms.rl.estimator.mask.high=0.28`.

    A mapping that has `_target_` replaces the whole node, settings included. A key may be new only where a user names
    things: a term, a regularizer, a setting of a part (which the part then checks). Where an algorithm stands inside
    another one, a name replaces it. `correction.NAME.KEY=VALUE` is a setting of a correction.

    Raises:
        ConfigError: by its key.
    """
    result = DictConfig(plain(node))
    for item in overrides:
        key, text = split(item)
        names_correction = key.partition(".")[0] == CORRECTION
        where = key if names_correction else f"{path}.{key}"
        value = parse(where, text)
        try:
            parent = key.rpartition(".")[0]
            if names_correction:
                _check_setting(result, key)
            _check_references(result, key, where)
            if parent and not _is_open(result, parent) and OmegaConf.select(result, parent) is None:
                known = _paths(plain(result))
                raise ConfigError(f"{where}: there is no '{parent}'; {nearest(key, known)}")
            _check_target(result, key, value, where)
            OmegaConf.update(result, key, value, merge=False, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
        after = plain(result)
        inline(after, path)
        check_names(after, path)
        result = DictConfig(after)
    return result


def _is_open(tree: DictConfig, parent: str) -> bool:
    """True where an override may add something although the file has nothing there: an algorithm's regularizers."""
    above, _, last = parent.rpartition(".")
    return last == "regularizers" and (not above or OmegaConf.select(tree, f"{above}.terms") is not None)


def _check_setting(tree: DictConfig, key: str) -> None:
    """Refuses an override below `correction` that is not a setting of a correction that was chosen."""
    chosen = list(tree.get(CORRECTION) or {})
    _, *below = key.split(".")
    if len(below) < 2 or below[1] == TARGET:
        raise ConfigError(
            f"{key}: an override gives one setting of a correction, such as correction.tis.cap=3; which corrections "
            "there are is said by correction=NAME or correction=[NAME,NAME]"
        )
    if below[0] not in chosen:
        given = f"the corrections are {', '.join(chosen)}" if chosen else "there is no correction"
        raise ConfigError(f"{key}: {given}; add correction={below[0]}, or leave its setting out")


def _check_references(tree: DictConfig, key: str, where: str) -> None:
    """Refuses to write through a reference to another part: it would become a part of its own, without that part's
    other settings."""
    node: Any = tree
    for number, name in enumerate(names := key.split(".")[:-1]):
        if not isinstance(node, DictConfig) or name not in node:
            return
        if OmegaConf.is_interpolation(node, name):
            text = plain(node)[name]
            at = ".".join(names[: number + 1])
            full = where.removesuffix(key) + at
            raise ConfigError(
                f"{where}: {at} is not a part of its own but follows {text}; override it there, or replace it: "
                f"{full}={{{TARGET}: ...}}"
            )
        node = node[name]


def _check_target(tree: DictConfig, key: str, value: Any, where: str) -> None:
    """Refuses another `_target_` for a part that has settings: they would silently become those of the new one."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(tree, parent) if parent and last == TARGET else None
    if not isinstance(node, DictConfig) or node.get(TARGET) in (None, value):
        return
    settings = sorted(str(k) for k in node if k != TARGET)
    if settings:
        raise ConfigError(
            f"{where}: {value} instead of {node[TARGET]} would keep its settings ({', '.join(settings)}); "
            f"replace the whole part: {where.rpartition('.')[0]}={{{TARGET}: {value}, ...}}"
        )


def _paths(tree: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a tree."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    found = [prefix] if prefix else []
    for key, item in items:
        found += _paths(item, f"{prefix}.{key}" if prefix else str(key))
    return found


__all__ = [
    "CORRECTION",
    "CORRECTIONS",
    "FOLDER",
    "compose",
    "corrections",
    "find",
    "header",
    "load",
    "names",
    "override",
    "read",
    "stem",
]
