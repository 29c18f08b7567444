"""docs/library.md: its examples run, and their gradients are those of upge's own trainer on the same trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

import algorithms
from tests import library
from tests.library import EXAMPLES, TINY, Gradients, difference

#: Prompt, response, reward and group; two prompts and lengths that differ.
ROLLOUTS = [
    ("37+25=?\n", "37+25=62\n\\boxed{62}", 1.0, 3),
    ("37+25=?\n", "\\boxed{61}", 0.0, 3),
    ("37+25=?\n", "37+25=52\n\\boxed{52}", 0.0, 3),
    ("37+25=?\n", "\\boxed{62}", 1.0, 3),
    ("18+6-20=?\n", "18+6=24\n24-20=4\n\\boxed{4}", 1.0, 5),
    ("18+6-20=?\n", "18+6=24\n24+20=44\n\\boxed{44}", 0.0, 5),
    ("18+6-20=?\n", "44", 0.0, 5),
    ("18+6-20=?\n", "\\boxed{40}", 0.0, 5),
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_complete(name: str) -> None:
    source = EXAMPLES[name]
    assert len(list(filter(None, source.splitlines()))) < 40 and "upge._" not in source
    assert "..." not in source.replace("[..., ", "").replace("...]", "")


def test_the_trainers_example_runs() -> None:
    assert library.run("my_trainer")["model"].training


def test_the_loop_has_the_trainers_gradient() -> None:
    with library.recorded() as steps:
        names = library.run("my_loop")
    model, actual = steps.at(-1, names["model"])
    ids = library.unpadded(names["ids"], names["attention_mask"])
    expected = library.trainers_gradients(model, names["algorithm"], names["batch"], ids)
    assert len(steps.recorded) == 2 and difference(actual, expected) < 1e-10


def encoded(tokenizer: Any, prompt: str, response: str, reward: float, group: int) -> dict[str, Any]:
    """A row of the data set."""
    p, r = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]
    return {"input_ids": p + r, "labels": [-100] * len(p) + r, "rewards": reward, "group": group}


def trained(folder: Path, micro_batches: int, side: str, **attributes: Any) -> tuple[Gradients, Gradients]:
    """The gradients of a transformers Trainer's update on all rollouts, and those of upge's trainer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side=side)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=8 // micro_batches, gradient_accumulation_steps=micro_batches,
        max_steps=1, remove_unused_columns=False, max_grad_norm=0.0, save_strategy="no",
    )  # fmt: skip
    seen: list[dict[str, Tensor]] = []
    kind = library.recording(library.trainer_class("my_trainer"), seen, algorithm=algorithms.load("dapo"), **attributes)
    with library.recorded() as steps:
        trainer = kind(
            library.double(),
            arguments,
            DataCollatorForSeq2Seq(tokenizer),
            Dataset.from_list([encoded(tokenizer, *one) for one in ROLLOUTS]),
        )
        trainer.train()
    assert len(seen) == micro_batches
    return library.gradients(steps, 0, trainer, seen)


@pytest.mark.parametrize(("micro_batches", "side"), [(1, "left"), (2, "right"), (4, "left"), (4, "right")])
def test_a_transformers_trainer_has_the_trainers_gradient(tmp_path: Path, micro_batches: int, side: str) -> None:
    actual, expected = trained(tmp_path, micro_batches, side)
    assert difference(actual, expected) < 1e-10


def test_a_trainer_that_averages_micro_batches_shrinks_the_gradient(tmp_path: Path) -> None:
    """What `loss_is_scaled_for_ga` of the example prevents."""
    actual, expected = trained(tmp_path, 4, "right", loss_is_scaled_for_ga=False)
    assert difference({name: 4 * gradient for name, gradient in actual.items()}, expected) < 1e-10


def test_distributions_are_handed_in() -> None:
    """On the policy's own distributions, with the teacher's weights changed, the gradient is not 0."""
    names = library.run("my_distillation")
    gradients = [parameter.grad for parameter in names["model"].parameters()]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients) and any(g.any() for g in gradients)
