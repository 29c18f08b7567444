"""Gradients as the trainer computes them, under ZeRO-3: equal to a plain model's, for any cut and 1 or 2 ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.compositions import load
from tests.models import save_random_model, trajectories
from upge import Trajectories
from upge.train.collect import assemble
from upge.train.update import Batch, split

ROOT = Path(__file__).parent.parent
NAMES = ("sft", "reinforce", "grpo", "dr_grpo", "hpt", "gspo", "luffy", "srft", "corrected_ppo")


def padded_logprobs(model: torch.nn.Module, batch: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [B, T] by one plain forward per trajectory, in the model's precision."""
    width = max(len(t.response_ids) for t in batch)
    rows = []
    for t in batch:
        ids = torch.tensor([[*t.prompt_ids, *t.response_ids]])
        full = model(input_ids=ids).logits[0, len(t.prompt_ids) - 1 : -1].log_softmax(-1)
        chosen = full.gather(-1, torch.tensor(t.response_ids)[:, None])[:, 0]
        entropy = -(full.exp() * full).sum(-1)
        rows.append(torch.nn.functional.pad(torch.stack([chosen, entropy]), (0, width - len(t.response_ids))))
    return torch.stack(rows).unbind(1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, dict]:
    """A random model and every algorithm's gradient on it, by plain torch in float64."""
    path = save_random_model(tmp_path_factory.mktemp("model"))
    return path, {name: plain_gradient(path, name, trajectories()) for name in NAMES}


def plain_gradient(path: Path, name: str, batch: list) -> dict[str, torch.Tensor]:
    """An algorithm's gradient on a batch, by parameter."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    logprobs, entropies = padded_logprobs(model, batch)
    columns = {n: getattr(assemble(batch, 7), n) for n in Trajectories.__dataclass_fields__}
    columns |= {"logprobs": logprobs, "entropies": entropies}
    load(name).estimate(Trajectories(**columns)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return float(sum(g.square().sum() for g in gradients.values()).sqrt())


def launch(script: str, ranks: int, *arguments: object, timeout: float = 240) -> None:
    """torchrun with gloo; the script's output is shown if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / script), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.parametrize(("ranks", "budget"), [(1, 10_000), (1, 60), (2, 10_000), (2, 45)])
def test_gradients_under_zero3(reference, tmp_path, ranks, budget):
    """One micro-batch or many, one rank or two: the gradient is the plain model's, to float32 rounding."""
    path, expected = reference
    launch("update_ranks.py", ranks, path, tmp_path / "gradients.pt", budget, *NAMES)
    found = torch.load(tmp_path / "gradients.pt")
    for name in NAMES:
        scale = max(float(g.abs().max()) for g in expected[name].values())
        assert scale > 1e-6, name
        assert float(found[name].pop("norm")) == pytest.approx(norm_of(expected[name]), rel=1e-4), name
        assert set(found[name]) == set(expected[name])
        for parameter, gradient in expected[name].items():
            difference = float((found[name][parameter] - gradient).abs().max())
            assert difference <= 2e-5 * scale, (name, parameter, difference / scale)
    chunks = [piece.members for piece in split(Batch(assemble(trajectories(), 7), trajectories()), 2)]
    norms = [norm_of(plain_gradient(path, "grpo", chunk)) for chunk in chunks]
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)
    assert found["two updates"].tolist() == pytest.approx(norms, rel=1e-4)
