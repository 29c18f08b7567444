"""The folder of a run: the files that the run writes, and the checkpoints that it continues from."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from upge.errors import ConfigError, StorageError
from upge.train.files import (
    append,
    disk_errors,
    is_empty,
    locked,
    numbered_lines,
    read_json,
    read_lines,
    read_tree,
    sync_files,
    sync_folder,
    write_atomically,
)

#: Keys and whole sections that may differ between a run and its continuation. None of them changes a gradient.
FREE_KEYS = (
    *(
        "steps",
        "resume",
        "output",
        "log_rollouts",
        "log_to",
        "log_project",
        "eval.every",
        "checkpoint",
        "stop",
        "alarms",
        "diagnose",
    ),
    *("hardware", "optimizer.micro_batch_tokens", "model.gradient_checkpointing", "deepspeed"),
    *("verify.workers", "verify.time_limit", "verify.memory_limit", "verify.environment", "verify.network"),
    *("rollout.memory_fraction", "rollout.max_sequences", "rollout.max_batched_tokens"),
)
#: Files with one or more lines per step, and folders with one file per logged step.
LINES, FOLDERS = ("metrics.jsonl", "evaluations.jsonl", "prompts.jsonl", "alarms.jsonl"), ("rollouts", "tokens")
#: The version of the names of keys and metrics in a run's folder. Folders of upge 0.1 have none in run.json.
FORMAT = 2
#: What to do about a file that cannot be read.
_FIX = "restore the file that the run wrote, or choose another output"
#: The fields that run.json keeps of every start.
_START = ("command", "started", "from_step", "world_size")
#: The file in best/ with the evaluation that it comes from.
BEST_METADATA = "evaluation.json"


class RunFolder:
    """A run's folder `path`: config.yaml, run.json, LINES, FOLDERS, checkpoints/, best/, final/. `path` may be new."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self.final, self.final_partial = path / "final", path / "final.partial"
        self.best, self.best_partial = path / "best", path / "best.partial"

    @property
    def is_finished(self) -> bool:
        """True once the last step's model is written; continuing with more steps makes it False again."""
        return self.metadata.get("finished_step") is not None

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of run.json; empty if there is none yet.

        Raises:
            ConfigError: it cannot be read, or a version of upge with other names of keys and metrics wrote it.
        """
        metadata = read_json(self.path / "run.json", _FIX)
        check_format(self.path, metadata)
        return metadata

    @property
    def best_metadata(self) -> dict[str, Any]:
        """The evaluation that best/ comes from: `step`, `mean`, `samples`; empty if there is no best/.

        Raises:
            ConfigError: the file cannot be read or lacks one of these numbers.
        """
        path, fix = self.best / BEST_METADATA, f"remove {self.best}; the run then keeps the best model from now on"
        metadata = read_json(path, fix)
        numbers = [metadata.get(name) for name in ("step", "mean", "samples")]
        if metadata and not all(isinstance(number, int | float) for number in numbers):
            raise ConfigError(f"{path}: step, mean and samples must be numbers; {fix}")
        return metadata

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        steps = [step_of(path.name) for path in self.checkpoints.glob("step_*") if path.is_dir()]
        return sorted(step for step in steps if step is not None)

    @staticmethod
    def tag(step: int) -> str:
        """The name of a step's checkpoint."""
        return _tag(step)

    def resume_step(self, resume: str) -> int | None:
        """The step of the newest checkpoint, or of the one that `resume` names; None = start from step 0.

        Raises:
            ConfigError: there is no checkpoint of this name.
        """
        steps = self.checkpoint_steps()
        if resume in ("auto", "never"):
            return steps[-1] if steps else None
        names = {self.tag(step): step for step in steps}
        if resume not in names:
            there = f"it has {', '.join(names)}" if names else "it has none"
            raise ConfigError(f"found {resume!r}, which is not a checkpoint of {self.path}; {there}", "resume")
        return names[resume]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder in the block, so that no other run writes there.

        Raises:
            ConfigError: another run holds the lock.
        """
        refusal = f"output: another run is using {self.path}; wait for it, stop it, or choose another folder"
        with locked(self.path, refusal, tidy=True):
            yield

    def open(self, config: Mapping[str, Any], resume: str) -> bool:
        """Check that this run may write here; True if it continues an earlier run. Write nothing.

        Raises:
            ConfigError: the folder cannot be created, or holds something else, a finished run, a run with other
                settings, or a file that cannot be read.
        """
        self._check_parent()
        self.resume_step(resume)
        if is_empty(self.path):
            return False
        saved = self.path / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"output: {self.path} exists and is not a run's folder; choose another")
        if resume == "never":
            raise ConfigError(f"output: {self.path} exists; choose another, remove it, or continue it with resume=auto")
        old = read_tree(saved, _FIX)
        free = [k for k in FREE_KEYS if k != "steps" or _may_be_longer(config)]
        different = [k for k in _leaves(config, old) if not any(f"{k}.".startswith(f"{one}.") for one in free)]
        if different:
            key = different[0]
            raise ConfigError(
                f"output: {self.path} holds a run with another {key} ({_at(old, key)!r}, now {_at(config, key)!r}); "
                "choose another folder, or continue the run with the settings of its config.yaml"
            )
        _ = self.best_metadata  # raises now rather than at the run's first evaluation
        if self.is_finished and self._steps(old) >= int(config["steps"]):
            raise ConfigError(f"output: {self.path} holds a finished run; choose another folder, or more steps")
        if self.is_finished and not self.checkpoint_steps():
            raise ConfigError(
                f"output: {self.path} holds a finished run without a checkpoint (checkpoint.every=0) to continue from; "
                f"choose another folder, with model={self.final} to start from its model"
            )
        if self.checkpoint_steps() and self.checkpoint_steps()[-1] > int(config["steps"]):
            raise ConfigError(
                f"output: {self.path} has a checkpoint of step {self.checkpoint_steps()[-1]}, beyond steps="
                f"{config['steps']}; give more steps, or choose another folder"
            )
        return True

    def different(self, config: Mapping[str, Any]) -> list[str]:
        """Dotted keys at which the folder's resolved configuration differs from `config`."""
        return _leaves(config, read_tree(self.path / "config.yaml", _FIX))

    def _steps(self, old: Mapping[str, Any]) -> int:
        if type(old.get("steps")) is not int:
            raise ConfigError(f"{self.path / 'config.yaml'}: found steps {old.get('steps')!r}, not a number; {_FIX}")
        return old["steps"]

    def _check_parent(self) -> None:
        existing = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(f"output: {self.path} cannot be created: {existing} is not a writable folder")

    def start(self, config: Mapping[str, Any], metadata: Mapping[str, Any], continues: bool) -> None:
        """Write the resolved configuration and run.json, which also lists earlier starts.

        Raises:
            ConfigError: another run has taken the folder in the meantime.
            StorageError: the folder or a file in it cannot be written.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if not continues and not is_empty(self.path):
            raise ConfigError(f"output: another run has just begun in {self.path}; choose another folder")
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        with disk_errors(self.path):
            for name in (*FOLDERS, self.checkpoints.name):
                (self.path / name).mkdir(exist_ok=True)
        start = {k: metadata[k] for k in _START if k in metadata}
        earlier = self.metadata.get("starts")
        starts = [*(earlier if isinstance(earlier, list) else []), start]
        self._write_metadata({"format": FORMAT, **metadata, "starts": starts})

    def finish(self, step: int) -> None:
        """Rename the exported model to final/ and mark the run as finished."""
        sync_files(self.final_partial)
        shutil.rmtree(self.final, ignore_errors=True)
        with disk_errors(self.final):
            self.final_partial.rename(self.final)
        self._write_metadata({**self.metadata, "finished_step": step})

    def is_best(self, line: Mapping[str, Any]) -> bool:
        """True if this evaluation's mean@k is above that of every earlier one, or there is no best/ yet."""
        best = self.best_metadata
        # The run wrote a best/ of a later step before it was resumed at an earlier one, which dropped its evaluation.
        return not best or best["step"] > line["step"] or _mean(line) > best["mean"]

    def settle_best(self, line: Mapping[str, Any]) -> None:
        """Rename the model that was exported to `best_partial` to best/."""
        metadata = {"step": line["step"], "mean": _mean(line), "samples": line["samples"]}
        write_atomically(self.best_partial / BEST_METADATA, json.dumps(metadata, indent=2) + "\n")
        sync_files(self.best_partial)
        shutil.rmtree(self.best, ignore_errors=True)
        with disk_errors(self.best):
            self.best_partial.rename(self.best)

    def _write_metadata(self, metadata: Mapping[str, Any]) -> None:
        write_atomically(self.path / "run.json", json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop everything recorded after `step`, because it will be recorded again. Unreadable lines remain."""
        # Checkpoints go first: after an interruption, the run must not continue from one whose records are gone.
        for later in (later for later in self.checkpoint_steps() if later > step):
            shutil.rmtree(self.checkpoints / self.tag(later))
        for path in (path for name in LINES if (path := self.path / name).is_file()):
            kept = [text for line, text in numbered_lines(path) if line is None or line["step"] <= step]
            write_atomically(path, b"".join(text + b"\n" for text in kept))
        for path in (path for name in FOLDERS for path in (self.path / name).glob("step_*.jsonl")):
            if (step_of(path.stem) or 0) > step:
                path.unlink()
        if not self.best.exists() and (self.best_partial / BEST_METADATA).is_file():
            self.best_partial.rename(self.best)  # best.partial is complete, and the earlier best/ is gone
        for path in (*self.checkpoints.glob("*.partial"), self.final_partial, self.best_partial):
            shutil.rmtree(path, ignore_errors=True)

    def is_evaluated(self, step: int) -> bool:
        """True if evaluations.jsonl has a line for this step."""
        path = self.path / "evaluations.jsonl"
        return path.is_file() and any(line["step"] == step for line in read_lines(path))

    def append(self, name: str, *lines: Mapping[str, Any]) -> None:
        """Append lines to a jsonl file and sync it to the disk."""
        append(self.path / name, "".join(json.dumps(_plain(line)) + "\n" for line in lines))

    def write_rows(self, folder: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the file of a step in one of FOLDERS, one line per row."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.path / folder / f"{_tag(step)}.jsonl", text)

    def make_room(self, step: int, needed: int, keep: int) -> None:
        """Remove old checkpoints so that, with a new one of `needed` bytes, `keep` checkpoints remain.

        The newest one remains until the new one is complete. With keep=0 all of them remain.

        Raises:
            StorageError: the new checkpoint does not fit on the disk.
        """
        if keep:
            self._keep_newest(max(keep - 1, 1))
        free = shutil.disk_usage(self.checkpoints).free
        if needed > free:
            raise StorageError(
                f"the checkpoint of step {step} needs {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are "
                f"free on the disk of {self.checkpoints}"
            )

    def settle(self, step: int, keep: int) -> None:
        """Rename the checkpoint of `step` from its temporary name and remove the oldest beyond `keep`."""
        partial = self.checkpoints / f"{self.tag(step)}.partial"
        shutil.rmtree(self.checkpoints / self.tag(step), ignore_errors=True)
        with disk_errors(partial):
            partial.rename(self.checkpoints / self.tag(step))
            sync_folder(self.checkpoints)
        if keep:
            self._keep_newest(keep)

    def _keep_newest(self, count: int) -> None:
        for old in self.checkpoint_steps()[:-count]:
            shutil.rmtree(self.checkpoints / self.tag(old))


def step_of(name: str) -> int | None:
    """The step in the name of a run's file or checkpoint; None for any other name, such as that of a copy."""
    digits = name.removeprefix("step_")
    is_step = digits.isascii() and digits.isdigit() and len(digits) < 20 and _tag(int(digits)) == name
    return int(digits) if is_step else None


def _tag(step: int) -> str:
    return f"step_{step:06d}"


def check_format(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a run's folder that another version wrote, by the content of its run.json.

    Raises:
        ConfigError: the message names the version.
    """
    if metadata and metadata.get("format") != FORMAT:
        versions = metadata.get("versions")
        by = f"upge {versions.get('upge', '') if isinstance(versions, dict) else ''}".rstrip()
        raise ConfigError(
            f"{path}: this folder was written by another version ({by}), whose keys and metrics have other names; read "
            "it with that version, or run again in another folder"
        )


def _may_be_longer(config: Mapping[str, Any]) -> bool:
    """True if a longer run would have had the same steps so far.

    This holds if no stage and no learning rate depends on the number of steps.
    """
    return "stages" not in config.get("algo", {}) and config.get("optimizer", {}).get("schedule") in (None, "constant")


def _mean(line: Mapping[str, Any]) -> float:
    """The mean@k over all problems of a line of evaluations.jsonl."""
    return float(line["all"][f"mean@{line['samples']}"])


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with None for NaN and infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _leaves(new: Any, old: Any, path: str = "") -> list[str]:
    """Dotted keys of the leaves at which two trees differ."""
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        keys = [*new, *(k for k in old if k not in new)]
        return [d for k in keys for d in _leaves(new.get(k), old.get(k), f"{path}.{k}" if path else str(k))]
    new, old = (list(v) if isinstance(v, tuple) else v for v in (new, old))
    return [] if new == old else [path]


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
