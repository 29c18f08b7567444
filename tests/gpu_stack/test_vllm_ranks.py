"""vLLM's engine for CUDA over two ranks: configuration, requests, sleep, and each rank's shard of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import forked
from tests.gpu_stack import pretended  # before vLLM
from tests.gpu_stack.vllm_ranks import COPIES, PROMPTS, SAMPLING, SEEDS
from tests.rollout_ranks import VOCABULARY, make_model, weights
from tests.running import environment
from upge.rollout.base import response_seed

#: Of the models: 2 heads of this width, and an MLP of twice the other.
HEAD, INNER = 32, 64


@pytest.fixture(scope="module", params=["tied", "untied"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The folder of the models, and what both ranks saw."""
    path = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("old", "new")):
        make_model(path / name, request.param == "tied", seed)
    output = path / "seen.pt"
    done = forked.run("tests.gpu_stack.vllm_ranks", str(path), str(output), environment=environment(), ranks=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return path, torch.load(output, weights_only=False)


def test_the_ranks_form_one_engine(seen: tuple[Path, list[dict]]):
    for rank, row in enumerate(seen[1]):
        assert row["ranks"] == (rank, rank, 2) and row["backend"] == "external_launcher"
        assert row["reason"].endswith("with 2 ranks per engine.")
        # The model has one, which both ranks hold.
        assert row["key_heads"] == 1


@pytest.mark.parametrize("stage", ["old", "new"])
def test_each_rank_has_its_shard_of_the_weights(seen: tuple[Path, list[dict]], stage: str):
    """After the start and after a refresh with whole tensors, in place."""
    folder, rows = seen
    whole = {name: tensor.bfloat16() for name, tensor in weights(folder / stage, with_head=True)}
    for rank, row in enumerate(rows):
        assert row["addresses_kept"]
        names = {*row["shards"][stage]}
        assert {name.replace("qkv", "q").replace("gate_up", "gate") for name in names} <= {*whole}
        for name, tensor in row["shards"][stage].items():
            assert torch.equal(tensor, shard(whole, name, rank)), name


def shard(whole: dict[str, Tensor], name: str, rank: int) -> Tensor:
    """Rank `rank`'s part of a weight in vLLM: some heads, some columns of the MLP, some tokens."""

    def rows(name: str, size: int) -> Tensor:
        return whole[name][rank * size : (rank + 1) * size]

    if "qkv_proj" in name:
        query, key, value = (name.replace("qkv", letter) for letter in "qkv")
        return torch.cat([rows(query, HEAD), whole[key], whole[value]])
    if "gate_up_proj" in name:
        return torch.cat([rows(name.replace("gate_up", part), INNER) for part in ("gate", "up")])
    if "o_proj" in name or "down_proj" in name:
        size = HEAD if "o_proj" in name else INNER
        return whole[name][:, rank * size : (rank + 1) * size]
    if "embed_tokens" in name or "lm_head" in name:
        return rows(name, VOCABULARY // 2)
    return whole[name]


def test_each_rank_gets_the_responses_to_its_prompts(seen: tuple[Path, list[dict]]):
    for rank, row in enumerate(seen[1]):
        for stage in ("rollouts", "after"):
            for prompt, seed, group in zip(PROMPTS[rank], SEEDS[rank], row[stage], strict=True):
                assert len(group) == COPIES
                for copy, (tokens, logprobs, finished) in enumerate(group):
                    drawn = [
                        pretended.drawn(response_seed(seed, copy), len(prompt) + i, VOCABULARY)
                        for i in range(len(tokens))
                    ]
                    assert tokens == [token for token, _ in drawn]
                    assert logprobs == pytest.approx([logprob for _, logprob in drawn], abs=1e-6)
                    assert finished == (tokens[-1] == 1) and (finished or len(tokens) == SAMPLING.max_tokens)


def test_each_rank_sleeps_and_wakes(seen: tuple[Path, list[dict]]):
    assert all(row["calls"] == ["sleep 2", "wake weights", "reload", "wake kv_cache"] for row in seen[1])
