"""Runs the workers: a process for each version of each framework."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.cli import ROOT
from experiments.referee import wheels
from experiments.referee.settings import INSTALLED, OFFLOAD, RefereeConfig, framework
from experiments.referee.worker import MARK
from upge.errors import ConfigError

#: Seconds that a worker may take; importing a framework takes up to one minute on a slow machine.
TIME_LIMIT = 900


@dataclass(frozen=True)
class Result:
    """What a worker found.

    Attributes:
        framework: name of the adapter, or 'deepspeed'.
        version: of the framework.
        data: what the worker printed: `rows` and `stubs`, or `runs` of DeepSpeed.
        error: why there is nothing.
    """

    framework: str
    version: str
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    error: str = ""


def results(config: RefereeConfig) -> Iterator[Result]:
    """The results of all versions, one after the other; those in the folder `config.saved` are read from there."""
    for name in config.frameworks:
        for version in config.versions_of(name):
            kept = Path(config.saved) / f"{name}-{version}.json" if config.saved else None
            if kept is not None and kept.is_file():
                yield Result(name, version, json.loads(kept.read_text("utf-8")))
                continue
            result = judged(name, version, config.download)
            if kept is not None and not result.error:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(result.data, indent=1), "utf-8")
            yield result


def judged(name: str, version: str, download: bool) -> Result:
    """The result of one version; with an error if the version is not available or its worker fails."""
    try:
        folders = folders_of(name, version, download)
    except ConfigError as error:
        return Result(name, version, error=str(error))
    module = "experiments.referee.offload" if name == OFFLOAD else "experiments.referee.worker"
    arguments = [*([] if name == OFFLOAD else [name]), *map(str, folders)]
    return _worked(name, version, [sys.executable, "-m", module, *arguments])


def folders_of(name: str, version: str, download: bool) -> list[Path]:
    """The folders for the import path: the version itself and what it runs with; none for the installed one.

    Raises:
        ConfigError: one is not cached and may not or cannot be downloaded.
    """
    if version == INSTALLED:
        return []
    needed = {distribution(name): version}
    if name != OFFLOAD:
        companions = getattr(framework(name), "COMPANIONS", {})
        needed |= companions.get(version, companions.get("", {}))
    missing = [f"{d} {v}" for d, v in needed.items() if not wheels.is_cached(d, v)]
    if missing and not download:
        raise ConfigError(f"{', '.join(missing)} not in {wheels.cache()}; download it with download=true")
    return [wheels.fetch(d, v) for d, v in needed.items()]


def distribution(name: str) -> str:
    """The name on the package index."""
    return OFFLOAD if name == OFFLOAD else framework(name).DISTRIBUTION


def _worked(name: str, version: str, command: Sequence[str]) -> Result:
    """The result of a worker's process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return Result(name, version, error=f"the process did not end within {TIME_LIMIT} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return Result(name, version, json.loads(line.removeprefix(MARK)))
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return Result(name, version, error=f"the process ended with {done.returncode}: {last[:300]}")
