"""Short stand-ins for long gradients: random projections that keep inner products up to a stated error.

A gradient of D numbers is cut into pieces of k, every number gets a random sign, every piece is turned by a random
shift, and the pieces are added up:

    S(x)_j = Σ_{i: (i + shift of i's piece) mod k = j} sign_i · x_i.

Two numbers of one piece never meet, two of different pieces with probability 1/k, as in a count sketch (Charikar, Chen,
Farach-Colton 2002), which hashes every number. Hence, over the choice of signs and shifts,

    E⟨S(x), S(y)⟩ = ⟨x, y⟩,   Var⟨S(x), S(y)⟩ ≤ (‖x‖²‖y‖² + ⟨x, y⟩²)/k.

Legend: D numbers of a gradient, k numbers of its sketch, n gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from upge.errors import ConfigError


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
