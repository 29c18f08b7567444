"""Whole steps side by side: the conversation with the children, the comparison of gradients, the table."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path

import pytest

from experiments.bench import step, trainers
from experiments.bench.trainers import Child, ChildError
from tests.bench_children import Stage
from upge.errors import ConfigError

FAKE = "tests.bench_children"
PARTS = {"rollout": 0.0, "verify": 0.0, "refresh": 0.0, "reward": 0.5, "rss": 1.5, "no_signal": 0.25}
SAMPLED = {"reward": 0.5, "norm": 2.0, "prompts": [[1]], "responses": [[[2], [3]]]}


def trainer(tokens: int, **compared: float) -> dict:
    """A child's script with `tokens` a step."""
    return {
        "steps": lambda steps: {**PARTS, "tokens": tokens, "seconds": 1.0},
        "compare": lambda steps: {**SAMPLED, "difference": 1e-6, **compared},
    }


@pytest.fixture(autouse=True)
def with_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "has_trl", lambda: True)


# The conversation.


def test_a_child_trains_as_told_and_waits_in_between(tmp_path: Path) -> None:
    with Child("fake", FAKE, {}, tmp_path, 1) as child:
        assert child.answer() == {"ready": True}
        three = child.ask("steps", count=3)
        assert three["tokens"] == 300 and three["reward"] == 1.5 and 0.03 <= three["seconds"] < 5 and three["rss"] > 0
        assert child.ask("evaluate") == {"mean": 0.3}
        compared = child.ask("compare", gradient="there")
        assert compared["heard"] == "there" and compared["tokens"] == 100
        assert "heard" not in child.ask("steps", count=1), "what a comparison finds is told once"
    assert child._process.returncode == 0
    assert "the child was here" in (tmp_path / "fake.log").read_text()


def test_a_child_tells_of_its_errors(tmp_path: Path) -> None:
    with Child("a", FAKE, {"until": 2}, tmp_path, 1) as child:
        child.answer()
        with pytest.raises(ChildError, match="^ZeroDivisionError: no more$"):
            child.ask("steps", count=5)
        with pytest.raises(ChildError, match="exited without a message"):
            child.ask("steps")
    with Child("b", FAKE, {"fails": "users"}, tmp_path, 1) as child, pytest.raises(ConfigError, match="^key: found 3"):
        child.answer()
    with Child("c", FAKE, {"fails": "silently"}, tmp_path, 1) as child, pytest.raises(ChildError, match="was here"):
        child.answer()


def test_rewards_by_checksum_are_mixed_and_always_the_same() -> None:
    from experiments.bench.trainers.ours import RewardPool
    from upge.verify import Item

    class Pool:
        def submit(self, item: Item) -> Future:
            return "the pool's"

    rewards = RewardPool(Pool())
    items = [Item(f"response {k}", "1") for k in range(64)]
    with rewards.by_checksum():
        first = [rewards.submit(item).result().reward for item in items]
        assert first == [rewards.submit(item).result().reward for item in items] and 16 < sum(first) < 48
    assert rewards.submit(items[0]) == "the pool's"
    always = RewardPool(Pool(), True)
    with always.by_checksum():
        pass
    assert always.submit(items[0]).result().reward == first[0]


# The bench.


def test_tokens_per_second_are_compared_pair_by_pair() -> None:
    stage = Stage(ours=trainer(300), generate=trainer(100), vllm_patched=trainer(150))
    made = step.run(step.Settings(trl="generate,vllm-patched", prompts=4, batch=8), stage)
    rows = [line.split(" | ") for line in made.splitlines() if line.startswith("| tiny")]
    assert [cells[1] for cells in rows] == [step.US, "TRL, `generate`", "TRL, vLLM patched"] and rows[0][3] == "1"
    assert "differ by 1.0e-06 (TRL, `generate`)" in made and "25% had no signal" in made
    assert made.count("Goal for tiny, arithmetic against") == 2
    ours, generate = stage.children[0][1], stage.children[1][1]
    assert ours.words == generate.words == ["compare", "steps", *["steps"] * 5] and ours.closed and generate.closed
    assert stage.jobs["generate"]["batch"] == 8 and stage.jobs["generate"]["threads"] == 1
    assert not stage.jobs["ours"]["checksum"] and not stage.jobs["generate"]["checksum"]
    same = [a for a in stage.jobs["ours"]["arguments"] if not a.startswith("output")]
    assert same == [a for a in stage.jobs["generate"]["arguments"] if not a.startswith("output")]


def test_what_the_table_says_of_a_timing() -> None:
    timing = step.Timing(
        {step.US: (1.0, 2.0, 1.0), "peer": (2.0, 8.0, 4.0)},
        {step.US: (1.0, 2.0, 1.0), "peer": (2.0, 8.0, 4.0)},
        {step.US: ({**PARTS, "tokens": 90},) * 3, "peer": ({**PARTS, "tokens": 60, "rollout": 0.5},) * 3},
    )
    case = step.Case("case", (), 4, 8, 2)
    outcome = step.Outcome(timing, {"another": "TypeError: why"}, {"peer": 2e-6})
    cells = list(map(str, step._row(case, "peer", outcome)))
    assert cells[:5] == ["case", "peer", "15 (7.5 to 30)", "6 (3 to 6)", "4 (2 to 8)"]
    assert cells[5:9] == ["0.500", "0.000", "0.000", "3.500"], "the rest is what the parts leave of a step"
    told = "\n".join(step._remarks(case, outcome, step.Settings()))
    assert "at least 3 times; reached, 6 times" in told
    assert "another does not run here on case: `TypeError: why`" in told


def test_a_peer_that_does_not_run_is_told_of() -> None:
    broken = {**trainer(1), "steps": lambda steps: "AttributeError: no weight_loader"}
    stage = Stage(ours=trainer(300), generate=trainer(100), vllm=broken)
    made = step.run(step.Settings(trl="vllm,generate", prompts=4, batch=8), stage)
    assert "TRL, vLLM does not run here on tiny, arithmetic: `AttributeError: no weight_loader`" in made
    assert "| TRL, vLLM |" not in made and "(TRL, vLLM)" not in made
    with pytest.raises(ChildError, match="does not run in any of the ways vllm: .*no weight_loader"):
        step.run(step.Settings(trl="vllm", prompts=4, batch=8), Stage(ours=trainer(300), vllm=broken))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"difference": 0.01}, "another gradient on the same responses: off by 1.0e-02"),
        ({"difference": float("nan")}, "another gradient"),
        ({"reward": 0.4}, "other rewards: mean 0.4 instead of 0.5"),
    ],
)
def test_another_gradient_is_not_measured(theirs: dict, message: str) -> None:
    stage = Stage(ours=trainer(300), generate=trainer(100, **theirs))
    with pytest.raises(AssertionError, match=message):
        step.run(step.Settings(trl="generate", prompts=4, batch=8), stage)
    assert all(child.closed for _, child in stage.children)


def test_a_gradient_of_nothing_proves_nothing() -> None:
    stage = Stage(ours=trainer(300, norm=0.0), generate=trainer(100))
    with pytest.raises(AssertionError, match="ours has norm 0"):
        step.run(step.Settings(trl="generate", prompts=4, batch=8), stage)


def test_the_real_model_has_its_own_sizes_and_every_core(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").touch()
    tiny, real = step._cases(step.Settings(folder=str(tmp_path), real_prompts=6, real_tokens=99))
    assert tiny.threads == 1 and real.threads == len(os.sched_getaffinity(0)) and real.prompts == 6
    assert {"model=smollm2-135m", "rollout.max_response_tokens=99", "group_size=8"} <= set(real.arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trl": "generat"}, "did you mean 'generate'"),
        ({"batch": 7}, "batch: 7 does not divide the 256 responses"),
        ({"folder": "/nowhere"}, "there is no file '/nowhere/gsm8k/train.jsonl'"),
        ({"tiny": False}, "nothing to measure"),
        ({"warmup": 0}, "warmup: found 0"),
        ({"pairs": 4, "trl": "generate"}, "rounds: found 4"),
    ],
)
def test_bad_settings_are_told(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        step.run(step.Settings(**settings), Stage(ours=trainer(300), generate=trainer(100)))


def test_without_trl_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "has_trl", lambda: False)
    with pytest.raises(ConfigError, match="make peers"):
        step.run(step.Settings(), Stage())
