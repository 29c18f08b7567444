"""Runs with a teacher: another model, or the policy on another prompt; on one and two ranks; and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from experiments.config import MODELS, compose
from experiments.run.memory_check import outlook
from experiments.run.teacher import check_same_tokenizer, check_teacher
from experiments.run.workload import Machine
from tests.running import SMALL, lines, run
from upge.data import Example, Problem, Prompting
from upge.data.teacher import TeacherPrompts
from upge.errors import ConfigError, DataError, ModelError

SELF = ("teacher.self=true", "teacher.template='{prompt} {answer} {prompt}'")
COMMON = ("steps=2", "eval.every=-1", "verify.workers=1", *SMALL)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The shipped model after a step of imitation."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    run("algo=sft", *COMMON, "optimizer.lr=1e-2", f"output={out}")
    return out / "final"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["gkd", "opd", "asft", "grpo+kl_full"])
def test_ranks_do_not_matter(teacher, tmp_path, algorithm):
    """Distributions of a reference policy and of a teacher, in micro-batches of one rank or of two."""
    plain, *corrections = algorithm.split("+")
    chosen = [f"algo={plain}", *COMMON, *([f"teacher.path={teacher}"] if plain in ("gkd", "opd") else [])]
    if corrections:
        chosen += [f"correction={corrections}", "correction.kl_full.coefficient=0.5", f"reference.path={teacher}"]
    finals, norms = [], []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        run(*chosen, "optimizer.lr=1e-3", f"output={out}", "optimizer.micro_batch_tokens=150", ranks=ranks)
        finals.append(load_file(out / "final" / "model.safetensors"))
        rows = lines(out / "metrics.jsonl")
        norms.append([row["grad_norm"] for row in rows])
        assert not corrections or min(row["kl/value"] for row in rows) > 1e-5
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and min(norms[0]) > 1e-3
    start = load_file(MODELS / "tiny" / "model.safetensors")
    moved = max(float((finals[0][name] - values).abs().max()) for name, values in start.items())
    for name, values in finals[0].items():
        assert float((finals[1][name] - values).abs().max()) <= 1e-2 * moved, name


@pytest.mark.slow
def test_the_policy_is_its_own_teacher_on_another_prompt(tmp_path):
    for number, weights in enumerate(("present", "first")):
        out = tmp_path / weights
        run("algo=opsd", *COMMON, *SELF, f"teacher.weights={weights}", "optimizer.lr=1e-2", f"output={out}")
        rows = lines(out / "metrics.jsonl")
        assert all(row["grad_norm"] > 1e-3 for row in rows), number
    first, second = (lines(tmp_path / weights / "metrics.jsonl") for weights in ("present", "first"))
    assert first[0]["grad_norm"] == pytest.approx(second[0]["grad_norm"], rel=1e-5), "the weights are still the same"
    assert first[1]["grad_norm"] != pytest.approx(second[1]["grad_norm"], rel=1e-3)


def test_a_teacher_equal_to_the_policy_teaches_nothing(tmp_path):
    out = tmp_path / "run"
    run("algo=gkd", *COMMON, f"teacher.path={MODELS / 'tiny'}", "steps=1", f"output={out}")
    assert lines(out / "metrics.jsonl")[0]["grad_norm"] < 1e-6


def test_teacher_and_reference_policy_may_be_one_model(tmp_path):
    """Their weights are loaded once, and gathered once where both distributions are read."""
    out = tmp_path / "run"
    both = "algo.terms.more={source: rollouts, gate: {_target_: upge.ConstantGate}, support: {_target_: upge.TopK}, "
    both += "estimator: {mask: {_target_: upge.NoMask}, denominator: {_target_: upge.UnitDenominator}, advantage: "
    both += "{_target_: upge.LogRatio, target: reference}, likelihood: {_target_: upge.PolicyLikelihood}}, "
    both += "reduction: {_target_: upge.TokenMean}}"
    run("algo=gkd", *COMMON, f"teacher.path={MODELS / 'tiny'}", both, "steps=1", f"output={out}")
    assert lines(out / "metrics.jsonl")[0]["grad_norm"] < 1e-6


@pytest.mark.slow
def test_a_teacher_with_lora_is_the_base_model(tmp_path):
    out = tmp_path / "run"
    lora = ("model.lora.rank=4", "teacher.self=true", "teacher.weights=first", "optimizer.lr=1e-2", "steps=3")
    run("algo=gkd", *COMMON, *lora, f"output={out}")
    norms = [row["grad_norm"] for row in lines(out / "metrics.jsonl")]
    assert norms[0] < 1e-6, "the adapters begin as zero"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algo=gkd"], "teacher.path: the algorithm learns from a teacher"),
        (["algo=grpo", "teacher.path=x"], "teacher: the algorithm learns from no teacher"),
        (["algo=gkd", "teacher.path=x", "teacher.self=true"], "teacher.path: both a path and teacher.self"),
        (["algo=gkd", "teacher.self=true"], "teacher.template: with its present weights and the same prompt"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        composed = compose(arguments)
        check_teacher(composed.config, composed.algorithm.needs)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt} {hint}", "unknown field '{hint}'"),
        ("{answer}", "has no {prompt}"),
        ("{prompt} {", "is not a format string"),
    ],
)
def test_templates_that_are_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        TeacherPrompts(prompting(), template)


def prompting() -> Prompting:
    return Prompting.load(str(MODELS / "tiny"))


def test_prompts():
    format_ = prompting()
    prompts = TeacherPrompts(format_, "{prompt} {answer}; {feedback}")
    problem = Problem("p", "1+2=?", "3", demonstrations=("1+2=3",))
    example = Example(problem, format_.prompt_ids([problem])[0])
    right = format_.response_ids(["1+2=3"])[0]
    expected = format_.prompt_ids([dataclasses.replace(problem, prompt="1+2=? 3; 1+2=3")])[0]
    assert prompts.ids(example, right) == expected
    assert prompts.ids(example) == format_.prompt_ids([dataclasses.replace(problem, prompt="1+2=? 3; ")])[0]
    with pytest.raises(DataError, match="1 of 2 training problems have none"):
        bare = dataclasses.replace(problem, demonstrations=())
        TeacherPrompts(format_, "{prompt}{demonstration}").check([problem, bare])


def test_another_tokenizer_is_refused():
    own = AutoTokenizer.from_pretrained(MODELS / "tiny")
    check_same_tokenizer(own, AutoTokenizer.from_pretrained(MODELS / "tiny"), "other")
    changed = AutoTokenizer.from_pretrained(MODELS / "tiny")
    vocabulary = own.get_vocab() | {next(iter(own.get_vocab())): 10**6}
    changed.get_vocab = lambda: vocabulary
    with pytest.raises(ModelError, match="differs from the policy's in 1 tokens"):
        check_same_tokenizer(own, changed, "other")


def test_the_plan_counts_the_teacher():
    large = MODELS / "qwen2.5-math-7b"
    machine = Machine(8, 80 * 2**30, has_gpus=True, origin="pretended", is_here=False)

    def models(*arguments: str) -> set[str]:
        composed = compose([f"model.path={large}", "model.dtype=bfloat16", "group_size=4", *arguments])
        return {item.what for item in outlook(composed, machine).memory.states if "weights" in item.what}

    assert "teacher: weights" in models("algo=gkd", f"teacher.path={large}")
    assert "teacher: weights" not in models("algo=opsd", *SELF)
    assert "teacher: weights" in models("algo=opsd", "teacher.self=true", "teacher.weights=first")


def test_a_hidden_state_of_the_policy_is_not_changed_by_its_second_use():
    """Two trajectories of one prompt, whose teacher's prompts differ by the feedback."""
    format_ = prompting()
    problem = Problem("p", "1+2=?", "3")
    example = Example(problem, format_.prompt_ids([problem])[0])
    prompts = TeacherPrompts(format_, "{prompt}{feedback}")
    first, second = (prompts.ids(example, format_.response_ids([text])[0]) for text in ("3", "1+2=3"))
    assert first != second and prompts.ids(example, format_.response_ids(["3"])[0]) == first
    assert torch.tensor(first).numel() < torch.tensor(second).numel()
