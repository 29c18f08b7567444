"""What a run's verifiers must give: a reward that decides on success, and those that its algorithm reads by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import algorithms
from experiments.run.rewards import check_success, named_rewards
from upge import ConfigError
from upge.train.config import VerifyConfig

SUM = "number as correct + 0.2*boxed as format"


def problems(*verifiers: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(verifier=verifier) for verifier in verifiers]


def test_the_reward_that_decides_must_be_there_and_able_to():
    check_success([SUM, "number"], VerifyConfig())
    check_success([SUM, "number"], VerifyConfig(success="format", pass_threshold=0.9))
    with pytest.raises(ConfigError, match="verify.pass_threshold: found 1.1, but 'format' gives rewards from 0 to 1"):
        check_success([SUM], VerifyConfig(success="format", pass_threshold=1.1))
    check_success([SUM], VerifyConfig(pass_threshold=1.1))
    with pytest.raises(ConfigError, match="verify.success: found 'right', but .* has the rewards correct, format"):
        check_success(["number", SUM], VerifyConfig(success="right"))


def test_rewards_that_are_read_by_name_are_the_same_in_all_training_problems():
    grpo, gdpo = (algorithms.load(name).needs for name in ("grpo", "gdpo"))
    other = "choice as correct + 0.2*boxed as format"
    assert named_rewards(problems("", "number"), grpo, SUM) == (), "nothing reads them"
    assert named_rewards(problems("", other, ""), gdpo, SUM) == ("correct", "format")
    assert named_rewards(problems("", ""), gdpo, "number") == ("number",)
    for text in ("number", "number as correct + 0.3*boxed as format", "number + 0.2*boxed as format"):
        with pytest.raises(ConfigError, match="verify.verifier: .* differ in name or weight; give them the same ones"):
            named_rewards(problems("", text), gdpo, SUM)
