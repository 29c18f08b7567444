"""TRL: `GRPOTrainer` and `SFTTrainer`, whose `training_step` runs from the loss to the backward pass."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from experiments.referee.frameworks.cases import CISPO, DAPO, DFT, DR_GRPO, GRPO, GSPO, LUSPO, SAPO, SFT, VESPO, named
from experiments.referee.protocol import GENERATIONS, LAYOUTS, Case, Micro, MissingLossError, Update
from experiments.referee.stand_in import TwoTokenModel, trainer

DISTRIBUTION, PACKAGES = "trl", ("trl",)
#: Versions that are judged by default, oldest first.
VERSIONS = ("0.20.0", "0.24.0", "1.8.0", "1.9.2", "1.16.0")
SUPPLIED = (
    "the trainer's attributes (its constructor does not run), log-probs through a model with two tokens, old "
    "log-probs, advantages, num_items_in_batch (tokens of the sampling; for SFT of the update), a backward pass "
    "without a factor; transformers' training_step is that of the installed version"
)
_BOTH = LAYOUTS + GENERATIONS
_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}


def cases() -> list[Case]:
    """What is compared; a version that does not have a loss refuses it."""
    return [
        named("grpo", GRPO, _grpo("grpo"), _BOTH),
        named("bnpo", GRPO, _grpo("bnpo"), extra=("terms.rl.reduction={_target_: upge.TokenMean}",)),
        named("dr_grpo", DR_GRPO, _grpo("dr_grpo")),
        named("dapo", DAPO, _grpo("dapo", epsilon_high=0.28), _BOTH),
        named("cispo, epsilon_high=5", CISPO, _grpo("cispo", epsilon_high=5.0), _BOTH),
        named("sapo", SAPO, _grpo("sapo")),
        named("vespo", VESPO, _grpo("vespo"), _BOTH),
        named("grpo, sequence level", GSPO, _grpo("grpo", "sequence", epsilon_low=3e-4, epsilon_high=4e-4)),
        named("luspo, sequence level", LUSPO, _grpo("luspo", "sequence", epsilon_low=2e-3, epsilon_high=2.5e-3)),
        named("sft: nll", SFT, {"sft": "nll"}),
        named("sft: dft", DFT, {"sft": "dft"}),
    ]


def _grpo(loss_type: str, level: str = "token", **clip: float) -> dict[str, Any]:
    return {"loss_type": loss_type, "importance_sampling_level": level, **_CLIP, **clip}


def called(case: Case) -> str:
    """The name of the judged function."""
    name = "sft_trainer.SFTTrainer" if "sft" in case.settings else "grpo_trainer.GRPOTrainer"
    return f"trl.trainer.{name}.training_step"


def update(case: Case) -> Update:
    """The forward and backward passes of a process."""
    return _sft_update(case.settings["sft"]) if "sft" in case.settings else _grpo_update(case.settings)


def _grpo_update(settings: dict[str, Any]) -> Update:
    cls = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    constructor = inspect.getsource(cls.__init__)
    scaled = "compute_loss_func=" in constructor
    accepted = constructor.partition("loss_type not in [")[0]
    if settings["loss_type"] not in inspect.getsource(cls) or not accepted:
        raise MissingLossError(f"this version has no loss_type {settings['loss_type']}")

    def run(micros: Sequence[Micro]) -> None:
        model = TwoTokenModel()
        arguments = {"delta": None, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0}
        arguments |= {"vespo_lambda_neg": 2.0, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
        made = trainer(
            cls, micros[0].layout, model, arguments, **settings,
            compute_loss_func="as in the constructor" if scaled else None, model_accepts_loss_kwargs=False,
        )  # fmt: skip
        for micro in micros:
            model.micro = micro
            made.training_step(model, _inputs(micro), None)

    return run


def _inputs(micro: Micro) -> dict[str, Any]:
    """What `_generate_and_score_completions` returns, for prompts of one token."""
    prompt = torch.zeros(len(micro.mask), 1, dtype=torch.long)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": torch.zeros_like(micro.mask, dtype=torch.long),
        "completion_mask": micro.mask.long(),
        "advantages": micro.advantages,
        "old_per_token_logps": micro.old_logprobs,
        "ref_per_token_logps": micro.old_logprobs,
        "num_items_in_batch": torch.tensor(micro.generation_tokens),
    }


def _sft_update(loss_type: str) -> Update:
    module = importlib.import_module("trl.trainer.sft_trainer")
    source = inspect.getsource(module)
    if loss_type == "dft" and "dft" not in source:
        raise MissingLossError("this version has no loss_type dft")
    own = module.dft_loss if loss_type == "dft" and hasattr(module, "dft_loss") else None

    def run(micros: Sequence[Micro]) -> None:
        model = TwoTokenModel()
        made = trainer(
            module.SFTTrainer, micros[0].layout, model, {"loss_type": loss_type},
            compute_loss_func=own, model_accepts_loss_kwargs=True,
        )  # fmt: skip
        for micro in micros:
            model.micro = micro
            ids = torch.zeros(len(micro.mask), micro.mask.shape[1] + 1, dtype=torch.long)
            labels = torch.where(micro.mask, 0, -100)
            labels = torch.cat([torch.full((len(ids), 1), -100), labels], dim=1)
            inputs = {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}
            made.training_step(model, inputs, torch.tensor(micro.tokens))

    return run
