"""Less than a data set has: which problems stay, and which keep their demonstrations."""

from collections import Counter
from dataclasses import replace

import pytest

from upge.data import Arithmetic, limit_demonstrated, limit_levels
from upge.errors import ConfigError

PROBLEMS = Arithmetic(train_size=80).load().train


def _kept(problems):
    return {p.id for p in problems if p.demonstrations}


def test_they_are_spread_over_the_levels_and_nested():
    few, more = (limit_demonstrated(PROBLEMS, count) for count in (16, 19))
    levels = Counter(p.level for p in few if p.demonstrations)
    assert set(levels.values()) == {2} and len(levels) == 8
    assert _kept(few) < _kept(more) and len(_kept(more)) == 19


def test_all_other_problems_stay_without_demonstration_or_pair():
    few = limit_demonstrated(PROBLEMS, 16)
    assert [p.id for p in few] == [p.id for p in PROBLEMS]
    assert all((p.rejected is None) == (not p.demonstrations) for p in few)


def test_the_order_of_the_problems_does_not_matter():
    assert _kept(limit_demonstrated(PROBLEMS[::-1], 16)) == _kept(limit_demonstrated(PROBLEMS, 16))


def test_a_level_that_has_too_few_leaves_its_turns_to_the_others():
    bare = tuple(replace(p, demonstrations=()) if p.level != "2 numbers" else p for p in PROBLEMS)
    rare = (*bare[:8], *(p for p in PROBLEMS[8:] if p.level == "3 mixed"))
    kept = Counter(p.level for p in limit_demonstrated(rare, 6) if p.demonstrations)
    assert kept == {"2 numbers": 1, "3 mixed": 5}


def test_none_or_more_than_there_are_leaves_all():
    assert limit_demonstrated(PROBLEMS, 0) == limit_demonstrated(PROBLEMS, 1000) == PROBLEMS


def test_the_first_of_some_levels():
    actual = limit_levels(PROBLEMS, {"3 mixed": 2, "2 numbers": 3})
    assert Counter(p.level for p in actual) == {"3 mixed": 2, "2 numbers": 3}
    assert actual[0] == PROBLEMS[0] and [PROBLEMS.index(p) for p in actual] == sorted(PROBLEMS.index(p) for p in actual)
    assert limit_levels(PROBLEMS, {}) == PROBLEMS


def test_levels_that_are_not_there_are_named():
    with pytest.raises(ConfigError, match="99 problems of '3 mixed' are asked for, and there are 10"):
        limit_levels(PROBLEMS, {"3 mixed": 99})
    with pytest.raises(ConfigError, match="'Level 3'.*there are 0; the levels of the data are 2 numbers"):
        limit_levels(PROBLEMS, {"Level 3": 1})
    with pytest.raises(ConfigError, match="found 0 for"):
        limit_levels(PROBLEMS, {"3 mixed": 0})
