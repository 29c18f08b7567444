"""Every setting of a run, with its default and one line of meaning.

The command line's help, the check of keys and types and the resolved config.yaml are all read off these classes. What
an algorithm does is not here but in its file under `algo`; which problems are solved is under `data`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from upge.checks import mismatch
from upge.errors import ConfigError, nearest


def key(default: Any, meaning: str) -> Any:
    """A field with its default and its line of help."""
    metadata = {"meaning": meaning}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A nested group of keys."""
    return field(default_factory=cls)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded and prompted."""

    path: str = key("", "folder or hub name of a Hugging Face causal LM, or a GGUF file, alone or as PACKAGE:FILE")
    dtype: Literal["float32", "bfloat16"] = key("float32", "precision of the forward pass and of the sampler's weights")
    template: str = key("chat", "'chat' = the tokenizer's chat template, else a text with {prompt} (and {system})")
    system: str = key("", "system message of problems that bring none")
    instruction: str = key("", "added to every prompt as it stands, a request to box the answer for example")
    opening: str = key("", "what every response begins with; it is written into the prompt")
    overrides: dict = key({}, "changes to the model's config.json, such as {rope_theta: 40000}")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled in training."""

    engine: Literal["auto", "vllm", "transformers"] = key("auto", "inference engine; auto: see docs/running.md")
    temperature: float = key(1.0, "sampling temperature in training; the trainer's log-probs use it too")
    max_prompt_tokens: int = key(1024, "longest prompt")
    max_response_tokens: int = key(1024, "longest response; algorithms with a fixed divisor use it as `length`")
    memory_fraction: float = key(0.4, "share of a GPU's memory for the vLLM engine")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate, and how a step's batch is cut into updates."""

    lr: float = key(1e-6, "AdamW's learning rate")
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "course of the rate after warm-up, down to 0")
    warmup_steps: int = key(0, "steps with a linearly rising rate")
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay")
    beta1: float = key(0.9, "AdamW's decay of the mean")
    beta2: float = key(0.999, "AdamW's decay of the square")
    max_grad_norm: float = key(1.0, "gradient clipping by global norm; 0 = none")
    skip_grad_norm: float = key(0.0, "leave out an update whose gradient norm before clipping exceeds this; 0 = never")
    mini_batches: int = key(1, "optimizer updates per pass over a step's prompts")
    epochs: int = key(1, "passes over a step's batch")
    micro_batch_tokens: int = key(16384, "most tokens of one forward pass on one rank; never changes the gradient")


@dataclass(frozen=True)
class CriticConfig:
    """The value network of algorithms that read values; everything else is as for the policy."""

    path: str = key("", "model that its backbone starts from; empty = model.path")
    lr: float = key(1e-5, "its learning rate; schedule and warm-up are the policy's")
    warmup_steps: int = key(0, "first steps in which it learns alone and the policy stays")


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen policy of algorithms that measure a distance to one."""

    path: str = key("", "model of the frozen policy; empty = model.path, where the policy starts")


@dataclass(frozen=True)
class VerifyConfig:
    """How responses are rewarded."""

    verifier: str = key("math", "for problems that name none: a name, or a callable's path; see docs/verification.md")
    workers: int = key(2, "worker processes per rank")
    time_limit: float = key(5.0, "seconds for one answer; beyond, the reward is 0 and the status 'timeout'")
    memory_limit: float = key(4.0, "GiB that a worker may take for one answer; beyond, reward 0 and status 'error'")


@dataclass(frozen=True)
class EvalConfig:
    """When and how accuracy is measured during training."""

    suite: str = key("", "benchmarks of experiments/configs/suite to measure on; empty = the data's evaluation side")
    folder: str = key("", "folder with the suite's files; empty = what the suite says, the hub for example")
    skip: list = key([], "benchmarks of the suite to leave out, such as [gpqa_diamond]")
    limit: int = key(0, "at most so many problems of each benchmark of the suite; 0 = all")
    every: int = key(0, "evaluate each so many steps; 0 = only before and after training; -1 = never")
    samples: int = key(8, "responses per problem for pass@k and mean@k")
    temperature: float = key(1.0, "sampling temperature of these responses")
    top_p: float = key(1.0, "nucleus of these responses")
    keep_best: bool = key(False, "keep the weights of the best evaluation (highest mean@k) in best/")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the training state is saved."""

    every: int = key(50, "save each so many steps and at the last; 0 = only when stopped")
    keep: int = key(1, "newest checkpoints to keep; 0 = all")


@dataclass(frozen=True)
class DataPolicy:
    """What of the data set is used, and what happens to prompts and demonstrations beyond the limits."""

    overlong_prompts: Literal["error", "drop"] = key("error", "what to do with a prompt beyond the limit")
    overlong_demonstrations: Literal["drop", "truncate", "error"] = key(
        "drop", "what to do with a demonstration beyond the response limit"
    )
    unverifiable_answers: Literal["error", "drop"] = key(
        "error", "what to do with a problem whose answer its verifier cannot read"
    )
    per_level: dict = key({}, "level -> only so many training problems of it, no other levels; {} = all problems")
    demonstrated_prompts: int = key(
        0, "only so many training problems keep their demonstrations, of all levels alike; 0 = all"
    )
    demonstrations: int = key(1, "of a prompt's demonstrations, use so many in a step, by chance; 0 = all at once")


@dataclass(frozen=True)
class StopConfig:
    """When a run gives up."""

    nonfinite_updates: int = key(5, "stop with exit code 3 after so many non-finite updates in a row")


@dataclass(frozen=True)
class DiagnoseConfig:
    """What is measured beside training, and changes nothing in it."""

    gradients_every: int = key(0, "norms and cosines of the terms' gradients each so many steps; 0 = never")


@dataclass(frozen=True)
class HardwareConfig:
    """The machine that a run is meant for; what is left at 0 is found out on this one."""

    gpus: int = key(0, "GPUs of the run, one a rank; 0 = the ranks of this start")
    memory: float = key(0.0, "GiB of memory of one GPU (without GPUs: of the machine); 0 = what there is")


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `algo` and `data` hold trees that are checked where they are built."""

    algo: dict = key({}, "the algorithm: a name from algorithms/, or a YAML file; algo.terms... overrides its parts")
    data: dict = key({}, "the data set: a name from experiments/configs/data, with its own keys as data.KEY")
    steps: int = key(100, "training steps")
    seed: int = key(0, "seed of the order of prompts and of all sampling")
    prompts_per_step: int = key(32, "prompts of one step, over all ranks")
    group_size: int = key(8, "rollouts per prompt")
    output: str = key("", "folder of the run; empty = the next free runs/ALGO-MODEL-DATA")
    resume: Literal["auto", "never"] = key("auto", "auto = continue an interrupted run found in `output`")
    log_rollouts: int = key(10, "write rollouts and the heaviest tokens each so many steps; 0 = never")
    model: ModelConfig = section(ModelConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    critic: CriticConfig = section(CriticConfig)
    reference: ReferenceConfig = section(ReferenceConfig)
    verify: VerifyConfig = section(VerifyConfig)
    eval: EvalConfig = section(EvalConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    data_policy: DataPolicy = section(DataPolicy)
    stop: StopConfig = section(StopConfig)
    diagnose: DiagnoseConfig = section(DiagnoseConfig)
    hardware: HardwareConfig = section(HardwareConfig)

    def __post_init__(self) -> None:
        positive = {
            "prompts_per_step": self.prompts_per_step,
            "group_size": self.group_size,
            "rollout.max_prompt_tokens": self.rollout.max_prompt_tokens,
            "rollout.max_response_tokens": self.rollout.max_response_tokens,
            "optimizer.mini_batches": self.optimizer.mini_batches,
            "optimizer.epochs": self.optimizer.epochs,
            "optimizer.micro_batch_tokens": self.optimizer.micro_batch_tokens,
            "eval.samples": self.eval.samples,
            "stop.nonfinite_updates": self.stop.nonfinite_updates,
            "rollout.memory_fraction": self.rollout.memory_fraction,
            "verify.workers": self.verify.workers,
            "verify.time_limit": self.verify.time_limit,
            "verify.memory_limit": self.verify.memory_limit,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name}: found {value}; it must be greater than 0")
        self._check_not_negative()
        self._check_ranges()

    def _check_not_negative(self) -> None:
        natural = {
            "steps": self.steps,
            "seed": self.seed,
            "log_rollouts": self.log_rollouts,
            "diagnose.gradients_every": self.diagnose.gradients_every,
            "checkpoint.every": self.checkpoint.every,
            "checkpoint.keep": self.checkpoint.keep,
            "optimizer.lr": self.optimizer.lr,
            "optimizer.warmup_steps": self.optimizer.warmup_steps,
            "optimizer.max_grad_norm": self.optimizer.max_grad_norm,
            "optimizer.skip_grad_norm": self.optimizer.skip_grad_norm,
            "eval.limit": self.eval.limit,
            "data_policy.demonstrated_prompts": self.data_policy.demonstrated_prompts,
            "data_policy.demonstrations": self.data_policy.demonstrations,
            "hardware.gpus": self.hardware.gpus,
            "hardware.memory": self.hardware.memory,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "critic.lr": self.critic.lr,
            "critic.warmup_steps": self.critic.warmup_steps,
        }
        for name, value in natural.items():
            if not value >= 0:
                raise ConfigError(f"{name}: found {value}; it must not be negative")

    def _check_ranges(self) -> None:
        if self.eval.every < -1 or self.eval.every < 0 and (self.eval.keep_best or self.eval.suite):
            raise ConfigError(
                f"eval.every: found {self.eval.every}; give a number of steps, 0 for before and after training, or -1 "
                "for never, which goes with neither eval.keep_best nor eval.suite"
            )
        if self.prompts_per_step % self.optimizer.mini_batches:
            raise ConfigError(
                f"optimizer.mini_batches: {self.optimizer.mini_batches} does not divide prompts_per_step="
                f"{self.prompts_per_step}; choose a divisor, so that every update averages over as many prompts"
            )
        shares = {
            "eval.top_p": self.eval.top_p,
            "rollout.memory_fraction": self.rollout.memory_fraction,
        }
        for name, value in shares.items():
            if not 0 < value <= 1:
                raise ConfigError(f"{name}: found {value}; it must lie in (0, 1]")
        for name, value in (("beta1", self.optimizer.beta1), ("beta2", self.optimizer.beta2)):
            if not 0 <= value < 1:
                raise ConfigError(f"optimizer.{name}: found {value}; it must lie in [0, 1)")
        for name, value in (("rollout", self.rollout.temperature), ("eval", self.eval.temperature)):
            if value < 0.01:
                raise ConfigError(f"{name}.temperature: found {value}; it must be at least 0.01")


def from_tree(cls: type, tree: Mapping[str, Any], path: str = "") -> Any:
    """The dataclass `cls` from nested mappings.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    dotted = f"{path}." if path else ""
    values = {}
    for name, value in tree.items():
        if name not in hints:
            raise ConfigError(f"{dotted}{name}: unknown key; {nearest(str(name), hints)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                inner = ", ".join(f.name for f in dataclasses.fields(hints[name]))
                raise ConfigError(f"{dotted}{name}: found {value!r}, expected keys such as {dotted}{name}.KEY: {inner}")
            values[name] = from_tree(hints[name], value, f"{dotted}{name}")
            continue
        wrong = mismatch(value, hints[name])
        if wrong:
            raise ConfigError(f"{dotted}{name}: {wrong}")
        if isinstance(value, float) and math.isinf(value):
            raise ConfigError(f"{dotted}{name}: found {value}; give a finite number")
        values[name] = float(value) if hints[name] is float else value
    return cls(**values)


def defaults(cls: type = RunConfig) -> dict[str, Any]:
    """The tree of default values."""
    return dataclasses.asdict(cls())


def meanings(cls: type = RunConfig, path: str = "") -> list[tuple[str, Any, str]]:
    """(dotted key, default, meaning) of every setting, in order."""
    found = []
    hints = get_type_hints(cls)
    instance = cls()
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            found += meanings(hints[item.name], f"{path}{item.name}.")
        else:
            found.append((f"{path}{item.name}", getattr(instance, item.name), item.metadata["meaning"]))
    return found
