"""Gradients of single trajectories of a language model: ∇_θ Σ_t (w_t·log π_θ(y_t) + v_t·H_t), sketched.

Every estimate is a weighted sum of ∇log π of its tokens (and of ∇H, where it has an entropy bonus), so these are all
that the measurements need. A small model differentiates many trajectories at once (`torch.func`: a vmap over grad of
the functional call), a large one a trajectory after the other, for one gradient of it is large already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, pad

from upge.errors import ConfigError
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack, packed_length

#: (prompt_ids, response_ids).
Pair = tuple[tuple[int, ...], tuple[int, ...]]
#: Models of fewer parameters differentiate this many trajectories at once: measured at 0.9 M parameters on one thread,
#: 7 ms a trajectory against 16 ms one by one.
SMALL_MODEL, AT_ONCE = 5_000_000, 64
#: Tokens of a forward pass without gradient.
_TOKENS = 8192


class Request(NamedTuple):
    """A gradient that is asked for: of Σ_t (by_logprobs_t·log π_t + by_entropies_t·H_t), [t] each; None = zeros."""

    pair: Pair
    by_logprobs: Float[Tensor, "t"]
    by_entropies: Float[Tensor, "t"] | None = None


class Scores(Protocol):
    """A policy as the measurements see it."""

    width: int

    def columns(self, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        """(log-probs [t], entropies [t]) of each pair's response, float64, without gradient."""

    def gradients(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], Float[Tensor, "n k"]]]:
        """The sketched gradients, some at a time, with the numbers of their requests, each once and in any order."""


class ModelScores:
    """A Hugging Face causal LM as `Scores`. Its attention is replaced in place by that of packed rows.

    Args:
        model: the causal LM.
        width: numbers of a sketch; 0 keeps gradients whole.
        temperature: divides the logits, as in training.
        at_once: trajectories differentiated at once; 0 = one after the other; None = by the model's size.
        seed: of the sketch.
    """

    def __init__(
        self, model: nn.Module, width: int, temperature: float = 1.0, at_once: int | None = None, seed: int = 0
    ) -> None:
        self.policy, self.temperature = PackedPolicy(model).eval(), temperature
        self._whole = _Sequence(model, temperature)
        parameters = dict(self._whole.named_parameters())
        self.names = [name for name, parameter in parameters.items() if parameter.requires_grad]
        self.parameters = [parameters[name] for name in self.names]
        sizes = [parameter.numel() for parameter in self.parameters]
        self.at_once = at_once if at_once is not None else AT_ONCE if sum(sizes) < SMALL_MODEL else 0
        self.sketch = Sketch(sizes, width, seed)
        self.width = self.sketch.width

    @torch.no_grad()
    def columns(self, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        """As `Scores.columns`; what is computed in float32 is given as float64."""
        found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(pairs)
        for members in _batches([packed_length(*pair) for pair in pairs], _TOKENS):
            packed = pack([pairs[i] for i in members], self.parameters[0].device)
            both = self.policy(packed, self.temperature, entropy=True)
            logprobs, entropies = (packed.pad(values).double().cpu() for values in both)
            for row, i in enumerate(members):
                length = len(pairs[i][1])
                found[i] = logprobs[row, :length].clone(), entropies[row, :length].clone()
        return found

    def gradients(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], Float[Tensor, "n k"]]]:
        """As `Scores.gradients`."""
        if not self.at_once:
            for number, request in enumerate(requests):
                yield [number], self.sketch([gradient[None] for gradient in self._alone(request)])
            return
        # Of similar length and kind, so that little is computed for padding.
        order = sorted(range(len(requests)), key=lambda i: _kind(requests[i]))
        for start in range(0, len(order), self.at_once):
            members = order[start : start + self.at_once]
            yield members, self.sketch(self._together([requests[i] for i in members]))

    def _alone(self, request: Request) -> list[Tensor]:
        """The gradient of one trajectory by the parameters, each in its own shape."""
        wants_entropy = request.by_entropies is not None
        packed = pack([request.pair], self.parameters[0].device)
        logprobs, entropies = self.policy(packed, self.temperature, entropy=wants_entropy)
        total = (logprobs * request.by_logprobs.to(logprobs)).sum()
        if wants_entropy:
            total = total + (entropies * request.by_entropies.to(entropies)).sum()
        found = torch.autograd.grad(total, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def _together(self, requests: Sequence[Request]) -> list[Tensor]:
        """The gradients of several trajectories, [n, ...] for each parameter.

        Each is padded at its end to the longest: no token sees what comes after it.
        """
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        longest = max(len(prompt) + len(response) for (prompt, response), *_ in requests)
        tokens = torch.tensor([[*p, *r, *[0] * (longest - len(p) - len(r))] for (p, r), *_ in requests], device=device)
        by_logprobs = torch.stack([_placed(one.pair, one.by_logprobs, longest) for one in requests])
        by_entropies = None
        if any(one.by_entropies is not None for one in requests):
            given = [
                (one.pair, one.by_logprobs * 0 if one.by_entropies is None else one.by_entropies) for one in requests
            ]
            by_entropies = torch.stack([_placed(*one, longest) for one in given]).to(device, dtype)
        parameters = {name: p.detach() for name, p in zip(self.names, self.parameters, strict=True)}
        one = vmap(grad(self._total), in_dims=(None, 0, 0, None if by_entropies is None else 0))
        # Of the attention kernels only the plain one can be batched over trajectories.
        with sdpa_kernel(SDPBackend.MATH):
            found = one(parameters, tokens, by_logprobs.to(device, dtype), by_entropies)
        return [found[name] for name in self.names]

    def _total(self, parameters: dict[str, Tensor], tokens: Tensor, by_logprobs: Tensor, by_entropies: Tensor | None):
        """Σ_t (w_t·log π_t + v_t·H_t) of one sequence as a function of the parameters."""
        return functional_call(self._whole, parameters, (tokens, by_logprobs, by_entropies))


class _Sequence(nn.Module):
    """Σ_t (w_t·log π_t + v_t·H_t) of one sequence [L], with weights [L - 1] for what its tokens predict.

    The logits are whole, unlike in training: a function of one's own for their gradient could not be batched.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, tokens: Tensor, by_logprobs: Tensor, by_entropies: Tensor | None) -> Tensor:
        length = len(tokens) - 1
        places = torch.arange(length, device=tokens.device)[None]
        hidden = self.model.base_model(
            input_ids=tokens[None, :-1], position_ids=places, use_cache=False, sequence_lengths=(length,)
        ).last_hidden_state[0]
        output = self.model.get_output_embeddings()
        logits = linear(hidden, output.weight, getattr(output, "bias", None)) / self.temperature
        logprobs = logits.log_softmax(dim=-1)
        total = (logprobs.gather(1, tokens[1:, None])[:, 0] * by_logprobs).sum()
        if by_entropies is not None:
            total = total - ((logprobs.exp() * logprobs).sum(dim=-1) * by_entropies).sum()
        return total


def _kind(request: Request) -> tuple[bool, int]:
    return request.by_entropies is not None, sum(map(len, request.pair))


def _placed(pair: Pair, values: Tensor, longest: int) -> Tensor:
    """Response values [t] at the places of the tokens that predict them, of a sequence of `longest` tokens."""
    before = len(pair[0]) - 1
    return pad(values, (before, longest - 1 - before - len(values)))


def _batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Neighbours of similar length whose sum is at most the limit, or single ones."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and sum(lengths[j] for j in batch) + lengths[i] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Sketch:
    """Projects gradients to k numbers. Linear, and the same for the same sizes, width and seed on every machine.

    Args:
        sizes: how many numbers each tensor of a gradient has, in order.
        width: k; 0 keeps gradients whole, one number after another.
        seed: of signs and shifts.

    Raises:
        ConfigError: a width below 0, or no numbers.
    """

    def __init__(self, sizes: Sequence[int], width: int, seed: int = 0) -> None:
        if width < 0 or sum(sizes) < 1:
            raise ConfigError(f"sketch: found width {width} for {sum(sizes)} numbers; give at least 0 for at least 1")
        self.sizes = tuple(sizes)
        self.is_whole = width == 0
        self.width = sum(sizes) if self.is_whole else width
        generator = torch.Generator().manual_seed(seed)
        self._signs: list[Tensor] = []
        self._shifts: list[list[int]] = []
        for size in () if self.is_whole else self.sizes:
            # A byte per number: as floats they would take as much memory as the gradient.
            self._signs.append(torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1)
            pieces = math.ceil(size / self.width)
            self._shifts.append(torch.randint(0, self.width, (pieces,), generator=generator).tolist())

    @property
    def relative_error(self) -> float:
        """The standard deviation of ‖S(x)‖²/‖x‖², at most; that of a cosine is at most 1/√2 of it. 0 if kept whole."""
        return 0.0 if self.is_whole else math.sqrt(2.0 / self.width)

    def __call__(self, tensors: Sequence[Tensor]) -> Float[Tensor, "n k"]:
        """The sketches of n gradients at once; each tensor is [n, ...] with its size behind the first axis.

        In float32 at least: thousands of pieces are added up, of which bfloat16 would lose most.
        """
        kept = torch.promote_types(tensors[0].dtype, torch.float32)
        flat = [tensor.reshape(len(tensor), -1).to(kept) for tensor in tensors]
        found = tuple(tensor.shape[1] for tensor in flat)
        if found != self.sizes:
            raise ValueError(f"the gradient's tensors have {found} numbers; this sketch was made for {self.sizes}")
        if self.is_whole:
            return torch.cat(flat, dim=1)
        # Twice as long: what a shift pushes over the end is added to the beginning once, at the end.
        sums = flat[0].new_zeros(len(flat[0]), 2 * self.width)
        for tensor, signs, shifts in zip(flat, self._signs, self._shifts, strict=True):
            signed = tensor * signs.to(tensor.device)
            for piece, shift in zip(signed.split(self.width, dim=1), shifts, strict=True):
                sums[:, shift : shift + piece.shape[1]] += piece
        return sums[:, : self.width] + sums[:, self.width :]
