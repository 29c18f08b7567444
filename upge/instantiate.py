"""Building objects from configuration nodes: the only place where a string becomes a class.

A mapping with `_target_: package.module.Name` becomes a call of that name, with the mapping's other keys as arguments,
which are built first. `_target_` takes any importable path, so a class in a user's own file needs no registration.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf

from upge.checks import field_types, mismatch
from upge.errors import ConfigError, UserError, nearest

TARGET = "_target_"
#: Old → new names of renamed classes. A file that uses an old name gets an error with the new one.
RENAMED = {
    "upge.Always": "upge.ConstantGate",
    "upge.Interlude": "upge.InterleavedUpdate",
    "upge.ClippedFrozenPolicy": "upge.ClippedReferencePolicy",
    "upge.SequenceFrozenPolicy": "upge.SequenceReferencePolicy",
}


def build(node: Any, path: str, expected: type | None = None) -> Any:
    """Build the object that `node` describes.

    Args:
        node: a value, list, mapping or OmegaConf container; a mapping with `_target_` becomes an object.
        path: the node's key, for messages, for example `algo.terms.rl`.
        expected: the class that the result must be an instance of.

    Raises:
        ConfigError: the object cannot be built; the message names the key, the value and the fix.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, Mapping) and TARGET in node:
        value = _call(node, path)
    elif isinstance(node, Mapping):
        value = {key: build(item, f"{path}.{key}") for key, item in node.items()}
    elif isinstance(node, list):
        value = tuple(build(item, f"{path}.{i}") for i, item in enumerate(node))
    else:
        value = node
    if expected is not None and not isinstance(value, expected):
        raise ConfigError(
            f"{path}: found {_short(value)}, expected {_article(expected)}; give a mapping with `{TARGET}` naming one"
        )
    return value


def locate(name: Any, path: str) -> Any:
    """Import the class or function with the dotted path `name`.

    Raises:
        ConfigError: the module or the name in it does not exist; the message gives the nearest existing name.
    """
    if not isinstance(name, str) or not all(name.split(".")) or "." not in name:
        raise ConfigError(f"{path}: found {name!r}, expected a dotted path such as upge.NoMask or my_file.MyMask")
    module_name, _, attribute = name.rpartition(".")
    # The module is of no importance: upge.gates.Always is upge.Always.
    if name.startswith("upge.") and (new := RENAMED.get(f"upge.{attribute}")):
        raise ConfigError(f"{path}: '{name}' was renamed; write {new}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's file may fail in any way
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{path}: no module '{module_name}' to import '{name}' from; a file of your own must be in the working "
                "directory or on PYTHONPATH"
            ) from error
        raise ConfigError(
            f"{path}: importing {module_name} failed: {type(error).__name__}: {error}{_line(error)}; fix that file"
        ) from error
    if not hasattr(module, attribute):
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
        public = getattr(module, "__all__", None) or [n for n in own if not n.startswith("_")]
        raise ConfigError(f"{path}: '{module_name}' has no '{attribute}'; {nearest(attribute, public)}")
    return getattr(module, attribute)


def _line(error: Exception) -> str:
    """File and line of a failed import, for errors that do not state them."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or isinstance(error, SyntaxError):
        return ""
    return f" ({place.tb_frame.f_code.co_filename}, line {place.tb_lineno})"


def _call(node: Mapping[str, Any], path: str) -> Any:
    target = locate(node[TARGET], f"{path}.{TARGET}")
    if not callable(target):
        raise ConfigError(f"{path}.{TARGET}: {node[TARGET]} is {_short(target)}, not a class or function")
    arguments = {k: build(v, f"{path}.{k}") for k, v in node.items() if k != TARGET}
    _check_keys(target, arguments, node[TARGET], path)
    types = field_types(target) if isinstance(target, type) else {}
    for key, value in arguments.items():
        wrong = mismatch(value, types.get(key, Any))
        if wrong:
            raise ConfigError(f"{path}.{key}: {wrong}{_slot_hint(types[key])}")
    try:
        return target(**arguments)
    except UserError as error:
        raise error.under(path) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {node[TARGET]} refused its settings: {error}") from error


def _check_keys(target: Any, arguments: Mapping[str, Any], name: str, path: str) -> None:
    if not dataclasses.is_dataclass(target) and target.__init__ is object.__init__:
        parameters: dict[str, inspect.Parameter] = {}
    else:
        parameters = dict(inspect.signature(cast("Callable[..., Any]", target)).parameters)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in arguments:
        if key not in parameters:
            known = f"; {name} has no settings" if not parameters else f"; {nearest(key, parameters)}"
            raise ConfigError(f"{path}.{key}: {name} has no setting '{key}'{known}")
    for key, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        if needed and key not in arguments:
            raise ConfigError(f"{path}.{key}: missing; {name} needs it")


def _slot_hint(annotation: Any) -> str:
    """How to write a part, for a setting that takes one."""
    if isinstance(annotation, type) and inspect.isabstract(annotation):
        return f"; give a mapping with `{TARGET}` naming {_article(annotation)}"
    return ""


def _article(cls: type) -> str:
    name = (get_origin(cls) or cls).__name__ if not get_args(cls) else str(cls)
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _short(value: Any) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})"
