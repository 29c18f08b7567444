"""The models without gradients that a run loads besides its policy, and those that share the policy's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from experiments.config import Composed
from upge.errors import ConfigError
from upge.models.loading import read_config
from upge.needs import Needs
from upge.pipeline import Pipeline
from upge.train.config import ModelConfig, RunConfig


class Loaded(NamedTuple):
    """A model to be loaded, and the setting that gives its path, for messages."""

    model: ModelConfig
    key: str


def reference_model(config: RunConfig) -> Loaded | None:
    """The reference policy's model; None if it is the policy's base model without its LoRA adapters."""
    return _other(config, config.reference.path, "reference.path")


def teacher_model(config: RunConfig) -> Loaded | None:
    """The teacher's model; None if it is the policy itself, or its base model without its LoRA adapters."""
    if config.teacher.self and config.teacher.weights == "present":
        return None
    return _other(config, config.teacher.path, "teacher.path")


def frozen_models(config: RunConfig, needs: Needs) -> dict[str, Loaded]:
    """'reference' and 'teacher' → model, for those that have weights of their own; equal ones are loaded once."""
    named = {
        "reference": reference_model(config) if needs.reference else None,
        "teacher": teacher_model(config) if needs.teacher else None,
    }
    loaded: dict[str, Loaded] = {}
    for name, one in named.items():
        if one is not None and one.model not in [other.model for other in loaded.values()]:
            loaded[name] = one
    return loaded


def check_secondary_partition(composed: Composed) -> None:
    """Refuse ZeRO++'s secondary partition for runs with several models, which DeepSpeed does not support.

    Raises:
        ConfigError: the algorithm needs a critic, or a reference policy or a teacher with weights of its own.
    """
    config, stages = composed.config, Pipeline.of(composed.algorithm).stages.values()
    if config.deepspeed.secondary_partition == 1:
        return
    if frozen_models(config, composed.algorithm.needs) or any(s.algorithm.critic is not None for s in stages):
        raise ConfigError(
            "zero_optimization.zero_hpz_partition_size: DeepSpeed supports it for only one model per process, and this "
            "algorithm needs a critic, a reference policy or a teacher; remove it",
            "deepspeed.config",
        )


def check_distributions(config: RunConfig, needs: Needs) -> None:
    """Call `check_predicted_tokens` for the models whose distributions the algorithm reads."""
    for name in sorted(needs.distributions):
        if path := getattr(config, name).path:
            check_predicted_tokens(config.model.path, path, f"{name}.path")


def check_predicted_tokens(policy: str, path: str, key: str) -> None:
    """Check that the model at `path` predicts all tokens of the policy, for terms on whole distributions.

    Raises:
        ConfigError: it predicts fewer; the message names `key`, and both sizes.
    """
    own, theirs = (read_config(one).get_text_config().vocab_size for one in (policy, path))
    if theirs < own:
        raise ConfigError(
            f"'{path}' predicts {theirs} tokens and the policy {own}; give a model with at least the policy's "
            "vocabulary",
            key,
        )


def _other(config: RunConfig, path: str, key: str) -> Loaded | None:
    """The model at `path`, or the one that the run begins with."""
    if path:
        return Loaded(replace(config.model, path=path, overrides={}), key)
    return None if config.model.lora.rank else Loaded(config.model, "model.path")
