"""How an update's time and memory grow with tokens, vocabulary, group size and ranks: this project against itself.

Each point runs in a fresh process, `python -m experiments.bench.growth JSON`, alone or under torchrun; rank 0 prints a
line of JSON. The points of a series alternate within each round. Ratios are relative to the first point of the series
in the same round. On a machine that does other work, the ratio of CPU times is the more reliable one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from experiments.bench.loss import Shape, made
from experiments.bench.measure import FEWEST_ROUNDS, Spread, interleaved, peak, until_signal, verdict
from experiments.cli import ROOT, launcher
from experiments.grid import markdown_table
from upge import config
from upge.errors import ConfigError

SUMMARY = "how an update's time and memory grow with tokens, vocabulary, group size and ranks"
RANKS_GOAL, LINEAR = 1.6, 1.15
_MIB = 2**20

Measurement = dict[str, float]


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    rounds: int = config.key(FEWEST_ROUNDS, "number of rounds, at least five", minimum=0, limit=1000)
    groups: int = config.key(4, "prompts of the first point of a series", minimum=1, limit=4096)
    size: int = config.key(8, "responses to each prompt of the first point; a multiple of 4", minimum=1, limit=4096)
    scale: float = config.key(0.5, "factor of the mean lengths (prompt 96, response 235)", above=0, limit=1000)
    vocabulary: int = config.key(8192, "V of the first point of a series", minimum=16, limit=10**7)
    series: str = config.key(
        "tokens,vocabulary,group,ranks", "some of tokens, vocabulary, group and ranks, separated by commas"
    )


def series_of(settings: Settings) -> dict[str, list[Point]]:
    """Name → the points of the series; the others are relative to the first."""
    start = Point(settings.groups, settings.size, settings.vocabulary, scale=settings.scale)
    change = dataclasses.replace
    known = {
        "tokens": [change(start, groups=times * settings.groups) for times in (1, 2, 4)],
        "vocabulary": [change(start, vocabulary=times * settings.vocabulary) for times in (1, 4, 16)],
        "group": [change(start, groups=4 * settings.groups // t, size=t * settings.size // 4) for t in (1, 2, 4)],
        "ranks": [change(start, groups=4 * settings.groups, ranks=ranks) for ranks in (1, 2)],
    }
    wanted = [name.strip() for name in settings.series.split(",")]
    if not set(wanted) <= set(known):
        raise ConfigError(f"series: found '{settings.series}'; give some of {', '.join(known)} with commas")
    if settings.rounds < FEWEST_ROUNDS:
        raise ConfigError(f"rounds: found {settings.rounds}; give at least {FEWEST_ROUNDS}")
    if settings.groups < 1 or settings.size < 8 or settings.size % 4:
        raise ConfigError(
            f"groups, size: found {settings.groups}, {settings.size}; give at least 1 prompt, and a multiple of 4 from "
            "8 on"
        )
    return {name: known[name] for name in wanted}


def run(settings: Settings, probe: Callable[[Point], Measurement] | None = None) -> str:
    """Markdown tables, and whether the goals were reached."""
    probe, series = probe or launched, series_of(settings)
    header = ["series", "point", "response tokens", "tokens computed", "seconds", "× time", "× CPU time"]
    header += ["× tokens computed", "MiB at most", "× memory"]
    rows, goals = [], []
    with until_signal() as ending:
        for name, points in series.items():
            calls = {_label(name, point): lambda _, point=point: probe(point) for point in points}
            timing = interleaved(calls, settings.rounds, label=name)
            first, *_, last = columns = list(timing.results.values())
            rows += [_row(name, point, column, first) for point, column in zip(points, columns, strict=True)]
            goals += _goal(name, points, first, last)
            timing.check()
    about = (f"Median and range of {settings.rounds} rounds; a Qwen2 of {points[0].layers} layers and width "
             f"{points[0].width}, GRPO, one thread per process. Memory: the peak of an update's process minus its "
             "memory with weights and engine loaded; it includes gradients and AdamW's moments.")  # fmt: skip
    return ending.finished("\n".join([markdown_table(header, rows), "", about, "", *goals]))


def launched(point: Point) -> Measurement:
    """Measure a point in a new process, or in several processes that torchrun starts.

    Raises:
        ConfigError: the process failed; the message has the end of its output.
    """
    probe = ["experiments.bench.growth", json.dumps(dataclasses.asdict(point))]
    command = [*launcher(point.ranks), "-m", *probe]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ConfigError(f"growth: the probe for {point} failed: {(done.stdout + done.stderr)[-2000:]}")
    return json.loads(lines[-1])


def _row(name: str, point: Point, measurements: Sequence[Measurement], first: Sequence[Measurement]) -> list[object]:
    """The row of a point from its measurements and those of the series' first point, one of each round."""
    cpu, computed, memory = (f"{_ratio(measurements, first, k).median:.2f}" for k in ("cpu", "computed", "memory"))
    mib = f"{statistics.median(one['memory'] for one in measurements) / _MIB:,.0f}"
    return [
        *(name, _label(name, point), f"{measurements[0]['tokens']:,.0f}", f"{measurements[0]['computed']:,.0f}"),
        *(Spread.of(one["seconds"] for one in measurements), _ratio(measurements, first, "seconds")),
        *(cpu, computed, mib, memory),
    ]


def _label(name: str, point: Point) -> str:
    """A point, as the table of its series names it."""
    return {
        "tokens": f"{point.groups} prompts",
        "vocabulary": f"V = {point.vocabulary:,}",
        "group": f"{point.groups} × {point.size}",
        "ranks": f"{point.ranks} rank{'s' * (point.ranks > 1)}",
    }[name]


def _goal(name: str, points: Sequence[Point], first: Sequence[Measurement], last: Sequence[Measurement]) -> list[str]:
    """A sentence on the goal of a series, if it has one."""
    times = _ratio(last, first, "seconds").median
    if name == "tokens":
        per_token = times / _ratio(last, first, "computed").median
        return [f"- tokens: time per token {per_token:.2f} times the first point's at the last; goal 1 "
                f"({verdict(per_token <= LINEAR)}, {LINEAR:g} counts as linear)."]  # fmt: skip
    if name == "ranks":
        reached = verdict(1 / times >= RANKS_GOAL)
        return [f"- {points[-1].ranks} ranks: {1 / times:.2f} times as fast as one; goal {RANKS_GOAL:g}, {reached}."]
    if name == "vocabulary":
        # Without what is proportional to the weights: the gradient in its two forms and the two moments.
        most, least = (statistics.median(m["memory"] - 16 * m["parameters"] for m in one) for one in (last, first))
        return [f"- vocabulary: beyond gradients and moments, {(most - least) / _MIB:,.0f} MiB more at V = "
                f"{points[-1].vocabulary:,} than at {points[0].vocabulary:,}."]  # fmt: skip
    return []


def _ratio(measurements: Sequence[Measurement], first: Sequence[Measurement], key: str) -> Spread:
    return Spread.ratio((one[key] for one in measurements), (one[key] for one in first))


@dataclass(frozen=True)
class Point:
    """The settings of a measurement.

    Attributes:
        groups, size: prompts of the step, and responses to each.
        vocabulary: V of the model.
        width, layers: width and layers of the model, a Qwen2 with random weights.
        scale: factor of the mean lengths (prompt 96, response 235).
        micro_batch_tokens: maximum tokens of one forward pass.
        updates: number of timed updates, after one warm-up update.
        ranks: number of processes, of one thread each.
    """

    groups: int = 8
    size: int = 8
    vocabulary: int = 8192
    width: int = 256
    layers: int = 4
    scale: float = 0.5
    micro_batch_tokens: int = 4096
    updates: int = 3
    ranks: int = 1


def measured(point: Point) -> None:
    """Print the seconds of an update, its CPU time, its tokens, and the memory of the first beyond weights and engine.

    CPU time is summed over ranks.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import algorithms
    from upge.train.config import ModelConfig, OptimizerConfig
    from upge.train.distributed import connect, leave
    from upge.train.engine import Engine
    from upge.train.lr_schedule import LearningRates
    from upge.train.update import Updater

    world, config = connect(), OptimizerConfig(micro_batch_tokens=point.micro_batch_tokens)
    model = Qwen2Config(
        vocab_size=point.vocabulary, hidden_size=point.width, intermediate_size=4 * point.width,
        num_hidden_layers=point.layers, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as own:
        # transformers writes only on the main rank.
        folder = world.broadcast(own)
        torch.manual_seed(0)
        Qwen2ForCausalLM(model).save_pretrained(folder)
        world.barrier()
        engine = Engine(ModelConfig(path=folder), config, world)
        world.barrier()
    updater = Updater(engine, algorithms.load("grpo"), config)
    rollouts = made(Shape(point.groups, point.size).scaled(point.scale), point.vocabulary)
    memory, seconds, cpu = peak(lambda: updater.update(rollouts, 0, LearningRates(1e-6))), [], []
    for step in range(1, 1 + point.updates):
        began, cpu_began = time.perf_counter(), time.process_time()
        computed = updater.update(rollouts, step, LearningRates(1e-6)).sums.computed_tokens
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    every = world.gather((float(computed), float(memory), statistics.median(cpu)))
    if world.is_main:
        all_computed, memories, all_cpu = zip(*every, strict=True)
        measurement = {"seconds": statistics.median(seconds), "cpu": sum(all_cpu)}
        measurement |= {"memory": max(memories), "computed": sum(all_computed)}
        measurement |= {"tokens": sum(len(t.response_ids) for t in rollouts), "parameters": engine.parameters}
        print(json.dumps(measurement), flush=True)
    leave(world, 0)


if __name__ == "__main__":
    measured(Point(**json.loads(sys.argv[1])))
