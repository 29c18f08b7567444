"""Exact results about the estimators: their expectation by enumeration, their factors by symbolic derivation.

    upge.theory.policy       a softmax policy small enough to enumerate, and the exact gradients of its objectives
    upge.theory.draws        every batch that can be drawn from it, with its probability
    upge.theory.enumerate    the exact expectation and variance of any algorithm's gradient on such a policy
    upge.theory.objectives   the objective that an estimator maximizes, by its expected gradient on several prompts
    upge.theory.symbolic     the factor in front of ∇π_θ, derived from a written objective

Each module is loaded when it is first used; only `symbolic` loads sympy.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("draws", "enumerate", "objectives", "policy", "symbolic")


def __getattr__(name: str) -> ModuleType:
    """Import a module of this package when it is first used, as in `upge.theory.enumerate`."""
    if name in _MODULES:
        return importlib.import_module(f"upge.theory.{name}")
    raise AttributeError(f"module 'upge.theory' has no attribute '{name}'")
