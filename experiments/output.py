"""Standard output and error that never end a program: closed streams, pipes without a reader, any encoding."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, BinaryIO, TextIO, cast


def prepare_output() -> None:
    """Make writing to standard output and standard error safe for the rest of the process.

    A run of days must not end because the reader of its output has left (`| head`), the terminal was closed or the disk
    of its log is full. What cannot be written is dropped from then on. Characters that the encoding does not have are
    written as escapes.
    """
    for descriptor in (0, 1, 2):
        _open(descriptor)
    sys.stdout, sys.stderr = _safe(sys.stdout, sys.__stdout__, 1), _safe(sys.stderr, sys.__stderr__, 2)


class _Dropping(io.FileIO):
    """A file descriptor that is redirected to the null device at the first error in writing."""

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # the descriptor does not block, and its reader is slow
                select.select([], [self], [])
            return written
        except OSError:
            # Also for the libraries and child processes that write to the descriptor themselves.
            _redirect(self.fileno())
            return memoryview(data).nbytes


def _open(descriptor: int) -> None:
    """Open the null device in place of a closed descriptor, which the next file would take otherwise."""
    try:
        os.fstat(descriptor)
    except OSError:
        _redirect(descriptor)


def _redirect(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)


def _safe(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    """The stream, or a safe one in place of the interpreter's `original`; a stream that replaces it is left alone."""
    if stream is not original:
        return stream
    if stream is not None:
        stream.flush()
    raw, unbuffered = _Dropping(descriptor, "w", closefd=False), bool(getattr(stream, "write_through", False))
    return io.TextIOWrapper(
        # The raw file takes the place of a buffer, as in the interpreter's own streams under `python -u`.
        cast(BinaryIO, raw) if unbuffered else io.BufferedWriter(raw),
        getattr(stream, "encoding", "utf-8"),
        "backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=unbuffered,
    )
