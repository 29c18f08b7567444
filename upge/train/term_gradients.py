"""The gradient of each term and regularizer alone: their norms, and the cosines between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from upge.plan import Plan
from upge.train.engine import Engine

#: (factor, plan) → this rank's partitions of ∇ factor·L. It leaves no trace in what is trained; all ranks call it.
Gradient = Callable[[tuple[float, Plan]], list[Tensor]]


def term_gradients(plan: Plan, gradient: Gradient, device: torch.device) -> dict[str, list[Tensor] | None]:
    """This rank's part of each term's and regularizer's gradient, by name; None where it is zero everywhere.

    They add up to the gradient of the whole plan. Each costs a forward and a backward pass over the trajectories that
    have a weight in it, and 4 bytes of memory per parameter over all ranks.
    """
    gradients: dict[str, list[Tensor] | None] = {}
    # Dropout must draw the same numbers in the update that follows as it would have drawn without this.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name in dict.fromkeys([*plan.terms, *plan.penalties]):
            alone = plan.alone(name)
            gradients[name] = gradient((1.0, alone)) if bool(alone.contributing.any()) else None
    return gradients


def term_gradient_metrics(plan: Plan, gradient: Gradient, engine: Engine) -> dict[str, float]:
    """`NAME/grad_norm` of each term and regularizer, and `cosine/A_B` of each pair of gradients that are not zero."""
    gradients = term_gradients(plan, gradient, engine.world.device)
    norms = {name: 0.0 if one is None else math.sqrt(engine.dot(one, one)) for name, one in gradients.items()}
    metrics = {f"{name}/grad_norm": norm for name, norm in norms.items()}
    nonzero = {name: one for name, one in gradients.items() if one is not None and norms[name] != 0}
    for a, b in itertools.combinations(nonzero, 2):
        metrics[f"cosine/{a}_{b}"] = engine.dot(nonzero[a], nonzero[b]) / (norms[a] * norms[b])
    return metrics
