"""One evaluation of the output head: chunk by chunk, with the gradients that add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upge.logprobs.chunks import Chunks, Statistics, statistics_dtype

#: Entries of a part of the weight's gradient, in half precision: 2 MB.
_PRODUCT_ENTRIES = {"cpu": 2**20}
_PRODUCT_ENTRIES_GPU = 2**26


class Coefficients(NamedTuple):
    """What a loss says about some tokens.

    loss: its value, a scalar.
    logprobs: [c] ∂L/∂log π of each token.
    entropies: [c] ∂L/∂H of each token, or None where no gradient flows through the entropies.
    """

    loss: Tensor
    logprobs: Tensor
    entropies: Tensor | None = None


#: (log-probs [c], entropies [c], which tokens of the N they are) → coefficients.
CoefficientFunction = Callable[[Tensor, Tensor, slice], Coefficients]


class Asking:
    """Calls a coefficient function and checks what it says."""

    def __init__(self, function: CoefficientFunction, entropy_gradient: bool) -> None:
        self.function, self.entropy_gradient = function, entropy_gradient

    def __call__(self, logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
        found = self.function(logprobs, entropies, chunk)
        if found.loss.ndim or found.logprobs.shape != logprobs.shape:
            raise ValueError(
                f"coefficients: for {len(logprobs)} tokens expected a loss without dimensions and as many numbers, got "
                f"{tuple(found.loss.shape)} and {tuple(found.logprobs.shape)}"
            )
        if (found.entropies is not None) != self.entropy_gradient:
            given = "none" if found.entropies is None else "some"
            raise ValueError(
                f"coefficients: {given} came for the entropies, but entropy_gradient is {self.entropy_gradient}; let "
                "these agree"
            )
        return found


class Head:
    """One evaluation of the output head, whose gradients add up chunk by chunk."""

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

    def one_pass(self, cuts: list[slice], ask: Asking) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, log-probs, entropies), the gradients made while each chunk's logits are there."""
        losses, columns = [], self._columns()
        for chunk in cuts:
            logits = self.chunks.logits(self.hidden[chunk])
            found = self.chunks.statistics(logits, self.targets[chunk], ask.entropy_gradient)
            columns[0, chunk], columns[1, chunk] = found.logprobs, found.entropies
            asked = ask(found.logprobs, found.entropies, chunk)
            losses.append(asked.loss)
            self._add(chunk, logits, found, asked.logprobs, asked.entropies)
        return (torch.stack(losses).sum() if losses else columns.sum()), columns[0].clone(), columns[1].clone()

    def two_passes(self, cuts: list[slice], ask: Asking) -> tuple[Tensor, Tensor, Tensor]:
        """The same where a coefficient may depend on all log-probs."""
        columns = self._columns()
        for chunk in cuts:
            logits = self.chunks.logits(self.hidden[chunk])
            found = self.chunks.statistics(logits, self.targets[chunk], keep_logits=False)
            columns[0, chunk], columns[1, chunk] = found.logprobs, found.entropies
        logprobs, entropies = columns[0].clone(), columns[1].clone()
        asked = ask(logprobs, entropies, slice(0, len(self.hidden)))
        for chunk in cuts:
            self.again(chunk, asked.logprobs[chunk], None if asked.entropies is None else asked.entropies[chunk])
        return asked.loss, logprobs, entropies

    def again(self, chunk: slice, by_logprobs: Tensor, by_entropies: Tensor | None) -> None:
        """Adds a chunk's gradients, with its logits computed once more."""
        logits = self.chunks.logits(self.hidden[chunk])
        found = self.chunks.statistics(logits, self.targets[chunk], by_entropies is not None)
        self._add(chunk, logits, found, by_logprobs, by_entropies)

    def _add(
        self, chunk: slice, logits: Tensor, found: Statistics, by_logprobs: Tensor, by_entropies: Tensor | None
    ) -> None:
        by_logprobs = by_logprobs.to(self.chunks.wide)
        if by_entropies is None:
            scale = by_logprobs / -self.temperature
        else:
            self.chunks.entropy_gradient(logits, self.targets[chunk], found, by_logprobs, by_entropies)
            scale = torch.full_like(by_logprobs, 1.0 / self.temperature)
        self.gradients.add(chunk, self.hidden[chunk], logits, scale)

    def _columns(self) -> Tensor:
        return self.hidden.new_empty(2, len(self.hidden), dtype=self.chunks.wide)


class Gradients:
    """The gradients of the head's input and parameters, summed over chunks; those that nothing needs stay None.

    Args:
        needed: which of hidden, weight and bias get one.
        several: whether there is more than one chunk. The sum over chunks is then in the type of the statistics: a
            product of half-precision matrices is rounded once, but the sum must not be rounded for each chunk.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...], several: bool
    ) -> None:
        self._weight, self._wide = weight, statistics_dtype(weight.dtype)
        self._sum_dtype = self._wide if several else weight.dtype
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self._needs_weight = needed[1]
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(bias, dtype=self._wide) if needed[2] else None

    def add(self, chunk: slice, hidden: Float[Tensor, "C D"], factor: Float[Tensor, "C V"], scale: Tensor) -> None:
        """Adds what a chunk contributes: ∂L/∂logits is `factor` [C, V] with its rows scaled by `scale` [C]."""
        if self.bias is not None:
            self.bias.addmv_(factor.t().to(self._wide), scale)
        if self.hidden is not None:
            torch.mm(factor, self._weight, out=self.hidden[chunk])
            self.hidden[chunk].mul_(scale[:, None])
        if self._needs_weight:
            self._add_weight(factor.t(), (hidden * scale[:, None]).to(hidden.dtype))

    def _add_weight(self, factor: Float[Tensor, "V C"], hidden: Float[Tensor, "C D"]) -> None:
        first = self.weight is None
        if first:
            self.weight = torch.empty_like(self._weight, dtype=self._sum_dtype)
        if hidden.dtype == self._sum_dtype:
            if first:
                torch.mm(factor, hidden, out=self.weight)
            else:
                self.weight.addmm_(factor, hidden)
            return
        # Part by part, so that each product is added while it is in the cache, and never stands beside the sum whole.
        entries = _PRODUCT_ENTRIES.get(hidden.device.type, _PRODUCT_ENTRIES_GPU)
        rows = max(1, entries // hidden.shape[1])
        for start in range(0, len(factor), rows):
            part, total = factor[start : start + rows] @ hidden, self.weight[start : start + rows]
            if first:
                total.copy_(part)
            else:
                total.add_(part)

    def finished(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias, each in the type of its tensor; zero where there was no chunk."""
        if self._needs_weight and self.weight is None:
            self.weight = torch.zeros_like(weight)
        found = None if self.weight is None else self.weight.to(weight.dtype)
        return self.hidden, found, None if self.bias is None else self.bias.to(bias.dtype)


def cut(tokens: int, size: int) -> list[slice]:
    """The chunks of `size` tokens, the last of which may have fewer."""
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
