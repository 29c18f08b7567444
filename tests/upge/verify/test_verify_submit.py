"""Verdicts that come while the caller goes on: futures, several verifiers, cancelling, forks, the end of a program."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import pytest

from tests.verify_pools import BOMB, OWN, ROOT, boxed, children, half, rewards
from upge.verify import Item, Verdict, VerifierPool

SLOW, COUNTED, BOMBS = f"{OWN}.slow", f"{OWN}.counted", f"{OWN}.bomb"


def until(condition, seconds: float = 60.0) -> bool:
    """Does the condition come true in time?"""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def test_rewards_arrive_while_the_caller_goes_on() -> None:
    with VerifierPool("math", workers=2, time_limit=20.0) as pool:
        futures = [pool.submit(Item(*half(k))) for k in range(1, 41)]
        assert not all(future.done() for future in futures)
        end = time.monotonic() + 30.0
        while not all(future.done() for future in futures) and time.monotonic() < end:
            sum(range(10_000))  # the caller computes and asks for nothing
        assert rewards(future.result(0) for future in futures) == [1.0] * 40
        known = pool.submit(Item(boxed("7"), "7"))
        assert known.done() and known.result() == Verdict(1.0, extracted="7")
        nothing = pool.submit(Item("no answer", "7"))
        assert nothing.done() and nothing.result() == Verdict(0.0, extracted=None)


def test_several_verifiers_in_one_pool() -> None:
    names = ["math", "number", "choice", "regex", "math_last", BOMBS, f"{OWN}.Telling"]
    with VerifierPool(names, workers=2, time_limit=1.5, memory_limit=2.0) as pool:
        assert pool.verifiers == tuple(names)
        verdicts = pool.score(
            [
                Item(*half(1)),
                Item(boxed(r"\frac{2}{4}"), "0.5", None, "number"),
                Item("hang", "", None, BOMBS),
                Item("The answer is (C).", "C", "Which?\nA) 1\nC) 2", "choice"),
                Item("memory", "", None, BOMBS),
                Item(boxed("aab"), "a+b", None, "regex"),
                Item("x is $2/4$", "1/2", None, "math_last"),
                Item("x is $2/4$", "1/2"),
                Item("fine", "", None, BOMBS),
                Item("yes", "yes", None, f"{OWN}.Telling"),
                Item("long", "yes", None, f"{OWN}.Telling"),
                Item("none", "none", None, f"{OWN}.Telling"),
                Item("half", "", None, f"{OWN}.Telling"),
            ]
        )
        with pytest.raises(ValueError, match="names the verifier 'odd', but this pool has only math, number"):
            pool.submit(Item("", "", None, "odd"))
        with pytest.raises(ValueError, match="names the verifier 'odd'"):
            pool.score([Item(*half(2)), Item("", "", None, "odd")])
    assert [v.reward for v in verdicts] == [1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0]
    assert [v.status for v in verdicts] == ["ok", "ok", "timeout", "ok", "error", *["ok"] * 8]
    assert "MemoryError" in verdicts[4].detail
    assert [v.extracted for v in verdicts][:9] == [
        r"\frac{1}{210}", r"\frac{2}{4}", None, "(C)", None, "aab", "2/4", None, None
    ]  # fmt: skip
    assert [v.extracted for v in verdicts][9:] == ["YES", "x" * 1000, None, r"a\ud800b"]


def test_equal_items_share_their_work_while_it_lasts(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with VerifierPool([SLOW, COUNTED], workers=1) as pool:
        block = pool.submit(Item("0.5", ""))
        first, second, other = (pool.submit(Item(text, str(log), None, COUNTED)) for text in ("yes", "yes", "no"))
        assert first is not second and first.cancel() and not second.cancelled()
        assert [f.result(10).reward for f in (block, second, other)] == [1.0, 1.0, 0.0]
        with pytest.raises(CancelledError):
            first.result(0)
        assert log.read_text().split() == ["yes", "no"]
        pool.submit(Item("yes", str(log), None, COUNTED)).result(10)
    assert log.read_text().split() == ["yes", "no", "yes"], "a verdict that was given is not kept"


def test_what_is_cancelled_is_not_run_and_frees_its_worker(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with VerifierPool([SLOW, COUNTED], workers=1, time_limit=30.0) as pool:
        assert pool.submit(Item("0", "")).result(20).reward == 1.0
        running = pool.submit(Item("29", ""))
        waiting = pool.submit(Item("no", str(log), None, COUNTED))
        last = pool.submit(Item("yes", str(log), None, COUNTED))
        time.sleep(0.2)
        assert waiting.cancel() and running.cancel()
        assert last.result(10).reward == 1.0
    assert log.read_text().split() == ["yes"]


def test_close_cancels_what_is_pending() -> None:
    pool = VerifierPool(SLOW, workers=1, time_limit=30.0)
    futures, caught = [pool.submit(Item(f"{20 + k}", "")) for k in range(4)], []

    def ask() -> None:
        with pytest.raises(RuntimeError, match="was closed before all verdicts") as info:
            pool.score([("25", "")])
        caught.append(info)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 20.0, "the first of them takes 20 s"
    assert all(future.cancelled() for future in futures)
    thread.join(5.0)
    assert caught and not thread.is_alive()


def test_submit_from_many_threads_and_from_callbacks() -> None:
    with VerifierPool("math", workers=2, time_limit=30.0) as pool:
        more: list[Future] = []
        first = pool.submit(Item(*half(1000)))
        first.add_done_callback(lambda future: more.append(pool.submit(Item(*half(1001)))))
        results: dict[int, list[float]] = {}

        def ask(thread: int) -> None:
            futures = [pool.submit(Item(*half(k))) for k in range(1, 41)]
            results[thread] = rewards(future.result() for future in futures)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == {number: [1.0] * 40 for number in range(8)}
        assert until(lambda: more) and rewards([first.result(20), more[0].result(20)]) == [1.0, 1.0]


def test_a_pool_that_nobody_holds_ends_itself() -> None:
    before = children()
    pool = VerifierPool("math", workers=1)
    future = pool.submit(Item(BOMB, "3"))
    assert until(lambda: len(children() - before) == 2, 60.0)
    del pool
    gc.collect()
    assert until(lambda: children() <= before)
    assert wait([future], 5.0).done and future.cancelled()


def test_a_fork_can_neither_use_nor_harm_the_pool() -> None:
    with VerifierPool(SLOW, workers=1, time_limit=20.0) as pool:
        future = pool.submit(Item("1", ""))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for use in (lambda: pool.submit(Item("0", "")), lambda: pool.score([("0", "")])):
                    with pytest.raises(RuntimeError, match="belongs to the process that made it"):
                        use()
                pool.close()
                del pool
                gc.collect()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert future.result(10).reward == 1.0
        assert pool.score([("0", "")]) == [Verdict(1.0)]


def test_the_end_of_a_fork_does_not_end_the_pool() -> None:
    done = program(
        """
        pid = os.fork()
        if pid == 0:
            sys.exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
        print(pool.score([half])[0].reward)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0\n", "")


ENDINGS = {
    "the end of the file": ("pool.submit(bomb)", 0),
    "sys.exit": ("futures = [pool.submit(bomb) for _ in range(3)]\nsys.exit(4)", 4),
    "an error": ("pool.submit(bomb)\nraise SystemExit('a message')", 1),
    "a thread that waits": (
        "future = pool.submit(half)\nthreading.Thread(target=lambda: print(future.result().reward)).start()", 0
    ),
    "a daemon thread that waits": (
        "futures = [pool.submit(bomb)]\nthreading.Thread(target=wait, args=[futures], daemon=True).start()", 0
    ),
    "os._exit": ("pool.submit(bomb)\ntime.sleep(0.5)\nos._exit(6)", 6),
    "a signal": ("pool.submit(bomb)\ntime.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
}  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_whatever_is_pending(ending: str) -> None:
    code, expected = ENDINGS[ending]
    begin, mark = time.monotonic(), f"MARK={os.getpid()}-{time.monotonic_ns()}"
    done = program(code, mark)
    assert done.returncode == expected, done.stderr
    assert time.monotonic() - begin < 30.0
    assert done.stdout == ("1.0\n" if ending == "a thread that waits" else "")
    assert done.stderr == ("a message\n" if ending == "an error" else "")
    assert until(lambda: not marked(mark)), "the processes of the pool must end with the program"


def marked(mark: str) -> list[Path]:
    """The processes in whose environment the mark stands."""
    actual = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            actual += [entry] if mark.encode() in (entry / "environ").read_bytes() else []
        except OSError:
            pass
    return actual


HEAD = r"""
import gc, os, signal, sys, threading, time
from concurrent.futures import wait
from upge.verify import Item, VerifierPool
half, bomb = Item(r"\boxed{\frac{2}{4}}", "1/2"), Item(r"\boxed{i^{9^{9^9}}}", "3")
pool = VerifierPool("math", workers=2, time_limit=60.0, environment=["MARK"])
"""


def program(code: str, mark: str = "MARK=none") -> subprocess.CompletedProcess[str]:
    """Runs a program that has a pool which it does not close."""
    name, _, value = mark.partition("=")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", name: value}
    command = [sys.executable, "-c", HEAD + textwrap.dedent(code)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
