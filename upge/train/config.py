"""Every setting of a run, with its default and one line of meaning.

The command line's help, the check of keys and types and the resolved config.yaml are all read off these classes. What
an algorithm does is not here but in its file under `algo`; which problems are solved is under `data`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upge.config import Settings, key, section
from upge.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig(Settings):
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
class RolloutConfig(Settings):
    """How responses are sampled in training."""

    engine: Literal["auto", "vllm", "transformers"] = key("auto", "inference engine; auto: see docs/running.md")
    temperature: float = key(1.0, "sampling temperature in training; the trainer's log-probs use it too", minimum=0.01)
    max_prompt_tokens: int = key(1024, "longest prompt", above=0)
    max_response_tokens: int = key(
        1024, "longest response; algorithms with a fixed divisor use it as `length`", above=0
    )
    memory_fraction: float = key(0.4, "share of a GPU's memory for the vLLM engine", above=0, maximum=1)


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW, its learning rate, and how a step's batch is cut into updates."""

    lr: float = key(1e-6, "AdamW's learning rate", minimum=0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "course of the rate after warm-up, down to 0")
    warmup_steps: int = key(0, "steps with a linearly rising rate", minimum=0)
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay", minimum=0)
    beta1: float = key(0.9, "AdamW's decay of the mean", minimum=0, below=1)
    beta2: float = key(0.999, "AdamW's decay of the square", minimum=0, below=1)
    max_grad_norm: float = key(1.0, "gradient clipping by global norm; 0 = none", minimum=0)
    skip_grad_norm: float = key(
        0.0, "leave out an update whose gradient norm before clipping exceeds this; 0 = never", minimum=0
    )
    mini_batches: int = key(1, "optimizer updates per pass over a step's prompts", above=0)
    epochs: int = key(1, "passes over a step's batch", above=0)
    micro_batch_tokens: int = key(
        16384, "most tokens of one forward pass on one rank; never changes the gradient", above=0
    )


@dataclass(frozen=True)
class CriticConfig(Settings):
    """The value network of algorithms that read values; everything else is as for the policy."""

    path: str = key("", "model that its backbone starts from; empty = model.path")
    lr: float = key(1e-5, "its learning rate; schedule and warm-up are the policy's", minimum=0)
    warmup_steps: int = key(0, "first steps in which it learns alone and the policy stays", minimum=0)


@dataclass(frozen=True)
class ReferenceConfig(Settings):
    """The frozen policy of algorithms that measure a distance to one."""

    path: str = key("", "model of the frozen policy; empty = model.path, where the policy starts")


@dataclass(frozen=True)
class VerifyConfig(Settings):
    """How responses are rewarded."""

    verifier: str = key("math", "for problems that name none: a name, or a callable's path; see docs/verification.md")
    workers: int = key(2, "worker processes per rank", above=0)
    time_limit: float = key(5.0, "seconds for one answer; beyond, the reward is 0 and the status 'timeout'", above=0)
    memory_limit: float = key(
        4.0, "GiB that a worker may take for one answer; beyond, reward 0 and status 'error'", above=0
    )


@dataclass(frozen=True)
class EvalConfig(Settings):
    """When and how accuracy is measured during training."""

    suite: str = key("", "benchmarks of experiments/configs/suite to measure on; empty = the data's evaluation side")
    folder: str = key("", "folder with the suite's files; empty = what the suite says, the hub for example")
    skip: list = key([], "benchmarks of the suite to leave out, such as [gpqa_diamond]")
    limit: int = key(0, "at most so many problems of each benchmark of the suite; 0 = all", minimum=0)
    every: int = key(0, "evaluate each so many steps; 0 = only before and after training; -1 = never")
    samples: int = key(8, "responses per problem for pass@k and mean@k", above=0)
    temperature: float = key(1.0, "sampling temperature of these responses", minimum=0.01)
    top_p: float = key(1.0, "nucleus of these responses", above=0, maximum=1)
    keep_best: bool = key(False, "keep the weights of the best evaluation (highest mean@k) in best/")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < -1 or self.every < 0 and (self.keep_best or self.suite):
            raise ConfigError(
                f"found {self.every}; give a number of steps, 0 for before and after training, or -1 for never, which "
                "goes with neither eval.keep_best nor eval.suite",
                "every",
            )


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """When the training state is saved."""

    every: int = key(50, "save each so many steps and at the last; 0 = only when stopped", minimum=0)
    keep: int = key(1, "newest checkpoints to keep; 0 = all", minimum=0)


@dataclass(frozen=True)
class DataPolicy(Settings):
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
        0, "only so many training problems keep their demonstrations, of all levels alike; 0 = all", minimum=0
    )
    demonstrations: int = key(
        1, "of a prompt's demonstrations, use so many in a step, by chance; 0 = all at once", minimum=0
    )


@dataclass(frozen=True)
class StopConfig(Settings):
    """When a run gives up."""

    nonfinite_updates: int = key(5, "stop with exit code 3 after so many non-finite updates in a row", above=0)


@dataclass(frozen=True)
class DiagnoseConfig(Settings):
    """What is measured beside training, and changes nothing in it."""

    gradients_every: int = key(0, "norms and cosines of the terms' gradients each so many steps; 0 = never", minimum=0)


@dataclass(frozen=True)
class HardwareConfig(Settings):
    """The machine that a run is meant for; what is left at 0 is found out on this one."""

    gpus: int = key(0, "GPUs of the run, one a rank; 0 = the ranks of this start", minimum=0)
    memory: float = key(0.0, "GiB of memory of one GPU (without GPUs: of the machine); 0 = what there is", minimum=0)


@dataclass(frozen=True)
class RunConfig(Settings):
    """A whole run. `algo` and `data` hold trees that are checked where they are built."""

    algo: dict = key({}, "the algorithm: a name from algorithms/, or a YAML file; algo.terms... overrides its parts")
    data: dict = key({}, "the data set: a name from experiments/configs/data, with its own keys as data.KEY")
    steps: int = key(100, "training steps", minimum=0)
    seed: int = key(0, "seed of the order of prompts and of all sampling", minimum=0)
    prompts_per_step: int = key(32, "prompts of one step, over all ranks", above=0)
    group_size: int = key(8, "rollouts per prompt", above=0)
    output: str = key("", "folder of the run; empty = the next free runs/ALGO-MODEL-DATA")
    resume: Literal["auto", "never"] = key("auto", "auto = continue an interrupted run found in `output`")
    log_rollouts: int = key(10, "write rollouts and the heaviest tokens each so many steps; 0 = never", minimum=0)
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
        super().__post_init__()
        if self.prompts_per_step % self.optimizer.mini_batches:
            raise ConfigError(
                f"{self.optimizer.mini_batches} does not divide prompts_per_step={self.prompts_per_step}; choose a "
                "divisor, so that every update averages over as many prompts",
                "optimizer.mini_batches",
            )
