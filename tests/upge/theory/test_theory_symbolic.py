"""Every file's gradient follows from its objective; a false objective, or a false symbolic form, proves nothing."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from sympy import Rational, exp, log, sqrt

import algorithms
import upge
from experiments.table1 import STATEMENTS, corrections, demonstrations, rollouts, statement, variants
from experiments.table1.rollouts import all_centred, centred, expert_mean, surrogate, token_mean
from upge.components.base import Component, Precomputed, StabilizationMask
from upge.reduction import Reduction
from upge.regularizers import ValueLoss
from upge.theory import symbolic
from upge.theory.symbolic import World, is_zero, mean, prove, total, worlds
from upge.theory.symbolic.proof import levels_between
from upge.theory.symbolic.rules import has_rule

# Every file.


@pytest.mark.slow
@pytest.mark.parametrize("claim", STATEMENTS, ids=lambda claim: claim.name)
def test_the_factor_derived_from_the_objective_is_the_product_of_the_parts(claim):
    proof = claim.proof
    assert not proof.mismatches, proof.mismatches[0]
    assert not proof.one_sided, proof.one_sided[0]
    assert proof.rounding < 1e-12 and proof.compared >= 26 and proof.holds


def test_every_file_has_a_statement():
    stated = {claim.algorithm for claim in STATEMENTS if not claim.terms and not claim.corrections}
    # The worlds of a proof have no rollouts that continue a prefix, which prefix_rft compares; autograd checks it.
    #: Their gradient has a factor for each token of the vocabulary; enumeration and autograd compare it.
    on_vocabulary = {name for name in algorithms.names() if getattr(algorithms.load(name), "supports", None)}
    for name in set(algorithms.names()) - stated - on_vocabulary - {"fipo", "prefix_rft", "clip_cov", "kl_cov"}:
        stages = algorithms.load(name).stages.values()
        assert all(stage.algorithm == algorithms.load(stage.algorithm.name) for stage in stages), name
        assert {stage.algorithm.name for stage in stages} <= stated
    stated = {name for claim in STATEMENTS for name in claim.corrections}
    assert stated | {"kl_full", "curriculum"} == set(algorithms.corrections()), "on the vocabulary; chooses prompts"
    inner = (algorithms.load("relift").interleaved_update.algorithm, algorithms.load("amft").validation)
    assert all(algorithm.terms == algorithms.load("sft").terms for algorithm in inner), "updates of their own"


@pytest.mark.slow
def test_fipo_is_compared_where_the_points_lie():
    """Both sides of its bounds on powers of later ratios are too rarely met to compare it on whole cells."""
    proof = prove(algorithms.load("fipo"), variants.fipo)
    assert not proof.mismatches and proof.rounding < 1e-12 and proof.compared >= 26


def test_every_region_of_a_clip_is_compared():
    """Three intervals of the ratio and two signs of Â; in four of six the token moves, always by one expression."""
    ratio_and_sign = set()
    for world in worlds(40):
        symbolic.product_of_parts(statement("grpo").load(), world)
        row = world.rows[0]
        ratio, up = world.value(row.ratios[1]), world.value(centred(world, world.questions[0])[0][1]) > 0
        ratio_and_sign.add((-1 if ratio < 0.8 else 1 if ratio > 1.2 else 0, up))
    assert len(ratio_and_sign) == 6
    assert statement("grpo").proof.compared == 36  # 10 rollout tokens × {moves, stopped}, 3 + 13 that never do


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), [("clip_cov", ["terms.rl.estimator.mask.share=1.0"]), ("kl_cov", [])])
def test_a_ranking_is_compared_where_the_points_lie(name, overrides):
    """The questions of a ranking are about all tokens, and most have one answer at nearly all points.

    At a share of 1 all tokens within the bounds are drawn, so the draw has a symbolic form.
    """
    proof = prove(algorithms.load(name, overrides), getattr(variants, name), points=30)
    assert not proof.mismatches and proof.rounding < 1e-12 and proof.compared >= 26


def test_a_random_draw_has_no_symbolic_form():
    with pytest.raises(upge.ConfigError, match="CovarianceClip: a random draw has no symbolic form; set share to 1"):
        prove(algorithms.load("clip_cov", ["terms.rl.estimator.mask.low=-9.0"]), variants.clip_cov, points=3)


# False objectives.


def unclipped(w):
    return mean(mean(a * mean(row.ratios) for row, a in centred(w, q, std=True)) for q in w.questions)


def one_clip_wider(w):
    pairs = [centred(w, q, std=True) for q in w.questions]
    one = lambda row, a: mean(surrogate(w, row, t, a, high="0.28") for t in range(len(row)))  # noqa: E731
    return mean(mean(one(row, a) for row, a in group) for group in pairs)


def biased_std(w):
    """The variance divided by n: a constant apart for a group of two, not for one of three as well."""
    return mean(
        mean(mean(surrogate(w, row, t, a * Rational(2, 3)) for t in range(len(row))) for row, a in centred(w, q, True))
        for q in w.questions
    )


def weight_not_detached(w):
    clipped = lambda row, t: w.clip(row.p[t] / row.q[t], high=5)  # noqa: E731
    return token_mean(all_centred(w, std=True), lambda row, t, a: clipped(row, t) * a * log(row.p[t]))


def entropy_not_detached(w):
    return rollouts_of_srft(w, lambda x: x)


def rollouts_of_srft(w, detached):
    weight = lambda row: detached(exp(mean(row.h))) / 10 if w.less(Rational(1, 2), row.reward) else -1  # noqa: E731
    imitated = mean(detached(exp(-mean(row.h))) / 2 * mean(map(log, row.p)) for row in w.demonstrations)
    return imitated + demonstrations.srft_offline(w) + mean(weight(row) * mean(map(log, row.p)) for row in w.rollouts)


def root_not_detached(w):
    def one(row, t):
        return row.p[t] / (row.q[t] * 3 / 4 + Rational(1, 4)) * sqrt(1 - row.p[t])

    terms = lambda row: [one(row, t) for t in range(len(row))] if row.is_demonstration else row.ratios  # noqa: E731
    return mean(a * total(terms(row)) / 1024 for row, a in all_centred(w, union=True))


def unshaped(w):
    terms = lambda row: row.p if row.is_demonstration else row.ratios  # noqa: E731
    return mean(a * total(terms(row)) / 1024 for row, a in all_centred(w, union=True))


def token_ratios(w):
    """A clip per token in place of one per response."""
    low, high = "3e-4", "4e-4"
    return mean(
        mean(mean(surrogate(w, row, t, a, low, high) for t in range(len(row))) for row, a in centred(w, q, std=True))
        for q in w.questions
    )


def gate_turned(w):
    return mean(
        mean(mean(map(log, row.p)) for row in q if row.is_demonstration)
        if any(w.less(Rational(1, 2), row.reward) for row in q if not row.is_demonstration)
        else mean(a * total(row.ratios) / 1024 for row, a in centred(w, q))
        for q in w.questions
    )


FALSE = {
    "grpo": [unclipped, one_clip_wider, biased_std, rollouts.dr_grpo],
    "dr_grpo": [lambda w: rollouts.dr_grpo(w) / 2, lambda w: -rollouts.dr_grpo(w), rollouts.relift],
    "cispo": [weight_not_detached, lambda w: token_mean(all_centred(w, std=True), lambda r, t, a: a * log(r.p[t]))],
    "gspo": [token_ratios],
    "srft": [entropy_not_detached, demonstrations.srft_offline],
    "rl_plus": [root_not_detached],
    "luffy": [unshaped],
    "dft": [demonstrations.sft, lambda w: expert_mean(w, lambda row, t: row.p[t] * log(row.p[t]))],
    "hpt": [gate_turned, demonstrations.hpt_soft],
    "sft": [lambda w: mean(mean(map(log, row.p)) for row in w.demonstrations)],
    "dr_grpo kl_k3": [corrections.kl_k2, corrections.kl_k1, rollouts.dr_grpo],
    "dr_grpo dual_clip": [rollouts.dr_grpo],
    "dr_grpo tis": [corrections.icepop, rollouts.dr_grpo],
    "dr_grpo entropy": [rollouts.dr_grpo],
    "chord_mu": [demonstrations.chord_phi],
    "luspo": [rollouts.gspo],
    "exgrpo": [rollouts.relift],
    "dr_grpo ratio_kl": [corrections.kl_k3, corrections.kl_k2],
    "dr_grpo overlong_filter": [rollouts.dr_grpo],
    "dr_grpo optimal_baseline": [rollouts.dr_grpo],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "objective"), [(n, f) for n, actual in FALSE.items() for f in actual])
def test_a_false_objective_is_found_out(name, objective):
    proof = prove(statement(name).load(), objective, points=12)
    assert proof.mismatches and not proof.holds
    assert proof.rounding < 1e-12, "the parts are as they were: only the objective is false"
    assert all(not is_zero(m.derived - m.product) for m in proof.mismatches[:2])


@pytest.mark.parametrize("change", ["mask.high=0.21", "advantage.unbiased=false", "advantage.epsilon=2e-6"])
def test_another_setting_in_the_file_is_found_out(change):
    assert prove(algorithms.load("grpo", [f"terms.rl.estimator.{change}"]), rollouts.grpo).mismatches


def test_points_lie_in_every_gap_between_bounds():
    log_bounds = [math.log(x) for x in (1.2, 0.8, 1.21, 0.8, 1.2, 1.21, 7.0)]
    below, inside, narrow, above = levels_between(log_bounds)
    assert below < 0.8 < inside < 1.2 < narrow < 1.21 < above < 7, "a bound of one question alone is none"
    assert levels_between([]) == levels_between([0.3]) == []


def test_what_is_false_is_named():
    proof = prove(statement("srft").load(), entropy_not_detached, points=4)
    assert {m.variable.name[0] for m in proof.mismatches} == {"h"}, "only the entropies have a gradient too many"
    assert rollouts_of_srft(World(0), World(0).sg) != 0 and prove(statement("srft").load(), demonstrations.srft).holds


def test_one_point_proves_nothing(monkeypatch):
    """Where the clip is nowhere in force, an objective without it looks the same."""
    monkeypatch.setattr(symbolic.proof, "levels_between", lambda bounds: [])
    one = {"points": 1, "shape": (((1, 1), ()),), "level": Fraction(101, 100)}
    proof = prove(statement("dr_grpo").load(), rollouts.relift, **one)
    assert not proof.mismatches and proof.one_sided and not proof.holds
    assert not prove(statement("sft").load(), demonstrations.sft, points=0).holds


# The symbolic forms are what the parts compute.


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(inner) for inner in kind.__subclasses__()))


def test_every_shipped_part_has_a_symbolic_form():
    shipped = {kind for kind in subclasses(Component) if re.match(r"upge\.(?!theory)", kind.__module__)}
    concrete = {kind for kind in shipped if not inspect.isabstract(kind) and not kind.__name__.startswith("_")}
    # A part that needs the whole vocabulary has no number for the sampled token alone.
    on_vocabulary = {kind for kind in concrete if kind.needs_vocabulary}
    bare = concrete - set(symbolic.rules._RULES) - {Precomputed, ValueLoss} - on_vocabulary
    assert len(concrete) > 35 and not bare, bare


PLAIN = upge.GroupRelative(normalize_std=False)
PAID = upge.KLPenalizedReward(upge.OutcomeReward(), 0.3, "k3")
PARTS = [
    upge.PPOClip(0.1, 0.3, dual=1.4),
    upge.PPOClip(1.0, 0.0),
    upge.SequenceClip(0.2, 0.3),
    upge.ImportanceBand(0.5, 1.5),
    upge.ImportanceBand(0.0, 1.5, of="sampler"),
    upge.AllOf((upge.PPOClip(), upge.ImportanceBand(of="sampler"))),
    upge.AllOf(()),
    upge.LogRatioClip(0.2, 0.7),
    upge.SigmoidGate(0.5, 2.0),
    upge.DivergenceClip(0.0997, 0.2003),
    upge.DivergenceClip(0.0997, 0.2003, "kl"),
    upge.OffPolicySequenceMask(0.2),
    upge.OffPolicySequenceMask(0.2, "sampler"),
    upge.SequenceSamplerBand(0.4, 1.6, "geometric"),
    upge.SequenceSamplerBand(0.1, 4.0, "product"),
    upge.ClippedBehaviorPolicy(1.1, 0.8),
    upge.ClippedBehaviorPolicy(None, None),
    upge.SamplerCorrected(upge.SequenceBehaviorPolicy(), 1.2, "sequence"),
    upge.SamplerCorrected(upge.UnitDenominator(), None),
    upge.GeometricMeanBehaviorPolicy(PLAIN, 0.1, 0.2),
    upge.ClippedReferencePolicy(0.0, 1.5),
    upge.SequenceReferencePolicy(1.0, 0.4, 3.0),
    *map(upge.MixedBehaviorPolicy, (1.0, 0.3)),
    upge.PowerLikelihood(0.5, 2.0),
    upge.PowerLikelihood(0.0, 0.0),
    *(part(0.3) for part in (upge.ShapedLikelihood, upge.ShapedRatio)),
    upge.GammaLikelihood((1.0, 0.5), (0.5, 1.0)),
    upge.GroupRelative(unbiased=False, baseline="group", epsilon=0.1),
    upge.LeaveOneOut(),
    upge.MeanNormalized(),
    upge.HighEntropy(0.4),
    *map(upge.GuidedRelative, ("alike", "plain")),
    *map(upge.OptimalTokenBaseline, ("reward", "zero")),
    upge.GroupClassification(0.7),
    upge.FutureKLShaped(PLAIN, 3.0, 0.5, 2.0, 1.5, 1.1),
    upge.FutureKLShaped(PLAIN, outlier=None, safe=None),
    upge.KLShaped(PLAIN, 0.3, "k2", towards="behavior"),
    upge.GAE(0.9, 0.8, PAID),
    upge.ReturnToGo(0.7, replace(PAID, kind="k2")),
    *(upge.Whitened(upge.ReturnToGo(0.7), 0.1, over) for over in ("tokens", "rollouts")),
    upge.PromptBaseline(),
    upge.OfReward("second", PLAIN),
    upge.Summed((PLAIN, upge.OfReward("second", upge.LeaveOneOut())), (2.0, -0.5)),
    upge.RewardDecoupled(upge.GroupRelative()),
    upge.Tempered(PLAIN, 3.0),
    upge.Shifted(PLAIN, 0.2),
    *(upge.KLShaped(PLAIN, 0.3, kind, future) for kind, future in (("k3", True), ("k2", False))),
    upge.OverlongShaped(PLAIN, 4, 0.75, 2.0),
    upge.PairwisePreference(0.7),
    upge.PassRateBetween(0.3, 0.9),
    upge.PassRateTable((0.1, 0.5, 0.8), (1.0, 0.2, 0.4)),
    upge.PassRateTable((0.1, 0.5, 0.8), (1.0, 0.2, 0.4), step=True),
    upge.ProductOf((upge.PassRateAbove(0.4), upge.EntropyWeight(0.3, 1))),
    upge.Complement(upge.Schedule(0.1, 0.9, 0.2, 3, 20)),
    *(upge.MetaGradient(), upge.NoiseBalanced(start=0.8)),
    upge.SequenceMean(tokens="sum"),
    upge.QuestionMean(tokens="sum", within="kind"),
    upge.QuestionMean(within="none"),
    *(upge.Finished(), upge.Replayed()),
    *(part(target=target) for part in (upge.LogRatio, upge.TargetProbability) for target in ("teacher", "reference")),
    *(upge.JensenShannon(0.2), upge.Surprisal()),
    upge.PrefixWeighted(upge.LogRatio(), 0.5),
    *(upge.SiblingSucceeded(only_failed=failed) for failed in (True, False)),
    upge.KLPenalty(0.1, upge.TokenMean(), "k2"),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{type(part).__name__}")
def test_a_symbolic_form_says_what_the_part_computes(part):
    """With settings that no file has, at points on both sides of its bounds."""
    values = set()
    for seed in range(10):
        world = World(seed, pairs=True)
        batch = world.batch({"mu": 0.8})
        view, ours, theirs = part.view(batch), [], None
        with torch.no_grad():
            if part.sees_advantages:
                signs = [[Rational((-1) ** (row.index + seed))] * len(row) for row in world.rows]
                ours = symbolic.evaluate(part, world, signs)
                column = torch.tensor([[float(row[0])] for row in signs], dtype=torch.float64)
                theirs = part(view, column.expand(batch.response_mask.shape))
            elif isinstance(part, Reduction):
                counted = [row for row in world.rows if row.index % 3]
                ours = symbolic.evaluate(part, world, counted)
                theirs = part(view, torch.tensor([row in counted for row in world.rows]))
            else:
                ours, theirs = symbolic.evaluate(part, world), part(view)
        if isinstance(part, (upge.components.ReferenceDenominator, upge.components.LikelihoodGradient)):
            theirs = theirs.exp()
        for row in world.rows:
            for t in range(len(row)):
                one = ours[row.index] if theirs.ndim == 1 else ours[row.index][t]
                other = float(theirs[row.index] if theirs.ndim == 1 else theirs[row.index, t])
                values.add(round(other, 9))
                assert world.value(one) == pytest.approx(other, rel=1e-12, abs=1e-12)
    constant = isinstance(part, upge.StatefulGate | upge.Complement) or part in (
        upge.AllOf(()),
        upge.PowerLikelihood(0.0, 0.0),
    )
    assert constant or len(values) > 1, "the points must tell the part's cases apart"
    assert has_rule(part)


@dataclass(frozen=True)
class Halved(StabilizationMask):
    """A part of a user's own: ½ everywhere."""

    reads = frozenset()

    def __call__(self, batch, advantages):
        return torch.full_like(advantages, 0.5)


def test_a_part_of_ones_own_needs_a_rule_and_a_true_one(monkeypatch):
    algorithm = statement("sft").load()
    term = algorithm.terms["sft"]
    halved = replace(algorithm, terms={"sft": replace(term, estimator=replace(term.estimator, mask=Halved()))})
    with pytest.raises(upge.ConfigError, match=r"Halved: no symbolic form .*rule\(Halved\)"):
        prove(halved, demonstrations.sft)
    monkeypatch.setattr(symbolic.rules, "_RULES", dict(symbolic.rules._RULES))
    symbolic.rule(Halved)(lambda part, world, advantages: symbolic.per_token(world, lambda row, t: Rational(1, 2)))
    assert prove(halved, lambda w: demonstrations.sft(w) / 2).holds
    assert prove(halved, demonstrations.sft).mismatches
    symbolic.rule(Halved)(lambda part, world, advantages: symbolic.per_token(world, lambda row, t: 1))
    proof = prove(halved, demonstrations.sft)
    assert not proof.mismatches and proof.rounding > 0.1 and not proof.holds, "the rule is not the part"
