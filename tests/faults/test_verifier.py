"""Broken and hostile verifiers in a pool: each loses its own item, says why, and gets nothing else."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.faults import verifiers
from upge.verify import Item, Verdict, VerifierError, VerifierPool
from upge.verify.isolation import can_leave_network, environment

HERE = "tests.faults.verifiers"
LIMIT = 60.0  # seconds; nothing here takes as long


def asked(pool: VerifierPool, *items: tuple[str, str]) -> list[Verdict]:
    """The verdicts, within a limit."""
    futures: list[Future[Verdict]] = [pool.submit(Item(*item)) for item in items]
    return [future.result(LIMIT) for future in futures]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition, seconds: float = LIMIT) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_an_exception_has_its_traceback() -> None:
    with VerifierPool(f"{HERE}.crashes", workers=1) as pool:
        (verdict,) = asked(pool, ("a", "b"))
    assert (verdict.reward, verdict.status, verdict.detail) == (0.0, "error", "ZeroDivisionError: division by zero")
    assert verdict.traceback.startswith("Traceback (most recent call last):\n")
    assert "in crashes\n    return 1 / 0" in verdict.traceback and "worker.py" not in verdict.traceback


def test_what_is_no_reward_is_an_error() -> None:
    names = [*verifiers.RETURNED, "coroutine"]
    with VerifierPool(f"{HERE}.returns", workers=1) as pool:
        verdicts = dict(zip(names, asked(pool, *((name, "") for name in names)), strict=True))
    for name, verdict in verdicts.items():
        assert (verdict.reward, verdict.status) == (0.0, "error"), name
        assert "it must return a finite number in [0, 1]" in verdict.detail, name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["fork", "raw fork"])
def test_a_fork_misjudges_nothing(kind: str) -> None:
    rest = [(str(k % 2), "1") for k in range(20)]
    with VerifierPool(f"{HERE}.forks", workers=1, time_limit=20.0) as pool:
        for _ in range(3):
            first, *others = asked(pool, (kind, ""), *rest)
            assert first == Verdict(1.0)
            assert [verdict.reward for verdict in others] == [k % 2 for k in range(20)]


SPOKEN = ("part", "pickle", "long", "no json", "deep", "no array", "another task", "ready again", "cannot load")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", [*SPOKEN, "started again", "no verdict"])
def test_a_worker_that_speaks_out_of_turn_is_replaced(kind: str, tmp_path: Path) -> None:
    """Its item is an error, and nothing that it writes is executed, blocks the pool or changes another verdict."""
    planted = tmp_path / "planted"
    with VerifierPool(f"{HERE}.speaks", workers=1, time_limit=5.0) as pool:
        verdicts = asked(pool, ("1", "1"), (kind, str(planted)), ("1", "1"), ("0", "1"), ("1", "1"))
    assert (verdicts[1].reward, verdicts[1].status) == (0.0, "error"), verdicts[1]
    assert "was replaced, because it sent" in verdicts[1].detail
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert {verdict.status for verdict in verdicts[2:]} == {"ok"} and not planted.exists()


def test_a_forged_verdict_counts_for_its_own_item_only() -> None:
    with VerifierPool(f"{HERE}.speaks", workers=1, time_limit=20.0) as pool:
        verdicts = asked(pool, ("1", "1"), ("forged", "1"), *((str(k % 2), "1") for k in range(20)))
    assert [verdict.reward for verdict in verdicts[2:]] == [k % 2 for k in range(20)]
    assert {verdict.status for verdict in verdicts[2:]} == {"ok"}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("ending", ["hang", "die", "close"])
def test_what_a_verifier_starts_ends_with_its_worker(ending: str, tmp_path: Path) -> None:
    """In its own session, orphaned, or forked without a new program."""
    record = tmp_path / "pids"
    with VerifierPool(f"{HERE}.leaves", workers=1, time_limit=15.0 if ending == "hang" else 120.0) as pool:
        (verdict,) = asked(pool, (ending, str(record)))
        assert verdict.status == {"hang": "timeout", "die": "error", "close": "ok"}[ending], verdict
        pids = [int(pid) for pid in record.read_text().split()]
        assert len(set(pids)) == 5, pids
        if ending == "close":
            assert not any(gone(pid) for pid in pids)
        else:
            assert until(lambda: all(gone(pid) for pid in pids)), [pid for pid in pids if not gone(pid)]
    assert until(lambda: all(gone(pid) for pid in pids)), [pid for pid in pids if not gone(pid)]


def test_secrets_stay_with_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "PYTHON_TOKEN", "SOME_NAME"]
    for name in (*secret, "JUDGE_KEY", "LC_TIME", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "default")
    seen = ["PATH", "HOME", "LC_TIME", "PYTHONWARNINGS", "JUDGE_KEY"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(["CUDA_VISIBLE_DEVICES"])["CUDA_VISIBLE_DEVICES"] == "0"
    with VerifierPool(f"{HERE}.sees", workers=1, environment=["JUDGE_KEY"]) as pool:
        verdicts = asked(pool, *((name, "") for name in (*secret, *seen)))
    rewards = dict(zip((*secret, *seen), (verdict.reward for verdict in verdicts), strict=True))
    assert rewards == {**dict.fromkeys(secret, 0.0), **dict.fromkeys(seen, 1.0)}


@pytest.mark.skipif(not can_leave_network(), reason="this system lets no process leave the network")
def test_verifiers_have_no_network_unless_they_get_one() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        for network in (False, True):
            with VerifierPool(f"{HERE}.connects", workers=1, time_limit=30.0, network=network) as pool:
                assert asked(pool, (port, "")) == [Verdict(float(network))]


def test_resources_are_limited(tmp_path: Path) -> None:
    with VerifierPool(f"{HERE}.limited", workers=1) as pool:
        large, many, *others = asked(
            pool, ("file", str(tmp_path / "large")), ("files", ""), ("core", ""), ("cpu", ""), ("fine", "")
        )
    assert large.status == "error" and "File too large" in large.detail
    assert many.status == "error" and "Too many open files" in many.detail
    assert others == [Verdict(1.0)] * 3


def test_what_verifiers_print_reaches_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with VerifierPool(f"{HERE}.prints", workers=1) as pool:
        assert asked(pool, ("a", ""), ("b", "")) == [Verdict(1.0)] * 2
    captured = capfd.readouterr()
    assert sorted(captured.err.split("\n")) == ["", "printed a", "printed b"] and captured.out == ""


DIES = """
import os, sys
if "DIES" in os.environ:
    print("the licence server is down", file=sys.stderr, flush=True)
    os.kill(os.getpid(), int(os.environ["DIES"])) if os.environ["DIES"] != "0" else os._exit(9)
def verifier(response, answer, prompt=None):
    return 1.0
class InWorkers:
    def __init__(self):
        if os.environ.get("DIES_IN_WORKERS", str(os.getpid())) != str(os.getpid()):
            print("no memory left on the device", file=sys.stderr, flush=True)
            os._exit(5)
    def __call__(self, response, answer, prompt=None):
        return 1.0
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("name", "variable", "value", "ending", "words"),
    [
        ("verifier", "DIES", "0", "ended with exit code 9", "the licence server is down"),
        ("verifier", "DIES", "11", "was killed by signal 11", "the licence server is down"),
        ("InWorkers", "DIES_IN_WORKERS", "", "ended with exit code 5", "no memory left on the device"),
    ],
)
def test_processes_that_die_at_their_start_say_why(
    name: str, variable: str, value: str, ending: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"dying_{variable.lower()}_{value}"
    (tmp_path / f"{module}.py").write_text(DIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__(module)
    monkeypatch.setenv(variable, value or str(os.getpid()))
    with VerifierPool(f"{module}.{name}", workers=1, environment=[variable]) as pool:
        with pytest.raises(VerifierError) as caught:
            asked(pool, ("a", ""))
    message = str(caught.value)
    assert ending in message and f"the end of their output:\n{words}" in message, message
