"""A worker of a `VerifierPool`: a process that scores one response after the other.

Protocol (`messages.Channel`): the worker sends ["ready", process id] or ["failed", verifier, reason]. For each task
[number, verifier, text, answer, prompt, is_extracted, more, count] it sends ["started", number] and
["done", number, rewards, status, detail, extracted, traceback, seconds]. `rewards` has a number for each response.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, cast

from upge.verify import isolation
from upge.verify.base import LONGEST_EXTRACT, load
from upge.verify.declared import Declared, Verifier
from upge.verify.messages import Channel

Outcome = tuple[list[float], str, str, str | None, str]
"""Rewards, status, detail, extracted answer and traceback. After an error the rewards are empty."""
LONGEST_DETAIL, LONGEST_TRACEBACK = 1000, 6000
"""The maximum number of characters of an error's message, and of its traceback, whose end is kept."""


class Loaded(NamedTuple):
    """A verifier and what it declares."""

    verifier: Verifier
    declared: Declared


def work(connection: socket.socket, server: int, setup: Mapping[str, Any]) -> NoReturn:
    """Score responses until the parent closes the connection, then exit without the server's cleanup.

    Args:
        connection: the socket to the pool.
        server: process id of the server, this process's parent.
        setup: as for `server.serve`.
    """
    try:
        os.setpgid(0, 0)
        isolation.adopt_orphans()
        isolation.die_with_parent(server)
        isolation.limit_resources(setup["memory"])
        connection.set_inheritable(False)
        # A process that a verifier forks must neither use the connection nor keep it open after this process ends.
        os.register_at_fork(after_in_child=connection.close)
        channel, most_cpu, cpu_limit = Channel(connection), setup["seconds"] * (os.cpu_count() or 1), 0.0
        verifiers = _loaded(setup["names"], channel)
        own = os.getpid()
        channel.send(["ready", own])
        while True:
            number, name, *task = channel.receive()
            if time.process_time() + most_cpu > cpu_limit:
                cpu_limit = time.process_time() + 2 * most_cpu + 1
                isolation.limit_cpu(math.ceil(cpu_limit))
            channel.send(["started", number])
            begin = time.monotonic()
            outcome = score(*verifiers[name], *task)
            if os.getpid() != own:  # a fork that bypassed Python's os.fork
                os._exit(0)
            channel.send(["done", number, *outcome, time.monotonic() - begin])
    except (EOFError, OSError):
        pass
    finally:
        os._exit(1)


def _loaded(names: list[str], channel: Channel) -> dict[str, Loaded]:
    """The verifiers by name. If one cannot be loaded, reports the reason and exits."""
    verifiers = {}
    for name in names:
        try:
            verifier = load(name)
            verifiers[name] = Loaded(verifier, Declared.by(verifier))
        except BaseException as error:
            channel.send(["failed", name, str(error)[:LONGEST_DETAIL] or repr(error)[:LONGEST_DETAIL]])
            os._exit(1)
    return verifiers


def score(
    verifier: Verifier,
    declared: Declared,
    text: str,
    answer: str,
    prompt: str | None,
    is_extracted: bool,
    more: str = "",
    count: int = 0,
) -> Outcome:
    """The outcome for one response, for an answer already extracted from it, or for `count` responses."""
    extracted = None
    try:
        if is_extracted:
            result = verifier.judge(text, answer, prompt)
        else:
            extracted = None if count else _extracted(verifier, text)
            values = {"response": text, "answer": answer, "prompt": prompt}
            result = declared.call(verifier, values | (json.loads(more) if more else {}))
    except Exception as error:
        # If a built-in verifier fails, the answer is malformed and so wrong. A user's verifier may have a bug.
        blameless = is_extracted and not isinstance(error, (ImportError, MemoryError))
        return ([0.0], "ok", "", None, "") if blameless else ([], "error", *_told(error, extracted))
    try:
        rewards = [_number(one) for one in cast("list[Any]", result)] if count else [_number(result)]
    except Exception:  # not a list, or one that cannot be read
        rewards = []
    if len(rewards) != max(count, 1) or not all(declared.minimum <= reward <= declared.maximum for reward in rewards):
        expected = f"a finite number in [{declared.minimum:g}, {declared.maximum:g}]"
        expected = f"a list of {count} rewards, each {expected}" if count else expected
        return [], "error", f"the verifier returned {_shown(result)}; it must return {expected}", extracted, ""
    return rewards, "ok", "", extracted, ""


def _number(result: Any) -> float:
    """A reward as a float; NaN if it is not a number."""
    try:
        # float() also reads strings and bytes, which are not accepted here.
        is_number = hasattr(result, "__float__") or hasattr(result, "__index__")
        return float(result) if is_number and not isinstance(result, (str, bytes)) else math.nan
    except Exception:
        return math.nan


def _extracted(verifier: Verifier, response: str) -> str | None:
    """The answer that a verifier extracts, if it has a method `extract`."""
    extract = getattr(verifier, "extract", None)
    extracted = extract(response) if callable(extract) else None
    return None if extracted is None else str(extracted)[:LONGEST_EXTRACT]


def _told(error: Exception, extracted: str | None) -> tuple[str, str | None, str]:
    """Detail, extracted answer and traceback of an error; the traceback is without this module's own line."""
    try:
        detail = f"{type(error).__name__}: {error}"[:LONGEST_DETAIL]
    except Exception:  # the error's own __str__ fails
        detail = type(error).__name__
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    try:
        lines = "".join(traceback.format_exception(type(error), error, inner))[-LONGEST_TRACEBACK:]
    except Exception:
        lines = ""
    return detail, extracted, lines


def _shown(result: object) -> str:
    try:
        return repr(result)[:200]
    except Exception:  # its own __repr__ fails
        return f"an object of type {type(result).__name__}"
