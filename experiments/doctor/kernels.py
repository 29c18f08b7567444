"""Collectives, attention and the output head against plain torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from experiments.doctor.rows import Context, Row, judged, size_of
from experiments.run.workload import pluralize
from upge.logprobs import Coefficients, token_logprobs, token_loss
from upge.models.loading import attention_sizes, read_config
from upge.train.packed_attention import choose_kernel, kernel_name, packed_attention

#: The largest relative error of values and gradients, by type of the model.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.03}
#: Entries of the tensor that is reduced, not divisible by a number of ranks.
_ENTRIES = {"cpu": 2**20 + 1, "cuda": 2**26 + 1}
_ROUNDS = 5
_LENGTHS = (130, 64, 64, 33, 17, 2, 1)
_TOKENS, _CHUNK, _TEMPERATURE = 300, 128, 0.8


def collectives(context: Context) -> Iterator[Row]:
    """An all-reduce whose sum is known, and its bandwidth."""
    world = context.world
    count = _ENTRIES[world.device.type]
    pattern = torch.arange(count, device=world.device, dtype=torch.float32) % 1024
    expected = pattern * (world.size * (world.size + 1) // 2)
    seconds, wrong = [], 0
    for _ in range(_ROUNDS):
        values = pattern * (world.rank + 1)
        context.gather(None)
        _wait(world.device)
        began = time.perf_counter()
        dist.all_reduce(values)
        _wait(world.device)
        seconds.append(time.perf_counter() - began)
        wrong = max(wrong, int((values != expected).sum()))
    entries, slowest = max(context.gather(wrong)), max(context.gather(min(seconds)))
    size, backend = 4 * count, str(dist.get_backend())
    details = {"ranks": world.size, "backend": backend, "bytes": size, "seconds": slowest, "wrong_entries": entries}
    if backend == "nccl":
        details["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        backend = f"NCCL {details['nccl']}"
    measured = f"{backend}, {pluralize(world.size, 'rank')}"
    if world.size > 1:
        algorithm = size / slowest
        bus = algorithm * 2 * (world.size - 1) / world.size
        details |= {"algorithm_bandwidth": algorithm, "bus_bandwidth": bus}
        measured += f": {size_of(size)} at {algorithm / 1e9:.3g} GB/s, bus {bus / 1e9:.3g} GB/s"
    else:
        measured += "; start it with torchrun to check several"
    if entries:
        measured += f"; {entries} of {count} sums are wrong"
    advice = "sums over ranks are wrong, so no gradient is right: try NCCL_P2P_DISABLE=1, update driver and NCCL"
    yield judged("all-reduce", not entries, measured, advice, **details)


def check(context: Context) -> Iterator[Row]:
    """The packed attention and the output head."""
    yield attention(context)
    yield head(context)


def attention(context: Context) -> Row:
    """The attention of a packed row against causal SDPA of each sequence alone, in float32."""
    world, model = context.world, context.run.model
    config = read_config(model.path, model.overrides).get_text_config()
    heads, keys, size = attention_sizes(config)
    shapes = [(n, sum(_LENGTHS), size) for n in (heads, keys, keys)]
    given = [x.to(world.device, getattr(torch, model.dtype)) for x in _normal(*shapes, (1, sum(_LENGTHS), heads, size))]
    *inputs, probe = given
    ours = [x[None].clone().requires_grad_() for x in inputs]
    starts = torch.tensor([0, *accumulate(_LENGTHS)], dtype=torch.int32, device=world.device)
    layer = SimpleNamespace(config=SimpleNamespace(layer_types=None))
    choose_kernel(world.device)
    output, _ = packed_attention(
        layer,  # pyright: ignore[reportArgumentType]  # only its configuration is read
        *ours,
        None,
        sequence_lengths=_LENGTHS,
        cu_seq_lens_q=starts,
        max_length_q=max(_LENGTHS),
    )
    plain = [x[None].float().requires_grad_() for x in inputs]
    parts = zip(*(x.split(_LENGTHS, 2) for x in plain), strict=True)
    alone = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    expected = torch.cat(alone, 2).transpose(1, 2)
    errors = {"output": relative_error(output, expected)}
    gradients = zip(_gradients(output, probe, ours), _gradients(expected, probe, plain), strict=True)
    names = ("query", "key", "value")
    errors |= {name: relative_error(*pair) for name, pair in zip(names, gradients, strict=True)}
    what = f"{kernel_name(world.device, model.dtype, size)}, {heads} heads of {size}, {len(_LENGTHS)} sequences"
    advice = "the gradients of this machine are wrong; install the versions of docs/install.md, or report it"
    return _compared(context, "attention", what, errors, advice)


def head(context: Context) -> Row:
    """Log-probs, entropies and gradients of the chunked head against full logits in float32."""
    world, model = context.world, context.run.model
    config = read_config(model.path, model.overrides).get_text_config()
    width, vocabulary = config.hidden_size, config.vocab_size
    dtype = getattr(torch, model.dtype)
    hidden, weight, factors = _normal((_TOKENS, width), (vocabulary, width), (2, _TOKENS))
    hidden, weight = hidden.to(world.device, dtype), (weight / width**0.5).to(world.device, dtype)
    by_logprob, by_entropy = factors.to(world.device)
    targets = (torch.arange(_TOKENS, device=world.device) * 7919) % vocabulary
    plain = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    full = (plain[0] @ plain[1].T / _TEMPERATURE).log_softmax(-1)
    logprobs, entropies = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)
    right = torch.autograd.grad((by_logprob * logprobs + by_entropy * entropies).sum(), plain)
    del full
    common = {"temperature": _TEMPERATURE, "chunk_size": _CHUNK}

    def coefficients(some: Tensor, entropy: Tensor, chunk: slice) -> Coefficients:
        loss = (by_logprob[chunk] * some + by_entropy[chunk] * entropy).sum()
        return Coefficients(loss, by_logprob[chunk], by_entropy[chunk])

    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, mine, mine_entropies = token_loss(*ours, targets, coefficients, entropy_gradient=True, **common)
    errors = {"logprobs": relative_error(mine, logprobs), "entropies": relative_error(mine_entropies, entropies)}
    for name, one, expected in zip(("hidden", "weight"), torch.autograd.grad(loss, ours), right, strict=True):
        errors[name] = relative_error(one, expected)
    mine, mine_entropies = token_logprobs(*ours, targets, entropy=True, **common)
    assert mine_entropies is not None
    again = torch.autograd.grad((by_logprob * mine + by_entropy * mine_entropies).sum(), ours)
    for name, one, expected in zip(("hidden", "weight"), again, right, strict=True):
        errors[f"{name}, two passes"] = relative_error(one, expected)
    what = f"{'compiled' if world.device.type == 'cuda' else 'not compiled'}, {vocabulary} tokens, width {width}"
    advice = "log-probs of this machine are wrong; if torch.compile is at fault, TORCH_COMPILE_DISABLE=1 avoids it"
    return _compared(context, "output head", what, errors, advice)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """‖ours - expected‖ / ‖expected‖; NaN if an entry is not a number."""
    difference = (ours.detach().float() - expected.detach().float()).norm()
    return float(difference / expected.detach().float().norm())


def _compared(context: Context, name: str, what: str, errors: dict[str, float], advice: str) -> Row:
    """The row of errors, each the largest of all ranks."""
    of_ranks = context.gather(errors)
    largest = {key: max((one[key] for one in of_ranks), key=_or_infinite) for key in errors}
    worst, bound = max(largest, key=lambda key: _or_infinite(largest[key])), BOUNDS[context.run.model.dtype]
    measured = f"{what}: relative error {largest[worst]:.1e} ({worst}), at most {bound:g}"
    return judged(name, largest[worst] <= bound, measured, advice, errors=largest, bound=bound)


def _or_infinite(error: float) -> float:
    return float("inf") if error != error else error


def _normal(*shapes: Sequence[int]) -> list[Tensor]:
    """Fixed normally distributed tensors on the CPU."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def _gradients(output: Tensor, probe: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output.float() * probe.float()).sum(), inputs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
