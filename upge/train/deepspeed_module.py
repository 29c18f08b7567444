"""A module under DeepSpeed ZeRO-3: loading, backward, optimizer step, checkpoints."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from upge.errors import ModelError, StorageError, UserError, is_out_of_memory
from upge.models.loading import check_finite, check_loaded, read_config
from upge.train import elementwise
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.deepspeed_settings import PLAIN, DeepspeedConfig, settings
from upge.train.distributed import World
from upge.train.files import disk_errors
from upge.train.moments import Moments, drop_gradient, gradient_norm
from upge.train.packed_attention import choose_kernel
from upge.train.resharding import (
    Layout,
    deepspeed_part,
    layout,
    model_file,
    optimizer_file,
    read,
    reading,
    reshard_states,
)
from upge.train.sample import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The key of this class's own state in DeepSpeed's checkpoint.
_STATE = "upge"


class StepResult(NamedTuple):
    """What an optimizer step did.

    Attributes:
        applied: False if the update was skipped, because the gradient was not finite or its norm above the limit.
        grad_norm: the gradient's norm before clipping.
    """

    applied: bool
    grad_norm: float

    @property
    def norm(self) -> float:
        """The gradient's norm, infinite if the gradient was not finite."""
        return self.grad_norm if self.applied or math.isfinite(self.grad_norm) else math.inf

    @property
    def is_above_limit(self) -> bool:
        """True if the update was skipped because its gradient norm was above the limit."""
        return not self.applied and self.norm != math.inf


class DeepSpeedModule:
    """A module's weights, gradients and AdamW, partitioned over the ranks by ZeRO-3.

    Gradients add up over `backward` calls until `step`. Each rank's loss is a part of one sum over the global batch, so
    this class undoes DeepSpeed's averaging over ranks. AdamW has named sets of moments for the same weights; the set
    "main" is in use at first. A subclass defines the forward pass.

    Args:
        module: the module to train.
        dtype: the forward pass's precision, 'float32' or 'bfloat16'.
        optimizer: AdamW's settings and gradient clipping.
        lr: AdamW's learning rate until the first `step` sets another.
        world: the run's processes.
        deepspeed_config: what is offloaded, and additional settings of DeepSpeed.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: str,
        optimizer: OptimizerConfig,
        lr: float,
        world: World,
        deepspeed_config: DeepspeedConfig = PLAIN,
    ) -> None:
        import deepspeed

        self.world = world
        parameters, betas = [p for p in module.parameters() if p.requires_grad], (optimizer.beta1, optimizer.beta2)
        # On CPU partitions of GPU models, one fused pass over memory is several times faster.
        fused = True if deepspeed_config.offload != "none" else None
        adamw = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=optimizer.weight_decay, fused=fused)
        configuration = settings(dtype, world, deepspeed_config, optimizer.max_grad_norm)
        engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=configuration)
        self._engine: Any = engine  # its methods and its optimizer's are not typed
        self._moments = Moments(self._engine.optimizer)
        self._passes = 0

    @property
    def position(self) -> tuple[int, int]:
        """(optimizer steps so far, backward passes since the last one); a checkpoint restores only the first number."""
        return int(self._engine.global_steps), self._passes

    def backward(self, loss: Float[Tensor, ""], last: bool) -> None:
        """Add the gradient of this rank's part of the loss; `last` marks the last call before `step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size)
        self._passes += 1

    def step(self, lr: float, limit: float = 0.0) -> StepResult:
        """Clip and apply the gradient; one that is not finite is dropped.

        Args:
            lr: the learning rate.
            limit: also drop the gradient if its norm exceeds this; 0 = no limit.
        """
        self._passes = 0
        if limit and (norm := gradient_norm(self._engine.optimizer)) > limit:
            drop_gradient(self._engine.optimizer)
            return StepResult(False, norm)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return StepResult(bool(self._engine.was_step_applied()), float(self._engine.get_global_grad_norm()))

    def take_gradient(self) -> list[Tensor]:
        """This rank's part of the gradient so far, float32, unpadded, one tensor per parameter; all ranks call it.

        Call it after `backward(..., last=True)`, instead of `step`. Nothing is clipped or applied, and the next
        `backward` starts from zero. A gradient that is not finite is returned unchanged.
        """
        zero, rank = self._engine.optimizer, self.world.rank
        assert self._passes and self._engine.is_gradient_accumulation_boundary(), "backward(..., last=True) comes first"
        partitions = zero.get_fp32_grad_partitions()
        taken = []
        for group, parameters in enumerate(zero.fp16_groups):
            for place, parameter in enumerate(parameters):
                taken.append(partitions[group][place].reshape(-1)[: _held(parameter, rank)].clone())
        self.drop_gradient()
        return taken

    def drop_gradient(self) -> None:
        """Drop the gradient so far, so that the next `backward` starts from zero; call this instead of `step`."""
        if self._passes:
            drop_gradient(self._engine.optimizer)
            self._passes = 0

    def is_finite(self) -> bool:
        """Whether the sum of the squares of this rank's weights is finite in float32.

        It is not if a weight is NaN or infinite, or so large that the squares in the model's norms overflow. This reads
        4 bytes per weight of the rank, where an AdamW step reads and writes 28.
        """
        zero, products = self._engine.optimizer, []
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            start = 0
            for parameter in parameters:
                # Without the padding of a partition, which has no defined content.
                part = flat.detach()[start : start + _held(parameter, self.world.rank)]
                products.append(torch.dot(part, part))
                start += parameter.partition_numel()
        return bool(torch.stack(products).sum().isfinite())

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        """The dot product of two gradients from `take_gradient` over all ranks, in float64; all ranks call it."""
        products = [torch.dot(x.double(), y.double()) for x, y in zip(a, b, strict=True)]
        return sum(self.world.gather(float(torch.stack(products).sum())))

    def use_optimizer(self, name: str) -> None:
        """Switch to the moments and step count `name`; a new name starts with fresh ones."""
        self._moments.use(name)

    def reset_optimizer(self, everything: bool = False) -> None:
        """Reset the moments and the step count in use; with `everything` those of every name."""
        self._moments.reset(everything)

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write trained weights, all sets of optimizer moments and `state` to folder/tag; all ranks call it.

        Raises:
            StorageError: a rank could not write a file; all ranks raise it.
        """
        from deepspeed.runtime.zero.config import ZeroStageEnum

        errors: list[StorageError] = []

        def write(state_dict: Any, path: str | Path) -> None:
            try:
                with disk_errors(Path(path)):
                    torch.save(state_dict, path)
            except StorageError as error:
                errors.append(error)

        # An error of this rank is raised only after DeepSpeed's last collective, which needs every rank.
        self._engine.checkpoint_engine.save = write
        # Some versions of Python would pickle the enum with `getattr`, which weights-only loading refuses.
        type.__setattr__(ZeroStageEnum, "__reduce_ex__", lambda stage, protocol: (type(stage), (int(stage),)))
        # DeepSpeed's recovery script would read a checkpoint without checking it.
        self._engine._copy_recovery_script = lambda folder: None
        with self.world.together(), disk_errors(folder / tag):
            (folder / tag).mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(
            str(folder), tag=tag, client_state={_STATE: state}, save_latest=False, exclude_frozen_parameters=True
        )
        write(self._moments.state(), _moments_file(folder, tag, self.world.rank))
        with self.world.together():
            if errors:
                raise errors[0]

    @property
    def checkpoint_bytes(self) -> int:
        """The size of this rank's part of a checkpoint: master weights and all sets of moments."""
        elements = sum(flat.numel() for flat in self._engine.optimizer.fp32_partitioned_groups_flat)
        return 4 * elements * (1 + 2 * self._moments.count)

    @property
    def zero(self) -> Any:
        """DeepSpeed's stage 3 optimizer, with this rank's parts of the weights."""
        return self._engine.optimizer

    def layouts(self, model: Mapping[str, Any]) -> tuple[Layout, Layout]:
        """The layout of a checkpoint, from the content of its model file, and that of this run's ranks."""
        before = layout(model["param_shapes"], int(model["dp_world_size"]))
        return before, layout(self._engine._get_zero_param_shapes(), self.world.size)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restore what `save` wrote, on any number of ranks, and return its `state`; all ranks call it.

        Raises:
            ModelError: the checkpoint or one of its files is missing, incomplete, or holds objects other than tensors
                and plain values; all ranks raise it.
        """
        engine, zero, checkpoint = self._engine, self._engine.optimizer, folder / tag
        # DeepSpeed's own loading unpickles arbitrary code, and refuses other numbers of ranks and other sub-groups.
        with self.world.together(), reading(checkpoint):
            model = read(model_file(checkpoint))
            part, in_use, idle = self._read_part(checkpoint, model)
        zero.checkpoint_event_prologue()
        with reading(checkpoint):
            _load_trained(model["module"], engine.module)
        # The choice of AdamW's implementation follows this run's offloading, not that of the run that saved.
        present = {name: value for name, value in zero.optimizer.param_groups[0].items() if name != "params"}
        for group in part["optimizer_state_dict"]["param_groups"]:
            group.update(present)
        zero.load_state_dict({self.world.rank: part})
        zero.checkpoint_event_epilogue()
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, counter, model[counter])
        self._moments.restore(in_use, idle)
        return model[_STATE]

    def _read_part(self, checkpoint: Path, model: Mapping[str, Any]) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """This rank's part of the optimizer's state, the name of the set in use, and the idle sets."""
        rank, folder, tag = self.world.rank, checkpoint.parent, checkpoint.name
        before, now = self.layouts(model)
        if before.is_same(now):
            # Not memory-mapped: AdamW keeps using these tensors, and the file may be removed.
            shard = read(optimizer_file(checkpoint, rank), mapped=False)["optimizer_state_dict"]
            moments = read(_moments_file(folder, tag, rank), mapped=False)
            return shard, moments["in_use"], moments["idle"]
        sources = range(before.ranks)
        shards = [read(optimizer_file(checkpoint, source))["optimizer_state_dict"] for source in sources]
        of_ranks = [read(_moments_file(folder, tag, source)) for source in sources]
        idle = {
            name: reshard_states([moments["idle"][name] for moments in of_ranks], before, now, rank)
            for name in of_ranks[0]["idle"]
        }
        return deepspeed_part(shards, before, now, rank), of_ranks[0]["in_use"], idle


def _held(parameter: Any, rank: int) -> int:
    """The number of a parameter's elements in the partition of `rank`, without padding."""
    size = parameter.partition_numel()
    return min(max(parameter.ds_numel - rank * size, 0), size)


def _moments_file(folder: Path, tag: str, rank: int) -> Path:
    return folder / tag / f"moments_rank_{rank}.pt"


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a checkpoint's weights, which are only the trained ones; DeepSpeed passes the arguments by name."""
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    missing, unexpected = dst.load_state_dict(src, strict=False)
    if unexpected or trained & set(missing):
        raise KeyError(*unexpected, *missing)


def load_causal_lm(
    model: ModelConfig, world: World, key: str = "model.path", deepspeed: DeepspeedConfig = PLAIN
) -> PreTrainedModel:
    """Load a causal LM and partition it while loading, so that no rank ever holds the whole model.

    Args:
        key: the setting that `model.path` comes from, for messages.

    Raises:
        ModelError: the model cannot be loaded or is incomplete.
        ConfigError: an override names a key that the model's configuration does not have.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    dtype = getattr(torch, model.dtype)
    with _model_errors(model.path, key):
        config = read_config(model.path, model.overrides)
        # With selective checkpointing, torch's linear keeps gathered weights only during a layer's backward pass.
        own_linear = model.gradient_checkpointing != "selective"
        partitioning = HfDeepSpeedConfig(settings(model.dtype, world, deepspeed, own_linear=own_linear))
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # the pair is not in its signature
            model.path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        network, loading_info = loaded
        check_loaded(model.path, loading_info)
        with world.together():
            check_finite(model.path, ((name, _part(p, world.rank)) for name, p in network.named_parameters()))
    choose_kernel(world.device)
    if world.device.type in elementwise.DEVICES:
        elementwise.compile_elementwise(network)
    # transformers partitions models as long as this object lives; other models of this process must load whole.
    del partitioning
    gc.collect()
    return network


def _part(parameter: nn.Parameter, rank: int) -> Tensor:
    """This rank's part of a parameter, partitioned or not, without padding."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    begin = rank * part.numel()
    return part.reshape(-1)[: max(0, cast(Any, parameter).ds_numel - begin)]


def vocabulary_size(network: PreTrainedModel) -> int:
    """The number of tokens that the model, partitioned or not, has embeddings for."""
    return cast(nn.Embedding, network.get_input_embeddings()).num_embeddings


def check_tokens(trajectories: Sequence[TokenIds], vocabulary: int, key: str) -> None:
    """Check that a model has an embedding for every token of the (prompt_ids, response_ids) pairs.

    Raises:
        ModelError: a token has no embedding; the message names `key`, the setting that the model comes from.
    """
    highest = max((token for pair in trajectories for ids in pair for token in ids), default=0)
    if highest >= vocabulary:
        raise ModelError(
            f"{key}: this model knows {vocabulary} tokens and got token {highest}; give one with the policy's tokenizer"
        )


@contextmanager
def _model_errors(path: str, key: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if error.key != "model.path":
            raise
        # The functions that read models always name the policy's key.
        raise error.with_key(key) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{key}: '{path}' cannot be loaded: {reason} Give the folder of a Hugging Face "
            "causal LM, or a hub name that is in the local cache or can be downloaded"
        ) from error
