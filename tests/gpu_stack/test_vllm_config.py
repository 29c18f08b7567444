"""The engine configuration that vLLM for CUDA makes of every preset and recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.config import Composed, compose, presets
from experiments.run.dry_run import with_known_models
from experiments.run.prepare import load_sampler
from tests.gpu_stack import pretended  # noqa: F401  before vLLM
from upge.errors import ConfigError
from upge.models.loading import read_config
from upge.rollout import shared_engine, vllm_engine
from upge.rollout.vllm_engine import VLLMSampler

import vllm  # isort: skip
import vllm.envs  # isort: skip
from vllm.engine.arg_utils import EngineArgs  # isort: skip
from vllm.usage.usage_lib import UsageContext  # isort: skip


class ConfigurationOnly:
    """Stands for `vllm.LLM`, with the configuration of its engine and nothing else."""

    def __init__(self, **options: Any) -> None:
        arguments = {name: value for name, value in options.items() if name != "use_tqdm_on_load"}
        self.configuration = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)


def configuration(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's configuration of the engine that a run would start on a GPU."""
    monkeypatch.setattr(vllm, "LLM", ConfigurationOnly)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = with_known_models(composed)[0].config
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    sampler = load_sampler(config.model, config.rollout, longest, config.seed, config.rollout.tensor_parallel)
    assert isinstance(sampler, VLLMSampler)
    return sampler._llm.configuration


def on_eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun on a machine with eight GPUs. The engine's ranks do not connect."""
    monkeypatch.setattr(vllm_engine, "several_ranks", lambda: True)
    monkeypatch.setattr(vllm_engine, "ranks_of_run", lambda: (8, 8))
    monkeypatch.setattr(shared_engine, "share", lambda sampler, size: sampler)


def assert_configured(made: Any, composed: Composed) -> None:
    config = composed.config
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    assert made.model_config.max_model_len == longest
    assert str(made.model_config.dtype) == f"torch.{config.model.dtype}"
    assert made.model_config.logprobs_mode == "processed_logprobs"
    assert made.model_config.enable_sleep_mode and made.model_config.skip_tokenizer_init
    assert made.cache_config.gpu_memory_utilization == config.rollout.memory_fraction
    assert made.parallel_config.world_size == config.rollout.tensor_parallel
    # The planner counts CUDA graphs of 51 sizes, which stay on the GPU in sleep and are a part of vLLM's share.
    assert len(made.compilation_config.cudagraph_capture_sizes) == 51 and not made.model_config.enforce_eager
    assert not made.model_config.sleep_mode_offload_cudagraph and vllm.envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS
    for name, value in config.model.overrides.items():
        assert read(made.model_config.hf_config, name) == value
    # A step of the scheduler takes a whole prompt, and the responses of a group are sampled together.
    assert made.scheduler_config.max_num_batched_tokens >= config.rollout.max_prompt_tokens
    assert made.scheduler_config.max_num_seqs >= config.group_size


def read(config: Any, name: str) -> object:
    """A setting, where transformers 5 keeps rope_theta as well."""
    if name == "rope_theta":
        return config.rope_parameters["rope_theta"]
    return getattr(config, name)


def of_preset(preset: str, *settings: str) -> Composed:
    composed = compose(["algo=hpt", f"model={preset}", "rollout.engine=vllm", *settings])
    if composed.config.model.path.endswith(".gguf"):
        pytest.skip("the file of this preset comes with a package that is not in the CUDA set")
    return composed


@pytest.mark.parametrize("preset", presets("model"))
def test_presets(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = of_preset(preset)
    assert_configured(configuration(composed, monkeypatch), composed)


@pytest.mark.parametrize("preset", presets("model"))
def test_presets_on_several_ranks(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica on each of eight ranks, and the model divided over two, four and eight, where its heads can be."""
    on_eight_ranks(monkeypatch)
    for size in (1, 2, 4, 8):
        composed = of_preset(preset, f"rollout.tensor_parallel={size}")
        hf_config = read_config(with_known_models(composed)[0].config.model.path)
        if divides(size, hf_config.get_text_config()):
            made = configuration(composed, monkeypatch)
            assert_configured(made, composed)
            assert made.parallel_config.distributed_executor_backend == "external_launcher"
            assert made.parallel_config.tensor_parallel_size == size
        else:
            with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel.*heads"):
                configuration(composed, monkeypatch)


def divides(size: int, config: Any) -> bool:
    keys = config.num_key_value_heads
    return config.num_attention_heads % size == 0 and (keys % size == 0 or size % keys == 0)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ["rollout.max_sequences=96", "rollout.max_batched_tokens=12288"]
    composed = compose(["algo=hpt", "model=qwen2.5-math-7b", "rollout.engine=vllm", *limits])
    made = configuration(composed, monkeypatch).scheduler_config
    assert (made.max_num_seqs, made.max_num_batched_tokens) == (96, 12288)


@pytest.mark.parametrize("recipe", presets("recipe"))
def test_recipes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the eight GPUs that they are meant for."""
    on_eight_ranks(monkeypatch)
    composed = compose([f"recipe={recipe}", "rollout.engine=vllm"])
    assert_configured(configuration(composed, monkeypatch), composed)
