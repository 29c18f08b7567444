"""A whole training step, from sampling to refreshed weights: `experiments.run`'s trainer against TRL's GRPOTrainer.

Both train GRPO in processes of their own, with the same prompts in the same order, group size, sampling, verdicts and
AdamW, and alternate step by step. Before that both make one step on the same responses and rewards, sampled by ours,
and must compute the same gradient. The result is trained tokens per second: the tokens of all responses of a step,
whether their group has a signal or not, divided by the seconds of the whole step.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.bench.measure import Spread, Timing, interleaved, until_signal
from experiments.bench.trainers import ENGINES, EPSILON, OURS, PLAIN, TRL, Child, ChildError, Start, check
from experiments.grid import markdown_table
from upge import config
from upge.errors import ConfigError

SUMMARY = "whole training steps: trained tokens per second against TRL's GRPOTrainer, same gradient asserted"
WITH_PEERS = True
GOAL = 3.0
#: The most by which gradients of the same responses may differ, as a share of the gradient's norm.
TOLERANCE = 1e-3
US = "this project"


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    folder: str = config.key(
        "", "folder with gsm8k/train.jsonl, for SmolLM2-135M on GSM8K; empty = only the tiny model on arithmetic"
    )
    tiny: bool = config.key(True, "measure the tiny model")
    pairs: int = config.key(5, "timed steps of each trainer, at least five", minimum=0, limit=1000)
    warmup: int = config.key(
        1, "steps of each trainer before these, besides the step whose gradients are compared", minimum=1, limit=1000
    )
    prompts: int = config.key(32, "for the tiny model, prompts of a step", minimum=1, limit=4096)
    batch: int = config.key(32, "for the tiny model, rows of TRL's micro-batches", minimum=1, limit=10**6)
    real_prompts: int = config.key(2, "for SmolLM2-135M, prompts of a step", minimum=1, limit=4096)
    real_batch: int = config.key(8, "for SmolLM2-135M, rows of TRL's micro-batches", minimum=1, limit=10**6)
    real_tokens: int = config.key(256, "for SmolLM2-135M, tokens of its longest response", minimum=1, limit=10**6)
    group: int = config.key(8, "responses to a prompt", minimum=1, limit=4096)
    trl: str = config.key(
        "generate,vllm,vllm-patched",
        "TRL's ways to sample: generate, continuous, vllm, vllm-patched (with fixed weight sync)",
    )
    checksum: bool = config.key(
        False, "rewards in all steps are a checksum of the text, so that nearly every group has a signal"
    )
    threads: int = config.key(
        0,
        "OpenMP threads of each trainer; 0 = one for the tiny model, every core for SmolLM2-135M",
        minimum=0,
        limit=1024,
    )


@dataclass(frozen=True)
class Case:
    """A model and a data set, as keys of a run, and how both trainers run them."""

    name: str
    arguments: tuple[str, ...]
    prompts: int
    batch: int
    threads: int


@dataclass
class Outcome:
    """The results of a case.

    Attributes:
        timing: the timing of the trainers that ran, ours first; its results are the metrics of their steps.
        failed: trainer that failed → error.
        gaps: peer → difference of its gradient from ours, as a share of its norm.
    """

    timing: Timing
    failed: dict[str, str] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)


def run(settings: Settings, start: Start = Child) -> str:
    """A Markdown table of all cases, and sentences on the checks and goals."""
    cases = _cases(settings)
    engines = [engine.strip() for engine in settings.trl.split(",") if engine.strip()]
    for case in cases:
        key = "batch" if case is cases[0] and settings.tiny else "real_batch"
        check(engines, case.prompts * settings.group, case.batch, key)
    header = [
        *("case", "trainer", "trained tokens per second", f"{US} is faster by", "seconds a step"),
        *("of these sampling", "verdicts", "refresh", "update and the rest", "CPU seconds a step", "peak GiB"),
    ]
    rows, remarks = [], []
    with until_signal() as ending:
        for case in cases:
            outcome = measure(case, engines, settings, start)
            rows += [_row(case, name, outcome) for name in outcome.timing.seconds]
            remarks += _remarks(case, outcome, settings)
            outcome.timing.check()
    return ending.finished("\n".join([markdown_table(header, rows), "", *remarks]))


def _cases(settings: Settings) -> list[Case]:
    sizes = (f"group_size={settings.group}", "algo=grpo", EPSILON, *PLAIN)
    cases = []
    if settings.tiny:
        arguments = ("model=tiny", "data=arithmetic", f"prompts_per_step={settings.prompts}", *sizes)
        cases.append(Case("tiny, arithmetic", arguments, settings.prompts, settings.batch, settings.threads or 1))
    if settings.folder:
        data = Path(settings.folder).expanduser().resolve() / "gsm8k"
        if not (data / "train.jsonl").is_file():
            raise ConfigError(f"folder: there is no file '{data / 'train.jsonl'}'; give the folder that holds it")
        arguments = (
            *("model=smollm2-135m", "data=gsm8k", f"data.path={data}", "data.evaluation_size=1"),
            *(f"prompts_per_step={settings.real_prompts}", f"rollout.max_response_tokens={settings.real_tokens}"),
        )
        sizes_of_step = (settings.real_prompts, settings.real_batch, settings.threads or len(os.sched_getaffinity(0)))
        cases.append(Case("SmolLM2-135M, GSM8K", (*arguments, *sizes), *sizes_of_step))
    if not cases:
        raise ConfigError("tiny=false without a folder leaves nothing to measure; give folder=DIR with gsm8k/ in it")
    return cases


def measure(case: Case, engines: list[str], settings: Settings, start: Start = Child) -> Outcome:
    """Start the trainers of a case one after the other, compare their gradients, and time alternating steps."""
    steps = f"steps={1 + settings.warmup + settings.pairs}"
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        job: dict[str, Any] = {"arguments": [*case.arguments, steps, f"output={folder / 'ours'}"]}
        job["checksum"] = settings.checksum
        ours = stack.enter_context(start("ours", OURS, job, folder, case.threads))
        ours.answer()
        gradient = str(folder / "gradient.pt")
        sampled = ours.ask("compare", gradient=gradient)
        trainers, failed, gaps = {US: ours}, {}, {}
        for engine in engines:
            name = ENGINES[engine]
            job |= {"arguments": [*case.arguments, steps, f"output={folder / engine}"]}
            peer = start(engine, TRL, {**job, "engine": engine, "batch": case.batch, "lr": 0.0}, folder, case.threads)
            stack.enter_context(peer)
            try:
                peer.answer()
                same = {key: sampled[key] for key in ("prompts", "responses")}
                gaps[name] = _checked(sampled, peer.ask("compare", gradient=gradient, **same), name)
                peer.ask("steps", count=settings.warmup)
                trainers[name] = peer
            except ChildError as error:
                failed[name] = str(error)
                gaps.pop(name, None)
                peer.close()
        if len(trainers) == 1:
            raise ChildError(f"{case.name}: TRL does not run in any of the ways {', '.join(engines)}: {failed}")
        ours.ask("steps", count=settings.warmup)
        steps_of = {name: lambda number, child=child: child.ask("steps", count=1) for name, child in trainers.items()}
        return Outcome(interleaved(steps_of, settings.pairs, label=case.name), failed, gaps)


def _checked(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> float:
    """The relative difference of the two gradients.

    Raises:
        AssertionError: the rewards or the gradients differ, or our gradient is zero.
    """
    if abs(ours["reward"] - theirs["reward"]) > 1e-6:
        raise AssertionError(f"{name} got other rewards: mean {theirs['reward']} instead of {ours['reward']}")
    if not (ours["norm"] > 0 and theirs["difference"] <= TOLERANCE):
        raise AssertionError(
            f"{name} computes another gradient on the same responses: off by {theirs['difference']:.1e} of its norm "
            f"{theirs['norm']:.3g}, ours has norm {ours['norm']:.3g}"
        )
    return theirs["difference"]


def _rates(timing: Timing, name: str) -> list[float]:
    pairs = zip(timing.results[name], timing.seconds[name], strict=True)
    return [figures["tokens"] / seconds for figures, seconds in pairs]


def _times(timing: Timing, name: str) -> Spread:
    """Our tokens per second over those of a peer, round by round."""
    return Spread.ratio(_rates(timing, US), _rates(timing, name))


def _row(case: Case, name: str, outcome: Outcome) -> list[object]:
    timing = outcome.timing
    figures, seconds = timing.results[name], timing.seconds[name]
    parts = [[one[part] for one in figures] for part in ("rollout", "verify", "refresh")]
    rest = [whole - sum(some) for whole, *some in zip(seconds, *parts, strict=True)]
    return [
        *(case.name, name, Spread.of(_rates(timing, name)), "1" if name == US else _times(timing, name)),
        *(Spread.of(seconds), *(f"{Spread.of(values).median:.3f}" for values in (*parts, rest))),
        *(Spread.of(timing.cpu[name]), f"{max(one['rss'] for one in figures):.1f}"),
    ]


def _remarks(case: Case, outcome: Outcome, settings: Settings) -> list[str]:
    timing = outcome.timing
    no_signal = Spread.of(one["no_signal"] for one in timing.results[US]).median
    rewards = "; rewards by checksum" if settings.checksum else ""
    gaps = ", ".join(f"{gap:.1e} ({name})" for name, gap in outcome.gaps.items())
    lines = [
        f"{case.name}: median and range of {settings.pairs} steps of each, of {case.prompts} prompts with "
        f"{settings.group} responses, {case.threads} OpenMP threads{rewards}; TRL's micro-batches have {case.batch} "
        f"rows. Of our groups {no_signal:.0%} had no signal (median). Gradients of the same responses and rewards "
        f"differ by {gaps} of their norm.",
    ]
    for name in list(timing.seconds)[1:]:
        times = _times(timing, name).median
        verdict = "reached" if times >= GOAL else "not reached"
        lines += ["", f"Goal for {case.name} against {name}: at least {GOAL:g} times; {verdict}, {times:.3g} times."]
    for name, error in outcome.failed.items():
        lines += ["", f"{name} does not run here on {case.name}: `{error}`"]
    return [*lines, ""]
