"""An extension of griffe, which reads docstrings for the pages of the API (`extensions` in mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: A line of a docstring that describes several attributes or arguments at once, such as "low, high: bounds".
_SEVERAL = re.compile(r"^( +)(\w+)((?:, \w+)+): ", re.MULTILINE)


class SeveralNames(griffe.Extension):
    """Keeps the names of such a line together in one row, with the type of the first."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a class or function."""
        if obj.docstring is not None and (obj.is_class or obj.is_function):
            obj.docstring.value = _SEVERAL.sub(lambda found: _row(obj, found), obj.docstring.value)


def _row(obj: griffe.Object, found: re.Match[str]) -> str:
    owner = obj.parameters if obj.is_function else obj.members
    annotation = getattr(owner[found[2]], "annotation", None) if found[2] in owner else None
    # A space would end the name.
    names = (found[2] + found[3]).replace(" ", "\u00a0")
    return f"{found[1]}{names} ({annotation or 'several'}): "
