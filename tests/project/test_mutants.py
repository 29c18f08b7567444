"""The table of planted bugs fits the code; `python -m tests.mutants` plants them."""

from __future__ import annotations

import pytest

from tests import mutants
from tests.mutant_table import Mutant
from tests.mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted(mutant):
    assert mutants.problem(mutant) is None
    assert mutant.new != mutant.old


def test_names_of_mutants_are_unique():
    names = [mutant.name for mutant in MUTANTS]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"old": "no such text"}, "0 times"),
        ({"old": "log_ratio"}, "times; the text must be there once"),
        ({"file": "upge/no_such_file.py"}, "0 times"),
        ({"new": "(advantages < 0"}, "not valid Python"),
        ({"tests": ["upge/components/test_components.py::test_no_such"]}, "there is no test"),
        ({"tests": ["upge/no_such_file.py"]}, "there is no test"),
    ],
)
def test_a_stale_mutant_is_reported(changes, problem, monkeypatch, capsys):
    """In the list of problems and by the exit code, before anything is planted."""
    sound = next(mutant for mutant in MUTANTS if mutant.name == "clip-on-the-wrong-side")
    stale = Mutant(**{**sound._asdict(), **changes})
    assert problem in mutants.problem(stale)
    monkeypatch.setattr(mutants, "MUTANTS", [sound, stale])
    for arguments in (["--check"], []):
        assert mutants.main(arguments) == 1
        printed = capsys.readouterr()
        assert problem in printed.err and sound.name in printed.err and "1 of 2 stale" in printed.out


def test_a_sound_table_passes_the_check(capsys):
    assert mutants.main(["--check", MUTANTS[0].name]) == 0
    assert capsys.readouterr().out == "0 of 1 stale\n"
    assert mutants.main(["--check", "no-such-mutant"]) == 2
