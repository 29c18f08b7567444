"""A choice by name that does not exist is refused where the object is made, and no part takes demonstrations for
rollouts unless it says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import algorithms
import upge
from experiments.run.__main__ import main
from tests.running import ROOT
from upge.components.returns import kl_value
from upge.errors import ConfigError
from upge.regularizers import Regularizer
from upge.testing import ConformanceError, check_component, random_batch
from upge.train.metric_names import (
    ALWAYS,
    OF_CRITIC,
    OF_DEMONSTRATIONS,
    OF_INTERLEAVED,
    OF_REGULARIZER,
    OF_ROLLOUTS,
    OF_SAMPLING,
    OF_TERM,
    check_signals,
)

PROVIDED = ("behavior_logprobs",)


@dataclass(frozen=True)
class Drift(Regularizer):
    """A user's regularizer, whose source is any text."""

    coefficient: float = 0.1
    reduction: upge.Reduction = upge.TokenMean()
    source: str = "rollouts"
    reads: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __call__(self, batch: Any) -> Tensor:
        return batch.logprobs


@dataclass(frozen=True)
class Unchecked(Drift):
    """One whose constructor checks nothing."""

    def __post_init__(self) -> None: ...


class Plain(Regularizer):
    """One that is no dataclass: its settings are attributes of the class."""

    coefficient, reduction, source = 0.1, upge.TokenMean(), "rollout"
    reads = frozenset({"logprobs"})

    def __call__(self, batch: Any) -> Tensor:
        return batch.logprobs


@dataclass(frozen=True)
class Halves(upge.Reduction):
    """A user's reduction."""

    over: str = "term"
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: Any, active: Tensor) -> Tensor:
        return 0.5 * (batch.response_mask & active[:, None])


def test_a_source_that_does_not_exist_is_refused_where_the_part_is_made() -> None:
    """It used to fall through to demonstrations."""
    assert Drift(source="demonstrations").source == "demonstrations"
    with pytest.raises(ConfigError, match=r"Drift.source: 'rollout' is not one of 'rollouts'.*did you mean 'rollouts'"):
        Drift(source="rollout")
    target = f"{{_target_: {__name__}.Drift, source: rollout}}"
    with pytest.raises(ConfigError, match=r"algo.regularizers.mine: .*Drift.source: 'rollout' is not one of"):
        algorithms.load("grpo", [f"regularizers.mine={target}"])


def test_a_part_without_fields_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match=r"Plain.source: 'rollout' is not one of"):
        Plain()


def test_an_algorithm_checks_parts_that_do_not_check_themselves() -> None:
    part = Unchecked(source="rollout")
    with pytest.raises(ConfigError, match=r"regularizers.mine: Unchecked.source: 'rollout' is not one of"):
        upge.Algorithm("mine", algorithms.load("grpo").terms, {"mine": part})


def test_every_choice_of_a_base_class_holds_for_a_users_part() -> None:
    with pytest.raises(ConfigError, match=r"Halves.over: 'terms' is not one of 'term', 'batch'; did you mean 'term'"):
        Halves(over="terms")


def test_no_function_falls_through_for_a_name_that_it_does_not_know() -> None:
    batch = random_batch()
    with pytest.raises(ConfigError, match="source: found 'rollout'; did you mean 'rollouts'"):
        batch.source_rows("rollout")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kind: found 'K3'; "):
        kl_value(torch.zeros(2), "K3")  # type: ignore[arg-type]


# Signals of stateful gates.


@dataclass(frozen=True)
class Wanting(upge.StatefulGate):
    """A gate that keeps its value."""

    variable: str = "share"
    wants: ClassVar[frozenset[str]] = frozenset({"reward/mean"})

    def initial(self) -> float:
        return 0.5

    def updated(self, value: float, signals: Any) -> float:
        return value


@dataclass(frozen=True)
class Misspelled(Wanting):
    wants: ClassVar[frozenset[str]] = frozenset({"reward/mean", "rewards/mean"})


@dataclass(frozen=True)
class Critical(Wanting):
    """It wants a metric that only an algorithm with a critic has."""

    wants: ClassVar[frozenset[str]] = frozenset({"critic/loss", "rl/masked_share"})


def gated(gate: str, name: str = "grpo") -> Any:
    inner = f"{{_target_: upge.Complement, gate: {{_target_: {__name__}.{gate}}}}}"
    return algorithms.load(name, [f"terms.rl.gate={inner}"])


def test_a_signal_that_no_step_has_is_refused() -> None:
    """It used to leave the variable as it is, with a warning in each step."""
    check_signals(gated("Wanting"))
    check_signals(gated("Critical", "ppo"))
    message = "algo.terms.rl.gate: Misspelled needs 'rewards/mean', .*did you mean 'reward/mean'"
    with pytest.raises(ConfigError, match=message):
        check_signals(gated("Misspelled"))
    with pytest.raises(ConfigError, match="algo.terms.rl.gate: Critical needs 'critic/loss', but 'grpo' has no such"):
        check_signals(gated("Critical"))


def test_a_run_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    gate = f"algo.terms.rl.gate={{_target_: {__name__}.Misspelled}}"
    assert main(["algo=grpo", gate, "output=new"]) == 2
    assert "error: algo.terms.rl.gate: Misspelled needs 'rewards/mean'" in capsys.readouterr().err


def test_the_metrics_that_a_gate_may_want_are_those_of_the_documentation() -> None:
    documented = set(re.findall(r"`([^`\s]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    groups = (ALWAYS, OF_ROLLOUTS, OF_DEMONSTRATIONS, OF_SAMPLING, OF_CRITIC, OF_INTERLEAVED)
    names = {name for group in groups for name in group} - {"step"}
    names |= {f"REGULARIZER/{name}" for name in OF_REGULARIZER}
    assert not names - documented
    of_terms = {f"TERM/{name}" for name in OF_TERM}
    assert not {name for name in of_terms if not {name, name.removeprefix("TERM/weight")} & documented}


# Statistics of groups.


def group_mean(batch: Any, counts: Tensor) -> Tensor:
    same = (batch.group[:, None] == batch.group).double() * counts.double()
    return same @ batch.rewards / same.sum(dim=1).clamp(min=1)


class Centred(upge.AdvantageEstimator):
    """R - mean over everything in the group: as good as every user's first advantage."""

    reads = frozenset({"rewards", "group"})

    def __call__(self, batch: Any) -> Tensor:
        mean = group_mean(batch, torch.ones_like(batch.rewards))
        return (batch.rewards - mean)[:, None].expand(batch.response_mask.shape)


class Listed(Centred):
    """It lists the column but does not use it."""

    reads = frozenset({"rewards", "group", "is_demonstration"})


class Meant(Centred):
    """It wants demonstrations in the mean, and says so."""

    counts_demonstrations = True


class Right(Listed):
    """The mean over rollouts."""

    def __call__(self, batch: Any) -> Tensor:
        mean = group_mean(batch, ~batch.is_demonstration)
        return (batch.rewards - mean)[:, None].expand(batch.response_mask.shape)


@dataclass(frozen=True)
class Doubled(upge.AdvantageEstimator):
    """It wraps another advantage."""

    inner: upge.AdvantageEstimator
    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: Any) -> Tensor:
        return 2 * self.inner(batch)


def test_the_check_finds_demonstrations_in_statistics_of_groups() -> None:
    for part in (Centred(), Doubled(Centred())):
        with pytest.raises(ConformanceError, match="Centred reads `group` without `is_demonstration`, so demonstrat"):
            check_component(part)
    with pytest.raises(ConformanceError, match="Listed gives rollouts other values without the demonstrations"):
        check_component(Listed())
    for part in (Meant(), Right(), Doubled(Meant()), upge.GroupRelative(baseline="group")):
        check_component(part)


def with_advantage(name: str, advantage: str) -> Any:
    return algorithms.load(name, [f"terms.rl.estimator.advantage={{_target_: {__name__}.{advantage}}}"])


def test_a_run_refuses_such_a_part_where_its_batches_hold_both() -> None:
    mixed = with_advantage("hpt", "Centred")
    with pytest.raises(ConfigError, match=r"algo.terms.rl.estimator.advantage: Centred reads `group` without `is_dem"):
        mixed.check(group_size=4, demonstrations=3, provided=PROVIDED)
    for fine in (with_advantage("hpt", "Meant"), with_advantage("hpt", "Right"), with_advantage("dr_grpo", "Centred")):
        fine.check(group_size=4, demonstrations=3, provided=PROVIDED)
