"""Gradients as the trainer computes them, under ZeRO-3: equal to a plain model's, for any cut and 1 or 2 ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

import algorithms
from tests import forked
from tests.compositions import load
from tests.models import save_random_model, trajectories
from tests.update_ranks import STEP, batch_for, cases
from upge import Algorithm, Trajectories
from upge.train.sample import assemble
from upge.train.step_batch import StepBatch, update_rows

ROOT = Path(__file__).parents[3]


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


class Reference(NamedTuple):
    """A random model, the columns that a critic, a reference and a behaviour policy would fill, and what plain torch in
    float64 makes of them: case → parameter → gradient, and the norms of two updates on half the prompts each."""

    model: Path
    columns: Path
    gradients: dict[str, dict[str, torch.Tensor]]
    halves: list[float]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    path = save_random_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    live = {kind: padded_logprobs(model, trajectories(pairs=kind == "pairs")) for kind in ("plain", "pairs")}
    filled = {kind: made_up(logprobs.detach()) for kind, (logprobs, _) in live.items()}
    torch.save(filled, path / "columns.pt")
    gradients = {}
    for name, (one, off_policy) in cases().items():
        kind = "pairs" if one.needs.preference_pairs else "plain"
        gradients[name] = plain_gradient(model, one, batch_for(one, off_policy, filled), live[kind])
    chunks = [[trajectories()[i] for i in rows] for rows in update_rows(trajectories(), 2)]
    halves = [
        norm_of(plain_gradient(model, load("grpo"), StepBatch(assemble(c, STEP), c), padded_logprobs(model, c)))
        for c in chunks
    ]
    return Reference(path, path / "columns.pt", gradients, halves)


def made_up(logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns near the current log-probs [B, T], and values of a critic."""
    g = torch.Generator().manual_seed(0)
    noise = lambda scale: torch.randn(logprobs.shape, generator=g, dtype=torch.float64) * scale  # noqa: E731
    near = {name: (logprobs + noise(0.3)).clamp(max=0.0) for name in ("behavior_logprobs", "reference_logprobs")}
    near |= {"values": noise(0.5)}
    return near | {"teacher_logprobs": (logprobs + noise(0.3)).clamp(max=0.0)}


def plain_gradient(model: torch.nn.Module, one: Algorithm, batch: StepBatch, live: tuple) -> dict[str, torch.Tensor]:
    """An algorithm's gradient on a batch, by parameter, through the log-probs and entropies `live`."""
    columns = {n: getattr(batch.columns, n) for n in Trajectories.__dataclass_fields__}
    columns |= dict(zip(("logprobs", "entropies"), live, strict=True))
    named = dict(model.named_parameters())
    loss = one.estimate(Trajectories(**columns)).loss
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return float(sum(g.square().sum() for g in gradients.values()).sqrt())


def launch(script: str, ranks: int, *arguments: object, timeout: float = 500) -> None:
    """A module of tests/ on several ranks with gloo; its output is shown if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = forked.run(
        f"tests.{script}", *map(str, arguments), environment=environment, ranks=ranks, torchrun=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.parametrize(
    ("ranks", "budget"),
    [(1, 60), (2, 45), *(pytest.param(ranks, 10_000, marks=pytest.mark.slow) for ranks in (1, 2))],
)
def test_gradients_under_zero3(reference, tmp_path, ranks, budget):
    """One micro-batch or many, one rank or two: every algorithm's gradient is the plain one, to float32 rounding."""
    launch("update_ranks", ranks, reference.model, reference.columns, tmp_path / "gradients.pt", budget)
    actual = torch.load(tmp_path / "gradients.pt")
    assert set(actual) == {*reference.gradients, "two updates"}
    for name, expected in reference.gradients.items():
        scale = max(float(g.abs().max()) for g in expected.values())
        assert scale > 1e-6, name
        assert float(actual[name].pop("norm")) == pytest.approx(norm_of(expected), rel=1e-4), name
        assert set(actual[name]) == set(expected)
        for parameter, gradient in expected.items():
            difference = float((actual[name][parameter] - gradient).abs().max())
            assert difference <= 2e-5 * scale, (name, parameter, difference / scale)
    assert reference.halves[0] != pytest.approx(reference.halves[1], rel=1e-2)
    assert actual["two updates"].tolist() == pytest.approx(reference.halves, rel=1e-4)


def test_every_algorithm_is_among_the_cases():
    """With what only some read: a critic's values, a reference policy, pairs, a stateful gate."""
    actual = cases()
    names = {name.split(",")[0].split(":")[0] for name in actual}
    on_vocabulary = {name for name in algorithms.names() if getattr(algorithms.load(name), "supports", None)}
    assert names == {*algorithms.names(), "corrected_ppo"} - on_vocabulary and len(actual) >= 2 * (len(names) + 1)
    needs = [one.needs for one, _ in actual.values()]
    for asked in ("critic", "reference", "preference_pairs"):
        assert any(getattr(need, asked) for need in needs), asked
    assert any(one.stateful for one, _ in actual.values())
