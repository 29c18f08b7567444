"""Gains, oracles and gates where the answers are known: softmax bandits, crossed random effects, enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments.regret import measuring
from experiments.regret.analysis import ACTIONS, analysis
from experiments.regret.measuring import HeldOut, Result, measured
from experiments.regret.settings import Chosen, choose
from tests.models import save_random_model, trajectories, unrounded
from upge.measure import Group, ModelScores, Pool, Request, deal, scores
from upge.measure.pool import pair_of
from upge.measure.regret import Signals, best, by_prompt, gains, learned, stepped_gain, taken, two_way

REWARD = torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0], [0.3, 0.3, 1.0]], dtype=torch.float64)


def bandit(seed: int = 0, groups: int = 5) -> tuple[torch.Tensor, torch.Tensor, Signals]:
    """A softmax policy over three responses, directions [N, 2, 3] of its logits, and their inner products with the
    gradients of three objectives."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, generator=g, dtype=torch.float64).requires_grad_()
    directions = torch.randn(groups, 2, 3, generator=g, dtype=torch.float64)
    gradient = torch.stack([torch.autograd.grad(r @ logits.softmax(0), logits)[0] for r in REWARD])
    along = directions @ gradient.T
    square = directions @ directions.mT
    squares = torch.stack([square[:, 0, 0], square[:, 0, 1], square[:, 1, 1]], dim=1)
    return logits.detach(), directions, Signals(along[:, 0], along[:, 1], squares)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("pair", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.3, 2.0)])
def test_the_first_order_gain_is_the_limit_of_the_true_gain(pair, fixed):
    logits, directions, signals = bandit()
    coefficients = torch.tensor([pair], dtype=torch.float64).expand(5, 2)
    expected = gains(signals, coefficients, fixed)
    step = torch.einsum("na,nak->nk", coefficients, directions)
    step = step / step.norm(dim=1, keepdim=True) if fixed else step
    errors = []
    for size in (1e-2, 1e-4):
        gained = ((logits + size * step).softmax(1) - logits.softmax(0)) @ REWARD.T
        errors.append(float((gained / size - expected).abs().max()))
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 50


def test_a_step_of_length_zero_gains_nothing():
    signals = Signals(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[0.0, 0.0, 4.0]]))
    assert gains(signals, torch.tensor([[1.0, 0.0]])).tolist() == [[0.0, 0.0]]
    assert gains(signals, torch.tensor([[1.0, 3.0]])).tolist() == [[0.5, 0.5]], "a zero direction changes no other"


def result_of(gates: dict[str, torch.Tensor], signals: Signals, prompts, successes, group_size: int = 4) -> Result:
    count = len(prompts)
    own = {("sgd", name): signals for name in ("accuracy", "log-likelihood")}
    return Result(
        "", None, group_size, torch.as_tensor(prompts), torch.as_tensor(successes), torch.zeros(count, 4), own, gates,
        (), {},
    )  # fmt: skip


def known() -> tuple[Result, torch.Tensor]:
    """40 prompts whose held-out gradient is known: all parts are equal. Rollouts are better above two successes."""
    successes = torch.arange(40) % 5
    rollouts, demonstration = successes.double() - 0.5, 2.0 - successes.double()
    signals = Signals(
        rollouts[:, None].expand(40, 3), demonstration[:, None].expand(40, 3),
        torch.tensor([[1.0, 0.0, 1.0]]).double().expand(40, 3),
    )  # fmt: skip
    actions = torch.tensor([*ACTIONS.values()]).double()
    values = torch.stack([gains(signals, pair.expand(40, 2))[:, 0] for pair in actions])
    gates = {
        "best": actions[values.argmax(0)], "worst": actions[values.argmin(0)],
        "γ=0.5": torch.stack([(successes > 2).double(), (successes <= 2).double()], dim=1),
        "constant w=0": actions[1].expand(40, 2), "constant w=0.5": (actions[3] / 2).expand(40, 2),
    }  # fmt: skip
    return result_of(gates, signals, torch.arange(40), successes), values


def test_the_oracle_has_no_regret_and_the_worst_choice_the_largest():
    result, values = known()
    scores_of = {s.name: s for s in analysis(result, "sgd", "accuracy", {"sgd": 1.0}, [0, 0.5]).scores}
    assert scores_of["best"].regret.value == pytest.approx(0, abs=1e-12)
    assert scores_of["worst"].regret.value == max(s.regret.value for s in scores_of.values()) > 0
    assert min(s.regret.value for s in scores_of.values()) >= -1e-12
    expected = 100 * float((values.max(0).values - values[:, 0:].min(0).values).mean())
    assert scores_of["worst"].regret.value == pytest.approx(expected)
    # Everything depends on the successes here, so a learned table is the oracle.
    assert scores_of["learned from the pass rate"].regret.value == pytest.approx(0, abs=1e-12)
    assert 0 < scores_of["γ=0.5"].regret.value < scores_of["worst"].regret.value


def test_the_best_action_by_successes():
    result, _ = known()
    by_count = analysis(result, "sgd", "accuracy", {"sgd": 1.0}, [0, 0.5]).by_count
    named = [max(one.choices, key=lambda name: one.choices[name].value) for one in by_count]
    assert named == ["demonstration", "both", "rollouts", "rollouts", "rollouts"]
    assert [one.groups for one in by_count] == [8] * 5
    for one, wanted in zip(by_count, (2.5, 0.5, -1.5, -3.5, -5.5), strict=True):
        assert one.difference is not None and one.difference.value == pytest.approx(100 * wanted)


def test_the_order_of_prompts_changes_nothing():
    g = torch.Generator().manual_seed(0)
    along = (torch.randn(24, 4, generator=g, dtype=torch.float64) for _ in range(2))
    signals = Signals(*along, torch.tensor([[1.0, 0.2, 2.0]]).double().expand(24, 3))
    prompts, successes = torch.arange(24) // 2, torch.randint(0, 5, (24,), generator=g)
    gate = torch.rand(24, 2, generator=g).double()
    order = torch.randperm(24, generator=g)
    mixture = torch.tensor([[0.5, 0.5]]).double().expand(24, 2)
    both = []
    for rows in (torch.arange(24), order):
        gates = {"gate": gate[rows], "constant w=0.5": mixture}
        result = result_of(gates, Signals(*(one[rows] for one in signals)), prompts[rows], successes[rows])
        both.append(analysis(result, "sgd", "accuracy", {"sgd": 1.0}, [0.5]).scores)
    for one, other in zip(*both, strict=True):
        assert one.name == other.name
        assert one.gain == pytest.approx(other.gain, nan_ok=True) and one.regret == pytest.approx(
            other.regret, nan_ok=True
        )


def test_the_interval_covers_where_prompts_and_parts_are_both_random():
    """Both random effects matter: an interval over prompts alone would cover less."""
    g = torch.Generator().manual_seed(1)
    samples, prompts, parts = 4000, 12, 8
    rows, columns = (torch.randn(samples, n, generator=g, dtype=torch.float64) for n in (prompts, parts))
    noise = torch.randn(samples, prompts, parts, generator=g, dtype=torch.float64)
    values = rows[:, :, None] + columns[:, None] + 2 * noise
    held = [m.low <= 0 <= m.high for m in two_way(values)]
    assert 0.935 <= sum(held) / samples <= 0.97
    rejected = sum(m.p_value < 0.05 for m in two_way(values))
    assert rejected == samples - sum(held), "p and interval agree"
    means, error = values.mean(dim=(1, 2)), values.mean(dim=2).std(dim=1) / math.sqrt(prompts)
    assert float((means.abs() <= 2.2 * error).double().mean()) < 0.9


def test_constant_tables_have_no_interval():
    (one,) = two_way(torch.full((1, 3, 2), 0.25))
    assert one[:3] == (0.25, 0.25, 0.25) and math.isnan(one.p_value)
    with pytest.raises(ValueError, match="two of each"):
        two_way(torch.zeros(1, 1, 4))


def test_choices_do_not_see_what_they_are_valued_by():
    """The oracle's choice for a part ignores that part; a learned gate also ignores all groups of its own fold."""
    g = torch.Generator().manual_seed(2)
    values, features = torch.randn(3, 30, 6, generator=g).double(), torch.randn(30, 2, generator=g).double()
    prompts = torch.arange(30) // 2
    for change, mine in (("best", best(values)), ("learned", learned(values, features, prompts, folds=5))):
        for part in range(6):
            other = values.clone()
            other[:, :, part] += 10 * torch.randn(3, 30, generator=g)
            if change == "learned":
                other[:, prompts % 5 == 1] += 10 * torch.randn(3, int((prompts % 5 == 1).sum()), 6, generator=g)
                again = learned(other, features, prompts, folds=5)[prompts % 5 == 1, part]
                assert bool((again == mine[prompts % 5 == 1, part]).all())
            else:
                assert bool((best(other)[:, part] == mine[:, part]).all())
    assert bool((best(values) != best(values, crossed=False)).any())


def test_without_a_signal_the_crossed_oracle_gains_nothing():
    values = torch.randn(4, 4000, 8, generator=torch.Generator().manual_seed(3)).double()
    assert abs(float(taken(values, best(values)).mean())) < 0.02
    assert float(taken(values, best(values, crossed=False)).mean()) > 0.3


def test_a_learned_gate_finds_what_depends_on_its_features():
    g = torch.Generator().manual_seed(4)
    feature = torch.randn(400, 1, generator=g).double()
    values = torch.stack([feature, -feature]).expand(2, 400, 4) + 0.1 * torch.randn(2, 400, 4, generator=g)
    choice = learned(values, feature, torch.arange(400))
    clear = feature[:, 0].abs() > 0.1
    assert bool((choice[clear, 0] == (feature[clear, 0] < 0).long()).all())
    assert len(learned(values, torch.ones(400, 1), torch.arange(400)).unique()) <= 2


def test_prompts_count_alike():
    values = torch.tensor([[1.0], [3.0], [10.0]])
    assert by_prompt(values, torch.tensor([0, 0, 1])).tolist() == [[2.0], [10.0]]


def test_importance_sampling_is_unbiased_and_its_slope_is_the_first_order_gain():
    before = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
    after = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    expected = 0.0
    for rollouts in itertools.product(range(3), repeat=3):
        index = torch.tensor(rollouts)
        probability = float(before[index].prod())
        one = stepped_gain((after / before).log()[index], reward[index], [7, 7, 7])
        expected += probability * one.gain
        assert 0 < one.effective <= 1
    assert expected == pytest.approx(float((after - before) @ reward), abs=1e-12)
    # A mean over prompts with different rewards: each has its own baseline.
    two = stepped_gain(torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0]), [0, 0, 1, 1])
    assert two.gain == 0 and two.effective == 1


# On a model.


@pytest.fixture(scope="module")
def model_scores(tmp_path_factory) -> ModelScores:
    network = AutoModelForCausalLM.from_pretrained(save_random_model(tmp_path_factory.mktemp("m")), dtype=torch.float64)
    unrounded(network)
    return ModelScores(network, 1)


def sample(seed: int, turned: bool = False) -> list[Group]:
    drawn = trajectories(groups=4, seed=seed)
    groups = []
    for q in range(4):
        own = [t for t in drawn if t.group == q]
        rollouts = [t for t in own if not t.is_demonstration]
        shown = [t for t in own if t.is_demonstration]
        # Every second rollout succeeds, so that each group has a signal.
        rollouts = [dataclasses.replace(t, reward=float(i % 2)) for i, t in enumerate(rollouts)]
        groups.append(Group(tuple(rollouts[::-1] if turned else rollouts), tuple(shown[:1])))
    return groups


def settings() -> Chosen:
    sizes = ["held_out=12", "held_out_samples=4", "parts=3", "finite=4", "finite_parts=3"]
    return choose([*sizes, "group_size=4", "sgd_length=1e-6", "adam_length=1e-6", "gates=[hpt,hpt_soft]"])


def measured_on(model_scores: ModelScores, turned: bool = False) -> Result:
    groups = sample(0, turned)
    held_out = [one for seed in (1, 2, 3) for one in sample(seed, turned)]
    # Problem i is in part i mod 3, which keeps its members if its order is turned.
    order = [*range(9, 12), *range(6, 9), *range(3, 6), *range(3)] if turned else range(12)
    rollouts, shown = [held_out[i].rollouts for i in order], [held_out[i].demonstrations for i in order]
    pool = Pool([[one] for one in groups], deal(4, 1, 1, 0), [], torch.zeros(4))
    pairs = pool.pairs()
    columns = {pair: {"logprobs": logprobs, "entropies": entropies}
               for pair, (logprobs, entropies) in zip(pairs, model_scores.columns(pairs), strict=True)}  # fmt: skip
    return measured(settings(), pool, HeldOut(rollouts, shown, 3), model_scores, columns)


@pytest.fixture(scope="module")
def on_model(model_scores) -> Result:
    return measured_on(model_scores)


def test_a_small_step_of_a_model_gains_its_first_order_gain(on_model):
    assert [(f.metric, f.direction) for f in on_model.finite] == [
        (m, d) for m in ("sgd", "adam") for d in ("rollouts", "demonstration", "both")
    ]
    for one in on_model.finite:
        assert len(one.effective) == 4 and min(one.effective) > 0.999
        for objective in one.gains:
            assert one.gains[objective] == pytest.approx(one.predicted[objective], rel=1e-3, abs=1e-12)
            assert max(map(abs, one.predicted[objective])) > 1e-9


def test_first_order_gains_of_a_model_are_those_of_its_inner_products(on_model):
    pairs = {"rollouts": (1.0, 0.0), "demonstration": (0.0, 1.0), "both": (1.0, 1.0)}
    order = [int((on_model.prompts == q).nonzero()[0, 0]) for q in range(4)]
    for one in on_model.finite:
        for objective, predicted in one.predicted.items():
            pair = torch.tensor([pairs[one.direction]]).double().expand(4, 2)
            expected = 1e-6 * gains(on_model.signals[one.metric, objective], pair).mean(dim=1)[order]
            assert predicted == pytest.approx(expected.tolist(), rel=1e-9)


def test_order_and_micro_batches_change_nothing(on_model, model_scores, monkeypatch):
    monkeypatch.setattr(scores, "_TOKENS_WITH_GRADIENT", 20)
    again = measured_on(model_scores, turned=True)
    assert again.prompts.tolist() == on_model.prompts.tolist()
    for name, own in on_model.signals.items():
        for one, other in zip(own, again.signals[name], strict=True):
            assert bool(((one - other).abs() <= 1e-9 * one.abs().max()).all())
    for name, own in on_model.coefficients.items():
        assert torch.equal(own, again.coefficients[name])


def test_gates_are_the_algorithms_own(on_model):
    rate = on_model.successes.double() / 4
    assert rate.tolist() == [0.5] * 4
    assert on_model.coefficients["hpt"].tolist() == [[1.0, 0.0]] * 4
    assert on_model.coefficients["γ=0.5"].tolist() == [[0.0, 1.0]] * 4, "inclusive"
    soft = on_model.coefficients["hpt_soft"][0].tolist()
    assert soft == pytest.approx([0.75, 0.0625])
    assert on_model.coefficients["constant w=0.2"][0].tolist() == [0.8, 0.2]


def test_a_gate_within_a_group_is_refused():
    with pytest.raises(measuring.ConfigError, match="different coefficients"):
        measuring._of_group("x", torch.tensor([0.0, 1.0]))


def test_the_sum_of_gradients(model_scores):
    own = [Request(pair_of(t), torch.randn(len(t.response_ids), dtype=torch.float64)) for t in trajectories(groups=2)]
    whole = ModelScores(model_scores.policy.model, 0)
    expected = torch.zeros(whole.width, dtype=torch.float64)
    for _, rows in whole.gradients(own):
        expected += rows.sum(dim=0)
    assert torch.allclose(model_scores.summed(own), expected, rtol=1e-9, atol=1e-12)
    assert not bool(model_scores.summed([]).any())


def test_moved_parameters_return(model_scores):
    before = [p.detach().clone() for p in model_scores.parameters]
    step = torch.ones(sum(p.numel() for p in before), dtype=torch.float64) / 3
    with pytest.raises(RuntimeError, match="stop"), model_scores.moved(step):
        assert all(
            torch.equal(p.detach(), old + step[0]) for p, old in zip(model_scores.parameters, before, strict=True)
        )
        raise RuntimeError("stop")
    assert all(torch.equal(p.detach(), old) for p, old in zip(model_scores.parameters, before, strict=True))
