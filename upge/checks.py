"""Checks that the fields of a dataclass instance have the annotated types."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from upge.errors import ConfigError, closest


def check_fields(instance: Any) -> None:
    """Check every annotated attribute of `instance`, such as the fields of a dataclass, against its annotation.

    The annotations of all base classes count: a subclass may narrow a type, for example `source: Source` of a
    regularizer, but never widen it.

    Raises:
        ConfigError: an attribute has another type; the message names the class, the attribute, the value and the
            expected type.
    """
    cls = type(instance)
    for base in cls.__mro__:
        for name, annotation in _own_types(base).items():
            if hasattr(instance, name) and (wrong := mismatch(getattr(instance, name), annotation)):
                raise ConfigError(f"{cls.__name__}.{name}: {wrong}")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name → resolved annotation of a dataclass; empty for any other class.

    A field is left out if a name in its annotation cannot be resolved.
    """
    if not dataclasses.is_dataclass(cls):
        return {}
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        hints |= _own_types(base)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.name in hints}


@functools.cache
def _own_types(cls: type) -> dict[str, Any]:
    """Name → resolved annotation of what the body of `cls` annotates, as far as it can be resolved."""
    types_by_name: dict[str, Any] = {}
    for name, annotation in vars(cls).get("__annotations__", {}).items():
        alone = type(cls.__name__, (), {"__annotations__": {name: annotation}, "__module__": cls.__module__})
        try:
            types_by_name |= typing.get_type_hints(alone)
        except (NameError, AttributeError):  # a name that exists only for type checkers, or in a function
            continue
    return types_by_name


def mismatch(value: Any, annotation: Any) -> str | None:
    """None if `value` is of type `annotation`, else one clause that says what was found and what is expected."""
    if annotation is Any:
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in arguments):
            return None
        hint = closest(str(value), map(str, arguments))
        return f"{value!r} is not one of {', '.join(map(repr, arguments))}{hint and f'; {hint}'}"
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
    elif expected is list and isinstance(value, str):
        return f"found {_show(value)}, expected list; write [{value}]"
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
