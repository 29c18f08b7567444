"""The policy in training: a Hugging Face causal LM under DeepSpeed ZeRO-3, for one process or many."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upge.errors import ModelError, UserError
from upge.rollout.model import check_loaded, read_config
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import World
from upge.train.packing import PackedBatch, pack

#: Parameters are gathered for the sampler in buckets of about this size.
_BUCKET_BYTES = 512 * 2**20
#: The key of our own state among DeepSpeed's in a checkpoint.
_STATE = "upge"


class StepResult(NamedTuple):
    """What an optimizer update did: `applied` is False if the gradient was not finite and the update was skipped."""

    applied: bool
    grad_norm: float


class Engine:
    """The policy's weights, gradients and optimizer, partitioned over the ranks.

    Gradients add up over `backward` calls until `step`: each rank's loss is a part of one sum over the global batch, so
    the averaging over ranks that DeepSpeed does is undone here.
    """

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, world: World, temperature: float = 1.0) -> None:
        import deepspeed

        from upge.train.packed_attention import PackedPolicy

        self.world, self.temperature = world, temperature
        settings = _settings(model, optimizer, world)
        network = _load(model, settings)
        if model.gradient_checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            network.config.use_cache = False
        policy = PackedPolicy(network).train()
        parameters = [p for p in policy.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(
            parameters, lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), weight_decay=optimizer.weight_decay
        )
        self._engine, *_ = deepspeed.initialize(model=policy, optimizer=adamw, config=settings)
        self.network = network

    def forward(self, trajectories: Sequence[tuple[Sequence[int], Sequence[int]]], entropy: bool = False) -> Forward:
        """Log-probs [B, T] of the responses of (prompt_ids, response_ids) pairs, with entropies [B, T] if asked.

        Every rank must call it equally often; a rank without work passes no trajectories.
        """
        packed = pack(trajectories, self.world.device)
        logprobs, entropies = self._engine(packed, temperature=self.temperature, entropy=entropy)
        return Forward(packed, logprobs, entropies)

    def backward(self, loss: Float[Tensor, ""], last: bool) -> None:
        """Adds the gradient of this rank's part of the loss; `last` marks the one before `step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size)

    def step(self, lr: float) -> StepResult:
        """Clips and applies the gradient with learning rate `lr`; a gradient that is not finite is dropped."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return StepResult(bool(self._engine.was_step_applied()), float(self._engine.get_global_grad_norm()))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every parameter, on every rank; gathered in buckets.

        A tensor is valid until the next one is asked for. Every rank must exhaust the iterator.
        """
        import deepspeed

        for bucket in _buckets(list(self.network.named_parameters())):
            with deepspeed.zero.GatheredParameters([p for _, p in bucket], modifier_rank=None):
                for name, parameter in bucket:
                    yield name, parameter.detach()

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Writes weights, optimizer and `state` to folder/tag; all ranks call it."""
        self._engine.save_checkpoint(str(folder), tag=tag, client_state={_STATE: state}, save_latest=False)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restores what `save` wrote and returns its `state`."""
        path, state = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ModelError(f"{folder / tag}: the checkpoint cannot be read; remove it to resume from an older one")
        return state[_STATE]

    def export(self, folder: Path) -> None:
        """Writes the model in Hugging Face format (safetensors), from rank 0; all ranks call it."""
        keep = self.world.is_main
        weights = {n: w.to("cpu", copy=True).contiguous() for n, w in self.named_weights() if keep}
        if keep:
            attention = self.network.config._attn_implementation
            self.network.config._attn_implementation = None
            self.network.save_pretrained(folder, state_dict=weights)
            self.network.config._attn_implementation = attention
        self.world.barrier()

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.network.parameters())


class Forward(NamedTuple):
    """Packed results of a forward pass and the batch that pads them."""

    packed: PackedBatch
    logprobs_packed: Tensor
    entropies_packed: Tensor | None

    @property
    def logprobs(self) -> Float[Tensor, "B T"]:
        """[B, T] with gradient."""
        return self.packed.pad(self.logprobs_packed)

    @property
    def entropies(self) -> Float[Tensor, "B T"] | None:
        """[B, T] with gradient, or None."""
        return None if self.entropies_packed is None else self.packed.pad(self.entropies_packed)


def _settings(model: ModelConfig, optimizer: OptimizerConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch sizes are formal: micro-batches are cut here, by tokens."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _load(model: ModelConfig, settings: dict[str, Any]) -> torch.nn.Module:
    """The causal LM, partitioned while it loads, so that no rank ever holds the whole."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    dtype = getattr(torch, model.dtype)
    with _model_errors(model.path):
        config = read_config(model.path, model.overrides)
        partitioning = HfDeepSpeedConfig(settings)
        network, found = AutoModelForCausalLM.from_pretrained(
            model.path, config=config, dtype=dtype, output_loading_info=True
        )
    check_loaded(model.path, found)
    # transformers looks at this object for as long as it lives; other models of this process must load whole.
    del partitioning
    gc.collect()
    return network


@contextmanager
def _model_errors(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model.path: '{path}' cannot be loaded: {reason} Give the folder of a Hugging Face "
            "causal LM, or a hub name that is in the local cache or can be downloaded"
        ) from error


def _buckets(parameters: list[tuple[str, torch.nn.Parameter]]) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        bucket.append((name, parameter))
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
