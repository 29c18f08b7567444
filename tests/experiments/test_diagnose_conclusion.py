"""What a diagnosis concludes, from intervals that are written here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from experiments.diagnose import lines
from experiments.diagnose.conclusion import best_of, conclusion
from experiments.diagnose.figures import draw_line
from experiments.diagnose.measuring import AtThreshold, Result
from experiments.diagnose.write import threshold_grid
from upge.measure import Estimated, Measured

NAN = Estimated(math.nan, math.nan, math.nan)
SEPARATED = (Estimated(0.1, 0.05, 0.15), Estimated(0.2, 0.1, 0.3), Estimated(0.5, 0.4, 0.6))
OVERLAPPING = (Estimated(0.1, 0.0, 0.2), Estimated(0.3, 0.15, 0.45), Estimated(0.2, 0.05, 0.35))


def overall(alignment: Estimated) -> SimpleNamespace:
    return SimpleNamespace(alignment=alignment, cosine=alignment, snr=alignment)


def result(alignments: dict[str, Estimated], thresholds=(), same=(), bins=("any",)) -> Result:
    measured = tuple(
        Measured(name, name, "", "rollouts", overall(one), None, None, (), ()) for name, one in alignments.items()
    )
    points = {"hpt": tuple(AtThreshold(0.5 * i, overall(one)) for i, one in enumerate(thresholds))}
    return Result("tiny", None, {}, bins, measured, (), points if thresholds else {}, {}, same)


def test_the_best_is_above_what_its_interval_does_not_touch():
    # 0.4 > 0.3 and 0.4 > 0.15.
    assert best_of(SEPARATED) == best_of([*SEPARATED]) and best_of(SEPARATED).place == 2
    assert best_of(SEPARATED).below == (0, 1) and best_of(SEPARATED).open == ()
    # 0.15 is not above 0.2 or 0.35.
    assert best_of(OVERLAPPING).place == 1 and best_of(OVERLAPPING).below == () and best_of(OVERLAPPING).open == (0, 2)
    touching = best_of([Estimated(0.1, 0.0, 0.2), Estimated(0.3, 0.2, 0.4)])
    assert touching.open == (0,), "a common end is an overlap"
    assert best_of([NAN, NAN]).place is None
    assert best_of([NAN, Estimated.exactly(0.2), Estimated.exactly(0.1)]) == best_of(
        [NAN, Estimated(0.2, 0.2, 0.2), Estimated(0.1, 0.1, 0.1)]
    )
    partly = best_of([NAN, *SEPARATED, Estimated(0.45, 0.3, 0.6)])
    assert (partly.place, partly.below, partly.open) == (3, (1, 2), (0, 4))


def test_separated_intervals_are_a_conclusion():
    text = conclusion(result(dict(zip("abc", SEPARATED, strict=True)), SEPARATED))
    assert text.startswith("c is better aligned with ∇E[R] than a and b: the intervals do not overlap. ")
    assert "For hpt, a threshold of 1 is better aligned than 0 and 0.5: the intervals do not overlap." in text
    assert text.endswith("about one step's gradient on these prompts, not about the result of training.")


def test_overlapping_intervals_recommend_nothing():
    text = conclusion(result(dict(zip("abc", OVERLAPPING, strict=True)), OVERLAPPING))
    assert "No algorithm can be called better aligned with ∇E[R] than the others: b has the highest value" in text
    assert "not entirely above those of a and c." in text and "better aligned than" not in text
    assert "No threshold of hpt can be recommended: all intervals overlap with that of 0.5" in text
    assert "Overlapping intervals do not show that two are equal" in text


def test_what_is_open_is_named_beside_what_is_not():
    five = {"a": SEPARATED[0], "b": SEPARATED[2], "c": Estimated(0.45, 0.3, 0.6)}
    text = conclusion(result(five, tuple(five.values()), same=(("b", "d"),)))
    assert "b is better aligned with ∇E[R] than a: the intervals do not overlap; whether it is better than c" in text
    assert "a threshold of 0.5 is better aligned than 0; whether it is better than 1 cannot be concluded." in text
    both = result({"b": SEPARATED[2], "d": SEPARATED[2], "a": SEPARATED[0]}, same=(("b", "d"),))
    assert conclusion(both).startswith("b = d is better aligned with ∇E[R] than a:"), "equal estimators are one"


@pytest.mark.parametrize("bins", [("any",), ()])
def test_without_estimates_nothing_is_concluded(bins):
    text = conclusion(result({"a": NAN, "b": NAN}, (NAN, NAN), bins=bins))
    assert "nothing can be concluded about the algorithms" in text and "about the threshold of hpt" in text
    assert ("Overlapping" in text) == bool(bins), "exact values have no intervals"
    alone = conclusion(result({"a": SEPARATED[0]}))
    assert "aligned with" not in alone and alone.endswith("training.")


def test_long_lists_are_cut():
    many = {f"a{i}": SEPARATED[0] for i in range(10)} | {"b": SEPARATED[2]}
    assert "than a0, a1, a2, a3, a4, a5, a6, a7 and 2 more: the intervals" in conclusion(result(many))


@pytest.mark.parametrize(("points", "best"), [(SEPARATED, [2]), (OVERLAPPING, [])])
def test_only_a_separated_threshold_is_bold_and_circled(points, best):
    one = result({"hpt": SEPARATED[0]}, points)
    assert [i for i, row in enumerate(threshold_grid(one).rows) if row.bold] == best
    axes = Figure().add_subplot()
    lines._by_threshold(axes, one)
    circles = [line for line in axes.get_lines() if line.get_markersize() == 12]
    assert len(circles) == len(best) and ("circle" in axes.get_title()) == bool(best)


def test_moved_lines_are_inside_the_axes():
    axes = Figure().add_subplot()
    draw_line(axes, [(1, Estimated(3.0, 2.0, 5.0)), (4, Estimated(2.0, math.nan, math.nan))], shift=4, color="#000000")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert 0 < left < 1 and 4 < right < 5 and 1 < bottom < 2 and 5 < top < 6
    axes.figure.draw_without_rendering()
    line = axes.get_lines()[-1]
    moved = line.get_transform().transform((1, 3)) - axes.transData.transform((1, 3))
    assert moved == pytest.approx([4 / 72 * axes.figure.dpi, 0]) and [*line.get_xdata()] == [1, 4]
