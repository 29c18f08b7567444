"""The bench of loss and backward: its batches, that it finds another gradient, and ours against plain torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench import loss
from experiments.bench.loss import Shape, length_summary, made
from experiments.bench.measure import interleaved
from experiments.bench.peers import padded, trl_advantages
from upge.errors import ConfigError

ROOT = Path(__file__).parents[3]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
SMALL = Shape(groups=2, size=4, no_signal=0.5).scaled(0.03)


def test_lengths_are_spread_as_in_a_run() -> None:
    rollouts = made(Shape(groups=40, size=8, no_signal=0.3), 1000)
    lengths = [len(t.response_ids) for t in rollouts]
    assert len(rollouts) == 320 and 215 < sum(lengths) / 320 < 255 and 500 < max(lengths) <= 694
    assert len({t.prompt_ids for t in rollouts}) == 40, "one prompt a group"
    assert all(2 <= token < 1000 for t in rollouts[:5] for token in t.response_ids)
    assert f"(longest {max(lengths)})" in length_summary(rollouts)
    by_group = [{t.reward for t in rollouts if t.group == group} for group in range(40)]
    assert sum(len(rewards) == 1 for rewards in by_group) == 12
    assert by_group.count({0.0}) == by_group.count({1.0}) == 6


def test_groups_without_a_signal_change_nothing_but_rewards() -> None:
    loud, partly = (made(Shape(10, 8, no_signal).scaled(0.1), 50) for no_signal in (0.0, 0.3))
    assert [(t.prompt_ids, t.response_ids) for t in loud] == [(t.prompt_ids, t.response_ids) for t in partly]
    differ = {t.group for t, u in zip(loud, partly, strict=True) if t.reward != u.reward}
    assert len(differ) == 3 and max(differ) - min(differ) > 3


def test_trl_gets_what_its_trainer_makes() -> None:
    actual = trl_advantages([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], 3)
    third = (2 / 3) / (3**-0.5 + 1e-4)
    torch.testing.assert_close(actual, torch.tensor([third, -third / 2, -third / 2, 0.0, 0.0, 0.0]))
    ids, mask = padded([(5, 6), (7,)], "left")
    assert ids.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[1, 1], [0, 1]]
    assert padded([(5, 6), (7,)], "right")[0].tolist() == [[5, 6], [7, 0]]


def test_another_gradient_is_found() -> None:
    expected = [torch.tensor([3.0, -4.0]), torch.tensor([0.0])]
    assert loss.compared([torch.tensor([3.0, -4.0]), torch.tensor([0.0])], expected) == 0.0
    for wrong in ([3.0, -4.004], [3.0, -4.0, 0.01], [float("nan"), -4.0]):
        given = [torch.tensor(wrong[:2]), torch.tensor(wrong[2:] or [0.0])]
        with pytest.raises(AssertionError, match="the gradients differ by"):
            loss.compared(given, expected)


PLAIN = """
import torch
from experiments.bench import loss
from tests.experiments.bench.test_bench_loss import SMALL, made, plain_gradient

ours = loss.Ours(loss.MODELS["tiny"].path, 64)
rollouts = made(SMALL, ours.vocabulary)
for _ in range(2):
    ours(rollouts)
print(len(rollouts), ours.tokens, loss.compared(ours.gradient(), plain_gradient(rollouts)), flush=True)
import os
os._exit(0)
"""


def plain_gradient(rollouts: list) -> list[torch.Tensor]:
    """GRPO's textbook loss, a forward per trajectory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(loss.MODELS["tiny"].path, dtype=torch.float64)
    for trajectory, advantage in zip(rollouts, trl_advantages([t.reward for t in rollouts], SMALL.size), strict=True):
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.response_ids]])
        logs = model(input_ids=ids).logits[0, len(trajectory.prompt_ids) - 1 : -1].log_softmax(-1)
        chosen = logs.gather(1, torch.tensor(trajectory.response_ids)[:, None]).mean()
        (-advantage * chosen / len(rollouts)).backward()
    return [parameter.grad.reshape(-1) for parameter in model.parameters()]


def test_ours_is_the_textbook_gradient_and_starts_from_zero_each_time() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, tokens, gap = done.stdout.split()[-3:]
    # Of the group without a signal nothing is run.
    assert (int(count), float(gap) < 2e-5) == (8, True) and 0 < int(tokens) < 8 * (6 + 21) / 2


@pytest.mark.skipif(not PEERS.exists(), reason="make peers has not been called")
def test_trl_and_ours_compute_the_same() -> None:
    program = (
        "from experiments.bench import loss\n"
        "from experiments.bench.loss import Settings\n"
        "print(loss.measured(Settings(groups=2, no_signal=0.5, scale=0.03), 'tiny'), flush=True)\n"
        "import os\nos._exit(0)\n"
    )
    done = subprocess.run([PEERS, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("the gradients differ by") == 2, done.stderr


def test_a_table_and_its_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Fake:
        tokens = 1234

        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def __call__(self, rollouts: object) -> None:
            now[0] += self.seconds

        def gradient(self) -> list[torch.Tensor]:
            return [torch.ones(2)]

        def inputs(self, rollouts: object) -> list[dict]:
            return [{"prompt_mask": torch.ones(2, 3), "completion_mask": torch.ones(2, 4)}]

    def clocked(things, rounds, label):
        return interleaved(things, rounds, clock=lambda: now[0], cpu_clock=lambda: now[0] / 2)

    def case(theirs, shape):
        return loss._case("tiny", *loss._timed("tiny", Fake(2.0), theirs, [], loss.Settings()), shape)

    monkeypatch.setattr(loss, "interleaved", clocked)
    for no_signal, told_goal in ((0.0, "3 times as fast: 3.50, reached"), (0.5, "4 times as fast: 3.50, **missed**")):
        shape = Shape(2, 4, no_signal)
        rows, note = case(Fake(7.0), shape)
        assert len({len(row) for row in rows}) == 1 and told_goal in note
        assert ["tiny", f"2 ({shape.no_signal_groups})", "TRL", "14", "7 (7 to 7)", "3.5 (3.5 to 3.5)", "1", "1"] == [
            *map(str, rows[1])
        ]
        assert rows[0][2:4] == ["ours", "1,234"]
    rows, note = case(None, shape)
    assert len(rows) == 1 and "goal" not in note
    monkeypatch.setattr(loss, "in_fresh_process", lambda *_: (None, None))
    assert "tiny: the process was killed" in loss.run(loss.Settings(models="tiny"))
    with pytest.raises(ConfigError, match="models: found 'tiny,gpt'"):
        loss.run(loss.Settings(models="tiny,gpt"))
