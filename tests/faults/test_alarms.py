"""A run says in one line, once, that something is wrong with it, and stops if it is told to."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import algorithms
from tests.running import ROOT, SMALL, lines, run
from upge.config import from_tree
from upge.data import Example, Problem
from upge.errors import ConfigError
from upge.train.alarms import ALARMS, AlarmConfig, AlarmMonitor, raised
from upge.train.config import RunConfig
from upge.train.given import demonstration_metrics
from upge.train.metrics import rollout_metrics
from upge.train.sample import Trajectory

LIMITS = AlarmConfig()
#: Alarm → metrics that raise it, metrics that just do not, and what the text says.
STEPS = {
    "truncated": ({"response_cut_share": 0.51}, {"response_cut_share": 0.5}, "51% of the responses were cut off"),
    "no_signal": ({"gate/no_signal_prompts": 1.0}, {"gate/no_signal_prompts": 0.98}, "no prompt had a signal"),
    "sampler_drift": ({"sampler/logprob_diff_max": 2.5}, {"sampler/logprob_diff_max": 1.2}, "differ by up to 2.5"),
    "entropy": ({"entropy": 0.004}, {"entropy": 0.01}, "the entropy is 0.004 nats"),
    "same_answer": ({"same_answer_share": 1.0}, {"same_answer_share": 0.9}, "100% of the rollouts give the same"),
    "verifier_errors": (
        {"verify/failed_share": 0.25},
        {"verify/failed_share": 0.1},
        "25% of the rollouts got no verdict",
    ),
    "demonstrations_dropped": (
        {"demonstrations_dropped_share": 1.0},
        {"demonstrations_dropped_share": 0.5},
        "100% of the prompts lost",
    ),
    "demonstrations_cut": (
        {"demonstrations_cut_share": 0.5},
        {"demonstrations_cut_share": 0.05},
        "50% of the demonstrations end without a stop token",
    ),
    "gradient_split": (
        {"gradient/split_error": 0.35},
        {"gradient/split_error": 0.04},
        "smaller micro-batches change the gradient by 35% of its norm",
    ),
    "extreme_ratios": (
        {"rl/extreme_ratio_share": 0.5, "sampler/extreme_ratio_share": 0.1},
        {"rl/extreme_ratio_share": 0.05},
        "50% of the tokens have a probability ratio of the policy and the behavior policy (term rl)",
    ),
    "effective_samples": (
        {"sampler/ess_responses": 0.45, "behavior/ess_responses": 0.4},
        {"sampler/ess_responses": 0.5, "behavior/ess_responses": 0.9},
        "only 40% of the number of rollouts, because updates have moved the policy; lower optimizer.lr",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_an_alarm_is_raised_beyond_its_limit_in_steps_in_a_row(name: str) -> None:
    bad, good, text = STEPS[name]
    needed = {"no_signal": LIMITS.no_signal, "gradient_split": 1}.get(name, LIMITS.steps)
    assert raised([bad] * (needed - 1), LIMITS, 100) == {}
    assert list(raised([bad] * needed, LIMITS, 100)) == [name]
    message = raised([good, *[bad] * needed], LIMITS, 100)[name]
    assert (
        text in message
        and f"(alarm {name}, {needed} step{'s' * (needed > 1)} in a row)" in message
        and "\n" not in message
    )
    for other in (good, {}, dict.fromkeys(bad)):
        assert raised([bad] * (needed - 1) + [other], LIMITS, 100) == {}
        assert raised([*[bad] * needed, other], LIMITS, 100) == {}


def test_a_number_that_is_none_raises_the_alarm() -> None:
    nan = float("nan")
    assert list(raised([{"sampler/logprob_diff_max": nan}] * 3, LIMITS, 100)) == ["sampler_drift"]
    assert list(raised([{"entropy": nan}] * 3, LIMITS, 100)) == ["entropy"]


def test_every_step_counts_in_a_run_shorter_than_the_limit() -> None:
    assert "truncated" in raised([{"response_cut_share": 1.0}], LIMITS, 1)
    assert "alarm truncated, 1 step in a row" in raised([{"response_cut_share": 1.0}], LIMITS, 1)["truncated"]


def test_each_is_raised_once_also_by_a_run_that_continues() -> None:
    limits = dataclasses.replace(LIMITS, steps=2)
    bad: dict[str, float | None] = {"response_cut_share": 1.0, "entropy": 0.0}
    watch = AlarmMonitor(limits, 100)
    assert [set(watch.step(bad)) for _ in range(4)] == [set(), {"truncated", "entropy"}, set(), set()]
    continued = AlarmMonitor(limits, 100, recent=[bad], known=["truncated"])
    assert set(continued.step(bad)) == {"entropy"} and not continued.step(bad)


def test_every_alarm_has_a_limit_a_row_in_the_documentation_and_a_case_here() -> None:
    fields = {field.name for field in dataclasses.fields(AlarmConfig)} - {"steps"}
    section = (ROOT / "docs" / "running.md").read_text().partition("\n## Alarms\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert fields == set(ALARMS) == documented == set(STEPS)
    for name in fields:
        assert f"`alarms.{name}`" in section
    with pytest.raises(ConfigError, match="stop.alarms: no alarm 'entropie'; did you mean 'entropy'"):
        from_tree(RunConfig, {"stop": {"alarms": ["entropie"]}})


def test_the_alarm_of_few_effective_samples_names_a_correction() -> None:
    for pair, correction in (
        ("sampler", "correction=tis, or correction=mis"),
        ("behavior", "correction=sequence_mask"),
    ):
        text = raised([{f"{pair}/ess_responses": 0.1}] * LIMITS.steps, LIMITS, 100)["effective_samples"]
        named = re.findall(r"correction=(\w+)", text)
        assert f"add {correction}" in text and set(named) <= set(algorithms.corrections())


def rollout(group: int, extracted: str | None, status: str = "ok", response: tuple[int, ...] = (2, 3)) -> Trajectory:
    return Trajectory(group, group, (1,), response, 0.0, False, (-0.5,) * len(response), True, status, extracted)


def test_the_metrics_behind_them() -> None:
    given = [rollout(group, "7") for group in range(3)] + [rollout(3, "8", "timeout"), rollout(3, "9", "error")]
    metrics = rollout_metrics(given)
    assert metrics["same_answer_share"] == 3 / 5 and metrics["verify/failed_share"] == 2 / 5
    assert "same_answer_share" not in rollout_metrics(given[:3]), "too few prompts"
    same = [rollout(group, None, response=(9,)) for group in range(4)]
    assert rollout_metrics(same)["same_answer_share"] == 1.0, "without an answer the responses are compared"
    problems = [Problem(str(i), "?", "1", demonstrations=("a",) if i else ()) for i in range(3)]
    examples = [Example(problem, (1,), ((2,),) if i == 1 else ()) for i, problem in enumerate(problems)]
    actual = demonstration_metrics([rollout(i, None) for i in range(3)], examples, [9])
    assert actual == {"demonstrations_dropped_share": 1 / 3}
    given = [Trajectory(1, 1, (1,), ids, 1.0, True) for ids in ((2, 9), (2,), ())]
    assert demonstration_metrics(given, examples, [9])["demonstrations_cut_share"] == 2 / 3
    assert "demonstrations_cut_share" not in demonstration_metrics(given[:1], examples, [9])


def test_a_run_raises_its_alarms_and_stops_where_it_is_told_to(tmp_path: Path) -> None:
    """All responses are cut off and wrong. The first command stops; the same one continues to the end."""
    out = tmp_path / "run"
    settings = [*SMALL, "algo=grpo", "steps=3", "eval.every=-1", "rollout.engine=transformers", f"output={out}"]
    settings += ["rollout.max_response_tokens=2", "alarms.steps=1", "alarms.no_signal=2", "stop.alarms=[truncated]"]
    stopped = run(*settings, code=3)
    assert stopped.stdout.count("alarm: 100% of the responses were cut off") == 1
    assert "stopped by the alarm truncated (stop.alarms); the state is saved" in stopped.stdout
    assert (out / "checkpoints" / "step_000001").is_dir() and not (out / "final").exists()
    whole = run(*settings)
    assert "cut off" not in whole.stdout and (out / "final").is_dir()
    names = [(line["step"], line["alarm"]) for line in lines(out / "alarms.jsonl")]
    assert names.count((1, "truncated")) == 1 and (2, "no_signal") in names and len(set(names)) == len(names)
    assert "Alarm at step 1: 100% of the responses were cut off" in (out / "report.html").read_text()
