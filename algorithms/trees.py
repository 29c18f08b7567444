"""Trees of plain mappings and lists, as YAML files give them: places in them, and what stands there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from upge.errors import ConfigError
from upge.instantiate import TARGET, locate

#: In a correction's template: the part that was there.
INNER = "INNER"
#: Keys and list positions from the root down.
Path = tuple[Any, ...]


def keys_of(dotted: str) -> Path:
    """The keys of `a.b[0].c`, as an override or a reference writes them."""
    return tuple(key for key in re.split(r"[.\[\]]+", dotted) if key)


def dotted(where: Path) -> str:
    """The place as an override writes it."""
    return ".".join(map(str, where))


def starts(where: Path, prefix: Path) -> bool:
    """True if `where` is `prefix` or a place inside it."""
    return tuple(map(str, where[: len(prefix)])) == tuple(map(str, prefix))


def at(tree: Any, where: Path) -> Any:
    """What stands at a place; None where there is nothing."""
    for key in where:
        if isinstance(tree, list):
            tree = tree[int(key)] if str(key).isdigit() and int(key) < len(tree) else None
        else:
            tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def leaves(tree: Any, above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(place, value) of everything in a tree that is no mapping and no list."""
    if not isinstance(tree, (dict, list)):
        yield above, tree
    for key, value in _children(tree):
        yield from leaves(value, (*above, key))


def nodes(tree: Any, above: Path = ()) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """(place, mapping) of every mapping in a tree, the tree itself first."""
    if isinstance(tree, dict):
        yield above, tree
    for key, value in _children(tree):
        yield from nodes(value, (*above, key))


def hole_of(template: Any) -> Path:
    """Where in a correction's template INNER stands."""
    (hole,) = (where for where, value in leaves(template) if value == INNER)
    return hole


def parts(tree: Any) -> Iterator[tuple[Path, Any]]:
    """(place, class) of every part of a tree whose class can be found; what cannot is reported when it is built."""
    for where, node in nodes(tree):
        with contextlib.suppress(ConfigError):
            if TARGET in node:
                yield where, locate(node[TARGET], "")


def columns(tree: Any) -> set[str]:
    """The columns that the parts in a tree say they read; a part that follows another one's reference has none."""
    return set().union(*(getattr(cls, "reads", ()) for _, cls in parts(tree)))


def learning(algorithm: dict[str, Any]) -> list[str]:
    """The terms of an algorithm's tree that learn from rollouts."""
    return [n for n, term in terms(algorithm).items() if term.get("source") == "rollouts"]


def terms(algorithm: Any) -> dict[Any, dict[str, Any]]:
    """The terms of an algorithm's tree; what is no mapping is reported when it is built."""
    found = at(algorithm, ("terms",))
    return {n: t for n, t in found.items() if isinstance(t, dict)} if isinstance(found, dict) else {}


def stages(tree: dict[str, Any]) -> list[Path]:
    """Where a pipeline's algorithms stand; of an algorithm, its root."""
    found = tree.get("stages")
    if not isinstance(found, dict):
        return [()]
    return [("stages", n, "algorithm") for n in found if isinstance(at(found, (n, "algorithm")), dict)]


def _children(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, list):
        yield from enumerate(tree)
