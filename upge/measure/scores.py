"""Sketched gradients of single trajectories of a language model: ∇_θ Σ_t (w_t·log π_θ(y_t) + v_t·H_t).

Every estimate is a weighted sum of ∇log π of its tokens (and of ∇H, with an entropy bonus), so the measurements need no
other gradients. A small model differentiates many trajectories at once (`torch.func`: vmap over grad of the functional
call), a large model one after another, because a single gradient of it is already large.

Legend: t tokens of one response; L tokens of one sequence; n gradients of k numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, pad

from upge.errors import ConfigError
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack, packed_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: (prompt_ids, response_ids).
Pair = tuple[tuple[int, ...], tuple[int, ...]]
#: Models with fewer than SMALL_MODEL parameters differentiate AT_ONCE trajectories at once. Measured with 0.9 M
#: parameters on one thread: 7 ms per trajectory, against 16 ms one by one.
SMALL_MODEL, AT_ONCE = 5_000_000, 64
#: Maximum number of tokens of a forward pass without and with gradient.
_TOKENS, _TOKENS_WITH_GRADIENT = 8192, 4096


class Request(NamedTuple):
    """A gradient to compute.

    It is that of Σ_t (by_logprobs_t·log π_t + by_entropies_t·H_t + Σ_v by_vocabulary_tv·log π(v|t)).

    Attributes:
        by_entropies: [t] the coefficients of the entropies; None = zeros.
        by_vocabulary: [t, V] those of all tokens of the vocabulary; None = zeros.
    """

    pair: Pair
    by_logprobs: Float[Tensor, "t"]
    by_entropies: Float[Tensor, "t"] | None = None
    by_vocabulary: Float[Tensor, "t V"] | None = None


class Scores(Protocol):
    """What the measurements need from a policy.

    Attributes:
        width: k, the numbers of a sketched gradient.
    """

    width: int

    def columns(self, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        """(log-probs [t], entropies [t]) of each pair's response, in float64 and without gradient."""
        ...

    def gradients(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], Float[Tensor, "n k"]]]:
        """The sketched gradients in batches, with the indices of their requests: each request once, in any order."""
        ...


class ModelScores:
    """The `Scores` of a Hugging Face causal LM, whose attention is replaced in place by that of packed rows.

    Args:
        width: numbers of a sketch; 0 keeps gradients whole.
        temperature: divides the logits, as in training.
        at_once: trajectories differentiated at once; 0 = one after another; None = depends on the model's size.
    """

    def __init__(
        self, model: PreTrainedModel, width: int, temperature: float = 1.0, at_once: int | None = None, seed: int = 0
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

    @property
    def vocabulary(self) -> int:
        """V, the tokens that the model predicts."""
        output: Any = self.policy.model.get_output_embeddings()
        return len(output.weight)

    @torch.no_grad()
    def columns(self, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        """See `Scores.columns`; results computed in float32 are returned as float64."""
        columns: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(pairs)
        for members in _batches([packed_length(*pair) for pair in pairs], _TOKENS):
            packed = pack([pairs[i] for i in members], self.parameters[0].device)
            both = self.policy(packed, self.temperature, entropy=True)
            logprobs, entropies = (packed.pad(values).double().cpu() for values in both)
            for row, i in enumerate(members):
                length = len(pairs[i][1])
                columns[i] = logprobs[row, :length].clone(), entropies[row, :length].clone()
        return columns

    def score_norms(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """[t] the column `score_norms` of each pair's response, in float64."""
        norms = [torch.empty(0)] * len(pairs)
        for members in _batches([packed_length(*pair) for pair in pairs], _TOKENS):
            packed = pack([pairs[i] for i in members], self.parameters[0].device)
            padded = packed.pad(self.policy(packed, self.temperature, score_norms=True)[0]).double().cpu()
            for row, i in enumerate(members):
                norms[i] = padded[row, : len(pairs[i][1])].clone()
        return norms

    @torch.no_grad()
    def distributions(self, pairs: Sequence[Pair], vocabulary: int | None = None) -> list[Float[Tensor, "t V"]]:
        """[t, V] log π(·|t) at each token of each pair's response, over the first `vocabulary` tokens, or all."""
        every = []
        for pair in pairs:
            tokens = torch.tensor([*pair[0], *pair[1]], device=self.parameters[0].device)
            logprobs = self._whole.all_logprobs(tokens)[len(pair[0]) - 1 :, :vocabulary]
            every.append(logprobs.log_softmax(dim=-1).cpu())
        return every

    def gradients(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], Float[Tensor, "n k"]]]:
        """See `Scores.gradients`."""
        if not self.at_once:
            for number, request in enumerate(requests):
                yield [number], self.sketch([gradient[None] for gradient in self._alone(request)])
            return
        # Batches of similar length and kind need little padding.
        kinds = [(*(one is None for one in request[1:]), sum(map(len, request.pair))) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: kinds[i])
        for start in range(0, len(order), self.at_once):
            members = order[start : start + self.at_once]
            yield members, self.sketch(self._together([requests[i] for i in members]))

    def summed(self, requests: Sequence[Request]) -> Float[Tensor, "p"]:
        """The whole gradient of the sum of requests on log-probs alone, in micro-batches; zeros without requests.

        The p numbers are those of all trainable parameters in order, flattened, and not sketched.
        """
        total = torch.zeros(sum(p.numel() for p in self.parameters), dtype=self.parameters[0].dtype)
        for members in _batches([packed_length(*one.pair) for one in requests], _TOKENS_WITH_GRADIENT):
            packed = pack([requests[i].pair for i in members], self.parameters[0].device)
            weights = torch.zeros(packed.shape, dtype=torch.float64)
            for row, i in enumerate(members):
                weights[row, : len(requests[i].by_logprobs)] = requests[i].by_logprobs
            logprobs = self.policy(packed, self.temperature)[0]
            loss = (logprobs * packed.unpad(weights.to(logprobs.device)).to(logprobs)).sum()
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            flat = [
                p.new_zeros(p.numel()) if g is None else g.flatten()
                for p, g in zip(self.parameters, gradients, strict=True)
            ]
            total += torch.cat(flat).cpu()
        return total

    @contextlib.contextmanager
    def moved(self, step: Float[Tensor, "p"]) -> Iterator[None]:
        """A context in which the parameters are moved by `step`, laid out as in `summed`; its end restores them."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with torch.no_grad():
                for parameter, own in zip(self.parameters, step.split([p.numel() for p in before]), strict=True):
                    parameter.add_(own.reshape(parameter.shape).to(parameter))
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, before, strict=True):
                    parameter.copy_(old)

    def _alone(self, request: Request) -> list[Tensor]:
        """The gradient of one trajectory with respect to each parameter, in the parameter's shape."""
        if request.by_vocabulary is None:
            packed = pack([request.pair], self.parameters[0].device)
            logprobs, entropies = self.policy(packed, self.temperature, entropy=request.by_entropies is not None)
            total = (logprobs * request.by_logprobs.to(logprobs)).sum()
            if request.by_entropies is not None:
                total = total + (entropies * request.by_entropies.to(entropies)).sum()
        else:
            total = self._whole(*(None if one is None else one[0] for one in self._padded([request])))
        gradients = torch.autograd.grad(total, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]

    def _together(self, requests: Sequence[Request]) -> list[Tensor]:
        """The gradients of n trajectories, [n, ...] for each parameter.

        Each is padded at its end to the longest, which changes no result, because attention is causal.
        """
        inputs = self._padded(requests)
        parameters = {name: p.detach() for name, p in zip(self.names, self.parameters, strict=True)}

        def total(parameters: dict[str, Tensor], *inputs: Tensor | None) -> Tensor:
            return functional_call(self._whole, parameters, inputs)

        one = vmap(grad(total), in_dims=(None, *(None if one is None else 0 for one in inputs)))
        # vmap supports only the plain attention kernel.
        with sdpa_kernel(SDPBackend.MATH):
            gradients = one(parameters, *inputs)
        return [gradients[name] for name in self.names]

    def _padded(self, requests: Sequence[Request]) -> list[Tensor | None]:
        """The arguments of `_Sequence.forward` for n trajectories, [n, ...] each."""
        device, dtype = self.parameters[0].device, self.parameters[0].dtype
        longest = max(len(prompt) + len(response) for (prompt, response), *_ in requests)
        tokens = torch.tensor([[*p, *r, *[0] * (longest - len(p) - len(r))] for (p, r), *_ in requests], device=device)
        inputs: list[Tensor | None] = [tokens]
        for coefficients in zip(*(one[1:] for one in requests), strict=True):
            example = next((one for one in coefficients if one is not None), None)
            if example is None:
                inputs.append(None)
                continue
            given = [
                example.new_zeros(len(one.pair[1]), *example.shape[1:]) if values is None else values
                for one, values in zip(requests, coefficients, strict=True)
            ]
            placed = [_placed(one.pair, values, longest) for one, values in zip(requests, given, strict=True)]
            inputs.append(torch.stack(placed).to(device, dtype))
        return inputs


class _Sequence(nn.Module):
    """The sum of a `Request` for one sequence [L], with the coefficients [L - 1, ...] of the tokens that it predicts.

    Unlike in training, all logits exist at once: vmap does not support the autograd functions of the chunked head.
    """

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self, tokens: Tensor, by_logprobs: Tensor, by_entropies: Tensor | None, by_vocabulary: Tensor | None
    ) -> Tensor:
        logprobs = self.all_logprobs(tokens)
        total = (logprobs.gather(1, tokens[1:, None])[:, 0] * by_logprobs).sum()
        if by_entropies is not None:
            total = total - ((logprobs.exp() * logprobs).sum(dim=-1) * by_entropies).sum()
        return total if by_vocabulary is None else total + (logprobs * by_vocabulary).sum()

    def all_logprobs(self, tokens: Tensor) -> Float[Tensor, "L-1 V"]:
        """log π(·|t) at each token but the first."""
        length = len(tokens) - 1
        places = torch.arange(length, device=tokens.device)[None]
        hidden = self.model.base_model(
            input_ids=tokens[None, :-1], position_ids=places, use_cache=False, sequence_lengths=(length,)
        ).last_hidden_state[0]
        output: Any = self.model.get_output_embeddings()  # a linear layer of some kind
        logits = linear(hidden, output.weight, getattr(output, "bias", None)) / self.temperature
        return logits.log_softmax(dim=-1)


def _placed(pair: Pair, values: Tensor, longest: int) -> Tensor:
    """Response values [t, ...] at the positions of the tokens that predict them, in a sequence of `longest` tokens."""
    before = len(pair[0]) - 1
    return pad(values, (*[0, 0] * (values.ndim - 1), before, longest - 1 - before - len(values)))


def _batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in batches of similar length whose total is at most the limit; a longer one is a batch of its own."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and sum(lengths[j] for j in batch) + lengths[i] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Sketch:
    """A random linear projection of gradients to k numbers (a count sketch).

    It is the same on every machine for the same sizes, width and seed.

    Args:
        sizes: the number of entries of each tensor of a gradient, in order.
        width: k; 0 keeps gradients whole, flattened.

    Raises:
        ConfigError: the width is negative, or the tensors have no entries.
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
            # One byte per sign: as floats they would take as much memory as the gradient.
            self._signs.append(torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1)
            blocks = math.ceil(size / self.width)
            self._shifts.append(torch.randint(0, self.width, (blocks,), generator=generator).tolist())

    @property
    def relative_error(self) -> float:
        """An upper bound on the standard deviation of ‖S(x)‖²/‖x‖²; 0 if gradients are kept whole.

        The standard deviation of a cosine is at most 1/√2 of it.
        """
        return 0.0 if self.is_whole else math.sqrt(2.0 / self.width)

    def __call__(self, tensors: Sequence[Tensor]) -> Float[Tensor, "n k"]:
        """The sketches of n gradients, in float32 or float64, because bfloat16 would lose sums of thousands of blocks.

        Args:
            tensors: [n, ...] each, in the order of `sizes`.

        Raises:
            ValueError: the tensors have other sizes.
        """
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        flat = [tensor.reshape(len(tensor), -1).to(dtype) for tensor in tensors]
        sizes = tuple(tensor.shape[1] for tensor in flat)
        if sizes != self.sizes:
            raise ValueError(f"the gradient's tensors have {sizes} numbers; this sketch was made for {self.sizes}")
        if self.is_whole:
            return torch.cat(flat, dim=1)
        # The buffer has twice the width. What a shift pushes past the width is added to the beginning at the end.
        sums = flat[0].new_zeros(len(flat[0]), 2 * self.width)
        for tensor, signs, shifts in zip(flat, self._signs, self._shifts, strict=True):
            signed = tensor * signs.to(tensor.device)
            for block, shift in zip(signed.split(self.width, dim=1), shifts, strict=True):
                sums[:, shift : shift + block.shape[1]] += block
        return sums[:, : self.width] + sums[:, self.width :]
