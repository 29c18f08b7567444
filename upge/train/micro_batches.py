"""The split of a batch into micro-batches by a token budget, even over micro-batches and ranks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import nn

from upge.train.packing import WORTH_SHARING, packed_length

#: With several ranks the responses to a prompt are cut into parts of at most this share of a rank's work, so that what
#: stays together does not decide who waits.
_PART_OF_A_RANK = 1 / 4


@dataclass(frozen=True)
class Work:
    """What a trajectory takes.

    Attributes:
        tokens: of its packed sequence, prompt included.
        prompt: anything that tells its prompt from others; None for one that is not computed in common.
        prompt_tokens: those of `tokens` that trajectories with the same prompt in one micro-batch have in common.
        extra: its cost beyond its tokens, in tokens: attention, and the output head.
    """

    tokens: int
    prompt: Hashable = None
    prompt_tokens: int = 0
    extra: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What a model's parts cost beside the layers' products, whose cost for one token is 1.

    Attributes:
        response: the output head, for each response token.
        pair: attention, for each pair of a token and one before it.
    """

    response: float
    pair: float

    @classmethod
    def of(cls, network: nn.Module) -> Costs:
        """Of a Hugging Face causal LM, from its configuration; partitioned or not."""
        config, trunk = network.config.get_text_config(), network.base_model
        embedding = config.vocab_size * config.hidden_size
        inner = max(1, sum(getattr(p, "ds_numel", p.numel()) for p in trunk.parameters()) - embedding)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Twice as many operations as weights in a product; as many as that for a pair's score and its share in the sum.
        return cls(embedding / inner, 2 * config.num_hidden_layers * config.num_attention_heads * size / inner)

    def work(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Work:
        """What a trajectory takes."""
        tokens = packed_length(prompt_ids, response_ids)
        extra = self.response * len(response_ids) + self.pair * tokens * tokens / 2
        return Work(tokens, tuple(prompt_ids), len(prompt_ids), extra)


@dataclass
class _Bin:
    """Trajectories that stay together, and what they take: `apart` is the tokens of all sequences, `saved` those of
    prompts in common that need not be computed again."""

    apart: int = 0
    saved: int = 0
    extra: float = 0.0
    prompts: set[Hashable] = field(default_factory=set)
    members: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """As many as `pack` makes of them, which shares prompts only where that is worth it."""
        return self.apart - self.saved if self.saved >= WORTH_SHARING * self.apart else self.apart

    @property
    def cost(self) -> float:
        return self.tokens + self.extra

    def with_others(self, other: _Bin, prompt_tokens: Callable[[Hashable], int]) -> _Bin:
        """Both together."""
        saved = self.saved + other.saved + sum(prompt_tokens(p) for p in self.prompts & other.prompts)
        prompts, members = self.prompts | other.prompts, self.members + other.members
        return _Bin(self.apart + other.apart, saved, self.extra + other.extra, prompts, members)


def distribute(
    works: Sequence[Work], ranks: int, token_budget: int, blocks: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Which trajectories each rank runs in each of its micro-batches; the same on every rank that asks.

    Each trajectory occurs once. Trajectories of one block stay in one micro-batch, and those with a prompt in common as
    far as it goes. A block longer than the budget has a micro-batch of its own. All ranks get the same number of
    micro-batches (some may be empty), because ZeRO-3's collectives must match; those that run at the same time cost
    about as much as each other.

    Args:
        works: what each trajectory takes.
        ranks: number of processes.
        token_budget: most tokens of a micro-batch.
        blocks: for each trajectory the block it belongs to (its group, where a part's reach demands the whole group);
            None = there are none.

    Returns:
        For each rank a list of micro-batches, each a rising list of indices into `works`.

    Raises:
        ValueError: a budget or a number of ranks below 1, or `blocks` of another size than `works`.
    """
    if token_budget < 1 or ranks < 1:
        raise ValueError(f"token_budget and ranks must be at least 1, got {token_budget} and {ranks}")
    if blocks is not None and len(blocks) != len(works):
        raise ValueError(f"blocks names {len(blocks)} trajectories and works {len(works)}; give one block for each")
    cut = _Cut(works, ranks, token_budget)
    units = sorted(cut.units(blocks), key=lambda unit: -unit.cost)
    fitted = cut.first_fit(units)
    slots = math.ceil(len(fitted) / ranks) * ranks
    bins = cut.even(units, slots) or fitted + [_Bin() for _ in range(slots - len(fitted))]
    bins = sorted(bins, key=lambda one: (-one.cost, one.members))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for turn, first in enumerate(range(0, slots, ranks)):
        together = bins[first : first + ranks]
        # Turning the order round each time keeps the rank with the longest micro-batch from being always the same.
        for rank, one in enumerate(together if turn % 2 == 0 else together[::-1]):
            plan[rank].append(sorted(one.members))
    return plan


class _Cut:
    def __init__(self, works: Sequence[Work], ranks: int, token_budget: int) -> None:
        self.works, self.budget = works, token_budget
        share = _PART_OF_A_RANK * sum(w.tokens + w.extra for w in works) / ranks
        self._most = share if ranks > 1 else math.inf
        self._prompts = {w.prompt: w.prompt_tokens for w in works if w.prompt is not None}

    def units(self, blocks: Sequence[int] | None) -> list[_Bin]:
        """What stays together, in order of first appearance: blocks, else parts of what has a prompt in common."""
        families: dict[Hashable, list[_Bin]] = {}
        for index, work in enumerate(self.works):
            name = (index, "alone") if work.prompt is None else work.prompt
            one = _Bin(work.tokens, 0, work.extra, set() if work.prompt is None else {work.prompt}, [index])
            families.setdefault(name if blocks is None else int(blocks[index]), []).append(one)
        return [part for family in families.values() for part in self._parts(family, blocks is not None)]

    def _parts(self, family: list[_Bin], whole: bool) -> list[_Bin]:
        """A family in as few parts as may be."""
        parts = family[:1]
        for one in family[1:]:
            joined = self._join(parts[-1], one)
            if whole or (joined.tokens <= self.budget and joined.cost <= self._most):
                parts[-1] = joined
            else:
                parts.append(one)
        return parts

    def first_fit(self, units: list[_Bin]) -> list[_Bin]:
        """Few micro-batches: each unit goes into the first one with room for it."""
        bins: list[_Bin] = []
        for unit in units:
            for place, held in enumerate(bins):
                joined = self._join(held, unit)
                if joined.tokens <= self.budget:
                    bins[place] = joined
                    break
            else:
                bins.append(unit)
        return bins

    def even(self, units: list[_Bin], slots: int) -> list[_Bin] | None:
        """Even micro-batches: each unit goes into the cheapest of `slots`; None where that breaks the budget."""
        heap: list[tuple[float, int, _Bin]] = [(0.0, slot, _Bin()) for slot in range(slots)]
        for unit in units:
            _, slot, held = heap[0]
            joined = self._join(held, unit)
            if held.members and joined.tokens > self.budget:
                return None
            heapq.heapreplace(heap, (joined.cost, slot, joined))
        return [held for _, _, held in heap]

    def _join(self, one: _Bin, other: _Bin) -> _Bin:
        return one.with_others(other, self._prompts.__getitem__)
