"""Built algorithms as flat dictionaries, for tests/goldens.py.

A leaf is a JSON value by its path, such as `terms[rl].estimator.mask.high: 0.2`. A class is a leaf at its object's own
path, its name after an @. Objects of two commits are compared path by path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import algorithms
from tests.policy import sample
from upge import Pipeline

Flat = dict[str, Any]
ROOT = Path(__file__).parent.parent


def flatten(value: Any, path: str = "") -> Flat:
    """`value`, made of dataclasses, mappings, sequences and JSON values, as path → leaf.

    Raises:
        TypeError: a value that has no canonical form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        flat: Flat = {path: f"@{type(value).__name__}"}
        for field in dataclasses.fields(value):
            flat |= flatten(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
        return flat
    if isinstance(value, Mapping):
        members = {f"{path}[{key}]": item for key, item in value.items()}
        # The order of terms and stages is that of the file and matters.
        flat = {f"{path}.keys": [str(key) for key in value]} if value else {path: {}}
        return flat | {p: leaf for at, item in members.items() for p, leaf in flatten(item, at).items()}
    if isinstance(value, (list, tuple)) and value:
        return {p: leaf for i, item in enumerate(value) for p, leaf in flatten(item, f"{path}[{i}]").items()}
    if isinstance(value, (set, frozenset)):
        return {path: sorted(map(str, value))}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {path: value}
    if isinstance(value, (list, tuple)):
        return {path: []}
    if not vars(value):
        return {path: f"@{type(value).__name__}"}
    raise TypeError(f"{path}: no canonical form for {value!r}")


def numbers(algorithm: Any, path: str = "estimate") -> Flat:
    """What the algorithm does to a seeded batch in float64: its loss and two numbers of the gradient.

    The objects say how an algorithm is built, these what it computes: a change of structure that keeps the mathematics
    changes the former only.
    """
    if isinstance(algorithm, Pipeline):
        stages = ((f"{path}[{name}]", stage.algorithm) for name, stage in algorithm.stages.items())
        return {p: leaf for at, inner in stages for p, leaf in numbers(inner, at).items()}
    s = sample(0, groups=4, rollouts=3, pairs=algorithm.needs.preference_pairs)
    try:
        loss = torch.as_tensor(algorithm.estimate(s.batch).loss)
        (gradient,) = torch.autograd.grad(loss + 0 * s.logits.sum(), s.logits)
    except Exception as error:
        return {path: f"@{type(error).__name__}"}
    direction = torch.randn(gradient.shape, dtype=gradient.dtype, generator=torch.Generator().manual_seed(1))
    return {
        f"{path}.loss": loss.item(),
        f"{path}.gradient_norm": gradient.norm().item(),
        f"{path}.gradient_in_a_direction": (gradient * direction).sum().item(),
    }


def outcome(algorithm: str, corrections: list[str], overrides: list[str]) -> Flat:
    """The object that `algorithms.load` builds, with its needs and numbers; or `refused`: class, and `message`."""
    try:
        built = algorithms.load(algorithm, overrides, corrections)
    except Exception as error:
        return {"refused": f"@{type(error).__name__}", "message": str(error).replace(str(ROOT), "ROOT")}
    return flatten(built) | flatten(built.needs, "needs") | numbers(built)


def as_change(base: Flat, flat: Flat) -> dict[str, Any]:
    """`flat` as what it changes in `base`, which is short and readable."""
    # A leaf 1.0 is not a leaf 1, nor True.
    change = {p: leaf for p, leaf in flat.items() if p not in base or (type(base[p]), base[p]) != (type(leaf), leaf)}
    without = sorted(p for p in base if p not in flat)
    return {"change": change} | ({"without": without} if without else {})


def from_change(base: Flat, stored: dict[str, Any]) -> Flat:
    """The inverse of `as_change`."""
    return {p: leaf for p, leaf in base.items() if p not in set(stored.get("without", ()))} | stored["change"]
