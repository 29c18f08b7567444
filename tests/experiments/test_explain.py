"""`upge explain`: the value, the origin and the meaning of every key."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

import algorithms
from experiments.config import compose, presets
from experiments.explain.__main__ import explanation, main, origins
from experiments.explain.parts import attribute, owner
from upge.config import parse, settings
from upge.train.config import RunConfig

RECIPE = ["recipe=luffy-llama-3.1-8b", "optimizer.lr=1e-4", "steps=3", "model.lora.rank=4"]


def explained(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], RECIPE, ["algo=dapo", "data=gsm8k", "data.train_size=7"]])
def test_the_first_origin_gave_the_value(arguments: list[str]) -> None:
    """What the origin's layer says is what the run has, for every key of a run."""
    composed = compose(arguments)
    tree = OmegaConf.create(composed.tree)
    for one in settings(RunConfig):
        if one.name in ("algo", "data") or one.kind is dict:
            continue
        (origin, value), *before = origins(composed, one.name)
        if isinstance(value, str):
            value = OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]
            value = value if one.kind is str else parse(one.name, value)
        assert value == OmegaConf.select(tree, one.name), (one.name, origin)
        assert (origin == "the default") == (not before)


def test_the_origins_are_named_in_order(capsys: pytest.CaptureFixture) -> None:
    text = explained(capsys, "optimizer.lr", *RECIPE)
    assert text.startswith("optimizer.lr = 0.0001\n    from        the command line\n    instead of  ")
    assert "(recipe=luffy-llama-3.1-8b), " in text and "1e-06 (the default)" in text
    assert "values      a number, not negative\n    meaning     learning rate of AdamW\n" in text
    text = explained(capsys, "algo.terms.rl.estimator.mask.high", "algo=grpo", "algo.terms.rl.estimator.mask.high=0.28")
    assert "high = 0.28\n    from        the command line\n    instead of  0.2 (algo=grpo)\n" in text
    assert "part        upge.PPOClip, setting high" in text and "arXiv 1707.06347" in text
    text = explained(capsys, "algo.terms.rl.estimator.advantage.limit", "algo=dapo")
    assert "limit = 64\n    from        algo=dapo; it follows rollout.max_response_tokens\n" in text
    assert "number of tokens from which the full penalty applies" in text
    text = explained(capsys, "correction.tis.level", "algo=grpo", "correction=tis", "correction.tis.level=sequence")
    assert "= sequence\n    from        the command line\n    instead of  token (correction=tis)\n" in text
    part = "algo.terms.rl.estimator.mask={_target_: upge.NoMask}"
    assert "upge.NoMask" in explained(capsys, "algo.terms.rl.estimator.mask", "algo=grpo", part)


def test_names_that_are_not_in_the_type_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert "a string; known names: none, dropped_micro_batches" in explained(capsys, "fault")
    assert "a list; known names: console, jsonl, tensorboard, trackio, wandb\n" in explained(capsys, "log_to")
    assert "    values      a string\n" in explained(capsys, "verify.verifier")


def test_a_reference_in_a_file_is_named() -> None:
    composed = compose(["algo=hpt"])
    follows = [k for _, layer in composed.layers for k, v in layer.items() if str(v).startswith("${.")]
    assert follows
    for key in follows:
        assert any("; it follows algo." in line for line in explanation(composed, key)), key


def test_a_replaced_reference_is_named(capsys: pytest.CaptureFixture) -> None:
    text = explained(capsys, "algo.terms.rl.gate.threshold", "algo=hpt", "algo.terms.rl.gate.threshold=0.5")
    assert "    instead of  the value of algo.terms.sft.gate.threshold (algo=hpt)\n" in text


def test_sections_and_names_are_listed(capsys: pytest.CaptureFixture) -> None:
    text = explained(capsys, "optimizer")
    names = [one.name for one in settings(RunConfig) if one.name.startswith("optimizer.")]
    assert all(f"  {name}=" in text for name in names)
    text = explained(capsys, "algo", "model", "data", "correction", "recipe", "steps", "algo=grpo")
    assert "algo = grpo\n" in text and "group-relative policy optimization" in text and "\nsteps = 100\n" in text
    assert all(name in text for group in ("algo", "model", "data", "recipe") for name in presets(group))
    assert "data.train_size=512" in text and "data=arithmetic" in text
    assert max(map(len, text.splitlines())) <= 120


def test_every_key_can_be_explained() -> None:
    """Every key of a run, of every algorithm and of every data set has a value and says what it does."""
    plain = compose([])
    for one in settings(RunConfig):
        assert any(one.meaning.split()[0] in line for line in explanation(plain, one.name)[1:]) or one.name in (
            "algo",
            "data",
        )
    for name in presets("data"):
        composed = compose([f"data={name}"])
        for key in composed.tree["data"]:
            if key != "_target_":
                assert any("meaning" in line for line in explanation(composed, f"data.{key}")), (name, key)
    for name in algorithms.names():
        tree = OmegaConf.to_container(algorithms.read(name))
        for where, _ in algorithms.leaves(tree):
            if where[-1] not in ("_target_", "name"):
                found = owner(tree, [*map(str, where)])
                assert found is not None and found.docs(), (name, where)
                assert found.setting == str(where[-1]) or isinstance(where[-1], int), (name, where)


def test_a_setting_has_its_entry_of_the_docstring() -> None:
    text = (
        "What.\n\nAttributes:\n    low, high: bounds of\n        the ratio.\n    other (int): x.\n\nRaises:\n    E: y."
    )
    assert attribute(text, "high") == "bounds of the ratio." and attribute(text, "other") == "x."
    assert not attribute(text, "ratio") and not attribute(text, "What")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no key to explain"),
        (["lr"], "lr: there is no such key; did you mean 'optimizer.lr'?"),
        (["algo.terms.rl.estimator.mask.hihg", "algo=grpo"], "did you mean 'algo.terms.rl.estimator.mask.high'?"),
        (["correction.tis.cap", "algo=grpo"], "the run has no correction 'tis'; add correction=tis"),
        (["steps.x"], "steps.x: there is no such key"),
        (["steps", "steps=x"], "steps: found 'x'"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
