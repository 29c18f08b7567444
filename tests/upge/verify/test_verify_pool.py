"""The pool of verification processes: its limits, crashes, order and clean-up."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.upge.verify.test_verify import RIGHT, WRONG
from tests.verify_pools import BOMB, OWN, boxed, children, half, rewards
from upge.errors import ConfigError
from upge.verify import Verdict, VerifierPool, load


@pytest.fixture(scope="module")
def pool():
    with VerifierPool("math", workers=2, time_limit=20.0) as made:
        yield made


def test_pool_agrees_with_the_verifier_in_order(pool: VerifierPool) -> None:
    table = [(pair, reward) for reward, pairs in ((1.0, RIGHT), (0.0, WRONG)) for pair in pairs]
    random.Random(1).shuffle(table)
    items, expected = [(boxed(given), answer, None) for (given, answer), _ in table], [r for _, r in table]
    assert rewards(pool.score(items)) == expected
    assert rewards(pool.score(items)) == expected
    assert pool.score([]) == []


@pytest.mark.timeout(120)
def test_bombs_time_out_and_harm_nobody() -> None:
    good = [half(k) for k in range(1, 101)]
    bombs = [(BOMB, "3"), (boxed("9^{9^{9^{9}}}+1"), "x"), (boxed(r"(-1)^{9^{9^9}}"), "3.5")]
    with VerifierPool("math", workers=2, time_limit=1.5) as pool:
        assert rewards(pool.score(good[:1])) == [1.0]
        verdicts = pool.score([bombs[0], *good[:50], bombs[1], *good[50:], bombs[2], bombs[0]])
        assert rewards(pool.score(good[:3])) == [1.0] * 3
    assert rewards(verdicts[1:51] + verdicts[52:102]) == [1.0] * 100
    for late in (verdicts[0], verdicts[51], verdicts[102], verdicts[103]):
        assert (late.reward, late.status, late.detail) == (0.0, "timeout", "not done after 1.5 s")
    assert verdicts[0].extracted == "i^{9^{9^9}}", "the answer is told even where it was too much"


def test_what_is_known_without_parsing_needs_no_worker(pool: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool._dispatcher, "submit", None)
    verdicts = pool.score([(boxed(str(k)), str(k - k % 2), None) for k in range(4000)])
    assert rewards(verdicts) == [1.0, 0.0] * 2000
    assert [verdict.extracted for verdict in verdicts[:3]] == ["0", "1", "2"]


def test_queueing_does_not_count() -> None:
    with VerifierPool(f"{OWN}.slow", workers=2, time_limit=0.5) as pool:
        begin = time.perf_counter()
        verdicts = pool.score([(f"{0.1 + k / 1000}", "", None) for k in range(20)] + [("30", "", None)])
        assert time.perf_counter() - begin > 1.0
    assert verdicts[:-1] == [Verdict(1.0)] * 20
    assert verdicts[-1].status == "timeout"


def test_workers_that_die_lose_only_their_item() -> None:
    with VerifierPool(f"{OWN}.crash", workers=2, time_limit=5.0) as pool:
        verdicts = pool.score([(text, "", None) for text in ("a", "exit", "b", "kill", "raise", "c", "leave", "d")])
        again = pool.score([("e", "", None)] * 3)
    assert [v.reward for v in verdicts] == [1, 0, 1, 0, 0, 1, 0, 1]
    assert [v.detail for v in verdicts if v.status == "error"] == [
        "the worker process ended with exit code 3",
        "the worker process was killed by signal 9",
        "KeyError: 'no such thing'",
        "the worker process ended with exit code 1",
    ]
    assert again == [Verdict(1.0)] * 3


def test_only_finite_numbers_in_the_unit_interval_are_rewards() -> None:
    names = ["nan", "inf", "two", "text", "none", "true", "half"]
    with VerifierPool(f"{OWN}.odd", workers=1) as pool:
        verdicts = dict(zip(names, pool.score([(name, "", None) for name in names]), strict=True))
    assert verdicts.pop("true") == Verdict(1.0) and verdicts.pop("half") == Verdict(0.5)
    for verdict in verdicts.values():
        assert (verdict.reward, verdict.status) == (0.0, "error")
        assert "must return a finite number in [0, 1]" in verdict.detail
    assert "returned 2;" in verdicts["two"].detail


def test_identical_items_are_verified_once(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    with VerifierPool(f"{OWN}.counted", workers=2) as pool:
        verdicts = pool.score([(text, str(log), None) for text in ("yes", "no", "yes", "yes", "no")])
        assert sorted(log.read_text().split()) == ["no", "yes"]
        pool.score([("yes", str(log), "a prompt"), ("yes", str(log), "another")])
    assert rewards(verdicts) == [1, 0, 1, 1, 0]
    assert sorted(log.read_text().split()) == ["no", "yes", "yes", "yes"]


def test_prompt_reaches_the_verifier_and_memory_is_bounded() -> None:
    with VerifierPool(f"{OWN}.prompted", workers=1) as pool:
        assert rewards(pool.score([("", "", "yes"), ("", "", None), ("", "")])) == [1.0, 0.0, 0.0]
    with VerifierPool(f"{OWN}.memory", workers=1, memory_limit=0.5) as pool:
        small, large = pool.score([("1000", "", None), (str(2**30), "", None)])
    assert small == Verdict(1.0)
    assert large.status == "error" and "MemoryError" in large.detail


def test_own_verifier_may_use_the_whole_package() -> None:
    with VerifierPool(f"{OWN}.reads_upge", workers=1, time_limit=30.0) as pool:
        assert pool.score([("Trajectories", boxed("1"), None)]) == [Verdict(1.0)]


def test_score_from_several_threads(pool: VerifierPool) -> None:
    results: dict[int, list[Verdict]] = {}

    def ask(thread: int) -> None:
        items = [(boxed(rf"\frac{{{k}}}{{{3 + 2 * thread}}}"), f"{k}/{3 + 2 * (k % 2)}", None) for k in (1, 2, 4, 7)]
        results[thread] = pool.score(items)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [rewards(results[t]) for t in range(2)] == [[0, 1, 1, 0], [1, 0, 0, 1]]


def test_pool_made_in_a_thread_outlives_it() -> None:
    made = []
    thread = threading.Thread(target=lambda: made.append(VerifierPool("math", workers=1)))
    thread.start()
    thread.join()
    with made[0] as pool:
        assert rewards(pool.score([half(1)])) == [1.0]


def test_interrupted_call_does_not_leak_into_the_next() -> None:
    with VerifierPool(f"{OWN}.slow", workers=1, time_limit=90.0) as pool:
        assert pool.score([("0", "", None)]) == [Verdict(1.0)]
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            pool.score([("60", "", None), ("70", "", None)])
        assert pool.score([("1", "", None), ("0.1", "", None)]) == [Verdict(1.0)] * 2
        assert 1.3 < time.perf_counter() - begin < 60.0, "what nobody waits for must not keep the worker"


def test_pool_survives_the_loss_of_its_server() -> None:
    before = children()
    with VerifierPool("math", workers=2) as pool:
        items = [(boxed(r"\frac{2}{4}"), "1/2", None), (boxed(r"\frac{2}{4}"), "1/3", None)]
        assert rewards(pool.score(items)) == [1.0, 0.0]
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)
        assert rewards(pool.score(items)) == [1.0, 0.0]


CANNOT_START = """
import os
if 'REFUSE' in os.environ:
    {}
def verifier(response, answer, prompt=None):
    return 1.0
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "ending", "reason"),
    [
        (
            "dying_verifiers",
            "print('no licence'); os._exit(7)",
            "(?s)end before they start: .* ended with exit code 7; the end of their output:.*no licence",
        ),
        ("failing_verifiers", "raise OSError('no licence')", "could not load.*no licence"),
    ],
)
def test_workers_that_cannot_start_stop_the_run(
    name: str, ending: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(CANNOT_START.format(ending))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("REFUSE", raising=False)
    load(f"{name}.verifier")
    monkeypatch.setenv("REFUSE", "1")
    with VerifierPool(["math", f"{name}.verifier"], environment=["REFUSE"]) as pool:
        futures = []
        with pytest.raises(RuntimeError, match=reason):
            futures += [pool.submit(half(k)) for k in range(3)]
            pool.score([half(4)])
        for future in futures:
            with pytest.raises(RuntimeError, match=reason):
                future.result(100.0)
        with pytest.raises(RuntimeError, match=reason):
            pool.submit(half(5))


def test_close_leaves_no_processes() -> None:
    before = children()
    pool = VerifierPool("math", workers=3)
    pool.score([half(1)])
    ours = children() - before
    assert len(ours) == 4, "one server and three workers"
    pool.close()
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ours)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([])
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit((boxed("1"), "1"))
    early = VerifierPool("math", workers=2)
    early.close()
    assert children() <= before


def test_construction_does_not_wait() -> None:
    durations = []
    for _ in range(3):
        begin = time.perf_counter()
        with VerifierPool("math", workers=2):
            durations.append(time.perf_counter() - begin)
    assert min(durations) < 0.3


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"workers": 0}, "verify.workers"),
        ({"workers": 1.5}, "verify.workers"),
        ({"workers": 10**9}, "verify.workers"),
        ({"workers": 32 * (os.cpu_count() or 1) + 1}, "verify.workers"),
        ({"time_limit": 1e300}, "verify.time_limit"),
        ({"memory_limit": 1e300}, "verify.memory_limit"),
        ({"environment": ["NO_SUCH_NAME"]}, "verify.environment"),
        ({"time_limit": 0}, "verify.time_limit"),
        ({"time_limit": float("nan")}, "verify.time_limit"),
        ({"memory_limit": -1}, "verify.memory_limit"),
        ({"verifiers": "maths"}, "verify.verifier"),
        ({"verifiers": ["math", "nothing.there"]}, "verify.verifier"),
        ({"verifiers": []}, "verify.verifier"),
    ],
)
def test_bad_settings_are_refused(settings: dict, key: str) -> None:
    before = children()
    with pytest.raises(ConfigError, match=f"^{key}: found "):
        VerifierPool(**{"verifiers": "math", **settings})
    assert children() <= before


def test_bad_items_are_refused(pool: VerifierPool) -> None:
    bad = [("a",), ("a", 5, None), (None, "b", None), ("a", "b", 1), ("a", "b", None, 1), ("a", "b", None, "", "")]
    for item in bad:
        with pytest.raises(TypeError, match="an item must be"):
            pool.score([item])
        with pytest.raises(TypeError, match="an item must be"):
            pool.submit(item)
