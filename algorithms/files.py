"""The YAML files of this folder as trees: by name or path, with the algorithms that they name put in their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from upge.errors import ConfigError, nearest

FOLDER = Path(__file__).parent
CORRECTIONS = FOLDER / "corrections"
_SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """The algorithms that have a file here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def corrections() -> list[str]:
    """The corrections that have a file in corrections/."""
    return sorted(path.stem for path in CORRECTIONS.glob("*.yaml"))


def find(name: str, folder: Path = FOLDER, path: str = "algo") -> Path:
    """The file of an algorithm (or, with another `folder`, of a correction), by name or by its own path.

    Raises:
        ConfigError: there is none, with the nearest name.
    """
    known = sorted(found.stem for found in folder.glob("*.yaml"))
    what = "algorithm" if folder == FOLDER else "correction"
    if str(name).endswith(_SUFFIXES):
        if not Path(name).is_file():
            raise ConfigError(
                f"{path}: there is no file {name}; give the path of a YAML file or one of {', '.join(known)}"
            )
        return Path(name)
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
    interlude, stages = tree.get("interlude"), tree.get("stages")
    if isinstance(interlude, dict) and interlude.get("algorithm") is not None:
        yield interlude, "algorithm", "interlude.algorithm"
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict) and stage.get("algorithm") is not None:
            yield stage, "algorithm", f"stages.{name}.algorithm"


def inline(tree: dict[str, Any], path: str, above: tuple[str, ...] = ()) -> list[str]:
    """Puts, in place, the trees of the algorithms that `tree` names where it names them, so that overrides reach
    inside; each says in `name` what it was called. Returns the paths, within `tree`, of what it put there.

    Raises:
        ConfigError: no such algorithm, or one that contains itself.
    """
    put = []
    for owner, key, slot in algorithm_slots(tree):
        value, where = owner[key], f"{path}.{slot}"
        if isinstance(value, str) and not value.startswith("${"):
            file = find(value, path=where)
            if str(file) in above:
                raise ConfigError(f"{where}: '{value}' contains itself; name an algorithm that does not")
            owner[key] = {"name": stem(value), **content(file, where)}
            inline(owner[key], where, (*above, str(file)))
            put.append(slot)
        elif isinstance(value, dict):
            put += [f"{slot}.{inner}" for inner in inline(value, where, above)]
    return put
