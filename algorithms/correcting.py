"""Corrections: overlays that any algorithm can take, a YAML file each in corrections/.

    description: one line
    wrap:           # place in a term → the part that takes its place; INNER, once, stands for the part that was there
      estimator.denominator: {_target_: upge.SamplerCorrected, denominator: INNER, cap: 2.0}
    set:            # class → settings of every part of that class
      upge.PPOClip: {dual: 3.0}
    regularizers: {kl: {_target_: upge.KLPenalty, ...}}
    sampling: {_target_: upge.DynamicSampling, ...}

`wrap` and `set` touch the terms that learn from rollouts and no others. The place `rewards` is every advantage that the
rewards of rollouts enter: these terms', those that compare a demonstration with its group, and the critic's returns.
Where a correction stands in several places, the later ones refer to the settings of the first. An algorithm without a
term that learns from rollouts, or without a part of the class, is refused; of a pipeline, each stage that can take the
correction does.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from algorithms.files import CORRECTIONS, content, find, stem
from upge.errors import ConfigError, nearest
from upge.instantiate import TARGET, locate

INNER = "INNER"
_KEYS = {"description", "wrap", "set", "regularizers", "sampling"}
#: A relative interpolation: its dots climb from the mapping or list that holds it, the rest goes down again.
_RELATIVE = re.compile(r"\$\{(\.+)([\w.\[\]-]*)\}")
Path = tuple[Any, ...]


class _Unfit(Exception):
    """Why an algorithm cannot take a correction."""


def apply(tree: dict[str, Any], corrections: Sequence[str], path: str = "algo") -> dict[str, Any]:
    """The algorithm's tree with each correction, in order, by name or by the path of a YAML file; `corrected` lists
    them in the result.

    Raises:
        ConfigError: no such correction, one given twice, or one that has nothing to apply to here.
    """
    for name in corrections:
        if stem(name) in map(stem, tree.get("corrected") or ()):
            raise ConfigError(f"correction: '{name}' is given twice; once will do")
        overlay = read_correction(name)
        places: list[Path] = [()]
        if isinstance(tree.get("stages"), dict):
            stages = {n: s for n, s in tree["stages"].items() if isinstance(s, dict)}
            places = [("stages", n, "algorithm") for n, s in stages.items() if isinstance(s.get("algorithm"), dict)]
        reasons = []
        for place in places:
            try:
                tree = _applied(tree, place, overlay, stem(name))
            except _Unfit as error:
                reasons.append(str(error))
        if len(reasons) == len(places):
            why = "; ".join(dict.fromkeys(reasons)) or "there is no stage"
            raise ConfigError(f"correction: '{name}' cannot be applied to {path}: {why}")
        if places != [()]:
            tree["corrected"] = [*(tree.get("corrected") or ()), str(name)]
    return tree


def apply_to_new(tree: dict[str, Any], slots: Sequence[str]) -> dict[str, Any]:
    """The pipeline's tree with its corrections also in stages whose algorithm has just been replaced, at `slots`."""
    for slot in slots:
        place = tuple(slot.split("."))
        if place[0] != "stages" or len(place) != 3:
            continue
        for name in tree.get("corrected") or ():
            try:
                tree = _applied(tree, place, read_correction(name), stem(name))
            except _Unfit:
                continue  # as for any stage that cannot take it
    return tree


def read_correction(name: str) -> dict[str, Any]:
    """The overlay of a correction, by name or by the path of a YAML file.

    Raises:
        ConfigError: no such file, an unknown key, or a `wrap` without exactly one INNER.
    """
    file = find(name, CORRECTIONS, "correction")
    overlay = content(file, "correction", "wrap")
    for key in overlay:
        if key not in _KEYS:
            raise ConfigError(f"correction: {file} has the key '{key}'; {nearest(str(key), _KEYS)}")
    for key in ("wrap", "set", "regularizers"):
        if not isinstance(overlay.get(key) or {}, dict):
            raise ConfigError(f"correction: {file}: {key} is {overlay[key]!r}; it must be a mapping")
    for place, template in (overlay.get("wrap") or {}).items():
        if sum(value == INNER for _, value in _leaves(template)) != 1:
            raise ConfigError(f"correction: {file}: wrap.{place} must have {INNER} once, for the part that was there")
    return overlay


def _applied(tree: dict[str, Any], place: Path, overlay: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of `tree` with the overlay on the algorithm at `place`."""
    tree = copy.deepcopy(tree)
    algorithm = _at(tree, place)
    terms = algorithm.get("terms") if isinstance(algorithm.get("terms"), dict) else {}
    learning = [n for n, t in terms.items() if isinstance(t, dict) and t.get("source") == "rollouts"]
    if not learning:
        raise _Unfit("it has no term that learns from rollouts")
    for slot, template in (overlay.get("wrap") or {}).items():
        places = _places(algorithm, slot, learning)
        for where in places:
            part = template if where == places[0] else _linked(template, where, places[0])
            _wrap(tree, (*place, *where), part, (*place, "critic"))
    for cls, settings in (overlay.get("set") or {}).items():
        found = [node for n in learning for node in _nodes(terms[n]) if node.get(TARGET) == cls]
        if not found:
            raise _Unfit(f"no {cls.rpartition('.')[2]} is among its parts")
        for node in found:
            _set(node, settings)
    for key, part in (overlay.get("regularizers") or {}).items():
        _add(algorithm, "regularizers", key, part, name)
    if overlay.get("sampling") is not None:
        if algorithm.get("sampling") is not None:
            raise _Unfit("it has `sampling` already; change that by algo.sampling.KEY=VALUE")
        algorithm["sampling"] = copy.deepcopy(overlay["sampling"])
    algorithm["corrected"] = [*(algorithm.get("corrected") or ()), name]
    return tree


def _places(algorithm: dict[str, Any], slot: str, learning: Sequence[str]) -> list[Path]:
    """Where in the algorithm a `wrap` goes; `learning` names the terms that learn from rollouts."""
    if slot != "rewards":
        return [("terms", name, *slot.split(".")) for name in learning]
    found: list[Path] = [("terms", name, "estimator", "advantage") for name in learning]
    for name in (n for n in algorithm["terms"] if n not in learning):
        where = ("terms", name, "estimator", "advantage")
        if {"rewards", "group"} <= _columns(_at(algorithm, where)):
            found.append(where)
    return [*found, ("critic", "returns")] if algorithm.get("critic") else found


def _columns(node: Any) -> set[str]:
    """The columns that the parts in a tree say they read; a part that follows another one's reference has none."""
    columns: set[str] = set()
    for part in _nodes(node):
        with contextlib.suppress(ConfigError):  # a class that cannot be found is reported when it is built
            columns |= set(getattr(locate(part.get(TARGET), ""), "reads", ()))
    return columns


def _linked(template: dict[str, Any], where: Path, first: Path) -> dict[str, Any]:
    """The template for another place: its settings refer to those in the first."""
    linked = copy.deepcopy(template)
    for inside, value in list(_leaves(linked)):
        if value != INNER and inside[-1] != TARGET and not str(value).startswith("${."):
            target = ".".join(map(str, (*first, *inside)))
            _at(linked, inside[:-1])[inside[-1]] = "${" + "." * len((*where, *inside)) + target + "}"
    return linked


def _set(node: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if node.get(key) is not None:
            raise _Unfit(f"{node[TARGET]} has {key}: {node[key]} already; change that by an override")
        node[key] = value


def _add(algorithm: dict[str, Any], section: str, key: str, part: Any, name: str) -> None:
    present = algorithm.get(section) or {}
    if key in present:
        raise _Unfit(f"{section}.{key} is there already; change that by algo.{section}.{key}.SETTING=VALUE")
    algorithm[section] = {**present, key: copy.deepcopy(part)}


def _wrap(tree: dict[str, Any], at: Path, template: Any, critic: Path) -> None:
    """Puts `template` at the place `at` of `tree`, with what was there in place of INNER.

    References keep their meaning: those of the inner part to its neighbours climb further, and those of others to its
    settings go down further. One to the part as a whole now means the outer part, except the critic's: what its
    values stand for does not change.
    """
    owner = _at(tree, at[:-1])
    if not isinstance(owner, dict) or owner.get(at[-1]) is None:
        raise _Unfit(f"{'.'.join(map(str, at))} is missing")
    (hole,) = (where for where, value in _leaves(template) if value == INNER)
    # A list of parts, such as the masks of AllOf, may be there twice; what does the correction's work may not.
    lists = {id(_at(template, hole[: n - 1])) for n, key in enumerate(hole) if isinstance(key, int)}
    at_work = {node[TARGET] for node in _nodes(template) if TARGET in node and id(node) not in lists}
    double = at_work & {node.get(TARGET) for node in _nodes(owner[at[-1]])}
    if double:
        raise _Unfit(f"{'.'.join(map(str, at))} has {min(double)} already; change that by an override")
    goes_down = lambda where: (*at, *hole, *where[len(at) :])  # noqa: E731

    def moved(where: Path, match: re.Match) -> str:
        dots, rest = len(match[1]), [key for key in re.split(r"[.\[\]]+", match[2]) if key]
        ancestor = where[: max(0, len(where) - dots)]
        if ancestor[: len(at)] == at:
            return match[0]  # it stays within what moves
        target = (*ancestor, *rest)
        is_inside = _starts(target, at) and dots <= len(where)
        if is_inside and (len(target) > len(at) or _starts(where, critic)):
            rest = [str(key) for key in goes_down(target)[len(ancestor) :]]
        further = len(hole) if _starts(where, at) else 0
        return "${" + "." * (dots + further) + ".".join(rest) + "}"

    for where, value in list(_leaves(tree)):
        if isinstance(value, str) and "${." in value:
            _at(tree, where[:-1])[where[-1]] = _RELATIVE.sub(lambda match, where=where: moved(where, match), value)
    inner, outer = owner[at[-1]], copy.deepcopy(template)
    _at(outer, hole[:-1])[hole[-1]] = inner
    owner[at[-1]] = outer


def _starts(where: Path, prefix: Path) -> bool:
    return tuple(map(str, where[: len(prefix)])) == tuple(map(str, prefix))


def _at(tree: Any, where: Path) -> Any:
    for key in where:
        tree = tree[int(key)] if isinstance(tree, list) else tree.get(key) if isinstance(tree, dict) else None
    return tree


def _children(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, list):
        yield from enumerate(tree)


def _leaves(tree: Any, above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of everything in a tree that is no mapping and no list."""
    if not isinstance(tree, (dict, list)):
        yield above, tree
    for key, value in _children(tree):
        yield from _leaves(value, (*above, key))


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree."""
    if isinstance(tree, dict):
        yield tree
    for _, value in _children(tree):
        yield from _nodes(value)


__all__: list[str] = ["apply", "apply_to_new", "read_correction"]
