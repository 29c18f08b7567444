"""Checks of many algorithms that share parts: each part is checked once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from upge.components.base import Component
from upge.testing import algorithms, check_component


@contextmanager
def parts_checked_once() -> Iterator[None]:
    """`check_algorithm` leaves out a part that equals one that has passed. Not for classes that a test changes."""
    passed: dict[type, list[Component]] = {}

    def check(part: Component) -> None:
        same = passed.setdefault(type(part), [])
        if part not in same:
            check_component(part)
            same.append(part)

    with mock.patch.object(algorithms, "check_component", check):
        yield
