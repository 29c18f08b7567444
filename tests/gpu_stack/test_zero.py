"""DeepSpeed's ZeRO-3 in bfloat16 on gloo ranks, as on GPUs: checkpointed layers, idle ranks and NaN."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forked
from tests.gpu_stack.zero_ranks import SIZES
from tests.models import save_random_model, trajectories


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("found") / "found.pt"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = forked.run(
        "tests.gpu_stack.zero_ranks", str(model), str(output), environment=environment, ranks=request.param
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(output, weights_only=False)


def plain_gradients(model: Path, size: int) -> dict[str, torch.Tensor]:
    """The gradient in float32, one trajectory at a time, without padding or packing."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for t in trajectories()[:size]:
        ids = torch.tensor([[*t.prompt_ids, *t.response_ids]])
        logprobs = network(ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, 1:, None])[len(t.prompt_ids) - 1 :]
        (chosen.sum() / 100).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("size", SIZES)
def test_gradients_with_idle_ranks(results: dict[str, Any], model: Path, size: int) -> None:
    expected, seen = plain_gradients(model, size), results[f"gradients {size}"]
    seen = {name.removeprefix("model.") if name not in expected else name: g for name, g in seen.items()}
    flat = torch.cat([seen[name].float().flatten() for name in expected])
    right = torch.cat([expected[name].flatten() for name in expected])
    # bfloat16 has 8 bits, and the errors of activations add up over two layers.
    assert (flat - right).norm() / right.norm() < 0.02


def test_ranks_are_summed_in_float32(results: dict[str, Any]) -> None:
    """A sum in bfloat16 would differ from the sum of the ranks' gradients by 1e-3."""
    difference = (results["whole"] - results["parts"]).norm() / results["parts"].norm()
    assert difference < 1e-6


def test_nan_on_one_rank_is_skipped_on_all(results: dict[str, Any]) -> None:
    assert not results["nan"].applied and results["unchanged"]
    assert results["after"].applied and results["changed"]
