"""The kernels that run on the meta device: operations, bytes moved, and time at given rates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from experiments.scaling.counts import BANDWIDTH, PEAK
from upge.logprobs import chunks
from upge.train import elementwise

#: Kinds of kernels.
PRODUCTS, ATTENTION, ELEMENTWISE, HEAD = "matrix products", "attention", "elementwise", "output head"

_VARLEN, _VARLEN_BACKWARD = "torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"
#: Operations that look rows or entries up: what is read of the table is as large as the result.
_LOOKUPS = {"aten.embedding", "aten.index_select", "aten.gather"}
#: Operations that add to entries in place, or only write.
_ADDING, _WRITING = {"aten.scatter_add_", "aten.index_add_"}, {"aten.copy_", "aten.zero_", "aten.fill_"}
#: Operations without a kernel.
_FREE = {
    *("aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty"),
    *("aten.detach", "aten.lift_fresh", "aten._unsafe_view"),
}


class Kernel(NamedTuple):
    """A kernel that ran: the part of the model, operations in half precision, bytes read and written."""

    part: str
    operations: float
    bytes: float
    is_attention: bool

    def seconds(self, products: float = 1.0, attention: float = 1.0, memory: float = 1.0) -> float:
        """Its time at shares of the peak rates."""
        rate = PEAK * (attention if self.is_attention else products)
        return max(self.operations / rate, self.bytes / (BANDWIDTH * memory))


class Kernels(TorchDispatchMode):
    """Lists the kernels that run.

    Args:
        lengths: of the sequences, which determine the operations of attention.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.squares = sum(length * length for length in lengths)
        self.ran: list[Kernel] = []
        self._part, self._paused = "", 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self._count(func, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)], args, kwargs, result)
        return result

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Count all kernels in the block as of one part of the model."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def add(self, part: str, read: float, written: float, operations: float = 0.0) -> None:
        """A kernel by the bytes that it moves and its operations in half precision."""
        self.ran.append(Kernel(self._part or part, operations, read + written, part == ATTENTION))

    def seconds(self, products: float = 1.0, attention: float = 1.0, memory: float = 1.0) -> Counter[str]:
        """Part of the model → seconds, at shares of the peak rates."""
        sums: Counter[str] = Counter()
        for kernel in self.ran:
            sums[kernel.part] += kernel.seconds(products, attention, memory)
        return sums

    def _count(self, func: Any, given: list[Tensor], args: Any, kwargs: Any, result: Any) -> None:
        name = str(func).rpartition(".")[0]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in _FREE or _is_view(func):
            return
        if name in (_VARLEN, _VARLEN_BACKWARD):
            heads, size = args[0 if name == _VARLEN else 1].shape[1:]
            # Two products of a causal square forward, five backward.
            products = 2 if name == _VARLEN else 5
            operations = products * heads * size * self.squares
            self.add(ATTENTION, _bytes(given), _bytes(made), operations)
            return
        # The registry lacks in-place operations, such as addmm_, which also reads the sum that it adds to.
        formula = flop_registry.get(getattr(torch.ops.aten, func.overloadpacket.__name__.rstrip("_"), None))
        if formula is not None:
            operations = formula(*args, **(kwargs or {}), out_val=result)
            written = [x for x in made if not any(x is one for one in given)] or made
            read = given if name.endswith("_") else [x for x in given if not any(x is one for one in written)]
            self.add(PRODUCTS, _bytes(read), _bytes(written), operations)
            return
        self.add(ELEMENTWISE, *_moved(name, func, given, made))


def _is_view(func: Any) -> bool:
    """Whether the result is a view of an argument that is not written to."""
    aliases = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _moved(name: str, func: Any, given: list[Tensor], made: list[Tensor]) -> tuple[float, float]:
    """(bytes read, bytes written) of an operation that is not a product."""
    if name in _LOOKUPS:
        return _bytes(given[1:]) + _bytes(made), _bytes(made)
    if name in _ADDING:
        return _bytes(given[1:]) + _bytes(given[-1:]), _bytes(given[-1:])
    written = [x for x in given if any(x is one for one in made)]
    if not written:
        return _bytes(given), _bytes(made)
    read = [x for x in given if x is not written[0]] if name in _WRITING else given
    return _bytes(read), _bytes(written)


def _bytes(tensors: Sequence[Tensor]) -> float:
    """Bytes of the entries that exist: an expanded dimension counts once."""
    return float(
        sum(
            x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0)
            for x in tensors
        )
    )


def fused(kernels: Kernels, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `upge.train.elementwise` counted as torch.compile runs it: one kernel forward, one backward.

    The gradient of a norm's weight is a sum over tokens, which counts as another kernel over the same inputs.
    """

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            tensors = [x for x in arguments if isinstance(x, Tensor)]
            with kernels.paused():
                made = function(*arguments)
            kernels.add(ELEMENTWISE, _bytes(tensors), _bytes(tree_leaves(made)))
            ctx.save_for_backward(*tensors)
            ctx.others = arguments[len(tensors) :]
            return made

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            saved = ctx.saved_tensors
            needed = ctx.needs_input_grad[: len(saved)]
            made = [torch.empty_like(x) if needs else None for x, needs in zip(saved, needed, strict=True)]
            # A rotation is linear in what it rotates, and reads the angles only.
            read = saved[2:] if function is elementwise.rotate else saved
            kernels.add(ELEMENTWISE, _bytes(read) + _bytes(gradients), _bytes([x for x in made if x is not None]))
            if function in (elementwise.rms_norm, elementwise.offset_rms_norm):
                kernels.add(ELEMENTWISE, _bytes(saved) + _bytes(gradients), 0.0)
            return *made, *(None for _ in ctx.others)

    return Fused.apply


def softmax_block(kernels: Kernels) -> Callable[..., Any]:
    """The compiled block of the output head: it reads the logits twice, for the normalizer and for the rest."""

    def run(z: Tensor, target: Tensor, q: Tensor) -> Any:
        with kernels.paused():
            made = chunks.softmax_statistics(z, target, q)
        kernels.add(HEAD, 2 * _bytes([z]), _bytes([q]))
        return made

    return run
