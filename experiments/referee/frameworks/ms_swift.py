"""ms-swift: `GRPOTrainer.training_step`, which runs its own loss within TRL's and transformers' trainers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from experiments.referee.frameworks.cases import CISPO, DAPO, DR_GRPO, GRPO, GSPO, SAPO, TOKEN_MEAN, named
from experiments.referee.protocol import GENERATIONS, LAYOUTS, Case, Micro, MissingLossError, Update
from experiments.referee.stand_in import Bag, TwoTokenModel, trainer

DISTRIBUTION, PACKAGES = "ms-swift", ("swift", "trl")
#: Versions that are judged by default, oldest first.
VERSIONS = ("3.12.6", "4.5.3", "4.6.0")
#: Version → other distributions that it runs with, within what it requires.
COMPANIONS = {"3.12.6": {"trl": "0.24.0"}, "": {"trl": "0.29.1"}}
SUPPLIED = (
    "the trainer's attributes (its constructor does not run), its forward pass (log-probs), old log-probs, advantages, "
    "num_items_in_batch (tokens of the sampling), a backward pass without a factor; TRL is 0.24.0 for 3.12.6 and "
    "0.29.1 for later versions, and transformers' training_step is that of the installed version"
)
_PLACES = ("swift.rlhf_trainers.grpo_trainer", "swift.trainers.rlhf_trainer.grpo_trainer")


def cases() -> list[Case]:
    """What is compared; a version that does not have a loss refuses it."""
    both = LAYOUTS + GENERATIONS
    return [
        named("grpo", GRPO, _settings("grpo"), both),
        named("bnpo", GRPO, _settings("bnpo"), extra=TOKEN_MEAN),
        named("dr_grpo", DR_GRPO, _settings("dr_grpo")),
        named("dapo", DAPO, _settings("dapo", epsilon_high=0.28), both),
        named("cispo, epsilon_high=5", CISPO, _settings("cispo", epsilon_high=5.0), both),
        named("sapo", SAPO, _settings("sapo")),
        named("grpo, sequence level", GSPO, _settings("grpo", "sequence", epsilon_low=3e-4, epsilon_high=4e-4)),
    ]


def _settings(loss_type: str, level: str = "token", **clip: float) -> dict[str, Any]:
    defaults = {"epsilon_low": 0.2, "epsilon_high": 0.2, "tau_pos": 1.0, "tau_neg": 1.05}
    return {"loss_type": loss_type, "importance_sampling_level": level, **defaults, **clip}


def _trainer() -> Any:
    for place in _PLACES:
        try:
            return importlib.import_module(place).GRPOTrainer
        except ModuleNotFoundError as error:
            if not str(error.name or "").startswith("swift"):
                raise
    raise MissingLossError("this version has no GRPOTrainer where it is known to be")


def called(case: Case) -> str:
    """The name of the judged function."""
    return "swift.rlhf_trainers.grpo_trainer.GRPOTrainer.training_step"


def update(case: Case) -> Update:
    """The forward and backward passes of a process."""
    cls = _trainer()
    source = inspect.getsource(cls)
    nested, per_token = "inputs['model_inputs']" in source, "advantages.unsqueeze(1)" not in source
    if f"'{case.settings['loss_type']}'" not in source:
        raise MissingLossError(f"this version has no loss_type {case.settings['loss_type']}")

    def run(micros: Sequence[Micro]) -> None:
        model = TwoTokenModel()
        now: dict[str, Micro] = {}
        arguments = {"per_device_train_batch_size": len(micros[0].mask), "log_entropy": False}
        arguments |= {"top_entropy_quantile": 1.0}
        made = trainer(
            cls, micros[0].layout, model, arguments, **case.settings,
            compute_loss_func=None, model_accepts_loss_kwargs=False, sdar_loss_coef=0.0,
            template=Bag(padding_free=False),
            _get_per_token_logps_and_entropies=lambda *a, **k: (now["micro"].logprobs, None),
        )  # fmt: skip
        for micro in micros:
            now["micro"] = micro
            made.training_step(model, _inputs(micro, nested, per_token), None)

    return run


def _inputs(micro: Micro, nested: bool, per_token: bool) -> dict[str, Any]:
    """A micro-batch as `_prepare_batch_inputs` makes it."""
    advantages = micro.advantages[:, None].expand_as(micro.mask) if per_token else micro.advantages
    batch = {
        "completion_mask": micro.mask,
        "truncated_mask": torch.zeros(len(micro.mask), dtype=torch.bool),
        "seq_lengths": micro.mask.sum(dim=1),
        "advantages": advantages,
        "old_per_token_logps": micro.old_logprobs,
        "ref_per_token_logps": micro.old_logprobs,
        "rollout_per_token_logps": None,
        "num_items_in_batch": torch.tensor(micro.generation_tokens),
    }
    ids = {"input_ids": torch.zeros_like(micro.mask, dtype=torch.long)}
    return {"model_inputs": ids, "grpo_batch": Bag(**batch)} if nested else {**ids, **batch}
