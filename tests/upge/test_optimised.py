"""What is done for speed changes no gradient: every algorithm, in float64 and float32, against the plain path.

Plain: one forward per trajectory of an ordinary model, full logits, nothing left out, the algorithm on the whole padded
batch. Ours: trajectories without weight left out, packed rows in which prompts stand once, a head in chunks of seven.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.compositions import CONFIGS, by_stage, load
from tests.models import save_random_model, trajectories, unrounded
from tests.update_ranks import STEP
from tests.upge.train.test_update import made_up, padded_logprobs
from upge import Algorithm, Trajectories
from upge.train.micro_batches import MicroBatch
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack
from upge.train.sample import assemble

#: Those that move other tokens than the sampled one are compared in train/test_support_in_training.py.
ALGORITHMS = {n: one for n, one in (by_stage() | {name: load(name) for name in CONFIGS}).items() if not one.supports}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=TOLERANCES, ids=str)
def models(request, model_folder):
    """(precision, plain model in float64, packed one, its log-probs and entropies, what other models fill in)."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="sdpa")
    network = AutoModelForCausalLM.from_pretrained(model_folder, dtype=request.param)
    for model in (plain, network):
        unrounded(model)
    ours = PackedPolicy(network, chunk_size=7)
    live = {kind: padded_logprobs(plain, trajectories(pairs=kind == "pairs")) for kind in ("plain", "pairs")}
    return request.param, plain, ours, live, {kind: made_up(actual[0].detach()) for kind, actual in live.items()}


def whole_batch(one: Algorithm, off_policy: bool, filled: dict[str, dict[str, Tensor]]) -> Trajectories:
    pairs = one.needs.preference_pairs
    made = filled["pairs" if pairs else "plain"]
    columns = {n: c for n, c in made.items() if n != "behavior_logprobs" or off_policy or n in one.needs.precomputed}
    state = {name: gate.initial() for name, gate in one.stateful.items()}
    return dataclasses.replace(assemble(trajectories(pairs=pairs), STEP), **columns, state=state)


def optimised_gradient(
    one: Algorithm, batch: Trajectories, current: Trajectories, ours: PackedPolicy, cut: Callable
) -> list[Tensor]:
    """The sum over the pieces that `cut` makes of the rows to keep; `current` has the log-probs as well."""
    plan, members = one.plan(batch).with_current(current), trajectories(pairs=one.needs.preference_pairs)
    ours.zero_grad()
    for rows in cut(plan.contributing.nonzero()[:, 0].tolist(), batch.group):
        packed = pack([(members[r].prompt_ids, members[r].response_ids) for r in rows])
        piece = MicroBatch(batch, rows, packed)
        loss, *_ = ours(
            packed, objective=piece.objective(one, lambda view, places: [(1.0, plan.estimate_in_head(view, places))])
        )
        loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in ours.parameters()]


def in_one_piece(rows: list[int], group: Tensor) -> list[list[int]]:
    return [rows] if rows else []


def by_group(rows: list[int], group: Tensor) -> list[list[int]]:
    actual: dict[int, list[int]] = {}
    for row in rows:
        actual.setdefault(int(group[row]), []).append(row)
    return list(actual.values())


@pytest.mark.parametrize("cut", [in_one_piece, by_group])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_keeps_its_gradient(models, name, off_policy, cut):
    dtype, plain, ours, live, filled = models
    one = ALGORITHMS[name]
    batch = whole_batch(one, off_policy, filled)
    columns = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    now = live["pairs" if one.needs.preference_pairs else "plain"]
    columns |= dict(zip(("logprobs", "entropies"), now, strict=True))
    current = Trajectories(**columns)
    loss = one.estimate(current).loss
    expected = torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True)
    actual = optimised_gradient(one, batch, current, ours, cut)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-6
    for a, b in zip(actual, expected, strict=True):
        assert float((a - b).abs().max()) <= TOLERANCES[dtype] * scale


def test_both_ways_through_the_head_are_taken():
    """Most algorithms are asked chunk by chunk; those with statistics of a response or a group about the whole."""
    in_chunks = {name for name, one in ALGORITHMS.items() if one.takes_chunks}
    assert {"grpo", "hpt", "sft", "luffy", "ppo", "dapo", "cispo"} <= {name.split(":")[0] for name in in_chunks}
    assert not in_chunks & {"gspo", "gmpo", "dpo", "srft"}
    assert {name for name, one in ALGORITHMS.items() if one.has_entropy_gradient}


def test_prompts_stand_once_in_these_rows_and_some_trajectories_are_left_out():
    members = trajectories()
    packed = pack([(t.prompt_ids, t.response_ids) for t in members])
    assert packed.sharing is not None and packed.input_ids.numel() < sum(packed.lengths)
    contributing = ALGORITHMS["grpo"].plan(assemble(members, STEP)).contributing
    assert 0 < int(contributing.sum()) < len(members)
