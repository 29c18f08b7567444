"""Every algorithm of algorithms/ against the original objective: autograd through the objective as its paper writes it
equals the gradient here, in float64, on batches made to be difficult.

The difference may be 1e-10, or 1e-10 of the largest entry where a batch has ratios of e^3 and more and entries are
large. The number in front of each token's ∇log π may differ by 1e-9 of itself, however small it is. An algorithm that
runs others (stages, interleaved_update, validation) is compared by each of them. That no setting of a file escapes the
comparison is tested in test_parity_settings.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from omegaconf import DictConfig

import algorithms
import upge
from tests import edges, policy, textbook, textbook_distillation, textbook_mixed, textbook_onpolicy
from tests.policy import Sample, changed, leaves
from upge.errors import ConfigError

CASES = policy.CASES | edges.EDGES
SEEDS = (0, 2)
#: Beyond the files as they are: another form that a comment names, a response limit within the lengths of the tests,
#: shares that are several of a test's few tokens and bounds that some of these meet.
VARIANTS = {
    "iw_sft_sequence": (
        "iw_sft",
        ["terms.sft.estimator.denominator={_target_: upge.SequenceReferencePolicy, power: 2.0, low: 0.0, high: 16.0}"],
        textbook_onpolicy.iw_sft_sequence,
    ),
    "clip_cov_of_many": (
        "clip_cov",
        [
            f"terms.rl.estimator.mask.{setting}"
            for setting in ("share=0.07", "high=1.5", "mask.low=0.2", "mask.high=0.28")
        ],
        lambda s: textbook_onpolicy.clip_cov(s, share=0.07, high=1.5, clip=(0.2, 0.28)),
    ),
    "kl_cov_of_many": (
        "kl_cov",
        ["terms.kl.estimator.mask.share=0.2"],
        lambda s: textbook_onpolicy.kl_cov(s, share=0.2),
    ),
    "gdpo_over_tokens": (
        "gdpo",
        ["terms.rl.estimator.advantage.over=tokens"],
        lambda s: textbook_onpolicy.gdpo(s, over="tokens"),
    ),
    "dapo": (
        "dapo",
        ["terms.rl.estimator.advantage.limit=6"],
        lambda s: textbook_onpolicy.dapo(s, limit=6),
    ),
}
#: Rewards for which an objective is not defined.
UNDEFINED = {
    ("superrl", "fractional"): "its switch is max R > 0, that of the file a success; they agree on 0 and 1",
    ("hpt_offpolicy", "fractional"): "the reward of a demonstration is its advantage, that of the file 0 or 1",
}


def objective(name: str):
    """The function that is called as the algorithm, from the one module that has it."""
    modules = textbook, textbook_onpolicy, textbook_mixed, textbook_distillation
    actual = [getattr(m, name) for m in modules if name in vars(m) and vars(m)[name].__module__ == m.__name__]
    assert len(actual) == 1, f"{name} must have exactly one objective in tests/textbook*.py, found {len(actual)}"
    return actual[0]


def inside(algorithm: upge.Algorithm | upge.Pipeline) -> Iterator[upge.Algorithm]:
    """Every algorithm that one of a file is made of."""
    if isinstance(algorithm, upge.Pipeline):
        for stage in algorithm.stages.values():
            yield from inside(stage.algorithm)
        return
    yield algorithm
    if algorithm.interleaved_update is not None:
        yield from inside(algorithm.interleaved_update.algorithm)
    if algorithm.validation is not None:
        yield from inside(algorithm.validation)


def tree(name: str) -> DictConfig:
    """The configuration of a file or a variant."""
    file, overrides, _ = VARIANTS.get(name, (name, [], None))
    return algorithms.override(algorithms.read(file), overrides)


@cache
def load(name: str) -> list[tuple[upge.Algorithm, object]]:
    """(algorithm, objective) of a file or a variant, and of all that it is made of."""
    composed = inside(algorithms.compose(tree(name), VARIANTS.get(name, (name,))[0]))
    if name in VARIANTS:
        return [(algorithm, VARIANTS[name][2]) for algorithm in composed]
    return [(algorithm, objective(algorithm.name)) for algorithm in composed]


def cases(name: str) -> list[str]:
    """The cases for which the objective of `name` is defined."""
    return [case for case in CASES if (name, case) not in UNDEFINED]


def batch_of(algorithm: upge.Algorithm, case: str, seed: int) -> Sample:
    s = CASES[case](seed, algorithm.needs.preference_pairs)
    if algorithm.guidance is not None:
        s = edges.guided(case, seed, s)
    if "named_rewards" in algorithm.needs.columns:
        s = policy.with_named_rewards(s, seed)
    if algorithm.needs.teacher or algorithm.supports:
        s = policy.with_distributions(s, seed)
    if case == "on_policy" and "behavior_logprobs" not in algorithm.needs.precomputed:
        return changed(s, behavior_logprobs=None)  # nobody has to fill it; what reads it before the pass needs it
    return s


def gradients(algorithm: upge.Algorithm, written, s: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """By the logits: of the estimate, and of the objective as it is written."""
    (actual,) = torch.autograd.grad(algorithm.estimate(s.batch).loss, s.logits, retain_graph=True)
    (expected,) = torch.autograd.grad(torch.as_tensor(written(s)) + 0.0 * s.logits.sum(), s.logits)
    return actual, expected


def numbers(algorithm: upge.Algorithm, s: Sample) -> torch.Tensor:
    """[B, T] the number in front of each token's ∇log π, with that of the regularizers."""
    if not algorithm.regularizers:
        return algorithm.estimate(s.batch).weights
    own = s.batch.logprobs.detach().clone().requires_grad_()
    batch = dataclasses.replace(s.batch, logprobs=own, entropies=s.batch.entropies.detach())
    return -torch.autograd.grad(algorithm.estimate(batch).loss, own)[0]


def token_derivatives(written, s: Sample) -> torch.Tensor:
    """[B, T] minus the derivative of an objective by the log-prob of each token."""
    parts = leaves(s)
    return -torch.autograd.grad(torch.as_tensor(written(parts)) + 0.0 * parts.logits.sum(), parts.logits)[0]


def deviates(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Where a number per token is another one, relative to itself."""
    return ~((actual - expected).abs() <= 1e-9 * expected.abs())


NAMES = list(dict.fromkeys([*algorithms.names(), *VARIANTS]))
PAIRS = [(name, case) for name in NAMES for case in cases(name)]
#: Without those that move other tokens than the sampled one, whose gradient is not a number per token.
SAMPLED = [(name, case) for name, case in PAIRS if not any(one.supports for one, _ in load(name))]


def test_every_file_has_an_objective():
    assert all(load(name) for name in algorithms.names()) and len(algorithms.names()) >= 19


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_gradient_equals_that_of_the_objective(name, case):
    for algorithm, written in load(name):
        for seed in SEEDS:
            actual, expected = gradients(algorithm, written, batch_of(algorithm, case, seed))
            largest = float(expected.abs().max())
            assert actual.isfinite().all() and expected.isfinite().all()
            assert float((actual - expected).abs().max()) <= 1e-10 * max(1.0, largest), (algorithm.name, seed)
            if largest == 0:
                assert float(actual.abs().max()) == 0, "nothing to learn must be exactly nothing"


@pytest.mark.parametrize(("name", "case"), SAMPLED)
def test_the_number_of_each_token_equals_the_derivative(name, case):
    """A token of log-prob -40 has an entry of 1e-18, far below any absolute bound: it is compared to itself."""
    for algorithm, written in load(name):
        for seed in SEEDS:
            s = batch_of(algorithm, case, seed)
            actual, expected = numbers(algorithm, s), token_derivatives(written, s)
            wrong = deviates(actual, expected)
            assert not wrong.any(), (algorithm.name, seed, actual[wrong][:5], expected[wrong][:5])


@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_says_something(name):
    """Each objective has a gradient to be compared, and no batch makes it the same as another's."""
    for algorithm, written in load(name):
        largest = [gradients(algorithm, written, batch_of(algorithm, case, 0))[1].abs().max() for case in cases(name)]
        assert max(largest) > 1e-6 and largest[0] > 0, algorithm.name


def test_every_pair_of_algorithms_differs_somewhere():
    """Else an objective could be another's by mistake."""
    prints: dict[str, torch.Tensor] = {}
    for name in algorithms.names():
        algorithm, written = load(name)[0]
        batches = [batch_of(algorithm, case, 0) for case in ("ragged", "far", "alike", "some_demonstrations")]
        prints[name] = torch.cat([gradients(algorithm, written, s)[1].flatten() for s in batches])
    alike = [(a, b) for a in prints for b in prints if a < b and prints[a].shape == prints[b].shape]
    same = [(a, b) for a, b in alike if torch.allclose(prints[a], prints[b], 1e-9, 1e-12)]
    assert same == [("gkd", "opsd"), ("sft", "sft_then_grpo")], "another teacher; the pipeline's first stage"


# The batches are what they are called.


def test_ratios_leave_every_clip_range():
    for seed in SEEDS:
        batch = CASES["far"](seed, False).batch
        log_ratio = batch.log_importance_ratio[batch.response_mask]
        assert log_ratio.min() < -3 and log_ratio.max() > 3


def test_improbable_tokens_are_there():
    batch = CASES["improbable"](0, False).batch
    assert batch.logprobs.min() < -40 and batch.logprobs[batch.response_mask].max() > -3


def test_groups_and_lengths_are_degenerate_where_they_say_so():
    made = {case: build(0, False).batch for case, build in CASES.items()}
    assert set(made["alike"].pass_rate.tolist()) == {0.0, 1.0}
    alone = made["alone"]
    assert all(int((~alone.is_demonstration)[alone.group == g].sum()) == 1 for g in alone.group.unique())
    assert len(set(made["ragged"].lengths.tolist())) > 3 and 0 not in made["ragged"].lengths
    for demonstrations in (True, False):
        assert 0 in made["empty"].lengths[made["empty"].is_demonstration == demonstrations]
    assert not made["without_demonstrations"].is_demonstration.any()
    some = made["some_demonstrations"]
    assert {int(some.is_demonstration[some.group == g].sum()) for g in some.group.unique()} == {0, 2}
    assert float(made["on_policy"].log_importance_ratio.abs().max()) == 0


@pytest.mark.parametrize("name", algorithms.names())
def test_masks_bite(name):
    """Some tokens are stopped and some are not: else the comparison would pass without the mask."""
    for algorithm, _ in load(name):
        for path, term in algorithm.terms.items():
            if isinstance(term.estimator.mask, upge.NoMask):
                continue
            shares = []
            for case in cases(name):
                factors = algorithm.estimate(batch_of(algorithm, case, 0).batch).terms[path]
                signal = (factors.gate * factors.reduction * factors.advantages) != 0
                shares.append(float((factors.mask[signal] < 0.5).double().mean()) if signal.any() else 0.0)
            assert any(0.02 < share < 0.98 for share in shares), (algorithm.name, path, shares)


@pytest.mark.parametrize(
    ("name", "term", "plain"),
    [
        ("cispo", "rl", upge.BehaviorPolicy()),
        ("dppo", "rl", upge.BehaviorPolicy()),
        ("iw_sft", "sft", upge.ClippedReferencePolicy(low=0.0, high=1e12)),
        ("iw_sft_sequence", "sft", upge.SequenceReferencePolicy(high=1e12)),
        ("gmpo", "rl", upge.SequenceBehaviorPolicy()),
    ],
)
def test_clipped_denominators_bite(name, term, plain):
    algorithm, bitten = load(name)[0][0], []
    for seed in SEEDS:
        batch = batch_of(algorithm, "far", seed).batch
        clipped = algorithm.estimate(batch).terms[term]
        open_ended = plain(plain.view(batch))
        signal = (clipped.reduction * clipped.advantages) != 0
        bitten.append(((clipped.log_denominator - open_ended).abs() > 1e-9)[signal])
    share = float(torch.cat(bitten).double().mean())
    assert 0.02 < share < 0.98 or (name == "gmpo" and share > 0.5), "GMPO's clip moves whole responses"


def test_the_length_penalty_bites():
    """In questions that count there are responses before the punished zone, within it and past its end."""
    algorithm = load("dapo")[0][0]
    shaping, unlimited = algorithm.terms["rl"].estimator.advantage, algorithms.load("dapo")
    assert unlimited.terms["rl"].estimator.advantage == dataclasses.replace(shaping, limit=1024)
    for seed in SEEDS:
        batch = policy.sample(seed).batch
        punished = (batch.rewards - shaping.shaped(batch).rewards)[algorithm.plan(batch).active]
        assert punished.round(decimals=9).unique().tolist() == [0, round(0.5 * 0.2 / 1.2, 9), 0.5]
        plain, shaped = (a.estimate(batch).terms["rl"].advantages for a in (unlimited, algorithm))
        assert (plain != shaped).any()


# Beside the gradient by the policy.


VALUE_LOSSES = {"ppo": textbook_onpolicy.ppo_values, "amft": textbook_mixed.amft_values}


def critic_gradients(algorithm: upge.Algorithm, written, s: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """By the values of a critic that has moved since the batch's were taken, to either side of its clip's bounds."""
    critic, old = algorithm.critic, s.batch.values
    sizes = (*edges.around(0.2), 0.05, 0.5)
    moved = (old + edges.placed((*sizes, *(-x for x in sizes)), old.shape)).detach().requires_grad_()
    weights = critic.weights(s.batch, algorithm.plan(s.batch).active)
    (actual,) = torch.autograd.grad((weights * critic(moved, old, critic.targets(s.batch))).sum(), moved)
    return actual, torch.autograd.grad(written(s, moved), moved)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_value_loss_equals_that_of_the_objective(name, case):
    algorithm = load(name)[0][0]
    for seed in SEEDS:
        s = batch_of(algorithm, case, seed)
        actual, expected = critic_gradients(algorithm, VALUE_LOSSES[name], s)
        assert expected.abs().max() > 1e-3 and float((actual - expected).abs().max()) <= 1e-10
        held = float((expected[s.batch.response_mask & ~s.batch.is_demonstration[:, None]] == 0).double().mean())
        assert held < 1 and (held > 0 or case == "quiet"), "some tokens must be held, unless no return is so far off"


def test_every_file_with_a_critic_has_a_value_loss():
    assert {name for name in NAMES if any(a.critic is not None for a, _ in load(name))} == set(VALUE_LOSSES)


GROUPED = [name for name in algorithms.names() if any(a.needs.group_size > 1 for a, _ in load(name))]


def test_groups_of_one_are_refused_where_they_are_compared():
    """The estimates above on such groups are by definition; a run is refused."""
    assert {"grpo", "rloo", "dapo", "gspo", "asymre", "hpt"} <= set(GROUPED)
    assert not {"sft", "reinforce", "ppo", "reinforce_plus_plus", "dft", "iw_sft", "dpo"} & set(GROUPED)
    columns = ("behavior_logprobs", "reference_logprobs", "sampler_logprobs", "entropies", "values", "preference")
    for name in GROUPED:
        with pytest.raises(ConfigError, match=r"group_size: 1 is too small"):
            algorithms.load(name).check(group_size=1, provided=columns)


def test_a_group_that_agrees_is_learned_from_where_the_baseline_is_shifted():
    """Â = 0.1 for every token of every rollout, right or wrong."""
    algorithm = load("asymre")[0][0]
    batch = CASES["alike"](0, False).batch
    estimate = algorithm.estimate(batch)
    own = batch.response_mask & ~batch.is_demonstration[:, None]
    assert torch.allclose(estimate.terms["rl"].advantages[own], torch.tensor(0.1, dtype=torch.float64))
    assert algorithm.plan(batch).contributing.tolist() == (~batch.is_demonstration).tolist()
