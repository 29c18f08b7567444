"""What a refactoring must not change, the part that takes seconds; `python -m tests.goldens --check` checks all."""

from __future__ import annotations

import json

import pytest

from tests import goldens
from tests.golden_differences import ABSENT, TOLERANCE, Renames, compare, is_prose, report, same
from tests.golden_objects import as_change, flatten, from_change, outcome


@pytest.mark.slow
def test_every_algorithm_with_every_correction_and_override_is_as_recorded():
    """The objects, needs and gradients of each, or the refusal; combinations of corrections are left to --check."""
    actual = goldens.check_objects(Renames(goldens.load("renames")), exact=False, combinations=False)
    failures = [one for one in actual if not is_prose(one[1])]
    assert not failures, report(failures)


def test_every_algorithm_and_correction_has_been_recorded():
    import algorithms

    recorded = {goldens.case_name(*given) for given, _ in goldens.stored_objects()}
    renamed = {Renames(goldens.load("renames")).sub("inputs", name) for name in recorded}
    assert {goldens.case_name(*given) for given in goldens.all_inputs([])} <= renamed
    assert set(goldens.load("runs")) == set(goldens.RUNS) and set(goldens.load("objects")) == set(algorithms.names())


def test_an_object_survives_being_stored_as_a_change():
    base, other = outcome("grpo", [], []), outcome("grpo", ["icepop"], ["terms.rl.coefficient=2"])
    stored = json.loads(json.dumps(as_change(base, other)))
    assert "terms[rl].estimator.mask.high" in stored["without"] and from_change(base, stored) == other


def test_differences_are_found_by_case_and_path():
    base = outcome("grpo", [], [])
    changed = base | {"terms[rl].coefficient": 2.0, "estimate.loss": base["estimate.loss"] * (1 + 1e-6)}
    del changed["name"]
    actual = list(compare("grpo", base, changed, TOLERANCE["objects"]))
    assert [(case, path, now) for case, path, _, now in actual] == [
        ("grpo", "name", ABSENT),
        ("grpo", "terms[rl].coefficient", 2.0),
        ("grpo", "estimate.loss", changed["estimate.loss"]),
    ]
    assert "grpo and 1 more: name: recorded 1, found 2" in report([("grpo", "name", 1, 2), ("x", "name", 1, 2)])


@pytest.mark.parametrize(
    ("recorded", "actual", "tolerance", "equal"),
    [
        (1.0, 1.0 + 1e-7, (1e-5, 0.0), True),
        (1.0, 1.0 + 1e-4, (1e-5, 0.0), False),
        (1.0, 1.0 + 1e-7, None, False),
        ([1.0, None], [1.0, None], (1e-5, 0.0), True),
        ([1.0, None], [1.0, 0.0], (1e-5, 0.0), False),
        (1, 1.0, None, False),
        (True, 1, (1e-5, 0.0), False),
        (float("nan"), float("nan"), None, True),
    ],
)
def test_numbers_are_equal_up_to_the_tolerance(recorded, actual, tolerance, equal):
    assert same(recorded, actual, tolerance) == equal


def test_renames_apply_to_classes_fields_values_and_texts():
    renames = Renames(
        {
            "classes": {"Always": "ConstantGate"},
            "fields": {"before": "precomputed", "Term.gate": "weight"},
            "values": {r"^interlude\.": "interleaved_update."},
            "messages": {"mend": "fix"},
        }
    )
    flat = {
        "": "@Algorithm",
        "terms[rl]": "@Term",
        "terms[rl].gate": "@Always",
        "other.gate": 1,
        "needs.before": ["a"],
        "needs.because": "interlude.gate",
        "message": "mend it",
    }
    assert renames.flat(flat) == {
        "": "@Algorithm",
        "terms[rl]": "@Term",
        "terms[rl].weight": "@ConstantGate",
        "other.gate": 1,
        "needs.precomputed": ["a"],
        "needs.because": "interleaved_update.gate",
        "message": "fix it",
    }


def test_what_has_no_canonical_form_is_refused():
    class Odd:
        def __init__(self):
            self.inner = 1

    with pytest.raises(TypeError, match="no canonical form"):
        flatten({"a": Odd()})
