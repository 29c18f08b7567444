"""An 80 GB GPU that vLLM's CUDA packages take for real, and a worker that holds the model on the CPU instead.

Engine, scheduler, configuration, model classes, weight loading and reloading are vLLM's own. Missing are the kernels: the
worker computes no logits and draws tokens by hash.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

GIB = 1 << 30
MEMORY = 80 * GIB


def load_stub_libcuda() -> None:
    """Loads an empty libcuda.so.1, which vLLM's compiled modules are linked to; their functions are never called.

    Modules that are imported afterwards resolve functions when they are called, and not when they are loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        source = Path(folder) / "stub.c"
        source.write_text("int cuInit(unsigned int flags) { return 100; }  /* CUDA_ERROR_NO_DEVICE */\n")
        subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    sys.setdlopenflags(os.RTLD_LAZY)


load_stub_libcuda()

import vllm.platforms  # noqa: E402  needs the library
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class PretendedGPU(CudaPlatformBase):
    """Eight H100 with 80 GB on which nothing can be computed; collectives use gloo."""

    dist_backend = "gloo"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return MEMORY

    @classmethod
    def is_fully_connected(cls, device_ids: list[int]) -> bool:
        return True

    @classmethod
    def device_count(cls) -> int:
        return 8

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        pass

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        pass

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    @classmethod
    def use_custom_allreduce(cls) -> bool:
        return False

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        vllm_config.parallel_config.worker_cls = f"{__name__}.CPUWorker"


vllm.platforms._current_platform = PretendedGPU()

from vllm.config import get_layers_from_vllm_config, set_current_vllm_config  # noqa: E402  needs the platform
from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment  # noqa: E402
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # noqa: E402
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.reload.inplace import reload_weights  # noqa: E402
from vllm.utils.torch_utils import set_torch_threads_for_runtime  # noqa: E402
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput  # noqa: E402
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase  # noqa: E402


def drawn(seed: int | None, position: int, vocabulary: int) -> tuple[int, float]:
    """The token that a request with this seed gets at a position of its text, and its log-prob."""
    digest = hashlib.sha256(f"{seed} {position}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % vocabulary, -int.from_bytes(digest[4:6], "big") / 65536


class CPUWorker(WorkerBase):
    """Does what vLLM's GPU worker does to weights, sleep and requests, and draws tokens by hash.

    Attributes:
        calls: the calls that change its state, in order, such as `sleep 2`, `wake weights`, `reload`.
    """

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        self.calls: list[str] = []
        self.awake = {"weights", "kv_cache"}
        self.requests: dict[str, tuple[Any, int]] = {}
        parallel = self.parallel_config
        init_distributed_environment(
            parallel.world_size, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        ensure_model_parallel_initialized(parallel.tensor_parallel_size, 1)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        self.load_config.device = "cpu"
        with set_current_vllm_config(self.vllm_config):
            self.model = get_model_loader(self.load_config).load_model(
                vllm_config=self.vllm_config, model_config=self.model_config
            )
        set_torch_threads_for_runtime()

    def get_model(self) -> torch.nn.Module:
        return self.model

    def get_kv_cache_spec(self) -> dict[str, Any]:
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        return {name: layer.get_kv_cache_spec(self.vllm_config) for name, layer in layers.items()}

    def determine_available_memory(self) -> int:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return int(self.cache_config.gpu_memory_utilization * MEMORY) - weights

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self.cache_config.num_gpu_blocks = kv_cache_config.num_blocks

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(0.0, 0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def sleep(self, level: int = 1) -> None:
        """As `CuMemAllocator` does it: level 1 keeps a copy of the weights, level 2 loses them; buffers are restored."""
        self.calls.append(f"sleep {level}")
        self.awake = set()
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        if level == 2:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake {' '.join(tags or ['all'])}")
        self.awake |= set(tags or ["weights", "kv_cache"])
        if "weights" in (tags or ["weights"]):
            for name, buffer in self.model.named_buffers():
                buffer.data.copy_(self.buffers[name])

    def reload_weights(self, **arguments: Any) -> None:
        assert "weights" in self.awake, "weights are written to memory that is not allocated"
        self.calls.append("reload")
        with set_current_vllm_config(self.vllm_config):
            reload_weights(self.vllm_config, self.model, **({"weights_path": None, "is_checkpoint_format": True} | arguments))

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        """None if `sample_tokens` is to follow, as in vLLM's GPU worker."""
        assert self.awake == {"weights", "kv_cache"}, f"a step with only {self.awake} awake"
        self.output = self._step(scheduler_output)
        return None if scheduler_output.total_num_scheduled_tokens else EMPTY_MODEL_RUNNER_OUTPUT

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        return self.output

    def _step(self, scheduled: Any) -> ModelRunnerOutput:
        for name in scheduled.finished_req_ids:
            self.requests.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            self.requests[new.req_id] = (new, new.num_computed_tokens)
        cached = scheduled.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self.requests[name] = (self.requests[name][0], computed)
        names, tokens, values = list(scheduled.num_scheduled_tokens), [], []
        for name in names:
            request, computed = self.requests[name]
            position = computed + scheduled.num_scheduled_tokens[name]
            if position < len(request.prompt_token_ids):  # a part of the prompt
                tokens.append([])
                values.append((0, 0.0))
                continue
            token, value = drawn(request.sampling_params.seed, position, self.vocab_size)
            tokens.append([token])
            values.append((token, value))
        logprobs = LogprobsLists(
            np.array([[token] for token, _ in values], dtype=np.int32),
            np.array([[value] for _, value in values], dtype=np.float32),
            np.zeros(len(values), dtype=np.int32),
        )
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens, logprobs)
