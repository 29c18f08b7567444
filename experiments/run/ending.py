"""Records how a run ended in exit.json, and announces it to launchers, which replace the exit codes of their ranks."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from experiments.files import now
from upge.errors import StorageError
from upge.train.distributed import World
from upge.train.files import read_lines, write_atomically
from upge.train.launcher import announce
from upge.train.stopping import Ending

#: In a run's folder: exit code, reason, last recorded step, time.
EXIT = "exit.json"


class ExitRecord:
    """Records how the run in the folder `path` ends, once it has begun."""

    def __init__(self, path: Path) -> None:
        self.path, self._has_begun = path, False

    def begin(self, world: World) -> None:
        """Remove the record of an earlier start."""
        self._has_begun = True
        if world.is_main:
            (self.path / EXIT).unlink(missing_ok=True)

    def write(self, ending: Ending) -> None:
        """Write exit.json, if the run has begun. A full disk does not change how the run ends."""
        if not self._has_begun:
            return
        with contextlib.suppress(OSError, StorageError):
            metrics = self.path / "metrics.jsonl"
            steps = [line["step"] for line in read_lines(metrics)] if metrics.is_file() else []
            record = {"code": ending.code, "reason": ending.reason, "step": max(steps, default=0), "time": now()}
            write_atomically(self.path / EXIT, json.dumps(record, indent=2) + "\n")

    def lost(self, ending: Ending) -> None:
        """Print and record that this rank ends because another rank or the launcher has ended."""
        print(f"error: {ending.reason}; the same command with output={self.path} continues", file=sys.stderr)
        self.write(ending)
        announce(ending, True)
        sys.stderr.flush()
