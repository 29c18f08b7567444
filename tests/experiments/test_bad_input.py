"""Each piece of bad input ends before any training: exit code 2 and one message with key, finding and fix."""

from __future__ import annotations

import json

import pytest

from experiments.config import compose
from experiments.report.folder import read_run
from experiments.run.__main__ import main
from experiments.run.prepare import prepare
from tests.running import SMALL, lines, run
from upge.errors import ConfigError
from upge.train.folder import RunFolder

GOOD = {"question": "1+1?", "answer": "1+1=2\n#### 2"}


def gsm8k(folder, *rows) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    (folder / "test.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "#### 4"}) + "\n")
    return f"data.path={folder}"


CASES = {
    "unknown algorithm": (["algo=grop"], ["algo", "grop", "did you mean 'grpo'"]),
    "unknown model": (["model=tinny"], ["model", "tinny", "did you mean 'tiny'"]),
    "unknown data": (["data=arithmetics"], ["data", "did you mean 'arithmetic'"]),
    "unknown recipe": (["recipe=hpt-qwen2.5-math-7"], ["recipe", "did you mean 'hpt-qwen2.5-math-7b'"]),
    "unknown key": (["stps=3"], ["stps", "did you mean 'steps'"]),
    "unknown nested key": (["optimizer.learning_rate=1"], ["optimizer.learning_rate", "optimizer."]),
    "unknown key of the algorithm": (["algo.terms.rl.gate.treshold=1"], ["algo.terms.rl.gate.treshold", "threshold"]),
    "unknown key of the data": (["data.sise=1"], ["data.sise", "did you mean"]),
    "several settings": (
        ["stps=3", "algo.terms.rl.gate.thres.x=1", "algo.terms.sf.gate=1", "optimizer.l=1"],
        [
            "4 settings",
            "\n  stps: ",
            "\n  algo.terms.rl.gate.thres.x: ",
            "\n  algo.terms.sf.gate: ",
            "\n  optimizer.l: ",
        ],
    ),
    "several values": (
        ["optimizer.lr=-1", "group_size=0.5", "steps=-1", "log_to=tensorboard"],
        ["4 settings", "\n  optimizer.lr: ", "\n  group_size: ", "\n  steps: ", "expected list; write [tensorboard]"],
    ),
    "a file beside the right one": (["algo=algorithms/hptt.yaml"], ["algo", "did you mean 'algorithms/hpt.yaml'?"]),
    "not key=value": (["steps"], ["steps", "key=value"]),
    "wrong type": (["steps=many"], ["steps", "many", "int"]),
    "wrong value": (["rollout.engine=sglang"], ["rollout.engine", "sglang", "vllm"]),
    "wrong range": (["group_size=0"], ["group_size", "greater than 0"]),
    "mini-batches that do not divide": (["optimizer.mini_batches=5"], ["optimizer.mini_batches", "divide"]),
    "one rollout per prompt": (["group_size=1"], ["group_size", "1", "algo.terms.rl.gate"]),
    "no such folder for the model": (["model=no/such/model"], ["model.path", "no/such/model"]),
    "no such class": (["algo.terms.rl.gate._target_=upge.PassRateAbov"], ["_target_", "PassRateAbove"]),
    "no such file": (["data=gsm8k", "data.path=nowhere"], ["data.path", "nowhere"]),
    "path missing": (["data=table"], ["data.path"]),
    "unknown verifier": (["verify.verifier=maths"], ["verify.verifier", "math"]),
    "a sum with an unknown verifier": (["verify.verifier=math + 2*maths"], ["verify.verifier", "'maths'"]),
    "a verifier twice": (["verify.verifier=math - math"], ["verify.verifier", "'math' twice"]),
    "nothing passes": (["verify.pass_threshold=1"], ["verify.pass_threshold", "found 1", "from 0 to 1"]),
    "beyond the model's positions": (["rollout.max_response_tokens=9999"], ["max_response_tokens", "2048"]),
    "critic": (["algo=grpo", "algo.terms.rl.estimator.advantage={_target_: upge.GAE}"], ["GAE", "values", "critic"]),
    "less than never": (["eval.every=-2"], ["eval.every", "-2", "-1"]),
    "the best of none": (["eval.every=-1", "eval.keep_best=true"], ["eval.every", "eval.keep_best"]),
    "a suite for nothing": (["eval.every=-1", "eval.suite=smoke"], ["eval.every", "eval.suite"]),
    "temperature too low": (["eval.temperature=0.001"], ["eval.temperature", "0.01"]),
    "beta": (["optimizer.beta1=1.5"], ["optimizer.beta1", "1.5"]),
    "not YAML": (["steps=[1"], ["steps", "[1"]),
    "unknown override": (["model.overrides.rope_tetha=1"], ["model.overrides.rope_tetha", "did you mean 'rope_theta'"]),
    "override of another type": (["model.overrides.hidden_size=wide"], ["model.overrides.hidden_size", "wide"]),
    "template without prompt": (["model.template={question}"], ["model.template", "{question}"]),
    "prompt too long": (["rollout.max_prompt_tokens=5"], ["rollout.max_prompt_tokens", "5", "overlong_prompts"]),
}


def refused(capsys, *arguments: str) -> str:
    """Runs in this process up to the start of training; returns the message."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == 2, captured.out
    assert captured.err.count("error:") == 1 and "Traceback" not in captured.err
    return captured.err


@pytest.fixture(autouse=True)
def before_training(monkeypatch):
    """Without the hub, and without ever training in this process."""

    def trained():
        raise AssertionError("the input was not refused")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("experiments.run.__main__.connect", trained)


@pytest.mark.parametrize("case", CASES)
def test_refused_before_training(case, capsys, tmp_path, monkeypatch):
    arguments, fragments = CASES[case]
    message = refused(capsys, *arguments, f"output={tmp_path / 'run'}")
    for fragment in fragments:
        assert fragment in message, message
    assert not (tmp_path / "run").exists()


ROWS = {
    "empty file": ([], ["train.jsonl", "empty"]),
    "lacking column": ([GOOD, {"question": "1+1?"}], ["train.jsonl:2", "answer"]),
    "not JSON": ([GOOD, "{not json"], ["train.jsonl:2"]),
    "no final answer": ([GOOD, {"question": "1+1?", "answer": "two"}], ["train.jsonl:2", "####"]),
    "answer that does not parse": ([{"question": "1?", "answer": "#### \\frac{1}{"}], ["train.jsonl:1", "\\frac{1}{"]),
    "prompt beyond the limit": ([{"question": "1+" * 600, "answer": "#### 2"}], ["train.jsonl:1", "max_prompt_tokens"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_name_file_and_line(case, capsys, tmp_path):
    rows, fragments = ROWS[case]
    message = refused(capsys, "data=gsm8k", gsm8k(tmp_path, *rows), f"output={tmp_path / 'run'}")
    for fragment in fragments:
        assert fragment in message, message


#: Algorithm and settings → what is said about data without answers; None if they need none.
WITHOUT_ANSWERS = {
    "rollouts": (["algo=grpo"], ["the verifier 'math'", "data.columns.answer", "verify.verifier", "sft or dpo"]),
    "accuracy": (["algo=sft", "data.evaluation_share=0.5"], ["the verifier 'math'", "eval.every=-1"]),
    "own verifier that asks for it": (
        ["algo=grpo", "eval.every=-1", "verify.verifier=tests.reward_examples.plain"],
        ["data.columns.answer", "tests.reward_examples.plain"],
    ),
    "demonstrations": (["algo=sft", "eval.every=-1"], None),
    "pairs": (["algo=dpo", "eval.every=-1", "data.columns.rejected=rejected"], None),
    "own verifier that does not": (
        ["algo=grpo", "eval.every=-1", "verify.verifier=tests.reward_examples.too_long"],
        None,
    ),
}


@pytest.mark.parametrize("case", WITHOUT_ANSWERS)
def test_data_without_answers(case, capsys, tmp_path):
    arguments, fragments = WITHOUT_ANSWERS[case]
    turns = [("user", "1+1?"), ("assistant", "2"), ("user", "And {}+2?"), ("assistant", "4")]
    rows = [[{"role": role, "content": text.format(i)} for role, text in turns] for i in range(8)]
    worse = {"role": "assistant", "content": "5"}
    written = [json.dumps({"messages": row, "rejected": [*row[:-1], worse]}) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(written))
    columns = "data.columns={prompt: messages, demonstrations: messages, answer: null}"
    share = f"data.evaluation_share={0 if 'eval.every=-1' in arguments else 0.5}"
    data = ["data=table", f"data.path={tmp_path / 'a.jsonl'}", columns, share, f"output={tmp_path / 'run'}"]
    if fragments is None:
        prepared = prepare(compose([*data, *arguments]))
        has_demonstrations = [bool(one.demonstrations) for one in prepared.train]
        assert has_demonstrations == [arguments[0] != "algo=grpo"] * 8, "encoded where they are learned from"
        assert all(one.problem.row is None for one in prepared.train), "kept only for verifiers that ask for it"
    else:
        message = refused(capsys, *data, *arguments)
        assert "a.jsonl:" in message and all(fragment in message for fragment in fragments), message


def test_dropped_rows_are_counted(capsys, tmp_path):
    long_prompt = {"question": "1+" * 600, "answer": "#### 2"}
    long_answer = {"question": "a", "answer": "1" * 999 + "\n#### 2"}
    path = gsm8k(tmp_path, GOOD, long_prompt, long_answer)
    arguments = ["data=gsm8k", path, "data_policy.overlong_prompts=drop", "rollout.max_response_tokens=100"]
    assert main([*arguments, f"output={tmp_path / 'run'}", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "1 problems dropped" in text and "1 demonstrations dropped" in text


def test_demonstrations_missing_from_the_data(capsys, tmp_path):
    """Every demonstration is beyond the limit: nothing is left for a term that learns from them."""
    message = refused(capsys, "algo=sft", "rollout.max_response_tokens=3", f"output={tmp_path / 'run'}")
    assert "demonstrations" in message and "algo.terms.sft.source" in message


def test_checkpoint_that_does_not_fill_the_model(capsys, tmp_path):
    """Another shape would give random weights, or an error deep inside."""
    arguments = ["model.overrides.num_hidden_layers=5", "rollout.engine=transformers", f"output={tmp_path / 'run'}"]
    done = run(*SMALL, *arguments, code=2)
    assert "model.path" in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_existing_folder(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    assert "not a run's folder" in refused(capsys, f"output={tmp_path}")


def test_folder_of_another_run(capsys, tmp_path):
    """Finished, with other settings, or with resume=never: three different messages."""
    out = tmp_path / "run"
    settings = [*SMALL, "algo=sft", "steps=1", "rollout.engine=transformers", f"output={out}"]
    run(*settings)
    assert "finished" in refused(capsys, *settings)
    assert "optimizer.lr" in refused(capsys, *settings, "optimizer.lr=0.5")
    assert "resume=auto" in refused(capsys, *settings, "resume=never")


def test_nonfinite_updates_are_skipped_and_counted(tmp_path):
    """One spoilt step is skipped and training goes on."""
    out = tmp_path / "run"
    bad = "algo.terms.rl.estimator.advantage={_target_: tests.nonfinite.Exploding, first: 1, last: 1}"
    run(*SMALL, "algo=reinforce", bad, "steps=3", "rollout.engine=transformers", f"output={out}")
    metrics = lines(out / "metrics.jsonl")
    assert [row["skipped_updates"] for row in metrics] == [0, 1, 1]
    assert metrics[1]["grad_norm"] is None and metrics[2]["grad_norm"] > 0


def test_too_many_nonfinite_updates_stop_with_the_state_saved(tmp_path):
    out = tmp_path / "run"
    bad = "algo.terms.rl.estimator.advantage={_target_: tests.nonfinite.Exploding, first: 1}"
    arguments = ["algo=reinforce", bad, "steps=9", "stop.nonfinite_updates=2", "rollout.engine=transformers"]
    done = run(*SMALL, *arguments, f"output={out}", code=3)
    assert "stop.nonfinite_updates" in done.stdout
    assert (out / "checkpoints" / "step_000003").is_dir() and not (out / "final").exists()
    assert lines(out / "metrics.jsonl")[-1]["skipped_updates"] == 2


RENAMED = [
    (
        ["data_policy.demonstrated=3"],
        "data_policy.demonstrated: unknown key; it was renamed; write data_policy.demonstra",
    ),
    (
        ["algo=grpo", "algo.terms.rl.gate={_target_: upge.gates.Always}"],
        "'upge.gates.Always' was renamed; write upge.Con",
    ),
    (["algo=grpo", "algo.terms.rl.gate._target_=upge.Always"], "'upge.Always' was renamed; write upge.ConstantGate"),
    (["correction=tis", "correction=kl_k3"], "correction: given twice (tis, kl_k3); give correction=[tis,kl_k3]"),
    (["algo=grpo", "algo=hpt"], "algo: given twice (grpo, hpt)"),
    (
        ["correction=tis", "algo.correction.tis.cap=5"],
        "algo.correction.tis.cap: is not a setting of the algorithm; write c",
    ),
    (["algo.name=mine"], "algo.name: is not a setting of the algorithm; an algorithm is chosen by algo=NAME"),
    (
        ["algo=grpo", "terms.rl.estimator.mask.high=0.3"],
        "unknown key; did you mean 'algo.terms.rl.estimator.mask.high'?",
    ),
    (
        ["algo=grpo", "correction=kl_k3", "correction.kl_k3.coefficient=.inf"],
        "regularizers.kl.coefficient: found inf; give a finite number",
    ),
    (["algo=grpo", "correction=kl_reward", "correction.kl_reward.coefficient=.nan"], "coefficient"),
    (
        ["algo=grpo", "correction=dual_clip", "correction.dual_clip.dual=1"],
        "correction.dual_clip.dual: 1 must be above 1",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), RENAMED)
def test_names_and_settings_that_would_be_misread(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(arguments)
    assert message in str(caught.value)


def test_dual_clip_of_a_narrow_clip() -> None:
    """The bound is that of the algorithm's own clip, 1 + high."""
    narrow = ["algo=grpo", "correction=dual_clip", "algo.terms.rl.estimator.mask.high=0.1"]
    assert compose([*narrow, "correction.dual_clip.dual=1.15"]).algorithm.terms["rl"].estimator.mask.dual == 1.15
    with pytest.raises(ConfigError, match="dual: 1.05 must exceed 1 . high = 1.1"):
        compose([*narrow, "correction.dual_clip.dual=1.05"])


@pytest.mark.parametrize("read", [read_run, lambda path: RunFolder(path).open({"steps": 1}, "auto")])
def test_a_run_of_another_version_is_refused(read, tmp_path) -> None:
    for name, text in {"config.yaml": "steps: 1\n", "metrics.jsonl": '{"step": 1}\n'}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "run.json").write_text(json.dumps({"versions": {"upge": "0.1.0"}, "world_size": 1}))
    with pytest.raises(ConfigError, match=r"written by another version \(upge 0.1.0\).*run again in another folder"):
        read(tmp_path)
