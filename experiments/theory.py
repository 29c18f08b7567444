"""Exact expectations of every algorithm's gradient: `python -m experiments.theory` prints the tables.

`--docs` updates the tables in docs/theory.md. Nothing is sampled, so they are the same everywhere; this takes about
half a minute.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence

import torch
from omegaconf import OmegaConf

import algorithms
import upge
from experiments import cli, files
from upge.errors import ConfigError
from upge.theory.enumerate import (
    Setting,
    SoftmaxPolicy,
    bias_table,
    exact_values,
    expectation,
    forward_kl_gradient,
    reverse_kl_gradient,
)
from upge.theory.objectives import comparison, objectives

STEPS, ROLLOUTS = 2, 3
#: The prompts and the group sizes of the table of objectives.
PROMPT_RATES, GROUP_SIZES = (1 / 8, 1 / 2, 7 / 8), (2, 4, 8)
_PASS_RATES = (0.05, 0.25, 0.5, 0.75, 0.95)
#: Numbers below this are rounding errors.
_ROUNDING = 1e-10


def load(name: str, corrections: Sequence[str] = (), length: int = STEPS) -> upge.Algorithm | upge.Pipeline:
    """The algorithm as in a run whose responses have at most `length` tokens."""
    tree = OmegaConf.create({"algo": algorithms.read(name, corrections), "rollout": {"max_response_tokens": length}})
    return algorithms.compose(tree.algo, name)


def shipped(length: int = STEPS) -> list[upge.Algorithm]:
    """Every algorithm that has a file, except pipelines and algorithms with guided or replayed rollouts."""
    loaded = [load(name, length=length) for name in algorithms.names()]
    plain = [one for one in loaded if isinstance(one, upge.Algorithm)]
    return [one for one in plain if one.guidance is None and one.replay is None]


def reward(tokens: tuple[int, ...]) -> float:
    """1 if the tokens add up to a multiple of three, which one short response and two long ones do, else 0."""
    return float(sum(tokens) % 3 == 0)


def setting(off_policy: bool = False) -> Setting:
    """Seven responses of up to two tokens, and all other policies and values that an algorithm may read.

    The expert is always right, and the critic is inaccurate.
    """
    policy = SoftmaxPolicy.random(3, STEPS, seed=7, scale=0.7)
    values = exact_values(policy, reward)
    return Setting(
        policy,
        reward,
        behavior=policy.moved(0.5, seed=3) if off_policy else None,
        expert=SoftmaxPolicy.random(3, STEPS, seed=9).conditioned(Setting(policy, reward).reward),
        reference=policy.moved(0.5, seed=2),
        teacher=policy.moved(0.8, seed=5),
        values=values + torch.tensor([0.2, -0.2, 0.1], dtype=torch.float64),
    )


def number(value: float) -> str:
    """A number with three significant digits; rounding errors become 0."""
    return "0" if abs(value) < _ROUNDING else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summed(algorithm: upge.Algorithm) -> upge.Algorithm:
    """The algorithm without division by lengths: tokens are summed, trajectories averaged."""
    terms = dict(algorithm.terms)
    for name, term in terms.items():
        terms[name] = dataclasses.replace(term, reduction=upge.SequenceMean(tokens="sum", over=term.reduction.over))
    return dataclasses.replace(algorithm, terms=terms)


def biases(off_policy: bool) -> str:
    """A Markdown table of all algorithms, or, with rollouts of another policy, of those that use only rollouts."""
    chosen = [a for a in shipped() if not off_policy or (a.needs.rollouts and not a.needs.demonstrations)]
    made = setting(off_policy)
    without = bias_table(map(summed, chosen), made, group_size=ROLLOUTS)
    rows = []
    for row, plain in zip(bias_table(chosen, made, group_size=ROLLOUTS), without, strict=True):
        coefficients = [number(row.coefficients[n]) if n in row.coefficients else "" for n in ("reward", "imitation")]
        accepted = "" if row.accepted > 1 - _ROUNDING else number(row.accepted)
        numbers = map(number, (row.remainder, plain.remainder, row.cosine, row.snr))
        rows.append([f"`{row.name}`", *coefficients, *numbers, accepted])
    header = ["algorithm", "∇E[R]", "−∇KL(π_β‖π)", "neither", "tokens summed", "cosine", "snr", "kept"]
    return _table(header, rows)


def prompt_weights(group_size: int = 8) -> str:
    """A Markdown table: the coefficient of ∇P for a prompt with pass rate P, relative to that with P = 1/2."""
    rows = []
    for algorithm in (a for a in shipped(length=1) if not (a.needs.demonstrations or a.needs.teacher)):
        coefficients = []
        for rate in _PASS_RATES:
            policy = SoftmaxPolicy(torch.tensor([[1 - rate, rate]], dtype=torch.float64).log(), 1, end=None)
            right = torch.tensor([0.0, 1.0], dtype=torch.float64)
            values = torch.full((1,), 0.5, dtype=torch.float64)
            made = Setting(policy, right, reference=policy, values=values)
            (row,) = bias_table([algorithm], made, group_size=group_size)
            coefficients.append(row.coefficients["reward"])
        rows.append([f"`{algorithm.name}`", *(f"{c / coefficients[2]:.2f}" for c in coefficients)])
    return _table(["algorithm", *(f"P = {rate:g}" for rate in _PASS_RATES)], rows)


def prompt(pass_rate: float, seed: int) -> Setting:
    """Three responses of one token, the first of which is right, with other policies that differ by `seed`."""
    right = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    wrong = SoftmaxPolicy.random(3, 1, seed=seed, end=None).conditioned(1 - right).probabilities
    policy = SoftmaxPolicy((pass_rate * right + (1 - pass_rate) * wrong).log()[None], 1, end=None)
    return Setting(
        policy,
        right,
        expert=policy.moved(1.0, seed=seed + 10),
        reference=policy.moved(0.5, seed=seed + 20),
        teacher=policy.moved(0.8, seed=seed + 30),
        values=exact_values(policy, right) + 0.1,
    )


def climbed() -> str:
    """A Markdown table: the bias of every algorithm against each objective, for three group sizes."""
    prompts = [prompt(rate, seed) for seed, rate in enumerate(PROMPT_RATES)]
    names = list(objectives(prompts[0], min(GROUP_SIZES)))
    rows = []
    for algorithm in shipped(length=1):
        cases = [comparison(algorithm, prompts, group_size=n) for n in GROUP_SIZES]
        asked = {"ν": algorithm.needs.teacher, "π_β": algorithm.needs.demonstrations}
        shown = {n: all(is_asked for policy, is_asked in asked.items() if policy in n) for n in names}
        cells = [" / ".join(number(case[n].bias) for case in cases) if shown[n] else "" for n in names]
        scales = [max((case[n] for n in names), key=lambda one: one.cosine).scale for case in cases]
        rows.append([f"`{algorithm.name}`", *cells, " / ".join(map(number, scales))])
    return _table(["algorithm", *(n.replace("−KL", "−∇KL") if "KL" in n else f"∇ {n}" for n in names), "scale"], rows)


def penalty(kind: str, place: str) -> upge.Algorithm:
    """Only a KL penalty with coefficient 1: in the loss, in the reward of its token, or in all rewards from it on."""
    advantage: upge.AdvantageEstimator = upge.ConstantAdvantage(value=0.0)
    if place != "loss":
        advantage = upge.KLShaped(advantage, coefficient=1.0, kind=kind, future=place == "reward, and all later ones")
    summed = upge.SequenceMean(tokens="sum")
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.CurrentPolicy(), advantage)
    term = upge.Term(source="rollouts", gate=upge.ConstantGate(), estimator=estimator, reduction=summed)
    extra = {"kl": upge.KLPenalty(coefficient=1.0, reduction=summed, kind=kind)} if place == "loss" else {}
    return upge.Algorithm(name=f"{kind} in the {place}", terms={"kl": term}, regularizers=extra)


def penalties() -> str:
    """A Markdown table: the distance of each KL penalty's expected gradient from those of the two KL divergences."""
    cases = []
    for steps, off_policy in ((1, False), (STEPS, False), (1, True), (STEPS, True)):
        policy = SoftmaxPolicy.random(3 if steps > 1 else 7, steps, seed=7, scale=0.7)
        behavior = policy.moved(0.5, seed=3) if off_policy else None
        cases.append(Setting(policy, lambda tokens: 0.0, behavior=behavior, reference=policy.moved(0.5, seed=2)))
    rows = []
    for kind in ("k1", "k2", "k3"):
        for place in ("loss", "reward of its token", "reward, and all later ones"):
            cells = []
            for case in cases:
                for gradient in (reverse_kl_gradient, forward_kl_gradient):
                    target = -gradient(case.policy, case.reference)
                    report = expectation(penalty(kind, place), case, group_size=1, target=target)
                    cells.append(number(report.relative_bias))
            rows.append([kind, place, *(f"{a} / {b}" for a, b in zip(cells[::2], cells[1::2], strict=True))])
    return _table(["", "in the", "1 step", f"{STEPS} steps", "1 step, off-policy", f"{STEPS} steps, off-policy"], rows)


def mismatches(base: str = "rloo", samplers: int = 4) -> str:
    """A Markdown table: the bias of an unbiased algorithm if the sampler's policy differs from the trainer's.

    The other rows show the remaining bias with each correction that compares the two policies. Biases are means over
    `samplers` policies of the sampler.
    """
    spaces = {1: (7, 1, 0), 2: (3, 2, 0), 3: (2, 3, None)}
    cases = []
    for scale in (0.05, 0.5):
        for vocabulary, steps, end in spaces.values():
            policy = SoftmaxPolicy.random(vocabulary, steps, seed=7, end=end, scale=0.7)
            cases.append([Setting(policy, reward, sampler=policy.moved(scale, seed=s)) for s in range(samplers)])
    compared = {"none": load(base)}
    for name in algorithms.corrections():
        try:
            algorithm = load(base, [name])
        except ConfigError:  # does not apply to this algorithm, for example because it has no clip
            continue
        if "sampler_logprobs" in algorithm.needs.columns:
            compared[f"`{name}`"] = algorithm
    rows = []
    for name, algorithm in compared.items():
        biases = [[expectation(algorithm, one, group_size=2).relative_bias for one in case] for case in cases]
        rows.append([name, *(number(sum(case_biases) / samplers) for case_biases in biases)])
    header = [f"{far}, {steps} step{'s' * (steps > 1)}" for far in ("near", "far") for steps in spaces]
    return _table(["correction", *header], rows)


TABLES = files.Tables(
    files.DOCS / "theory.md",
    "###",
    {
        "On-policy": lambda: biases(off_policy=False),
        "Rollouts of another policy": lambda: biases(off_policy=True),
        "The weight of a prompt, by its pass rate": prompt_weights,
        "Which objective an estimator climbs": climbed,
        "KL to a reference policy": penalties,
        "Rollouts of another engine": mismatches,
    },
    "<!-- expectation: begin (python -m experiments.theory --docs) -->",
    "<!-- expectation: end -->",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or update the docs; return the exit code, 2 on bad input."""
    return cli.run_command(TABLES.command, arguments, lambda everything: str(__doc__))


if __name__ == "__main__":
    sys.exit(main())
