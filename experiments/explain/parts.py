"""What a key of an algorithm or of a correction means, from the docstring of the class that it belongs to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from upge import Algorithm, InterleavedUpdate, Pipeline, Stage, Term, UnifiedGradient
from upge.checks import field_types
from upge.errors import UserError
from upge.instantiate import TARGET, locate

#: The class of the mapping below a key of this name, where the file names none; and of each entry below one.
_BELOW = {"estimator": UnifiedGradient, "interleaved_update": InterleavedUpdate}
_BELOW |= dict.fromkeys(("algorithm", "validation"), Algorithm)
_ENTRIES = {"terms": Term, "stages": Stage}


@dataclass(frozen=True)
class Owner:
    """The class that a key belongs to.

    Attributes:
        setting: the field of the class; empty if the key is the whole part.
        title: the class as the file names it.
    """

    cls: Any
    setting: str
    title: str

    @property
    def kind(self) -> str:
        """The annotated type of the setting; empty if it is unknown."""
        kind = field_types(self.cls).get(self.setting) if is_dataclass(self.cls) else None
        if get_origin(kind) is Literal:
            return " or ".join(map(str, get_args(kind)))
        return "" if kind is None else re.sub(r"\w+\.", "", str(kind) if get_args(kind) else kind.__name__)

    @property
    def default(self) -> Any:
        """The class's default of the setting; MISSING if there is none."""
        known = {one.name: one.default for one in fields(self.cls)} if is_dataclass(self.cls) else {}
        return known.get(self.setting, MISSING)

    def meaning(self) -> str:
        """The entry of the setting in the class's docstring, or in a base's; empty if there is none."""
        for cls in inspect.getmro(self.cls) if isinstance(self.cls, type) else (self.cls,):
            entry = attribute(inspect.cleandoc(cls.__doc__ or ""), self.setting)
            if entry:
                return entry
        return ""

    def docs(self) -> str:
        """The docstring of the class without its list of settings."""
        text = inspect.cleandoc(self.cls.__doc__ or "")
        return re.split(r"\n\n(?:Attributes|Args|Raises|Returns):\n", text)[0].strip()


def attribute(text: str, name: str) -> str:
    """The entry of a setting in the sections `Attributes` and `Args` of a docstring, as one line."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        found = re.match(r"(\s+)(\w+(?:, \w+)*)(?: \([^)]*\))?: (.*)", line)
        if found and name in found[2].split(", "):
            more = []
            for after in lines[number + 1 :]:
                if len(after) - len(after.lstrip()) <= len(found[1]):
                    break
                more.append(after.strip())
            return " ".join([found[3], *more])
    return ""


def owner(tree: Mapping[str, Any], names: Sequence[str]) -> Owner | None:
    """The class that the key `names` of an algorithm's or a correction's tree belongs to; None if it has none."""
    best: Owner | None = None
    node: Any = tree
    for depth in range(len(names) + 1):
        cls = _class(node, names[:depth])
        if cls is not None:
            target = node.get(TARGET) if isinstance(node, Mapping) else None
            best = Owner(cls, names[depth] if depth < len(names) else "", target or f"upge.{cls.__name__}")
        if depth < len(names):
            node = _below(node, names[depth])
    return best


def _below(node: Any, name: str) -> Any:
    """The entry of a mapping or of a list of parts; None if there is none."""
    if isinstance(node, Mapping):
        return node.get(name)
    is_entry = isinstance(node, list) and name.isdigit() and int(name) < len(node)
    return node[int(name)] if is_entry else None


def _class(node: Any, names: Sequence[str]) -> Any:
    if isinstance(node, Mapping) and TARGET in node:
        try:
            return locate(node[TARGET], ".".join(names))
        except UserError:
            return None
    if not names:
        return Pipeline if isinstance(node, Mapping) and node.get("stages") else Algorithm
    if len(names) > 1 and names[-2] in _ENTRIES:
        return _ENTRIES[names[-2]]
    return _BELOW.get(names[-1]) if isinstance(node, Mapping) else None
