"""How a broken rule is told: one sentence that says which it is and how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from upge.trajectories import Trajectories
from upge.views import UndeclaredColumn

#: Largest difference of two values that must be equal, relative to the largest of them (at least 1).
TOLERANCE = 1e-10


class ConformanceError(AssertionError):
    """A part or an algorithm breaks a rule; the message says which and how to mend it."""


def require(holds: bool, message: str) -> None:
    """Raises `ConformanceError` with `message` unless the rule holds."""
    if not holds:
        raise ConformanceError(message)


def require_instance(value: object, kind: type, example: str) -> None:
    """Raises TypeError unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"expected {example}, found {found}; pass an instance")


def attempt(problem: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`; an exception breaks the rule `problem`, unless it names a column that was not declared."""
    try:
        return call(*arguments)
    except UndeclaredColumn:
        raise
    except Exception as error:
        raise ConformanceError(f"{problem} ({type(error).__name__}: {error})") from error


def valid(value: Tensor, batch: Trajectories) -> Tensor:
    """The entries of a part's value that mean something: those of tokens that count, or all of [B]."""
    return value if value.ndim == 1 else value[batch.response_mask]


def same(name: str, problem: str, expected: Tensor, found: Tensor, batch: Trajectories) -> None:
    """Both have the same values where `batch` has tokens that count; what is wider is cut to it."""
    width = batch.response_mask.shape[1]
    close(name, problem, *(valid(x if x.ndim == 1 else x[:, :width], batch) for x in (expected, found)))


def close(name: str, problem: str, expected: Tensor, found: Tensor, tolerance: float = TOLERANCE) -> None:
    """Both have the same values up to rounding."""
    difference = float((expected.double() - found.double()).detach().abs().max()) if expected.numel() else 0.0
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    require(difference <= tolerance * scale, f"{name} {problem} (largest difference {difference:.3g})")
