"""No setting of any file escapes the comparison of test_parity.py: changed by a hundredth, it no longer agrees.

Every leaf of every file is changed, those that follow another by reference too: numbers by 1 % (0 by 0.01) up and down,
each alone, thresholds and tables of pass rates by a tenth, counts by at least one, switches and choices to every other
value, null to a number. Each change must show in the number of some token, or of the critic's loss, in some batch, or
be refused. What cannot show is listed with its reason, and what is listed must not show.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

import algorithms
import upge
from tests.upge import test_parity
from tests.upge.test_parity import (
    NAMES,
    VALUE_LOSSES,
    VARIANTS,
    batch_of,
    cases,
    critic_gradients,
    deviates,
    inside,
    load,
)
from upge.errors import ConfigError

#: The batches that are made for it; those with the widest view come first.
CASES = (
    *(
        "token_bounds",
        "probability_bounds",
        "fractional",
        "far",
        "sequence_bounds",
        "wrong_demonstrations",
        "rates",
        "quiet",
    ),
    *("some_demonstrations", "ragged"),
)
#: A number in place of null.
GIVEN = {"dual": 2.0, "low": 0.9, "length": 7, "clip": 0.1, "rollouts": 2, "steps": 7}
GIVEN["redraw"] = {"_target_": "upge.DynamicSampling", "gate": {"_target_": "upge.PassRateBetween"}}
SINGLE = (
    "asymre|cispo|clip_cov|clip_cov_of_many|dapo|dft|dpo|dppo|dr_grpo|dro|fipo|gmpo|grpo|gspo|iw_sft|iw_sft_sequence"
    "|gdpo|gdpo_over_tokens|luspo|maxrl|offline_rl|opmd|eaft|gift|gkd|opd|opsd|sdpo|ppo|real|reinforce"
    "|reinforce_plus_plus|relift|rloo|sapo|sft|spo|vespo"
)
CLOSE = "no token that matters lies within a hundredth of it; clip_cov_of_many has other bounds"
MOVES = "how μ moves between steps: see test_gates_state.py"
#: (algorithms, setting) → why a change leaves the gradient of a batch alone. Bars separate algorithms, * is any text.
INERT = {
    (SINGLE, "terms.*.reduction.over"): "the trajectories of the only term are those of the batch",
    ("amft", "validation.terms.*.reduction.over"): "as for one term: the held-out objective has no other",
    (
        "relift",
        "interleaved_update.algorithm.terms.*.reduction.over",
    ): "as for one term: the interleaved update has no other",
    ("sft_then_grpo", "stages.*.reduction.over"): "as for one term: neither stage has another",
    ("real", "terms.rl.source=all"): "the classification leaves demonstrations out, and no divisor counts them",
    ("asft|kl_cov|kl_cov_of_many", "terms.*.reduction.over"): "both terms learn from the same trajectories",
    ("fipo", "terms.rl.estimator.advantage.outlier"): "no ratio of the batches lies within a hundredth of it",
    ("clip_cov", "terms.rl.estimator.mask.share"): "of so few tokens the share is always the one that is the least",
    ("clip_cov", "terms.rl.estimator.mask.low=1.01"): CLOSE,
    ("clip_cov", "terms.rl.estimator.mask.high"): CLOSE,
    ("clip_cov", "terms.rl.estimator.mask.mask.low"): CLOSE,
    ("clip_cov", "terms.rl.estimator.mask.mask.high=0.99"): CLOSE,
    ("clip_cov_of_many", "terms.rl.estimator.mask.share=0.0707*"): "it is rounded down to the same number of tokens",
    ("kl_cov", "terms.kl.estimator.mask.share"): "of so few tokens the share is always the one that is the least",
    ("amft|ppo", "critic.reduction.over"): "a value loss says itself which trajectories count",
    ("asymre|opmd", "*.epsilon"): "added to a deviation that nothing is divided by",
    ("asymre|opmd", "*.unbiased"): "of a deviation that nothing is divided by",
    ("chord_mu", "terms.sft.gate.start"): "where a warm-up begins, and there is none",
    ("amft", "terms.sft.gate.rate"): MOVES,
    ("amft", "terms.sft.gate.entropy_rate"): MOVES,
    ("amft", "terms.sft.gate.target_entropy"): MOVES,
    ("amft", "terms.sft.gate.low"): MOVES,
    ("amft", "terms.sft.gate.high"): MOVES,
    ("amft", "terms.sft.gate.every"): MOVES,
    **{
        ("gac", f"terms.sft.gate.{setting}"): MOVES
        for setting in ("target", "smoothing", "prior.*", "blend", "change", "low", "high", "every")
    },
    ("dapo", "sampling.rounds"): "how often prompts are drawn, before there is a batch",
    ("spo", "sampling.*"): "which prompts are drawn, before there is a batch: see test_prompt_memory.py",
    (
        "spo",
        "terms.rl.estimator.advantage.epsilon",
    ): "a hundredth of it is 1e-10, beside variances near 0.2: see test_prompt_memory.py",
    (
        "gdpo|gdpo_over_tokens",
        "terms.rl.estimator.advantage.epsilon",
    ): "a hundredth of it is 1e-10, beside variances near 1",
    ("exgrpo", "terms.replayed.source=all"): "no demonstration is replayed",
    ("spo", "memory.*"): "what is remembered between batches: see test_prompt_memory.py",
    ("relift", "interleaved_update.gate.threshold"): "which prompts gather, between batches",
    ("relift", "interleaved_update.size"): "how many prompts gather, between batches",
    ("relift", "interleaved_update.own_optimizer"): "what the optimizer makes of a gradient",
    ("relift", "interleaved_update.lr_factor"): "what the optimizer makes of a gradient",
    ("uft", "terms.rl.estimator.advantage.baseline=group"): "batches with guided rollouts have no whole demonstrations",
    ("prefix_rft", "*.share=0.198"): "of so few tokens, no other one is dropped",
    ("prefix_rft|uft", "guidance.*"): "what the rollouts of a batch continue, before there is one",
    ("exgrpo", "replay.*"): "which rollouts a batch repeats, before there is one",
    ("sft_then_grpo", "stages.*.lr_factor"): "what the optimizer makes of a gradient",
    ("sft_then_grpo", "stages.*.share"): "how many steps a stage has",
}


def kinds(node: dict, path: str) -> dict[str, Any]:
    """Setting → type annotation, of the part that a node describes."""
    if "_target_" in node:
        return typing.get_type_hints(getattr(upge, node["_target_"].removeprefix("upge.")))
    return typing.get_type_hints(upge.Term) if path.rpartition(".")[0].endswith("terms") else {}


def others(value: Any, kind: Any, key: str, target: str) -> list[Any]:
    """The values that a setting is changed to."""
    if typing.get_origin(kind) is Literal:
        return [choice for choice in typing.get_args(kind) if choice != value]
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [GIVEN[key]]
    if isinstance(value, int):
        step = max(1, round(value / 100))
        return [value + step, value - step]
    step = (0.1 if target.startswith("upge.PassRate") else 0.01) * (abs(value) or 1.0)
    return [value + step, value - step]


def changes(
    node: Any, root: Any, path: str = "", kind: Any = None, target: str = ""
) -> Iterator[tuple[str, list[Any]]]:
    """(path, other values) of every leaf under a node of a tree that still has its references."""
    if isinstance(node, dict):
        known, target = kinds(node, path), str(node.get("_target_", ""))
        for key, value in node.items():
            if key not in ("_target_", "description", "name", "variable"):
                yield from changes(value, root, f"{path}.{key}".lstrip("."), known.get(key), target)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from changes(value, root, f"{path}.{number}", None, target)
    else:
        key = path.rpartition(".")[2]
        value = OmegaConf.select(root, path) if isinstance(node, str) and node.startswith("${") else node
        if not OmegaConf.is_config(value):  # a reference to a whole part is changed there
            yield path, others(value, kind, key, target)


def put(tree: Any, path: str, value: Any) -> Any:
    """A copy of a plain tree with another value at a path."""
    key, _, rest = path.partition(".")
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    place = int(key) if isinstance(tree, list) else key
    copy[place] = put(copy[place], rest, value) if rest else value
    return copy


@cache
def sample_of(name: str, number: int, case: str):
    """A batch for the algorithm `number` of a file, its derivatives, and those of the critic's loss."""
    algorithm, written = load(name)[number]
    s = batch_of(algorithm, case, 0)
    critic = critic_gradients(algorithm, VALUE_LOSSES[name], s)[1] if algorithm.critic is not None else None
    if algorithm.supports or algorithm.regularizers:  # no number per token: the gradient by the logits
        return s, test_parity.gradients(algorithm, written, s)[1], critic
    return s, test_parity.token_derivatives(written, s), critic


def shows(name: str, changed: upge.Algorithm | upge.Pipeline) -> bool:
    for case in CASES:
        for number, algorithm in enumerate(inside(changed)):
            if case not in cases(name):
                continue
            s, expected, critic = sample_of(name, number, case)
            if load(name)[number][0].supports or load(name)[number][0].regularizers:
                (actual,) = torch.autograd.grad(algorithm.estimate(s.batch).loss, s.logits, retain_graph=True)
                if float((actual - expected).abs().max()) > 1e-9 * float(expected.abs().max()):
                    return True
            elif deviates(algorithm.estimate(s.batch).weights, expected).any():
                return True
            if critic is not None:
                actual = critic_gradients(algorithm, VALUE_LOSSES[name], s)[0]
                if float((actual - critic).abs().max()) > 1e-10:
                    return True
    return False


def inert(name: str, path: str, value: Any = None) -> list[tuple[str, str]]:
    """The entries of the list that name a setting, or the setting with this value."""
    given = path, f"{path}={value}"
    return [entry for entry in INERT if name in entry[0].split("|") and any(fnmatch(one, entry[1]) for one in given)]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_matters(name):
    config = test_parity.tree(name)
    plain, file = OmegaConf.to_container(config, resolve=False), VARIANTS.get(name, (name,))[0]
    wrong, looked = [], 0
    for path, values in changes(plain, config):
        for value in values:
            try:
                changed = algorithms.compose(OmegaConf.create(put(plain, path, value)), file)
            except ConfigError:
                continue
            looked += 1
            if shows(name, changed) == bool(inert(name, path, value)):
                wrong.append((path, value))
    assert not wrong, "these escape the comparison, or are listed as inert although they show"
    assert looked >= 4, "there are settings in every file"


def test_every_exception_is_of_a_setting_that_exists():
    trees = {name: test_parity.tree(name) for name in NAMES}
    leaves = {name: [p for p, _ in changes(OmegaConf.to_container(t, resolve=False), t)] for name, t in trees.items()}
    for files, setting in INERT:
        for name in files.split("|"):
            value = setting.partition("=")[2] or None
            assert any(inert(name, path, value) == [(files, setting)] for path in leaves[name]), (name, setting)


def test_the_batches_hold_the_unchanged_files_to_be_right():
    """Else everything would show."""
    assert set(CASES) <= set(test_parity.CASES)
    assert not [name for name in NAMES if shows(name, algorithms.compose(test_parity.tree(name), name))]
