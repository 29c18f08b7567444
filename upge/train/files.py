"""Files of a run or an evaluation: the folder's lock, atomic writes, records, and errors such as full disks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from upge.errors import ConfigError, StorageError, UserError
from upge.trees import first_line, read_yaml

#: The lock file of a folder. It may remain after use.
LOCK = ".lock"
#: The error numbers of file systems without locks, such as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of files (`ulimit -f`) is reached",
}
#: How the writers of torch and safetensors report errors of the operating system.
_WRITER_ERRORS = re.compile(r"os error (\d+)|PytorchStreamWriter|inline_container|iostream error|file write failed")
#: What json and yaml raise for text that they cannot read.
UNREADABLE = (ValueError, RecursionError, AssertionError, YAMLError, OmegaConfBaseException)


@contextmanager
def locked(folder: Path, refusal: str, tidy: bool = False) -> Iterator[int]:
    """Lock a folder in the block and yield the lock's file descriptor. A missing folder is created.

    This process holds the lock, and so do processes that get the descriptor through `pass_fds`, until they end; forked
    processes do not. With `tidy`, a folder that was created here is removed again if the block leaves it empty. On a
    file system without locks this only warns.

    Raises:
        ConfigError: another process holds the lock; `refusal` is the message.
        StorageError: the folder or the file in it cannot be created.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        _lock(file, path, refusal)
        _held.add(file.fileno())
        try:
            yield file.fileno()
        finally:
            _held.discard(file.fileno())
            with suppress(OSError):
                if tidy and is_empty(folder):
                    path.unlink()
                    for empty in made:
                        empty.rmdir()


def _lock(file: IO[str], path: Path, refusal: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(refusal) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise StorageError(f"{path} cannot be locked: {error.strerror}; choose another folder") from error
        warnings.warn(f"{path.parent}: the file system has no locks; use this folder in one process only", stacklevel=4)
    # The process that held the lock before may have removed the folder.
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise ConfigError(refusal)


#: Descriptors of the locks that this process holds.
_held: set[int] = set()


def _release_in_child() -> None:
    """Point a forked process's copies of the locks' descriptors to /dev/null; the numbers stay valid."""
    for descriptor in _held:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


def is_empty(folder: Path) -> bool:
    """True if a folder does not exist or holds nothing but a lock."""
    return not folder.exists() or folder.is_dir() and all(path.name == LOCK for path in folder.iterdir())


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replace the file's content and sync it; an interruption leaves either the old or the new content.

    Lone surrogates, which UTF-8 cannot encode, are written as JSON's escapes.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    with disk_errors(path):
        with open(temporary, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode(errors="backslashreplace"))
            sync(file)
        os.replace(temporary, path)


def append(path: Path, text: str) -> None:
    """Append to a file and sync it.

    Raises:
        StorageError: it cannot be written.
    """
    with disk_errors(path), open(path, "ab") as file:
        file.write(text.encode(errors="backslashreplace"))
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Wait until the file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; do nothing on file systems that do not support it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn write errors in the block, including those of torch and safetensors, into a StorageError.

    Raises:
        StorageError: the message names `path` and the operating system's reason.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise StorageError(f"{path} cannot be written: {reason}") from error


def sync_files(folder: Path) -> None:
    """Wait until the files in a folder are on the disk.

    Raises:
        StorageError: they cannot be written.
    """
    with disk_errors(folder):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                sync(file)
        sync_folder(folder)


def disk_reason(error: BaseException) -> str | None:
    """The reason why something could not be written, as a clause; None if the error has another cause."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError):
            return _FULL.get(chain.errno or 0) or chain.strerror or str(chain)
        chain = chain.__cause__ or chain.__context__
    match = _WRITER_ERRORS.search(str(error))
    if match is None:
        return None
    number = int(match[1] or 0)
    return _FULL.get(number) or (os.strerror(number) if number else "the writer stopped; the disk may be full")


def is_full(error: BaseException) -> bool:
    """Whether an error means that a disk is full, a quota used up or a size limit reached."""
    return isinstance(error, OSError) and error.errno in _FULL


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        ConfigError: the file cannot be read or holds something else; `fix` says what to do.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except UNREADABLE as error:
        raise ConfigError(f"{path}: not readable as JSON ({first_line(error)}); {fix}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a JSON {type(content).__name__}, expected an object; {fix}")
    return content


def read_tree(path: Path, fix: str) -> dict[str, Any]:
    """The settings in a YAML file, without resolving interpolations.

    Raises:
        ConfigError: the file cannot be read or holds something else; `fix` says what to do.
    """
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"{error.problem}; {fix}") from error
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path}: expected keys and values; {fix}")
    return {str(key): value for key, value in tree.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file whose lines have a `step`.

    Unreadable lines are skipped with a warning. A last line that an interruption cut off is skipped without one.
    """
    return [record for record, _ in numbered_lines(path) if record is not None]


def numbered_lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """(record, bytes) of each line of a jsonl file, with None for an unreadable record; warns like `read_lines`."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line)
        # What follows the last newline is a line that was cut off.
        if record is None and number < len(lines):
            warnings.warn(f"{path}:{number}: this line is not a record of a step; it is skipped", stacklevel=3)
        if record is not None or number < len(lines):
            yield record, line


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record else None
