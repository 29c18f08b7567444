"""What all models in training share: loading in parts, DeepSpeed's configuration, backward, step, save and load."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upge.errors import ModelError, UserError
from upge.models.loading import check_loaded, read_config
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import World
from upge.train.moments import Moments, drop_gradient, gradient_norm, take_gradient

#: The key of our own state among DeepSpeed's in a checkpoint.
_STATE = "upge"


class StepResult(NamedTuple):
    """What an optimizer update did: `applied` is False if the update was skipped, because the gradient was not finite
    or its norm, which is that before clipping, above the limit."""

    applied: bool
    grad_norm: float


class TrainedModule:
    """A module's weights, gradients and AdamW, partitioned over the ranks by ZeRO-3.

    Gradients add up over `backward` calls until `step`: each rank's loss is a part of one sum over the global batch, so
    the averaging over ranks that DeepSpeed does is undone here. AdamW has named sets of moments over the same weights,
    "main" at first, one of them in use. Abstract: a subclass says what is computed.
    """

    def __init__(self, module: nn.Module, dtype: str, optimizer: OptimizerConfig, lr: float, world: World) -> None:
        import deepspeed

        self.world = world
        parameters = [p for p in module.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(
            parameters, lr=lr, betas=(optimizer.beta1, optimizer.beta2), weight_decay=optimizer.weight_decay
        )
        configuration = settings(dtype, world, optimizer.max_grad_norm)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=configuration)
        self._moments = Moments(self._engine.optimizer)

    def backward(self, loss: Float[Tensor, ""], last: bool) -> None:
        """Adds the gradient of this rank's part of the loss; `last` marks the one before `step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size)

    def step(self, lr: float, limit: float = 0.0) -> StepResult:
        """Clips and applies the gradient with learning rate `lr`; a gradient that is not finite is dropped, and, where
        there is a `limit`, one whose norm exceeds it."""
        if limit and (norm := gradient_norm(self._engine.optimizer)) > limit:
            drop_gradient(self._engine.optimizer)
            return StepResult(False, norm)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return StepResult(bool(self._engine.was_step_applied()), float(self._engine.get_global_grad_norm()))

    def take_gradient(self) -> list[Tensor]:
        """This rank's part of the gradient so far, float32, one tensor per parameter; all ranks call it.

        For after `backward(..., last=True)` and instead of `step`: nothing is clipped or applied, and the next
        `backward` starts from zero. A gradient that is not finite is returned as it is.
        """
        return take_gradient(self._engine.optimizer, self.world.rank)

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        """The dot product of two gradients from `take_gradient` over all ranks, in float64; all ranks call it."""
        products = [torch.dot(x.double(), y.double()) for x, y in zip(a, b, strict=True)]
        return sum(self.world.gather(float(torch.stack(products).sum())))

    def use_optimizer(self, name: str) -> None:
        """Updates from now on use the moments and step count `name`; a new name starts with none."""
        self._moments.use(name)

    def reset_optimizer(self, everything: bool = False) -> None:
        """Forgets the moments and the step count in use; with `everything` those of every name."""
        self._moments.reset(everything)

    def _save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Writes folder/tag: DeepSpeed's files and one of this rank's own beside them."""
        self._engine.save_checkpoint(str(folder), tag=tag, client_state={_STATE: state}, save_latest=False)
        self._moments.save(self._moments_file(folder, tag))

    def _load(self, folder: Path, tag: str) -> dict[str, Any]:
        with _reading(folder / tag):
            path, state = self._engine.load_checkpoint(str(folder), tag=tag)
            if path is None:
                raise FileNotFoundError(folder / tag)
        moments = self._moments_file(folder, tag)
        with _reading(moments):
            self._moments.load(moments)
        return state[_STATE]

    def _moments_file(self, folder: Path, tag: str) -> Path:
        return folder / tag / f"moments_rank_{self.world.rank}.pt"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Around the reading of a checkpoint, or of a file of one: raises ModelError where it is missing or not whole."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError, KeyError, ValueError, EOFError, UnpicklingError) as error:
        # DeepSpeed only asserts that there are files.
        raise ModelError(f"{path}: the checkpoint cannot be read; remove it to resume from an older one") from error


def settings(dtype: str, world: World, max_grad_norm: float = 0.0) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch sizes are formal: micro-batches are cut here, by tokens."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Else a bfloat16 model's gradients would be added up in bfloat16, where later parts count less and less.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def load_causal_lm(model: ModelConfig, world: World, key: str = "model.path") -> nn.Module:
    """The causal LM, partitioned while it loads, so that no rank ever holds the whole.

    Args:
        key: the setting that gave model.path, for messages.

    Raises:
        ModelError: it cannot be loaded or is not complete.
        ConfigError: an override that its configuration does not have.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    dtype = getattr(torch, model.dtype)
    with _model_errors(model.path, key):
        config = read_config(model.path, model.overrides)
        partitioning = HfDeepSpeedConfig(settings(model.dtype, world))
        network, found = AutoModelForCausalLM.from_pretrained(
            model.path, config=config, dtype=dtype, output_loading_info=True
        )
        check_loaded(model.path, found)
    # transformers looks at this object for as long as it lives; other models of this process must load whole.
    del partitioning
    gc.collect()
    return network


def checkpoint_activations(network: nn.Module) -> None:
    """Lets the backward pass recompute the activations of each layer instead of keeping them."""
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.config.use_cache = False


def check_tokens(trajectories: Sequence[tuple[Sequence[int], Sequence[int]]], vocabulary: int, key: str) -> None:
    """Raises ModelError if the model that the setting `key` gave has no embedding for a token of the trajectories."""
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
        # What reads models knows them by the policy's key.
        raise error.with_key(key) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{key}: '{path}' cannot be loaded: {reason} Give the folder of a Hugging Face "
            "causal LM, or a hub name that is in the local cache or can be downloaded"
        ) from error
