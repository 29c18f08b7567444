"""Seconds of training until the tiny model solves a share of the arithmetic problems: ours against TRL's GRPOTrainer.

All trainers of a seed start from the same weights and take turns in chunks of steps, each in a process of its own.
After a chunk its weights are evaluated while its clock stands still: by the same sampler, on the same problems, with
the same seeds, by the same verifier.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from experiments.bench.measure import Spread, cpu_seconds, row
from experiments.bench.trainers.link import EPSILON, OURS, PLAIN, TRL, Child, Start, check
from upge.errors import ConfigError, nearest

SUMMARY = "seconds of training until an accuracy: hpt, grpo and sft against TRL's GRPOTrainer"
WITH_PEERS = True
GOAL = 3.0
PEER = "TRL's GRPO"
BY = {"mean": "the mean over samples", "greedy": "greedy", "pass": "at least one sample right"}


@dataclass(frozen=True)
class Settings:
    """Keys of this bench.

    Fields:
        target: share of right answers that ends a trainer's race.
        by: which share: mean (of samples), greedy, or pass (at least one sample right).
        every: steps between evaluations.
        steps: the most steps of a trainer.
        seeds: races, with seeds from 0; five for a figure.
        algorithms: of ours that take part.
        prompts, group: prompts of a step, responses to each.
        problems, samples: of an evaluation.
        trl: how TRL samples: generate, continuous or vllm-mended.
        trl_lr: TRL's learning rate; 0: that of ours.
        batch: rows of TRL's micro-batches.
        threads: OpenMP threads of each trainer.
    """

    target: float = 0.5
    by: str = "mean"
    every: int = 5
    steps: int = 100
    seeds: int = 5
    algorithms: str = "hpt,grpo,sft"
    prompts: int = 16
    group: int = 8
    problems: int = 128
    samples: int = 4
    trl: str = "generate"
    trl_lr: float = 0.0
    batch: int = 32
    threads: int = 1


@dataclass
class Course:
    """A trainer's way through one race.

    Fields:
        child: the trainer.
        steps, seconds, cpu: so far, of training alone.
        figures: of the last evaluation.
    """

    child: Child
    steps: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)

    def advance(self, settings: Settings) -> bool:
        """Trains a chunk and evaluates; True if the race is over for it."""
        count = min(settings.every, settings.steps - self.steps)
        began = cpu_seconds()
        self.seconds += self.child.ask("steps", count=count)["seconds"]
        self.cpu += cpu_seconds() - began
        self.steps += count
        self.figures = self.child.ask("evaluate")
        return self.reached(settings) or self.steps >= settings.steps

    def reached(self, settings: Settings) -> bool:
        """Whether the last evaluation was good enough."""
        return self.figures[settings.by] >= settings.target


def run(settings: Settings, start: Start = Child) -> str:
    """A Markdown table, and what it says about the goal."""
    names = _names(settings)
    races = [race(seed, names, settings, start) for seed in range(settings.seeds)]
    header = [
        *("trainer", "reached", "seconds of training", "CPU seconds", "steps"),
        *("accuracy then", "greedy", f"pass@{settings.samples}", f"sooner than {PEER} by"),
    ]
    lines = [row(*header), "|---" * len(header) + "|"]
    lines += [_line(name, [courses[name] for courses in races], races, settings) for name in (*names, PEER)]
    return "\n".join([*lines, "", *_told(names, races, settings)])


def _names(settings: Settings) -> list[str]:
    """The algorithms of ours; refuses settings that make no race."""
    names = [name.strip() for name in settings.algorithms.split(",") if name.strip()]
    if not names:
        raise ConfigError("algorithms: empty; give names such as hpt,grpo,sft")
    if not 0 < settings.target < 1:
        raise ConfigError(f"target: found {settings.target}; give a share of right answers between 0 and 1")
    if settings.by not in BY:
        raise ConfigError(f"by: found '{settings.by}'; {nearest(settings.by, BY)}")
    for key in ("every", "steps", "seeds", "threads"):
        if getattr(settings, key) < 1:
            raise ConfigError(f"{key}: found {getattr(settings, key)}; it must be at least 1")
    check([settings.trl], settings.prompts * settings.group, settings.batch, "batch")
    return names


def race(seed: int, names: list[str], settings: Settings, start: Start = Child) -> dict[str, Course]:
    """One seed: all trainers, a chunk in turn, who begins changing, until each is there or at its last step."""
    common = (
        *("model=tiny", "data=arithmetic", f"seed={seed}", f"steps={settings.steps}", *PLAIN),
        *(f"prompts_per_step={settings.prompts}", f"group_size={settings.group}"),
        *(f"data.evaluation_size={settings.problems}", f"eval.samples={settings.samples}"),
    )
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder, courses = Path(place), {}
        for name in names:
            job = {"arguments": [f"algo={name}", *common, f"output={folder / name}"], "checksum": False}
            courses[name] = Course(stack.enter_context(start(name, OURS, job, folder, settings.threads)))
        job = {"arguments": ["algo=grpo", EPSILON, *common, f"output={folder / 'trl'}"], "engine": settings.trl}
        job |= {"batch": settings.batch, "lr": settings.trl_lr, "checksum": False}
        courses[PEER] = Course(stack.enter_context(start("trl", TRL, job, folder, settings.threads)))
        for course in courses.values():
            course.child.answer()
            course.figures = course.child.ask("evaluate")
        if len({tuple(sorted(course.figures.items())) for course in courses.values()}) > 1:
            raise AssertionError(f"before training not all are equally good: {[c.figures for c in courses.values()]}")
        if courses[PEER].reached(settings):
            raise ConfigError(f"target: {settings.target} is what the model solves untrained; give a higher one")
        _take_turns(courses, settings)
    return courses


def _take_turns(courses: dict[str, Course], settings: Settings) -> None:
    running, number = list(courses), 0
    while running:
        first = number % len(running)
        for name in running[first:] + running[:first]:
            if courses[name].advance(settings):
                courses[name].child.close()
                running.remove(name)
        number += 1


def _times(course: Course, peer: Course, settings: Settings) -> float:
    """How many times sooner than the peer; 0 if it never was. Where the peer never was, its last step counts, which
    makes the figure a lower bound."""
    return peer.seconds / course.seconds if course.reached(settings) else 0.0


def _line(name: str, courses: list[Course], races: list[dict[str, Course]], settings: Settings) -> str:
    times = [_times(one[name], one[PEER], settings) for one in races]
    return row(
        name if name == PEER else f"`{name}`",
        f"{sum(course.reached(settings) for course in courses)} of {len(courses)}",
        Spread.of(course.seconds for course in courses),
        Spread.of(course.cpu for course in courses),
        Spread.of(course.steps for course in courses),
        *(Spread.of(100 * course.figures[key] for course in courses) for key in ("mean", "greedy", "pass")),
        "1" if name == PEER else Spread.of(times),
    )


def _told(names: list[str], races: list[dict[str, Course]], settings: Settings) -> list[str]:
    rate = f"its learning rate {settings.trl_lr:g}" if settings.trl_lr else "the same learning rate"
    seeds = "seed" if len(races) == 1 else "seeds"
    lines = [
        f"Median and range of {len(races)} {seeds}; target {settings.target:.0%} of {settings.problems} problems, "
        f"{BY[settings.by]}, {settings.samples} samples, evaluated each {settings.every} steps, at most "
        f"{settings.steps} steps of {settings.prompts} prompts with {settings.group} responses; {settings.threads} "
        f"OpenMP threads. TRL samples with `{settings.trl}`, has micro-batches of {settings.batch} rows and {rate}. "
        "Accuracies in %. Where one did not reach the target, its seconds are those at its last step; a trainer that "
        "did not is sooner by 0.",
    ]
    missing = sum(not courses[PEER].reached(settings) for courses in races)
    if missing:
        lines += ["", f"{PEER} did not reach the target in {missing} of {len(races)} races: there it is a lower bound."]
    if "hpt" in names:
        times = Spread.of(_times(courses["hpt"], courses[PEER], settings) for courses in races).median
        verdict = "reached" if times >= GOAL else "not reached"
        lines += ["", f"Goal: `hpt` at least {GOAL:g} times sooner than {PEER}; {verdict}, {times:.3g} times."]
    return lines
