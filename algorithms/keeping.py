"""What `corrected` says of an algorithm stays true whatever is overridden: an override may change a correction's
settings and the part that it wraps, but not take away what the correction put there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from algorithms.correcting import read_correction
from algorithms.files import algorithm_slots
from algorithms.fitting import places, unfit
from algorithms.trees import INNER, Path, at, dotted, hole_of, keys_of, learning, nodes, stages
from upge.errors import ConfigError
from upge.instantiate import TARGET


def check_kept(before: dict[str, Any], after: dict[str, Any], key: str, path: str) -> None:
    """Compares a tree with what an override of `key` made of it.

    Raises:
        ConfigError: a correction's part is gone, naming the place of the part that it wraps; or what is new is nothing
            for the correction.
    """
    gone_before = {where for _, where, _ in _gone(before)}
    for name, where, what in _gone(after):
        if where not in gone_before:
            fix = _fix(before, name, where, path)
            raise ConfigError(
                f"{path}.{key}: this would leave {dotted(where)} without {what}, which the correction '{name}' put "
                f"there; {fix}leave the correction out"
            )
    for place, algorithm in _corrected(after):
        for name in algorithm["corrected"]:
            reason, old = unfit(algorithm, read_correction(name)), at(before, place)
            if reason is not None and (not isinstance(old, dict) or unfit(old, read_correction(name)) is None):
                raise ConfigError(f"{path}.{key}: this is nothing for the correction '{name}': {reason}")


def check_record(before: dict[str, Any], after: dict[str, Any], key: str, path: str) -> None:
    """Refuses an override that writes `corrected`, which says what the reading did.

    Raises:
        ConfigError: it does.
    """
    where, old, new = keys_of(key), dict(_records(before)), dict(_records(after))
    for place in {*old, *new}:
        is_replaced = place[: len(where)] == where
        if new.get(place) != old.get(place) and not (is_replaced and new.get(place) is None):
            raise ConfigError(
                f"{path}.{key}: `corrected` says which corrections the algorithm has, and is none of its settings; "
                "give correction=NAME instead"
            )


def _records(tree: dict[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(place, what `corrected` says) of an algorithm's tree and of those inside it."""
    yield above, tree.get("corrected")
    for owner, key, slot in algorithm_slots(tree):
        if isinstance(owner[key], dict):
            yield from _records(owner[key], (*above, *slot.split(".")))


def _corrected(tree: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for place in stages(tree):
        algorithm = at(tree, place)
        if algorithm.get("corrected"):
            yield place, algorithm


def _gone(tree: dict[str, Any]) -> Iterator[tuple[str, Path, str]]:
    """(correction, place, what it put there) of all that is said to be there and is not."""
    for place, algorithm in _corrected(tree):
        for name in algorithm["corrected"]:
            for where, what in _missing(algorithm, read_correction(name)):
                yield name, (*place, *where), what


def _missing(algorithm: dict[str, Any], overlay: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    for slot, template in (overlay.get("wrap") or {}).items():
        for where in places(algorithm, slot):
            if _found(algorithm, where, template) is None:
                yield where, _named(template)
    for cls, settings in (overlay.get("set") or {}).items():
        for name in learning(algorithm):
            own = [(w, node) for w, node in nodes(algorithm["terms"][name]) if node.get(TARGET) == cls]
            for where, node in own or [((), {})]:
                lost = [setting for setting in settings if node.get(setting) is None]
                if lost:
                    yield ("terms", name, *where), f"{cls}'s {', '.join(lost)}"
    for key, part in (overlay.get("regularizers") or {}).items():
        if not _matches(part, at(algorithm, ("regularizers", key))):
            yield ("regularizers", key), part[TARGET]
    if overlay.get("sampling") is not None and not _matches(overlay["sampling"], algorithm.get("sampling")):
        yield ("sampling",), overlay["sampling"][TARGET]


def _named(template: Any) -> str:
    """What does a template's work: not a list's owner, such as AllOf, where there is something else."""
    found = [node[TARGET] for where, node in nodes(template) if TARGET in node]
    return next((name for name in reversed(found)), "the part")


def _found(algorithm: dict[str, Any], where: Path, template: Any) -> Path | None:
    """Where, at a place or inside it, what a template made of it is."""
    for inside, node in nodes(at(algorithm, where)):
        if _matches(template, node):
            return (*where, *inside)
    return None


def _matches(template: Any, node: Any) -> bool:
    """True if the node has the template's parts in its places, whatever their settings."""
    if isinstance(template, dict):
        inner = {k: t for k, t in template.items() if isinstance(t, (dict, list)) or t == INNER}
        same = isinstance(node, dict) and node.get(TARGET) == template.get(TARGET)
        return same and all(_matches(part, node.get(k)) for k, part in inner.items())
    if isinstance(template, list):
        return isinstance(node, list) and len(node) >= len(template) and all(map(_matches, template, node))
    if isinstance(template, str) and template.startswith("${."):
        return isinstance(node, str) and node.startswith("${.")
    return node is not None


def _fix(before: dict[str, Any], name: str, where: Path, path: str) -> str:
    """Where the part that the correction wraps stands, as advice."""
    place = next((p for p in stages(before) if where[: len(p)] == p), ())
    for slot, template in (read_correction(name).get("wrap") or {}).items():
        algorithm, inside = at(before, place), where[len(place) :]
        if inside in places(algorithm, slot):
            found = _found(algorithm, inside, template) or inside
            inner = dotted((*place, *found, *hole_of(template)))
            return f"replace the part that it wraps, {path}.{inner}={{{TARGET}: ...}}, or "
    return ""


__all__ = ["check_kept", "check_record"]
