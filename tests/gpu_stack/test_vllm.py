"""vLLM's engine for CUDA with a worker that holds the weights on the CPU: requests, refreshes, sleep and shutdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu_stack import pretended  # before vLLM
from tests.rollout_ranks import VOCABULARY, make_model, one_by_one, weights
from upge.rollout.base import Sampling, response_seed
from upge.rollout.vllm_engine import VLLMSampler

PROMPTS, SEEDS, COPIES = ((5, 7, 9), (11,), tuple(range(3, 40))), (1, 2, 3), 4
SAMPLING = Sampling(max_tokens=12, stop_token_ids=(1,))
OVERRIDES = {"rope_theta": 40000, "max_position_embeddings": 512}


@pytest.fixture(scope="module", params=["tied", "untied"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and another one of the same shape."""
    path = tmp_path_factory.mktemp(kind)
    for seed, name in enumerate(("old", "new")):
        make_model(path / name, kind == "tied", seed)
    return path / "old", path / "new"


@pytest.fixture(scope="module")
def sampler(folders: tuple[Path, Path]) -> Iterator[VLLMSampler]:
    threads = torch.get_num_threads()
    made = VLLMSampler(
        folders[0], dtype="bfloat16", device="cuda", max_length=96, memory_fraction=0.1, overrides=OVERRIDES
    )
    assert torch.get_num_threads() == threads and torch.set_num_threads.__module__ == "torch"
    yield made
    made.close()
    assert not torch.distributed.is_initialized()


@pytest.fixture
def worker(sampler: VLLMSampler) -> pretended.CPUWorker:
    """The worker in the engine, with an empty list of calls and the weights of the first model."""
    actual = sampler._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    actual.calls.clear()
    return actual


def parameters(worker: pretended.CPUWorker) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in worker.model.state_dict().items()}


def expected(prompt: tuple[int, ...], seed: int) -> tuple[list[int], list[float]]:
    """What the worker draws for a request, up to the stop token."""
    tokens, logprobs = [], []
    while len(tokens) < SAMPLING.max_tokens and 1 not in tokens:
        token, logprob = pretended.drawn(seed, len(prompt) + len(tokens), VOCABULARY)
        tokens.append(token)
        logprobs.append(logprob)
    return tokens, logprobs


def test_every_response_belongs_to_its_request(sampler: VLLMSampler, worker: pretended.CPUWorker) -> None:
    arrived: list[tuple[int, int]] = []
    groups = sampler.sample(PROMPTS, COPIES, SAMPLING, SEEDS, lambda prompt, copy, _: arrived.append((prompt, copy)))
    assert sorted(arrived) == [(prompt, copy) for prompt in range(3) for copy in range(COPIES)]
    for prompt, seed, group in zip(PROMPTS, SEEDS, groups, strict=True):
        for copy, rollout in enumerate(group):
            tokens, logprobs = expected(prompt, response_seed(seed, copy))
            assert list(rollout.token_ids) == tokens
            assert list(rollout.logprobs) == pytest.approx(logprobs, abs=1e-6)
            assert rollout.finished == (tokens[-1] == 1)


def test_an_interrupted_call_leaves_no_request(sampler: VLLMSampler, worker: pretended.CPUWorker) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("from the caller")

    with pytest.raises(KeyError, match="from the caller"):
        sampler.sample(PROMPTS, COPIES, SAMPLING, SEEDS, fail)
    assert not sampler._llm.llm_engine.has_unfinished_requests()
    again = sampler.sample(PROMPTS, COPIES, SAMPLING, SEEDS)
    assert [list(group[0].token_ids) for group in again] == [
        expected(prompt, response_seed(seed, 0))[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]


def test_a_refresh_equals_a_fresh_load(
    sampler: VLLMSampler, worker: pretended.CPUWorker, folders: tuple[Path, Path], kind: str
) -> None:
    """In place: CUDA graphs keep the addresses of the weights."""
    addresses = {name: tensor.data_ptr() for name, tensor in worker.model.state_dict().items()}
    old = parameters(worker)
    for with_head in (False, True):
        sampler.load_weights(one_by_one(weights(folders[1], with_head)))
        new = parameters(worker)
        assert any(not torch.equal(new[name], old[name]) for name in new)
        sampler.load_weights(one_by_one(weights(folders[0], with_head)))
        assert all(torch.equal(tensor, old[name]) for name, tensor in parameters(worker).items())
    assert {name: tensor.data_ptr() for name, tensor in worker.model.state_dict().items()} == addresses


def test_sleep_drops_the_weights_and_a_refresh_wakes_them_before_the_cache(
    sampler: VLLMSampler, worker: pretended.CPUWorker, folders: tuple[Path, Path]
) -> None:
    """Level 1 would copy weights to the host that are about to be replaced. The cache comes last, when the trainer's
    gathered tensors are gone."""
    before = parameters(worker)
    sampler.sleep()
    assert worker.calls == ["sleep 2"] and worker.awake == set()
    with pytest.raises(RuntimeError, match="load_weights"):
        sampler.sample(PROMPTS, COPIES, SAMPLING, SEEDS)
    sampler.load_weights(one_by_one(weights(folders[0], False)))
    assert worker.calls == ["sleep 2", "wake weights", "reload", "wake kv_cache"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(worker).items())
    sampler.sample(PROMPTS, COPIES, SAMPLING, SEEDS)


def test_a_refresh_that_fails_can_be_repeated(
    sampler: VLLMSampler, worker: pretended.CPUWorker, folders: tuple[Path, Path]
) -> None:
    before, pairs = parameters(worker), weights(folders[0], False)
    sampler.sleep()
    with pytest.raises(Exception, match="missing|lacks|without"):
        sampler.load_weights(one_by_one(pairs[:-1]))
    with pytest.raises(RuntimeError, match="load_weights"):
        sampler.sample(PROMPTS, COPIES, SAMPLING, SEEDS)
    sampler.load_weights(one_by_one(pairs))
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(worker).items())
    sampler.sample(PROMPTS, COPIES, SAMPLING, SEEDS)


def test_prefixes_are_forgotten_between_calls(sampler: VLLMSampler, worker: pretended.CPUWorker) -> None:
    """A cached prefix would hold keys and values of old weights, and would change the rounding."""
    manager = sampler._llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    seen: list[int] = []
    original = worker._step

    def step(scheduled: Any) -> Any:
        seen.extend(new.num_computed_tokens for new in scheduled.scheduled_new_reqs)
        return original(scheduled)

    worker._step = step
    try:
        for _ in range(2):
            sampler.sample(PROMPTS[2:], 1, SAMPLING, SEEDS[2:])
    finally:
        del worker._step
    assert seen == [0, 0] and manager.enable_caching
    # Within a call the copies of a prompt share it.
    assert sampler._llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
