"""Every setting of a run, with its default and a one-line description.

The command line's help, the checks of keys and types and the resolved config.yaml all come from these classes. The keys
under `algo` define the algorithm, and the keys under `data` choose the problems that a run trains on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from upge.config import Settings, key, section
from upge.errors import ConfigError, nearest
from upge.rollout.noise import NoiseConfig
from upge.train.alarms import ALARMS, AlarmConfig
from upge.train.deepspeed_settings import DeepspeedConfig
from upge.verify.base import LONGEST_TIME, MOST_MEMORY, MOST_WORKERS, WORKERS_PER_CORE
from upge.views import PASS_THRESHOLD

#: The largest values that settings may have, far beyond any practical use. Larger ones would exhaust memory or time
#: before an error message could be printed.
STEPS, SEED, TOKENS, PROMPTS, GROUP, ROLLOUTS = 10**9, 2**32 - 1, 10**7, 2**20, 2**16, 2**22
#: The names that `log_to` may contain.
LOG_TO = ("console", "jsonl", "tensorboard", "trackio", "wandb")


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Low-rank adapters (arXiv 2106.09685): W + (alpha / rank) · B·A, of which only A and B are trained."""

    rank: int = key(0, "rank of the policy's LoRA adapters; 0 = train all weights", minimum=0, limit=65536)
    alpha: float = key(
        32.0, "LoRA's scale: the product of the adapter's matrices is multiplied by alpha / rank", above=0
    )
    dropout: float = key(
        0.0, "dropout of the adapters' inputs in updates; makes their gradient random", minimum=0, below=1
    )
    target_modules: list = key(
        [], "linear layers with an adapter, such as [q_proj,v_proj]; [] = all but the output embedding"
    )


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The model, and how it is loaded and prompted."""

    path: str = key("", "folder or hub name of a Hugging Face causal LM, or a GGUF file (FILE or PACKAGE:FILE)")
    dtype: Literal["float32", "bfloat16"] = key("float32", "precision of the forward pass and of the sampler's weights")
    template: str = key("chat", "'chat' = the tokenizer's chat template; otherwise a text with {prompt} (and {system})")
    system: str = key("", "system message for problems without one of their own")
    instruction: str = key("", "text appended to every prompt, for example a request to box the answer")
    opening: str = key("", "text that every response begins with; it becomes the end of the prompt")
    template_arguments: dict = key({}, "variables of the chat template, such as {enable_thinking: false}")
    overrides: dict = key({}, "changes to the model's config.json, such as {rope_theta: 40000}")
    gradient_checkpointing: Literal["none", "selective", "full"] = key(
        "none",
        "activations to recompute in the backward pass: selective = all but matrix products and attention; full = all",
        aliases={"false": "none", "true": "full"},
    )
    lora: LoraConfig = section(LoraConfig)


#: The policy whose log-probs are `behavior_logprobs` on stale and replayed rollouts.
Behavior = Literal["sampling", "present"]


@dataclass(frozen=True)
class RolloutConfig(Settings):
    """How training rollouts are sampled."""

    engine: Literal["auto", "vllm", "transformers"] = key("auto", "inference engine; auto: see docs/running.md")
    temperature: float = key(
        1.0, "sampling temperature in training; the trainer's log-probs use the same", minimum=0.01, limit=100
    )
    max_prompt_tokens: int = key(1024, "length limit of prompts", above=0, limit=TOKENS)
    max_response_tokens: int = key(
        1024, "length limit of responses; algorithms with a fixed divisor use it as `length`", above=0, limit=TOKENS
    )
    memory_fraction: float = key(0.4, "fraction of GPU memory that the vLLM engine may use", above=0, maximum=1)
    max_sequences: int = key(
        0, "maximum responses that vLLM generates at once; 0 = vLLM's default", minimum=0, limit=TOKENS
    )
    max_batched_tokens: int = key(
        0, "maximum tokens that vLLM processes at once; 0 = vLLM's default", minimum=0, limit=TOKENS
    )
    lag: int = key(
        0, "sample with the policy's weights from N steps ago; 0 = the current weights", minimum=0, limit=10_000
    )
    behavior: Behavior = key(
        "sampling",
        "whose log-probs the denominators use on stale and replayed rollouts: sampling = the policy that sampled them; "
        "present = the policy at the start of the step",
    )
    tensor_parallel: int = key(
        1, "consecutive ranks that share each vLLM engine; 1 = a replica on each rank", above=0, limit=4096
    )
    noise: NoiseConfig = section(NoiseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise.bfloat16_logits and self.engine != "transformers":
            raise ConfigError(
                f"found true with rollout.engine={self.engine}, but vLLM does not round logits; set "
                "rollout.engine=transformers, or rollout.noise.bfloat16_logits=false",
                "noise.bfloat16_logits",
            )
        if self.tensor_parallel > 1 and self.engine == "transformers":
            raise ConfigError(
                f"found {self.tensor_parallel}, but only vLLM splits an engine over ranks; set rollout.engine=vllm, "
                "or rollout.tensor_parallel=1",
                "tensor_parallel",
            )


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW, the learning rate, and how a step's batch is split into updates."""

    lr: float = key(1e-6, "learning rate of AdamW", minimum=0)
    schedule: Literal["constant", "linear", "cosine"] = key(
        "constant", "learning rate after warm-up: constant, or decaying to 0"
    )
    warmup_steps: int = key(0, "steps over which the learning rate rises linearly", minimum=0, limit=STEPS)
    weight_decay: float = key(0.0, "decoupled weight decay of AdamW", minimum=0)
    beta1: float = key(0.9, "decay rate of AdamW's first moment", minimum=0, below=1)
    beta2: float = key(0.999, "decay rate of AdamW's second moment", minimum=0, below=1)
    max_grad_norm: float = key(1.0, "clip gradients to this global norm; 0 = no clipping", minimum=0)
    skip_grad_norm: float = key(
        0.0, "skip an update whose gradient norm before clipping exceeds this; 0 = never", minimum=0
    )
    mini_batches: int = key(1, "optimizer updates per pass over a step's prompts", above=0, limit=PROMPTS)
    epochs: int = key(1, "passes over a step's batch", above=0, limit=10_000)
    micro_batch_tokens: int = key(
        16384, "maximum tokens per forward pass on one rank; does not change the gradient", above=0, limit=10**9
    )


@dataclass(frozen=True)
class CriticConfig(Settings):
    """The value network, for algorithms that read values. Its other settings are the policy's."""

    path: str = key("", "model that initializes the backbone; empty = model.path")
    lr: float = key(1e-5, "learning rate of the critic; its schedule and warm-up are the policy's", minimum=0)
    warmup_steps: int = key(0, "the first N steps train only the critic", minimum=0, limit=STEPS)


@dataclass(frozen=True)
class ReferenceConfig(Settings):
    """The reference policy, for algorithms that measure a distance to it. It is not trained."""

    path: str = key("", "model of the reference policy; empty = model.path, the initial policy")


@dataclass(frozen=True)
class TeacherConfig(Settings):
    """The teacher, for algorithms that learn from the probabilities of another model. It is not trained."""

    path: str = key("", "model of the teacher, with the tokenizer of model.path")
    self: bool = key(False, "the policy is its own teacher, on prompts of teacher.template")
    weights: Literal["present", "first"] = key(
        "present", "with teacher.self: present = the policy's current weights; first = its weights when the run began"
    )
    template: str = key(
        "", "teacher's prompt, a text with {prompt} and {demonstration}, {answer} or {feedback}; empty = the policy's"
    )

    def __post_init__(self) -> None:  # noqa: B902 - a field is named self
        Settings.__post_init__(self)
        if self.path and self.self:
            raise ConfigError("both a path and teacher.self=true; give only one of the two", "path")


@dataclass(frozen=True)
class VerifyConfig(Settings):
    """How responses are rewarded."""

    verifier: str = key(
        "math",
        "verifier of problems that name none: a name, a callable's path, or a weighted sum such as "
        "'math + 0.2*my.style'; see docs/verification.md",
    )
    pass_threshold: float = key(
        PASS_THRESHOLD, "a response passes (pass rates, gates, accuracy) if its reward is larger than this"
    )
    success: str = key(
        "", "in a sum of verifiers, the name of the reward that decides whether a response passes; empty = the sum"
    )
    workers: int = key(
        2, f"worker processes per rank, at most {WORKERS_PER_CORE} for each core", above=0, maximum=MOST_WORKERS
    )
    time_limit: float = key(
        5.0,
        "maximum seconds per response; beyond it the reward is the smallest possible and the status 'timeout'",
        above=0,
        maximum=LONGEST_TIME,
    )
    memory_limit: float = key(
        4.0,
        "maximum GiB of memory per response; beyond it the reward is the smallest possible and the status 'error'",
        above=0,
        maximum=MOST_MEMORY,
    )
    environment: list = key([], "additional environment variables that verifiers can read, such as [JUDGE_API_KEY]")
    network: bool = key(False, "let verifiers use the network; false = block it, on systems where that is possible")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """When and how accuracy is measured during training."""

    suite: str = key("", "suite from experiments/configs/suite; empty = the data's own evaluation problems")
    folder: str = key("", "folder with the suite's files; empty = the suite's own source, such as the hub")
    skip: list = key([], "benchmarks of the suite to skip, such as [gpqa_diamond]")
    limit: int = key(0, "maximum problems per benchmark of the suite; 0 = all", minimum=0, limit=10**9)
    every: int = key(
        0, "evaluate every N steps; 0 = only before and after training and after each stage; -1 = never", limit=STEPS
    )
    samples: int = key(8, "responses per problem for pass@k and mean@k", above=0, limit=GROUP)
    temperature: float = key(1.0, "sampling temperature in evaluation", minimum=0.01, limit=100)
    top_p: float = key(1.0, "nucleus sampling in evaluation; 1 = the whole distribution", above=0, maximum=1)
    keep_best: bool = key(False, "save the weights with the highest mean@k in best/")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < -1 or self.every < 0 and (self.keep_best or self.suite):
            raise ConfigError(
                f"found {self.every}; give a number of steps, 0 for before and after training, or -1 for never (but "
                "not with eval.keep_best or eval.suite)",
                "every",
            )


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """When the training state is saved."""

    every: int = key(
        50, "save every N steps and after the last one; 0 = only when the run is stopped", minimum=0, limit=STEPS
    )
    keep: int = key(2, "number of newest checkpoints to keep; 0 = all", minimum=0, limit=STEPS)


@dataclass(frozen=True)
class DataPolicy(Settings):
    """Which part of the data set is used, and how prompts and demonstrations over the limits are handled."""

    overlong_prompts: Literal["error", "drop"] = key("error", "what to do with a prompt over the length limit")
    overlong_demonstrations: Literal["drop", "truncate", "error"] = key(
        "drop", "what to do with a demonstration over the response limit"
    )
    unverifiable_answers: Literal["error", "drop"] = key(
        "error", "what to do with a problem whose answer its verifier cannot read"
    )
    per_level: dict = key({}, "level -> number of training problems; other levels are left out; {} = all problems")
    demonstrated_prompts: int = key(
        0,
        "number of training problems that keep their demonstrations, spread over the levels; 0 = all",
        minimum=0,
        limit=10**9,
    )
    demonstrations: int = key(1, "demonstrations drawn at random per prompt and step; 0 = all", minimum=0, limit=GROUP)


@dataclass(frozen=True)
class StopConfig(Settings):
    """When a run stops early."""

    nonfinite_updates: int = key(5, "stop with exit code 3 after N non-finite updates in a row", above=0, limit=STEPS)
    verifier_errors: float = key(
        0.5,
        "stop with exit code 2 before the update if a larger share of a step's verdicts are errors or timeouts; "
        "1 = never",
        minimum=0,
        maximum=1,
    )
    alarms: list = key([], "alarms that stop the run with exit code 3, such as [truncated,no_signal]; see alarms")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.alarms:
            if name not in ALARMS:
                raise ConfigError(f"no alarm {name!r}; {nearest(str(name), ALARMS)}", "alarms")


@dataclass(frozen=True)
class DiagnoseConfig(Settings):
    """Additional measurements during training. They do not change the training."""

    gradients_every: int = key(
        0, "measure norms and cosines of the terms' gradients every N steps; 0 = never", minimum=0, limit=STEPS
    )
    split_every: int = key(
        0, "compare the gradient with that of smaller micro-batches every N steps; 0 = never", minimum=0, limit=STEPS
    )


@dataclass(frozen=True)
class HardwareConfig(Settings):
    """The machine that a run is planned for. Values of 0 are detected on the current machine."""

    gpus: int = key(0, "GPUs of the run, one per rank; 0 = the ranks that were started", minimum=0, limit=10**6)
    memory: float = key(0.0, "GiB of memory per GPU (without GPUs: of the machine); 0 = detect", minimum=0, limit=10**7)


@dataclass(frozen=True)
class RunConfig(Settings):
    """The settings of a whole run. `algo` and `data` are trees that are checked where they are built."""

    algo: dict = key({}, "name from algorithms/, or a YAML file; algo.terms... overrides its parts")
    data: dict = key({}, "name from experiments/configs/data; its own settings are data.KEY")
    steps: int = key(100, "training steps", minimum=0, limit=STEPS)
    seed: int = key(0, "seed of the prompt order, of all sampling and of LoRA's adapters", minimum=0, limit=SEED)
    prompts_per_step: int = key(32, "prompts per step, over all ranks", above=0, limit=PROMPTS)
    group_size: int = key(8, "rollouts per prompt", above=0, limit=GROUP)
    output: str = key("", "folder of the run; empty = the next unused runs/ALGO-MODEL-DATA")
    resume: str = key(
        "auto",
        "auto = continue the run in `output` from its newest checkpoint; step_N = from that one; never = refuse to",
    )
    fault: str = key("none", "name of a fault to introduce on purpose, see docs/faults.md; none = no fault")
    fault_stages: list = key([], "stages of the algorithm in which a fault of the updates is active; [] = all")
    log_rollouts: int = key(
        10, "log rollouts and the tokens with the largest weights every N steps; 0 = never", minimum=0, limit=STEPS
    )
    log_to: list = key(
        ["console", "jsonl"],
        "where metrics go: console, jsonl (always), and tensorboard, trackio, wandb, as in [console,wandb]",
    )
    log_project: str = key("upge", "project of trackio and wandb")
    model: ModelConfig = section(ModelConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    deepspeed: DeepspeedConfig = section(DeepspeedConfig)
    critic: CriticConfig = section(CriticConfig)
    reference: ReferenceConfig = section(ReferenceConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    verify: VerifyConfig = section(VerifyConfig)
    eval: EvalConfig = section(EvalConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    data_policy: DataPolicy = section(DataPolicy)
    alarms: AlarmConfig = section(AlarmConfig)
    stop: StopConfig = section(StopConfig)
    diagnose: DiagnoseConfig = section(DiagnoseConfig)
    hardware: HardwareConfig = section(HardwareConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.log_to:
            if name not in LOG_TO:
                raise ConfigError(f"found {name!r}; {nearest(str(name), LOG_TO)}", "log_to")
        if self.resume not in ("auto", "never") and not re.fullmatch(r"step_\d+", self.resume):
            raise ConfigError(
                f"found {self.resume!r}; give auto, never, or the name of a checkpoint, as in step_000050", "resume"
            )
        if self.prompts_per_step * self.group_size > ROLLOUTS:
            raise ConfigError(
                f"{self.group_size} rollouts of prompts_per_step={self.prompts_per_step} prompts are more than "
                f"{ROLLOUTS} in a step; lower one of the two",
                "group_size",
            )
        if self.prompts_per_step % self.optimizer.mini_batches:
            raise ConfigError(
                f"{self.optimizer.mini_batches} does not divide prompts_per_step={self.prompts_per_step}; choose a "
                "divisor, so that every update averages over the same number of prompts",
                "optimizer.mini_batches",
            )
