"""The split into micro-batches: complete, within the budget, even over ranks, prompts in common kept together."""

from __future__ import annotations

import math
import random

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from upge.train.micro_batches import Costs, Work, distribute
from upge.train.packing import pack


def alone(lengths: list[int]) -> list[Work]:
    return [Work(tokens) for tokens in lengths]


def tokens_of(works: list[Work], members: list[int]) -> int:
    """Of a micro-batch as `pack` makes it: sequences of so many tokens, their prompts told apart by a first token."""
    pairs = []
    for i in members:
        prompt = [hash(works[i].prompt) % 10**6, *[0] * (works[i].prompt_tokens - 1)]
        pairs.append((prompt, [0] * (works[i].tokens - works[i].prompt_tokens + 1)))
    return pack(pairs).input_ids.numel()


@pytest.mark.parametrize("seed", range(40))
def test_plan_of_micro_batches(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 50) for _ in range(rng.randint(0, 60))]
    ranks, budget = rng.randint(1, 5), rng.randint(30, 200)
    blocks = [rng.randint(0, 12) for _ in lengths] if seed % 2 else None
    plan = distribute(alone(lengths), ranks, budget, blocks)
    assert plan == distribute(alone(lengths), ranks, budget, blocks)
    assert len(plan) == ranks and len({len(of_rank) for of_rank in plan}) == 1
    micro_batches = [members for of_rank in plan for members in of_rank]
    assert sorted(i for members in micro_batches for i in members) == list(range(len(lengths)))
    names = list(range(len(lengths))) if blocks is None else blocks
    for members in micro_batches:
        assert members == sorted(members)
        held = {names[i] for i in members}
        assert sum(lengths[i] for i in members) <= budget or len(held) == 1
        assert all(i in members for i, name in enumerate(names) if name in held)
    if blocks is None and lengths:
        needed = math.ceil(sum(lengths) / budget)
        assert len(micro_batches) <= math.ceil((1.5 * needed + 1) / ranks) * ranks


def test_plan_is_balanced_over_ranks():
    rng = random.Random(0)
    lengths = [rng.randint(20, 90) for _ in range(256)]
    plan = distribute(alone(lengths), 4, token_budget=2048)
    loads = [[sum(lengths[i] for i in members) for members in of_rank] for of_rank in plan]
    assert max(map(sum, loads)) < 1.01 * sum(lengths) / 4
    assert all(max(turn) < 1.05 * min(turn) for turn in zip(*loads, strict=True))
    assert [len(of_rank) for of_rank in distribute(alone([5]), 3, 100)] == [1, 1, 1]
    assert distribute(alone([5]), 3, 100) == [[[0]], [[]], [[]]]
    assert distribute([], 2, 100) == [[], []]


def test_a_block_above_the_budget_has_its_own_micro_batch():
    plan = distribute(alone([30, 30, 5, 5, 5, 80]), 1, 50, [1, 1, 2, 2, 3, 4])[0]
    assert sorted(plan) == [[0, 1], [2, 3, 4], [5]]


@pytest.mark.parametrize("arguments", [([1], 1, 0), ([1], 0, 5), ([1, 2], 1, 5, [0])])
def test_a_plan_that_cannot_be_made_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 1|one block for each"):
        distribute(alone(arguments[0]), *arguments[1:])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_prompts_in_common_count_once(seed, ranks):
    """Within the budget as it is computed, few micro-batches, and as few prompts computed twice as it takes."""
    rng = random.Random(seed)
    prompts = [(name, rng.randint(5, 40)) for name in range(rng.randint(1, 9))]
    works = [Work(size + rng.randint(1, 60), name, size) for name, size in prompts for _ in range(rng.randint(1, 8))]
    rng.shuffle(works)
    budget = 400
    plan = distribute(works, ranks, budget)
    cuts = [members for of_rank in plan for members in of_rank if members]
    assert sorted(i for members in cuts for i in members) == list(range(len(works)))
    assert all(tokens_of(works, members) <= budget for members in cuts)
    if ranks == 1:
        needed = math.ceil(tokens_of(works, list(range(len(works)))) / budget)
        assert len(cuts) <= math.ceil(1.5 * needed) + 1
        times = [sum(any(works[i].prompt == name for i in members) for members in cuts) for name, _ in prompts]
        assert sum(times) <= len(prompts) + len(cuts)


def test_the_budget_holds_where_prompts_in_common_are_too_short_to_be_shared():
    works = [Work(41, f"p{i // 8}", 2) for i in range(64)]
    cuts = distribute(works, 1, 1000)[0]
    assert max(tokens_of(works, members) for members in cuts) <= 1000


def test_a_group_beyond_the_budget_is_cut_and_one_within_is_not():
    works = [Work(100, "a", 40) for _ in range(10)] + [Work(30, "b", 20) for _ in range(4)]
    cuts = distribute(works, 1, 250)[0]
    assert [tokens_of(works, members) <= 250 for members in cuts] == [True] * len(cuts)
    assert sum({works[i].prompt for i in members} >= {"b"} for members in cuts) == 1


def test_ranks_get_even_shares_of_the_cost_where_the_tokens_are_not():
    """Half of the trajectories cost three times their tokens: an even share of tokens would leave a rank waiting."""
    works = [Work(50, f"p{i // 8}", 20, extra=100.0 if (i // 8) % 2 else 0.0) for i in range(128)]
    plan = distribute(works, 2, 10**6)
    costs = [sum(tokens_of(works, m) + sum(works[i].extra for i in m) for m in of_rank) for of_rank in plan]
    assert max(costs) < 1.1 * min(costs)


def test_costs_are_those_of_the_model():
    """Against operations counted by hand for a model of two layers."""
    config = Qwen2Config(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    network = Qwen2ForCausalLM(config)
    inner = sum(p.numel() for p in network.model.parameters()) - 100 * 16
    costs = Costs.of(network)
    assert costs == Costs(100 * 16 / inner, 2 * 2 * 16 / inner)
    work = costs.work([1, 2, 3], [4, 5])
    assert (work.tokens, work.prompt, work.prompt_tokens) == (4, (1, 2, 3), 3)
    assert work.extra == pytest.approx(2 * costs.response + costs.pair * 8)
