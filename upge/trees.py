"""Configuration trees from outside: YAML texts and files, and how deep and how large they may become.

YAML's aliases and OmegaConf's references let a short text expand to gigabytes, and a deeply nested one exhausts the
stack of a recursive reader. Both are refused before anything is built.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from upge.errors import ConfigError

#: Limits: levels of a tree and of a chain of references, values with aliases expanded, characters with references
#: expanded, and bytes of a file.
DEEPEST, MOST_VALUES, LONGEST, LARGEST_FILE = 64, 100_000, 10_000_000, 1_000_000
#: ${KEY} or ${oc.select:KEY,DEFAULT}; ${oc.env:NAME,DEFAULT} or a path of upge; what begins any other reference.
_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?(\.*)([^{}$:,]*)(?:,[^{}$]*)?\}")
_VARIABLE = re.compile(r"\$\{(?:oc\.env|upge\.models):(\w+)[^{}$]*\}")
_OTHER = re.compile(r"(?<!\\)\$\{")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as nested dictionaries and lists, with references as text.

    Raises:
        ConfigError: it cannot be read, is not YAML, or expands to too much. The message begins with the file's name.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ConfigError(f"{path} has {size} bytes; a configuration has at most {LARGEST_FILE}")
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: it is not text in UTF-8") from error
    try:
        check_yaml(text)
        return plain(OmegaConf.load(io.StringIO(text)))
    except ConfigError as error:
        raise ConfigError(f"{path} {error.problem}") from error
    except Exception as error:  # of OmegaConf, of the YAML parser, and of Python for numbers of many digits
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason[:300] or type(error).__name__}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters; its type if it has no text."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:300]}..."


def check_yaml(text: str) -> None:
    """Count levels and values of a YAML text while it is parsed, without recursion and without expanding it.

    Text that is not YAML passes; the function that builds the tree reports it.

    Raises:
        ConfigError: it has too many; the message is a predicate such as "nests more than 64 levels".
    """
    anchors: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in _events(text):
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, 1))
            if len(open_nodes) > DEEPEST:
                raise ConfigError(f"nests more than {DEEPEST} levels; give a flatter one")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, anchors.get(str(anchor), 1)
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor is not None:
            anchors[anchor] = size
        above, count = open_nodes[-1]
        open_nodes[-1] = (above, count + size)
        if count + size > MOST_VALUES:
            raise ConfigError(f"has more than {MOST_VALUES} values, aliases expanded; give a smaller one")


def _events(text: str) -> Iterator[Any]:  # Any: PyYAML has no types
    try:
        yield from yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return


def plain(node: DictConfig | ListConfig, resolve: bool = False) -> Any:
    """An OmegaConf tree as nested dictionaries and lists; `resolve` replaces references by their values.

    Raises:
        ConfigError: the references expand to too much; the error's key is the setting.
        OmegaConfBaseException: a reference leads nowhere.
    """
    tree = OmegaConf.to_container(node, resolve=False)
    if resolve:
        _Expansion(tree).check()
        return OmegaConf.to_container(node, resolve=True)
    return tree


class _Expansion:
    """The characters of each node of a tree with references expanded, and the length of the longest chain of them."""

    def __init__(self, tree: Any) -> None:
        self._tree, self._known = tree, dict[tuple[str, ...], tuple[int, int]]()

    def check(self) -> None:
        """Raise ConfigError for a node with too much of either."""
        self._measure(self._tree, (), 0)

    def _measure(self, node: Any, path: tuple[str, ...], above: int) -> tuple[int, int]:
        """(characters, chain) of a node at the end of a chain of `above` references."""
        if isinstance(node, (Mapping, list)):
            inner = [self._measure(child, (*path, name), above) for name, child in _children(node).items()]
            return sum(size for size, _ in inner), max((chain for _, chain in inner), default=0)
        if not isinstance(node, str) or "${" not in node:
            return len(node) if isinstance(node, str) else 1, 0
        if _OTHER.search(_REFERENCE.sub("", _VARIABLE.sub("", node))):
            forms = "${KEY}, ${oc.select:KEY,DEFAULT} or ${oc.env:NAME}, without another one inside"
            raise ConfigError(f"found {node[:80]!r}; a reference has the form {forms}", ".".join(path))
        total, longest = len(node) + sum(len(os.environ.get(name, "")) for name in _VARIABLE.findall(node)), 0
        for dots, name in _REFERENCE.findall(node):
            base = path[: len(path) - len(dots)] if dots else ()
            size, chain = self._at((*base, *filter(None, re.split(r"[.\[\]]", name))), above + 1)
            total, longest = total + size, max(longest, chain + 1)
            if above + longest > DEEPEST:
                raise ConfigError(f"references follow each other more than {DEEPEST} times", ".".join(path))
            if total > LONGEST:
                problem = f"its references expand to more than {LONGEST} characters; shorten it"
                raise ConfigError(problem, ".".join(path))
        return total, longest

    def _at(self, path: tuple[str, ...], above: int) -> tuple[int, int]:
        if above > DEEPEST:
            raise ConfigError(f"references follow each other more than {DEEPEST} times", ".".join(path))
        if path not in self._known:
            self._known[path] = 0, 0  # of a reference to itself, which OmegaConf refuses
            node = self._tree
            for name in path:
                node = _children(node).get(name)
            self._known[path] = self._measure(node, path, above)
        return self._known[path]


def _children(node: Any) -> dict[str, Any]:
    """Name → child of a mapping or a list; nothing for any other value."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    return {str(name): child for name, child in items}
