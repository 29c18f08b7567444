"""What a step takes on H100s: memory by the planner's count, time and traffic from operations, bytes and rates."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from experiments.config import Composed, compose
from experiments.run.memory import estimate, graph_bytes, longest, states
from experiments.run.memory_items import Memory, Moment, Shapes
from experiments.run.model_shape import ModelShape
from experiments.run.workload import GIB, Machine

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
    """GRPO with 128 prompts, 8 responses each, at most 1024 + 8192 tokens, with all activations recomputed."""
    return compose(["recipe=grpo-qwen2.5-math-7b", "model.gradient_checkpointing=full"])


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
        split: GPUs of one engine (`rollout.tensor_parallel`).
    """

    size: str
    gpus: int
    split: int = 1

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
        items = states(recipe().config, recipe().algorithm, Shapes(self.shape), self.machine)
        taken = sum(item.bytes for item in items if item.when == "always")
        return max(math.floor(100 * (MEMORY - taken) / MEMORY), 1) / 100

    def memory(self, micro_batch: int) -> Memory:
        """The planner's estimate."""
        config = recipe().config
        rollout = replace(config.rollout, memory_fraction=self.fraction, tensor_parallel=self.split)
        config = replace(config, rollout=rollout)
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
        """Sequences of the maximum length in an engine's cache; 0 or less if the engine does not fit."""
        part = self.shape.of_engine(self.split)
        room = self.fraction * MEMORY - part.weights - graph_bytes(0)
        return math.floor(room / (longest(recipe().config) * part.cache_per_token))

    @property
    def is_colocated(self) -> bool:
        """Whether vLLM's engine fits next to the trainer's states, also while its weights are replaced."""
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

    A decoding step takes the time to read the weights and the cache of the running sequences or that of 2 operations
    per parameter and sequence, whichever is longer, and at least `STEP_SECONDS`. All responses have the mean length;
    prompts cost nothing.
    """
    each = responses() * split / gpus
    running = min(each, sequences)
    cache = running * (PROMPT + RESPONSE / 2) * shape.cache_per_token
    reading = (shape.weights + cache) / (BANDWIDTH * BANDWIDTH_SHARE)
    computing = 2 * shape.parameters * running / (PEAK * MFU)
    return each / running * RESPONSE * max(reading / split, computing / split, STEP_SECONDS)


def link(gpus: int) -> float:
    """Bytes per second that each GPU moves in a collective over `gpus` GPUs."""
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


def colocated_seconds(point: Point) -> tuple[float, float, float]:
    """Seconds of sampling, of the updates (or of their traffic, if that takes longer) and of the refresh."""
    moved, refreshed = traffic_bytes(point)
    sampling = sampling_seconds(point.shape, point.gpus, running_at_once(point), point.split)
    updates = max(update_seconds(point.shape, point.gpus), moved / link(point.gpus))
    return sampling, updates, refreshed / link(point.gpus)


def splits(size: str) -> list[int]:
    """Numbers of GPUs, up to 8, over which an engine can be divided: each GPU gets the same number of heads."""
    return [n for n in (1, 2, 4, 8) if SIZES[size][3] % n == 0]


def divided(size: str, gpus: int) -> Point | None:
    """The point with the fastest step whose engines have several GPUs each; None if none fits."""
    possible = [Point(size, gpus, split) for split in splits(size) if 1 < split <= gpus]
    fitting = [point for point in possible if point.is_colocated]
    return min(fitting, key=lambda point: sum(colocated_seconds(point)), default=None)


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
    for split in splits(size):
        room = split * (0.9 * MEMORY - graph_bytes(0)) - shape.weights
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
