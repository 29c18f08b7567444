"""Memory, time and traffic of a step from 0.5B to 72B parameters: `python -m experiments.scaling` prints the tables.

Memory is the planner's count (`experiments.run.memory`). Time and traffic are floating-point operations and bytes,
divided by the rates below. `--docs` updates docs/scaling.md. No model is loaded; this takes a few seconds.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments import cli, files
from experiments.config import Composed, compose
from experiments.run.memory import GRAPHS, Memory, Moment, Shapes, estimate, longest, states
from experiments.run.model_shape import ModelShape
from experiments.run.workload import GIB, Machine
from upge.errors import ConfigError

DOCS = files.DOCS / "scaling.md"
BEGIN, END = "<!-- scaling: begin (python -m experiments.scaling --docs) -->", "<!-- scaling: end -->"
#: Qwen2.5: widths of the residual stream and the MLP, layers, heads, key heads, vocabulary, tied embeddings.
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
GPUS = (1, 8, 64)
#: Usable bytes of a GPU of 80 GB.
MEMORY = 79 * GIB
#: Rates of an H100: dense bfloat16 operations and bytes of memory per second, and the shares of them that are assumed.
PEAK, MFU = 989e12, 0.4
BANDWIDTH, BANDWIDTH_SHARE = 3.35e12, 0.6
#: Shortest time of a decoding step: scheduling, kernel launches, and the collectives of an engine on several GPUs.
STEP_SECONDS = 5e-3
#: Bytes per second and GPU that are assumed for collectives: within a machine of 8 (NVLink), and between machines.
LINKS = {"within": 300e9, "between": 40e9}
#: Mean tokens of a prompt and a response; the limits are those of the recipe.
PROMPT, RESPONSE = 256, 4096
MICRO_BATCHES = (32768, 16384, 9216)


@functools.cache
def recipe() -> Composed:
    """The settings of the steps: GRPO with 128 prompts, 8 responses each, at most 1024 + 8192 tokens."""
    return compose(["recipe=grpo-qwen2.5-math-7b"])


@functools.cache
def shape_of(size: str) -> ModelShape:
    """The sizes of Qwen2.5 in bfloat16."""
    from transformers import AutoConfig

    hidden, inner, layers, heads, keys, vocabulary, tied = SIZES[size]
    config = AutoConfig.for_model(
        "qwen2", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    return ModelShape.of(config, "bfloat16")


@dataclass(frozen=True)
class Point:
    """A model on some GPUs, trained and sampled on all of them.

    Attributes:
        size: a key of `SIZES`.
        gpus: their number, one rank each.
    """

    size: str
    gpus: int

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return shape_of(self.size)

    @property
    def machine(self) -> Machine:
        """The GPUs, as the planner describes them."""
        return Machine(self.gpus, MEMORY, True, "assumed", False)

    @property
    def fraction(self) -> float:
        """The largest `rollout.memory_fraction` next to the trainer's states, in hundredths; at least 0.01."""
        items = states(recipe().algorithm, Shapes(self.shape), self.machine)
        taken = sum(item.bytes for item in items if item.when == "always")
        return max(math.floor(100 * (MEMORY - taken) / MEMORY), 1) / 100

    def memory(self, micro_batch: int) -> Memory:
        """The planner's estimate."""
        config = recipe().config
        config = replace(config, rollout=replace(config.rollout, memory_fraction=self.fraction))
        return estimate(config, recipe().algorithm, Shapes(self.shape), self.machine, micro_batch)

    @property
    def micro_batch(self) -> int | None:
        """Tokens of the largest micro-batch of `MICRO_BATCHES` that fits; None if none does."""
        fitting = (tokens for tokens in MICRO_BATCHES if self._fits("training", tokens) and self._fits("step", tokens))
        return next(fitting, None)

    def _fits(self, moment: Moment, tokens: int) -> bool:
        return self.memory(tokens).total(moment) <= MEMORY

    @property
    def sequences(self) -> int:
        """Sequences of the maximum length in vLLM's cache; 0 or less if the replica does not fit."""
        room = self.fraction * MEMORY - self.shape.weights - GRAPHS
        return math.floor(room / (longest(recipe().config) * self.shape.cache_per_token))

    @property
    def is_colocated(self) -> bool:
        """Whether vLLM's replica fits next to the trainer's states, also while its weights are replaced."""
        return self.micro_batch is not None and self.sequences > 0 and self._fits("refresh", MICRO_BATCHES[-1])


def responses() -> int:
    """Responses of a step."""
    return recipe().config.prompts_per_step * recipe().config.group_size


def update_seconds(shape: ModelShape, gpus: int) -> float:
    """Seconds of the forward and backward passes of a step on `gpus` GPUs.

    A token takes 6 operations per parameter of a matrix, and 6·layers·width·length in attention (causal).
    """
    length = PROMPT + RESPONSE
    matrices = shape.parameters - (shape.vocabulary * shape.hidden if shape.output else 0)
    operations = 6 * (matrices + shape.layers * shape.query * length)
    return responses() * length * operations / (PEAK * MFU * gpus)


def sampling_seconds(shape: ModelShape, gpus: int, sequences: float, split: int = 1) -> float:
    """Seconds of sampling a step's responses with `gpus / split` engines, each over `split` GPUs.

    A step of an engine reads the weights and the cache of what is running, or takes 2 operations per parameter and
    sequence, whichever is longer, but at least `STEP_SECONDS`. All responses have the mean length, and prompts cost nothing.
    """
    each = responses() * split / gpus
    running = min(each, sequences)
    cache = running * (PROMPT + RESPONSE / 2) * shape.cache_per_token
    reading = (shape.weights + cache) / (BANDWIDTH * BANDWIDTH_SHARE)
    computing = 2 * shape.parameters * running / (PEAK * MFU)
    return each / running * RESPONSE * max(reading / split, computing / split, STEP_SECONDS)


def link(gpus: int) -> float:
    """Bytes per second and GPU of collectives over so many GPUs."""
    return LINKS["within" if gpus <= 8 else "between"]


def traffic_bytes(point: Point) -> tuple[float, float]:
    """(bytes of a rank for the updates of a step, bytes for the refresh).

    For each micro-batch ZeRO-3 gathers the weights in the forward and in the backward pass and reduces the gradient in
    float32: 2 · 2 + 4 bytes per parameter.
    """
    tokens = responses() * (PROMPT + RESPONSE) / point.gpus
    updates = recipe().config.optimizer.mini_batches
    micro_batches = updates * math.ceil(tokens / updates / (point.micro_batch or MICRO_BATCHES[-1]))
    others = (point.gpus - 1) / point.gpus
    return 8 * point.shape.parameters * micro_batches * others, point.shape.weights * others


def running_at_once(point: Point) -> float:
    """Sequences of the mean length in use that vLLM's cache holds."""
    return point.sequences * longest(recipe().config) / (PROMPT + RESPONSE / 2)


def memory_table() -> str:
    """GiB of a rank in each part of a step."""
    head = "| model | GPUs | states | update (micro-batch) | AdamW's step | refresh | vLLM's cache, sequences | fits |"
    rows = [head, "|---" * 8 + "|"]
    for point in (Point(size, gpus) for size in SIZES for gpus in GPUS):
        tokens = point.micro_batch or MICRO_BATCHES[-1]
        memory = point.memory(tokens)
        always = sum(item.bytes for item in memory.states if item.when == "always")
        update, step, refresh = (memory.total(moment) / GIB for moment in ("training", "step", "refresh"))
        cells = [f"{always / GIB:.1f}", f"{update:.1f} ({tokens:,})", f"{step:.1f}", f"{refresh:.1f}"]
        cells += [f"{max(point.sequences, 0):,}", verdict(point)]
        rows.append(f"| {point.size} | {point.gpus} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def verdict(point: Point) -> str:
    """Whether a step fits, and what does not."""
    if point.micro_batch is None:
        return "no: training"
    if not point.is_colocated:
        return f"training alone: vLLM's replica takes {point.shape.weights / GIB:.0f} GiB"
    return "yes"


def time_table() -> str:
    """Seconds of a step and GB between ranks, where it fits."""
    head = (
        "| model | GPUs | sampling, s | updates, s | refresh, s | step, s | updates' traffic, GB | traffic alone, s |"
    )
    rows = [head, "|---" * 8 + "|"]
    for point in (Point(size, gpus) for size in SIZES for gpus in GPUS):
        if point.micro_batch is None:
            continue
        moved, refreshed = traffic_bytes(point)
        update, alone = update_seconds(point.shape, point.gpus), moved / link(point.gpus)
        cells = ["–", f"{update:.0f}", "–", "–"]
        if point.is_colocated:
            sampling = sampling_seconds(point.shape, point.gpus, running_at_once(point))
            refresh = refreshed / link(point.gpus)
            step = sampling + max(update, alone) + refresh
            cells = [f"{sampling:.0f}", f"{update:.0f}", f"{refresh:.1f}", f"{step:.0f}"]
        cells += [f"{moved / 1e9:,.0f}", f"{alone:.0f}"]
        rows.append(f"| {point.size} | {point.gpus} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


@dataclass(frozen=True)
class Separate:
    """A split of the GPUs into samplers and trainers, one step of staleness apart.

    Attributes:
        samplers, trainers: numbers of GPUs.
        split: GPUs of one engine.
        sampling, updates, transfer: seconds. The first two overlap.
    """

    samplers: int
    trainers: int
    split: int
    sampling: float
    updates: float
    transfer: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self.sampling, self.updates) + self.transfer


def separate(size: str, gpus: int) -> Separate | None:
    """The fastest split of the GPUs; None if no split fits."""
    shape, per_sequence = shape_of(size), longest(recipe().config) * shape_of(size).cache_per_token
    found = []
    for split in (n for n in (1, 2, 4, 8) if SIZES[size][3] % n == 0):  # each GPU has as many heads
        room = split * (0.9 * MEMORY - GRAPHS) - shape.weights
        sequences = room / per_sequence * longest(recipe().config) / (PROMPT + RESPONSE / 2)
        for samplers in range(split, gpus, split) if sequences >= 1 else ():
            trainer = Point(size, gpus - samplers)
            if trainer.micro_batch is not None:
                sampling = sampling_seconds(shape, samplers, sequences, split)
                alone = traffic_bytes(trainer)[0] / link(trainer.gpus)
                updates = max(update_seconds(shape, trainer.gpus), alone)
                transfer = shape.weights / split / link(gpus)
                found.append(Separate(samplers, trainer.gpus, split, sampling, updates, transfer))
    return min(found, key=lambda one: one.step, default=None)


def separate_table() -> str:
    """Colocated against separate GPUs."""
    head = "| model | GPUs | colocated step, s | samplers × GPUs each | trainers | sampling, s | updates, s | transfer, s |"
    rows = [head + " step, s |", "|---" * 9 + "|"]
    for point in (Point(size, gpus) for size in SIZES for gpus in GPUS[1:]):
        best = separate(point.size, point.gpus)
        if best is None:
            continue
        together = "does not fit"
        if point.is_colocated:
            moved, refreshed = traffic_bytes(point)
            update = max(update_seconds(point.shape, point.gpus), moved / link(point.gpus))
            sampling = sampling_seconds(point.shape, point.gpus, running_at_once(point))
            together = f"{sampling + update + refreshed / link(point.gpus):.0f}"
        engines = f"{best.samplers // best.split} × {best.split}"
        numbers = f"{best.sampling:.0f} | {best.updates:.0f} | {best.transfer:.1f} | {best.step:.0f}"
        rows.append(f"| {point.size} | {point.gpus} | {together} | {engines} | {best.trainers} | {numbers} |")
    return "\n".join(rows)


SECTIONS = {"Memory": memory_table, "Time and traffic": time_table, "Separate samplers": separate_table}


def updated(text: str) -> str:
    """The text of docs/scaling.md with the table below each heading of `SECTIONS` updated.

    Raises:
        ConfigError: a heading or a marker is missing.
    """
    for title, make in SECTIONS.items():
        head, found, rest = text.partition(f"\n## {title}\n")
        if not found:
            raise ConfigError(f"{DOCS.name}: the heading '## {title}' is missing; add it")
        made = f"\n\n{make()}\n\n"
        text = head + found + files.replace_block(rest, DOCS.name, BEGIN, END, made, f"below '## {title}'")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables, or updates the docs; returns the exit code, 2 on bad input."""
    return cli.run_command(_scaling, arguments, lambda: str(__doc__))


def _scaling(arguments: list[str]) -> int:
    if arguments == ["--docs"]:
        DOCS.write_text(updated(DOCS.read_text()))
    elif arguments:
        raise ConfigError(f"'{arguments[0]}': give --docs to update docs/scaling.md, or nothing to print")
    else:
        print("\n".join(f"## {title}\n\n{make()}\n" for title, make in SECTIONS.items()))
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
