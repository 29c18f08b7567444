"""Micro-batches: their assignment to ranks under a token budget, and the objective that the output head computes."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upge.algorithm import Algorithm
from upge.candidates import Places
from upge.estimate import Estimate
from upge.logprobs import CandidateFunction, CandidateGradient, Coefficients
from upge.models.loading import attention_sizes
from upge.train.packed_policy import Objective
from upge.train.packing import WORTH_SHARING, PackedBatch, packed_length
from upge.train.sample import TokenIds
from upge.trajectories import Trajectories
from upge.views import Distributions, PackedTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: With several ranks, the responses to a prompt are divided into parts of at most this share of a rank's work, so that
#: the other ranks do not wait for one large group.
_PART_OF_A_RANK = 1 / 4


@dataclass(frozen=True)
class Work:
    """The work of one trajectory.

    Attributes:
        tokens: the length of its packed sequence, prompt included.
        prompt: identifies its prompt; None if the prompt is not shared.
        prompt_tokens: how many of `tokens` trajectories with the same prompt share in a micro-batch.
        extra: the cost of attention and the output head, in tokens.
    """

    tokens: int
    prompt: Hashable = None
    prompt_tokens: int = 0
    extra: float = 0.0


@dataclass(frozen=True)
class Costs:
    """The cost of a model's parts, relative to the matrix products of its layers for one token.

    Attributes:
        response: the output head, per response token.
        pair: attention, per pair of a token and an earlier one.
    """

    response: float
    pair: float

    @classmethod
    def of(cls, network: PreTrainedModel) -> Costs:
        """The costs of a Hugging Face causal LM, partitioned or not, from its configuration."""
        config, trunk = network.config.get_text_config(), network.base_model
        embedding = config.vocab_size * config.hidden_size
        inner = max(1, sum(getattr(p, "ds_numel", p.numel()) for p in trunk.parameters()) - embedding)
        heads, _, size = attention_sizes(config)
        # A matrix product takes two operations per weight. A pair takes two per entry for its score, two for the sum.
        return cls(embedding / inner, 2 * config.num_hidden_layers * heads * size / inner)

    def work(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Work:
        """The work of a trajectory."""
        tokens = packed_length(prompt_ids, response_ids)
        extra = self.response * len(response_ids) + self.pair * tokens * tokens / 2
        return Work(tokens, tuple(prompt_ids), len(prompt_ids), extra)


@dataclass
class _Bin:
    """Trajectories (`members`) that stay in one micro-batch, and their work.

    Attributes:
        sequence_tokens: the tokens of all sequences, each with its own prompt.
        saved: the tokens of shared prompts that are not computed again.
        extra: as in `Work`.
    """

    sequence_tokens: int = 0
    saved: int = 0
    extra: float = 0.0
    prompts: set[Hashable] = field(default_factory=set)
    members: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The length of the row that `pack` makes of them; it shares prompts only if that saves enough."""
        shares = self.saved >= WORTH_SHARING * self.sequence_tokens
        return self.sequence_tokens - self.saved if shares else self.sequence_tokens

    @property
    def cost(self) -> float:
        return self.tokens + self.extra

    def with_others(self, other: _Bin, prompt_tokens: Callable[[Hashable], int]) -> _Bin:
        """The union of both."""
        saved = self.saved + other.saved + sum(prompt_tokens(p) for p in self.prompts & other.prompts)
        prompts, members = self.prompts | other.prompts, self.members + other.members
        return _Bin(self.sequence_tokens + other.sequence_tokens, saved, self.extra + other.extra, prompts, members)


def distribute(
    works: Sequence[Work], ranks: int, token_budget: int, blocks: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Assign trajectories to the micro-batches of each rank; every rank computes the same assignment.

    Each trajectory occurs once. Trajectories of one block stay in one micro-batch, and trajectories with the same
    prompt stay together as far as possible. A block longer than the budget gets a micro-batch of its own. All ranks get
    the same number of micro-batches (some may be empty), because ZeRO-3's collectives must match. Micro-batches that
    run at the same time have about the same cost.

    Args:
        works: the work of each trajectory.
        ranks, token_budget: the number of processes, and the maximum number of tokens in a micro-batch.
        blocks: the block that each trajectory belongs to, such as its group if a part reads whole groups; None if every
            trajectory may be alone.

    Returns:
        For each rank a list of micro-batches, each an ascending list of indices into `works`.

    Raises:
        ValueError: a budget or a number of ranks below 1, or `blocks` of another size than `works`.
    """
    if token_budget < 1 or ranks < 1:
        raise ValueError(f"token_budget and ranks must be at least 1, got {token_budget} and {ranks}")
    if blocks is not None and len(blocks) != len(works):
        raise ValueError(f"got {len(blocks)} blocks for {len(works)} trajectories; give one block for each")
    partition = _Partition(works, ranks, token_budget)
    units = sorted(partition.units(blocks), key=lambda unit: -unit.cost)
    fitted = partition.first_fit(units)
    slots = math.ceil(len(fitted) / ranks) * ranks
    bins = partition.even(units, slots) or fitted + [_Bin() for _ in range(slots - len(fitted))]
    bins = sorted(bins, key=lambda one: (-one.cost, one.members))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for turn, first in enumerate(range(0, slots, ranks)):
        together = bins[first : first + ranks]
        # Reversing the order each time keeps one rank from always getting the longest micro-batch.
        for rank, one in enumerate(together if turn % 2 == 0 else together[::-1]):
            plan[rank].append(sorted(one.members))
    return plan


class _Partition:
    """The assignment of trajectories to micro-batches under a token budget."""

    def __init__(self, works: Sequence[Work], ranks: int, token_budget: int) -> None:
        self.works, self.budget = works, token_budget
        share = _PART_OF_A_RANK * sum(w.tokens + w.extra for w in works) / ranks
        self._most = share if ranks > 1 else math.inf
        self._prompts = {w.prompt: w.prompt_tokens for w in works if w.prompt is not None}

    def units(self, blocks: Sequence[int] | None) -> list[_Bin]:
        """What stays together, in order of first appearance: blocks, or parts of groups with the same prompt."""
        families: dict[Hashable, list[_Bin]] = {}
        for index, work in enumerate(self.works):
            name = (index, "alone") if work.prompt is None else work.prompt
            one = _Bin(work.tokens, 0, work.extra, set() if work.prompt is None else {work.prompt}, [index])
            families.setdefault(name if blocks is None else int(blocks[index]), []).append(one)
        return [part for family in families.values() for part in self._parts(family, blocks is not None)]

    def _parts(self, family: list[_Bin], whole: bool) -> list[_Bin]:
        """The family in as few parts as the limits allow; a single one if it must stay `whole`."""
        parts = family[:1]
        for one in family[1:]:
            joined = self._join(parts[-1], one)
            if whole or (joined.tokens <= self.budget and joined.cost <= self._most):
                parts[-1] = joined
            else:
                parts.append(one)
        return parts

    def first_fit(self, units: list[_Bin]) -> list[_Bin]:
        """Fill few micro-batches: each unit goes into the first one with room for it."""
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
        """Fill `slots` evenly: each unit goes into the cheapest one; None if that exceeds the budget."""
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


#: (Some tokens, or the padded micro-batch; rows and columns of its tokens in packed order) → (factor, estimate) pairs.
EstimatesOf = Callable[[Trajectories | PackedTokens, Places], Sequence[tuple[float, Estimate]]]


class MicroBatch:
    """Some trajectories of a planned batch, as columns and as a packed row, both on the model's device.

    Args:
        columns: the columns of the whole batch, without log-probs of the current policy.
        rows: the trajectories of the micro-batch.
        packed: the same trajectories, in this order, as the model reads them.
    """

    def __init__(self, columns: Trajectories, rows: Sequence[int], packed: PackedBatch) -> None:
        self.packed = packed
        self.columns = _moved(columns.select(torch.tensor(rows, dtype=torch.long)), packed.targets.device)
        self.tokens: PackedTokens = self.columns.at(packed.rows, packed.columns)

    def objective(self, algorithm: Algorithm, estimates_of: EstimatesOf) -> Objective:
        """The objective of the output head for a loss that is a sum over tokens of the algorithm's estimates.

        If the algorithm takes chunks, the head evaluates it on one chunk of tokens after another, otherwise on the
        whole micro-batch.

        Args:
            algorithm: decides whether the head works in chunks, whether the gradient flows through entropies, and
                whether tokens other than the sampled ones move.
            estimates_of: returns the estimates of some tokens, or of the padded micro-batch, with their factors in the
                loss.
        """
        in_chunks, through_entropies = algorithm.takes_chunks, algorithm.has_entropy_gradient
        on_support, places = bool(algorithm.supports), (self.packed.rows, self.packed.columns)

        def coefficients(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
            leaves = [logprobs.detach().requires_grad_(), entropies.detach().requires_grad_()]
            with torch.enable_grad():
                view = self.tokens.chunk(chunk, *leaves) if in_chunks else self._padded(*leaves)
                estimates = estimates_of(view, places)
                losses = [factor * estimate.loss for factor, estimate in estimates]
                loss = nan_if_nonfinite(sum(losses[1:], losses[0]))
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            # The loss may depend on only one of them.
            by_logprobs, by_entropies = (
                torch.zeros_like(leaf) if gradient is None else gradient
                for leaf, gradient in zip(leaves, gradients, strict=True)
            )
            candidates = self._candidates(estimates, self.packed.targets[chunk]) if on_support else None
            return Coefficients(loss.detach(), by_logprobs, by_entropies if through_entropies else None, candidates)

        return Objective(coefficients, through_entropies, not in_chunks, on_support)

    def _candidates(self, estimates: Sequence[tuple[float, Estimate]], targets: Tensor) -> CandidateFunction:
        """The derivatives of the loss of `estimates` with respect to the log-probs of candidates, at some tokens."""
        weighted = [(factor, one) for factor, estimate in estimates for one in estimate.coefficients]

        def of_block(block: slice, logprobs: Tensor, others: Mapping[str, Tensor]) -> list[CandidateGradient]:
            given = Distributions(targets[block], logprobs, others.get("reference"), others.get("teacher"))
            moved = [(factor, *one(block, given)) for factor, one in weighted]
            return [CandidateGradient(candidates, -factor * k) for factor, candidates, k in moved]

        return of_block

    def with_forward(self, logprobs: Tensor, entropies: Tensor) -> PackedTokens:
        """All n tokens with the log-probs [n] and entropies [n] of the forward pass."""
        return self.tokens.chunk(slice(None), logprobs, entropies)

    @property
    def of_rollouts(self) -> Bool[Tensor, "n"]:
        """[n] True on tokens of rollouts, except those of a demonstration that a rollout begins with."""
        assert self.tokens.is_demonstration_token is not None
        return ~self.tokens.is_demonstration_token

    def _padded(self, logprobs: Tensor, entropies: Tensor) -> Trajectories:
        padded = {"logprobs": self.packed.pad(logprobs), "entropies": self.packed.pad(entropies)}
        return dataclasses.replace(self.columns, **padded)


@contextmanager
def naming_size(trajectories: Sequence[TokenIds]) -> Iterator[None]:
    """Add the micro-batch's size to errors of torch or Python in the block, for the out-of-memory message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        tokens = sum(len(ids) for pair in trajectories for ids in pair)
        error.add_note(f"a micro-batch of {tokens} tokens in {len(trajectories)} trajectories")
        raise


def nan_if_nonfinite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss, or NaN if it is not finite, so that the gradient norm that all ranks share is not finite either."""
    # Without a branch, because reading the number would synchronize with the device.
    finite = torch.isfinite(loss.detach())
    return loss * torch.where(finite, 1.0, float("nan")).to(loss.dtype)


def _moved(columns: Trajectories, device: torch.device) -> Trajectories:
    """The trajectories with all columns on `device`."""
    if columns.response_mask.device == device:
        return columns
    by_name = {f.name: getattr(columns, f.name) for f in dataclasses.fields(columns)}
    moved: dict[str, Any] = {n: c.to(device) for n, c in by_name.items() if isinstance(c, Tensor)}
    moved["named_rewards"] = {name: column.to(device) for name, column in columns.named_rewards.items()}
    return dataclasses.replace(columns, **moved)
