"""docs/library.md: the gradients of its subclass of TRL's GRPOTrainer are those of upge's own trainer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer

import algorithms
from tests import forked, library
from tests.library import TINY, Gradients, difference

PROMPTS = Dataset.from_dict({"prompt": ["37+25=?\n", "18+6-20=?\n"]})


@pytest.fixture(autouse=True, scope="module")
def trl() -> None:
    library.import_trl()


def by_turns(completions: list[str], **_: object) -> list[float]:
    """A reward that differs within every group."""
    return [float(number % 3 == 0) for number in range(len(completions))]


def exact(
    _: object, model: nn.Module, ids: Tensor, mask: Tensor, width: int, **__: object
) -> tuple[Tensor, None, None]:
    """TRL's log-probs without its output head, which computes in float32 at most."""
    logits = model(ids, attention_mask=mask).logits[:, -width - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, -width:, None])[..., 0], None, None


def trained(
    folder: Path, micro_batches: int, updates: int = 1, own_head: bool = False, **settings: Any
) -> list[tuple[Gradients, Gradients]]:
    """The gradients of each update on the same eight rollouts, and those of upge's trainer.

    Args:
        own_head: whether the log-probs come from TRL's output head.
        settings: of TRL.
    """
    from trl import GRPOConfig

    arguments = GRPOConfig(
        str(folder), per_device_train_batch_size=8 // micro_batches, gradient_accumulation_steps=micro_batches,
        num_generations=4, max_completion_length=40, max_steps=updates, num_iterations=updates, max_grad_norm=0.0,
        learning_rate=1e-3, bf16=False, save_strategy="no", **settings,
    )  # fmt: skip
    seen: list[dict[str, Tensor]] = []
    head = {} if own_head else {"_get_per_token_logps_and_entropies": exact}
    kind = library.recording(library.trainer_class("my_grpo"), seen, algorithm=algorithms.load("dapo"), **head)
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with library.recorded() as steps:
        trainer = kind(library.double(), by_turns, arguments, PROMPTS, processing_class=tokenizer)
        trainer.train()
    assert len(seen) == updates * micro_batches
    batches = [seen[number * micro_batches :][:micro_batches] for number in range(updates)]
    temperature = settings.get("temperature", 1.0)
    return [library.gradients(steps, number, trainer, some, temperature) for number, some in enumerate(batches)]


def test_the_example_runs() -> None:
    names = library.run("my_grpo")
    assert names["arguments"].max_steps == 2


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_trl_has_the_trainers_gradient(tmp_path: Path, micro_batches: int) -> None:
    """Whatever TRL divides its own loss by."""
    ((actual, expected),) = trained(tmp_path, micro_batches, loss_type="bnpo")
    assert difference(actual, expected) < 1e-10


def test_the_log_probs_of_trls_head_have_its_temperature(tmp_path: Path) -> None:
    ((actual, expected),) = trained(tmp_path, 2, own_head=True, temperature=1.5)
    assert difference(actual, expected) < 1e-5, "computed in float32"


def test_a_second_update_on_the_same_rollouts_is_off_policy(tmp_path: Path) -> None:
    first, second = trained(tmp_path, 2, updates=2)
    assert difference(*first) < 1e-10 and difference(*second) < 1e-10
    assert difference(first[0], second[0]) > 0.01


def test_the_gradient_on_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """Of both trainers of the page, whose processes average their gradients."""
    done = forked.run("tests.library_ranks", str(tmp_path), environment=os.environ, ranks=2)
    assert done.returncode == 0, done.stderr
    differences = json.loads((tmp_path / "differences.json").read_text())
    assert max(differences.values()) < 1e-10 and len(differences) == 2, differences
