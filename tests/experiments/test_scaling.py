"""docs/scaling.md: its tables are the planner's, its times follow from the stated rates, and its prose is true."""

from __future__ import annotations

import pytest

from experiments.run.workload import GIB
from experiments.scaling import __main__ as page
from experiments.scaling import counts
from experiments.scaling.counts import Point, sampling_seconds, separate, shape_of, traffic_bytes, update_seconds

PARAMETERS = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "7B": 7_615_616_512,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}


def test_the_shapes_are_the_published_models():
    assert {size: shape_of(size).parameters for size in counts.SIZES} == PARAMETERS


def test_the_page_is_up_to_date():
    text = page.TABLES.page.read_text("utf-8")
    assert page.TABLES.updated(text) == text, "run python -m experiments.scaling --docs"
    assert text.count("| 7B | 8 |") == 4 and text.count("| 72B | 64 |") == 4


def test_a_steps_times_by_hand():
    """7B on 8 GPUs: 128 of 1024 responses each."""
    shape, embedding, tokens = shape_of("7B"), 152064 * 3584, 1024 * (256 + 4096)
    operations = tokens * 6 * (PARAMETERS["7B"] - embedding + 28 * 3584 * 4352)
    assert update_seconds(shape, 8) == pytest.approx(operations / (8 * 0.4 * 989e12))
    cache = 2 * 28 * 512 * 2
    read = 2 * PARAMETERS["7B"] + 128 * (256 + 2048) * cache
    assert sampling_seconds(shape, 8, 1000) == pytest.approx(4096 * read / (0.6 * 3.35e12))
    # In two rounds of 64, with half the cache to read in each.
    rounds = 2 * PARAMETERS["7B"] + 64 * (256 + 2048) * cache
    assert sampling_seconds(shape, 8, 64) == pytest.approx(2 * 4096 * rounds / (0.6 * 3.35e12))
    # Two GPUs an engine: 256 responses, half the bytes on each.
    double = 2 * PARAMETERS["7B"] + 256 * (256 + 2048) * cache
    assert sampling_seconds(shape, 8, 1000, split=2) == pytest.approx(4096 * double / (0.6 * 3.35e12) / 2)
    assert sampling_seconds(shape_of("0.5B"), 64, 1000) == pytest.approx(4096 * 5e-3)


def test_traffic_by_hand():
    """2 updates with 278,528 tokens a rank each, in micro-batches of 32768: 9 each, 8 bytes per parameter."""
    updates, refresh = traffic_bytes(Point("7B", 8))
    assert updates == pytest.approx(18 * 8 * PARAMETERS["7B"] * 7 / 8)
    assert refresh == pytest.approx(2 * PARAMETERS["7B"] * 7 / 8)
    assert traffic_bytes(Point("0.5B", 1)) == (0, 0)


def test_memory_is_the_planners_and_the_share_leaves_room_for_the_states():
    for point in (Point("7B", 8), Point("0.5B", 1), Point("32B", 64)):
        memory = point.memory(9216)
        assert memory.total("sampling") <= counts.MEMORY
        assert memory.total("sampling") > counts.MEMORY - 0.02 * counts.MEMORY
    assert Point("7B", 8).memory(32768).total("step") == Point("7B", 8).memory(9216).total("step")


def test_where_colocation_ends():
    fitting = {(size, gpus) for size in counts.SIZES for gpus in counts.GPUS if Point(size, gpus).is_colocated}
    small = {(size, gpus) for size in ("0.5B", "1.5B") for gpus in counts.GPUS}
    assert fitting == small | {("7B", 8), ("7B", 64)}
    assert Point("32B", 64).micro_batch and Point("72B", 64).micro_batch and not Point("32B", 8).micro_batch
    assert shape_of("32B").weights / GIB == pytest.approx(61, abs=0.5) and shape_of("72B").weights > counts.MEMORY


def test_the_pages_conclusions():
    def together(gpus: int) -> tuple[float, float]:
        point = Point("7B", gpus)
        running = counts.running_at_once(point)
        return sampling_seconds(point.shape, gpus, running), update_seconds(point.shape, gpus)

    (eight, updates), (many, few) = together(8), together(64)
    assert eight == pytest.approx(updates, rel=0.1) and 4 < many / few < 5
    apart, far = separate("7B", 8), separate("7B", 64)
    assert apart and far and (eight + updates) / apart.step == pytest.approx(1.05, abs=0.02)
    assert (many + few) / far.step == pytest.approx(2, abs=0.15) and far.split == 4
    for size, is_above in (("32B", False), ("72B", True)):
        alone = traffic_bytes(Point(size, 64))[0] / counts.link(64)
        assert (alone > update_seconds(shape_of(size), 64)) == is_above


def test_where_divided_engines_fit():
    """32B and 72B on 64 GPUs, in engines over 8; separate samplers gain 5 and 10 % over them."""
    for size, gain in (("32B", 1.05), ("72B", 1.10)):
        best, apart = counts.divided(size, 64), separate(size, 64)
        assert best and apart and best.split == 8 and counts.divided(size, 8) is None
        assert sum(counts.colocated_seconds(best)) / apart.step == pytest.approx(gain, abs=0.015)
    seven = counts.divided("7B", 8)
    assert seven and [round(counts.colocated_seconds(point)[0]) for point in (Point("7B", 8), seven)] == [66, 42]
    # Half of the weights and a cache of two key heads instead of four.
    one, two = Point("7B", 8), Point("7B", 8, split=2)
    assert one.memory(9216).total("refresh") - two.memory(9216).total("refresh") == pytest.approx(
        PARAMETERS["7B"] + 152064 * 3584, abs=2
    )


def test_an_argument_is_refused():
    assert page.main(["--doc"]) == 2
