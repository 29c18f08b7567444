"""Tasks of reasoning-gym: made alike in every process, divided by the prompt, scored by their own verifiers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from omegaconf import OmegaConf

from tests.upge.data.test_data_files import CONFIGS
from upge import verify
from upge.data import ReasoningGym
from upge.data.splits import for_evaluation
from upge.errors import ConfigError
from upge.instantiate import build

pytest.importorskip("reasoning_gym")

#: Its tasks' questions hang on Python's hashes, on its random numbers, and on neither.
UNSTEADY = {"isomorphic_strings": None, "list_functions": {}, "chain_sum": {"max_terms": 3}}


@pytest.fixture(scope="module")
def unsteady():
    return ReasoningGym(UNSTEADY, train_size=20, evaluation_size=7).load()


def test_problems_are_divided_by_their_prompts_and_spread_over_the_tasks(unsteady):
    train, evaluation = unsteady.train, unsteady.evaluation
    assert [p.level for p in train[:4]] == [*UNSTEADY, next(iter(UNSTEADY))]
    assert Counter(p.level for p in train) == dict(zip(UNSTEADY, (7, 7, 6), strict=True))
    assert Counter(p.level for p in evaluation) == dict(zip(UNSTEADY, (3, 2, 2), strict=True))
    assert all(for_evaluation(p.prompt, 0.2) for p in evaluation)
    assert not any(for_evaluation(p.prompt, 0.2) for p in train)
    assert len({p.id for p in train + evaluation}) == len({p.prompt for p in train + evaluation}) == 27
    assert all(p.demonstrations == () and p.verifier == "reasoning_gym" for p in train + evaluation)


def test_the_verifier_reads_the_answer(unsteady):
    """The whole entry as JSON; its own answer is right in a box, another task's is not."""
    verifier = verify.load("reasoning_gym")
    for problem in unsteady.train[:6]:
        entry = json.loads(problem.answer)
        assert set(entry) == {"question", "answer", "metadata"} and entry["question"] == problem.prompt
        assert entry["metadata"]["source_dataset"] == problem.level
        verifier.check_answer(problem.answer)
        assert verifier(f"\\boxed{{{entry['answer']}}}", problem.answer, problem.prompt) == 1.0
        assert verifier("\\boxed{nothing}", problem.answer, problem.prompt) < 0.5


def test_every_process_makes_the_same_problems(unsteady):
    """With other hashes, from another folder and after other random numbers: ranks and continued runs must agree."""
    code = (
        "import random; random.seed(5); from upge.data import ReasoningGym; "
        f"s = ReasoningGym({UNSTEADY}, train_size=20, evaluation_size=7).load(); "
        "import hashlib; print(hashlib.sha256(repr((s.train, s.evaluation)).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    own = hashlib.sha256(repr((unsteady.train, unsteady.evaluation)).encode()).hexdigest()
    assert done.stdout.strip() == own


def test_sizes_and_seeds(unsteady):
    """A larger set keeps the smaller one's problems, and leaves the caller's random numbers alone."""
    before = random.getstate()
    small = ReasoningGym("chain_sum", train_size=3, evaluation_size=1).load()
    assert random.getstate() == before
    large = ReasoningGym(["chain_sum"], train_size=30, evaluation_size=9).load()
    assert small.train == large.train[:3] and small.evaluation == large.evaluation[:1]
    other = ReasoningGym("chain_sum", train_size=30, evaluation_size=9, seed=1).load()
    assert not {p.prompt for p in other.train} & {p.prompt for p in large.train}


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["chain_sums"], ["data.tasks", "'chain_sums'", "did you mean 'chain_sum'"]),
        ({"chain_sum": {"max_term": 3}}, ["data.tasks.chain_sum.max_term", "did you mean 'max_terms'"]),
        ({"chain_sum": {"seed": 3}}, ["data.tasks.chain_sum.seed"]),
        ({"chain_sum": {"max_terms": 0}}, ["data.tasks.chain_sum", "refuses", "max_terms"]),
        ({"coin_flip": {"min_trials": 3, "max_trials": 3}}, ["data.tasks.coin_flip", "different", "of 40 for train"]),
    ],
)
def test_what_a_task_refuses_is_said(tasks, said):
    with pytest.raises(ConfigError) as caught:
        ReasoningGym(tasks, train_size=40, evaluation_size=10).load()
    assert all(word in str(caught.value) for word in said), str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tasks": []}, "data.tasks: expected one or more"),
        ({"tasks": ["gcd", "gcd"]}, "distinct"),
        ({"tasks": {"gcd": 3}}, "data.tasks.gcd: found 3"),
        ({"train_size": 0}, "data.train_size: found 0"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_settings_are_named(fields, said):
    with pytest.raises(ConfigError) as caught:
        ReasoningGym(**fields)
    assert said in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'upge\[data\]'"):
        ReasoningGym().load()


def test_the_preset_names_the_default_tasks():
    data = build(OmegaConf.load(CONFIGS / "reasoning-gym.yaml").data, "data")
    assert tuple(data.tasks) == ReasoningGym().tasks and data.train_size == ReasoningGym().train_size
    assert data.evaluation_size == ReasoningGym().evaluation_size
