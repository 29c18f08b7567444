"""Wheels of other frameworks: downloaded with pip into the user's cache, unpacked, and never installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from upge.cache import home
from upge.errors import ConfigError


def cache() -> Path:
    """The folder that wheels are unpacked in."""
    return home() / "referee"


def folder(distribution: str, version: str) -> Path:
    """Where a version is unpacked."""
    return cache() / f"{distribution}-{version}"


def is_cached(distribution: str, version: str) -> bool:
    """Whether a version can be used without the network."""
    return folder(distribution, version).is_dir()


def importable(distribution: str, version: str) -> Path:
    """The folder of a cached version that belongs on the import path."""
    root = folder(distribution, version)
    inner = next((p for p in sorted(root.glob("*.data/purelib")) + sorted(root.glob("*/setup.py"))), root)
    return inner.parent if inner.name == "setup.py" else inner


def fetch(distribution: str, version: str) -> Path:
    """Download and unpack a version unless it is cached; return the folder for the import path.

    Raises:
        ConfigError: pip cannot download it.
    """
    if not is_cached(distribution, version):
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            archive = _download(distribution, version, Path(scratch))
            made = Path(scratch) / "unpacked"
            _unpack(archive, made)
            made.rename(folder(distribution, version))
    return importable(distribution, version)


def _download(distribution: str, version: str, into: Path) -> Path:
    """The archive of a version, a wheel if there is one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--dest", str(into), f"{distribution}=={version}"], capture_output=True, text=True, check=False
    )
    archives = [path for path in into.iterdir() if re.search(r"\.(whl|tar\.gz|zip)$", path.name)]
    if done.returncode or not archives:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"pip cannot download {distribution} {version}: {last}; check the version and the network")
    return archives[0]


def _unpack(archive: Path, into: Path) -> None:
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as packed:
            packed.extractall(into, filter="data")
    else:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(into)


def forget(distribution: str, version: str) -> None:
    """Remove a version from the cache."""
    shutil.rmtree(folder(distribution, version), ignore_errors=True)
