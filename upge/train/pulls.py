"""Where each term and regularizer pulls the policy: the norms of their gradients and the angles between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from upge.plan import Plan
from upge.train.engine import Engine

#: This rank's partitions of ∇ factor·L of a plan, without a trace in what is trained; all ranks call it.
Gradient = Callable[[tuple[float, Plan]], list[Tensor]]


def pulls(plan: Plan, gradient: Gradient, device: torch.device) -> dict[str, list[Tensor] | None]:
    """By name of a term or regularizer this rank's part of its gradient, None where nothing has a weight in it.

    They add up to the gradient of the whole plan. Each costs a forward and a backward pass over the trajectories that
    have a weight in it, and 4 bytes of memory a parameter over all ranks.
    """
    found: dict[str, list[Tensor] | None] = {}
    # Where the model drops activations by chance, the update that follows must find the state that it would have found.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name in dict.fromkeys([*plan.terms, *plan.penalties]):
            alone = plan.alone(name)
            found[name] = gradient((1.0, alone)) if bool(alone.contributing.any()) else None
    return found


def pull_figures(plan: Plan, gradient: Gradient, engine: Engine) -> dict[str, float]:
    """`NAME/grad_norm` of each term and regularizer, and `cosine/A_B` of each two whose gradients are not zero."""
    found, figures, norms = pulls(plan, gradient, engine.world.device), {}, {}
    for name, part in found.items():
        norms[name] = math.sqrt(engine.dot(part, part)) if part is not None else 0.0
        figures[f"{name}/grad_norm"] = norms[name]
    for a, b in itertools.combinations([name for name in found if norms[name] != 0], 2):
        figures[f"cosine/{a}_{b}"] = engine.dot(found[a], found[b]) / (norms[a] * norms[b])
    return figures
