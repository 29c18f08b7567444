"""Faults on purpose: each changes what it says and nothing else, says so everywhere, and is noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import algorithms
from experiments.compare import load as compare
from experiments.diagnose import __main__ as diagnose
from experiments.diagnose import sampling
from experiments.faults import __main__ as command
from experiments.report.folder import read_run
from experiments.report.page import page_content, write_report
from experiments.run import faults
from experiments.run.fault_plans import averaged, rescaled
from experiments.sweep import settings as sweep_settings
from tests import forked
from tests.evaluations import drawn, write_run
from tests.running import SMALL, environment, lines, run
from upge.algorithm import Algorithm
from upge.data import Example, Problem
from upge.errors import ConfigError
from upge.pipeline import Pipeline
from upge.plan import Plan
from upge.rollout import Sampling
from upge.train import parts as train_parts
from upge.train.alarms import AlarmConfig, raised
from upge.train.config import ModelConfig, RunConfig
from upge.train.faults import Fault, check_mark, marked
from upge.train.folder import FORMAT, RunFolder
from upge.train.sample import Trajectory, assemble, indexed
from upge.train.step_batch import StepBatch
from upge.train.update import Updater

#: Lengths of the responses of three groups of four, and rewards of which no two groups have the same deviation.
LENGTHS = (3, 5, 2, 7, 4, 4, 6, 1, 8, 2, 3, 5)
REWARDS = (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0)
#: Rows of two micro-batches of unequal counts; the second group is divided.
SPLIT = [torch.arange(5), torch.arange(5, 12)]


def batch() -> StepBatch:
    made = [
        Trajectory(i // 4, i // 4, (1, 2), tuple(range(3, 3 + n)), r, False, (-1.0,) * n, True, "ok")
        for i, (n, r) in enumerate(zip(LENGTHS, REWARDS, strict=True))
    ]
    return StepBatch(assemble(indexed(made), 0), indexed(made))


def logprobs() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return -torch.rand(12, max(LENGTHS), generator=g, dtype=torch.float64)


def gradient(plan: Plan, given: StepBatch) -> Tensor:
    """∂loss/∂log π [B, T] of a plan, in float64 and in one piece."""
    live = logprobs().requires_grad_()
    plan.estimate(dataclasses.replace(given.columns, logprobs=live)).loss.backward()
    assert live.grad is not None
    return live.grad


def load(name: str, *overrides: str, corrections: tuple[str, ...] = ()) -> Algorithm:
    one = algorithms.load(name, overrides, corrections=corrections)
    assert isinstance(one, Algorithm)
    return one


# What each fault changes, in float64 against the unsplit batch.


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_a_mean_of_means_is_the_mean_of_each_micro_batch_as_a_batch_of_its_own(name: str) -> None:
    """Advantages are those of the whole batch, divisors those of the micro-batch."""
    algorithm, given = load(name), batch()
    plan = algorithm.plan(given.columns)
    actual = gradient(averaged(algorithm, given, plan, SPLIT), given)
    expected = torch.zeros_like(actual)
    for rows, one in zip(SPLIT, algorithm.plans(given.columns, SPLIT), strict=True):
        live = logprobs()[rows].requires_grad_()
        own = given.select(rows).columns
        own = dataclasses.replace(own, logprobs=live[:, : own.response_mask.shape[1]])
        one.estimate(own).loss.backward()
        assert live.grad is not None
        expected[rows] = live.grad / 2
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(actual, gradient(plan, given), rtol=1e-3)


def test_a_mean_of_means_changes_nothing_in_one_micro_batch_or_with_equal_counts() -> None:
    algorithm, given = load("grpo"), batch()
    plan = algorithm.plan(given.columns)
    one = averaged(algorithm, given, plan, [torch.arange(12)])
    torch.testing.assert_close(gradient(one, given), gradient(plan, given), rtol=1e-12, atol=0)
    # A mean over questions of whole groups: three micro-batches of one question each.
    hpt = load("hpt")
    plan = hpt.plan(given.columns)
    groups = averaged(hpt, given, plan, [torch.arange(4) + first for first in (0, 4, 8)])
    torch.testing.assert_close(gradient(groups, given), gradient(plan, given), rtol=1e-12, atol=0)


def test_the_deviation_is_that_of_the_micro_batch() -> None:
    algorithm, given = load("grpo"), batch()
    plan = algorithm.plan(given.columns)
    faulty = rescaled(algorithm, given, plan, SPLIT)
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    centred = rewards - rewards.view(3, 4).mean(1).repeat_interleave(4)
    right, wrong = torch.zeros(12).double(), torch.zeros(12).double()
    for rows in SPLIT:
        wrong[rows] = centred[rows] / (centred[rows].std() + 1e-6)
    right = centred / (rewards.view(3, 4).std(1).repeat_interleave(4) + 1e-6)
    ratio = (wrong / right)[:, None]
    torch.testing.assert_close(gradient(faulty, given), gradient(plan, given) * ratio, rtol=1e-9, atol=1e-15)
    whole = rescaled(load("dr_grpo"), given, load("dr_grpo").plan(given.columns), SPLIT)
    torch.testing.assert_close(gradient(whole, given), gradient(load("dr_grpo").plan(given.columns), given))


def test_k1_in_the_loss_has_the_gradient_of_the_score() -> None:
    """β·w·∇log π, whatever the reference policy, where k3 has β·w·(1 - π_0/π)·∇log π."""
    right = load("grpo", "correction.kl_k3.coefficient=0.5", corrections=("kl_k3",))
    wrong, given = faults.with_k1(right), batch()
    columns = dataclasses.replace(given.columns, reference_logprobs=logprobs() - 0.3)
    given = given._replace(columns=columns)
    plain = gradient(load("grpo").plan(columns), given)
    mask = columns.response_mask
    share = 0.5 * mask.double() / mask.sum()
    torch.testing.assert_close(gradient(wrong.plan(columns), given) - plain, share)
    factor = 1 - torch.exp(torch.tensor(-0.3, dtype=torch.float64))
    torch.testing.assert_close(gradient(right.plan(columns), given) - plain, share * factor)


class Summing:
    """An engine that adds gradients as DeepSpeed's does."""

    def __init__(self) -> None:
        self.gradient: Tensor = torch.zeros(2, dtype=torch.float64)
        self.world = SimpleNamespace(size=1)

    def drop_gradient(self) -> None:
        self.gradient = torch.zeros(2, dtype=torch.float64)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.gradient = self.gradient + loss


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [9.0, 12.0]),
        ("dropped_micro_batches", [5.0, 6.0]),
        ("gradient_over_group", [9.0 / 4, 12.0 / 4]),
        ("sampler_top_p", [9.0, 12.0]),
    ],
)
def test_what_the_engine_is_given(name: str, expected: list[float]) -> None:
    engine = Summing()
    updater = object.__new__(Updater)
    vars(updater).update(engine=engine, filler=None, algorithm=None)
    faulty = faults.load(name, 4).updater(updater)
    for number, loss in enumerate(([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])):
        faulty.engine.backward(torch.tensor(loss, dtype=torch.float64), last=number == 2)
    assert engine.gradient.tolist() == expected
    assert updater.engine is engine, "the updater itself is unchanged"


class Recording:
    """A sampler that records what it is asked for."""

    name = "recording"

    def __init__(self) -> None:
        self.asked: list[Sampling] = []
        self.loaded: list[dict[str, float]] = []

    def sample(self, prompts: object, n: int, sampling: Sampling, seeds: object) -> None:
        self.asked.append(sampling)

    def load_weights(self, weights: object) -> None:
        self.loaded.append({name: float(weight) for name, weight in weights})  # type: ignore[attr-defined]


def test_what_the_sampler_is_asked_for() -> None:
    asked = Sampling(0.5, max_tokens=3)
    for name, expected in {
        "sampler_top_p": dataclasses.replace(asked, top_p=0.9),
        "sampler_temperature": dataclasses.replace(asked, temperature=0.35),
        "none": asked,
        "mean_of_means": asked,
    }.items():
        engine = Recording()
        sampler = faults.load(name, 4).sampler(engine)  # type: ignore[arg-type]
        sampler.sample([[1]], 1, asked, [0])
        assert engine.asked == [expected] and sampler.name == "recording", name


def test_stale_weights_are_the_first_ones() -> None:
    engine = Recording()
    sampler = faults.load("stale_weights", 4).sampler(engine)  # type: ignore[arg-type]
    weight, gathered = torch.tensor(1.0), []
    for step in range(3):
        sampler.load_weights((name, gathered.append(name) or weight) for name in ("a",))
        weight += step + 1
    assert engine.loaded == [{"a": 1.0}] * 3 and gathered == ["a"] * 3, "every rank gathers every weight"


def test_demonstrations_are_cut_at_the_median_and_lose_their_end() -> None:
    examples = [Example(Problem("p", "?", "1"), (1,), ((*range(5, 5 + n), 0),)) for n in (2, 4, 6)]
    cut = faults.load("cut_demonstrations", 4).examples(examples)
    assert [one.demonstrations[0] for one in cut] == [(5, 6, 0), (5, 6, 7, 8, 0), (5, 6, 7, 8, 9)]
    alike = faults.load("cut_demonstrations", 4).examples(examples[:1])
    assert alike[0].demonstrations == ((5, 6),)
    assert faults.load("none", 4).examples(examples) is examples


# No fault is no change.


def test_without_a_fault_everything_is_itself() -> None:
    fault, one = faults.load("none", 4), object()
    assert fault == Fault() and not fault.is_on and fault.metrics() == {} and fault.describe() == ""
    for hook in (fault.examples, fault.sampler, fault.updater):
        assert hook(one) is one  # type: ignore[arg-type]


# Refusals and marks.


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="fault: no fault 'dropped'; did you mean 'dropped_micro_batches'"):
        faults.load("dropped", 4)
    for name, algo, lack in [
        ("k1_in_loss", "grpo", "a KL penalty by k2 or k3; add one with correction=kl_k3"),
        ("micro_batch_std", "dr_grpo", "an advantage that is divided by a standard deviation"),
        ("cut_demonstrations", "grpo", "demonstrations"),
        ("stale_weights", "sft", "rollouts"),
    ]:
        with pytest.raises(ConfigError, match=f"fault: {name} would change nothing: '{algo}' lacks {lack}"):
            faults.check(name, algorithms.load(algo))
    faults.check("gradient_over_group", algorithms.load("sft_then_grpo"), ["reinforce"])
    with pytest.raises(ConfigError, match="'sft' lacks"):
        faults.check("gradient_over_group", algorithms.load("sft_then_grpo"), ["demonstrate"])
    faults.check("stale_weights", algorithms.load("sft_then_grpo"))
    faults.check("none", algorithms.load("sft"))


def test_a_marked_model_is_refused_and_named(tmp_path: Path) -> None:
    Fault().mark(tmp_path)
    assert list(tmp_path.iterdir()) == [] and marked(tmp_path) == marked("a/hub-name") == "none"
    faults.load("stale_weights", 4).mark(tmp_path)
    assert marked(tmp_path) == "stale_weights"
    assert "trained with a fault on purpose" in (tmp_path / "README.md").read_text()
    check_mark(tmp_path, "stale_weights")
    with pytest.raises(ConfigError, match=r"reference\.path: .* fault=stale_weights"):
        check_mark(tmp_path, key="reference.path")


def test_an_unpacked_checkpoint_is_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sampling, "unpack", lambda checkpoints, tag, model, folder: folder.mkdir())
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / folder.tag(2)).mkdir(parents=True)
    (folder.path / "run.json").write_text(json.dumps({"format": FORMAT, "fault": "stale_weights", "finished_step": 2}))
    monkeypatch.setattr(RunFolder, "checkpoint_steps", lambda self: [2])
    first, last = sampling._of_run(folder, ModelConfig(path="a/hub-name"), tmp_path)
    assert diagnose.trained_with_faults([first, last]) == ["2 was trained with a fault on purpose (stale_weights)"]


def test_a_sweep_puts_the_fault_into_the_label() -> None:
    faulty = "variants={A: {algo: sft, fault: mean_of_means}, B: {algo: sft}}"
    assert sweep_settings.load([faulty]).labels == ["A, fault=mean_of_means", "B"]
    assert sweep_settings.load(["grid.algo=[sft]", "fault=mean_of_means"]).labels == ["sft, fault=mean_of_means"]
    labels = sweep_settings.load(["grid.fault=[none,mean_of_means]"]).labels
    assert labels == ["fault=none", "fault=mean_of_means"]


def test_every_fault_says_what_it_is_and_where_it_was_seen() -> None:
    for name in faults.FAULTS:
        assert faults.summary(name).endswith(".") and faults.origin(name).endswith("."), name
        assert command.algorithm(name), "some run shows it"
    page = command.PAGE.read_text("utf-8")
    assert all(f"`{name}`" in page for name in faults.FAULTS)


# The checks that notice them.


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with the fault of an offloaded optimizer, which measures the split in its first step."""
    out = tmp_path_factory.mktemp("faulty") / "run"
    settings = [*SMALL, "algo=hpt", "steps=1", "eval.every=-1", "rollout.engine=transformers", f"output={out}"]
    settings += ["optimizer.micro_batch_tokens=64", "diagnose.split_every=1"]
    done = run(*settings, "fault=dropped_micro_batches")
    assert "hpt with fault=dropped_micro_batches on tiny" in done.stdout
    assert "FAULT ON PURPOSE, fault=dropped_micro_batches: Only the gradient of" in done.stdout
    assert done.stdout.count("alarm: smaller micro-batches change the gradient") == 1
    return out


@pytest.mark.slow
def test_a_run_with_a_fault_says_so_everywhere(short: Path) -> None:
    assert all(line["fault/dropped_micro_batches"] == 1.0 for line in lines(short / "metrics.jsonl"))
    assert "fault: dropped_micro_batches" in (short / "config.yaml").read_text()
    assert json.loads((short / "run.json").read_text())["fault"] == "dropped_micro_batches"
    assert marked(short / "final") == "dropped_micro_batches"
    assert page_content(read_run(short))["fault"] == "dropped_micro_batches"
    page = write_report(short).read_text("utf-8")
    assert 'role="alert"' in page and "Fault on purpose: dropped_micro_batches" in page
    assert [line["alarm"] for line in lines(short / "alarms.jsonl")] == ["gradient_split"]
    refused = run(*SMALL, "algo=sft", f"model={short / 'final'}", "--dry-run", code=2)
    assert "was trained with a fault on purpose, fault=dropped_micro_batches" in refused.stderr


@pytest.mark.slow
def test_the_same_run_without_it_is_silent(tmp_path: Path) -> None:
    settings = [*SMALL, "algo=hpt", "steps=1", "eval.every=-1", "rollout.engine=transformers"]
    settings += ["optimizer.micro_batch_tokens=64", "diagnose.split_every=1", f"output={tmp_path / 'run'}"]
    done = run(*settings)
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["gradient/split_error"] < 1e-4 and not [key for key in line if key.startswith("fault/")]
    assert not (tmp_path / "run" / "alarms.jsonl").exists() and "FAULT" not in done.stdout
    assert marked(tmp_path / "run" / "final") == "none" and not (tmp_path / "run" / "final" / "README.md").exists()


def test_a_comparison_names_it(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, {"math": drawn("math", 10, 1, 0.5)}) for name in ("a", "b")]
    scores = json.loads((paths[0] / "scores.json").read_text())
    (paths[0] / "scores.json").write_text(json.dumps({**scores, "fault": "mean_of_means"}))
    runs = compare.load([str(path) for path in paths])
    assert [one.name for one in runs] == ["a, fault=mean_of_means", "b"]
    assert "a, fault=mean_of_means was trained with a fault on purpose (mean_of_means)." in compare.notes(runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [("sampler_top_p", ["log-probs", "refresh"]), ("stale_weights", ["refresh"])],
)
def test_the_doctor_notices_a_faulty_sampler(tmp_path: Path, name: str, rows: list[str]) -> None:
    """And is silent without one: tests/experiments/test_doctor.py."""
    given = ("checks=sampler", "prompts=2", "rollout.engine=transformers", f"fault={name}", f"output={tmp_path}")
    done = forked.run("experiments.doctor", *given, environment=environment(), timeout=300)
    assert done.returncode == 1 and f"fault={name}" in done.stdout
    made = json.loads((tmp_path / "doctor.json").read_text())["rows"]
    assert [row["name"] for row in made if row["verdict"] == "problem"] == rows


def test_the_alarm_for_cut_demonstrations_counts_missing_ends() -> None:
    assert list(raised([{"demonstrations_cut_share": 0.5}] * 3, AlarmConfig(), 100)) == ["demonstrations_cut"]
    assert raised([{"demonstrations_cut_share": 0.05}] * 3, AlarmConfig(), 100) == {}
    assert list(raised([{}, {"gradient/split_error": 0.06}], AlarmConfig(), 100)) == ["gradient_split"]
    assert raised([{"gradient/split_error": 0.04}], AlarmConfig(), 100) == {}


def test_a_fault_of_the_updates_can_be_limited_to_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, fault = algorithms.load("sft_then_grpo"), faults.load("dropped_micro_batches", 4)
    monkeypatch.setattr(train_parts, "Learner", lambda *given, adapt: adapt)
    for stages, expected in {(): {"demonstrate", "reinforce"}, ("demonstrate",): {"demonstrate"}}.items():
        config = dataclasses.replace(RunConfig(), fault_stages=list(stages))
        prompting = SimpleNamespace(stop_token_ids=())
        parts: Any = SimpleNamespace(
            config=config, prompting=prompting, models=None, train=None, world=None, fault=fault
        )
        learners = {
            span.name: train_parts.learner_of(parts, span, lambda: None) for span in Pipeline.of(pipeline).spans(10)
        }
        assert {name for name, adapt in learners.items() if adapt is fault.updater} == expected
    for name, stages, algo, text in [
        ("dropped_micro_batches", ["demonstrates"], "sft_then_grpo", "did you mean 'demonstrate'"),
        ("dropped_micro_batches", ["demonstrate"], "sft", "leave it out, because the algorithm has no stages"),
        ("stale_weights", ["reinforce"], "sft_then_grpo", "fault=stale_weights does not change the updates"),
    ]:
        config = dataclasses.replace(RunConfig(), fault=name, fault_stages=stages)
        composed: Any = SimpleNamespace(config=config, algorithm=algorithms.load(algo))
        with pytest.raises(ConfigError, match=f"fault_stages: .*{text}"):
            faults.prepare(composed)
