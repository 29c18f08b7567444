"""Advantages that spoil updates, for test_bad_input.py."""

from dataclasses import dataclass

from upge import AdvantageEstimator


@dataclass(frozen=True)
class Exploding(AdvantageEstimator):
    """NaN in the steps from `first` to `last` (counted from 0), else ±1."""

    first: int = 0
    last: int = 10**9
    reads = frozenset({"rewards"})

    def __call__(self, batch):
        value = float("nan") if self.first <= batch.step <= self.last else 1.0
        return ((batch.rewards * 2 - 1) * value)[:, None].expand(batch.response_mask.shape)


def raising_verifier(response: str, answer: str, prompt: str | None = None) -> float:
    """A verifier of a user's own that fails."""
    raise RuntimeError("no verdict")
