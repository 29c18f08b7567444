"""One evaluation of the output head: chunk by chunk, with the gradients that add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upge.logprobs.chunks import Chunks, Statistics, statistics_dtype

#: Entries of a block of the weight's gradient, 2 MB in half precision.
_PRODUCT_ENTRIES = {"cpu": 2**20}
_PRODUCT_ENTRIES_GPU = 2**26


class Coefficients(NamedTuple):
    """The value and the derivatives of a loss on some tokens.

    Attributes:
        loss: its value, a scalar.
        logprobs: [c] ∂L/∂log π of each token.
        entropies: [c] ∂L/∂H of each token; None if no gradient flows through the entropies.
    """

    loss: Tensor
    logprobs: Tensor
    entropies: Tensor | None = None


#: (log-probs [c], entropies [c], the slice of the N tokens that they belong to) → coefficients.
CoefficientFunction = Callable[[Tensor, Tensor, slice], Coefficients]


class CheckedCoefficients:
    """A coefficient function whose results are checked.

    Args:
        function: the coefficient function.
        entropy_gradient: whether its results have coefficients of the entropies.
    """

    def __init__(self, function: CoefficientFunction, entropy_gradient: bool) -> None:
        self.function, self.entropy_gradient = function, entropy_gradient

    def __call__(self, logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
        result = self.function(logprobs, entropies, chunk)
        if result.loss.ndim or result.logprobs.shape != logprobs.shape:
            raise ValueError(
                f"coefficients: for {len(logprobs)} tokens expected a loss without dimensions and as many numbers, got "
                f"{tuple(result.loss.shape)} and {tuple(result.logprobs.shape)}"
            )
        if (result.entropies is not None) != self.entropy_gradient:
            given = "none" if result.entropies is None else "some"
            raise ValueError(
                f"coefficients: {given} came for the entropies, but entropy_gradient is {self.entropy_gradient}; make "
                "these agree"
            )
        return result


class Head:
    """One evaluation of the output head, whose gradients are accumulated chunk by chunk.

    Args:
        hidden: [N, D] states that predict the targets.
        weight: [V, D] output embedding.
        bias: [V] or None.
        targets: [N] token ids.
        temperature: divides the logits.
        size: the most tokens of a chunk.
        needed: which of hidden, weight and bias need a gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        size: int,
        needed: tuple[bool, ...],
    ) -> None:
        self.hidden, self.targets, self.temperature = hidden, targets, temperature
        self.chunks = Chunks(weight, bias, temperature, min(size, len(hidden)))
        self.gradients = Gradients(hidden, weight, bias, needed, several=len(hidden) > size)

    def one_pass(self, cuts: list[slice], coefficients: CheckedCoefficients) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, log-probs, entropies), with each chunk's gradients computed while its logits exist."""
        losses, columns = [], self._columns()
        for chunk in cuts:
            logits = self.chunks.logits(self.hidden[chunk])
            statistics = self.chunks.statistics(logits, self.targets[chunk], coefficients.entropy_gradient)
            columns[0, chunk], columns[1, chunk] = statistics.logprobs, statistics.entropies
            result = coefficients(statistics.logprobs, statistics.entropies, chunk)
            losses.append(result.loss)
            self._add(chunk, logits, statistics, result.logprobs, result.entropies)
        return (torch.stack(losses).sum() if losses else columns.sum()), columns[0].clone(), columns[1].clone()

    def two_passes(self, cuts: list[slice], coefficients: CheckedCoefficients) -> tuple[Tensor, Tensor, Tensor]:
        """The same, if a coefficient may depend on all log-probs."""
        columns = self._columns()
        for chunk in cuts:
            logits = self.chunks.logits(self.hidden[chunk])
            statistics = self.chunks.statistics(logits, self.targets[chunk], keep_logits=False)
            columns[0, chunk], columns[1, chunk] = statistics.logprobs, statistics.entropies
        logprobs, entropies = columns[0].clone(), columns[1].clone()
        result = coefficients(logprobs, entropies, slice(0, len(self.hidden)))
        for chunk in cuts:
            self.again(chunk, result.logprobs[chunk], None if result.entropies is None else result.entropies[chunk])
        return result.loss, logprobs, entropies

    def again(self, chunk: slice, by_logprobs: Tensor, by_entropies: Tensor | None) -> None:
        """Computes a chunk's logits again and adds its gradients."""
        logits = self.chunks.logits(self.hidden[chunk])
        statistics = self.chunks.statistics(logits, self.targets[chunk], by_entropies is not None)
        self._add(chunk, logits, statistics, by_logprobs, by_entropies)

    def _add(
        self, chunk: slice, logits: Tensor, statistics: Statistics, by_logprobs: Tensor, by_entropies: Tensor | None
    ) -> None:
        by_logprobs = by_logprobs.to(self.chunks.wide)
        if by_entropies is None:
            scale = by_logprobs / -self.temperature
        else:
            self.chunks.entropy_gradient(logits, self.targets[chunk], statistics, by_logprobs, by_entropies)
            scale = torch.full_like(by_logprobs, 1.0 / self.temperature)
        self.gradients.add(chunk, self.hidden[chunk], logits, scale)

    def _columns(self) -> Tensor:
        return self.hidden.new_empty(2, len(self.hidden), dtype=self.chunks.wide)


class Gradients:
    """The gradients of the head's input and parameters, summed over chunks; those that are not needed stay None.

    Args:
        hidden: [N, D] the input.
        weight: [V, D] output embedding.
        bias: [V] or None.
        needed: which of hidden, weight and bias need a gradient.
        several: whether there is more than one chunk. The sum over chunks then has the type of the statistics: the
            product of half-precision matrices may be rounded once, but the sum must not be rounded for each chunk.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...], several: bool
    ) -> None:
        self._weight, self._wide = weight, statistics_dtype(weight.dtype)
        self._sum_dtype = self._wide if several else weight.dtype
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self._needs_weight = needed[1]
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(bias, dtype=self._wide) if needed[2] and bias is not None else None

    def add(self, chunk: slice, hidden: Float[Tensor, "C D"], factor: Float[Tensor, "C V"], scale: Tensor) -> None:
        """Adds the contribution of a chunk, whose ∂L/∂logits is `factor` [C, V] with rows scaled by `scale` [C]."""
        if self.bias is not None:
            self.bias.addmv_(factor.t().to(self._wide), scale)
        if self.hidden is not None:
            torch.mm(factor, self._weight, out=self.hidden[chunk])
            self.hidden[chunk].mul_(scale[:, None])
        if self._needs_weight:
            self._add_weight(factor.t(), (hidden * scale[:, None]).to(hidden.dtype))

    def _add_weight(self, factor: Float[Tensor, "V C"], hidden: Float[Tensor, "C D"]) -> None:
        first, weight = self.weight is None, self.weight
        if weight is None:
            weight = self.weight = torch.empty_like(self._weight, dtype=self._sum_dtype)
        if hidden.dtype == self._sum_dtype:
            if first:
                torch.mm(factor, hidden, out=weight)
            else:
                weight.addmm_(factor, hidden)
            return
        # In blocks, so that each product is added while it is in the cache, and the whole product never exists.
        entries = _PRODUCT_ENTRIES.get(hidden.device.type, _PRODUCT_ENTRIES_GPU)
        rows = max(1, entries // hidden.shape[1])
        for start in range(0, len(factor), rows):
            block, total = factor[start : start + rows] @ hidden, weight[start : start + rows]
            if first:
                total.copy_(block)
            else:
                total.add_(block)

    def finished(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias, each in the type of its tensor; zero if there was no chunk."""
        if self._needs_weight and self.weight is None:
            self.weight = torch.zeros_like(weight)
        by_weight = None if self.weight is None else self.weight.to(weight.dtype)
        by_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, by_weight, by_bias


def cut(tokens: int, size: int) -> list[slice]:
    """Consecutive chunks of `size` tokens; the last may have fewer."""
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
