"""Corrections on the command line, in recipes and in config.yaml."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

import algorithms
from experiments import config
from tests.upge.corrections.test_corrections import message


@pytest.mark.parametrize("text", ["tis,kl_k3", "[tis,kl_k3]", "[tis, kl_k3]"])
def test_the_command_line_takes_a_list(text):
    composed = config.compose(["algo=grpo", f"correction={text}", "correction.tis.cap=3"])
    recorded = composed.tree["algo"]["correction"]
    assert composed.names["correction"] == "tis,kl_k3" and list(recorded) == ["tis", "kl_k3"]
    assert recorded["tis"] == {"_target_": "upge.corrections.TIS", "cap": 3, "level": "token"}
    assert composed.algorithm == algorithms.load("grpo", ["correction.tis.cap=3"], ["tis", "kl_k3"])


def test_what_is_written_to_config_yaml_is_complete():
    for arguments in (["algo=ppo", "correction=[overlong,tis]"], ["algo=sft_then_grpo", "correction=icepop"]):
        composed = config.compose([*arguments, "rollout.max_response_tokens=77"])
        written = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(composed.tree)))
        assert algorithms.compose(written.algo, composed.algorithm.name) == composed.algorithm
        assert "${" not in OmegaConf.to_yaml(written) and "77" in composed.algorithm.formula() + repr(composed)


def test_none_is_none_and_a_recipe_may_name_some(tmp_path, monkeypatch):
    assert config.compose(["correction=null"]).algorithm == config.compose([]).algorithm
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("algo: grpo\ncorrection: [tis, entropy]\n")
    plain = config._preset
    monkeypatch.setattr(
        config,
        "_preset",
        lambda g, n: (
            plain(g, n) if g != "recipe" else OmegaConf.to_container(OmegaConf.load(tmp_path / g / f"{n}.yaml"))
        ),
    )
    assert config.compose(["recipe=mine"]).names["correction"] == "tis,entropy"
    assert config.compose(["recipe=mine", "correction="]).names["correction"] is None


@pytest.mark.parametrize("text", ["correction=[3]", "correction={a: b}", "correction=[tis", "correction.cap=2"])
def test_what_is_no_list_of_names_is_refused(text):
    assert message(lambda: config.compose([text])).startswith("correction")
