"""Runs of the command line in processes of their own, for tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parent.parent
#: A run of seconds: few prompts, two levels, a small evaluation, and a verifier that loads no parser.
SMALL = (
    "prompts_per_step=4",
    "group_size=4",
    "data.levels=[3 numbers,4 numbers,4 mixed]",
    "data.train_size=48",
    "data.evaluation_size=6",
    "eval.samples=2",
    "verify.verifier=number",
)


def command(*arguments: str, ranks: int = 1) -> list[str]:
    """The command line, under torchrun for several ranks."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *launcher, "-m", "experiments.run", *arguments]


def run(
    *arguments: str, ranks: int = 1, code: int = 0, timeout: float = 300, figures: bool = False
) -> subprocess.CompletedProcess:
    """Runs it to its end in forked processes and checks the exit code.

    Args:
        figures: whether the run's report has figures. Drawing them takes longer than many a run here.
    """
    module, vllm = "experiments.run" if figures else "tests.undrawn", "rollout.engine=vllm" in arguments
    done = forked.run(module, *arguments, environment=environment(), ranks=ranks, vllm=vllm, timeout=timeout)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def interrupt(whole: Path, folder: Path) -> None:
    """Copies a finished run with a checkpoint of every step and makes it one that stopped in the last step."""
    shutil.copytree(whole, folder)
    shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
    shutil.rmtree(folder / "final")
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"finished_step": None}))


def environment() -> dict[str, str]:
    """Without the hub: a test never waits for the network."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "TQDM_MININTERVAL": "60"}


def lines(path: Path) -> list[dict]:
    """The lines of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    """The lines without what the clock wrote."""
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]
