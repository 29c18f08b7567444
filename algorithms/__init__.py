"""The algorithms, with one YAML file each. A file states only what distinguishes the algorithm from others.

    load("grpo", ["terms.rl.estimator.mask.high=0.28", "correction.tis.cap=3"], corrections=["tis"])

`load` reads the file, inlines the algorithms that it names, applies the overrides, builds the algorithm and then
applies the corrections. An override therefore names a part as the algorithm's file does, even if a correction wraps it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from algorithms.compose import CORRECTION, algorithm_slots, check_names, compose
from upge.algorithm import Algorithm
from upge.config import parse, split
from upge.errors import ConfigError, Problems, nearest
from upge.instantiate import TARGET, locate
from upge.pipeline import Pipeline
from upge.trees import first_line, plain, read_yaml

FOLDER = Path(__file__).parent
CORRECTIONS = FOLDER / "corrections"
_SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The names of all algorithms in this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def corrections() -> list[str]:
    """The names of all corrections in corrections/."""
    return sorted(path.stem for path in CORRECTIONS.glob("*.yaml"))


def load(name: str, overrides: Sequence[str] = (), corrections: Sequence[str] = ()) -> Algorithm | Pipeline:
    """Load an algorithm.

    >>> load("grpo", ["terms.rl.estimator.mask.high=0.28"]).terms["rl"].estimator.mask.high
    0.28

    Args:
        name: name of the algorithm, or path of a YAML file.
        overrides: settings KEY=VALUE. `correction.NAME.KEY=VALUE` is a setting of a correction.
        corrections: names or paths of corrections, in the order in which they are applied.

    Raises:
        ConfigError: an impossible name, setting or correction; the message names the key, the value and the fix.
    """
    return compose(override(read(name, corrections), overrides), stem(name))


def read(name: str, corrections: Sequence[str] = ()) -> DictConfig:
    """Read the configuration of an algorithm, by name or path, with its corrections under the key `correction`.

    Raises:
        ConfigError: an algorithm, a correction or a file does not exist, a file is not valid YAML, or a correction is
            given twice.
    """
    file = find(name)
    tree = content(file)
    if CORRECTION in tree:
        raise ConfigError(f"algo.{CORRECTION}: {file} has this key; remove it and give correction=NAME instead")
    inline(tree, "algo", (file.resolve(),), file.parent)
    for correction in corrections:
        chosen = tree.setdefault(CORRECTION, {})
        if stem(correction) in chosen:
            raise ConfigError(f"{CORRECTION}: '{correction}' is given twice; give it once")
        chosen[stem(correction)] = _read_correction(correction)
    check_names(tree, "algo")
    return DictConfig(tree)


def _read_correction(name: str) -> dict[str, Any]:
    """The `_target_` and the settings of a correction, given by name or by the path of a YAML file."""
    file = find(name, CORRECTIONS, CORRECTION)
    node = content(file, CORRECTION, TARGET)
    if TARGET not in node:
        state = f"has the keys {', '.join(map(str, node))}" if node else "is empty"
        raise ConfigError(
            f"{CORRECTION}: {file} {state}, but no `{TARGET}`; name a class such as upge.corrections.TIS, or one of "
            "your own, and give its settings next to it"
        )
    return {key: value for key, value in node.items() if key != "description"}


# Files.


def find(name: str, folder: Path = FOLDER, path: str = "algo", near: Path | None = None) -> Path:
    """Find the file of an algorithm, or, with another `folder`, of a correction.

    Args:
        name: a name, or the path of a YAML file.
        near: the folder in which a relative path is looked up before the working directory.

    Raises:
        ConfigError: there is no such file; the message gives the nearest name.
    """
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    what = "algorithm" if folder == FOLDER else "correction"
    if str(name).endswith(_SUFFIXES):
        tried = [Path(name)] if near is None else [near / name, Path(name)]
        for file in tried:
            if file.is_file():
                return file
        where = "" if near is None or Path(name).is_absolute() else f" in {near} or in the working directory"
        beside = {file.stem: str(file) for file in Path(name).parent.glob("*") if file.suffix in _SUFFIXES}
        close = difflib.get_close_matches(Path(name).stem, beside, n=1)
        fix = f"did you mean '{beside[close[0]]}'?" if close else ""
        fix = fix or f"give the path of a YAML file or one of {', '.join(known)}"
        raise ConfigError(f"{path}: there is no file {name}{where}; {fix}")
    if name not in known:
        raise ConfigError(f"{path}: no {what} '{name}'; {nearest(str(name), known)} (or give the path of a YAML file)")
    return folder / f"{name}.yaml"


def stem(name: str) -> str:
    """The name of an algorithm or a correction. For a path it is the file's name without the suffix."""
    return Path(name).stem if str(name).endswith(_SUFFIXES) else str(name)


def content(file: Path, path: str = "algo", key: str = "terms") -> dict[str, Any]:
    """Read a YAML file without resolving interpolations; `path` and the required `key` are for messages.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML, or not a mapping.
    """
    try:
        node = read_yaml(file)
    except ConfigError as error:
        raise error.with_key(path) from error
    if not isinstance(node, dict):
        raise ConfigError(f"{path}: {file} is not a mapping; it must have the key `{key}`")
    return node


def header(file: Path) -> str:
    """The comment at the top of a file, which says what it is, its paper and its choices."""
    lines = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return "\n".join(lines).strip()


def inline(tree: dict[str, Any], path: str, above: tuple[Path, ...] = (), near: Path | None = None) -> None:
    """Replace the names of other algorithms in `tree` by their trees, in place, so that overrides can reach inside.

    Each inlined tree keeps its name under the key `name`.

    Args:
        above: the files that contain `tree`.
        near: the folder that relative paths in `tree` start from.

    Raises:
        ConfigError: an algorithm does not exist, or contains itself.
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
    """Apply dot-list overrides such as `terms.rl.estimator.mask.high=0.28`, and return a new configuration.

    A mapping with `_target_` replaces a whole part, including its settings. New keys are allowed only for what users
    name themselves (terms, regularizers) and for settings of a part, which the part checks. A name replaces an
    algorithm inside another one. `correction.NAME.KEY=VALUE` is a setting of a correction.

    Raises:
        ConfigError: an override cannot be applied; the message names its key. `ConfigErrors` if several cannot.
    """
    result, problems = DictConfig(plain(node)), Problems()
    for item in overrides:
        with problems:
            result = _with_setting(result, item, path)
    problems.raise_any()
    return result


def _with_setting(node: DictConfig, item: str, path: str) -> DictConfig:
    """A copy of the configuration with one override."""
    result = DictConfig(plain(node))
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
            known = [key for key in _paths(plain(result)) if not key.endswith(TARGET)]
            raise ConfigError(f"{where}: there is no '{parent}'; {nearest(key, known)}")
        _check_target(result, key, value, where)
        OmegaConf.update(result, key, value, merge=False, force_add=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error
    after = plain(result)
    inline(after, path)
    check_names(after, path)
    return DictConfig(after)


def followed(where: Sequence[str | int], value: Any) -> str | None:
    """The key that the setting at `where` follows in an algorithm's file, or None if it is no such reference.

    >>> followed(("terms", "rl", "gate", "threshold"), "${...sft.gate.threshold}")
    'terms.sft.gate.threshold'
    """
    if not (isinstance(value, str) and value.startswith("${.") and value.endswith("}")):
        return None
    target = value[2:-1].lstrip(".")
    levels = len(value) - 3 - len(target)
    return ".".join(map(str, (*where[: len(where) - levels], target)))


def split_settings(before: DictConfig, after: DictConfig) -> list[str]:
    """Warnings about settings that follow another setting in the file, but differ from it after the overrides."""
    sentences = []
    for where, value in leaves(plain(before)):
        key, target = ".".join(map(str, where)), followed(where, value)
        if target is None or followed(where, _get(plain(after), key)):
            continue
        own, other = (OmegaConf.select(after, k, throw_on_resolution_failure=False) for k in (key, target))
        if own is not None and other is not None and own != other:
            both = [key, target] if isinstance(own, DictConfig) else [f"{key}={own}", f"{target}={other}"]
            sentences.append(f"algo.{both[0]} no longer follows algo.{both[1]}; to change both, set only algo.{target}")
    return sentences


def leaves(tree: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(path, value) of everything except mappings and lists of parts."""
    if isinstance(tree, Mapping):
        items: Iterable[tuple[str | int, Any]] = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = enumerate(tree)
    else:
        yield where, tree
        return
    for key, value in items:
        yield from leaves(value, (*where, key))


def _get(tree: Any, key: str) -> Any:
    """The value of a dotted key without resolving it, or None."""
    return next((value for where, value in leaves(tree) if ".".join(map(str, where)) == key), None)


def _is_open(tree: DictConfig, parent: str) -> bool:
    """True if overrides may add keys below `parent` even if the file lacks it: an algorithm's regularizers."""
    above, _, last = parent.rpartition(".")
    return last == "regularizers" and (not above or OmegaConf.select(tree, f"{above}.terms") is not None)


def _check_setting(tree: DictConfig, key: str) -> None:
    """Refuse an override below `correction` that is not a setting of a chosen correction."""
    chosen = list(tree.get(CORRECTION) or {})
    _, *below = key.split(".")
    if len(below) < 2 or below[1] == TARGET:
        raise ConfigError(
            f"{key}: an override sets one setting of a correction, such as correction.tis.cap=3; choose the "
            "corrections themselves by correction=NAME or correction=[NAME,NAME]"
        )
    if below[0] not in chosen:
        given = f"the corrections are {', '.join(chosen)}" if chosen else "there is no correction"
        raise ConfigError(f"{key}: {given}; add correction={below[0]}, or remove this setting")


def _check_references(tree: DictConfig, key: str, where: str) -> None:
    """Refuse an override of a setting inside a reference to another part.

    It would replace the reference by a new part without the other settings of the part that it refers to.
    """
    node: Any = tree
    for number, name in enumerate(names := key.split(".")[:-1]):
        if not isinstance(node, DictConfig) or name not in node:
            return
        if OmegaConf.is_interpolation(node, name):
            text = plain(node)[name]
            at = ".".join(names[: number + 1])
            full = where.removesuffix(key) + at
            raise ConfigError(
                f"{where}: {at} is a reference to {text}; override the setting there, or replace the reference: "
                f"{full}={{{TARGET}: ...}}"
            )
        node = node[name]


def _check_target(tree: DictConfig, key: str, value: Any, where: str) -> None:
    """Refuse another `_target_` for a part with settings, because the new part would silently get these settings."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(tree, parent) if parent and last == TARGET else None
    if not isinstance(node, DictConfig) or node.get(TARGET) in (None, value):
        return
    settings = sorted(str(k) for k in node if k != TARGET)
    locate(value, where)
    if settings:
        raise ConfigError(
            f"{where}: {value} instead of {node[TARGET]} would keep its settings ({', '.join(settings)}); "
            f"replace the whole part: {where.rpartition('.')[0]}={{{TARGET}: {value}, ...}}"
        )


def _paths(tree: Any, prefix: str = "") -> list[str]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    paths = [prefix] if prefix else []
    for key, item in items:
        paths += _paths(item, f"{prefix}.{key}" if prefix else str(key))
    return paths


__all__ = [
    "CORRECTION",
    "CORRECTIONS",
    "FOLDER",
    "compose",
    "corrections",
    "find",
    "followed",
    "header",
    "leaves",
    "load",
    "names",
    "override",
    "read",
    "split_settings",
    "stem",
]
