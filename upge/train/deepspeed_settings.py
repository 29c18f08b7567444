"""DeepSpeed's configuration: what the trainer sets, offloading, and the keys that a run may add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from upge.config import Settings, key
from upge.errors import ConfigError, nearest

if TYPE_CHECKING:
    from upge.train.distributed import World

_SECONDARY = "zero_hpz_partition_size"
_ZERO, _PARAMETERS, _OPTIMIZER = "zero_optimization", "offload_param", "offload_optimizer"
#: Keys that `deepspeed.config` may have, by section. None of them changes the gradient, apart from rounding: buckets of
#: another size are summed in another order.
ALLOWED: Mapping[str, frozenset[str]] = {
    "": frozenset(
        "zero_optimization comms_logger flops_profiler wall_clock_breakdown memory_breakdown dump_state steps_per_print"
        " aio".split()
    ),
    _ZERO: frozenset(
        "reduce_bucket_size allgather_bucket_size overlap_comm sub_group_size zero_hpz_partition_size"
        " stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold"
        " stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold"
        " stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential log_trace_cache_warnings"
        " offload_param offload_optimizer".split()
    ),
    f"{_ZERO}.{_PARAMETERS}": frozenset("buffer_count buffer_size max_in_cpu pin_memory".split()),
    f"{_ZERO}.{_OPTIMIZER}": frozenset("buffer_count pin_memory".split()),
}
#: Keys that this trainer sets, and what to do instead of giving them.
OWNED: Mapping[str, str] = {
    "train_batch_size": "set prompts_per_step and group_size",
    "train_micro_batch_size_per_gpu": "set optimizer.micro_batch_tokens",
    "gradient_accumulation_steps": "set optimizer.micro_batch_tokens",
    "managed_gradient_accumulation": "set optimizer.micro_batch_tokens",
    "gradient_clipping": "set optimizer.max_grad_norm",
    "optimizer": "set optimizer.lr, optimizer.beta1 and the other settings of AdamW",
    "scheduler": "set optimizer.schedule and optimizer.warmup_steps",
    "bf16": "set model.dtype",
    "fp16": "set model.dtype",
    "amp": "set model.dtype",
    "torch_autocast": "set model.dtype",
    "data_types": "gradients always add up in float32",
    "communication_data_type": "gradients are always summed over ranks in float32",
    "activation_checkpointing": "set model.gradient_checkpointing",
    f"{_ZERO}.stage": "the stage is always 3",
    f"{_ZERO}.{_PARAMETERS}.device": "set deepspeed.offload",
    f"{_ZERO}.{_OPTIMIZER}.device": "set deepspeed.offload",
    f"{_ZERO}.cpu_offload": "set deepspeed.offload",
    f"{_ZERO}.cpu_offload_param": "set deepspeed.offload",
}


@dataclass(frozen=True)
class DeepspeedConfig(Settings):
    """What is kept in CPU memory instead of GPU memory, and additional settings of DeepSpeed."""

    offload: Literal["none", "optimizer", "all"] = key(
        "none", "what stays in CPU memory: optimizer = AdamW's states and the master weights; all = also the weights"
    )
    config: dict = key(
        {}, "additional DeepSpeed settings, such as {zero_optimization: {reduce_bucket_size: 100000000}}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_keys(self.config)
        zero = self.config.get(_ZERO, {})
        for name, needed in ((_PARAMETERS, ("all",)), (_OPTIMIZER, ("optimizer", "all"))):
            if zero.get(name) and self.offload not in needed:
                raise ConfigError(
                    f"{_ZERO}.{name} has no effect with deepspeed.offload={self.offload}; remove it, or set "
                    f"deepspeed.offload={needed[0]}",
                    "config",
                )

    @property
    def secondary_partition(self) -> int:
        """The ranks over which ZeRO++ (arXiv 2306.10209) keeps a second copy of the weights; 1 = no copy."""
        size = self.config.get(_ZERO, {}).get(_SECONDARY, 1)
        return max(size, 1) if isinstance(size, int) else 1


def _check_keys(tree: Mapping[str, Any], path: str = "") -> None:
    """Refuse keys that are set elsewhere, may change the gradient, or do not exist."""
    for name, value in tree.items():
        where = f"{path}.{name}" if path else str(name)
        if where in OWNED:
            raise ConfigError(f"'{where}' cannot be given here; {OWNED[where]}", "config")
        if name not in ALLOWED[path]:
            raise ConfigError(
                f"'{where}' does not exist or may change the gradient; {nearest(str(name), ALLOWED[path])}", "config"
            )
        if where in ALLOWED:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: found {value!r}, expected a mapping", "config")
            _check_keys(value, where)


#: Nothing offloaded, nothing added.
PLAIN = DeepspeedConfig()


def settings(
    dtype: str,
    world: World,
    deepspeed: DeepspeedConfig = PLAIN,
    max_grad_norm: float = 0.0,
    own_linear: bool = True,
) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch sizes are placeholders, because micro-batches are cut by a token budget.

    Args:
        dtype: the forward pass's precision.
        world: the run's processes.
        deepspeed: what is offloaded, and additional settings.
        max_grad_norm: clip gradients to this norm; 0 = no clipping.
        own_linear: whether DeepSpeed may replace torch's linear function with one that does not keep gathered weights.

    Raises:
        ConfigError: DeepSpeed refuses a value of `deepspeed.config`.
    """
    secondary = deepspeed.secondary_partition
    if world.size % min(secondary, world.size):
        raise ConfigError(
            f"{_ZERO}.{_SECONDARY}: found {secondary}, which does not divide the {world.size} ranks; give a divisor, "
            "such as the ranks of a node",
            "deepspeed.config",
        )
    return {
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **{name: value for name, value in deepspeed.config.items() if name != _ZERO},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        # In bfloat16, the contributions of late micro-batches, and of some ranks, would be rounded away.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {**zero_settings(deepspeed), "memory_efficient_linear": own_linear},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def zero_settings(deepspeed: DeepspeedConfig) -> dict[str, Any]:
    """The section `zero_optimization`.

    Raises:
        ConfigError: DeepSpeed refuses a value of `deepspeed.config`.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    zero = {**deepspeed.config.get(_ZERO, {}), "stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    moved = {"none": (), "optimizer": (_OPTIMIZER,), "all": (_OPTIMIZER, _PARAMETERS)}[deepspeed.offload]
    for name in moved:
        zero[name] = {"pin_memory": True, **zero.get(name, {}), "device": "cpu"}
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (_ZERO, *first["loc"])))
        raise ConfigError(
            f"{place}: found {first['input']!r}; DeepSpeed says: {first['msg']}", "deepspeed.config"
        ) from error
    return zero
