"""Assertions of the conformance suite; their messages are one sentence that names the broken rule and the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from upge.trajectories import Trajectories
from upge.views import UndeclaredColumn

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: The largest difference between values that must be equal, relative to the largest of them (at least 1).
TOLERANCE = 1e-10
#: The same on float32 columns. Float32 rounds at 6e-8; a part, or the product of several factors, may amplify the
#: rounding of a log-prob, but not to this size.
SINGLE_TOLERANCE = 1e-3


class ConformanceError(AssertionError):
    """A part or an algorithm breaks a rule; the message names the rule and the fix."""


def require(holds: bool, message: str) -> None:
    """Raise `ConformanceError` with `message` unless the rule holds."""
    if not holds:
        raise ConformanceError(message)


def require_instance(value: object, kind: type, example: str, fix: str = "pass an instance") -> None:
    """Raise TypeError unless `value` is an instance of `kind`; `fix` is for instances of other classes."""
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"expected {example}, found {given}; {'pass an instance' if isinstance(value, type) else fix}")


def attempt(problem: str, call: Callable[_P, _R], *arguments: _P.args, **keywords: _P.kwargs) -> _R:
    """The result of a call, whose exceptions become a `ConformanceError`.

    Raises:
        ConformanceError: the call raised.
        upge.trajectories.UndeclaredColumn: the call read a column that was not declared.
    """
    try:
        return call(*arguments, **keywords)
    except UndeclaredColumn:
        raise
    except Exception as error:
        raise ConformanceError(f"{problem} ({type(error).__name__}: {error})") from error


def valid(value: Tensor, batch: Trajectories) -> Tensor:
    """The defined entries of a part's value: those of tokens in the response mask, or all of [B]."""
    return value if value.ndim == 1 else value[batch.response_mask]


def same(name: str, problem: str, expected: Tensor, actual: Tensor, batch: Trajectories) -> None:
    """Require equal values on the tokens in the response mask of `batch`; wider values are cut to its width."""
    width = batch.response_mask.shape[1]
    left, right = (valid(x if x.ndim == 1 else x[:, :width], batch) for x in (expected, actual))
    close(name, problem, left, right)


def close(name: str, problem: str, expected: Tensor, actual: Tensor, tolerance: float = TOLERANCE) -> None:
    """Require equal values up to rounding."""
    difference = float((expected.double() - actual.double()).detach().abs().max()) if expected.numel() else 0.0
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    require(difference <= tolerance * scale, f"{name} {problem} (largest difference {difference:.3g})")
