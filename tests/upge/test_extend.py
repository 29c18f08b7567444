"""docs/extend.md: every part that it shows conforms, loads, takes an override of its own setting, and is printed."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import algorithms
import upge
from experiments import config
from experiments.describe import __main__ as describe
from experiments.run import __main__ as run

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
SLOTS = {
    upge.StabilizationMask,
    upge.ReferenceDenominator,
    upge.AdvantageEstimator,
    upge.LikelihoodGradient,
    upge.Gate,
    upge.Reduction,
}


class Example(NamedTuple):
    """A file as it is shown, and the command that uses it."""

    module: str
    source: str
    arguments: list[str]


def examples() -> list[Example]:
    actual = []
    for source, command in re.findall(r"```python\n(# my_.*?)```\n\n```\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        module = re.match(r"# (my_\w+)\.py", source)[1]
        words = shlex.split(command.replace("\\\n", " "))
        assert words[:3] == ["python", "-m", "experiments.run"]
        actual.append(Example(module, source, words[3:]))
    return actual


EXAMPLES = {example.module: example for example in examples()}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The files of the page in the folder that the user starts from, and no other place."""
    for example in EXAMPLES.values():
        (tmp_path / f"{example.module}.py").write_text(example.source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for module in EXAMPLES:
        sys.modules.pop(module, None)


def part_class(module: str) -> type:
    (name,) = re.findall(r"class (\w+)\(", EXAMPLES[module].source)
    return getattr(importlib.import_module(module), name)


def test_there_is_one_of_each(own):
    classes = [part_class(module) for module in EXAMPLES]
    assert {next(slot for slot in SLOTS if issubclass(cls, slot)) for cls in classes} == SLOTS
    for example in EXAMPLES.values():
        assert len(example.source.splitlines()) <= 15, example.module
        assert "register" not in example.source


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_example_conforms(module, own):
    upge.testing.check_component(part_class(module)())


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_command_uses_it_with_its_own_setting(module, own):
    """The setting on the command line is not the default, is checked by its type, and stands in the formula."""
    arguments = EXAMPLES[module].arguments
    composed = config.compose(arguments)
    cls = part_class(module)
    (path,) = [path for path, part in composed.algorithm.parts.items() if type(part) is cls]
    part = composed.algorithm.parts[path]
    (setting,) = [f for f in cls.__dataclass_fields__ if f != "over"]
    assert getattr(part, setting) != getattr(cls(), setting)
    printed = f"{cls.__name__}({setting}={getattr(part, setting)}"
    assert printed in composed.algorithm.formula() and cls.__name__ in composed.algorithm.formula("latex")
    upge.testing.check_algorithm(composed.algorithm)
    again = config.compose([*arguments, f"algo.{path}.{setting}=0.125"]).algorithm
    assert getattr(again.parts[path], setting) == 0.125
    with pytest.raises(upge.ConfigError, match=rf"algo\.{path}\.{setting}: found 'much' \(str\), expected float"):
        config.compose([*arguments, f"algo.{path}.{setting}=much"])
    with pytest.raises(upge.ConfigError, match=f"did you mean '{setting}'"):
        config.compose([*arguments, f"algo.{path}.{setting[:-1]}=1"])


def test_the_gate_with_memory(tmp_path, monkeypatch):
    """From the page to a composed algorithm: it begins at 1 and goes a fifth of the way to the failures."""
    shown = re.search(r"```python\n(# memory_gate.*?)```\n\n```\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    source, command = shown.groups()
    (tmp_path / "memory_gate.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    algorithm = config.compose(shlex.split(command)[3:]).algorithm
    upge.testing.check_algorithm(algorithm)
    (gate,) = algorithm.stateful.values()
    assert algorithm.initial_state() == {"share": 1.0} and "shareₖ" in algorithm.formula()
    assert gate.updated(0.5, {"reward/mean": 0.75}) == pytest.approx(0.45)
    sys.modules.pop("memory_gate")


def test_the_mask_over_the_update(tmp_path, monkeypatch):
    """From the page to a composed algorithm, whose mask compares each rollout token with all others."""
    source, command = re.search(
        r"```python\n(# batch_mask.*?)```\n\n```\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL
    ).groups()
    assert len(source.splitlines()) <= 15
    (tmp_path / "batch_mask.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    algorithm = config.compose(shlex.split(command)[3:]).algorithm
    upge.testing.check_algorithm(algorithm)
    batch = upge.testing.random_batch(pairs=False)
    own = batch.response_mask & ~batch.is_demonstration[:, None]
    logprobs = batch.logprobs.detach()[own]
    rare = logprobs < 2 * (-(-logprobs).median())
    assert ((algorithm.estimate(batch).terms["rl"].mask[own] == 0) == rare).all() and 0 < int(rare.sum()) < len(rare)
    assert list(algorithm.parts_per_update) == ["terms.rl.estimator.mask"]
    sys.modules.pop("batch_mask")


def test_what_it_reads_decides_what_the_run_needs(own):
    needs = {m: config.compose(EXAMPLES[m].arguments).algorithm.needs for m in EXAMPLES}
    assert [module for module in EXAMPLES if needs[module].critic] == ["my_advantage"]
    assert needs["my_advantage"].precomputed == {"values"}
    assert needs["my_gate"].group_size == 2
    loaded = algorithms.load("grpo", ["terms.rl.estimator.advantage={_target_: my_advantage.AgainstTheCritic}"])
    with pytest.raises(upge.ConfigError, match=r"AgainstTheCritic reads \['values'\].*it needs a critic"):
        loaded.check(group_size=8, provided=["behavior_logprobs"])


def test_a_run_accepts_it(own, capsys):
    """The whole way but the training: model, data and checks."""
    arguments = [*EXAMPLES["my_mask"].arguments, "output=run", "--dry-run"]
    assert run.main(arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "OneSided(high=0.3)" in printed and "my_mask.OneSided" in printed and "training problems" in printed
    assert not (own / "run").exists()


def test_describe_prints_it(own, capsys):
    overrides = [a for a in EXAMPLES["my_gate"].arguments if a.startswith("algo")]
    assert describe.main(overrides) == 0
    assert "Harder(power=3.0)" in capsys.readouterr().out


def test_the_columns_of_the_page_exist():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"reads"}
    assert named == upge.views.COLUMNS - {"logprobs", "response_mask", "row"}


def test_the_algorithm_of_the_page(tmp_path, monkeypatch):
    page = PAGE.read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(# imitate_and_distill\.yaml.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"`python -m experiments\.run (algo=imitate_and_distill.*?)`", page)
    (tmp_path / "imitate_and_distill.yaml").write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    algorithm = config.compose(shlex.split(command)).algorithm
    assert algorithm.terms["distill"].support == upge.TopK(8, of="teacher")
    assert algorithm.needs.demonstrations and algorithm.needs.rollouts
    upge.testing.check_algorithm(algorithms.load("imitate_and_distill.yaml"))


def test_the_correction_of_the_page(tmp_path, monkeypatch):
    """Its class, its YAML file and its command, as they are shown."""
    page = PAGE.read_text("utf-8")
    (source,) = re.findall(r"```python\n(# my_corrections\.py.*?)```", page, re.DOTALL)
    (text,) = re.findall(r"```yaml\n(# temper\.yaml.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"`python -m experiments\.run (algo=grpo \"correction=.*?)`", page)
    (tmp_path / "my_corrections.py").write_text(source, "utf-8")
    (tmp_path / "temper.yaml").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    composed = config.compose(shlex.split(command))
    inner = algorithms.load("grpo").terms["rl"].estimator.advantage
    assert composed.algorithm.terms["rl"].estimator.advantage == upge.Tempered(inner, 0.5)
    temper = importlib.import_module("my_corrections").Temper(2.0)
    assert temper(algorithms.load("grpo")) == algorithms.load("grpo", corrections=["temper.yaml"])
    with pytest.raises(upge.corrections.NotApplicable, match="no term that learns from rollouts"):
        temper(algorithms.load("sft"))
    sys.modules.pop("my_corrections")


def test_the_memory_of_prompts(tmp_path, monkeypatch):
    """From the page to a composed algorithm: the largest reward, a weight by successes and a gate on attempts."""
    (source,) = re.findall(r"```python\n(# own_memory.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "own_memory.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    own = [
        "memory={_target_: own_memory.BestReward}",
        "sampling={_target_: upge.Curriculum, weight: {_target_: own_memory.Unsolved, other: 0.5}}",
        "terms.rl.gate={_target_: own_memory.RarelyTried, attempts: 3}",
    ]
    algorithm = algorithms.load("grpo", own)
    upge.testing.check_algorithm(algorithm)
    memory, new = algorithm.memory, upge.PromptRecord()
    record = memory.recorded(memory.recorded(new, [0.25, 0.75], 1, 0, 0.0), [0.5], 0, 4, 0.0)
    assert memory.remembered(record, 6) == (0.75, 3, 1, 0.0, 2)
    columns = upge.PromptColumns.of([memory.remembered(one, 6) for one in (record, new)])
    assert algorithm.sampling.weights(columns).tolist() == [0.5, 1.0]
    batch = upge.testing.random_batch()
    assert torch.equal(algorithm.terms["rl"].gate(batch), (batch.prompt_attempts < 3).double())
    sys.modules.pop("own_memory")
