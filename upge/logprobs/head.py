"""One evaluation of the output head: chunk by chunk, with the gradients that add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upge.logprobs.chunks import CandidateGradient, Chunks, Statistics, statistics_dtype

#: Entries of a block of the weight's gradient, 2 MB in half precision.
_PRODUCT_ENTRIES = {"cpu": 2**20}
_PRODUCT_ENTRIES_GPU = 2**26


class Output(NamedTuple):
    """What another model predicts at the same tokens, before its output embedding.

    Attributes:
        hidden: [N, D'] its states, of its own width.
        weight: [V, D'] its output embedding; rows beyond the policy's vocabulary are left out. None = the policy's, for
            states of the policy itself on another prompt.
        bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def with_default(self, weight: Tensor, bias: Tensor | None) -> Output:
        """This output, with the policy's embedding if it has none of its own."""
        return Output(self.hidden, weight.detach(), bias) if self.weight is None else self


#: (Some of the tokens that a coefficient function was called with, the policy's log-probs [R, V] at them, and those of
#: other models by name) → derivatives with respect to the policy's log-probs of any tokens of the vocabulary.
CandidateFunction = Callable[[slice, Tensor, Mapping[str, Tensor]], Sequence[CandidateGradient]]


class Coefficients(NamedTuple):
    """The value and the derivatives of a loss on some tokens.

    Attributes:
        loss: its value, a scalar.
        logprobs: [c] ∂L/∂log π of each token.
        entropies: [c] ∂L/∂H of each token; None if no gradient flows through the entropies.
        candidates: gives the derivatives with respect to the log-probs of other tokens of the vocabulary, for a block
            of the tokens at a time; None if there are none. `loss` need not include their contribution.
    """

    loss: Tensor
    logprobs: Tensor
    entropies: Tensor | None = None
    candidates: CandidateFunction | None = None


#: (log-probs [c], entropies [c], the slice of the N tokens that they belong to) → coefficients.
CoefficientFunction = Callable[[Tensor, Tensor, slice], Coefficients]


class CheckedCoefficients:
    """A coefficient function whose results are checked.

    Args:
        function: the coefficient function.
        entropy_gradient: whether its results have coefficients of the entropies.
        candidates: whether its results have coefficients of other tokens of the vocabulary.
    """

    def __init__(self, function: CoefficientFunction, entropy_gradient: bool, candidates: bool = False) -> None:
        self.function, self.entropy_gradient, self.candidates = function, entropy_gradient, candidates

    @property
    def needs_logits(self) -> bool:
        """True if the gradient needs the logits themselves."""
        return self.entropy_gradient or self.candidates

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
                f"coefficients: the result has {given} for the entropies, but entropy_gradient is "
                f"{self.entropy_gradient}; make these agree"
            )
        if (result.candidates is not None) != self.candidates:
            given = "no function" if result.candidates is None else "a function"
            raise ValueError(
                f"coefficients: the result has {given} for other tokens of the vocabulary, but candidates is "
                f"{self.candidates}; make these agree"
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
        size: maximum number of tokens in a chunk.
        needed: which of hidden, weight and bias need a gradient.
        others: name → output of another model, which gets no gradient.
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
        others: Mapping[str, Output] | None = None,
    ) -> None:
        self.hidden, self.targets, self.temperature = hidden, targets, temperature
        self.others, rows = others or {}, min(size, len(hidden))
        vocabulary = len(weight)
        self.other_chunks = {
            name: Chunks(
                _given(one.weight)[:vocabulary], None if one.bias is None else one.bias[:vocabulary], temperature, rows
            )
            for name, one in self.others.items()
        }
        self.chunks = Chunks(weight, bias, temperature, min(size, len(hidden)))
        self.gradients = Gradients(hidden, weight, bias, needed, several=len(hidden) > size)

    def one_pass(self, cuts: list[slice], coefficients: CheckedCoefficients) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, log-probs, entropies), with each chunk's gradients computed while its logits exist."""
        losses, columns = [], self._columns()
        for chunk in cuts:
            logits = self.chunks.logits(self.hidden[chunk])
            statistics = self.chunks.statistics(logits, self.targets[chunk], coefficients.needs_logits)
            columns[0, chunk], columns[1, chunk] = statistics.logprobs, statistics.entropies
            result = coefficients(statistics.logprobs, statistics.entropies, chunk)
            losses.append(result.loss)
            self._add(chunk, logits, statistics, result, start=0)
        return (torch.stack(losses).sum() if losses else columns.sum()), columns[0].clone(), columns[1].clone()

    def two_passes(self, cuts: list[slice], coefficients: CheckedCoefficients) -> tuple[Tensor, Tensor, Tensor]:
        """As `one_pass`, for coefficients that may depend on all log-probs."""
        columns = self._columns()
        for chunk in cuts:
            logits = self.chunks.logits(self.hidden[chunk])
            statistics = self.chunks.statistics(logits, self.targets[chunk], keep_logits=False)
            columns[0, chunk], columns[1, chunk] = statistics.logprobs, statistics.entropies
        logprobs, entropies = columns[0].clone(), columns[1].clone()
        result = coefficients(logprobs, entropies, slice(0, len(self.hidden)))
        for chunk in cuts:
            entropies_of_chunk = None if result.entropies is None else result.entropies[chunk]
            self.again(chunk, result._replace(logprobs=result.logprobs[chunk], entropies=entropies_of_chunk))
        return result.loss, logprobs, entropies

    def again(self, chunk: slice, result: Coefficients) -> None:
        """Compute a chunk's logits again and add its gradients; `result` has the chunk's coefficients."""
        logits = self.chunks.logits(self.hidden[chunk])
        keep = result.entropies is not None or result.candidates is not None
        statistics = self.chunks.statistics(logits, self.targets[chunk], keep)
        self._add(chunk, logits, statistics, result, chunk.start)

    def _add(self, chunk: slice, logits: Tensor, statistics: Statistics, result: Coefficients, start: int) -> None:
        """Add a chunk's gradients; `start` is its first token among those that `result.candidates` numbers."""
        by_logprobs = result.logprobs.to(self.chunks.wide)
        if result.entropies is None and result.candidates is None:
            scale = by_logprobs / -self.temperature
        else:
            by_candidates = None
            if result.candidates is not None:
                by_candidates = self._by_candidates(chunk, result.candidates, start)
            columns = by_logprobs, result.entropies, by_candidates
            self.chunks.gradient(logits, self.targets[chunk], statistics, *columns)
            scale = torch.full_like(by_logprobs, 1.0 / self.temperature)
        self.gradients.add(chunk, self.hidden[chunk], logits, scale)

    def _by_candidates(
        self, chunk: slice, function: CandidateFunction, start: int
    ) -> Callable[[slice, Tensor], Sequence[CandidateGradient]]:
        """`function` for a block of the chunk, with what the other models predict there."""
        logits = {n: chunks.logits(self.others[n].hidden[chunk]) for n, chunks in self.other_chunks.items()}

        def of_block(block: slice, logprobs: Tensor) -> Sequence[CandidateGradient]:
            others = {n: self.other_chunks[n].all_logprobs(one, block) for n, one in logits.items()}
            return function(slice(start + block.start, start + block.stop), logprobs, others)

        return of_block

    def _columns(self) -> Tensor:
        return self.hidden.new_empty(2, len(self.hidden), dtype=self.chunks.wide)


def _given(weight: Tensor | None) -> Tensor:
    assert weight is not None, "the output embedding of another model is missing"
    return weight


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
        """Add the contribution of a chunk, whose ∂L/∂logits is `factor` [C, V] with rows scaled by `scale` [C]."""
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
