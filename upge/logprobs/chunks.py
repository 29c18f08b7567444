"""The output head on one chunk of tokens: logits, what their softmax tells, and the gradients of the head.

With z = (W h + b)/τ the distribution of one token is p = softmax(z), and for the token y that was drawn

    log p_y = z_y − log Σ exp z          ∂ log p_y/∂z = 1_y − p
    H = −Σ p log p                       ∂ H/∂z = −p (log p + H)

For a loss with ∂L/∂log p_y = c, and none through H, ∂L/∂z = −c q with q = p − 1_y. So q is all that is kept of the
logits, in their place, and c scales the rows of h and of q W, which are D wide, not V: no pass over the matrix waits
for c. Elementwise work runs over blocks of rows: on a CPU of so few that they stay in a core's cache, on a GPU in one
compiled function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Tokens per chunk: enough to keep the matrix products efficient. In half precision the float32 sum of the weight's
#: gradient is read and written once per chunk beside products that are cheap, so chunks are larger.
_CHUNK_FLOOR = {("cpu", True): 512, ("cpu", False): 1024}
_CHUNK_FLOOR_GPU = 4096
#: Entries of a chunk's logits below which larger chunks cost no memory worth counting (small vocabularies).
_CHUNK_ENTRIES = 2**22
#: Entries of a block per thread: 512 KB in float32, so that what is read several times is read from the cache.
_BLOCK_ENTRIES = 2**17
#: Rows of a block on a GPU, which reads a block from its memory anyway: enough to keep it busy.
_BLOCK_ROWS_GPU = 512


def default_chunk_size(vocabulary: int, device_type: str, dtype: torch.dtype = torch.float32) -> int:
    """Tokens per chunk: at least 512 on CPU (1024 in half precision), 4096 elsewhere, more for small vocabularies."""
    wide = dtype in (torch.float32, torch.float64)
    return max(_CHUNK_FLOOR.get((device_type, wide), _CHUNK_FLOOR_GPU), _CHUNK_ENTRIES // vocabulary)


def _block_rows(vocabulary: int, device_type: str) -> int:
    if device_type != "cpu":
        return _BLOCK_ROWS_GPU
    return torch.get_num_threads() * max(1, _BLOCK_ENTRIES // vocabulary)


def buffer_bytes(vocabulary: int, device_type: str, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that the head of a model with this vocabulary holds while it runs `tokens` tokens, gradients aside."""
    size = min(tokens, default_chunk_size(vocabulary, device_type, dtype))
    wide = statistics_dtype(dtype)
    blocks = wide.itemsize * (1 if dtype == wide else 2)
    return vocabulary * (size * dtype.itemsize + min(size, _block_rows(vocabulary, device_type)) * blocks)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which softmax statistics and sums over chunks are kept: float32, of float64 itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Statistics(NamedTuple):
    """What is known of a token once its logits have been seen; each [C], in `statistics_dtype`."""

    logprobs: Tensor
    log_normalizers: Tensor
    entropies: Tensor


class Chunks:
    """The logits of one chunk of tokens after another, in one buffer.

    Args:
        weight, bias: [V, D] and [V] or None, the output embedding.
        temperature: divides the logits.
        size: the most tokens of a chunk.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, size: int) -> None:
        self.weight, self.bias, self.temperature = weight, bias, temperature
        self._logits = weight.new_empty(size, weight.shape[0])
        self.wide = statistics_dtype(weight.dtype)
        self.rows = min(size, _block_rows(weight.shape[0], weight.device.type))
        self._block = weight.new_empty(self.rows, weight.shape[0], dtype=self.wide)
        self._copy = None if weight.dtype == self.wide else torch.empty_like(self._block)

    def logits(self, hidden: Float[Tensor, "C D"]) -> Float[Tensor, "C V"]:
        """The chunk's logits before they are divided by the temperature; valid until the next call."""
        out = self._logits[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def statistics(self, logits: Tensor, targets: Int[Tensor, "C"], keep_logits: bool) -> Statistics:
        """Log-probs, log Σ exp z and entropies; leaves q = p − 1_y in place of the logits unless they are kept."""
        found = Statistics(*(logits.new_empty(len(logits), dtype=self.wide) for _ in range(3)))
        for start in range(0, len(logits), self.rows):
            block = slice(start, start + self.rows)
            rows, target = logits[block], targets[block, None]
            scaled = self._scaled(rows, keep_logits)
            q = self._block[: len(rows)]
            for column, values in zip(found, _softmax_of(rows.device.type)(scaled, target, q), strict=True):
                column[block] = values
            if not keep_logits:
                rows.copy_(q)
        return found

    def entropy_gradient(
        self, logits: Tensor, targets: Tensor, found: Statistics, by_logprobs: Tensor, by_entropies: Tensor
    ) -> None:
        """Writes ∂L/∂z = c (1_y − p) − g p (log p + H) in place of logits that were kept, for c and g each [C]."""
        for start in range(0, len(logits), self.rows):
            block = slice(start, start + self.rows)
            rows, target = logits[block], targets[block, None]
            logprobs = self._scaled(rows, keep=True).sub(found.log_normalizers[block, None])
            probabilities, c = logprobs.exp(), by_logprobs[block, None]
            pull = logprobs.add_(found.entropies[block, None]).mul_(by_entropies[block, None]).add_(c)
            rows.copy_(probabilities.mul_(pull).neg_().scatter_add_(1, target, c))

    def _scaled(self, rows: Tensor, keep: bool) -> Tensor:
        """z of a block in the type of the statistics; in place of the logits where these are in it and not kept."""
        if self._copy is not None:
            z = self._copy[: len(rows)].copy_(rows)
        else:
            z = rows.clone() if keep and self.temperature != 1.0 else rows
        return z if self.temperature == 1.0 else z.div_(self.temperature)


def softmax_statistics(z: Tensor, target: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p_y, log Σ exp z, H) of a block [R, V] with targets [R, 1]; writes p − 1_y into `q`.

    log Σ exp z comes from the likeliest token, where log p is exact; H = Σ p (log Σ exp z − z) with the sum of the p as
    they are, so that their common rounding error cancels.
    """
    torch.softmax(z, dim=-1, out=q)
    log_normalizer = z.amax(dim=-1) - q.amax(dim=-1).log()
    entropy = log_normalizer * q.sum(dim=-1) - torch.linalg.vecdot(q, z)
    logprob = z.gather(1, target)[:, 0] - log_normalizer
    q.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=q.dtype))
    return logprob, log_normalizer, entropy


@cache
def _softmax_of(device_type: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """On a GPU each pass over a block is memory traffic, so torch.compile fuses them."""
    if device_type == "cpu":
        return softmax_statistics
    return torch.compile(softmax_statistics, dynamic=True)
