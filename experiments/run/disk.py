"""Space on the disk of a run's output folder: checkpoints, final/ and best/."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from experiments.run.memory import checkpoint_bytes, second_moments
from experiments.run.memory_items import Shapes
from experiments.run.workload import GIB, Machine
from upge.algorithm import Algorithm
from upge.errors import ConfigError
from upge.pipeline import Pipeline
from upge.train.config import RunConfig


@dataclass(frozen=True)
class Disk:
    """What a run writes at most at one time, apart from its text files.

    Attributes:
        checkpoint: bytes of one checkpoint.
        most: the largest number of checkpoints at one time. The newest stays until a new one is complete.
        kept: the number of checkpoints at the end.
        model: bytes of the weights in final/ or best/, with their LoRA adapters.
        has_best: whether there is a best/. A new one is complete before the old one is removed.
    """

    checkpoint: int
    most: int
    kept: int
    model: int
    has_best: bool

    @classmethod
    def of(cls, config: RunConfig, algorithm: Algorithm | Pipeline, shapes: Shapes, existing: int = 0) -> Disk:
        """The disk space of a run with these models, whose folder holds `existing` checkpoints."""
        checkpoint = checkpoint_bytes(shapes.policy.trained, 2 if second_moments(algorithm) else 1)
        checkpoint += checkpoint_bytes(shapes.critic.trained) if shapes.critic else 0
        checkpoint += config.rollout.lag * shapes.policy.trained * shapes.policy.itemsize
        every, keep = config.checkpoint.every, config.checkpoint.keep
        saved = max(math.ceil(config.steps / every) if every else 1, existing + 1 if existing else 0)
        most, kept = (min(max(keep, 2), saved), min(keep, saved)) if keep else (saved, saved)
        model = shapes.policy.weights + shapes.policy.adapter * shapes.policy.itemsize
        return cls(checkpoint, most, kept, model, config.eval.keep_best)

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment: during the last checkpoint, or at the end with final/."""
        best = 2 * self.model if self.has_best else 0
        return best + max(self.most * self.checkpoint, self.kept * self.checkpoint + self.model)

    def __str__(self) -> str:
        rows = [
            f"{self.checkpoint / GIB:8.2f}  a checkpoint: 12 bytes per trained parameter, 8 more for second moments, "
            "the weights of rollout.lag steps",
            f"{self.model / GIB:8.2f}  final/" + (", and twice for best/" if self.has_best else ""),
            f"{self.peak / GIB:8.2f}  at most, with {self.most} checkpoints at one time",
        ]
        return "\n".join(rows)


def check_disk(disk: Disk, config: RunConfig, machine: Machine, output: Path) -> tuple[str, ...]:
    """Compare a run's disk space with what is free; return a note if it does not fit and `machine` is not this one.

    What the output folder holds already counts as free, because a run that continues replaces it.

    Raises:
        ConfigError: it does not fit, and the machine is this one; or the folder is not on a disk.
    """
    parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    usage = shutil.disk_usage(parent)
    room = usage.free + _bytes_in(output)
    if disk.peak <= room:
        return ()
    if not usage.total and machine.is_here:
        raise ConfigError(f"output: {parent} is not on a disk, so it cannot hold a run; give a folder on a disk")
    needed = (
        f"{output} needs {disk.peak / GIB:.1f} GiB for up to {disk.most} checkpoints of {disk.checkpoint / GIB:.1f} "
        f"GiB and the weights in final/, and {room / GIB:.1f} GiB are free"
    )
    if not machine.is_here:
        return (f"output: {needed} here; the run's machine needs as much",)
    fixes = ["give a folder on a larger disk"]
    if disk.kept > 1:
        fixes.append(f"checkpoint.keep=1 instead of {config.checkpoint.keep}")
    if disk.most > 1 and config.checkpoint.every:
        fixes.append(
            f"checkpoint.every=0 instead of {config.checkpoint.every}, which saves only when the run is stopped"
        )
    raise ConfigError(f"output: {needed}; {' or '.join(fixes)}")


def _bytes_in(folder: Path) -> int:
    """Bytes of the checkpoints and weights that a folder holds."""
    parts = [folder / name for name in ("checkpoints", "final", "best")]
    return sum(file.stat().st_size for part in parts for file in part.rglob("*") if file.is_file())
