"""The command line of the measurement of regret: its folder, its numbers, and what it refuses."""

from __future__ import annotations

import contextlib
import csv
import json
from types import SimpleNamespace

import pytest
import torch

import algorithms
from experiments.diagnose import sampling
from experiments.regret import __main__ as regret
from experiments.regret import analysis, measuring, write
from experiments.regret.analysis import RULES, merged
from experiments.regret.settings import choose, gates_of
from upge.errors import ConfigError
from upge.train.faults import Fault

#: A measurement of seconds.
TINY = (
    "data.levels=[2 numbers,3 numbers,4 mixed]", "data.train_size=24", "prompts=6", "group_size=3", "held_out=12",
    "held_out_samples=4", "parts=3", "finite=3", "finite_parts=1", "rollout.max_response_tokens=48",
)  # fmt: skip


@pytest.mark.slow
def test_every_number_is_recorded(tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        assert regret.main([*TINY, "policies=[before:tiny]", f"output={folder}"]) == 0
    whole, again = (json.loads((folder / "regret.json").read_text()) for folder in folders)
    (policy,) = whole["policies"]
    assert [(one["rule"], one["objective"]) for one in policy["analyses"]] == [
        (rule, objective) for rule in RULES for objective in ("accuracy", "log-likelihood")
    ]
    names = [one["name"] for one in policy["analyses"][0]["scores"]]
    assert names[:3] == ["oracle", "best constant", "nothing"] and "hpt, γ=0, superrl" in names
    assert names[-2:] == ["learned from the pass rate", "learned from all features"]
    assert sum(one["groups"] for one in policy["analyses"][0]["by_count"]) == 12
    assert len(policy["finite"]) == 6 and whole["seed"] == 0 and whole["settings"]["own"]["parts"] == 3
    for one, other in zip(policy["analyses"], again["policies"][0]["analyses"], strict=True):
        for a, b in zip(one["scores"], other["scores"], strict=True):
            assert a["name"] == b["name"] and a["gain"]["value"] == pytest.approx(
                b["gain"]["value"], rel=1e-3, abs=1e-5
            )
    rows = list(csv.DictReader((folders[0] / "groups.csv").read_text().splitlines()))
    assert len(rows) == 12 and {row["policy"] for row in rows} == {"before"}
    text, page = (folders[0] / "report.md").read_text(), (folders[0] / "report.html").read_text()
    assert "| hpt, γ=0, superrl |" in text and page.count("<svg") == 2 and "src=" not in page
    assert (folders[0] / "adam-before.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["gates=[luffy,nothing]"], "gates: no algorithm 'nothing'"),
        (["gates=[srft]"], "srft does not have exactly one term on rollouts and one on demonstrations"),
        (["gates=[sft_then_grpo]"], "sft_then_grpo does not have"),
        (["gates=[1]"], "give names of algorithms"),
        (["parts=5", "held_out=12"], "parts: 5 with held_out=12"),
        (["parts=6", "held_out=6"], "parts: 6 with held_out=6"),
        (["finite_parts=17"], "finite_parts: 17 is more than parts=16"),
        (["mixtures=[0,2]"], "give numbers between 0 and 1"),
        (["mixtures=[]"], "give numbers between 0 and 1"),
        (["sketch=100"], "sketch: unknown key"),
        (["algos=[hpt]"], "algos: unknown key"),
        (["prompts=1"], "prompts: found 1, but an interval needs at least 2"),
        (["partz=3"], "unknown key; did you mean"),
        (["adam_length=0"], "adam_length: found 0"),
        (["held_out=99999", "parts=9"], "held_out: 99999"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, error, capsys):
    assert regret.main([*arguments, "model=tiny"]) == 2
    assert error in " ".join(capsys.readouterr().err.split())


def test_a_policy_with_a_fault_is_named(monkeypatch, tmp_path):
    Fault("stale_weights").mark(tmp_path)
    said = []
    monkeypatch.setattr(sampling, "problems", lambda *_: SimpleNamespace(notes=[]))
    monkeypatch.setattr(measuring, "measure", lambda *_: SimpleNamespace(label="faulty"))
    monkeypatch.setattr(analysis, "analyses", lambda *_: [])
    monkeypatch.setattr(write, "summary", lambda _: "")
    monkeypatch.setattr(write, "grids", lambda _: [])
    monkeypatch.setattr(write, "files", lambda measured, metadata, notes, folder: said.extend(notes) or [])
    assert regret.main(["model=tiny", f"policies=[faulty:{tmp_path}]", f"output={tmp_path / 'out'}"]) == 0
    assert said[0] == "faulty was trained with a fault on purpose (stale_weights)"


def test_gates_are_named_after_algorithms_and_thresholds():
    chosen = choose([*TINY, "gates=hpt,superrl,amft"])
    assert [name for name in chosen.gates if "constant" not in name] == [
        "hpt", "γ=0", "γ=0.333", "γ=0.667", "γ=1", "superrl", "amft",
    ]  # fmt: skip
    assert chosen.config.balance == 8 and {*chosen.signals.terms} == {chosen.rollouts, chosen.demonstrations}
    with pytest.raises(ConfigError, match="exactly one term"):
        gates_of("grpo", algorithms.load("grpo"), 8)


def test_help_lists_own_and_shared_keys():
    text = regret.help_text(everything=True)
    assert all(f"  {name}=" in text for name in ("gates", "parts", "adam_length", "prompts", "rollout.temperature"))
    assert "sketch=" not in text


def test_equal_gates_share_a_row():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    assert list(merged({"a": one, "c": other, "b": one, "w": one}, exclude=["w"])) == ["a, b", "c"]


def test_every_part_has_all_levels(monkeypatch):
    """The evaluation side alternates between its levels; with as many parts as levels each part would have only one."""
    examples = [SimpleNamespace(problem=SimpleNamespace(level=level)) for level in "abc" * 4]
    drawn = lambda sampler, which, examples, count: [[example.problem.level] for example in examples]  # noqa: E731
    monkeypatch.setattr(measuring, "Draws", lambda *_: drawn)
    monkeypatch.setattr(measuring, "verifier_pool", lambda *_: contextlib.nullcontext(SimpleNamespace(rewards=())))
    monkeypatch.setattr(measuring, "load_sampler", lambda *_: SimpleNamespace(reason="", close=lambda: None))
    monkeypatch.setattr(measuring, "given", lambda q, example, *_: ([example.problem.level], []))
    monkeypatch.setattr(measuring, "Group", lambda *_: None)
    rollout = SimpleNamespace(max_prompt_tokens=1, max_response_tokens=1)
    run = SimpleNamespace(rollout=rollout, verify=None, seed=0)
    sample = SimpleNamespace(run=run, config=SimpleNamespace(group_size=1))
    chosen = SimpleNamespace(sample=sample, config=SimpleNamespace(rounds=1, held_out_samples=1, parts=3))
    problems = SimpleNamespace(verifiers=(), prompting=None, examples=examples, held_out=examples)
    _, held_out = measuring.draw(chosen, problems, None, lambda _: None)
    for part in range(3):
        assert {held_out.rollouts[i][0] for i in held_out.members(part)} == {"a", "b", "c"}
        assert all(held_out.rollouts[i] == held_out.demonstrations[i] for i in held_out.members(part))
