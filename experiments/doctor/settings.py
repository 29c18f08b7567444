"""The settings of a check-up: its own keys, and those keys of a run that decide what is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments import hints
from experiments.config import Composed, compose
from experiments.files import output_path
from experiments.run.faults import load
from experiments.run.model_shape import ModelShape
from upge.config import Settings, from_tree, key, meanings, parse, split
from upge.errors import ConfigError, ModelError, nearest
from upge.models.loading import read_config
from upge.train.config import GROUP, PROMPTS, TOKENS, ModelConfig, RunConfig

CHECKS = ("machine", "collectives", "kernels", "gradients", "sampler")
#: Keys of a run that a check-up also has; a dot at the end stands for all keys below.
SHARED = (
    *("model", "recipe", "seed", "model.path", "model.dtype", "model.overrides.", "model.gradient_checkpointing"),
    *("rollout.engine", "rollout.temperature", "rollout.memory_fraction", "rollout.tensor_parallel"),
    *("checkpoint.keep", "optimizer.micro_batch_tokens", "fault"),
)
#: Tokens of a response that are sampled by default without and with a GPU.
RESPONSE_TOKENS = {"cpu": 32, "cuda": 512}


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """What is checked, and with how much work."""

    checks: list = key([*CHECKS], "what to check, of machine, collectives, kernels, gradients, sampler")
    algorithms: list = key([], "algorithms whose gradients are checked, such as [sft,grpo]; [] = all")
    random: bool = key(False, "random weights of the model's shape; nothing is downloaded")
    prompts: int = key(4, "prompts that each rank samples responses to", above=0, limit=PROMPTS)
    group_size: int = key(8, "responses to each prompt", above=0, limit=GROUP)
    prompt_tokens: int = key(16, "random tokens of a prompt", above=0, limit=TOKENS)
    response_tokens: int = key(0, "tokens of a response; 0 = 32 on a CPU, 512 on a GPU", minimum=0, limit=TOKENS)
    time_limit: float = key(600.0, "seconds after which a check that has not ended is a problem", above=0, limit=10**6)
    output: str = key("", "folder of doctor.json; empty = the next free doctor/MODEL")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.checks if name not in CHECKS]
        if unknown or not self.checks:
            hint = nearest(str(unknown[0]), CHECKS) if unknown else f"give some of {', '.join(CHECKS)}"
            raise ConfigError(f"found {self.checks}; {hint}", "checks")


@dataclass(frozen=True)
class Chosen:
    """A checked command line.

    Attributes:
        run: the settings of model, sampling and memory.
        name: of the model, as given.
        shape: the model's sizes; None if it is not found here, which the check of the model reports.
    """

    config: DoctorConfig
    run: RunConfig
    name: str
    shape: ModelShape | None


def choose(arguments: Sequence[str]) -> Chosen:
    """The settings of a command line.

    Raises:
        ConfigError: an unknown key, name or value, by its key.
    """
    own: dict[str, Any] = {}
    shared: list[str] = []
    for name, text in map(split, arguments):
        if name in DoctorConfig.__dataclass_fields__:
            is_text = isinstance(getattr(DoctorConfig(), name), str)
            own[name] = text if is_text else parse(name, text)
            # A list may also be given as names separated by commas.
            if name in ("checks", "algorithms") and isinstance(own[name], str):
                own[name] = [part for part in own[name].split(",") if part]
        elif name in SHARED or name.startswith(tuple(k for k in SHARED if k.endswith("."))):
            shared.append(f"{name}={text}")
        else:
            raise ConfigError(f"{name}: unknown key; {hints.unknown(name, [row[0] for row in keys()])}")
    config = from_tree(DoctorConfig, own)
    output_path(config.output)
    composed = compose(shared)
    load(composed.config.fault, composed.config.group_size)
    run = _with_folders(composed, config.random).config
    try:
        shape = shape_of(run.model)
    except ModelError:
        shape = None
    return Chosen(config, run, str(composed.names["model"]), shape)


def shape_of(model: ModelConfig) -> ModelShape:
    """The sizes of the model at `model.path`.

    Raises:
        ConfigError: an override that does not fit.
        ModelError: it is not found, or cannot be trained.
    """
    return ModelShape.of(read_config(model.path, model.overrides), model.dtype)


def _with_folders(composed: Composed, random: bool) -> Composed:
    """The configuration with folders in place of GGUF files and, if `random`, of models in experiments/models."""
    from experiments.run.dry_run import with_known_models
    from experiments.run.prepare import with_local_models

    policy = replace(composed.config, critic=RunConfig().critic, reference=RunConfig().reference)
    local = with_local_models(replace(composed, config=policy))
    return with_known_models(local)[0] if random else local


def keys() -> list[tuple[str, Any, str]]:
    """(key, default, meaning) of every setting."""
    rows = [row for row in meanings(RunConfig) if row[0] in SHARED or f"{row[0]}." in SHARED]
    names = [("model", "tiny", "name, folder or hub name of a model"), ("recipe", "", "name of a recipe")]
    return [*meanings(DoctorConfig), *names, *rows]
