"""Whole runs: the model gets better, leaves what it promises, survives a kill, and runs on two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import forked
from tests.running import ROOT, SMALL, command, environment, lines, run, without_times


def mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


@pytest.mark.slow
def test_the_default_gets_better(tmp_path):
    """A short run of the default: the reward rises, both branches of the gate occur from the first step."""
    out = tmp_path / "run"
    small = ["steps=40", "prompts_per_step=16", "data.evaluation_size=48", "eval.samples=4", "eval.every=0"]
    # Fewer demonstrations at a time let the rollouts' signal show within so few steps.
    done = run(*small, "algo.terms.sft.coefficient=0.3", f"output={out}", timeout=500, figures=True)
    metrics, evaluations = lines(out / "metrics.jsonl"), lines(out / "evaluations.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 41))
    assert mean(metrics[-8:], "reward/mean") > mean(metrics[:8], "reward/mean") + 0.05
    assert evaluations[-1]["all"]["mean@4"] > evaluations[0]["all"]["mean@4"] + 0.05
    assert 0 < metrics[0]["gate/demonstration_share"] < 1
    assert metrics[0]["rl/tokens"] > 0 and metrics[0]["sft/tokens"] > 0
    assert all(row["sampler/logprob_diff_max"] < 1e-3 for row in metrics)
    for key in ("entropy", "response_length", "grad_norm", "pass_rate", "time/rollout", "time/train", "time/sync"):
        assert all(row[key] >= 0 for row in metrics), key
    for name in ("config.yaml", "run.json", "report.html", "final/model.safetensors", "final/tokenizer.json"):
        assert (out / name).is_file(), name
    assert {row["is_demonstration"] for row in lines(out / "rollouts" / "step_000001.jsonl")} == {True, False}
    assert "pass@4" in done.stdout and "report.html" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+7=?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0], skip_special_tokens=True)
    assert "\\boxed{19}" in text


@pytest.mark.parametrize("algo", ["grpo", "hpt"])
def test_transformers_engine_follows_the_weights(tmp_path, algo):
    """After every update its fresh samples have the trainer's log-probs; with several updates a step, too."""
    out = tmp_path / "run"
    run(
        *SMALL,
        f"algo={algo}",
        "steps=4",
        "optimizer.mini_batches=2",
        "optimizer.epochs=2",
        "optimizer.lr=1e-3",
        "rollout.engine=transformers",
        f"output={out}",
    )
    metrics = lines(out / "metrics.jsonl")
    assert all(row["sampler/logprob_diff_max"] < 1e-3 for row in metrics)
    assert sum(row["updates"] for row in metrics) >= 8


@pytest.mark.slow
def test_two_ranks_with_vllm(tmp_path):
    """torchrun, gloo, an engine on each rank; the batch is the same whatever the number of ranks."""
    settings = [*SMALL, "prompts_per_step=6", "steps=3", "rollout.engine=vllm", "verify.workers=1"]
    run(*settings, f"output={tmp_path / 'two'}", ranks=2)
    run(*settings, f"output={tmp_path / 'one'}")
    two, one = (lines(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert all(row["sampler/logprob_diff_max"] < 1e-3 for row in two)
    rows = [lines(tmp_path / name / "rollouts" / "step_000001.jsonl") for name in ("two", "one")]
    assert [row["response"] for row in rows[0]] == [row["response"] for row in rows[1]]
    for key in ("reward/mean", "loss", "grad_norm", "gate/demonstration_share", "trained/tokens"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-4), key


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=pytest.mark.slow), "transformers"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, engine):
    """SIGKILL in mid-training; the same command goes on, and all lines equal those of a run that was left alone."""
    keys = ["checkpoint.every=2", "eval.every=3", "eval.keep_best=true"]
    settings = [*SMALL, "steps=7", *keys, f"rollout.engine={engine}"]
    run(*settings, f"output={tmp_path / 'whole'}")
    killed, log = tmp_path / "killed", tmp_path / "log"
    arguments = (*settings, f"output={killed}")
    process = forked.start("experiments.run", *arguments, environment=environment(), out=log, vllm=engine == "vllm")
    deadline = time.monotonic() + 200
    while not (killed / "metrics.jsonl").is_file() or len((killed / "metrics.jsonl").read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists()
    done = run(*arguments)
    assert "continuing" in done.stdout
    for name in ("metrics.jsonl", "evaluations.jsonl", "prompts.jsonl"):
        assert without_times(lines(killed / name)) == without_times(lines(tmp_path / "whole" / name)), name
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict() for name in ("killed", "whole")
    ]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])
    for out in (tmp_path / "whole", killed):
        _check_best(out)


def _check_best(out) -> None:
    """best/ is complete, of the first evaluation with the highest mean@k, and those are the weights of its step."""
    evaluations = lines(out / "evaluations.jsonl")
    metadata = json.loads((out / "best" / "evaluation.json").read_text())
    best = max(evaluations, key=lambda line: (line["all"]["mean@2"], -line["step"]))
    assert metadata == {"step": best["step"], "mean": best["all"]["mean@2"], "samples": 2}
    kept = AutoModelForCausalLM.from_pretrained(out / "best").state_dict()
    assert AutoTokenizer.from_pretrained(out / "best").eos_token_id is not None
    begin = AutoModelForCausalLM.from_pretrained(ROOT / "experiments" / "models" / "tiny").state_dict()
    last = AutoModelForCausalLM.from_pretrained(out / "final").state_dict()
    assert all(torch.equal(kept[n], begin[n]) for n in kept) == (best["step"] == 0)
    assert all(torch.equal(kept[n], last[n]) for n in kept) == (best["step"] == evaluations[-1]["step"])


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    """143 after saving; the same command continues from that step."""
    out = tmp_path / "run"
    settings = [*SMALL, "steps=400", "checkpoint.every=0", "rollout.engine=transformers", f"output={out}"]
    process = subprocess.Popen(
        command(*settings), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    stopped = lines(out / "metrics.jsonl")[-1]["step"]
    assert (out / "checkpoints" / f"step_{stopped:06d}").is_dir() and (out / "report.html").is_file()
    settings[-1:] = [f"output={out}", f"steps={stopped + 1}"]
    run(*settings)
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == list(range(1, stopped + 2))


GSM8K = [
    ("Ann has 3 bags with 4 apples each. How many apples?", "3 bags hold 3*4=<<3*4=12>>12 apples.\n#### 12"),
    ("Bob had 9 pens and lost 2. How many are left?", "9-2=<<9-2=7>>7 pens are left.\n#### 7"),
    ("A car costs 1,000 and a bike 200. What do both cost?", "Both cost 1000+200=<<1000+200=1200>>1,200.\n#### 1,200"),
]


def test_a_run_without_evaluation(tmp_path):
    """`eval.every=-1` needs no problems to measure on, and leaves a model and a report."""
    rows = [{"prompt": f"{n}+1=?", "answer": str(n + 1), "solution": f"\\boxed{{{n + 1}}}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["data=table", f"data.path={tmp_path / 'rows.jsonl'}", "data.evaluation_share=0", "eval.every=-1"]
    out = tmp_path / "run"
    done = run(*arguments, "algo=reinforce", "steps=2", "prompts_per_step=4", "group_size=2", f"output={out}")
    assert not (out / "evaluations.jsonl").exists() and "greedy" not in done.stdout
    assert len(lines(out / "metrics.jsonl")) == 2 and (out / "report.html").is_file() and (out / "final").is_dir()


def test_gsm8k_files(tmp_path):
    """GSM8K's layout: worked solutions are the demonstrations of a model that solves nothing."""
    for split, rows in (("train", GSM8K[:2]), ("test", GSM8K[2:])):
        text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    out = tmp_path / "run"
    run(
        "data=gsm8k",
        f"data.path={tmp_path}",
        "prompts_per_step=2",
        "group_size=2",
        "steps=2",
        "rollout.max_response_tokens=64",
        "rollout.engine=transformers",
        "eval.samples=2",
        f"output={out}",
    )
    metrics = lines(out / "metrics.jsonl")
    assert [row["gate/demonstration_share"] for row in metrics] == [1.0, 1.0]
    assert all(row["sft/tokens"] > 20 for row in metrics)
    shown = [row for row in lines(out / "rollouts" / "step_000001.jsonl") if row["is_demonstration"]]
    assert all("\\boxed{" in row["response"] and "<<" not in row["response"] for row in shown)


def test_a_rank_without_work(tmp_path):
    """One prompt and one evaluation problem for two ranks: the second samples, verifies and learns nothing."""
    few = ["prompts_per_step=1", "data.evaluation_size=1", "steps=2", "rollout.engine=transformers", "verify.workers=1"]
    run(*SMALL, *few, f"output={tmp_path / 'run'}", ranks=2)
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
