"""Short runs whose folders the tests of faults damage."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

from tests import forked
from tests.running import SMALL, environment

#: A run of seconds that samples nothing.
SHORT = (*SMALL, "algo=sft", "eval.every=-1", "verify.workers=1", "rollout.engine=transformers")
#: The same with three steps and a checkpoint after each.
STEPS = (*SHORT, "steps=3", "checkpoint.every=1", "checkpoint.keep=0")


def interrupted(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a finished run that stopped after `step`."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "final")
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"finished_step": None}))
    return folder


def refused(*arguments: str, ranks: int = 1, limits: tuple[str, ...] = ()) -> str:
    """Runs it, and checks that it ends with exit code 2 and one message, which is returned."""
    done = attempt(*arguments, ranks=ranks, limits=limits)
    assert done.returncode == 2, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    errors = re.findall(r"error(?: on rank \d)?: .*", done.stderr)
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-4000:]
    return errors[0]


def attempt(*arguments: str, ranks: int = 1, limits: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, under limits of tests/faults/limited.py."""
    module, words = ("tests.faults.limited", (*limits, "--", *arguments)) if limits else ("tests.undrawn", arguments)
    return forked.run(module, *words, environment=environment(), ranks=ranks)
