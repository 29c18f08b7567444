"""The main programs that a verifier pool runs in, none of which it may run again, hinder or outlive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.verify_pools import ROOT, children, half, rewards
from upge.verify import VerifierPool

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
        team = pool._dispatcher._team
        while not all(worker.pid for worker in team.workers):
            time.sleep(0.01)
        workers = [worker.pid for worker in team.workers] + [team._server._process.pid]
        pool.submit((r"\\\\boxed{i^{9^{9^9}}}", "3"))
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


@pytest.mark.slow
def test_several_ranks(program: tuple[Path, dict[str, str]]) -> None:
    folder, env = program
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "programs.run"], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [(folder / f"out{rank}").read_text() for rank in (0, 1)] == [EXPECTED] * 2


def test_main_program_is_not_run_again_and_workers_end_with_it(program: tuple[Path, dict[str, str]]) -> None:
    folder, env = program
    command = [sys.executable, "-m", "programs.run", "die"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
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
    script = ROOT / "upge" / "verify" / "start.py"
    code = f"import runpy, sys; server = runpy.run_path({str(script)!r})['import_server'](); "
    code += r"assert server.base.load('math')(r'\boxed{2/4}', '1/2') == 1.0; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_sigterm_to_the_whole_process_group_changes_no_verdict() -> None:
    """Launchers send it to every process; the parent finishes its step first and still needs right verdicts."""
    before = children()
    with VerifierPool("math", workers=1) as pool:
        assert rewards(pool.score([half(1)])) == [1.0]
        own = children() - before
        assert own
        for process in own:
            os.kill(process, signal.SIGTERM)
        time.sleep(0.3)
        assert own <= children()
        assert rewards(pool.score([half(2)])) == [1.0]
