"""Which prompts come when: everything follows from a seed, the name of a stream and the step, without random state."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

import torch


def stream_seed(*parts: int | str) -> int:
    """A 31-bit seed from any numbers and words; different parts give unrelated seeds, on every machine alike."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def permutation(size: int, seed: int) -> list[int]:
    """0 .. size-1 in an order of the seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def prompt_indices(step: int, prompts_per_step: int, size: int, seed: int) -> list[int]:
    """The prompts of a step (counted from 0): a stream of seeded permutations of the data set, cut into steps."""
    found: list[int] = []
    position = step * prompts_per_step
    while len(found) < prompts_per_step:
        epoch, start = divmod(position + len(found), size)
        order = permutation(size, stream_seed(seed, "order", epoch))
        found += order[start : start + prompts_per_step - len(found)]
    return found


def held_out(size: int, seed: int) -> list[int]:
    """A tenth of a data set of `size`, at least one prompt, by chance: in whatever order its kinds come."""
    return sorted(permutation(size, stream_seed(seed, "held out"))[: max(1, size // 10)])


def least_used(count: int, size: int, used: Iterable[int], seed: int) -> list[int]:
    """`count` prompts of a data set of `size`, those least often in `used` first, otherwise in an order of the seed.

    So none of `used` comes while there are others, and none comes twice before all have come as often.
    """
    order, times = permutation(size, seed), Counter(used)
    found: list[int] = []
    while len(found) < count:
        fewest = min(times[index] for index in order)
        fresh = [index for index in order if times[index] == fewest][: count - len(found)]
        times.update(fresh)
        found += fresh
    return found
