"""Engines over several ranks: each rank gets the rollouts of its own prompts, and an error ends a call on all of them.

The engine on gloo ranks is made up (tests/shared_ranks.py); tests/upge/rollout/test_rollout.py has vLLM's.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen2Config

from tests import forked
from tests import shared_ranks as probe
from tests.running import environment
from upge.config import from_tree
from upge.errors import ConfigError
from upge.models.loading import read_config
from upge.rollout import load, shared_engine
from upge.rollout.shared_engine import check_tensor_parallel
from upge.rollout.vllm_engine import VLLMSampler
from upge.train.config import RunConfig

MODELS = Path(__file__).parents[3] / "experiments" / "models"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    output = tmp_path_factory.mktemp("shared") / "ranks.json"
    done = forked.run("tests.shared_ranks", str(output), environment=environment(), ranks=probe.RANKS, timeout=120)
    assert done.returncode == 0 and output.is_file(), done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", probe.SPLITS)
def test_every_rank_gets_its_own_prompts_rollouts(ranks: list[dict], name: str):
    """The same as of a rank that has an engine for itself, and a callback for each of them and no other."""
    for rank, prompts in enumerate(probe.SPLITS[name]):
        alone = probe.MadeUp(None).sample(prompts, probe.COPIES, probe.SAMPLING, probe.seeds_of(prompts))
        assert ranks[rank]["rollouts"][name] == probe.plain(alone)
        expected = [[index, copy] for index in range(len(prompts)) for copy in range(probe.COPIES)]
        assert sorted(ranks[rank]["arrived"][name]) == expected


@pytest.mark.parametrize(
    ("call", "own", "others"),
    [
        ("callback", "KeyError: 'from the caller'", "ended the call with an error"),
        ("interrupt", "KeyboardInterrupt: ", "ended the call with an error"),
        ("seeds", "ValueError: 1 prompts but 0 seeds", "refused the call: ValueError: 1 prompts but 0 seeds"),
        ("prompt", "UserError: prompt 0 has no tokens", "refused the call: UserError: prompt 0 has no tokens"),
    ],
)
def test_an_error_on_one_rank_ends_the_call_on_its_engine(ranks: list[dict], call: str, own: str, others: str):
    """Rank 1 fails. Ranks 2 and 3 have another engine."""
    errors = [row["errors"][call] for row in ranks]
    assert errors[1].startswith(own)
    assert errors[0].startswith("RuntimeError: rank 1, which shares its engine with this rank,") and others in errors[0]
    assert errors[2:] == ["none", "none"]


def test_the_sampler_remains_usable_after_errors(ranks: list[dict]):
    for row in ranks:
        assert row["after errors"] == row["rollouts"]["even"] and row["handler_kept"]
        assert row["loaded"] == 3.0


def test_calls_that_differ_are_refused(ranks: list[dict]):
    errors = [row["errors"]["different n"] for row in ranks]
    assert all(error.startswith("ValueError: the ranks of an engine must sample with the same") for error in errors[:2])


def test_ranks_that_sample_different_responses_are_an_error(ranks: list[dict]):
    """An engine whose ranks are out of step would go on with mixed-up requests."""
    assert all("have sampled different responses" in row["diverging"] for row in ranks)


# Which numbers of ranks an engine can have.


@pytest.mark.parametrize(
    ("size", "ranks", "here", "fragments"),
    [
        (3, 8, 8, ["rollout.tensor_parallel=3", "does not divide the number of ranks, 8", "possible: 1, 2, 4"]),
        (2, 6, 3, ["does not divide the 3 ranks of each machine", "possible: 1"]),
        (8, 8, 8, ["does not divide the model's 28 attention heads", "possible: 1, 2, 4"]),
        (7, 14, 7, ["neither divides the model's 4 key heads nor is a multiple of them", "possible: 1"]),
    ],
)
def test_numbers_that_do_not_divide_are_refused(size: int, ranks: int, here: int, fragments: list[str]):
    """The 7B model has 28 heads and 4 key heads."""
    config = read_config(MODELS / "qwen2.5-math-7b")
    with pytest.raises(ConfigError) as caught:
        check_tensor_parallel(size, config, ranks, here)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_numbers_that_divide_are_accepted():
    config = read_config(MODELS / "qwen2.5-math-7b")
    for size, ranks, here in ((1, 3, 3), (2, 8, 8), (4, 8, 4), (4, 64, 8)):
        check_tensor_parallel(size, config, ranks, here)
    # Fewer key heads than ranks are repeated.
    few = Qwen2Config(num_attention_heads=8, num_key_value_heads=2, intermediate_size=64)
    check_tensor_parallel(4, few, 4, 4)
    with pytest.raises(ConfigError, match="intermediate_size=66"):
        check_tensor_parallel(4, Qwen2Config(num_attention_heads=8, intermediate_size=66), 4, 4)


def test_the_launcher_says_how_many_ranks_a_machine_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_engine.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(shared_engine.dist, "get_world_size", lambda: 6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert shared_engine.ranks_of_run() == (6, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert shared_engine.ranks_of_run() == (6, 3)


def test_only_vllm_divides_an_engine(monkeypatch: pytest.MonkeyPatch):
    settings: dict[str, Any] = {"engine": "transformers", "tensor_parallel": 2}
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel.*only vLLM.*rollout\.engine=vllm"):
        from_tree(RunConfig, {"rollout": settings})
    for engine in ("auto", "transformers"):
        with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel=2: only vLLM.*rollout\.engine=vllm"):
            load(engine, MODELS / "tiny", tensor_parallel=2, device="cpu")


def test_shared_memory_that_a_killed_engine_left_is_named():
    def fails(**options: object) -> None:
        raise RuntimeError("create shm in SHMManager failed. errno: 17")

    sampler = object.__new__(VLLMSampler)
    sampler._vllm, sampler._options_of_engine = SimpleNamespace(LLM=fails), {}
    with pytest.raises(ConfigError, match=r"remove /dev/shm/\*cpushm\*"):
        sampler._start()
