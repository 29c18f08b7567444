"""The conformance suite on whole algorithms: every file, stage by stage, every correction, every composition."""

from __future__ import annotations

import pytest

import algorithms
import upge
from tests import compositions
from tests.conforming import parts_checked_once
from tests.upge.corrections.test_correction_interplay import BITING, SHAPES
from upge import ConfigError
from upge.testing import check_algorithm, random_batch
from upge.testing.supports import with_distributions

#: Of every shape: a clip and none, static and live advantages, one term and several, a critic, sequences, two stages.
TAKERS = ("grpo", "ppo", "gspo", "luffy", "sft_then_grpo", "reinforce_plus_plus")


def inner(one: upge.Algorithm) -> dict[str, upge.Algorithm]:
    """An interleaved update's and a validation's own algorithm."""
    actual = {
        "interleaved_update": one.interleaved_update and one.interleaved_update.algorithm,
        "validation": one.validation,
    }
    return {role: other for role, other in actual.items() if other}


FILES = compositions.by_stage()
FILES |= {f"{name}: {role}": other for name, one in FILES.items() for role, other in inner(one).items()}
COMPOSED = {name: compositions.load(name) for name in compositions.CONFIGS}
CORRECTED = [(correction, name) for correction in algorithms.corrections() for name in TAKERS]


@pytest.fixture(scope="module", autouse=True)
def each_part_once():
    with parts_checked_once():
        yield


@pytest.mark.parametrize("name", [*FILES, *COMPOSED])
def test_a_shipped_algorithm_conforms(name):
    one = (FILES | COMPOSED)[name]
    assert check_algorithm(one) is None
    assert says_something(one)


@pytest.mark.parametrize(("correction", "name"), [pair for pair in CORRECTED if pair[0] in BITING])
def test_a_corrected_algorithm_conforms(correction, name):
    """Or says why it cannot take the correction. test_correction_interplay.py checks the others, and these with other
    settings."""
    assert name in SHAPES, "not among the algorithms there"
    try:
        actual = algorithms.load(name, corrections=[correction])
    except ConfigError as error:
        assert "cannot be applied" in str(error)
        return
    for one in compositions.stages(actual).values():
        assert check_algorithm(one) is None
        assert says_something(one)


def says_something(algorithm: upge.Algorithm) -> bool:
    """True if it has weights other than zero where it is checked; all rules hold where there is nothing."""
    batches = [random_batch(seed, pairs=algorithm.needs.preference_pairs) for seed in range(2)]
    estimates = [algorithm.estimate(with_distributions(batch, 0)) for batch in batches]
    return any(bool(term.weights.any()) for estimate in estimates for term in estimate.terms.values())


def test_the_table_holds_everything_that_ships():
    assert {name.partition(":")[0] for name in FILES} == set(algorithms.names())
    assert len(FILES) >= len(algorithms.names()) + 3, (
        "two stages, an interleaved update and a validation beside the files"
    )
    taken = dict.fromkeys([name for name in algorithms.corrections() if name != "iw_opd"], 0)  # that is opd's alone
    for correction, name in CORRECTED:
        try:
            taken[correction] = taken.get(correction, 0) + bool(algorithms.load(name, corrections=[correction]))
        except ConfigError:
            continue
    assert len(taken) >= 11 and min(taken.values()) >= 3, taken
