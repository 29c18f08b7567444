"""The support of a term or penalty: the candidate tokens at each position whose probabilities it moves.

The gradient of a term is Σ_t w_t Σ_v c_v ∇π_θ(v|t), where v runs over the support. For each v the four factors give
k_v = π_θ(v)·c_v = 1_stable · (1/π_ref) · Â · f′ · π_θ(v), as they do for the sampled token alone, which is the default.
With z the logits, ∂(Σ_v c_v π_v)/∂z = k - (Σ_v k_v) π.

On a support the parts are evaluated in the shape [N, K]: N packed tokens, K candidates. The columns `logprobs`,
`reference_logprobs` and `teacher_logprobs` are then those of the candidates, and all others are [N, 1]. So the same
part, such as `LogRatio`, serves the sampled token and the whole distribution. V is the size of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Int
from torch import Tensor

from upge.checks import check_fields
from upge.components.base import Component, live_reads, walk
from upge.errors import ConfigError
from upge.formula import Formula
from upge.views import LIVE_COLUMNS, TRAJECTORY_COLUMNS, Distributions

#: Columns whose values on a support are those of the candidates.
CANDIDATE_COLUMNS = frozenset({"logprobs", "reference_logprobs", "teacher_logprobs", "is_sampled"})
#: Columns that are known for the sampled token alone.
_SAMPLED_ONLY = frozenset({"behavior_logprobs", "sampler_logprobs"})


class Support(ABC):
    """The tokens at each position whose probabilities a term moves; a subclass is a frozen dataclass.

    Attributes:
        live: class attribute; the columns that are known only in the policy's forward pass.
        temperature: the temperature of the distributions that are compared and moved, on top of the sampler's.
    """

    live: ClassVar[frozenset[str]] = LIVE_COLUMNS | CANDIDATE_COLUMNS
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abstractmethod
    def title(self) -> str:
        """The candidates in words; empty for the sampled token."""

    @abstractmethod
    def candidates(self, given: Distributions) -> Int[Tensor, "N K"] | None:
        """[N, K] the candidate tokens at each position; None for the whole vocabulary."""

    @abstractmethod
    def formula(self, product: Formula) -> Formula:
        """The formula of the sum of `product` over the support."""

    def models(self, part: Component) -> frozenset[str]:
        """Those of 'reference' and 'teacher' whose distributions `part` needs on this support."""
        read = {"reference": "reference_logprobs", "teacher": "teacher_logprobs"}
        return frozenset(model for model, column in read.items() if column in part.columns)

    def check(self, parts: Mapping[str, Component]) -> None:
        """Check that parts, by path, can be evaluated on this support.

        Raises:
            ConfigError: a part looks beyond a token, needs what is known for the sampled token alone, or needs the
                whole vocabulary.
        """
        for place, outer in parts.items():
            for path, part in walk(outer, place):
                if reason := self.refuses(part):
                    raise ConfigError(f"{type(part).__name__} {reason}", path)

    def refuses(self, part: Component) -> str | None:
        """Why `part` cannot be evaluated on this support, with the fix; None if it can."""
        name = type(self).__name__
        if part.reads & _SAMPLED_ONLY:
            return (
                "compares with the policy that sampled, whose log-probs are known for the sampled token alone, but the "
                f"support is {name}; give another part, such as upge.NoMask as mask or "
                "upge.UnitDenominator as denominator, or leave out `support`"
            )
        if part.reach_with(self.live) != "token" or live_reads(part, self.live) & set(TRAJECTORY_COLUMNS):
            return (
                f"looks beyond a token in the forward pass, which the support {name} does not allow; give a part of "
                "reach 'token' that reads only columns with one number per token"
            )
        if part.needs_vocabulary and not isinstance(self, FullVocabulary):
            return (
                f"needs the whole vocabulary, but the support is {name}; set support={{_target_: upge.FullVocabulary}}"
            )
        return None


@dataclass(frozen=True)
class SampledToken(Support):
    """The sampled token alone: the policy gradient of the paper."""

    live: ClassVar[frozenset[str]] = LIVE_COLUMNS

    @property
    def title(self) -> str:
        return ""

    def candidates(self, given: Distributions) -> Int[Tensor, "N K"]:
        return given.tokens[:, None]

    def formula(self, product: Formula) -> Formula:
        return product

    def refuses(self, part: Component) -> str | None:
        if part.needs_vocabulary:
            return "needs the whole vocabulary; set support={_target_: upge.FullVocabulary}"
        return None


@dataclass(frozen=True)
class FullVocabulary(Support):
    """All tokens of the vocabulary, so that the sum over them is exact: nothing has to be divided by a probability.

    Attributes:
        temperature: the temperature of the distributions that are compared and moved, on top of the sampler's; 1 leaves
            them unchanged.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self)

    @property
    def title(self) -> str:
        return "whole vocabulary"

    def candidates(self, given: Distributions) -> None:
        return None

    def formula(self, product: Formula) -> Formula:
        return Formula(f"Σ_v {product.text}{_at(self)}", rf"\sum_v {product.latex}")


@dataclass(frozen=True)
class TopK(Support):
    """The `k` most likely tokens of the policy, the reference policy or the teacher.

    Probabilities are not renormalized. The sum over the other tokens is missing, which is a bias; it shrinks with the
    probability mass outside the k tokens.

    Attributes:
        k: number of candidates.
        of: the model whose most likely tokens are the candidates.
        temperature: as in `FullVocabulary`.
    """

    k: int = 32
    of: Literal["policy", "reference", "teacher"] = "policy"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self)
        if self.k < 1:
            raise ConfigError(f"TopK.k: {self.k} must be at least 1")

    @property
    def title(self) -> str:
        return f"top {self.k} tokens"

    def models(self, part: Component) -> frozenset[str]:
        return super().models(part) | ({self.of} - {"policy"})

    def candidates(self, given: Distributions) -> Int[Tensor, "N K"]:
        ranked: Tensor | None = getattr(given, self.of)
        if ranked is None:
            raise ValueError(f"TopK.of: {self.of}, but the batch has no distribution of it; give `distributions`")
        return ranked.detach().topk(min(self.k, ranked.shape[-1]), dim=-1, sorted=False).indices

    def formula(self, product: Formula) -> Formula:
        whose = {"policy": "π_θ", "reference": "π_0", "teacher": "ν"}[self.of]
        latex = {"policy": r"\pi_\theta", "reference": r"\pi_0", "teacher": r"\nu"}[self.of]
        return Formula(
            f"Σ_{{v ∈ top {self.k} of {whose}}} {product.text}{_at(self)}",
            rf"\sum_{{v\in\mathrm{{top}}_{{{self.k}}}({latex})}} {product.latex}",
        )


def _check_temperature(support: FullVocabulary | TopK) -> None:
    if not 0 < support.temperature < float("inf"):
        raise ConfigError(f"{type(support).__name__}.temperature: {support.temperature} must be positive and finite")


def _at(support: FullVocabulary | TopK) -> str:
    return "" if support.temperature == 1.0 else f" at temperature {support.temperature:g}"
