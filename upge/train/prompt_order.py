"""The order of prompts and the seeds of sampling; both depend only on a seed, a stream's name and the step."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

#: Fractions of a prompt are counted in units of 1 / _UNIT.
_UNIT = 1 << 32
#: The golden ratio's fraction in these units. Its multiples modulo _UNIT, the steps' offsets, are evenly spread.
_GOLDEN = 0x9E3779B9


def stream_seed(*parts: int | str) -> int:
    """A 31-bit seed from numbers and words, the same on every machine; different parts give unrelated seeds."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def permutation(size: int, seed: int) -> list[int]:
    """A seeded permutation of 0 .. size-1."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def prompt_indices(step: int, prompts_per_step: int, size: int, seed: int) -> list[int]:
    """The prompts of a step (counted from 0): a stream of seeded permutations of the data set, divided into steps."""
    return _stream(step * prompts_per_step, prompts_per_step, size, seed, "order")


def mixed_indices(
    step: int,
    prompts_per_step: int,
    strata: Mapping[str, Sequence[int]],
    weights: Mapping[str, float],
    seed: int,
    prompt_weights: Mapping[str, Tensor] | None = None,
) -> list[int]:
    """The prompts of a step (counted from 0) of a mixture of sources.

    A source with the share w gets ⌊wn⌋ or ⌈wn⌉ of the n prompts of a step. A low-discrepancy sequence decides which,
    so that over many steps the source's count stays within a few prompts of its share. The prompts of a source come in
    the order of `prompt_indices`: none is repeated before all have been used. A single source named "" has exactly that
    order.

    Args:
        step, prompts_per_step, seed: as for `prompt_indices`.
        strata: source → its prompts.
        weights: source → its share of the prompts; they need not add up to 1. A source with 0 may have no prompts.
        prompt_weights: source → the weight of each of its prompts, [P]. The source's prompts of this step are then
            drawn with probabilities proportional to these weights, without replacement, regardless of earlier steps.

    Returns:
        Prompts of `strata`, with the sources mixed in a seeded order.
    """
    names = sorted(weights)
    before, now = _counts(step, prompts_per_step, [weights[name] for name in names], seed)
    prompts: list[int] = []
    for name, position, count in zip(names, before, now, strict=True):
        members, own = strata[name], tuple(filter(None, [name]))
        if prompt_weights is None:
            places = _stream(position, count, len(members), seed, "order", *own)
        else:
            places = least_used(
                count, len(members), (), stream_seed(seed, "curriculum", step, *own), prompt_weights[name]
            )
        prompts += [members[place] for place in places]
    if len(names) == 1 and prompt_weights is None:
        return prompts
    # Shuffled, so that each of the step's updates gets prompts of all sources, and not those of larger weight first.
    return [prompts[place] for place in permutation(len(prompts), stream_seed(seed, "mixed", step))]


def demonstration_choice(step: int, example: int, count: int, seed: int) -> int:
    """Which of the `count` demonstrations of an example a step uses.

    A low-discrepancy sequence over steps decides. So an example that comes every N steps uses each of its
    demonstrations about equally often, and one that comes at irregular steps uses them as if at random.
    """
    place = (stream_seed(seed, "demonstration", example) * 2 + step * _GOLDEN) % _UNIT
    return place * count // _UNIT


def _stream(position: int, count: int, size: int, *parts: int | str) -> list[int]:
    """`count` indices below `size`, from a position in the stream of permutations that `parts` seed."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, start = divmod(position + len(indices), size)
        order = permutation(size, stream_seed(*parts, epoch))
        indices += order[start : start + count - len(indices)]
    return indices


def _counts(step: int, count: int, weights: Sequence[float], seed: int) -> tuple[list[int], list[int]]:
    """For each source, how many prompts it had before a step, and how many of the step's `count` prompts it gets.

    The sources lie side by side on a line of length `count`. The prompts of the step are the points offset, 1 + offset,
    2 + offset, ... on it. So a source gets one of the two integers next to its length, the larger one in a share of the
    steps that equals the length's fraction. All counts are integers, so that rounding errors do not accumulate.
    """
    lengths = list(accumulate(map(Fraction, weights), initial=Fraction(0)))
    bounds = [round(length / lengths[-1] * count * _UNIT) for length in lengths]
    start = stream_seed(seed, "mixture")
    offsets = (start + torch.arange(step + 1, dtype=torch.int64) * _GOLDEN) % _UNIT
    # Points below a bound: one per whole unit below it, and one more in steps whose offset is below the remainder.
    below = [(bound // _UNIT, offsets < bound % _UNIT) for bound in bounds]
    before = [whole * step + int(more[:step].sum()) for whole, more in below]
    now = [whole + int(more[step]) for whole, more in below]
    return [b - a for a, b in pairwise(before)], [b - a for a, b in pairwise(now)]


def held_out(size: int, seed: int) -> list[int]:
    """A random tenth of the prompts of a data set of `size`, at least one."""
    return sorted(permutation(size, stream_seed(seed, "held out"))[: max(1, size // 10)])


def weighted_permutation(weights: Float[Tensor, "P"], seed: int) -> list[int]:
    """A seeded permutation of 0 .. P-1, drawn without replacement with probabilities proportional to the weights.

    It sorts the numbers by E/w, where the E are independent and exponentially distributed.
    """
    uniform = torch.rand(len(weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.argsort(-torch.log1p(-uniform) / weights, stable=True).tolist()


def least_used(
    count: int, size: int, used: Iterable[int], seed: int, weights: Float[Tensor, "P"] | None = None
) -> list[int]:
    """`count` prompts of a data set of `size`: those least often in `used` first, with ties in a seeded order.

    So a prompt in `used` comes only after all others, and none comes again before all have come as often. With
    `weights` the seeded order is that of `weighted_permutation`.
    """
    order = permutation(size, seed) if weights is None else weighted_permutation(weights, seed)
    times = Counter(used)
    prompts: list[int] = []
    while len(prompts) < count:
        fewest = min(times[index] for index in order)
        fresh = [index for index in order if times[index] == fewest][: count - len(prompts)]
        times.update(fresh)
        prompts += fresh
    return prompts
