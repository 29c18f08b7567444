"""Seconds of training until the tiny model solves a share of the arithmetic problems: ours against TRL's GRPOTrainer.

All trainers of a seed start from the same weights and alternate in chunks of steps, each in its own process. After a
chunk its weights are evaluated, which does not count as training time: with the same sampler, problems, seeds and
verifier for all.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from experiments.bench.measure import Ending, Spread, cpu_seconds, in_rounds, rotated
from experiments.bench.trainers import EPSILON, OURS, PLAIN, TRL, Child, Start, check
from experiments.grid import markdown_table
from upge import config
from upge.errors import ConfigError, nearest

SUMMARY = "seconds of training until a target accuracy: hpt, grpo and sft against TRL's GRPOTrainer"
WITH_PEERS = True
GOAL = 3.0
PEER = "TRL's GRPO"
BY = {"mean": "the mean over samples", "greedy": "greedy", "pass": "at least one sample right"}


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    target: float = config.key(0.5, "share of right answers at which a trainer stops", above=0, below=1)
    by: str = config.key("mean", "which share: mean (of samples), greedy, or pass (at least one sample right)")
    every: int = config.key(5, "evaluate every N steps", minimum=1, limit=10**6)
    steps: int = config.key(100, "maximum number of steps of a trainer", minimum=1, limit=10**6)
    seeds: int = config.key(5, "number of runs of each trainer, with seeds from 0", minimum=1, limit=1000)
    algorithms: str = config.key("hpt,grpo,sft", "our algorithms to measure")
    prompts: int = config.key(16, "prompts of a step", minimum=1, limit=4096)
    group: int = config.key(8, "responses to each prompt", minimum=1, limit=4096)
    problems: int = config.key(128, "problems of an evaluation", minimum=1, limit=10**6)
    samples: int = config.key(4, "samples of each problem", minimum=1, limit=4096)
    trl: str = config.key("generate", "how TRL samples: generate, continuous or vllm-patched (with fixed weight sync)")
    trl_lr: float = config.key(0.0, "TRL's learning rate; 0 = ours", minimum=0)
    batch: int = config.key(32, "rows of TRL's micro-batches", minimum=1, limit=10**6)
    threads: int = config.key(1, "OpenMP threads of each trainer", minimum=1, limit=1024)


@dataclass
class Run:
    """The run of a trainer with one seed.

    Attributes:
        child: the trainer.
        steps, seconds, cpu: steps, seconds and CPU seconds of training so far.
        accuracies: the accuracies of the last evaluation.
    """

    child: Child
    steps: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    accuracies: dict[str, float] = field(default_factory=dict)

    def advance(self, settings: Settings) -> bool:
        """Train a chunk and evaluate; return True if the run is finished."""
        count = min(settings.every, settings.steps - self.steps)
        began = cpu_seconds()
        self.seconds += self.child.ask("steps", count=count)["seconds"]
        self.cpu += cpu_seconds() - began
        self.steps += count
        self.accuracies = self.child.ask("evaluate")
        return self.reached(settings) or self.steps >= settings.steps

    def reached(self, settings: Settings) -> bool:
        """Whether the last evaluation reached the target."""
        return self.accuracies[settings.by] >= settings.target


def run(settings: Settings, start: Start = Child) -> str:
    """A Markdown table, and whether the goal was reached."""
    names = _names(settings)
    names_of_all = (*names, PEER)
    races, signal = in_rounds(
        lambda seed: race(seed, names, settings, start),
        settings.seeds,
        lambda runs: ", ".join(f"{name} {runs[name].seconds:.3g} s" for name in names_of_all),
        "seeds",
    )
    header = [
        *("trainer", "reached", "seconds of training", "CPU seconds", "steps"),
        *("accuracy then", "greedy", f"pass@{settings.samples}", f"sooner than {PEER} by"),
    ]
    rows = [_row(name, races, settings) for name in names_of_all]
    return Ending(signal).finished("\n".join([markdown_table(header, rows), "", *_remarks(names, races, settings)]))


def _names(settings: Settings) -> list[str]:
    """The names of our algorithms; raises ConfigError for invalid settings."""
    names = [name.strip() for name in settings.algorithms.split(",") if name.strip()]
    if not names:
        raise ConfigError("algorithms: empty; give names such as hpt,grpo,sft")
    if settings.by not in BY:
        raise ConfigError(f"by: found '{settings.by}'; {nearest(settings.by, BY)}")
    check([settings.trl], settings.prompts * settings.group, settings.batch, "batch")
    return names


def race(seed: int, names: list[str], settings: Settings, start: Start = Child) -> dict[str, Run]:
    """Run all trainers with one seed, alternating in chunks, until each reaches the target or its last step."""
    common = (
        *("model=tiny", "data=arithmetic", f"seed={seed}", f"steps={settings.steps}", *PLAIN),
        *(f"prompts_per_step={settings.prompts}", f"group_size={settings.group}"),
        *(f"data.evaluation_size={settings.problems}", f"eval.samples={settings.samples}"),
    )
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder, runs = Path(place), {}
        for name in names:
            job = {"arguments": [f"algo={name}", *common, f"output={folder / name}"], "checksum": False}
            runs[name] = Run(stack.enter_context(start(name, OURS, job, folder, settings.threads)))
        job = {"arguments": ["algo=grpo", EPSILON, *common, f"output={folder / 'trl'}"], "engine": settings.trl}
        job |= {"batch": settings.batch, "lr": settings.trl_lr, "checksum": False}
        runs[PEER] = Run(stack.enter_context(start("trl", TRL, job, folder, settings.threads)))
        for run in runs.values():
            run.child.answer()
            run.accuracies = run.child.ask("evaluate")
        if len({tuple(sorted(run.accuracies.items())) for run in runs.values()}) > 1:
            raise AssertionError(f"before training the accuracies differ: {[c.accuracies for c in runs.values()]}")
        if runs[PEER].reached(settings):
            raise ConfigError(f"target: the model reaches {settings.target} before training; give a higher one")
        running, number = list(runs), 0
        while running:
            for name in rotated(running, number):
                if runs[name].advance(settings):
                    runs[name].child.close()
                    running.remove(name)
            number += 1
    return runs


def _times(name: str, races: list[dict[str, Run]], settings: Settings) -> Spread:
    """The seconds of the peer over those of a trainer; 0 where the trainer did not reach the target.

    If the peer did not reach it, its last step counts, so the ratio is a lower bound.
    """
    return Spread.of(runs[PEER].seconds / runs[name].seconds if runs[name].reached(settings) else 0.0 for runs in races)


def _row(name: str, races: list[dict[str, Run]], settings: Settings) -> list[object]:
    runs = [one[name] for one in races]
    return [
        *(name if name == PEER else f"`{name}`", f"{sum(run.reached(settings) for run in runs)} of {len(runs)}"),
        *(Spread.of(getattr(run, key) for run in runs) for key in ("seconds", "cpu", "steps")),
        *(Spread.of(100 * run.accuracies[key] for run in runs) for key in ("mean", "greedy", "pass")),
        "1" if name == PEER else _times(name, races, settings),
    ]


def _remarks(names: list[str], races: list[dict[str, Run]], settings: Settings) -> list[str]:
    rate = f"its learning rate {settings.trl_lr:g}" if settings.trl_lr else "the same learning rate"
    seeds = "seed" if len(races) == 1 else "seeds"
    lines = [
        f"Median and range of {len(races)} {seeds}; target {settings.target:.0%} of {settings.problems} problems, "
        f"{BY[settings.by]}, {settings.samples} samples, evaluated every {settings.every} steps, at most "
        f"{settings.steps} steps of {settings.prompts} prompts with {settings.group} responses; {settings.threads} "
        f"OpenMP threads. TRL samples with `{settings.trl}`, has micro-batches of {settings.batch} rows and {rate}. "
        "Accuracies in %. If a trainer did not reach the target, its seconds are those at its last step, and it is "
        "sooner by 0.",
    ]
    missing = sum(not runs[PEER].reached(settings) for runs in races)
    if missing:
        lines += ["", f"{PEER} did not reach the target in {missing} of {len(races)} races: there the ratio is a lower "
                  "bound."]  # fmt: skip
    if "hpt" in names:
        times = _times("hpt", races, settings).median
        verdict = "reached" if times >= GOAL else "not reached"
        lines += ["", f"Goal: `hpt` at least {GOAL:g} times sooner than {PEER}; {verdict}, {times:.3g} times."]
    return lines
