"""Dot-list overrides of an algorithm's tree, as on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from algorithms.correcting import apply_missing
from algorithms.files import check_names, inline
from algorithms.keeping import check_kept, check_record
from upge.errors import ConfigError, nearest
from upge.instantiate import TARGET


def override(node: DictConfig, overrides: Sequence[str], path: str = "algo") -> DictConfig:
    """`node` with dot-list overrides such as `terms.rl.estimator.mask.high=0.28`.

    A mapping that has `_target_` replaces the whole node, settings included. A key may be new only where a user names
    things: a term, a regularizer, a setting of a part (which the part then checks). Where an algorithm stands inside
    another one, a name replaces it; with the corrections of the pipeline, as far as it can take them.

    Raises:
        ConfigError: by its key; also where a correction would be undone although `corrected` names it, see
            `algorithms.keeping`.
    """
    result = OmegaConf.create(OmegaConf.to_container(node, resolve=False))
    nowhere: dict[str, str] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{path}: override {item!r} is not of the form key=value")
        value, before = _value(text, f"{path}.{key}"), OmegaConf.to_container(result, resolve=False)
        try:
            parent = key.rpartition(".")[0]
            _check_references(result, key, path)
            if parent and not _is_open(result, parent) and OmegaConf.select(result, parent) is None:
                known = _paths(OmegaConf.to_container(result))
                raise ConfigError(f"{path}.{key}: there is no '{parent}'; {nearest(key, known)}")
            _check_target(result, key, value, path)
            _check_wrapped(result, key, path)
            OmegaConf.update(result, key, value, merge=False, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}.{key}: {str(error).splitlines()[0]}") from error
        after = OmegaConf.to_container(result, resolve=False)
        check_record(before, after, key, path)
        inline(after, path)
        check_names(after, path)
        after, nowhere = apply_missing(after)
        check_kept(before, after, key, path)
        result = OmegaConf.create(after)
    for name, why in nowhere.items():
        raise ConfigError(
            f"{path}.stages: no stage has the correction '{name}' any more ({why}); name an algorithm that can take it "
            "in one of them, or leave the correction out"
        )
    return result


def _is_open(tree: DictConfig, parent: str) -> bool:
    """True where an override may add something although the file has nothing there: an algorithm's regularizers."""
    above, _, last = parent.rpartition(".")
    return last == "regularizers" and (not above or OmegaConf.select(tree, f"{above}.terms") is not None)


def _check_references(tree: DictConfig, key: str, path: str) -> None:
    """Refuses to write through a reference to another part: it would become a part of its own, without that part's
    other settings."""
    node: Any = tree
    for number, name in enumerate(names := key.split(".")[:-1]):
        if not isinstance(node, DictConfig) or name not in node:
            return
        if OmegaConf.is_interpolation(node, name):
            text = OmegaConf.to_container(node, resolve=False)[name]
            at = ".".join(names[: number + 1])
            raise ConfigError(
                f"{path}.{key}: {at} is not a part of its own but follows {text}; override it there, or replace it: "
                f"{path}.{at}={{{TARGET}: ...}}"
            )
        node = node[name]


def _check_target(tree: DictConfig, key: str, value: Any, path: str) -> None:
    """Refuses another `_target_` for a part that has settings: they would silently become those of the new one."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(tree, parent) if parent and last == TARGET else None
    if not isinstance(node, DictConfig) or node.get(TARGET) in (None, value):
        return
    settings = sorted(str(k) for k in node if k != TARGET)
    if settings:
        raise ConfigError(
            f"{path}.{key}: {value} instead of {node[TARGET]} would keep its settings ({', '.join(settings)}); "
            f"replace the whole part: {path}.{parent}={{{TARGET}: {value}, ...}}"
        )


def _check_wrapped(tree: DictConfig, key: str, path: str) -> None:
    """Where a correction has wrapped a part, says where the part's setting is now."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(tree, parent) if parent and tree.get("corrected") else None
    if not isinstance(node, DictConfig) or TARGET not in node or last in node:
        return
    plain = OmegaConf.to_container(node, resolve=False)
    inside = [p for p in _paths(plain) if p.rpartition(".")[2] == last]
    if inside:
        raise ConfigError(
            f"{path}.{key}: {node[TARGET]}, which a correction put there, has no setting '{last}'; the part that it "
            f"wraps has: {path}.{parent}.{inside[0]}"
        )


def _value(text: str, path: str) -> Any:
    """What stands right of an override's =. An interpolation stays one: it must follow the run that the algorithm
    becomes a part of."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except Exception as error:  # OmegaConf's errors and those of the YAML parser behind it
        raise ConfigError(f"{path}: found {text!r}, which is not YAML: {str(error).splitlines()[0]}") from error


def _paths(tree: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a tree."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    found = [prefix] if prefix else []
    for key, item in items:
        found += _paths(item, f"{prefix}.{key}" if prefix else str(key))
    return found


__all__ = ["override"]
