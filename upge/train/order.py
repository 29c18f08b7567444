"""Which prompts come when: everything follows from a seed, the name of a stream and the step, without random state."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import torch

#: Fractions of a prompt are counted in units of 1 / _UNIT.
_UNIT = 1 << 32
#: Multiples of the golden section, modulo _UNIT, are as evenly spread as any sequence's: the offsets of the steps.
_GOLDEN = 0x9E3779B9


def stream_seed(*parts: int | str) -> int:
    """A 31-bit seed from any numbers and words; different parts give unrelated seeds, on every machine alike."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def permutation(size: int, seed: int) -> list[int]:
    """0 .. size-1 in an order of the seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def prompt_indices(step: int, prompts_per_step: int, size: int, seed: int) -> list[int]:
    """The prompts of a step (counted from 0): a stream of seeded permutations of the data set, cut into steps."""
    return _stream(step * prompts_per_step, prompts_per_step, size, seed, "order")


def mixed_indices(
    step: int, prompts_per_step: int, strata: Mapping[str, Sequence[int]], weights: Mapping[str, float], seed: int
) -> list[int]:
    """The prompts of a step (counted from 0) where several sources share it.

    Of the n prompts of every step a source with the share w has ⌊wn⌋ or ⌈wn⌉. Which of the two follows from a sequence
    of low discrepancy, so that its number over many steps is that of its share but for a few prompts. Its own prompts
    come as those of `prompt_indices` do: none again before all have come. A single source called "" has exactly that
    order.

    Args:
        step, prompts_per_step, seed: as for `prompt_indices`.
        strata: source → its prompts.
        weights: source → its share of the prompts, of any sum; one with 0 never comes and may have no prompts.

    Returns:
        Prompts of `strata`, those of the sources in a seeded order.
    """
    names = sorted(weights)
    before, now = _counts(step, prompts_per_step, [weights[name] for name in names], seed)
    found: list[int] = []
    for name, position, count in zip(names, before, now, strict=True):
        parts = (seed, "order", *filter(None, [name]))
        found += [strata[name][place] for place in _stream(position, count, len(strata[name]), *parts)]
    if len(names) == 1:
        return found
    # Mixed, so that the step can be cut into updates.
    return [found[place] for place in permutation(len(found), stream_seed(seed, "mixed", step))]


def demonstration_choice(step: int, example: int, count: int, seed: int) -> int:
    """Which of the `count` demonstrations of an example has its turn in a step.

    It follows from the step alone: an example that came every so many steps would have all of them about equally often
    (a sequence of low discrepancy), one that comes at irregular steps has them as by chance.
    """
    place = (stream_seed(seed, "demonstration", example) * 2 + step * _GOLDEN) % _UNIT
    return place * count // _UNIT


def _stream(position: int, count: int, size: int, *parts: int | str) -> list[int]:
    """`count` numbers below `size` from a position of the stream of permutations that these parts of a seed make."""
    found: list[int] = []
    while len(found) < count:
        epoch, start = divmod(position + len(found), size)
        order = permutation(size, stream_seed(*parts, epoch))
        found += order[start : start + count - len(found)]
    return found


def _counts(step: int, count: int, weights: Sequence[float], seed: int) -> tuple[list[int], list[int]]:
    """How many of the prompts before a step, and of the `count` of the step, each source has.

    The sources lie side by side on a line as long as the step has prompts; those of the step are the points offset, 1 +
    offset, 2 + offset, ... on it. So a source gets one of the two whole numbers beside its length, in a share of the
    steps that is the fraction of the length; all in integers, so that no rounding adds up.
    """
    lengths = list(accumulate(map(Fraction, weights), initial=Fraction(0)))
    bounds = [round(length / lengths[-1] * count * _UNIT) for length in lengths]
    start = stream_seed(seed, "mixture")
    offsets = (start + torch.arange(step + 1, dtype=torch.int64) * _GOLDEN) % _UNIT
    # Points below a bound: one for every whole unit below it, and one more in steps whose offset is below the rest.
    below = [(bound // _UNIT, offsets < bound % _UNIT) for bound in bounds]
    before = [whole * step + int(more[:step].sum()) for whole, more in below]
    now = [whole + int(more[step]) for whole, more in below]
    return [b - a for a, b in pairwise(before)], [b - a for a, b in pairwise(now)]


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
