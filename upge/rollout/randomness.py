"""Seeds for single responses, and a fence around the process's own random state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def response_seed(seed: int, index: int) -> int:
    """A 62-bit seed for response `index` to a prompt with `seed`.

    Hashed, because neighbouring prompts often get neighbouring seeds: with seed + index, response 1 of one prompt would
    draw the same random numbers as response 0 of the next.
    """
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random state of python, numpy and torch (CUDA included) back on leaving."""
    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
