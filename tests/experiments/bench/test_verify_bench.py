"""The benches: how they measure, how they are called, and that pool and plain loop agree on the verdicts."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from experiments.bench import BENCHES, __main__, growth, verifier
from experiments.bench.measure import Interrupted, Spread, cpu_seconds, in_fresh_process, interleaved, until_signal
from tests.verify_pools import OWN, ROOT
from upge.errors import ConfigError
from upge.verify import Item, VerifierPool, last_boxed

DATA = ROOT.parent / "shared" / "data"


def test_things_take_turns_and_are_compared_within_a_round() -> None:
    now, order = [0.0], []

    def thing(name: str, cost: float):
        def run(number: int) -> str:
            order.append(name)
            now[0] += cost * (number + 1)  # the machine gets slower: a ratio within the round does not see it
            return f"{name}{number}"

        return run

    things = {"slow": thing("slow", 6.0), "fast": thing("fast", 2.0), "same": thing("same", 6.0)}
    timing = interleaved(things, rounds=5, clock=lambda: now[0], cpu_clock=lambda: now[0] / 4)
    assert order[:9] == ["slow", "fast", "same", "fast", "same", "slow", "same", "slow", "fast"]
    assert timing.seconds["fast"] == (2.0, 4.0, 6.0, 8.0, 10.0)
    assert timing.results["slow"] == ("slow0", "slow1", "slow2", "slow3", "slow4")
    assert timing.speedup("fast", "slow") == Spread(3.0, 3.0, 3.0)
    assert timing.rate("fast", 120) == Spread(20.0, 12.0, 60.0)
    assert timing.cost("fast", 100) == Spread(15.0, 5.0, 25.0)
    assert timing.thrift("fast", "same") == Spread(3.0, 3.0, 3.0)
    assert str(timing.rate("fast", 1200)) == "200 (120 to 600)"
    with pytest.raises(ConfigError, match="rounds: found 4; give at least 5"):
        interleaved(things, rounds=4)


def test_a_signal_leaves_the_complete_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    def until(last: int):
        def call(number: int) -> int:
            if number == last:
                raise KeyboardInterrupt
            return number

        return call

    with until_signal() as ending:
        timing = interleaved({"a": lambda number: number, "b": until(2)}, rounds=5, label="case")
        assert timing.results == {"a": (0, 1), "b": (0, 1)} and len(timing.seconds["a"]) == 2
        timing.check()
        raise AssertionError("check must leave the block")
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": a ")[0] for line in told] == ["case: round 1 of 5", "case: round 2 of 5"]
    with pytest.raises(Interrupted) as caught:
        ending.finished("a table")
    assert caught.value.table.startswith("a table\n\nInterrupted") and caught.value.signal is ending.signal
    with until_signal() as ending:
        interleaved({"a": until(0)}, rounds=5)
        raise AssertionError("without a complete round there is no timing")
    assert isinstance(ending.signal, KeyboardInterrupt)
    with until_signal() as ending:
        pass
    assert ending.finished("a table") == "a table"


def slow(marker: Path) -> tuple[int, bool]:
    """Sleeps in the third round, when `marker` is made; returns (complete rounds, whether a signal came)."""

    def call(number: int) -> None:
        if number == 2:
            marker.touch()
            time.sleep(60.0)

    timing = interleaved({"a": call}, rounds=5)
    return len(timing.seconds["a"]), isinstance(timing.signal, KeyboardInterrupt)


def test_a_fresh_process_gets_the_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It ends its third round and returns the complete ones."""
    receive, marker = Connection.recv, tmp_path / "third"

    def interrupted(self: Connection) -> object:
        monkeypatch.setattr(Connection, "recv", receive)
        while not marker.exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "recv", interrupted)
    result, stop = in_fresh_process(slow, marker)
    assert result == (2, True) and isinstance(stop, KeyboardInterrupt)


def test_the_seconds_of_the_cpu_count_children_too() -> None:
    work = "s = 0\nwhile __import__('time').process_time() < 0.3: s += 1"
    begin = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", work]) as child:
        child.wait()
    assert 0.25 < cpu_seconds() - begin < 2.0
    with VerifierPool(f"{OWN}.bomb", workers=1, time_limit=0.5) as pool:
        pool.score([("fine", "")])
        begin = cpu_seconds()
        assert pool.score([("hang", "")])[0].status == "timeout"
        assert cpu_seconds() - begin > 0.1, "that of a worker which was killed meanwhile"


def test_an_interrupted_program_prints_its_table(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Two rounds of the second series; the docs do not get them, and the exit code is the signal's."""
    points: list[growth.Point] = []

    def probe(point: growth.Point) -> dict[str, float]:
        points.append(point)
        if len(points) == 15 + 5:
            os.kill(os.getpid(), signal.SIGINT)
        return dict.fromkeys(("seconds", "cpu", "memory", "computed", "tokens", "parameters"), 2.0)

    monkeypatch.setattr(growth, "launched", probe)
    monkeypatch.setattr(__main__, "PAGE", None)
    assert __main__.main(["growth", "series=group,ranks", "--docs"]) == 128 + signal.SIGINT
    printed = capsys.readouterr()
    assert printed.out.count("| group |") == 3 and printed.out.count("| ranks |") == 2
    assert "Interrupted: the last case may have fewer rounds" in printed.out
    assert "ranks: round 2 of 5: 1 rank " in printed.err and "ranks: round 3" not in printed.err


def test_the_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    assert __main__.main([]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    for name in BENCHES:
        bench = importlib.import_module(f"experiments.bench.{name}")
        assert name in listed and bench.SUMMARY in listed and dataclasses.is_dataclass(bench.Settings)
    for arguments, message in {
        ("verifer",): "did you mean 'verifier'?",
        ("verifier", "answer=3"): "did you mean 'answers'?",
        ("verifier", "answers=many"): "answers: found 'many'",
        ("verifier", "rounds"): "give key=value",
        ("verifier", "answers=99999"): "more than there are",
        ("verifier", "folder=/nowhere"): "there is no file",
        ("verifier", "rounds=3", "answers=2"): "rounds: found 3",
    }.items():
        assert __main__.main(arguments) == 2
        assert message in capsys.readouterr().err
    page = tmp_path / "performance.md"
    page.write_text("a\n<!-- bench verifier: begin (python -m experiments.bench verifier --docs) -->\nold\n"
                    "<!-- bench verifier: end -->\nb")  # fmt: skip
    monkeypatch.setattr(__main__, "PAGE", page)
    monkeypatch.setattr(verifier, "run", lambda settings: f"{settings.answers} answers")
    assert __main__.main(["verifier", "answers=7", "--docs"]) == 0
    assert "\n\n7 answers\n\n" in page.read_text() and "old" not in page.read_text()
    page.write_text("nothing")
    assert __main__.main(["verifier", "--docs"]) == 2 and "are missing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_on_made_up_answers_finds_no_difference() -> None:
    actual = verifier.run(verifier.Settings(answers=12, grouped=16, parsed=4, bombs=0, pairs=0))
    rows = [line for line in actual.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4 * 3 and "differently." in actual
    assert "| 4 that must be parsed | pool, 2 workers | " in actual and "| 12 and 0 bombs | plain loop | " in actual


def test_half_of_the_answers_are_wrong_and_bombs_are_spread() -> None:
    items = verifier.single("")
    with VerifierPool("math", time_limit=20.0) as pool:
        rewards = [verdict.reward for verdict in pool.score(items[:100])]
    assert 0.4 < sum(rewards) / len(rewards) < 0.6
    cases = dict(verifier.cases(verifier.Settings(answers=200)))
    for rounds in cases.values():
        everything = [item for items in rounds for item in items if item.answer != "3.5"]
        assert len(rounds) == 5 and len(set(everything)) == len(everything)
    bombed = cases["200 and 4 bombs"]
    places = [[k for k, item in enumerate(items) if item.answer == "3.5"] for items in bombed]
    assert places == [[25, 75, 125, 175]] * 5
    asked = {last_boxed(item.response) for items in bombed for item in items if item.answer == "3.5"}
    assert asked == set(verifier.BOMBS)


def test_groups_are_those_of_a_policy() -> None:
    items = verifier.grouped("", 8)
    groups = [items[begin : begin + 8] for begin in range(0, 4000, 8)]
    assert all(len({(item.prompt, item.answer) for item in group}) == 1 for group in groups)
    assert all(len({item.response for item in group}) == 8 for group in groups)
    boxes = [[last_boxed(item.response) for item in group] for group in groups]
    different = [len(set(group)) for group in boxes]
    assert 1 in different and max(different) == 1 + verifier.MOST_WRONG and 2.0 < sum(different) / len(different) < 3.0
    with VerifierPool("math", time_limit=20.0) as pool:
        rewards = [verdict.reward for verdict in pool.score(items[:800])]
    rates = [sum(rewards[begin : begin + 8]) / 8 for begin in range(0, 800, 8)]
    assert set(rates) == {number / 8 for number in range(9)} and 0.4 < sum(rates) / len(rates) < 0.6


@pytest.mark.skipif(not (DATA / "math").exists(), reason="the data sets are not here")
def test_pool_and_plain_loop_agree_on_real_answers() -> None:
    items = verifier.single(str(DATA))[:150]
    of_loop = verifier.plain_loop(items, 5)
    with VerifierPool("math", time_limit=20.0) as pool:
        of_pool = [verdict.reward for verdict in pool.score(items)]
    differ = [(item.answer, a, b) for item, a, b in zip(items, of_loop, of_pool, strict=True) if a != b]
    assert len(differ) <= 2, differ


def test_the_plain_loop_survives_a_bomb() -> None:
    items = [Item(rf"\boxed{{{verifier.BOMBS[0]}}}", "3.5"), Item(r"\boxed{\frac{2}{4}}", "0.5")]
    assert verifier.plain_loop(items, 1) == [0.0, 1.0]
