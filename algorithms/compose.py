"""Building an `Algorithm`, or a `Pipeline` of several, from a configuration tree, with its corrections applied."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from upge.algorithm import Algorithm, InterleavedUpdate
from upge.checks import mismatch
from upge.corrections import Correction, NotApplicable
from upge.errors import ConfigError, nearest
from upge.gates import Gate
from upge.guidance import Guidance
from upge.instantiate import TARGET, build
from upge.pipeline import Pipeline, Stage
from upge.prompt_memory import PromptMemory
from upge.prompt_sampling import Curriculum, DynamicSampling
from upge.regularizers import Regularizer, ValueLoss
from upge.replay import Replay
from upge.term import Term
from upge.trees import first_line, plain

#: `name` is a key of inlined algorithms: `algorithms.inline` writes it.
_COMMON = {"name", "description"}
#: Keys that hold one part each, and its class.
_OPTIONAL: dict[str, Any] = {
    "critic": ValueLoss,
    "sampling": DynamicSampling | Curriculum,
    "guidance": Guidance,
    "memory": PromptMemory,
    "replay": Replay,
}
_KEYS = _COMMON | {"terms", "regularizers", "interleaved_update", "validation", *_OPTIONAL}
_PIPELINE_KEYS = _COMMON | {"stages"}
_TERM_KEYS = {"source", "gate", "estimator", "reduction", "coefficient", "support"}
_STAGE_KEYS = {"algorithm", "share", "lr_factor"}
_INTERLEAVED_TYPES = {
    "size": (int, "give the number of prompts per interleaved update, such as 128"),
    "own_optimizer": (bool, "give true or false"),
    "lr_factor": (float, "give a finite number, such as 1.0"),
}
_INTERLEAVED_KEYS = {"gate", "algorithm", *_INTERLEAVED_TYPES}
#: The key of the corrections in an algorithm's tree: name → a mapping with `_target_` and settings.
CORRECTION = "correction"
#: The sections whose entries users name. The names become parts of keys and of references.
_NAMED = ("terms", "regularizers", "stages", CORRECTION)
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def compose(node: DictConfig | Mapping[str, Any], name: str, path: str = "algo") -> Algorithm | Pipeline:
    """Build the `Algorithm` that a configuration describes, or the `Pipeline` if it has `stages`, with its corrections.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is impossible, or a correction does not apply. The
            message names the key or gives the reason.
    """
    check_names(plain(node) if isinstance(node, DictConfig) else dict(node), path)
    try:
        tree = plain(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        where = key if f"{key}.".startswith(f"{path}.") else f"{path}.{key}".rstrip(".")
        fix = "; give it a value of its own" if isinstance(error, InterpolationResolutionError) else ""
        raise ConfigError(f"{where}: {first_line(error)}{fix}") from error
    corrections = _mapping(tree, CORRECTION, path)
    rest = {key: value for key, value in tree.items() if key != CORRECTION}
    return _corrected(_plain(rest, name, path), corrections)


def _corrected(algorithm: Algorithm | Pipeline, corrections: Mapping[str, Any]) -> Algorithm | Pipeline:
    for key, node in corrections.items():
        correction = build(node, f"{CORRECTION}.{key}", Correction)
        try:
            corrected = correction(algorithm)
        except NotApplicable as error:
            raise ConfigError(f"{CORRECTION}: '{key}' cannot be applied to {algorithm.name}: {error.reason}") from error
        except ConfigError as error:
            raise error.under(f"{CORRECTION}.{key}") from error
        if not isinstance(corrected, type(algorithm)):
            raise ConfigError(
                f"{CORRECTION}.{key}: {type(correction).__name__} returned {corrected!r}; its `apply` must return the "
                "corrected algorithm"
            )
        algorithm = corrected
    return algorithm


def _plain(tree: dict[str, Any], name: str, path: str) -> Algorithm | Pipeline:
    """Build an algorithm or a pipeline from a tree without corrections."""
    if tree.get("stages") is None:
        return _algorithm(tree, name, path)
    if "terms" in tree:
        raise ConfigError(f"{path}: has both `terms` and `stages`; a pipeline's terms are those of its stages")
    _only(tree, _PIPELINE_KEYS, path)
    stages = {str(n): _stage(item, str(n), f"{path}.stages.{n}") for n, item in _mapping(tree, "stages", path).items()}
    return Pipeline(name=name, stages=stages, description=str(tree.get("description") or ""))


def _algorithm(tree: Any, name: str, path: str) -> Algorithm:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: found {tree!r}, expected an algorithm's name, or its tree with the key `terms`")
    if "stages" in tree and tree["stages"] is not None:
        raise ConfigError(f"{path}: '{tree.get('name', name)}' has stages of its own; name an algorithm with `terms`")
    _only(tree, _KEYS | {"stages"}, path)
    if not isinstance(tree.get("terms"), Mapping) or not tree["terms"]:
        raise ConfigError(
            f"{path}.terms: found {tree.get('terms')!r}; an algorithm is a sum of at least one named term"
        )
    terms = {str(n): _term(item, f"{path}.terms.{n}") for n, item in tree["terms"].items()}
    named = _mapping(tree, "regularizers", path)
    extra = {str(n): build(item, f"{path}.regularizers.{n}", Regularizer) for n, item in named.items()}
    optional: dict[str, Any] = {}
    for key, kind in _OPTIONAL.items():
        if tree.get(key) is not None:
            optional[key] = build(tree[key], f"{path}.{key}", kind)
    if tree.get("interleaved_update") is not None:
        optional["interleaved_update"] = _interleaved_update(tree["interleaved_update"], f"{path}.interleaved_update")
    if tree.get("validation") is not None:
        optional["validation"] = _nested(tree["validation"], "validation", f"{path}.validation")
    try:
        return Algorithm(name, terms, extra, str(tree.get("description") or ""), **optional)
    except ConfigError as error:
        raise error.under(path) from error


def _nested(tree: Any, fallback: str, path: str) -> Algorithm:
    """Build an algorithm inside another. Its name is that of its file, if it was read from one, else `fallback`."""
    name = tree.get("name") if isinstance(tree, Mapping) else None
    return _algorithm(tree, str(name or fallback), path)


def _stage(tree: Any, name: str, path: str) -> Stage:
    _fields(tree, _STAGE_KEYS, {"algorithm"}, path, "a stage")
    settings = {TARGET: "upge.Stage", **tree, "algorithm": _nested(tree["algorithm"], name, f"{path}.algorithm")}
    return build(settings, path, Stage)


def _interleaved_update(tree: Any, path: str) -> InterleavedUpdate:
    _fields(tree, _INTERLEAVED_KEYS, {"gate", "size", "algorithm"}, path, "an interleaved update")
    for key, (kind, fix) in _INTERLEAVED_TYPES.items():
        wrong = mismatch(tree[key], kind) if key in tree else None
        if wrong or key == "lr_factor" and not math.isfinite(tree.get(key, 1.0)):
            raise ConfigError(f"{path}.{key}: {wrong or f'found {tree[key]}'}; {fix}")
    gate = build(tree["gate"], f"{path}.gate", Gate)
    inner = _nested(tree["algorithm"], "interleaved_update", f"{path}.algorithm")
    return build({TARGET: "upge.InterleavedUpdate", **tree, "gate": gate, "algorithm": inner}, path, InterleavedUpdate)


def _term(tree: Any, path: str) -> Term:
    _fields(tree, _TERM_KEYS, _TERM_KEYS - {"coefficient", "support"}, path, "a term")
    estimator = tree["estimator"]
    if isinstance(estimator, Mapping):
        estimator = {TARGET: "upge.UnifiedGradient", **estimator}
    return build({TARGET: "upge.Term", **tree, "estimator": estimator}, path, Term)


def _fields(tree: Any, known: set[str], needed: set[str], path: str, what: str) -> None:
    """Check that `tree` is a mapping that has all keys in `needed` and no key outside `known`."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: found {tree!r}, expected a mapping with the keys {', '.join(sorted(known))}")
    _only(tree, known, path)
    missing = sorted(needed - set(tree))
    if missing:
        raise ConfigError(f"{path}.{missing[0]}: missing; {what} needs {', '.join(sorted(needed))}")


def _mapping(tree: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    value = tree.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}.{key}: found {value!r}, expected a mapping from names to {key}")
    return value


def _only(tree: Mapping[str, Any], known: set[str], path: str) -> None:
    for key in tree:
        if key in (CORRECTION, "corrected"):
            raise ConfigError(
                f"{path}.{key}: unknown key; corrections are chosen by correction=NAME, and their settings are "
                "correction.NAME.KEY=VALUE"
            )
        if key in ("teacher", "reference"):
            raise ConfigError(
                f"{path}.{key}: unknown key; a {key} is a setting of the run: give {key}.KEY=VALUE on the command line"
            )
        if key not in known:
            raise ConfigError(f"{path}.{key}: unknown key; {nearest(str(key), known - {'name'})}")


def algorithm_slots(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (mapping, key, path) for every key of an algorithm's tree that holds or names another algorithm."""
    if tree.get("validation") is not None:
        yield tree, "validation", "validation"
    interleaved_update, stages = tree.get("interleaved_update"), tree.get("stages")
    if isinstance(interleaved_update, dict) and interleaved_update.get("algorithm") is not None:
        yield interleaved_update, "algorithm", "interleaved_update.algorithm"
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict) and stage.get("algorithm") is not None:
            yield stage, "algorithm", f"stages.{name}.algorithm"


def check_names(tree: dict[str, Any], path: str) -> None:
    """Check the names of terms, regularizers, stages and corrections, and that no term is empty.

    Raises:
        ConfigError: a name cannot be part of a key, or a term is empty. The message names the key.
    """
    for section in _NAMED:
        named = tree.get(section)
        for name, value in named.items() if isinstance(named, dict) else ():
            if isinstance(name, bool):
                raise ConfigError(
                    f"{path}.{section}: found the name {name}, which is how YAML reads on, off, yes, no, true and "
                    "false; give another name, or write it in quotes"
                )
            if not _NAME.fullmatch(str(name)):
                raise ConfigError(
                    f"{path}.{section}: found the name '{name}', which cannot be part of a key; use letters, digits, _ "
                    "and -"
                )
            if section == "terms" and value is None:
                raise ConfigError(
                    f"{path}.terms.{name}: found None, expected a mapping with the keys coefficient, estimator, gate, "
                    f"reduction, source; to leave the term out, set {path}.terms.{name}.coefficient=0"
                )
    for owner, key, slot in algorithm_slots(tree):
        if isinstance(owner[key], dict):
            check_names(owner[key], f"{path}.{slot}")


__all__ = ["CORRECTION", "algorithm_slots", "check_names", "compose"]
