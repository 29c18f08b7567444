"""Samplers: their log-probs are the model's, their tokens follow them, seeds fix them, and a refresh replaces them.

Each engine is watched in a process of its own (tests/rollout_ranks.py); the tests here judge what it wrote down.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import forked
from tests import rollout_ranks as probe
from upge import rollout
from upge.rollout import Sampling

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-3
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ENGINES = [pytest.param("transformers"), pytest.param("vllm", marks=needs_vllm)]
engines = pytest.mark.parametrize("engine", ENGINES)
kinds = pytest.mark.parametrize("kind", probe.KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for seed, kind in enumerate(probe.KINDS):
        probe.make_model(path / kind, kind == "tied", seed)
        probe.make_model(path / f"{kind}_new", kind == "tied", seed + 10)
    return path


def unlaunched() -> dict[str, str]:
    """The environment of a process that is no rank."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if name not in launched}


def written(done: subprocess.CompletedProcess[str], output: Path) -> dict:
    """What a process of tests/rollout_ranks.py wrote; its own output if it wrote nothing."""
    assert done.returncode == 0 and output.is_file(), done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(output.read_text(encoding="utf-8")) | {"printed": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def observed(folder: Path) -> dict:
    """engine → what it does, found out when first asked for."""

    class Observed(dict):
        def __missing__(self, engine: str) -> dict:
            output = folder / f"{engine}.json"
            given = ("tests.rollout_ranks", "observe", engine, str(folder), str(output))
            done = forked.run(*given, environment=unlaunched(), vllm=engine == "vllm", timeout=240)
            self[engine] = written(done, output)
            return self[engine]

    return Observed()


def reference(path: Path, prompt: tuple, responses: list[list[int]], sampling: Sampling) -> torch.Tensor:
    """[B, T, V] log-probs of the sampling distribution at each token of the responses, from a plain forward pass.

    Shorter responses are padded on the right, where the padding comes after all that counts.
    """
    from transformers import AutoModelForCausalLM

    if path not in _models:
        _models[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    longest = max(len(tokens) for tokens in responses)
    rows = [[*prompt, *tokens, *[0] * (longest - len(tokens))] for tokens in responses]
    with torch.no_grad():
        logits = _models[path](torch.tensor(rows)).logits[:, len(prompt) - 1 : -1]
    probabilities = (logits / (sampling.temperature or 1.0)).softmax(-1)
    if sampling.top_p < 1 and sampling.temperature > 0:
        ordered, order = probabilities.sort(-1, descending=True)
        # A token stays if those before it do not reach top_p yet.
        kept = ordered.cumsum(-1) - ordered < sampling.top_p
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered * kept)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities.log()


_models: dict = {}


def largest_difference(path: Path, groups: list, sampling: Sampling, prompts: tuple = probe.PROMPTS) -> float:
    """The largest |Δ log p| between rollouts and the model at `path`."""
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        expected = reference(path, prompt, [tokens for tokens, _, _ in group], sampling)
        for row, (tokens, logprobs, _) in zip(expected, group, strict=True):
            at_tokens = row[: len(tokens)].gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            worst = max(worst, (at_tokens - torch.tensor(logprobs)).abs().max().item())
    return worst


@engines
@kinds
def test_logprobs_are_the_models_before_and_after_a_refresh(engine: str, kind: str, folder: Path, observed: dict):
    actual = observed[engine][kind]
    stages = {"before": kind, "after": f"{kind}_new", "back": kind, "recovered": f"{kind}_new"}
    for stage, weights in stages.items():
        for name, sampling in probe.SAMPLINGS.items():
            worst = largest_difference(folder / weights, actual[stage][name], sampling)
            print(f"{engine} {kind} {stage} {name}: max |Δ log p| {worst:.1e}")
            assert worst < TOLERANCE, (stage, name)
    # The two sets of weights are far enough apart for a stale head to show.
    assert largest_difference(folder / kind, actual["after"]["plain"], probe.SAMPLINGS["plain"]) > 0.5


@engines
def test_overrides_of_the_models_configuration_take_effect(engine: str, observed: dict):
    """In the engine's own configuration, and in the log-probs: 24 tokens with another rotary base are told apart."""
    actual = observed[engine]["overridden"]
    if engine == "vllm":
        rope_theta = actual["config"]["rope_parameters"]["rope_theta"]
        assert {**actual["config"], "rope_theta": rope_theta}.items() >= probe.OVERRIDES.items()
        assert actual["max_model_len"] == probe.OVERRIDDEN_LENGTH
    sampling = probe.SAMPLINGS["endless"]
    _models["overridden"] = overridden_model()
    assert largest_difference("overridden", actual["rollouts"], sampling) < TOLERANCE
    assert largest_difference(probe.TINY, actual["rollouts"], sampling) > 0.1


def overridden_model() -> torch.nn.Module:
    """TINY with OVERRIDES as transformers alone makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(probe.TINY)
    config.rope_parameters["rope_theta"] = probe.OVERRIDES["rope_theta"]
    config.max_position_embeddings = probe.OVERRIDES["max_position_embeddings"]
    return AutoModelForCausalLM.from_pretrained(probe.TINY, config=config, dtype=torch.float32).eval()


@engines
def test_long_prompts_fill_more_than_one_prefill(engine: str, folder: Path, observed: dict):
    actual = observed[engine]["tied"]["long"]
    assert largest_difference(folder / "tied", actual, Sampling(max_tokens=4), probe.LONG_PROMPTS) < TOLERANCE


@engines
def test_copies_of_a_prompt_share_its_prefill(engine: str, folder: Path, observed: dict):
    actual = observed[engine]["tied"]["shared"]
    prompts = probe.LONG_PROMPTS[:2]
    assert largest_difference(folder / "tied", actual["rollouts"], Sampling(max_tokens=4), prompts) < TOLERANCE
    if engine == "vllm":
        # All but the first of each group find the whole blocks of the prompt, in the step in which that one is run.
        whole = len(prompts[0]) // 32 * 32
        assert actual["cached"] == [0, 0] + [whole] * 2 * (probe.COPIES - 1)


@engines
def test_nothing_is_compiled(engine: str, observed: dict):
    assert observed[engine]["tied"]["compiled"] == 0


@engines
@kinds
def test_the_same_call_gives_the_same_rollouts(engine: str, kind: str, observed: dict):
    actual = observed[engine][kind]
    assert actual["again"] == actual["before"]
    assert tokens_of(actual["back"]) == tokens_of(actual["before"]) != tokens_of(actual["after"])
    assert actual["nothing"] == []


@pytest.mark.slow
@engines
def test_a_fresh_process_gives_the_same_rollouts(engine: str, folder: Path, observed: dict):
    output = folder / f"{engine}_fresh.json"
    command = [sys.executable, "-m", "tests.rollout_ranks", "repeat", engine, str(folder), str(output)]
    done = subprocess.run(command, cwd=ROOT, env=unlaunched(), capture_output=True, text=True, timeout=120)
    assert written(done, output)["tied"] == observed[engine]["tied"]["before"]


@engines
@kinds
def test_rollouts_do_not_depend_on_the_other_prompts(engine: str, kind: str, observed: dict):
    actual = observed[engine][kind]
    together = actual["before"]["plain"]
    assert [[r[0] for r in group] for group in actual["apart"]] == [[r[0] for r in group] for group in together]


@engines
@kinds
def test_random_state_threads_and_groups_are_left_alone(engine: str, kind: str, observed: dict):
    assert observed[engine][kind]["state_kept"]
    assert not observed[engine][kind]["group_left"]


@engines
@kinds
def test_every_rollout_arrives_once_and_before_longer_ones(engine: str, kind: str, observed: dict):
    actual = observed[engine][kind]["arrivals"]
    assert actual["returned"] == actual["silent"], "rollouts must not depend on who watches"
    rows = actual["rows"]
    everyone = [(index, copy) for index in range(len(probe.PROMPTS)) for copy in range(probe.COPIES)]
    assert sorted((index, copy) for index, copy, _, _ in rows) == everyone
    assert all(rollout == actual["returned"][index][copy] for index, copy, rollout, _ in rows)
    lengths = [len(tokens) for _, _, (tokens, _, _), _ in rows]
    # All start in one batch, so they end in the order of their lengths; the prompts' order would be another.
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] / 2
    moments = [moment for *_, moment in rows]
    assert moments == sorted(moments) and moments[0] < 0.7


@engines
@kinds
def test_a_call_that_was_stopped_leaves_nothing_behind(engine: str, kind: str, observed: dict):
    actual = observed[engine][kind]
    assert actual["stopped"] == ["KeyError 1", "KeyboardInterrupt 1", "signal"]
    assert actual["after_stop"] == actual["before"]


@engines
@kinds
def test_a_response_ends_with_its_first_stop_token(engine: str, kind: str, observed: dict):
    ends = {True: 0, False: 0}
    for name, sampling in probe.SAMPLINGS.items():
        for group in observed[engine][kind]["before"][name]:
            assert len(group) == probe.COPIES
            for tokens, logprobs, finished in group:
                assert len(tokens) == len(logprobs)
                assert not set(tokens[:-1]) & set(sampling.stop_token_ids)
                assert finished == (tokens[-1] in sampling.stop_token_ids)
                assert finished or len(tokens) == sampling.max_tokens
                ends[finished] += 1
    assert min(ends.values()) > 5, "both ends must occur for this test to mean anything"


@engines
def test_responses_to_one_prompt_differ_and_greedy_ones_do_not(engine: str, observed: dict):
    actual = observed[engine]["untied"]["before"]
    for group in actual["endless"]:
        assert len({tuple(tokens) for tokens, _, _ in group}) == probe.COPIES
    for group in actual["greedy"]:
        assert len({tuple(tokens) for tokens, _, _ in group}) == 1


@engines
@kinds
def test_a_prefix_is_followed_by_what_is_sampled_after_it(engine: str, kind: str, folder: Path, observed: dict):
    """Its tokens count to the limit, neither have log-probs nor end the response, and change no other response."""
    results, ends = observed[engine][kind], set()
    for name, groups in results["prefixed"].items():
        sampling = probe.SAMPLINGS[name]
        for index, (prompt, group) in enumerate(zip(probe.PROMPTS, groups, strict=True)):
            for copy, (tokens, logprobs, finished) in enumerate(group):
                prefix = probe.PREFIXES.get((index, copy))
                if prefix is None:
                    assert tokens == results["before"][name][index][copy][0]
                    continue
                shown, row = (*prompt, *prefix), [[[tokens, logprobs, finished]]]
                assert largest_difference(folder / kind, row, sampling, (shown,)) < TOLERANCE
                assert len(tokens) == len(logprobs) and not set(tokens[:-1]) & set(sampling.stop_token_ids)
                assert finished == (tokens[-1] in sampling.stop_token_ids)
                assert finished or len(prefix) + len(tokens) == sampling.max_tokens
                ends.add((finished, len(tokens) == 1))
    assert {(False, True), (True, False)} <= ends, "both ends must occur for this test to mean anything"


@needs_vllm
@kinds
def test_both_engines_agree_on_greedy(kind: str, observed: dict):
    first, second = (tokens_of(observed[engine][kind])["greedy"] for engine in ("vllm", "transformers"))
    assert first == second
    first, second = (tokens_of(observed[e][kind]["prefixed"])["greedy"] for e in ("vllm", "transformers"))
    assert first == second


@engines
@kinds
def test_token_frequencies_follow_the_probabilities(engine: str, kind: str, folder: Path, observed: dict):
    """χ² of the first token over 2,048 responses whose seeds are neighbours, and no two responses alike.

    With d degrees of freedom χ² has mean d and standard deviation √(2d); the bound is five of these above the mean.
    """
    prompts, copies, sampling = probe.CROWD
    responses = [tuple(tokens) for group in observed[engine][kind]["crowd"] for tokens, _, _ in group]
    probabilities = reference(folder / kind, probe.PROMPTS[0], [[0]], sampling)[0, 0].exp()
    counts = torch.bincount(torch.tensor([r[0] for r in responses]), minlength=probe.VOCABULARY).double()
    expected = probabilities.double() * len(responses)
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    print(
        f"{engine} {kind}: χ² {chi:.1f} with {freedom} degrees of freedom, "
        f"{observed[engine][kind]['tokens_per_second']:.0f} tokens/s"
    )
    assert freedom > 10 and chi < freedom + 5 * (2 * freedom) ** 0.5
    # Eight tokens of some three nats each: repetitions among 2,048 mean that responses shared their random numbers.
    assert len(set(responses)) > prompts * copies - 5


@engines
@kinds
def test_incomplete_weights_are_refused(engine: str, kind: str, observed: dict):
    loading, sampling = observed[engine][kind]["refusal"]
    assert loading.startswith("ModelError: 1 of ") and "missing" in loading and "model.path" in loading
    assert sampling.startswith("RuntimeError: the sampler has no complete weights")


@engines
def test_the_engine_says_why_and_is_quiet(engine: str, observed: dict):
    assert observed[engine]["tied"]["name"] == engine
    assert observed[engine]["tied"]["reason"] == f"{engine}, as rollout.engine asks."
    assert "INFO" not in observed[engine]["printed"] and "Processed prompts" not in observed[engine]["printed"]


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> dict:
    """Ranks of an engine → what each of two ranks saw, found out when first asked for."""

    class OnTwoRanks(dict):
        def __missing__(self, size: int) -> list[dict]:
            output = folder / f"ranks{size}.json"
            given = ("tests.rollout_ranks", "ranks", str(folder), str(size), str(output))
            done = forked.run(*given, environment=os.environ, ranks=2, vllm=True, timeout=240)
            assert done.returncode == 0 and output.is_file(), done.stdout[-3000:] + done.stderr[-6000:]
            self[size] = json.loads(output.read_text(encoding="utf-8"))
            return self[size]

    return OnTwoRanks()


@needs_vllm
@pytest.mark.parametrize("size", [1, 2])
def test_two_ranks_sample_their_own_prompts(folder: Path, observed: dict, on_two_ranks: dict, size: int):
    """With an engine each, and with one engine: the same tokens as a single rank, also after a refresh."""
    first, second = on_two_ranks[size]
    for stage in ("before", "after"):
        alone = observed["vllm"]["tied"][stage]["plain"]
        for split, mine, theirs in zip(probe.RANK_PROMPTS, first[stage], second[stage], strict=True):
            assert (len(mine), len(theirs)) == tuple(len(part) for part in split)
            assert tokens_of({"plain": mine + theirs}) == tokens_of({"plain": alone})
            logprobs = [
                [value for group in groups for _, values, _ in group for value in values]
                for groups in (mine + theirs, alone)
            ]
            assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
            weights = folder / ("tied" if stage == "before" else "tied_new")
            assert largest_difference(weights, mine + theirs, probe.SAMPLINGS["plain"]) < TOLERANCE


@needs_vllm
def test_an_engine_over_two_ranks_is_divided(folder: Path, on_two_ranks: dict):
    """Each rank has about half of the weights and a cache of as many tokens; both end a call that one ends."""
    whole, divided = on_two_ranks[1][0], on_two_ranks[2]
    for rank, row in enumerate(divided):
        # The key head is repeated, and norms and biases of rows are whole.
        assert 0.5 * whole["shards"][0] < row["shards"][0] < 0.6 * whole["shards"][0]
        assert row["shards"][1] == whole["shards"][1]
        assert row["reason"] == "vllm, as rollout.engine asks, with 2 ranks per engine."
        assert row["compiled"] == 0
        assert row["failure"].startswith("KeyError" if rank == 1 else "RuntimeError: rank 1, which shares its engine")
    assert not [*Path("/dev/shm").glob("*cpushm*")], "the next engine could not start"


def tokens_of(stage: dict) -> dict:
    """The token ids alone."""
    stage = stage.get("before", stage)
    return {name: [[tokens for tokens, _, _ in group] for group in groups] for name, groups in stage.items()}


def test_a_tied_head_alone_stands_for_the_embedding(folder: Path):
    sampler = rollout.load("transformers", folder / "tied")
    pairs = [("lm_head.weight" if "embed" in n else n, w) for n, w in probe.weights(folder / "tied_new", False)]
    sampler.load_weights(pairs)
    sampling = probe.SAMPLINGS["plain"]
    actual = probe.plain(sampler.sample(probe.PROMPTS, 2, sampling, probe.SEEDS))
    assert largest_difference(folder / "tied_new", actual, sampling) < TOLERANCE


def test_small_batches_change_nothing(folder: Path):
    sampling = probe.SAMPLINGS["plain"]
    actual = [
        probe.plain(
            rollout.load("transformers", folder / "tied", token_budget=budget).sample(
                probe.PROMPTS, 3, sampling, probe.SEEDS
            )
        )
        for budget in (1, 90, 100_000)
    ]
    assert [tokens_of({"plain": f}) for f in actual[:2]] == [tokens_of({"plain": actual[2]})] * 2
