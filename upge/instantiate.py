"""Building objects from configuration nodes: the only place where a string becomes a class.

A mapping with `_target_: package.module.Name` becomes a call of that name, with the mapping's other keys as arguments,
which are built first. `_target_` takes any class of upge and of a user's own files, which needs no registration.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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


def build(node: Any, path: str, expected: Any = None) -> Any:
    """Build the object that `node` describes.

    What a `_target_` names is checked before it is called. It must be a class of the expected kind, or a function whose
    return annotation is one, and come from upge or from a file of the user's own.

    Args:
        node: a value, list, mapping or OmegaConf container; a mapping with `_target_` becomes an object.
        path: the node's key, for messages, for example `algo.terms.rl`.
        expected: the class that the result must be an instance of, or a union of classes; None = any object.

    Raises:
        ConfigError: the object cannot be built; the message names the key, the value and the fix.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=True)
    value = _built(node, path, Any if expected is None else expected)
    if expected is not None and not isinstance(value, expected):
        raise ConfigError(
            f"{path}: found {_short(value)}, expected {_article(expected)}; give a mapping with `{TARGET}` naming one"
        )
    return value


def _built(node: Any, path: str, annotation: Any) -> Any:
    """The value of a node for a setting with this annotation."""
    if isinstance(node, Mapping) and TARGET in node:
        return _call(node, path, annotation)
    if isinstance(node, Mapping):
        inner = _inner_type(annotation, (dict, Mapping), -1)
        return {key: _built(item, f"{path}.{key}", inner) for key, item in node.items()}
    if isinstance(node, list):
        inner = _inner_type(annotation, (tuple, list, Sequence), 0)
        return tuple(_built(item, f"{path}.{i}", inner) for i, item in enumerate(node))
    return node


def _inner_type(annotation: Any, containers: tuple[type, ...], place: int) -> Any:
    """The annotation of the items of a container; Any if `annotation` says nothing about them."""
    kinds = [kind for kind in _members(annotation) if get_origin(kind) in containers]
    return get_args(kinds[0])[place] if kinds else Any


def locate(name: Any, path: str) -> Any:
    """Import the class or function with the dotted path `name`.

    Raises:
        ConfigError: the module or the name in it does not exist; the message gives the nearest existing name.
    """
    if not isinstance(name, str) or not all(name.split(".")) or "." not in name:
        raise ConfigError(f"{path}: found {name!r}, expected a dotted path such as upge.NoMask or my_file.MyMask")
    module_name, _, attribute = name.rpartition(".")
    _check_origin(module_name.partition(".")[0], name, path)
    # Any module of upge: upge.gates.Always is upge.Always.
    if name.startswith("upge.") and (new := RENAMED.get(f"upge.{attribute}")):
        raise ConfigError(f"{path}: '{name}' was renamed; write {new}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's file may fail in any way
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
    found = getattr(module, attribute)
    _check_origin(str(getattr(found, "__module__", None) or module_name).partition(".")[0], name, path)
    return found


def _check_origin(package: str, name: str, path: str) -> None:
    """Refuse a package that is neither upge's nor the user's own, before anything of it is imported or called.

    Raises:
        ConfigError: it is a part of Python or an installed package.
    """
    if package in ("upge", "algorithms", "__main__"):
        return
    module = sys.modules.get(package)
    spec = importlib.util.find_spec(package) if module is None else getattr(module, "__spec__", None)
    if spec is None:  # made in memory; or it does not exist, which the import reports
        return
    places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())
    if not places or any(_is_installed(Path(place).resolve()) for place in places):
        raise ConfigError(
            f"{path}: '{name}' belongs to {package}, which is a part of Python or an installed package; name a class "
            "of upge, or of a file of your own in the working directory or on PYTHONPATH"
        )


def _is_installed(place: Path) -> bool:
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return place.is_relative_to(library) or not {"site-packages", "dist-packages"}.isdisjoint(place.parts)


def _line(error: BaseException) -> str:
    """File and line of a failed import, for errors that do not state them."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or isinstance(error, SyntaxError):
        return ""
    return f" ({place.tb_frame.f_code.co_filename}, line {place.tb_lineno})"


def _call(node: Mapping[str, Any], path: str, annotation: Any) -> Any:
    target = locate(node[TARGET], f"{path}.{TARGET}")
    if not callable(target):
        raise ConfigError(f"{path}.{TARGET}: {node[TARGET]} is {_short(target)}, not a class or function")
    _check_kind(target, annotation, f"{path}.{TARGET}", node[TARGET])
    if missing := sorted(getattr(target, "__abstractmethods__", ())):
        raise ConfigError(
            f"{path}.{TARGET}: {node[TARGET]} is abstract, it lacks {', '.join(missing)}; give a class with "
            f"{'this method' if len(missing) == 1 else 'these methods'}, for example a subclass of it"
        )
    _check_keys(target, [key for key in node if key != TARGET], node[TARGET], path)
    fields = field_types(target) if isinstance(target, type) else {}
    arguments = {k: _built(v, f"{path}.{k}", fields.get(k, Any)) for k, v in node.items() if k != TARGET}
    for key, value in arguments.items():
        wrong = mismatch(value, fields.get(key, Any))
        if wrong:
            raise ConfigError(f"{path}.{key}: {wrong}{_slot_hint(fields[key])}")
    try:
        return target(**arguments)
    except UserError as error:
        raise error.under(path) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {node[TARGET]} refused its settings: {error}") from error


def _check_kind(target: Any, annotation: Any, path: str, name: str) -> None:
    """Refuse a class, or a function by its return annotation, that cannot give what `annotation` asks for."""
    kinds = [kind for kind in _members(annotation) if kind is not type(None)]
    if Any in kinds:
        # Nothing says what a user's part expects here. upge's functions do more than make parts.
        if isinstance(target, type) or str(target.__module__).partition(".")[0] != "upge":
            return
        raise ConfigError(f"{path}: {name} is a function of upge and makes no part; name a class")
    given = target
    if not isinstance(target, type):
        try:
            given = typing.get_type_hints(target).get("return")
        except (NameError, AttributeError, TypeError):
            given = None
    if isinstance(given, type) and any(isinstance(kind, type) and issubclass(given, kind) for kind in kinds):
        return
    what = f"is the class {target.__name__}" if isinstance(target, type) else f"returns {_name(given)}"
    problem = f"{name} {what}, expected {_article(annotation)}"
    fix = "" if given is not None else "; write the class that it returns as its return annotation (-> CLASS)"
    raise ConfigError(f"{path}: {problem}{fix}")


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; any other annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)


def _check_keys(target: Any, given: Sequence[str], name: str, path: str) -> None:
    if not dataclasses.is_dataclass(target) and target.__init__ is object.__init__:
        parameters: dict[str, inspect.Parameter] = {}
    else:
        parameters = dict(inspect.signature(cast("Callable[..., Any]", target)).parameters)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in given:
        if key not in parameters:
            known = f"; {name} has no settings" if not parameters else f"; {nearest(key, parameters)}"
            raise ConfigError(f"{path}.{key}: {name} has no setting '{key}'{known}")
    for key, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        if needed and key not in given:
            raise ConfigError(f"{path}.{key}: missing; {name} needs it")


def _slot_hint(annotation: Any) -> str:
    """How to write a part, for a setting that takes one."""
    if isinstance(annotation, type) and inspect.isabstract(annotation):
        return f"; give a mapping with `{TARGET}` naming {_article(annotation)}"
    return ""


def _article(annotation: Any) -> str:
    name = " or ".join(_name(kind) for kind in _members(annotation))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _name(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return "nothing that is annotated" if annotation is None else str(annotation).replace("typing.", "")


def _short(value: Any) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})"
