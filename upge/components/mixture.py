"""1/π_ref for data that may have come from one of several policies: π_ref is their mixture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from upge.components.base import Formula, ReferenceDenominator
from upge.components.mask import RATIO_COLUMNS
from upge.errors import ConfigError
from upge.views import TokenView


@dataclass(frozen=True)
class MixedBehaviorPolicy(ReferenceDenominator):
    """π_ref = share·π_old + (1 - share): a mixture of the policy before the update and one that is certain of every
    token, for demonstrations whose own policy is unknown (multiple importance sampling, arXiv 2508.00222).

    The ratio π_θ/π_ref stays below 1/(1 - share), however unlikely π_old found the token. share = 1 is
    `BehaviorPolicy`, share = 0 `UnitDenominator`. It reads π_old on demonstrations, too; without a behaviour column
    π_old is π_θ.
    """

    share: float = 0.75
    reads: ClassVar[frozenset[str]] = RATIO_COLUMNS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ConfigError(
                f"MixedBehaviorPolicy.share: {self.share} is not a share; give a number between 0 (π_ref = 1) and 1 "
                "(π_ref = π_old)"
            )

    def __call__(self, batch: TokenView) -> Float[Tensor, "*shape"]:
        log_old = math.log(self.share) if self.share > 0 else -math.inf
        log_sure = math.log1p(-self.share) if self.share < 1 else -math.inf
        old = batch.log_behavior + log_old
        return torch.logaddexp(old, torch.full_like(old, log_sure))

    def formula(self) -> Formula:
        mixture = f"{self.share:g}·π_old + {1 - self.share:g}"
        return Formula(f"1/({mixture})", rf"\frac{{1}}{{{self.share:g}\pi_{{old}}+{1 - self.share:g}}}")
