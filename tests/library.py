"""The examples of docs/library.md, and the gradients of upge's own trainer on the same trajectories."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

import upge
from tests.models import unrounded
from upge.train.micro_batches import MicroBatch
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack
from upge.views import TOKEN_COLUMNS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "experiments" / "models" / "tiny"
PAGE = (ROOT / "docs" / "library.md").read_text("utf-8")
EXAMPLES = {name: source for source, name in re.findall(r"```python\n(# (my_\w+)\.py\n.*?)```", PAGE, re.DOTALL)}

#: Name of a parameter → its gradient.
Gradients = dict[str, Tensor]


class Steps:
    """The weights and gradients before every step of an optimizer."""

    def __init__(self) -> None:
        self.recorded: list[dict[nn.Parameter, tuple[Tensor, Tensor]]] = []

    def record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.recorded.append({p: (p.detach().clone(), p.grad.clone()) for p in parameters})

    def at(self, number: int, model: nn.Module) -> tuple[nn.Module, Gradients]:
        """A copy of `model` before a step, and the gradients of the step."""
        step, copy = self.recorded[number], double()
        names = {name: step[parameter] for name, parameter in model.named_parameters()}
        copy.load_state_dict({name: weight for name, (weight, _) in names.items()}, strict=False)
        return copy, {name: gradient for name, (_, gradient) in names.items()}


@contextmanager
def recorded() -> Iterator[Steps]:
    """Every step of an optimizer in the block."""
    steps = Steps()
    handle = register_optimizer_step_pre_hook(steps.record)
    try:
        yield steps
    finally:
        handle.remove()


def run(name: str) -> dict[str, Any]:
    """The names of an example after it has run, as from the root of the repository, with its model in float64."""
    namespace: dict[str, Any] = {"__name__": name}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        (Path(folder) / "experiments").symlink_to(ROOT / "experiments")
        patch.chdir(folder)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", staticmethod(double))
        exec(compile(EXAMPLES[name], f"{name}.py", "exec"), namespace)
    return namespace


def import_trl() -> None:
    """Imports TRL's trainer as if vLLM were not installed, whose import takes seven times as long."""
    importlib.import_module("trl.import_utils")
    with mock.patch("trl.import_utils.is_vllm_available", lambda *_, **__: False):
        importlib.import_module("trl.trainer.grpo_trainer")


def trainer_class(name: str) -> Any:
    """The subclass of a trainer that an example defines, without running the rest of it."""
    imports, definition, _ = EXAMPLES[name].split("\n\n\n", 2)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(f"{imports}\n{definition}", f"{name}.py", "exec"), namespace)
    (kind,) = (namespace[word] for word in re.findall(r"^class (\w+)", definition))
    return kind


def double(path: str | Path = TINY) -> nn.Module:
    """The model in float64, also where that of transformers computes in float32: in the norms and the rotations."""
    model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float64)
    unrounded(model)
    rotary = model.model.rotary_emb

    def rotations(states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].double() * rotary.inv_freq.double()).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    rotary.forward = rotations
    return model


def trainers_gradients(
    model: nn.Module,
    algorithm: upge.Algorithm,
    batch: upge.Trajectories,
    ids: Sequence[Tensor],
    temperature: float = 1.0,
) -> Gradients:
    """The gradients of one forward and backward pass of upge's trainer.

    Args:
        batch: with the responses' tokens in any columns.
        ids: prompt and response of each trajectory, without padding.
    """
    mask = torch.arange(int(batch.lengths.max())) < batch.lengths[:, None]
    given = {name: getattr(batch, name) for name in TOKEN_COLUMNS if getattr(batch, name) is not None}
    columns = {name: torch.zeros_like(mask, dtype=column.dtype) for name, column in given.items()}
    columns = {name: columns[name].masked_scatter(mask, given[name][batch.response_mask]) for name in given}
    batch = replace(batch, **columns | {"response_mask": mask, "logprobs": None})
    plan = algorithm.plan(batch)
    cuts = [len(row) - length for row, length in zip(ids, batch.lengths.tolist(), strict=True)]
    packed = pack([(row[:cut].tolist(), row[cut:].tolist()) for row, cut in zip(ids, cuts, strict=True)])
    objective = MicroBatch(batch, range(len(batch)), packed).objective(
        algorithm, lambda view, places: [(1.0, plan.estimate_in_head(view, places))]
    )
    loss, *_ = PackedPolicy(model)(packed, temperature, objective=objective)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def difference(actual: Gradients, expected: Gradients) -> float:
    """The largest difference, relative to the largest expected entry."""
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0 and actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected) / scale


def unpadded(ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    return [row[mask.bool()] for row, mask in zip(ids, attention_mask, strict=True)]


def recording(trainer: type, seen: list[dict[str, Tensor]], **attributes: Any) -> type:
    """A subclass of a trainer that records the micro-batches that it trains on."""

    def compute_loss(self: Any, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **keywords: Any) -> Tensor:
        seen.append(inputs)
        return trainer.compute_loss(self, model, inputs, *args, **keywords)

    return type("Recording", (trainer,), {"compute_loss": compute_loss, **attributes})


def gradients(
    steps: Steps, number: int, trainer: Any, micro_batches: Sequence[dict[str, Tensor]], temperature: float = 1.0
) -> tuple[Gradients, Gradients]:
    """The gradients of an update of a trainer of the page, and those of upge's trainer on the same micro-batches."""
    by_row: dict[int, Tensor] = {}
    for inputs in micro_batches:
        if "prompt_ids" in inputs:
            joined = {n: torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], dim=1) for n in ("ids", "mask")}
            inputs = inputs | {"input_ids": joined["ids"], "attention_mask": joined["mask"]}
        rows = unpadded(inputs["input_ids"], inputs["attention_mask"])
        by_row |= dict(zip(inputs["rows"].tolist(), rows, strict=True))
    model, actual = steps.at(number, trainer.model)
    ids = [by_row[row] for row in range(len(by_row))]
    return actual, trainers_gradients(model, trainer.algorithm, trainer.batch, ids, temperature)
