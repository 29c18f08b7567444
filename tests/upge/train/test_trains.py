"""Every algorithm file, and corrections on top, trains the shipped model for a few steps through the command line."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

import algorithms
from experiments.config import MODELS
from experiments.run.prepare import load_prompting
from experiments.run.problems import load_splits
from tests.running import ROOT, environment, lines, without_times
from upge import Pipeline
from upge.config import from_tree
from upge.train.config import ModelConfig

#: Settings with which what happens now and then happens within three steps.
MORE = {
    "amft": ["algo.terms.sft.gate.every=1"],
    "relift": ["algo.interleaved_update.size=2"],
    "ppo": ["optimizer.mini_batches=2"],
    "kl_cov": ["optimizer.mini_batches=2"],
    "gac": ["algo.terms.sft.gate.every=2"],
    "exgrpo": ["algo.replay.start=0"],
}
#: Other predictions than the policy's own, from a prompt that says more.
_TEACHER = ["teacher.self=true", "teacher.template='{prompt} {answer} {prompt}'"]
MORE |= {name: _TEACHER for name in ("gkd", "opd", "opsd", "sdpo")}
FURTHER = {
    "stages with a schedule": [
        "algo=sft_then_grpo",
        "algo.stages.reinforce.algorithm=chord_mu",
        "algo.stages.reinforce.algorithm.terms.sft.gate.decay=2",
        "algo.stages.reinforce.share=1.0",
    ],
    "grpo with tis and KL": ["algo=grpo", "correction=[tis,kl_k3,entropy]"],
    "grpo with masks": ["algo=grpo", "correction=[icepop,dual_clip,overlong]", "optimizer.epochs=2"],
    "dapo with a curriculum": ["algo=dapo", "correction=curriculum"],
    "rloo with KL in the reward": ["algo=rloo", "correction=[mis,kl_reward,dynamic_sampling]"],
}
#: What a guided rollout's line says is compared with the demonstration. Lengths of prefixes change with every step.
_GUIDED = {"prefix_rft": "algo.guidance.length.low.decay=3", "uft": "algo.guidance.length.probability.decay=3"}
_KEPT = ["log_rollouts=1", "checkpoint.every=1", "checkpoint.keep=0"]
MORE |= {name: [*_KEPT, schedule] for name, schedule in _GUIDED.items()}
MORE["gdpo"] = ["verify.verifier=number as correct + 0.2*boxed as format", "verify.success=correct"]
RUNS = {name: [f"algo={name}", *MORE.get(name, [])] for name in algorithms.names()} | FURTHER
#: The same runs once more, from their second step and on two ranks.
AGAIN = {f"{name}, resumed": [*RUNS[name], f"interrupted={name}"] for name in _GUIDED}
AGAIN |= {f"{name}, two ranks": [*RUNS[name], "ranks=2"] for name in _GUIDED}
STEPS = 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs, made by one process that imports everything once."""
    path = tmp_path_factory.mktemp("trained")
    verifier = "verify.verifier=number"  # it loads no parser
    words = [word for name, arguments in (RUNS | AGAIN).items() for word in ("--", name, verifier, *arguments)][1:]
    command = [sys.executable, "-m", "tests.train_all", str(path), *words]
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment() | threads, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", RUNS)
def test_it_trains(folder, name):
    log = (folder / f"{name}.log").read_text()
    assert log.splitlines()[-1] == "0", log[-3000:]
    metrics = lines(folder / name / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3] and STEPS == 3
    norms = [line["grad_norm"] for line in metrics if line["updates"]]
    assert norms and all(norm is not None and math.isfinite(norm) and norm > 0 for norm in norms)
    assert metrics[-1]["skipped_updates"] == 0
    before, after = (load_file(path / "model.safetensors") for path in (MODELS / "tiny", folder / name / "final"))
    assert set(before) == set(after) and all(bool(weight.isfinite().all()) for weight in after.values())
    assert any(not bool((before[key] == after[key]).all()) for key in before)


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", algorithms.names())
def test_it_gets_what_it_asks_for_and_no_more(folder, name):
    """Critic, memory, new prompts, interleaved updates and stages show in the metrics exactly where asked for."""
    metrics = lines(folder / name / "metrics.jsonl")
    figures = {key for line in metrics for key in line}
    algorithm = algorithms.load(name)
    ones = [algorithm] if not isinstance(algorithm, Pipeline) else [s.algorithm for s in algorithm.stages.values()]
    assert ("critic/loss" in figures) == any(one.critic is not None for one in ones)
    measured = ("slope", "noise", "disagreement")
    assert {k for k in figures if k.startswith("state/") and not k.endswith(measured)} == {
        f"state/{variable}" for one in ones for variable in one.stateful
    }
    assert ("sampling/rounds" in figures) == any(one.dynamic_sampling is not None for one in ones)
    assert ("sampling/effective_prompts" in figures) == any(one.curriculum is not None for one in ones)
    assert ("memory/prompts" in figures) == any(one.memory is not None for one in ones)
    assert ("replay/size" in figures) == any(one.replay is not None for one in ones)
    assert ("interleaved_update/remembered" in figures) == any(one.interleaved_update is not None for one in ones)
    assert ("stage" in figures) == isinstance(algorithm, Pipeline)
    assert ("reward/mean" in figures) == algorithm.needs.rollouts
    terms = {key.removesuffix("/tokens") for key in figures if key.endswith("/tokens")} - {"trained"}
    assert terms == {term for one in ones for term in one.terms}


@pytest.mark.timeout(1600)
def test_a_stateful_gate_moves_and_an_interleaved_update_happens(folder):
    for name, start in (("amft", 0.8), ("gac", 0.5)):
        mu = [line["state/mu"] for line in lines(folder / name / "metrics.jsonl")]
        assert mu[0] == start and len(set(mu)) == STEPS
    assert sum(line["interleaved_update/updates"] for line in lines(folder / "relift" / "metrics.jsonl")) >= 1
    assert [line["stage"] for line in lines(folder / "sft_then_grpo" / "metrics.jsonl")] == [1, 1, 2]


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(("name", "guided"), [("prefix_rft", 6), ("uft", 24)])
def test_guided_rollouts_begin_as_the_demonstration(folder, name, guided):
    """One rollout of each of six prompts, or all four; the line has the whole response, and the others are plain."""
    records = lines(folder / name / "rollouts" / "step_000001.jsonl")
    assert len(records) == 24 and not any(record["is_demonstration"] for record in records)
    continued = [record for record in records if "prefix_tokens" in record]
    assert len(continued) <= guided and len(continued) > guided / 2, "some prefixes may be empty"
    assert {sum(one["group"] == g for one in continued) for g in {one["group"] for one in continued}} == {guided // 6}
    tree = OmegaConf.to_container(OmegaConf.load(folder / name / "config.yaml"))
    demonstrations = {p.prompt: p.demonstrations[0] for p in load_splits(tree["data"]).train}
    prompting = load_prompting(from_tree(ModelConfig, tree["model"]))
    for record in continued:
        (expected,) = prompting.response_arrays([demonstrations[record["prompt"]]])
        prefix = prompting.decode([tuple(expected[: record["prefix_tokens"]])])[0]
        assert record["response"].startswith(prefix.rstrip()) and record["tokens"] > record["prefix_tokens"]
    metrics = lines(folder / name / "metrics.jsonl")
    assert metrics[0]["guidance/share"] == len(continued) / 24
    if name == "uft":  # in which each of them reaches the model
        assert metrics[0]["trained/tokens"] == sum(record["tokens"] for record in records), "with those of prefixes"
    assert all(0 < line["sampler/logprob_diff_max"] < 1e-3 for line in metrics), "after its prefix, as it was sampled"


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", _GUIDED)
def test_a_resumed_guided_run_equals_the_undisturbed_one(folder, name):
    """To the bit, in the step after the checkpoint as well, whose prefixes have another distribution."""
    whole, resumed = folder / name, folder / f"{name}, resumed"
    assert "continuing" in (folder / f"{name}, resumed.log").read_text()
    expected, actual = (without_times(lines(path / "metrics.jsonl")) for path in (whole, resumed))
    assert actual == expected and len({line["guidance/prefix_tokens"] for line in actual}) == STEPS
    files = [Path("final", "model.safetensors"), *(Path("rollouts", f"step_{step:06d}.jsonl") for step in (1, 2, 3))]
    assert all((resumed / file).read_bytes() == (whole / file).read_bytes() for file in files)


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", _GUIDED)
def test_prefixes_do_not_depend_on_the_number_of_ranks(folder, name):
    for step in (1, 2, 3):
        one, two = (lines(folder / run / "rollouts" / f"step_{step:06d}.jsonl") for run in (name, f"{name}, two ranks"))
        prefixes = [[row.get("prefix_tokens") for row in rows] for rows in (one, two)]
        assert prefixes[0] == prefixes[1] and any(prefixes[0])
        # Before the first update the weights are equal, and so the rollouts.
        keys = ("prompt", "group", "response") if step == 1 else ("prompt", "group")
        assert all([row[key] for row in one] == [row[key] for row in two] for key in keys)


@pytest.mark.timeout(1600)
def test_a_stage_has_a_schedule_of_its_own(folder):
    """One step of imitation, then two whose μ falls from 0.9 along half a cosine of two steps to 0.05."""
    metrics = lines(folder / "stages with a schedule" / "metrics.jsonl")
    assert [line["stage"] for line in metrics] == [1, 2, 2]
    assert [line["sft/coefficient"] for line in metrics] == pytest.approx([1.0, 0.9, 0.475])
