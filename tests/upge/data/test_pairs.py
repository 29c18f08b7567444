"""Preference pairs on their way from the data set to a run: flawed solutions, files, lengths, what a run is told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

import upge.verify
from experiments.config import compose
from experiments.pretrain import build_tokenizer
from experiments.run.prepare import prepare
from tests.upge.data.test_data import ROWS, write_rows
from upge.data import GSM8K, Arithmetic, Problem, Prompting, encode
from upge.data.arithmetic import flawed_solution
from upge.errors import ConfigError, DataError

PROBLEM = Problem("a", "1+2=?", "3", ("333",), where="file:2", rejected="44444")


@pytest.fixture(scope="module")
def prompting():
    return Prompting(build_tokenizer(), "{prompt}")


def test_everything_but_the_rejected_response_is_as_ever():
    """Prompts, ids and demonstrations of the default data set are part of every recorded run."""
    splits = Arithmetic().load()
    everything = splits.train + splits.evaluation
    rows = [(p.id, p.prompt, p.answer, *p.demonstrations, p.level, p.system, p.where) for p in everything]
    text = "\n".join(map(repr, rows))
    expected = "bb0501890ad1e7ea0cb836a7611d502eafd8690546471915c7ef450a90a32faf"
    assert hashlib.sha256(text.encode()).hexdigest() == expected


def test_flawed_solutions_by_hand():
    assert flawed_solution((39, 16, 18)) == "39+16=35\n35+18=53\n\\boxed{53}"
    assert flawed_solution((36, -17, -3)) == "36-17=19\n19-3=19\n\\boxed{19}"
    assert flawed_solution((31, -11, 46, -11)) == "31-11=42\n42+46=88\n88-11=99\n\\boxed{99}"


def test_flawed_solutions_have_wrong_steps_and_a_wrong_result():
    """Judged by the verifier; what is wrong is either one step, or every difference, which was taken for a sum."""
    verifier, one, all_differences = upge.verify.load("math"), 0, 0
    problems = Arithmetic(train_size=1600, seed=4).load().train
    for problem in problems:
        *steps, box = problem.rejected.split("\n")
        wrong = []
        for before, step in zip([None, *steps], steps, strict=False):
            left, _, right = step.partition("=")
            assert before is None or before.endswith("=" + left.replace("-", "+").split("+")[0])
            wrong += [step] if eval(left) != int(right) else []
            assert int(right) >= 0
        assert box == f"\\boxed{{{steps[-1].partition('=')[2]}}}"
        misread = [s for s in steps if "-" in s]
        if wrong == misread and len(wrong) != 1:
            all_differences += 1
        else:
            one += 1
            assert len(wrong) == 1
        assert problem.rejected == flawed_solution(_terms(problem.prompt))
    assert one > 1000 and all_differences > 150
    for problem in problems[::8]:
        assert verifier(problem.rejected, problem.answer) == 0 < verifier(problem.demonstrations[0], problem.answer)


def _terms(prompt: str) -> tuple[int, ...]:
    return tuple(int(t) for t in prompt.removesuffix("=?").replace("-", "+-").split("+"))


def test_rejected_column_of_a_file(tmp_path):
    """Null and absent are none; what is there must be a solution of its own."""
    write_rows(tmp_path / "test.jsonl", ROWS[2:])

    def load(**columns):
        row = {"question": "How much is 2 and 2?", "answer": "2+2=<<2+2=4>>4\n#### 4", **columns}
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
        return GSM8K(path=str(tmp_path)).load().train[0].rejected

    assert load() is None and load(rejected=None) is None
    assert load(rejected="2+2=<<2+2=22>>22\n#### 2,222") == "2+2=22\n\\boxed{2222}"
    for content, said in (
        ("22", r"train.jsonl:1: no '####' in the column 'rejected'"),
        (7, r"train.jsonl:1: column 'rejected' holds 7; expected text"),
        ("2+2=4\n#### 4", r"train.jsonl:1: the columns 'answer' and 'rejected' are equal"),
    ):
        with pytest.raises(DataError, match=said):
            load(rejected=content)


def test_encoded_pairs_by_hand(prompting):
    """Limits include the end-of-sequence token: the demonstration has 4 tokens, the rejected response 6."""
    limits = {"max_prompt_tokens": 9}
    (example,) = encode([PROBLEM], prompting, max_response_tokens=6, **limits).examples
    assert prompting.tokenizer.decode(example.rejected_ids) == "44444<eos>" and len(example.rejected_ids) == 6
    (bare,) = encode([PROBLEM], prompting, max_response_tokens=6, pairs=False, **limits).examples
    assert bare == replace(example, rejected_ids=None)
    (alone,) = encode([replace(PROBLEM, demonstrations=())], prompting, max_response_tokens=6, **limits).examples
    assert alone.rejected_ids is None


@pytest.mark.parametrize(
    ("limit", "policy", "texts", "counts"),
    [
        (5, "drop", ("333<eos>", None), (0, 0, 1, 0)),
        (3, "drop", (None, None), (1, 0, 1, 0)),
        (5, "truncate", ("333<eos>", "44444"), (0, 0, 0, 1)),
        (3, "truncate", ("333", "444"), (0, 1, 0, 1)),
    ],
)
def test_overlong_sides_of_a_pair_are_counted(prompting, limit, policy, texts, counts):
    """A pair with an overlong side counts once; a demonstration that fits stays without its counterpart."""
    made = encode([PROBLEM], prompting, max_prompt_tokens=9, max_response_tokens=limit, overlong_demonstrations=policy)
    (example,) = made.examples
    sides = (next(iter(example.demonstrations), None), example.rejected_ids)
    assert tuple(None if ids is None else prompting.tokenizer.decode(ids) for ids in sides) == texts
    assert counts == (
        made.dropped_demonstrations,
        made.truncated_demonstrations,
        made.dropped_pairs,
        made.truncated_pairs,
    )


def test_an_overlong_rejected_response_can_be_an_error(prompting):
    limits = {"max_prompt_tokens": 9, "overlong_demonstrations": "error"}
    with pytest.raises(DataError, match=r"file:2: the rejected response has 6 tokens .*max_response_tokens=5"):
        encode([PROBLEM], prompting, max_response_tokens=5, **limits)
    assert encode([PROBLEM], prompting, max_response_tokens=5, pairs=False, **limits).dropped_pairs == 0


def pairs_data(folder, *rejected: str | None) -> list[str]:
    rows = [{"question": f"{i}+1=?", "answer": f"#### {i + 1}", "rejected": r} for i, r in enumerate(rejected)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_rows(folder / "test.jsonl", ROWS[2:])
    return ["data=gsm8k", f"data.path={folder}", f"output={folder / 'run'}", "rollout.max_response_tokens=50"]


def test_pairs_are_counted_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"algo\.terms\.pairs\.source: preference_pairs, but the data set has no rej"):
        prepare(compose(["algo=dpo", *pairs_data(tmp_path, None, None)]))
    arguments = pairs_data(tmp_path, None, "#### 3", "9" * 60 + " #### 4", "#### 5")
    prepared = prepare(compose(["algo=dpo", *arguments]))
    assert [e.problem.prompt for e in prepared.train] == ["1+1=?", "3+1=?"]
    assert prepared.notes == (
        "training: 1 preference pairs dropped: one side longer than rollout.max_response_tokens",
        "2 training problems have a preference pair within the limit",
    )
    others = prepare(compose(["algo=hpt", *arguments]))
    assert len(others.train) == 4 and others.notes == () and others.train[1].rejected_ids is None


def test_every_stage_is_checked(tmp_path, monkeypatch):
    """A pipeline's stages are named in what it is refused for; columns of pairs and a reference policy are there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [f"output={tmp_path / 'run'}", "algo=sft_then_grpo"]
    assert len(prepare(compose(arguments)).train) == 512
    composed = compose(arguments)
    stages = dict(composed.algorithm.stages)
    last = list(stages)[-1]
    stages[last] = replace(stages[last], algorithm=compose(["algo=dpo"]).algorithm)
    composed = replace(composed, algorithm=replace(composed.algorithm, stages=stages))
    assert all(example.rejected_ids for example in prepare(composed).train)
    composed.tree["data"] = compose(pairs_data(tmp_path, None)).tree["data"]
    said = rf"algo\.stages\.{last}\.algorithm\.terms\.pairs\.source: preference_pairs, but the data set has no"
    with pytest.raises(ConfigError, match=said):
        prepare(composed)
