"""Samplers: bad settings, prompts and weights end in one message that names them; small parts that need no engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import rollout_ranks as probe
from upge import rollout
from upge.errors import ConfigError, ModelError, UserError
from upge.models import loading
from upge.rollout import Sampling, vllm_process
from upge.rollout.base import response_seed
from upge.rollout.shared_engine import _Call, _joined_prefixes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    probe.make_model(path / "tied", True, 0)
    probe.make_model(path / "untied", False, 1)
    return path


@pytest.fixture(scope="module")
def sampler(folder: Path):
    return rollout.load("transformers", folder / "untied", max_length=100)


@pytest.mark.parametrize(
    ("prompt", "fragment"),
    [
        ([], "prompt 1 has no tokens"),
        ([3, probe.VOCABULARY], f"prompt 1 holds token id {probe.VOCABULARY}"),
        ([3, -1], "prompt 1 holds token id -1"),
        ([3] * 80, "rollout.max_prompt_tokens or rollout.max_response_tokens"),
    ],
)
def test_bad_prompts_are_named(sampler, prompt: list[int], fragment: str):
    with pytest.raises(UserError, match=fragment.replace(".", r"\.")):
        sampler.sample([[3], prompt], 1, Sampling(max_tokens=24), [0, 1])


def test_a_response_continues_its_prefix(sampler):
    """As if the prefix ended the prompt, with as many tokens fewer; the other responses are as without."""
    prompts, seeds, settings = [[3, 4], [5]], [7, 8], Sampling(max_tokens=6)
    prefixes = {(0, 1): (9, 10), (1, 0): (11,)}
    actual = sampler.sample(prompts, 2, settings, seeds, prefixes=prefixes)
    plain = sampler.sample(prompts, 2, settings, seeds)
    for index, copy in ((0, 0), (1, 1)):
        assert actual[index][copy].token_ids == plain[index][copy].token_ids
    assert actual[0][1].token_ids != plain[0][1].token_ids[:4]
    for (index, copy), prefix in prefixes.items():
        shorter = Sampling(max_tokens=6 - len(prefix))
        (expected,) = sampler.sample([[*prompts[index], *prefix]], 2, shorter, [seeds[index]])
        rollout = actual[index][copy]
        assert rollout.token_ids == expected[copy].token_ids and len(rollout.token_ids) == 6 - len(prefix)
        assert rollout.logprobs == pytest.approx(expected[copy].logprobs, abs=1e-5)
    limits = []
    sampler.sample(prompts, 2, settings, seeds, lambda i, c, r: limits.append(len(r.token_ids)), prefixes=prefixes)
    assert sorted(limits) == [4, 5, 6, 6]


@pytest.mark.parametrize(
    ("prefix", "error", "message"),
    [
        ([3] * 6, ValueError, "the prefix of response 1 to prompt 0 has 6 tokens, and the response with it may have 6"),
        ([3, probe.VOCABULARY], UserError, f"the prefix of response 1 to prompt 0 holds token id {probe.VOCABULARY}"),
    ],
)
def test_bad_prefixes_are_named(sampler, prefix: list[int], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        sampler.sample([[3]], 2, Sampling(max_tokens=6), [0], prefixes={(0, 1): prefix})


def test_ranks_of_an_engine_join_their_prefixes():
    calls = [
        _Call([(3,), (4,)], 2, Sampling(), [0, 1], {(1, 0): (9,)}, ""),
        _Call([(5,)], 2, Sampling(), [2], {(0, 1): (8,)}, ""),
    ]
    assert _joined_prefixes(calls) == {(1, 0): (9,), (2, 1): (8,)}


def test_wrong_numbers_of_seeds_and_copies(sampler):
    with pytest.raises(ValueError, match="1 prompts but 2 seeds"):
        sampler.sample([[3]], 1, Sampling(), [0, 1])
    with pytest.raises(ValueError, match="n=0"):
        sampler.sample([[3]], 0, Sampling(), [0])


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"temperature": -1.0}, "rollout.temperature=-1.0"),
        ({"temperature": float("nan")}, "rollout.temperature=nan"),
        ({"temperature": 0.001}, "rollout.temperature=0.001"),
        ({"top_p": 0.0}, "rollout.top_p=0.0"),
        ({"top_p": 1.5}, "rollout.top_p=1.5"),
        ({"max_tokens": 0}, "rollout.max_response_tokens=0"),
    ],
)
def test_bad_sampling_values_are_named(settings: dict, fragment: str):
    with pytest.raises(ConfigError, match=fragment.replace(".", r"\.")):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda pairs: [*pairs, ("model.layer.0", pairs[0][1])], "'model.layer.0' does not belong .* did you mean"),
        (lambda pairs: [*pairs, pairs[3]], "was given twice"),
        (lambda pairs: [(pairs[0][0], pairs[0][1][:0]), *pairs[1:]], r"has shape \(0, 64\), .* \(64, 64\)"),
        (lambda pairs: pairs[2:], "2 of .* weights are missing"),
    ],
)
def test_bad_weights_are_named(folder: Path, change, fragment: str):
    sampler = rollout.load("transformers", folder / "untied")
    with pytest.raises(ModelError, match=fragment):
        sampler.load_weights(change(probe.weights(folder / "untied", with_head=False)))
    with pytest.raises(RuntimeError, match="no complete weights"):
        sampler.sample([[3]], 1, Sampling(), [0])


def test_auto_takes_transformers_for_a_small_model_on_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """And asks nothing about vLLM, whose import alone takes seconds; of a model above the bound it does."""
    monkeypatch.setattr(vllm_process, "why_not_vllm", lambda device: "vLLM was asked")
    sampler = rollout.load("auto", folder / "tied", device="cpu")
    assert sampler.name == "transformers" and "parameters faster on a CPU than vLLM does" in sampler.reason
    count = sum(p.numel() for p in sampler._model.parameters())
    monkeypatch.setattr(loading, "SMALL_MODEL", count)
    assert "vLLM was asked" in rollout.load("auto", folder / "tied", device="cpu").reason
    monkeypatch.setattr(loading, "SMALL_MODEL", count + 1)
    assert "vLLM was asked" not in rollout.load("auto", folder / "tied", device="cpu").reason


def test_auto_falls_back_and_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_process, "why_not_vllm", lambda device: "vLLM is not installed")
    monkeypatch.setattr(loading, "SMALL_MODEL", 0)
    sampler = rollout.load("auto", folder / "tied")
    assert (sampler.name, sampler.reason) == ("transformers", "transformers, because vLLM is not installed.")
    with pytest.raises(ConfigError, match=r"rollout\.engine=vllm: vLLM is not installed; run `pip install vllm"):
        rollout.load("vllm", folder / "tied")


def test_unusable_installations_of_vllm_are_explained(monkeypatch: pytest.MonkeyPatch):
    def broken():
        raise ImportError("undefined symbol\nsecond line")

    monkeypatch.setattr(vllm_process.importlib.util, "find_spec", lambda name: None)
    assert vllm_process.why_not_vllm("cpu") == "vLLM is not installed"
    monkeypatch.setattr(vllm_process.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_process, "import_vllm", broken)
    assert "cannot be imported (ImportError: undefined symbol)" in vllm_process.why_not_vllm("cpu")


@pytest.mark.parametrize(
    ("engine", "path", "options", "error", "fragment"),
    [
        ("vlm", "tied", {}, ConfigError, "rollout.engine=vlm: did you mean 'vllm'"),
        ("transformers", "nowhere", {}, ModelError, "model.path=.*nowhere: there is no such folder"),
        ("transformers", "", {}, ModelError, "model.path=.*: no config.json in this folder"),
        ("transformers", "x.gguf", {}, ModelError, "model.path=.*x.gguf: .* upge.models.local_path makes of it"),
        ("transformers", "tied", {"dtype": "float23"}, ConfigError, "rollout.dtype=float23"),
        ("transformers", "tied", {"threads": 0}, ConfigError, "rollout.threads=0"),
        ("auto", "tied", {"max_length": 257}, ConfigError, "rollout.max_prompt_tokens or rollout.max_response_tokens"),
    ],
)
def test_bad_settings_are_named(folder: Path, engine: str, path: str, options: dict, error: type, fragment: str):
    with pytest.raises(error, match=fragment):
        rollout.load(engine, folder / path, **options)


def test_a_name_that_the_hub_cannot_give_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "_hub_answers", lambda: False)
    with pytest.raises(ModelError, match="model.path=nobody/nothing: neither a folder nor a model"):
        rollout.load("auto", "nobody/nothing")


def test_neighbouring_seeds_share_no_response_seed():
    seeds = {response_seed(seed, index) for seed in range(-8, 56) for index in range(64)}
    assert len(seeds) == 64 * 64 and min(seeds) >= 0 and max(seeds) < 2**63


def test_cores_are_divided_among_the_local_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_process.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(vllm_process.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert vllm_process.cpu_binding() == "0,1|2,3"
    monkeypatch.setattr(vllm_process.os, "sched_getaffinity", lambda pid: {2, 3}, raising=False)
    assert vllm_process.cpu_binding() == "2,3|2,3"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert vllm_process.cpu_binding() == "2,3"


def test_the_cache_is_what_the_sequences_fill_within_what_is_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_process, "free_memory", lambda: 1000 * 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    # Two sequences of 33 tokens take two blocks of 32 each, and one more each to begin with.
    assert vllm_process.cache_bytes(2, 33, 10, 1.0, 32) == 2 * 3 * 32 * 10
    assert vllm_process.cache_bytes(2, 33, 1000, 0.5, 32) == 500 * 64
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert vllm_process.cache_bytes(2, 33, 1000, 0.5, 32) == 250 * 64
