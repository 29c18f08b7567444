"""The output head on one chunk of tokens: logits, softmax statistics, and the gradients of the head.

With z = (W h + b)/τ the distribution of one token is p = softmax(z), and for the sampled token y

    log p_y = z_y − log Σ exp z          ∂ log p_y/∂z = 1_y − p
    H = −Σ p log p                       ∂ H/∂z = −p (log p + H)

and for a loss with the derivatives k_v = ∂L/∂log p_v of any tokens, ∂L/∂z = k − (Σ k) p, of which the first line is the
case of one token.

For a loss with ∂L/∂log p_y = c and no gradient through H, ∂L/∂z = −c q with q = p − 1_y. So only q is stored, in place
of the logits, and c scales the rows of h and of q W, which have D entries instead of V. This needs no further pass over
the [C, V] matrix once c is known. Elementwise work runs over blocks of rows: on a CPU, blocks small enough for a core's
cache; on a GPU, in one compiled function.

Legend: C tokens of a chunk, R tokens of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: The fewest tokens per chunk, enough for efficient matrix products. In half precision the products are cheap compared
#: with reading and writing the float32 sum of the weight's gradient once per chunk, so chunks are larger.
_CHUNK_FLOOR = {("cpu", True): 512, ("cpu", False): 1024}
_CHUNK_FLOOR_GPU = 4096
#: Chunks grow up to this many entries of logits, which need little memory (small vocabularies).
_CHUNK_ENTRIES = 2**22
#: Entries of a block per thread: 512 KB in float32, so that repeated reads come from the cache.
_BLOCK_ENTRIES = 2**17
#: Rows of a block on a GPU, where blocks do not fit into a cache: enough to keep it busy.
_BLOCK_ROWS_GPU = 512


def default_chunk_size(vocabulary: int, device_type: str, dtype: torch.dtype = torch.float32) -> int:
    """Tokens per chunk: at least 512 on CPU (1024 in half precision), 4096 elsewhere, more for small vocabularies."""
    wide = dtype in (torch.float32, torch.float64)
    return max(_CHUNK_FLOOR.get((device_type, wide), _CHUNK_FLOOR_GPU), _CHUNK_ENTRIES // vocabulary)


def _block_rows(vocabulary: int, device_type: str) -> int:
    """The rows of a block."""
    if device_type != "cpu":
        return _BLOCK_ROWS_GPU
    return torch.get_num_threads() * max(1, _BLOCK_ENTRIES // vocabulary)


def buffer_bytes(vocabulary: int, device_type: str, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the head's buffers while it runs `tokens` tokens, without gradients.

    Args:
        vocabulary: V.
        device_type: 'cpu' or 'cuda'.
        dtype: of the weight.
        tokens: the tokens of a call.
    """
    size = min(tokens, default_chunk_size(vocabulary, device_type, dtype))
    wide = statistics_dtype(dtype)
    blocks = wide.itemsize * (1 if dtype == wide else 2)
    return vocabulary * (size * dtype.itemsize + min(size, _block_rows(vocabulary, device_type)) * blocks)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of softmax statistics and of sums over chunks: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Statistics(NamedTuple):
    """The softmax statistics of each token, in `statistics_dtype`.

    Attributes:
        logprobs: [C] log p_y.
        log_normalizers: [C] log Σ exp z.
        entropies: [C] H.
    """

    logprobs: Tensor
    log_normalizers: Tensor
    entropies: Tensor


class CandidateGradient(NamedTuple):
    """∂L/∂log p of some tokens of the vocabulary at R positions.

    Attributes:
        candidates: [R, K] the tokens; None = the whole vocabulary in order.
        values: [R, K] the derivatives.
    """

    candidates: Tensor | None
    values: Tensor


class Chunks:
    """Computes the logits of chunks of tokens in one shared buffer.

    Args:
        weight: [V, D] output embedding.
        bias: [V] of the output embedding, or None.
        temperature: divides the logits.
        size: maximum number of tokens in a chunk.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, size: int) -> None:
        self.weight, self.bias, self.temperature = weight, bias, temperature
        self._logits = weight.new_empty(size, weight.shape[0])
        self.wide = statistics_dtype(weight.dtype)
        self.rows = min(size, _block_rows(weight.shape[0], weight.device.type))
        self._block = weight.new_empty(self.rows, weight.shape[0], dtype=self.wide)
        self._copy = None if weight.dtype == self.wide else torch.empty_like(self._block)

    def logits(self, hidden: Float[Tensor, "C D"]) -> Float[Tensor, "C V"]:
        """The chunk's logits, not yet divided by the temperature; valid until the next call."""
        out = self._logits[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def statistics(self, logits: Tensor, targets: Int[Tensor, "C"], keep_logits: bool) -> Statistics:
        """Compute log-probs, log Σ exp z and entropies; overwrite the logits with q = p − 1_y unless `keep_logits`."""
        statistics = Statistics(*(logits.new_empty(len(logits), dtype=self.wide) for _ in range(3)))
        for start in range(0, len(logits), self.rows):
            block = slice(start, start + self.rows)
            rows, target = logits[block], targets[block, None]
            scaled = self._scaled(rows, keep_logits)
            q = self._block[: len(rows)]
            for column, values in zip(statistics, _softmax_of(rows.device.type)(scaled, target, q), strict=True):
                column[block] = values
            if not keep_logits:
                rows.copy_(q)
        return statistics

    def gradient(
        self,
        logits: Tensor,
        targets: Int[Tensor, "C"],
        statistics: Statistics,
        by_logprobs: Float[Tensor, "C"],
        by_entropies: Float[Tensor, "C"] | None,
        by_candidates: Callable[[slice, Tensor], Sequence[CandidateGradient]] | None = None,
    ) -> None:
        """Overwrite kept logits with ∂L/∂z = k − (Σ k) p − g p (log p + H), where k includes c at the token y.

        Args:
            logits: [C, V] as `logits` returned them.
            targets: [C] the tokens y.
            statistics: of the chunk.
            by_logprobs: [C] c.
            by_entropies: [C] g.
            by_candidates: gives the other k of a block of tokens, from the block and its log-probs [R, V].
        """
        for start in range(0, len(logits), self.rows):
            block = slice(start, min(start + self.rows, len(logits)))
            rows, target, c = logits[block], targets[block, None], by_logprobs[block, None]
            logprobs = self._scaled(rows, keep=True).sub(statistics.log_normalizers[block, None])
            moved = [] if by_candidates is None else by_candidates(block, logprobs)
            total = c
            for one in moved:
                total = total + one.values.sum(dim=-1, keepdim=True)
            probabilities = logprobs.exp()
            if by_entropies is None:
                factor = total
            else:
                factor = logprobs.add_(statistics.entropies[block, None]).mul_(by_entropies[block, None]).add_(total)
            result = probabilities.mul_(factor).neg_().scatter_add_(1, target, c)
            for one in moved:
                if one.candidates is None:
                    result.add_(one.values)
                else:
                    result.scatter_add_(1, one.candidates, one.values)
            rows.copy_(result)

    def all_logprobs(self, logits: Tensor, block: slice) -> Float[Tensor, "R V"]:
        """log p of every token for a block of the chunk's logits, in the type of the statistics."""
        return self._scaled(logits[block], keep=True).log_softmax(dim=-1)

    def _scaled(self, rows: Tensor, keep: bool) -> Tensor:
        """z of a block in the type of the statistics; may overwrite logits of that type unless they are kept."""
        if self._copy is not None:
            z = self._copy[: len(rows)].copy_(rows)
        else:
            z = rows.clone() if keep and self.temperature != 1.0 else rows
        return z if self.temperature == 1.0 else z.div_(self.temperature)


def softmax_statistics(z: Tensor, target: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax statistics of a block; writes p − 1_y into `q`.

    log Σ exp z is computed from the most likely token, whose log p is exact. H = Σ p (log Σ exp z − z) uses the sum of
    the rounded p, so that their common rounding error cancels.

    Args:
        z: [R, V] scaled logits.
        target: [R, 1] the tokens y.
        q: [R, V] receives p − 1_y.

    Returns:
        (log p_y, log Σ exp z, H), [R] each.
    """
    torch.softmax(z, dim=-1, out=q)
    log_normalizer = z.amax(dim=-1) - q.amax(dim=-1).log()
    entropy = log_normalizer * q.sum(dim=-1) - torch.linalg.vecdot(q, z)
    logprob = z.gather(1, target)[:, 0] - log_normalizer
    q.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=q.dtype))
    return logprob, log_normalizer, entropy


@cache
def _softmax_of(device_type: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`softmax_statistics`, compiled on a GPU, where every separate pass over a block would read it from memory."""
    if device_type == "cpu":
        return softmax_statistics
    return torch.compile(softmax_statistics, dynamic=True)
