"""Content-addressed cache on disk, shared by all processes of a user.

with entry("tokens", key) as cached:        # other processes that use this key wait
    contents = cached.read()                # None if there are none, or if they are damaged
    if contents is None:
        cached.write([new_contents])
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: The maximum number of entries of a kind. Beyond it, the least recently used entry is removed.
MOST = 16
_TRAILER = struct.Struct("<QI")
"""Follows the contents: their number of bytes and their checksum."""


def home() -> Path:
    """The cache's folder: $UPGE_CACHE, else $XDG_CACHE_HOME/upge, else ~/.cache/upge."""
    chosen, user = os.environ.get("UPGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen).expanduser() if chosen else Path(user or "~/.cache").expanduser() / "upge").absolute()


class Entry:
    """The file of one key.

    Args:
        path: where the file is or will be. None stands for a cache that cannot be used: `read` returns None and
            `write` does nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> memoryview | None:
        """The contents, mapped into memory, or None if there are none or the file is incomplete."""
        if self._path is None:
            return None
        try:
            with self._path.open("rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):  # an empty file cannot be mapped
            return None
        with contextlib.suppress(OSError):  # another user's file: readable, but its time cannot be set
            os.utime(self._path)
        if len(view) < _TRAILER.size:
            return None
        contents, trailer = view[: -_TRAILER.size], view[-_TRAILER.size :]
        return contents if _TRAILER.unpack(trailer) == (len(contents), zlib.crc32(contents)) else None

    def write(self, parts: Iterable[bytes | memoryview]) -> None:
        """Store the concatenated parts. If that fails, as on a full disk, nothing is stored and nothing is raised."""
        if self._path is None:
            return
        unfinished = self._path.with_name(f"{self._path.name}.part")
        try:
            size = checksum = 0
            with unfinished.open("wb") as file:
                for part in parts:
                    file.write(part)
                    size += memoryview(part).nbytes
                    checksum = zlib.crc32(part, checksum)
                file.write(_TRAILER.pack(size, checksum))
            # The file gets its name only when it is complete.
            unfinished.rename(self._path)
            _make_room(self._path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)


@contextmanager
def entry(kind: str, key: str) -> Iterator[Entry]:
    """Yield the entry of a key, locked against all other processes.

    Args:
        kind: the subfolder of `home` that holds entries of this kind.
        key: a hash of everything that determines the contents; it is used as a file name.
    """
    try:
        from filelock import FileLock

        path = home() / kind / key
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f"{key}.lock"))
        lock.acquire()
    except (ImportError, OSError, RuntimeError):  # no folder, a read-only folder, or a disk without locks
        yield Entry(None)
        return
    try:
        yield Entry(path)
    finally:
        lock.release()


def _make_room(folder: Path) -> None:
    """Remove the least recently used entries beyond `MOST`, and unfinished files that are older than a day.

    A process that still reads a removed entry keeps its mapping.
    """
    for path in folder.glob("*.part"):
        if time.time() - path.stat().st_mtime > 86_400:
            path.unlink(missing_ok=True)
    entries = [path for path in folder.iterdir() if path.suffix not in (".lock", ".part")]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)[MOST:]:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
