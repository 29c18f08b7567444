"""Files of what takes long to make and follows from its key alone: made once, found again by every later start.

with entry("tokens", key) as kept:          # others who ask for the same wait meanwhile
    found = kept.read()                     # None: not there, or damaged
    if found is None:
        kept.write([made_bytes])
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

#: Entries of a kind that stay; the one that was not asked for the longest makes room for a new one.
MOST = 16
_TRAILER = struct.Struct("<QI")
"""Behind the contents: how many bytes they have, and their checksum."""


def home() -> Path:
    """$UPGE_CACHE, else $XDG_CACHE_HOME/upge or ~/.cache/upge."""
    chosen, user = os.environ.get("UPGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen).expanduser() if chosen else Path(user or "~/.cache").expanduser() / "upge").absolute()


class Entry:
    """The file of one key; None for its path stands for a cache that cannot be used: nothing is found or kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> memoryview | None:
        """What was written, mapped into memory; None where there is none, or what there is is not whole."""
        if self._path is None:
            return None
        try:
            with self._path.open("rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):  # an empty file cannot be mapped
            return None
        with contextlib.suppress(OSError):  # another user's file, which can be read all the same
            os.utime(self._path)
        if len(view) < _TRAILER.size:
            return None
        contents, trailer = view[: -_TRAILER.size], view[-_TRAILER.size :]
        return contents if _TRAILER.unpack(trailer) == (len(contents), zlib.crc32(contents)) else None

    def write(self, parts: Iterable[bytes | memoryview]) -> None:
        """Keeps the parts, one behind the other. A full disk only means that nothing is kept."""
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
            # It appears under its name when it is complete, never before.
            unfinished.rename(self._path)
            _make_room(self._path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)


@contextmanager
def entry(kind: str, key: str) -> Iterator[Entry]:
    """The entry of a key, which no other process reads or writes meanwhile.

    kind: the folder in `home` where such things are.
    key: a hash of everything that the contents follow from, fit for a file's name.
    """
    try:
        from filelock import FileLock

        path = home() / kind / key
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f"{key}.lock"))
        lock.acquire()
    except (ImportError, OSError, RuntimeError):  # no home, one that cannot be written to, a disk without locks
        yield Entry(None)
        return
    try:
        yield Entry(path)
    finally:
        lock.release()


def _make_room(folder: Path) -> None:
    """Removes the oldest entries beyond `MOST`; who still reads one keeps what is mapped.

    And what killed processes left unfinished, the day after.
    """
    for path in folder.glob("*.part"):
        if time.time() - path.stat().st_mtime > 86_400:
            path.unlink(missing_ok=True)
    entries = [path for path in folder.iterdir() if path.suffix not in (".lock", ".part")]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)[MOST:]:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
