"""Corrections: overlays that any algorithm can take, a YAML file each in corrections/.

    description: one line
    wrap:           # place in a term → the part that takes its place; INNER, once, stands for the part that was there
      estimator.denominator: {_target_: upge.SamplerCorrected, denominator: INNER, cap: 2.0}
    set:            # class → settings of every part of that class
      upge.PPOClip: {dual: 3.0}
    regularizers: {kl: {_target_: upge.KLPenalty, ...}}
    sampling: {_target_: upge.DynamicSampling, ...}
    refuse:         # class → why no term that has such a part can take the correction
      upge.KLPenalizedReward: it does the same

`wrap`, `set` and `refuse` look at the terms that learn from rollouts and at no others. The place `rewards` is every
advantage that the rewards of rollouts enter: these terms', those that compare a demonstration with its group, and the
critic's returns. Where a correction stands in several places, the later ones refer to the settings of the first. An
algorithm without a term that learns from rollouts, or without a part of the class, is refused; so is one that a
correction would work against (`algorithms.fitting`). Of a pipeline, each stage that can take the correction does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from algorithms.files import CORRECTIONS, content, find, stem
from algorithms.fitting import places, unfit
from algorithms.trees import INNER, Path, at, dotted, hole_of, keys_of, leaves, nodes, stages, starts, terms
from upge.errors import ConfigError, nearest
from upge.instantiate import TARGET

_KEYS = {"description", "wrap", "set", "regularizers", "sampling", "refuse"}
#: A relative interpolation: its dots climb from the mapping or list that holds it, the rest goes down again.
_RELATIVE = re.compile(r"\$\{(\.+)([\w.\[\]-]*)\}")


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
        reasons, wanted = [], stages(tree)
        for place in wanted:
            try:
                tree = _applied(tree, place, overlay, str(name))
            except _Unfit as error:
                reasons.append(str(error))
        if len(reasons) == len(wanted):
            why = "; ".join(dict.fromkeys(reasons)) or "there is no stage"
            raise ConfigError(f"correction: '{name}' cannot be applied to {path}: {why}")
        if wanted != [()]:
            tree["corrected"] = [*(tree.get("corrected") or ()), str(name)]
    return tree


def apply_missing(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A pipeline's tree with its corrections also in stages that have been put there since, as far as these can take
    them; and, of the corrections that then no stage has, the reasons."""
    nowhere = {}
    for name in tree.get("corrected") or ():
        reasons, wanted = [], stages(tree)
        for place in wanted if wanted != [()] else ():
            if name in (at(tree, place).get("corrected") or ()):
                continue
            try:
                tree = _applied(tree, place, read_correction(name), str(name))
            except _Unfit as error:
                reasons.append(f"{place[1]}: {error}")
        if wanted != [()] and len(reasons) == len(wanted):
            nowhere[str(name)] = "; ".join(reasons) or "there is no stage"
    return tree, nowhere


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
    for key in ("wrap", "set", "regularizers", "refuse"):
        if not isinstance(overlay.get(key) or {}, dict):
            raise ConfigError(f"correction: {file}: {key} is {overlay[key]!r}; it must be a mapping")
    for place, template in (overlay.get("wrap") or {}).items():
        if sum(value == INNER for _, value in leaves(template)) != 1:
            raise ConfigError(f"correction: {file}: wrap.{place} must have {INNER} once, for the part that was there")
    return overlay


def _applied(tree: dict[str, Any], place: Path, overlay: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of `tree` with the overlay on the algorithm at `place`."""
    tree = copy.deepcopy(tree)
    algorithm = at(tree, place)
    for slot in overlay.get("wrap") or {}:
        for where in places(algorithm, slot):
            _check_free(algorithm, where, overlay["wrap"][slot])
    reason = unfit(algorithm, overlay)
    if reason is not None:
        raise _Unfit(reason)
    for slot, template in (overlay.get("wrap") or {}).items():
        wanted = places(algorithm, slot)
        for where in wanted:
            part = template if where == wanted[0] else _linked(template, where, wanted[0])
            _wrap(tree, (*place, *where), part, (*place, "critic"))
    for cls, settings in (overlay.get("set") or {}).items():
        own = [t for t in terms(algorithm).values() if t.get("source") == "rollouts"]
        found = [node for term in own for _, node in nodes(term) if node.get(TARGET) == cls]
        if not found:
            raise _Unfit(f"no {cls.rpartition('.')[2]} is among its parts")
        for node in found:
            _set(node, settings)
    for key, part in (overlay.get("regularizers") or {}).items():
        _add(algorithm, key, part)
    if overlay.get("sampling") is not None:
        if algorithm.get("sampling") is not None:
            raise _Unfit("it has `sampling` already; change that by algo.sampling.KEY=VALUE")
        algorithm["sampling"] = copy.deepcopy(overlay["sampling"])
    algorithm["corrected"] = [*(algorithm.get("corrected") or ()), name]
    return tree


def _linked(template: dict[str, Any], where: Path, first: Path) -> dict[str, Any]:
    """The template for another place: its settings refer to those in the first."""
    linked = copy.deepcopy(template)
    for inside, value in list(leaves(linked)):
        if value != INNER and inside[-1] != TARGET and not str(value).startswith("${."):
            target = dotted((*first, *inside))
            at(linked, inside[:-1])[inside[-1]] = "${" + "." * len((*where, *inside)) + target + "}"
    return linked


def _set(node: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if node.get(key) is not None:
            raise _Unfit(f"{node[TARGET]} has {key}: {node[key]} already; change that by an override")
        node[key] = value


def _add(algorithm: dict[str, Any], key: str, part: Any) -> None:
    present = algorithm.get("regularizers") or {}
    if key in present:
        raise _Unfit(f"regularizers.{key} is there already; change that by algo.regularizers.{key}.SETTING=VALUE")
    algorithm["regularizers"] = {**present, key: copy.deepcopy(part)}


def _check_free(algorithm: dict[str, Any], where: Path, template: Any) -> None:
    """Refuses a place where nothing stands, or where what the correction does is done already."""
    if at(algorithm, where) is None:
        raise _Unfit(f"{dotted(where)} is missing")
    # A list of parts, such as the masks of AllOf, may be there twice; what does the correction's work may not.
    hole = hole_of(template)
    lists = [hole[: n - 1] for n, key in enumerate(hole) if isinstance(key, int)]
    at_work = {node[TARGET] for inside, node in nodes(template) if TARGET in node and inside not in lists}
    double = at_work & {node.get(TARGET) for _, node in nodes(at(algorithm, where))}
    if double:
        raise _Unfit(f"{dotted(where)} has {min(double)} already; change that by an override")


def _wrap(tree: dict[str, Any], place: Path, template: Any, critic: Path) -> None:
    """Puts `template` at a place of `tree`, with what was there in place of INNER.

    References keep their meaning: those of the inner part to its neighbours climb further, and those of others to its
    settings go down further. One to the part as a whole now means the outer part, except the critic's: what its
    values stand for does not change.
    """
    owner, hole = at(tree, place[:-1]), hole_of(template)

    def moved(where: Path, match: re.Match) -> str:
        dots, rest = len(match[1]), list(keys_of(match[2]))
        ancestor = where[: max(0, len(where) - dots)]
        if ancestor[: len(place)] == place:
            return match[0]  # it stays within what moves
        target = (*ancestor, *rest)
        is_inside = starts(target, place) and dots <= len(where)
        if is_inside and (len(target) > len(place) or starts(where, critic)):
            further_down = (*place, *hole, *target[len(place) :])
            rest = [str(key) for key in further_down[len(ancestor) :]]
        further = len(hole) if starts(where, place) else 0
        return "${" + "." * (dots + further) + ".".join(rest) + "}"

    for where, value in list(leaves(tree)):
        if isinstance(value, str) and "${." in value:
            at(tree, where[:-1])[where[-1]] = _RELATIVE.sub(lambda match, where=where: moved(where, match), value)
    inner, outer = owner[place[-1]], copy.deepcopy(template)
    at(outer, hole[:-1])[hole[-1]] = inner
    owner[place[-1]] = outer


__all__: list[str] = ["apply", "apply_missing", "read_correction"]
