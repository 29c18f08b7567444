"""OpenRLHF: its policy loss and its SFT loss, with the counts that its trainers give them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from experiments.referee.frameworks.cases import GRPO, GSPO, SFT, TOKEN_MEAN, named
from experiments.referee.protocol import Case, Micro, MissingLossError, Update
from experiments.referee.stand_in import Bag

DISTRIBUTION, PACKAGES = "openrlhf", ("openrlhf",)
#: Versions that are judged by default, oldest first.
VERSIONS = ("0.8.0", "0.10.0", "0.11.2")
SUPPLIED = (
    "log-probs, old log-probs, advantages, and DeepSpeed's division by the number of micro-batches; where the version "
    "has iter_grad_accum_global_norm, it counts the tokens, and the sums over ranks that it asks for are supplied. The "
    "loop of the trainers around the loss is not run"
)


def cases() -> list[Case]:
    """What is compared; a version that does not have a loss refuses it."""
    return [
        named("ppo, token-mean", GRPO, {"loss": "PolicyLoss", "policy_loss_type": "ppo"}, extra=TOKEN_MEAN),
        named("ppo, seq-mean", GRPO, {"loss": "PolicyLoss", "policy_loss_type": "ppo", "token_level_loss": False}),
        named("gspo", GSPO, {"loss": "PolicyLoss", "policy_loss_type": "gspo", "low": 3e-4, "high": 4e-4}),
        named("sft", SFT, {"loss": "SFTLoss"}),
    ]


def called(case: Case) -> str:
    """The name of the judged function."""
    return f"openrlhf.models.loss.{case.settings['loss']}.forward"


def update(case: Case) -> Update:
    """The forward and backward passes of a process."""
    module = importlib.import_module("openrlhf.models.loss")
    loss = _made(module, case.settings)
    counted = _iterator()

    def run(micros: Sequence[Micro]) -> None:
        for micro, counts in counted(micros) if counted else ((m, {}) for m in micros):
            value = _value(loss, micro, counts, case.settings["loss"])
            (value / micro.layout.micro_batches).backward()  # as DeepSpeed's engine does

    return run


def _made(module: Any, settings: dict[str, Any]) -> Any:
    """The loss with these settings.

    Raises:
        MissingLossError: this version does not have them.
    """
    cls = getattr(module, settings["loss"], None)
    if cls is None:
        raise MissingLossError(f"this version has no {settings['loss']}")
    known = inspect.signature(cls.__init__).parameters
    if settings["loss"] == "SFTLoss":
        return cls()
    low, high = settings.get("low", 0.2), settings.get("high", 0.2)
    clip = {"clip_eps_low": low, "clip_eps_high": high} if "clip_eps_low" in known else {"clip_eps": low}
    kind = settings["policy_loss_type"]
    if "policy_loss_type" in known:
        clip["policy_loss_type"] = kind
    elif kind != "ppo":
        raise MissingLossError(f"this version has no policy_loss_type {kind}")
    return cls(token_level_loss=settings.get("token_level_loss", True), **clip)


def _value(loss: Any, micro: Micro, counts: dict[str, Any], name: str) -> Tensor:
    mask = micro.mask.double()
    if name == "SFTLoss":
        return loss(micro.logprobs, mask, **counts)
    value = loss(micro.logprobs, micro.old_logprobs, micro.advantages[:, None], action_mask=mask, **counts)
    return value[0] if isinstance(value, tuple) else value


def _iterator() -> Any:
    """The function of newer trainers that gives each micro-batch the counts of its update; None if there is none."""
    try:
        module = importlib.import_module("openrlhf.utils.loss_utils")
    except ModuleNotFoundError:
        return None
    if not hasattr(module, "iter_grad_accum_global_norm"):
        return None

    def counted(micros: Sequence[Micro]) -> Iterator[tuple[Micro, dict[str, Any]]]:
        layout = micros[0].layout
        vars(module)["dist"] = _ranks(layout.ranks, (micros[0].tokens, micros[0].rollouts))
        items: Iterable[Any] = micros
        yield from module.iter_grad_accum_global_norm(items, Bag(), layout.micro_batches, lambda m: m.mask)

    return counted


def _ranks(number: int, totals: Sequence[int]) -> Any:
    """torch.distributed of one of `number` processes, whose sums over all of them are `totals`, in this order."""
    values = iter(totals)

    def all_reduce(value: Tensor, **options: Any) -> None:
        value.fill_(float(next(values)))

    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda group=None: number,
        all_reduce=all_reduce,
        ReduceOp=torch.distributed.ReduceOp,
    )
