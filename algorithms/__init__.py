"""The algorithms, a YAML file each: a file says everything that differs from another's, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from upge.algorithm import Algorithm, Term
from upge.errors import ConfigError, nearest
from upge.instantiate import TARGET, build
from upge.regularizers import Regularizer

FOLDER = Path(__file__).parent
_TERM_KEYS = {"source", "gate", "estimator", "reduction", "coefficient"}
_KEYS = {"description", "terms", "regularizers"}
#: Keys below which an override may add something although the file does not have them.
_OPEN = {"regularizers"}


def names() -> list[str]:
    """The algorithms that have a file here."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> DictConfig:
    """The configuration of an algorithm, by name or by the path of a YAML file.

    Raises:
        ConfigError: no such algorithm or file, or not YAML.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file() and path.parent != FOLDER:
        raise ConfigError(f"algo: there is no file {path}; give the path of a YAML file or one of {', '.join(names())}")
    if not path.is_file():
        raise ConfigError(
            f"algo: no algorithm '{name}'; {nearest(str(name), names())} (or give the path of a YAML file)"
        )
    try:
        node = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"algo: {path} is not valid YAML: {error}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"algo: {path} holds no mapping; it must have the key `terms`")
    return node


def override(node: DictConfig, overrides: Sequence[str], path: str = "algo") -> DictConfig:
    """`node` with dot-list overrides such as `terms.rl.estimator.mask.high=0.28`.

    A mapping that has `_target_` replaces the whole node, settings included. A key may be new only where a user names
    things: a term, a regularizer, a setting of a part (which the part then checks).
    """
    result = OmegaConf.create(OmegaConf.to_container(node, resolve=False))
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{path}: override {item!r} is not of the form key=value")
        value = _value(text, f"{path}.{key}")
        try:
            parent = key.rpartition(".")[0]
            if parent and parent not in _OPEN and OmegaConf.select(result, parent) is None:
                known = _paths(OmegaConf.to_container(result))
                raise ConfigError(f"{path}.{key}: there is no '{parent}'; {nearest(key, known)}")
            _check_target(result, key, value, path)
            OmegaConf.update(result, key, value, merge=False, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}.{key}: {str(error).splitlines()[0]}") from error
    return result


def _check_target(tree: DictConfig, key: str, value: Any, path: str) -> None:
    """Refuses another `_target_` for a part that has settings: they would silently become those of the new one."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(tree, parent) if parent and last == TARGET else None
    if not isinstance(node, DictConfig) or node.get(TARGET) in (None, value):
        return
    settings = sorted(str(k) for k in node if k != TARGET)
    if settings:
        raise ConfigError(
            f"{path}.{key}: {value} instead of {node[TARGET]} would keep its settings ({', '.join(settings)}); "
            f"replace the whole part: {path}.{parent}={{{TARGET}: {value}, ...}}"
        )


def _value(text: str, path: str) -> Any:
    """What stands right of an override's =. An interpolation stays one: it must follow the run that the algorithm
    becomes a part of."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except Exception as error:  # OmegaConf's errors and those of the YAML parser behind it
        raise ConfigError(f"{path}: found {text!r}, which is not YAML: {str(error).splitlines()[0]}") from error


def compose(node: DictConfig | Mapping[str, Any], name: str, path: str = "algo") -> Algorithm:
    """The `Algorithm` that a configuration describes.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value, by its key.
    """
    try:
        tree = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        where = key if f"{key}.".startswith(f"{path}.") else f"{path}.{key}".rstrip(".")
        fix = "; give it a value of its own" if isinstance(error, InterpolationResolutionError) else ""
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}{fix}") from error
    _only(tree, _KEYS, path)
    if not isinstance(tree.get("terms"), Mapping) or not tree["terms"]:
        raise ConfigError(
            f"{path}.terms: found {tree.get('terms')!r}; an algorithm is a sum of at least one named term"
        )
    terms = {n: _term(item, f"{path}.terms.{n}") for n, item in tree["terms"].items()}
    named = tree.get("regularizers") or {}
    if not isinstance(named, Mapping):
        raise ConfigError(f"{path}.regularizers: found {named!r}, expected a mapping from names to regularizers")
    extra = {n: build(item, f"{path}.regularizers.{n}", Regularizer) for n, item in named.items()}
    return Algorithm(name=name, terms=terms, regularizers=extra, description=str(tree.get("description") or ""))


def load(name: str, overrides: Sequence[str] = ()) -> Algorithm:
    """The algorithm `name` (or the path of a YAML file) with dot-list overrides.

    >>> load("grpo", ["terms.rl.estimator.mask.high=0.28"]).terms["rl"].estimator.mask.high
    0.28
    """
    return compose(override(read(name), overrides), Path(name).stem if str(name).endswith(("yaml", "yml")) else name)


def _term(tree: Any, path: str) -> Term:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: found {tree!r}, expected a mapping with the keys {', '.join(sorted(_TERM_KEYS))}")
    _only(tree, _TERM_KEYS, path)
    missing = _TERM_KEYS - {"coefficient"} - set(tree)
    if missing:
        raise ConfigError(
            f"{path}.{sorted(missing)[0]}: missing; a term needs {', '.join(sorted(_TERM_KEYS - {'coefficient'}))}"
        )
    estimator = tree["estimator"]
    if isinstance(estimator, Mapping):
        estimator = {TARGET: "upge.UnifiedGradient", **estimator}
    return build({TARGET: "upge.Term", **tree, "estimator": estimator}, path, Term)


def _only(tree: Mapping[str, Any], known: set[str], path: str) -> None:
    for key in tree:
        if key not in known:
            raise ConfigError(f"{path}.{key}: unknown key; {nearest(str(key), known)}")


def _paths(tree: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a tree."""
    if not isinstance(tree, Mapping):
        return [prefix] if prefix else []
    found = [prefix] if prefix else []
    for key, item in tree.items():
        found += _paths(item, f"{prefix}.{key}" if prefix else str(key))
    return found


__all__ = ["compose", "load", "names", "override", "read"]
