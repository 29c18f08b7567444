"""The pool of verification processes: its limits, crashes, order and clean-up, and the programs that it runs in."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.test_verify import RIGHT, WRONG, boxed
from upge.errors import ConfigError
from upge.verify import Verdict, VerifierPool, load

ROOT = Path(__file__).resolve().parents[1]
OWN = "tests.verify_examples"
BOMB = r"\boxed{9^{9^{9^9}}}"


def children(pid: int) -> list[int]:
    """Process ids of the living children of `pid`, and theirs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found += [int(entry.name), *children(int(entry.name))]
    return found


@pytest.fixture(scope="module")
def pool():
    with VerifierPool("math", workers=2, time_limit=20.0) as made:
        yield made


def test_pool_agrees_with_the_verifier_in_order(pool: VerifierPool) -> None:
    table = [(pair, Verdict(reward)) for reward, pairs in ((1.0, RIGHT), (0.0, WRONG)) for pair in pairs]
    random.Random(1).shuffle(table)
    items, expected = [(boxed(given), answer, None) for (given, answer), _ in table], [v for _, v in table]
    assert pool.score(items) == expected
    assert pool.score(items) == expected
    assert pool.score([]) == []


def test_bombs_time_out_and_harm_nobody() -> None:
    good = [(boxed(rf"\frac{{{k}}}{{210}}"), f"{2 * k}/420", None) for k in range(1, 101)]
    bombs = [(BOMB, "3", None), (boxed("9^{9^{9^{9}}}+1"), "x", None), (boxed(r"10^{10^{10^{10}}}"), "3.5", None)]
    with VerifierPool("math", workers=2, time_limit=1.5) as pool:
        assert pool.score(good[:1]) == [Verdict(1.0)]
        begin = time.perf_counter()
        verdicts = pool.score([bombs[0], *good[:50], bombs[1], *good[50:], bombs[2], bombs[0]])
        assert time.perf_counter() - begin < 15.0
        assert pool.score(good[:3]) == [Verdict(1.0)] * 3
    right = verdicts[1:51] + verdicts[52:102]
    assert right == [Verdict(1.0)] * 100
    for late in (verdicts[0], verdicts[51], verdicts[102], verdicts[103]):
        assert (late.reward, late.status, late.detail) == (0.0, "timeout", "not done after 1.5 s")


def test_what_is_known_without_parsing_needs_no_worker(pool: VerifierPool) -> None:
    begin = time.perf_counter()
    verdicts = pool.score([(boxed(str(k)), str(k - k % 2), None) for k in range(4000)])
    assert [v.reward for v in verdicts] == [1.0, 0.0] * 2000
    assert time.perf_counter() - begin < 3.0


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
    assert [v.reward for v in verdicts] == [1, 0, 1, 1, 0]
    assert sorted(log.read_text().split()) == ["no", "yes", "yes", "yes"]


def test_prompt_reaches_the_verifier_and_memory_is_bounded() -> None:
    with VerifierPool(f"{OWN}.prompted", workers=1) as pool:
        assert [v.reward for v in pool.score([("", "", "yes"), ("", "", None)])] == [1.0, 0.0]
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
    assert [[v.reward for v in results[t]] for t in range(2)] == [[0, 1, 1, 0], [1, 0, 0, 1]]


def test_pool_made_in_a_thread_outlives_it() -> None:
    made = []
    thread = threading.Thread(target=lambda: made.append(VerifierPool("math", workers=1)))
    thread.start()
    thread.join()
    with made[0] as pool:
        assert pool.score([(boxed(r"\frac{2}{4}"), "1/2", None)]) == [Verdict(1.0)]


def test_interrupted_call_does_not_leak_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifierPool(f"{OWN}.slow", workers=1, time_limit=5.0) as pool:
        assert pool.score([("0", "", None)]) == [Verdict(1.0)]
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.score([("1", "", None)])
        begin = time.perf_counter()
        assert pool.score([("2", "", None), ("0.1", "", None)]) == [Verdict(1.0)] * 2
        assert time.perf_counter() - begin > 2.0


def test_pool_survives_the_loss_of_its_server() -> None:
    before = set(children(os.getpid()))
    with VerifierPool("math", workers=2) as pool:
        items = [(boxed(r"\frac{2}{4}"), "1/2", None), (boxed(r"\frac{2}{4}"), "1/3", None)]
        assert [v.reward for v in pool.score(items)] == [1.0, 0.0]
        for pid in set(children(os.getpid())) - before:
            os.kill(pid, signal.SIGKILL)
        assert [v.reward for v in pool.score(items)] == [1.0, 0.0]


def test_workers_that_cannot_start_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os\nif 'REFUSE' in os.environ:\n    {}\ndef verifier(response, answer, prompt=None):\n    return 1.0\n"
    )
    for name, ending in (("dying_verifiers", "os._exit(7)"), ("failing_verifiers", "raise OSError('no licence')")):
        (tmp_path / f"{name}.py").write_text(code.format(ending))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delenv("REFUSE", raising=False)
        load(f"{name}.verifier")
        monkeypatch.setenv("REFUSE", "1")
        begin, reason = (
            time.perf_counter(),
            "end before they start" if "dying" in name else "could not load.*no licence",
        )
        with VerifierPool(f"{name}.verifier") as pool, pytest.raises(RuntimeError, match=reason):
            pool.score([("a", "b", None)])
        assert time.perf_counter() - begin < 20.0


def test_close_leaves_no_processes() -> None:
    before = set(children(os.getpid()))
    pool = VerifierPool("math", workers=3)
    pool.score([(boxed("1/2"), "0.25", None)])
    ours = set(children(os.getpid())) - before
    assert len(ours) == 4, "one server and three workers"
    pool.close()
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ours)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([])
    early = VerifierPool("math", workers=2)
    early.close()
    assert set(children(os.getpid())) <= before


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
        ({"time_limit": 0}, "verify.time_limit"),
        ({"time_limit": float("nan")}, "verify.time_limit"),
        ({"memory_limit": -1}, "verify.memory_limit"),
        ({"verifier_name": "maths"}, "verify.verifier"),
    ],
)
def test_bad_settings_are_refused(settings: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: found "):
        VerifierPool(**{"verifier_name": "math", **settings})


def test_bad_items_are_refused(pool: VerifierPool) -> None:
    for item in [("a", "b"), ("a", 5, None), (None, "b", None), ("a", "b", 1)]:
        with pytest.raises(TypeError, match="an item must be"):
            pool.score([item])


# --- main programs -------------------------------------------------------------------------------------------------

MAIN = """
    import os, sys, time
    with open("log", "a") as file:
        file.write(f"main {__name__}\\n")
    import torch
    from upge.verify import VerifierPool

    pool = VerifierPool("math", workers=2, time_limit=60.0)
    rank = int(os.environ.get("RANK", 0))
    verdicts = pool.score([(r"\\\\boxed{\\\\frac{2}{%d}}" % (4 + k), "1/2", None) for k in range(8)])
    with open(f"out{rank}", "w") as file:
        file.write(f"{[v.reward for v in verdicts]} {'math_verify' in sys.modules}")
    if "die" in sys.argv:
        from upge.verify.worker import KILL
        workers = [w.pid for w in pool._team.workers] + [pool._team._server._process.pid]
        pool._team.workers[0].connection.send((r"\\\\boxed{9^{9^{9^9}}}", "3", None))
        time.sleep(0.2)
        print(*workers, flush=True)
        os.kill(os.getpid(), 9)
"""
EXPECTED = "[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] False"


@pytest.fixture
def program(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with a package whose main program makes a pool without a guard, and the environment to run it in."""
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "__init__.py").write_text("")
    (tmp_path / "programs" / "run.py").write_text(textwrap.dedent(MAIN).replace("\\\\", "\\"))
    return tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_several_ranks(program: tuple[Path, dict[str, str]]) -> None:
    folder, env = program
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "programs.run"], cwd=folder, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [(folder / f"out{rank}").read_text() for rank in (0, 1)] == [EXPECTED] * 2


def test_main_program_is_not_run_again_and_workers_end_with_it(program: tuple[Path, dict[str, str]]) -> None:
    folder, env = program
    command = [sys.executable, "-m", "programs.run", "die"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert (done.returncode, done.stderr, len(pids)) == (-signal.SIGKILL, "", 3)
    assert (folder / "log").read_text() == "main __main__\n"
    assert (folder / "out0").read_text() == EXPECTED
    deadline = time.monotonic() + 5.0
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if _runs(pid)] == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_load_neither_torch_nor_the_main_program(tmp_path: Path) -> None:
    script = ROOT / "upge" / "verify" / "worker.py"
    code = f"import runpy, sys; loading = runpy.run_path({str(script)!r})['_import_loading'](True); "
    code += r"assert loading.load('math')(r'\boxed{2/4}', '1/2') == 1.0; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_sigterm_to_the_whole_process_group_changes_no_verdict():
    """Launchers send it to every process; the parent finishes its step first and still needs right verdicts."""
    before = set(children(os.getpid()))
    with VerifierPool("math", workers=1) as pool:
        assert pool.score([("\\boxed{\\frac{2}{4}}", "1/2", None)])[0].reward == 1.0
        own = set(children(os.getpid())) - before
        assert own
        for process in own:
            os.kill(process, signal.SIGTERM)
        time.sleep(0.3)
        assert own <= set(children(os.getpid()))
        assert [v.reward for v in pool.score([("\\boxed{\\frac{3}{6}}", "1/2", None)])] == [1.0]
