"""The output head for terms that move other tokens than the sampled one, against the head for the sampled token.

Each head solves the same problem of N tokens with the same chunks: on the whole vocabulary the gradient of the entropy,
and of the reverse KL to a teacher; on the 32 likeliest tokens the same KL. A teacher's logits take a matrix product of
their own, which is measured apart. Memory is measured in fresh processes as in the bench `head`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

import upge
from experiments.bench.heads import Head, Problem, one_pass
from experiments.bench.measure import Spread, Timing, in_fresh_process, interleaved, peak, until_signal, verdict
from experiments.grid import markdown_table
from upge import config
from upge.algorithm import Algorithm
from upge.logprobs import Output, default_chunk_size, token_loss
from upge.support import Support
from upge.train.micro_batches import MicroBatch
from upge.train.packing import pack

SUMMARY = "the output head for coefficients of many tokens of the vocabulary, against that for the sampled token"
WITH_PEERS = False
SAMPLED, PRODUCT = "sampled token", "the teacher's product"
MOST_TIME = 1.6
"""Goal: time relative to the head for the sampled token, without the teacher's matrix product."""


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    tokens: int = config.key(
        512, "N of the time measurement; memory is measured with N and with 4 N", minimum=1, limit=10**6
    )
    width: int = config.key(896, "D of both models", minimum=1, limit=10**5)
    vocabulary: int = config.key(151936, "V", minimum=33, limit=10**7)
    dtype: Literal["float32", "bfloat16"] = config.key("float32", "of the weights and states")
    rounds: int = config.key(5, "rounds of the time measurement", minimum=5, limit=1000)
    threads: int = config.key(0, "threads of torch; 0 = torch's default", minimum=0, limit=1024)


def on_support(advantage: upge.AdvantageEstimator, support: Support, with_teacher: bool) -> Head:
    """A head that solves the problem for a term on a support; the weights of the tokens are those of their mean."""
    estimator = upge.UnifiedGradient(upge.NoMask(), upge.UnitDenominator(), advantage)
    term = upge.Term("rollouts", upge.ConstantGate(), estimator, upge.TokenMean(), 1.0, support)
    algorithm = Algorithm("bench", {"term": term})

    def head(problem: Problem) -> None:
        targets = problem.targets.tolist()
        batch = upge.Trajectories(
            logprobs=None,
            response_mask=torch.ones(1, len(targets), dtype=torch.bool),
            rewards=torch.ones(1),
            group=torch.zeros(1, dtype=torch.long),
            is_demonstration=torch.zeros(1, dtype=torch.bool),
        )
        plan, micro_batch = algorithm.plan(batch), MicroBatch(batch, [0], pack([([0], targets)]))
        objective = micro_batch.objective(algorithm, lambda view, places: [(1.0, plan.estimate_in_head(view, places))])
        # Another model of the same width; its weights are the policy's in reverse.
        others = {"teacher": Output(problem.hidden.detach().flip(1), problem.weight.detach())} if with_teacher else {}
        given = objective._replace(others=others)._asdict()
        loss, *_ = token_loss(problem.hidden, problem.weight, problem.targets, **given)
        loss.backward()

    return head  # pyright: ignore[reportReturnType] - what a head returns is not read here


HEADS: dict[str, Head] = {
    SAMPLED: one_pass,
    "entropy, whole vocabulary": on_support(upge.Surprisal(), upge.FullVocabulary(), with_teacher=False),
    "reverse KL, whole vocabulary": on_support(upge.LogRatio(), upge.FullVocabulary(), with_teacher=True),
    "reverse KL, top 32": on_support(upge.LogRatio(), upge.TopK(32), with_teacher=True),
}
WITH_TEACHER = frozenset({"reverse KL, whole vocabulary", "reverse KL, top 32"})


def teacher_product(problem: Problem) -> None:
    """The teacher's logits, chunk by chunk into one buffer, as the head computes them."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    size = min(len(hidden), default_chunk_size(len(weight), hidden.device.type, weight.dtype))
    out = weight.new_empty(size, len(weight))
    for chunk in hidden.split(size):
        torch.mm(chunk, weight.t(), out=out[: len(chunk)])


def run(settings: Settings) -> str:
    """Markdown tables of time and memory, and whether the goal was reached."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    memory: list[list[object]] = []
    with until_signal() as ending:
        timing = _timed(settings)
        timing.check()
        for name in HEADS:
            taken = []
            for factor in (1, 4):
                taken_here, signal = in_fresh_process(_memory, settings, factor, name)
                if signal is not None:
                    raise signal
                taken.append(f"{taken_here / 2**20:,.0f}")
            memory.append([name, *taken])
    about = (
        f"Median and range of {settings.rounds} rounds; N = {settings.tokens}, D = {settings.width}, V = "
        f"{settings.vocabulary:,}, {settings.dtype}, {torch.get_num_threads()} threads. Memory: the peak resident "
        "memory of a fresh process during the head, minus the memory before and the two gradients."
    )
    header = ["head", "seconds", "times the sampled token's", "the same by CPU", "without the teacher's product"]
    rows, goals = _rows(timing)
    sizes = ["head", f"MiB at N = {settings.tokens}", f"MiB at N = {4 * settings.tokens}"]
    lines = [markdown_table(header, rows), "", about, "", *goals, "", markdown_table(sizes, memory)]
    return ending.finished("\n".join(lines))


def _timed(settings: Settings) -> Timing:
    problem = Problem.made(settings.tokens, settings.vocabulary, settings.width, settings.dtype)

    def call(head: Callable[[Problem], object]) -> Callable[[int], None]:
        def turn(number: int) -> None:
            head(problem)
            problem.clear()

        turn(0)  # the first call compiles and loads
        return turn

    calls = {name: call(head) for name, head in HEADS.items()} | {PRODUCT: call(teacher_product)}
    return interleaved(calls, settings.rounds)


def _rows(timing: Timing) -> tuple[list[list[object]], list[str]]:
    rows: list[list[object]] = []
    goals: list[str] = []
    product = timing.seconds[PRODUCT]
    for name, seconds in timing.seconds.items():
        apart = ""
        if name in HEADS and name != SAMPLED:
            own = [a - b if name in WITH_TEACHER else a for a, b in zip(seconds, product, strict=True)]
            times = Spread.ratio(own, timing.seconds[SAMPLED])
            apart = f"{times} ×"
            goals.append(
                f"- {name}: goal at most {MOST_TIME} times the sampled token's: {times.median:.2f}, "
                f"{verdict(times.median <= MOST_TIME)}."
            )
        rows.append([name, Spread.of(seconds), *timing.against(SAMPLED, name), apart])
    return rows, goals


def _memory(settings: Settings, factor: int, name: str) -> int:
    """The peak bytes of a head beyond inputs, weight and their gradients; runs in a separate process."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    tokens = factor * settings.tokens
    problem = Problem.made(tokens, settings.vocabulary, settings.width, settings.dtype)
    HEADS[name](problem.small())
    problem.clear()
    taken = peak(lambda: HEADS[name](problem))
    assert problem.hidden.grad is not None and problem.weight.grad is not None
    return taken - problem.hidden.grad.nbytes - problem.weight.grad.nbytes
