"""Interrupts that are held back while an engine works."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from upge.rollout.vllm_process import interrupts_held


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The interrupts that a handler got; after the first, the system's own handler ends the process, as in a run."""
    numbers: list[int] = []

    def first(number: int, frame: FrameType | None) -> None:
        numbers.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = signal.signal(signal.SIGINT, first)
    yield numbers
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("delivers", [True, False])
def test_what_the_handler_installs_remains(handled: list[int], delivers: bool) -> None:
    with interrupts_held() as deliver:
        signal.raise_signal(signal.SIGINT)
        assert handled == []
        if delivers:
            deliver()
            assert handled == [signal.SIGINT]
    assert handled == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_a_handler_that_stays_gets_each_interrupt() -> None:
    numbers: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupts_held() as deliver:
            signal.raise_signal(signal.SIGINT)
            deliver()
            signal.raise_signal(signal.SIGINT)
            assert len(numbers) == 1
        assert len(numbers) == 2 and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_handled_if_the_block_fails() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("another rank ended the call")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
