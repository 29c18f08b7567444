"""What is written down beside the figures: what each prompt gave, and the heaviest tokens in their text."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

import algorithms
import upge
from tests.literal import trajectories as literal
from tests.models import trajectories
from upge.config import from_tree
from upge.estimate import summarise
from upge.train.config import RunConfig
from upge.train.diagnostics import KEPT, WINDOW, TopTrajectory, merged, token_line, token_texts
from upge.train.metrics import ActiveTrajectories, Recorder
from upge.train.sample import Trajectory, assemble
from upge.train.step_batch import update_rows


def examples(count: int = 5) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(problem=SimpleNamespace(id=f"p{i}", prompt=f"{i}<b>?", answer=str(i), level=f"level {i % 2}"))
        for i in range(count)
    ]


def active(name: str, updates: int = 1) -> ActiveTrajectories:
    """Group 0 fails altogether, group 1 succeeds altogether, of the others two rollouts in four succeed."""
    members = trajectories()
    rows = update_rows(members, updates)
    return ActiveTrajectories.of(members, rows, algorithms.load(name).plans(assemble(members, 0), rows))


@pytest.mark.parametrize("updates", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "gate", "learned"),
    [
        ("hpt", ["demonstrations", *["rollouts"] * 4], ["demonstrations", "nothing", *["rollouts"] * 3]),
        ("grpo", ["rollouts"] * 5, ["nothing", "nothing", *["rollouts"] * 3]),
        ("sft", ["demonstrations"] * 5, ["demonstrations"] * 5),
        ("luffy", ["both"] * 5, ["both", "nothing", *["both"] * 3]),
    ],
)
def test_what_each_prompt_gave(name, gate, learned, updates):
    lines = list(active(name, updates).prompt_lines(examples()))
    assert [line["prompt"] for line in lines] == list(range(5)) and lines[3]["id"] == "p3"
    assert [line["successes"] for line in lines] == [0, 4, 2, 2, 2] and {line["rollouts"] for line in lines} == {4}
    assert [line["gate"] for line in lines] == gate
    assert [line["learned"] for line in lines] == learned


def test_shares_of_what_was_heard():
    actual = active("hpt")
    assert actual.demonstration_share == 1 / 17 and actual.no_signal_prompts == pytest.approx(1 / 5)
    empty = ActiveTrajectories([], torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool))
    assert empty.demonstration_share == 0 and empty.skipped_tokens == 0 and not list(empty.prompt_lines([]))


def test_sides_are_those_of_the_ratio():
    """Ratios 2 and ½; a clip stops the first where it would push up, the second where it would push down."""
    batch = literal([[0.8, 0.2], [0.8, 0.2]], p_old=[[0.4, 0.4], [0.4, 0.4]], rewards=[1, 0], group=[0, 0])
    estimator = upge.UnifiedGradient(upge.PPOClip(), upge.BehaviorPolicy(), upge.GroupRelative())
    clipped = upge.Algorithm("x", {"rl": upge.Term("rollouts", upge.ConstantGate(), estimator, upge.TokenMean())})
    actual = clipped.estimate(batch).metrics
    assert (actual["rl/masked_share"], actual["rl/masked_above"], actual["rl/masked_below"]) == (0.5, 0.25, 0.25)
    free = upge.UnifiedGradient(upge.NoMask(), upge.BehaviorPolicy(), upge.GroupRelative())
    actual = upge.Algorithm("x", {"rl": upge.Term("rollouts", upge.ConstantGate(), free, upge.TokenMean())}).estimate(
        batch
    )
    assert actual.metrics["rl/masked_share"] == 0 and "rl/masked_above" not in actual.metrics


def test_figures_do_not_depend_on_the_cut():
    """Tokens one by one, as packed chunks, or all at once."""
    batch = literal([[0.5, 0.25, 0.9], [0.5, 0.3], [0.7]], rewards=[1, 0, 1], group=[0, 0, 0])
    algorithm = algorithms.load("grpo")
    plan, packed = algorithm.plan(batch), batch.pack()
    records = []
    for place in range(len(packed)):
        piece = packed.chunk(slice(place, place + 1), packed.logprobs[place : place + 1], None)
        records.append(plan.estimate(piece).records["rl"])
    assert summarise({"rl": records}) == pytest.approx(algorithm.estimate(batch).metrics)


# Tokens.


def heavy(row: int, group: int, weights: list[float], term: str = "rl") -> TopTrajectory:
    response = tuple(range(len(weights)))
    size = max(math.inf if math.isnan(w) else abs(w) for w in weights)
    trajectory = Trajectory(group, group, (1,), response, 1.0, False, index=row)
    return TopTrajectory(term, trajectory, 1.0, size, weights, weights)


def test_one_of_a_prompt_and_the_first_of_equals():
    actual = [heavy(9, 1, [0.1]), heavy(4, 0, [0.30000001]), heavy(3, 0, [0.3]), heavy(1, 2, [-0.5, 0.2])]
    actual += [heavy(20 + i, 10 + i, [0.01]) for i in range(KEPT)] + [heavy(8, 1, [math.nan], term="sft")]
    top = [(one.term, one.trajectory.index) for one in merged(actual)]
    assert top == [*(("rl", index) for index in (1, 3, 9, 20)), ("sft", 8)]
    assert merged(reversed(actual)) == merged(actual) and merged([]) == []


def test_a_long_response_is_cut_around_its_heaviest_token():
    weights = [0.0] * 2000
    weights[1500] = -0.25
    line = token_line(heavy(0, 1, weights), examples(), lambda ids: "".join(f"{i} " for i in ids))
    assert line["first"] == 1500 - WINDOW // 2 and line["length"] == 2000 and len(line["tokens"]) == WINDOW
    assert line["weights"][line["tokens"].index("1500 ")] == -0.25 and line["prompt"] == "1<b>?"
    short = token_line(heavy(0, 1, [0.1, math.nan]), examples(), str)
    assert short["first"] == 0 and short["weights"] == [0.1, None] and json.dumps(short, allow_nan=False)


def test_the_texts_of_tokens_make_the_whole():
    """A character of several tokens, and a space that is only written between tokens."""
    raw = [b"a", b" b", "é".encode()[:1], "é".encode()[1:], b"c", "é".encode()[:1]]

    def decode(ids):
        return b"".join(raw[i] for i in ids).decode(errors="replace")

    assert token_texts(range(6), decode) == ["a", " b", "", "é", "c", "\ufffd"]
    assert token_texts([], decode) == []
    words = ["one", "two", "three"]
    assert token_texts(range(3), lambda ids: " ".join(words[i] for i in ids)) == ["one", " two", " three"]


def test_when_a_step_is_looked_at():
    config = from_tree(RunConfig, {"steps": 25, "log_rollouts": 10, "diagnose": {"gradients_every": 4}})
    recorder = Recorder(config, [], None, None)
    assert [step for step in range(1, 26) if recorder.diagnostics(step).top_tokens] == [1, 10, 20, 25]
    assert [step for step in range(1, 26) if recorder.diagnostics(step).term_gradients] == [1, 4, 8, 12, 16, 20, 24, 25]
    quiet = Recorder(from_tree(RunConfig, {"log_rollouts": 0}), [], None, None)
    assert not any(any(quiet.diagnostics(step)) for step in range(1, 101))
