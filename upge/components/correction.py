"""Corrections that wrap other parts: for an inference engine that samples from a slightly different policy than the
trainer computes, and for rewards of overlong responses.

The ratio π_old/π_sampler exists only for rollouts: no engine sampled a demonstration, so these parts go with terms that
learn from rollouts and are refused elsewhere (`Algorithm.check`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from upge.components.base import AdvantageEstimator, Component, Formula, ReferenceDenominator, StabilizationMask
from upge.components.mask import RATIO_COLUMNS
from upge.errors import ConfigError
from upge.trajectories import Trajectories, masked_mean
from upge.views import TokenView

SAMPLER_COLUMNS = RATIO_COLUMNS | {"sampler_logprobs"}


@dataclass(frozen=True)
class SamplerCorrected(ReferenceDenominator):
    """π_ref = inner / min(ρ, cap), truncated importance sampling for the mismatch between the policy as the trainer
    computes it and as the inference engine sampled from it.

    `level` = 'token': ρ_t = π_old/π_sampler of the token. 'sequence': ρ = Π_t ρ_t, one number for the response, the
    unbiased weight of a whole sample, whose variance grows with the length. cap = None: no truncation.
    """

    denominator: ReferenceDenominator
    cap: float | None = 2.0
    level: Literal["token", "sequence"] = "token"
    reads: ClassVar[frozenset[str]] = SAMPLER_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap is not None and not 1 <= self.cap < math.inf:
            raise ConfigError(
                f"SamplerCorrected.cap: {self.cap} bounds the ratio itself, which is 1 where trainer and engine agree; "
                "give a finite number of 1 or more (2.0 is customary), or null for no truncation"
            )

    @property
    def reach(self) -> str:
        """As far as `level` looks."""
        return "token" if self.level == "token" else "trajectory"

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        log_weight = batch.log_sampler_ratio
        if self.level == "sequence":
            log_weight = log_weight.sum(dim=1, keepdim=True)
        if self.cap is not None:
            log_weight = log_weight.clamp(max=math.log(self.cap))
        return self.denominator(batch) - log_weight

    def formula(self) -> Formula:
        inner = self.denominator.formula()
        text, latex = "π_old/π_sampler", r"\frac{\pi_{old}}{\pi_{sampler}}"
        if self.level == "sequence":
            text, latex = "π_old(τ)/π_sampler(τ)", r"\frac{\pi_{old}(\tau)}{\pi_{sampler}(\tau)}"
        if self.cap is not None:
            text, latex = f"min({text}, {self.cap:g})", rf"\min({latex}, {self.cap:g})"
        return Formula(f"{inner.text} · {text}", rf"{inner.latex}\,{latex}")


@dataclass(frozen=True)
class SequenceSamplerBand(StabilizationMask):
    """1[low ≤ ρ ≤ high], one decision per response, whatever the advantage's sign: masked importance sampling for the
    mismatch of trainer and inference engine.

    `mean` = 'product': ρ = Π_t π_old/π_sampler, the ratio of the whole response. 'geometric': its |τ|-th root, which
    does not shrink or grow with the length; its bounds must lie close to 1.
    """

    low: float = 0.0
    high: float = 2.0
    mean: Literal["geometric", "product"] = "product"
    reads: ClassVar[frozenset[str]] = SAMPLER_COLUMNS
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= 1 <= self.high:
            raise ConfigError(
                f"SequenceSamplerBand: low={self.low}, high={self.high} bound the ratio itself, which is 1 where "
                "trainer and engine agree; need 0 <= low <= 1 <= high"
            )

    def __call__(self, batch: Trajectories, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        log_ratio = batch.log_sampler_ratio
        if self.mean == "product":
            log_ratio = log_ratio.sum(dim=1, keepdim=True)
        else:
            log_ratio = masked_mean(log_ratio, batch.response_mask)
        log_low = math.log(self.low) if self.low > 0 else -math.inf
        inside = (log_ratio >= log_low) & (log_ratio <= math.log(self.high))
        return inside.to(log_ratio.dtype).expand(batch.response_mask.shape)

    def formula(self) -> Formula:
        text, latex = "π_old(τ)/π_sampler(τ)", r"\frac{\pi_{old}(\tau)}{\pi_{sampler}(\tau)}"
        if self.mean == "geometric":
            text, latex = f"({text})^(1/|τ|)", rf"\left({latex}\right)^{{1/|\tau|}}"
        low = f"{self.low:g} ≤ " if self.low > 0 else ""
        latex_low = rf"{self.low:g}\le " if self.low > 0 else ""
        return Formula(f"1[{low}{text} ≤ {self.high:g}]", rf"\mathbb{{1}}[{latex_low}{latex}\le {self.high:g}]")


@dataclass(frozen=True)
class OverlongShaped(AdvantageEstimator):
    """The inner Â on R - penalty·clip((|τ| - s)/(limit - s), 0, 1), s = limit·(1 - buffer): the soft punishment of
    overlong rollouts of arXiv 2503.14476, Eq. 13. Gates and pass rates see the verifier's reward as it was.

    Attributes:
        advantage: evaluated on the shaped rewards. Demonstrations keep theirs.
        limit: tokens from which on the punishment is whole; the run's response limit.
        buffer: the share of the limit over which the punishment rises.
        penalty: what the longest responses lose; 0.5 of rewards in [0, 1] is what 1 is of the ±1 of that paper.
    """

    advantage: AdvantageEstimator
    limit: int
    buffer: float = 0.2
    penalty: float = 0.5
    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "is_demonstration"})
    reach: ClassVar[str] = "trajectory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 1 or not 0 < self.buffer <= 1 or not 0 <= self.penalty < math.inf:
            raise ConfigError(
                f"OverlongShaped: limit={self.limit}, buffer={self.buffer}, penalty={self.penalty}; the limit is a "
                "number of tokens, the buffer a share of it in (0, 1], the penalty finite and not negative"
            )
        for path, part in _inside({"advantage": self.advantage}):
            if not getattr(part, "graded", True):
                raise ConfigError(
                    f"OverlongShaped.{path}: {type(part).__name__} only asks whether a reward is a success, so a "
                    "punished reward would change nothing or turn a success into a failure; give an advantage of the "
                    "reward itself, such as upge.GroupRelative"
                )

    @property
    def _start(self) -> float:
        return self.limit * (1 - self.buffer)

    def shaped(self, batch: Trajectories) -> Trajectories:
        """The batch, or a view of it, with the punished rewards."""
        beyond = ((batch.lengths.double() - self._start) / (self.limit - self._start)).clamp(0, 1)
        punished = beyond * (~batch.is_demonstration).double()
        return batch.with_rewards(batch.rewards.double() - self.penalty * punished)

    def precompute_parts(self, batch: Trajectories) -> Component:
        """What the wrapped part knows before the forward pass, it must know of the shaped rewards."""
        return dataclasses.replace(self, advantage=self.advantage.precomputed(self.shaped(batch)))

    def __call__(self, batch: Trajectories) -> Float[Tensor, "B T"]:
        return self.advantage(self.shaped(batch))

    def formula(self) -> Formula:
        inner, start, width = self.advantage.formula(), self._start, self.limit - self._start
        return Formula(
            f"[{inner.text}, R ← R − {self.penalty:g}·clip((|τ| − {start:g})/{width:g}, 0, 1)]",
            rf"\left[{inner.latex}\right]_{{R\leftarrow R-{self.penalty:g}\,"
            rf"\mathrm{{clip}}\left((|\tau|-{start:g})/{width:g},0,1\right)}}",
        )


def _inside(parts: Mapping[str, Component], above: str = "") -> Iterator[tuple[str, Component]]:
    """(path, part) of some parts and of all that they wrap."""
    for name, part in parts.items():
        yield above + name, part
        yield from _inside(part.parts, f"{above}{name}.")


__all__ = ["OverlongShaped", "SamplerCorrected", "SequenceSamplerBand"]
