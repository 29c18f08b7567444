"""The folder of a run: what it leaves, and what an interrupted one is continued from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from upge.errors import ConfigError

#: Keys that may differ between a run and its continuation.
FREE_KEYS = ("steps", "resume", "output", "checkpoint", "log_rollouts")


class RunFolder:
    """config.yaml, run.json, metrics.jsonl, evaluations.jsonl, rollouts/, checkpoints/, final/ under `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"

    @property
    def is_finished(self) -> bool:
        """True once the final model is written."""
        return (self.final / "config.json").is_file()

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        found = [p.name.removeprefix("step_") for p in self.checkpoints.glob("step_*") if p.is_dir()]
        return sorted(int(name) for name in found if name.isdigit())

    @staticmethod
    def tag(step: int) -> str:
        """The name of a step's checkpoint."""
        return f"step_{step:06d}"

    def open(self, config: Mapping[str, Any], resume: str) -> bool:
        """Checks that this run may write here; True if it continues another. Nothing is written.

        Raises:
            ConfigError: the folder holds something else, a finished run, or a run with other settings.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return False
        saved = self.path / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"output: {self.path} exists and is not a run's folder; choose another")
        if resume == "never":
            raise ConfigError(f"output: {self.path} exists; choose another, remove it, or continue it with resume=auto")
        old = OmegaConf.to_container(OmegaConf.load(saved))
        different = [k for k in _leaves(config, old) if k.split(".")[0] not in FREE_KEYS]
        if different:
            key = different[0]
            raise ConfigError(
                f"output: {self.path} holds a run with another {key} ({_at(old, key)!r}, now {_at(config, key)!r}); "
                "choose another folder, or the settings of its config.yaml to continue it"
            )
        if self.is_finished and int(old["steps"]) >= int(config["steps"]):
            raise ConfigError(f"output: {self.path} holds a finished run; choose another folder, or more steps")
        return True

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Writes the resolved configuration and the facts about this start; earlier starts stay listed."""
        (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        known = self.path / "run.json"
        earlier = json.loads(known.read_text()).get("starts", []) if known.is_file() else []
        start = {k: facts[k] for k in ("command", "started", "from_step")}
        write_atomically(known, json.dumps({**facts, "starts": [*earlier, start]}, indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, because it will be recorded again."""
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            path = self.path / name
            if path.is_file():
                kept = [line for line in read_lines(path) if line["step"] <= step]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        for path in (self.path / "rollouts").glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        for path in self.checkpoints.glob("*.partial"):
            shutil.rmtree(path)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Adds a line to a jsonl file and pushes it to the disk."""
        with open(self.path / name, "a") as file:
            file.write(json.dumps(_plain(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes a step's responses, a line each."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.path / "rollouts" / f"step_{step:06d}.jsonl", text)

    def settle(self, step: int, keep: int) -> None:
        """Makes the checkpoint of `step` count, by renaming it, and removes the oldest beyond `keep`."""
        partial = self.checkpoints / f"{self.tag(step)}.partial"
        shutil.rmtree(self.checkpoints / self.tag(step), ignore_errors=True)
        partial.rename(self.checkpoints / self.tag(step))
        if keep:
            for old in self.checkpoint_steps()[:-keep]:
                shutil.rmtree(self.checkpoints / self.tag(old))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file; a last line cut off by an interruption is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file's content at once: an interruption leaves the old or the new, never a part."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: null says that there was no number."""
    odd = (float("inf"), float("-inf"))
    return {k: None if isinstance(v, float) and (v != v or v in odd) else v for k, v in line.items()}


def _leaves(new: Any, old: Any, path: str = "") -> list[str]:
    """Dotted keys at which two trees differ."""
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        keys = [*new, *(k for k in old if k not in new)]
        return [d for k in keys for d in _leaves(new.get(k), old.get(k), f"{path}.{k}" if path else str(k))]
    new, old = (list(v) if isinstance(v, tuple) else v for v in (new, old))
    return [] if new == old else [path]


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
