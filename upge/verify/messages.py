"""Messages between a `VerifierPool` and its workers: JSON texts over a socket, each preceded by its length.

A worker may run code from a response. So its messages are data, never pickled objects, and their length is limited. The
pool's end blocks neither on an incomplete message nor on a worker that does not read.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

LENGTH = struct.Struct(">Q")
"""The header of each message: its number of bytes."""
LONGEST = 1 << 17
"""The maximum number of bytes of a message from a worker."""
_CHUNK = 1 << 16

Message = list[Any]  # Any: JSON values


class ProtocolError(Exception):
    """A message that is too long, or is not a JSON array."""


class Channel:
    """One end of a connection. The pool's end does not block; a worker's end does.

    Args:
        connection: the socket, which the channel then owns.
        longest: the maximum number of bytes of a received message; None for no limit.
        blocking: True to use `send` and `receive`, False to use `post`, `flush` and `read`.
    """

    def __init__(self, connection: socket.socket, longest: int | None = None, blocking: bool = True) -> None:
        self._connection, self._longest = connection, longest
        self._received, self._unsent = bytearray(), bytearray()
        connection.setblocking(blocking)

    def fileno(self) -> int:
        """The descriptor of the socket, for selectors."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()

    # --- a worker's end ---

    def send(self, message: Message) -> None:
        """Send a message; raise OSError if the other end is closed."""
        self._connection.sendall(_packed(message))

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            EOFError, OSError: the other end is closed.
        """
        while (message := self._next()) is None:
            self._fill()
        return message

    # --- the pool's end ---

    @property
    def has_unsent(self) -> bool:
        """Whether `flush` has something to send once the socket is writable."""
        return bool(self._unsent)

    def post(self, message: Message) -> None:
        """Send as much of a message as the socket takes; raise OSError if the other end is closed."""
        self._unsent += _packed(message)
        self.flush()

    def flush(self) -> None:
        """Send more of what was posted; raise OSError if the other end is closed."""
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass

    def read(self) -> Iterator[Message]:
        """Take the messages that have arrived completely; possibly none.

        Raises:
            EOFError, OSError: the other end is closed.
            ProtocolError: the other end sent something else.
        """
        try:
            self._fill()
        except BlockingIOError:
            pass
        while (message := self._next()) is not None:
            yield message

    def _fill(self) -> None:
        data = self._connection.recv(_CHUNK)
        if not data:
            raise EOFError
        self._received += data

    def _next(self) -> Message | None:
        """Take the first message from what was received; None if it is not complete."""
        if len(self._received) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._received)
        if self._longest is not None and length > self._longest:
            raise ProtocolError(f"a message of {length} bytes, more than {self._longest}")
        end = LENGTH.size + length
        if len(self._received) < end:
            return None
        text = bytes(self._received[LENGTH.size : end])
        del self._received[:end]
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"a message that is not JSON ({error})"[:200]) from None
        if not isinstance(message, list):
            raise ProtocolError(f"a message that is not an array but {type(message).__name__}")
        return message


def _packed(message: Message) -> bytes:
    # ASCII escapes lone surrogates, which a model may write and UTF-8 cannot encode.
    text = json.dumps(message, ensure_ascii=True).encode("ascii")
    return LENGTH.pack(len(text)) + text
