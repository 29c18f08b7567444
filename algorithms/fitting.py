"""Why an algorithm cannot take a correction, although it has the places that the correction goes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from algorithms.trees import Path, at, columns, dotted, learning, nodes, parts, terms
from upge.errors import ConfigError
from upge.gates import Gate
from upge.instantiate import TARGET, build
from upge.testing import random_batch

REWARDS = "rewards"
_OF_ITS_OWN = "an algorithm file of your own may have such a `sampling` all the same"


def places(algorithm: dict[str, Any], slot: str) -> list[Path]:
    """Where in an algorithm's tree a `wrap` of this slot goes; see `algorithms.correcting`."""
    own = learning(algorithm)
    if slot != REWARDS:
        return [("terms", name, *slot.split(".")) for name in own]
    found: list[Path] = [("terms", name, "estimator", "advantage") for name in own]
    for name in (n for n in terms(algorithm) if n not in own):
        where = ("terms", name, "estimator", "advantage")
        if {"rewards", "group"} <= columns(at(algorithm, where)):
            found.append(where)
    return [*found, ("critic", "returns")] if algorithm.get("critic") else found


def unfit(algorithm: dict[str, Any], overlay: Mapping[str, Any]) -> str | None:
    """The reason for which this algorithm cannot take the correction, or None."""
    own = learning(algorithm)
    if not own:
        return "it has no term that learns from rollouts"
    for name in own:
        for where, node in nodes(algorithm["terms"][name]):
            said = (overlay.get("refuse") or {}).get(node.get(TARGET))
            if said:
                return f"{dotted(('terms', name, *where))} is a {node[TARGET].rpartition('.')[2]}; {said}"
    if REWARDS in (overlay.get("wrap") or {}):
        for place in places(algorithm, REWARDS):
            for where, cls in parts(at(algorithm, place)):
                if not getattr(cls, "graded", True):
                    return (
                        f"{dotted((*place, *where))} is a {cls.__name__}, which only asks whether a reward is a "
                        "success: a reward that is changed a little changes nothing there, or turns a success into a "
                        "failure; give an advantage of the reward itself, such as upge.GroupRelative"
                    )
    return _samples_away(algorithm, overlay["sampling"]) if overlay.get("sampling") is not None else None


def _samples_away(algorithm: dict[str, Any], sampling: Any) -> str | None:
    """Which lesson would be lost if the questions on which `sampling` is closed were replaced by others."""
    for name, term in terms(algorithm).items():
        if term.get("source") != "rollouts":
            source = str(term.get("source")).replace("_", " ")
            return (
                f"its term '{name}' learns from {source}, and sampling would replace, with their {source}, the "
                f"questions that all rollouts fail or solve; {_OF_ITS_OWN}"
            )
    if algorithm.get("interleaved_update") is not None:
        return f"its `interleaved_update` gathers questions by their pass rate, and sampling would replace these; {_OF_ITS_OWN}"
    for name in learning(algorithm):
        rate = _open_elsewhere(algorithm, name, sampling)
        if rate is not None:
            return (
                f"the gate of its term '{name}' chooses questions by their pass rate and is open at {rate:g}, where "
                f"sampling is closed; {_OF_ITS_OWN}"
            )
    return None


def _open_elsewhere(algorithm: dict[str, Any], name: str, sampling: Any) -> float | None:
    """A pass rate at which the term's gate, if it is one on pass rates, is open but that of `sampling` closed."""
    number = 24  # enough for every share that people write: halves, thirds, quarters, eighths
    batch = random_batch(groups=number + 1, group_size=number, length=1, pairs=False)
    solved = batch.row % (number + 1) < batch.group_index
    batch = batch.with_rewards(solved.to(batch.rewards.dtype))
    try:
        tree = OmegaConf.create({**algorithm, "sampling": sampling})
        at_its_place = OmegaConf.to_container(tree.terms[name].gate, resolve=True)
        gate = build(at_its_place, "", Gate)
        chosen = build(OmegaConf.to_container(tree.sampling.gate, resolve=True), "", Gate)
        if "rewards" not in gate.columns:
            return None
        lost = chosen.closed(batch) & ~gate.closed(batch) & ~batch.is_demonstration
    except (ConfigError, OmegaConfBaseException, ValueError):
        return None  # reported when the algorithm is built, or a gate that must see the model first
    return float(batch.pass_rate[lost][0]) if bool(lost.any()) else None


__all__ = ["places", "unfit"]
