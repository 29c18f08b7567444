"""verl: the update of its actor where it has one (to 0.7), else its registered policy losses, and its advantages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.referee.frameworks.cases import (
    CISPO,
    DR_GRPO,
    GMPO,
    GRPO,
    GSPO,
    SAPO,
    SEQUENCE_MEAN,
    TOKEN_MEAN,
    named,
)
from experiments.referee.protocol import LIMIT, Case, Micro, MissingLossError, Update, each
from experiments.referee.stand_in import Bag

DISTRIBUTION, PACKAGES = "verl", ("verl",)
#: Versions that are judged by default, oldest first.
VERSIONS = ("0.3.0.post1", "0.5.0", "0.7.1", "0.9.1")
SUPPLIED = (
    "the actor's attributes and configuration, its forward pass (log-probs), old log-probs, a batch with the methods "
    "of DataProto; from 0.8 on also what the engine counts: tokens and rollouts of the update and the number of ranks. "
    "Advantages of GRPO are verl's own (compute_grpo_outcome_advantage)"
)
_DUAL = ("terms.rl.estimator.mask.dual=3.0",)


def cases() -> list[Case]:
    """What is compared; a version that does not have a loss refuses it."""
    vanilla = {"loss_mode": "vanilla", "low": 0.2, "high": 0.2}
    return [
        named("vanilla, token-mean", GRPO, {**vanilla, "agg": "token-mean"}, extra=TOKEN_MEAN + _DUAL),
        named("vanilla, seq-mean-token-mean", GRPO, {**vanilla, "agg": "seq-mean-token-mean"},
              extra=SEQUENCE_MEAN + _DUAL),
        named("vanilla, seq-mean-token-sum-norm", DR_GRPO, {**vanilla, "agg": "seq-mean-token-sum-norm", "std": False},
              extra=_DUAL),
        named("gspo, seq-mean-token-mean", GSPO, _mode("gspo", "seq-mean-token-mean", 3e-4, 4e-4)),
        named("sapo", SAPO, _mode("sapo", "seq-mean-token-mean", 0.2, 0.2)),
        named("geo_mean", GMPO, _mode("geo_mean", "seq-mean-token-mean", 0.4, 0.4)),
        named("cispo, clip_ratio_high=4", CISPO, _mode("cispo", "token-mean", 1.0, 4.0)),
    ]  # fmt: skip


def _mode(loss_mode: str, agg: str, low: float, high: float) -> dict[str, Any]:
    return {"loss_mode": loss_mode, "agg": agg, "low": low, "high": high}


def _has_actor() -> bool:
    try:
        return importlib.util.find_spec("verl.workers.actor.dp_actor") is not None
    except ModuleNotFoundError:
        return False


def called(case: Case) -> str:
    """The name of the judged function."""
    if _has_actor():
        return "verl.workers.actor.dp_actor.DataParallelPPOActor.update_policy"
    return f"verl.trainer.ppo.core_algos.get_policy_loss_fn({case.settings['loss_mode']!r})"


def update(case: Case) -> Update:
    """The forward and backward passes of a process."""
    # Versions that know only CUDA call the first, and a decorator that logs memory calls the others.
    torch.cuda.current_device = lambda: "cpu"
    for name, value in (("memory_allocated", 0), ("memory_reserved", 0), ("mem_get_info", (0, 0))):
        setattr(torch.cpu, name, lambda *arguments, value=value: value)
    return _actor_update(case.settings) if _has_actor() else each(_registered(case.settings))


def advantages(micro: Micro, standard: bool) -> Tensor:
    """[b, T] verl's advantages of GRPO. A micro-batch holds whole groups."""
    function = importlib.import_module("verl.trainer.ppo.core_algos").compute_grpo_outcome_advantage
    last = micro.mask.sum(dim=1, keepdim=True) - 1
    scores = torch.zeros_like(micro.old_logprobs).scatter_(1, last, micro.rewards[:, None])
    options = {"norm_adv_by_std_in_grpo": standard}
    known = inspect.signature(function).parameters
    return function(scores, micro.mask, micro.group.numpy(), **{k: v for k, v in options.items() if k in known})[0]


def config(settings: dict[str, Any], micro: Micro) -> Any:
    """The actor's configuration, an object of verl's class if there is one."""
    rows = len(micro.mask)
    values: dict[str, Any] = {
        "clip_ratio": settings["low"],
        "clip_ratio_low": settings["low"],
        "clip_ratio_high": settings["high"],
        "clip_ratio_c": 3.0,
        "loss_agg_mode": settings["agg"],
        "policy_loss": Bag(loss_mode=settings["loss_mode"]),
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "entropy_coeff": 0.0,
        "ppo_epochs": 1,
        "ppo_mini_batch_size": rows * micro.layout.micro_batches,
        "ppo_micro_batch_size_per_gpu": rows,
        "ulysses_sequence_parallel_size": 1,
        "loss_scale_factor": LIMIT,
        "use_rollout_log_probs": True,  # else 0.7 takes a single mini-batch as on-policy, and the ratio as 1
        "global_batch_info": {},
    }
    base: type = object
    if importlib.util.find_spec("verl.workers.config") is not None:
        base = importlib.import_module("verl.workers.config").ActorConfig
    made = object.__new__(type("ActorConfig", (base,), {"__getattr__": lambda self, name: None, "get": Bag.get}))
    made.__dict__.update(values)
    return made


def _registered(settings: dict[str, Any]) -> Any:
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    function = core.get_policy_loss_fn(settings["loss_mode"])

    def loss(micro: Micro) -> Tensor:
        own = config(settings, micro)
        own.__dict__["global_batch_info"] = {
            "dp_size": micro.layout.ranks,
            "batch_num_tokens": micro.tokens,
            "global_batch_size": micro.rollouts,
            "loss_scale_factor": LIMIT,
        }
        return function(
            old_log_prob=micro.old_logprobs,
            log_prob=micro.logprobs,
            advantages=advantages(micro, settings.get("std", True)),
            response_mask=micro.mask,
            loss_agg_mode=settings["agg"],
            config=own,
        )[0]

    return loss


class Rows(dict):
    """A batch with the methods of verl's DataProto and of a TensorDict that `update_policy` calls."""

    meta_info: dict[str, Any] = {"temperature": 1.0}  # noqa: RUF012
    non_tensor_batch: dict[str, Any] = {}  # noqa: RUF012

    @property
    def batch(self) -> Rows:
        """The tensors."""
        return self

    def select(self, *names: Any, **options: Any) -> Rows:
        """The batch."""
        return self

    def to(self, device: Any) -> Rows:
        """The batch."""
        return self

    def split(self, size: int) -> list[Rows]:
        """The batch in parts of `size` rows."""
        parts = [value.split(size) for value in self.values()]
        return [Rows(zip(self, some, strict=True)) for some in zip(*parts, strict=True)]


def _actor_update(settings: dict[str, Any]) -> Update:
    module = importlib.import_module("verl.workers.actor.dp_actor")
    cls = module.DataParallelPPOActor
    source = inspect.getsource(module)  # not of the method, which a decorator hides
    if settings["loss_mode"] != "vanilla":
        if "get_policy_loss_fn" not in source:
            raise MissingLossError("this version has one loss only")
        module.get_policy_loss_fn(settings["loss_mode"])
    if settings["agg"] != "token-mean" and "loss_agg_mode" not in source:
        raise MissingLossError("this version has no loss_agg_mode")
    as_table = "outputs = self._forward_micro_batch" in source

    def run(micros: Sequence[Micro]) -> None:
        def forward(micro_batch: Any, **options: Any) -> Any:
            logprobs = micros[int(micro_batch["micro"][0])].logprobs
            entropy = torch.zeros_like(logprobs)
            return {"log_probs": logprobs, "entropys": entropy} if as_table else (entropy, logprobs)

        own = config(settings, micros[0])
        made = object.__new__(type(cls.__name__, (cls,), {"__getattr__": lambda self, name: None}))
        made.__dict__.update(
            config=own,
            actor_module=nn.Linear(1, 1),
            actor_optimizer=Bag(zero_grad=lambda **options: None),
            _forward_micro_batch=forward,
            _optimizer_step=lambda: torch.zeros(()),
            ulysses_sequence_parallel_size=1,
        )
        made.update_policy(_rows(micros, settings))

    return run


def _rows(micros: Sequence[Micro], settings: dict[str, Any]) -> Rows:
    mask = torch.cat([m.mask for m in micros])
    number = torch.cat([torch.full((len(m.mask),), i) for i, m in enumerate(micros)])
    return Rows(
        micro=number,
        responses=torch.zeros_like(mask, dtype=torch.long),
        response_mask=mask,
        attention_mask=mask,
        input_ids=mask,
        position_ids=mask,
        old_log_probs=torch.cat([m.old_logprobs for m in micros]),
        advantages=torch.cat([advantages(m, settings.get("std", True)) for m in micros]),
    )
