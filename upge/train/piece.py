"""A micro-batch on its way through the model: what the head asks about its tokens, and what it found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from upge.algorithm import Algorithm
from upge.logprobs import Coefficients
from upge.train.packed_policy import Objective
from upge.train.packing import PackedBatch
from upge.trajectories import Trajectories
from upge.views import PackedTokens, TokenView


class Piece:
    """Some trajectories of a planned batch, as columns and as a packed row, both on the model's device.

    Args:
        columns: of the whole batch, without log-probs of the current policy.
        rows: which trajectories.
        packed: the same trajectories, in this order, as the model sees them.
    """

    def __init__(self, columns: Trajectories, rows: list[int], packed: PackedBatch) -> None:
        self.packed = packed
        self.columns = _on(columns.select(torch.tensor(rows, dtype=torch.long)), packed.targets.device)
        self.tokens: PackedTokens = self.columns.at(packed.rows, packed.columns)

    def objective(self, algorithm: Algorithm, loss_of: Callable[[TokenView], Tensor]) -> Objective:
        """What the head asks for the gradient of `loss_of`, a sum over tokens of the algorithm's estimates.

        An algorithm that takes chunks is asked about each chunk of tokens; any other about the whole piece at once.
        """
        in_chunks, through_entropies = algorithm.takes_chunks, algorithm.has_entropy_gradient

        def coefficients(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
            leaves = [logprobs.detach().requires_grad_(), entropies.detach().requires_grad_()]
            with torch.enable_grad():
                view = self.tokens.chunk(chunk, *leaves) if in_chunks else self._padded(*leaves)
                loss = told(loss_of(view))
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
            # A loss need not depend on both.
            by_logprobs, by_entropies = (
                torch.zeros_like(leaf) if gradient is None else gradient
                for leaf, gradient in zip(leaves, found, strict=True)
            )
            return Coefficients(loss.detach(), by_logprobs, by_entropies if through_entropies else None)

        return Objective(coefficients, through_entropies, not in_chunks)

    def seen(self, logprobs: Tensor, entropies: Tensor) -> PackedTokens:
        """All tokens with what the forward pass gave for them."""
        return self.tokens.chunk(slice(None), logprobs, entropies)

    @property
    def sampled(self) -> Tensor:
        """[n] True on tokens of rollouts."""
        return ~self.columns.is_demonstration[self.packed.rows]

    def _padded(self, logprobs: Tensor, entropies: Tensor) -> Trajectories:
        padded = {"logprobs": self.packed.pad(logprobs), "entropies": self.packed.pad(entropies)}
        return dataclasses.replace(self.columns, **padded)


def _on(columns: Trajectories, device: torch.device) -> Trajectories:
    if columns.response_mask.device == device:
        return columns
    given = {f.name: getattr(columns, f.name) for f in dataclasses.fields(columns)}
    return Trajectories(**{n: c.to(device) if isinstance(c, Tensor) else c for n, c in given.items()})


def told(loss: Tensor) -> Tensor:
    """A loss that is not finite becomes NaN, so that the gradient norm, which all ranks share, tells of it too."""
    return loss if bool(torch.isfinite(loss.detach())) else loss * float("nan")
