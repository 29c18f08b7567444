"""Checks that the fields of a dataclass instance have the annotated types."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from upge.errors import ConfigError, nearest


def check_fields(instance: Any) -> None:
    """Check every field of the dataclass `instance` against its annotation.

    Raises:
        ConfigError: a field has another type; the message names the class, the field, the value and the expected type.
    """
    hints = field_types(type(instance))
    for name, annotation in hints.items():
        value = getattr(instance, name)
        wrong = mismatch(value, annotation)
        if wrong:
            raise ConfigError(f"{type(instance).__name__}.{name}: {wrong}")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name → resolved annotation of a dataclass.

    Empty for any other class, and where a name in an annotation cannot be resolved.
    """
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        hints = typing.get_type_hints(cls)
    except NameError:
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def mismatch(value: Any, annotation: Any) -> str | None:
    """None if `value` is of type `annotation`, else one clause that says what was found and what is expected."""
    if annotation is Any:
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in arguments):
            return None
        return f"{value!r} is not one of {', '.join(map(repr, arguments))}; {nearest(str(value), map(str, arguments))}"
    if origin in (Union, types.UnionType):
        wrong = [mismatch(value, a) for a in arguments]
        return None if None in wrong else f"found {_show(value)}, expected {_name(annotation)}"
    expected = origin or annotation
    if expected is float and isinstance(value, float) and math.isnan(value):
        return "found nan, expected a number"
    if expected is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif expected is int:
        right = isinstance(value, int) and not isinstance(value, bool)
    elif expected is tuple:
        right = isinstance(value, tuple) and _items_match(value, arguments)
    elif expected in (list, Sequence, dict, Mapping):
        right = isinstance(value, expected)
    elif isinstance(expected, type):
        right = isinstance(value, expected)
    else:
        right = True
    return None if right else f"found {_show(value)}, expected {_name(annotation)}"


def _items_match(value: tuple, arguments: tuple) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    return not arguments or (
        len(arguments) == len(value) and all(mismatch(v, a) is None for v, a in zip(value, arguments, strict=True))
    )


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
