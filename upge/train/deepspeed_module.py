"""A module under DeepSpeed ZeRO-3: loading, backward, optimizer step, sets of optimizer moments, checkpoints."""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upge.errors import ModelError, UserError
from upge.models.loading import check_loaded, read_config
from upge.train import elementwise
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.deepspeed_settings import PLAIN, DeepspeedConfig, settings
from upge.train.distributed import World
from upge.train.packed_attention import choose_kernel
from upge.train.resharding import AdamState, deepspeed_part, layout, model_file, read, reshard_states, saved_ranks
from upge.train.sample import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The key of our own state among DeepSpeed's in a checkpoint.
_STATE = "upge"


class StepResult(NamedTuple):
    """What an optimizer step did.

    Attributes:
        applied: False if the update was skipped, because the gradient was not finite or its norm above the limit.
        grad_norm: before clipping.
    """

    applied: bool
    grad_norm: float

    @property
    def norm(self) -> float:
        """The gradient's norm, infinite if the gradient was not finite."""
        return self.grad_norm if self.applied or math.isfinite(self.grad_norm) else math.inf

    @property
    def is_above_limit(self) -> bool:
        """True if the update was skipped for the norm of its gradient."""
        return not self.applied and self.norm != math.inf


class DeepSpeedModule:
    """A module's weights, gradients and AdamW, partitioned over the ranks by ZeRO-3.

    Gradients add up over `backward` calls until `step`. Each rank's loss is a part of one sum over the global batch, so
    DeepSpeed's averaging over ranks is undone here. AdamW has named sets of moments over the same weights; "main" is in
    use at first. A subclass defines the forward pass.

    Args:
        module: what is trained.
        dtype: of the forward pass, 'float32' or 'bfloat16'.
        optimizer: AdamW's settings and gradient clipping.
        lr: AdamW's learning rate until the first `step` sets another.
        world: of the run.
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
        """The optimizer steps so far, and the backward passes since the last one; a checkpoint restores the first."""
        return int(self._engine.global_steps), self._passes

    def backward(self, loss: Float[Tensor, ""], last: bool) -> None:
        """Adds the gradient of this rank's part of the loss; `last` marks the one before `step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size)
        self._passes += 1

    def step(self, lr: float, limit: float = 0.0) -> StepResult:
        """Clips and applies the gradient.

        Args:
            lr: the learning rate.
            limit: drop the gradient if its norm exceeds this; 0 = no limit. A gradient that is not finite is always
                dropped.
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

        For after `backward(..., last=True)` and instead of `step`: nothing is clipped or applied, and the next
        `backward` starts from zero. A gradient that is not finite is returned as it is.
        """
        zero, rank = self._engine.optimizer, self.world.rank
        assert self._passes and self._engine.is_gradient_accumulation_boundary(), "backward(..., last=True) comes first"
        partitions = zero.get_fp32_grad_partitions()
        taken = []
        for group, parameters in enumerate(zero.fp16_groups):
            for place, parameter in enumerate(parameters):
                size = parameter.partition_numel()
                held = min(max(parameter.ds_numel - rank * size, 0), size)
                taken.append(partitions[group][place].reshape(-1)[:held].clone())
        drop_gradient(zero)
        self._passes = 0
        return taken

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        """The dot product of two gradients from `take_gradient` over all ranks, in float64; all ranks call it."""
        products = [torch.dot(x.double(), y.double()) for x, y in zip(a, b, strict=True)]
        return sum(self.world.gather(float(torch.stack(products).sum())))

    def use_optimizer(self, name: str) -> None:
        """Switches to the moments and step count `name`; a new name starts with fresh ones."""
        self._moments.use(name)

    def reset_optimizer(self, everything: bool = False) -> None:
        """Resets the moments and the step count in use; with `everything` those of every name."""
        self._moments.reset(everything)

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Writes trained weights, all sets of optimizer moments and `state` to folder/tag; all ranks call it."""
        self._engine.save_checkpoint(
            str(folder), tag=tag, client_state={_STATE: state}, save_latest=False, exclude_frozen_parameters=True
        )
        self._moments.save(_moments_file(folder, tag, self.world.rank))

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restores what `save` wrote, on any number of ranks, and returns its `state`; all ranks call it.

        Raises:
            ModelError: the checkpoint, or a file of it, is missing or not whole.
        """
        with _reading(folder / tag):
            is_resharded = saved_ranks(folder / tag) != self.world.size
        if is_resharded:
            return self._load_resharded(folder, tag)
        with _reading(folder / tag):
            path, state = self._engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=_load_trained)
            if path is None:
                raise FileNotFoundError(folder / tag)
        moments = _moments_file(folder, tag, self.world.rank)
        with _reading(moments):
            self._moments.load(moments)
        return state[_STATE]

    def _load_resharded(self, folder: Path, tag: str) -> dict[str, Any]:
        """As `load`, from the files of another number of ranks, which DeepSpeed refuses."""
        engine, zero, rank = self._engine, self._engine.optimizer, self.world.rank
        with _reading(folder / tag):
            model, sources = read(model_file(folder / tag)), range(saved_ranks(folder / tag))
            before = layout(model["param_shapes"], len(sources))
            now = layout(engine._get_zero_param_shapes(), self.world.size)
            half = engine.bfloat16_enabled()
            files = [Path(engine._get_rank_zero_ckpt_name(str(folder), tag, 0, source, half)) for source in sources]
            part = deepspeed_part([read(file)["optimizer_state_dict"] for file in files], before, now, rank)
            moments = [read(_moments_file(folder, tag, source)) for source in sources]
            idle = {
                name: reshard_states([of_rank["idle"][name] for of_rank in moments], before, now, rank)
                for name in moments[0]["idle"]
            }
        zero.checkpoint_event_prologue()
        with _reading(folder / tag):
            _load_trained(model["module"], engine.module)
        zero.load_state_dict({rank: part})
        zero.checkpoint_event_epilogue()
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, counter, model[counter])
        self._moments.restore(moments[0]["in_use"], idle)
        return model[_STATE]


def _moments_file(folder: Path, tag: str, rank: int) -> Path:
    return folder / tag / f"moments_rank_{rank}.pt"


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Loads a checkpoint's weights, which are those that are trained; DeepSpeed gives the arguments by name."""
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    missing, unexpected = dst.load_state_dict(src, strict=False)
    if unexpected or trained & set(missing):
        raise KeyError(*unexpected, *missing)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises ModelError if the checkpoint, or the file of one, that is read inside is missing or not whole."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError, KeyError, ValueError, EOFError, UnpicklingError) as error:
        # DeepSpeed asserts that the files exist, hence AssertionError.
        raise ModelError(f"{path}: the checkpoint cannot be read; remove it to resume from an older one") from error


def load_causal_lm(
    model: ModelConfig, world: World, key: str = "model.path", deepspeed: DeepspeedConfig = PLAIN
) -> PreTrainedModel:
    """Loads a causal LM, partitioned on the way, so that no rank ever holds the whole.

    Raises:
        ModelError: it cannot be loaded or is not complete. `key` is the setting that gave `model.path`, for messages.
        ConfigError: an override that its configuration does not have.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    dtype = getattr(torch, model.dtype)
    with _model_errors(model.path, key):
        config = read_config(model.path, model.overrides)
        # With selective checkpointing, torch's function keeps gathered weights during a layer's backward pass only.
        own_linear = model.gradient_checkpointing != "selective"
        partitioning = HfDeepSpeedConfig(settings(model.dtype, world, deepspeed, own_linear=own_linear))
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # the pair is not in its signature
            model.path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        network, loading_info = loaded
        check_loaded(model.path, loading_info)
    choose_kernel(world.device)
    if world.device.type in elementwise.DEVICES:
        elementwise.compile_elementwise(network)
    # transformers partitions models as long as this object lives; other models of this process must load whole.
    del partitioning
    gc.collect()
    return network


def vocabulary_size(network: PreTrainedModel) -> int:
    """Number of tokens that the model has embeddings for; partitioned or not."""
    return cast(nn.Embedding, network.get_input_embeddings()).num_embeddings


def check_tokens(trajectories: Sequence[TokenIds], vocabulary: int, key: str) -> None:
    """Checks that a model has an embedding for every token of the (prompt_ids, response_ids) pairs.

    Raises:
        ModelError: it has not; `key` is the setting that gave the model.
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
        # The functions that read models name the policy's key.
        raise error.with_key(key) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{key}: '{path}' cannot be loaded: {reason} Give the folder of a Hugging Face "
            "causal LM, or a hub name that is in the local cache or can be downloaded"
        ) from error


# The internals of DeepSpeed's ZeRO-3 optimizer, used here and in `take_gradient`: `fp16_groups` are the parameters in
# sub-groups (of any dtype); AdamW updates the flat float32 partitions, and its moments belong to these.

#: The set of moments that is in use at first.
FIRST = "main"


def drop_gradient(zero: Any) -> None:
    """Drops the gradient so far: the next backward pass starts from zero."""
    zero.zero_grad()
    zero.averaged_gradients = {}
    zero.grad_partitions_flat_buffer.zero_()
    if zero.offload_optimizer:
        # The last backward pass has copied the gradient to AdamW's partitions, and noted the norms of its parts.
        zero.reset_cpu_buffers()
        for partition in zero.fp32_partitioned_groups_flat:
            partition.grad.zero_()


def gradient_norm(zero: Any) -> float:
    """The global norm of the gradient so far, before clipping; after the last backward pass, on all ranks."""
    groups = zero._get_norm_groups()
    return float(torch.stack([norm.double() for norm in groups]).norm()) if min(groups) >= 0 else float("nan")


class Moments:
    """Named sets of AdamW's moments and step counts in DeepSpeed's stage 3 optimizer `zero`, one of them in use.

    The other sets stay on the device, so each set takes as much memory as the first: 8 bytes per weight over all ranks.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._idle: dict[str, Any] = {}
        self.in_use = FIRST

    def use(self, name: str) -> None:
        """Puts the set `name` in use; a new name starts with fresh moments."""
        if name == self.in_use:
            return
        self._idle[self.in_use] = self._zero.state
        self._zero.state = self._idle.pop(name, defaultdict(dict))
        self.in_use = name

    def reset(self, everything: bool = False) -> None:
        """Resets the moments and steps of the set in use; with `everything` it also drops all other sets."""
        if everything:
            self._idle = {}
        self._zero.state = defaultdict(dict)

    def save(self, path: Path) -> None:
        """Writes this rank's idle sets and the name of the set in use, which is in DeepSpeed's own checkpoint."""
        flat = self._zero.fp32_partitioned_groups_flat
        idle = {name: [dict(state.get(partition, {})) for partition in flat] for name, state in self._idle.items()}
        torch.save({"in_use": self.in_use, "idle": idle}, path)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote; DeepSpeed must have restored the set in use before."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.restore(saved["in_use"], saved["idle"])

    def restore(self, in_use: str, idle: Mapping[str, Sequence[AdamState]]) -> None:
        """Restores the idle sets, one state per sub-group, and the name of the set in use."""
        flat = self._zero.fp32_partitioned_groups_flat
        self._idle = {}
        for name, states in idle.items():
            self._idle[name] = defaultdict(dict)
            for partition, state in zip(flat, states, strict=True):
                if state:
                    self._idle[name][partition] = {k: _placed(k, v, partition) for k, v in state.items()}
        self.in_use = in_use


def _placed(key: str, value: Tensor, partition: Tensor) -> Tensor:
    """The state on the partition's device, except the step count, which AdamW keeps on the CPU."""
    return value if key == "step" else value.to(partition.device)
