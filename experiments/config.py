"""A run's configuration: defaults, presets by name, and the command line's key=value list, in that order.

A recipe is a YAML file of names (`algo`, `model`, `data`, `correction`) and of keys of a run, nested or dotted, such as
`model.opening`, which take precedence over those of the presets that it names. Two keys exist only in recipes: `base`
names one or several recipes, or files of configs/recipe/base, whose keys it changes; `overrides` lists strings such as
terms.rl.coefficient=8, which are applied after those of the bases, as algo.KEY=VALUE on the command line would be.
Settings of a correction, such as correction.tis.cap=3, also go into `overrides`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import algorithms
from experiments import hints
from upge.algorithm import Algorithm
from upge.components import RatioSign
from upge.components.base import walk
from upge.config import RENAMED_KEYS, defaults, from_tree, parse, settings, split
from upge.errors import ConfigError, Problems, nearest
from upge.evaluation.suite import BenchmarkConfig, SuiteConfig
from upge.instantiate import TARGET
from upge.pipeline import Pipeline
from upge.train.config import RunConfig
from upge.trees import first_line, plain, read_yaml

CONFIGS = Path(__file__).parent / "configs"
MODELS = Path(__file__).parent / "models"
#: Keys whose value is a name that selects a file, with their defaults. `correction` also takes a list of names.
GROUPS = {"recipe": None, "algo": "hpt", "correction": None, "model": "tiny", "data": "arithmetic"}
#: Keys of data sets below which the user chooses the names. A recipe's entries replace the preset's examples, as those
#: of the command line do.
NAMED = {"sets", "weights", "tasks"}
# ${upge.models:NAME} in a preset is the folder of a model that ships with the repository.
OmegaConf.register_resolver("upge.models", lambda name: str(MODELS / name), replace=True)


@dataclass(frozen=True)
class Composed:
    """A checked configuration.

    Attributes:
        names: which algorithm, corrections (separated by commas), model, data set and recipe were selected.
        tree: everything resolved, as written to config.yaml.
        config: the same as objects, without the algorithm's and the data set's own keys.
        algorithm: built from `tree["algo"]`.
        notes: sentences for the user on what the command line's overrides have split, and on terms without an effect.
        layers: (origin, dotted key → value) of everything that `tree` is made of. Later layers override earlier ones.
    """

    names: Mapping[str, str | None]
    tree: dict[str, Any]
    config: RunConfig
    algorithm: Algorithm | Pipeline
    notes: tuple[str, ...] = ()
    layers: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A recipe's file merged over its bases.

    Attributes:
        tree: keys of a run, nested.
        overrides: overrides of the algorithm, those of the bases first.
    """

    names: dict[str, Any] = field(default_factory=dict)
    tree: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


def presets(group: str) -> list[str]:
    """Names that a group key accepts."""
    if group in ("algo", "correction"):
        return algorithms.names() if group == "algo" else algorithms.corrections()
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def compose(arguments: Sequence[str]) -> Composed:
    """The configuration of a command line.

    Raises:
        ConfigError: an unknown key, name or value, by its key.
    """
    dashed = [argument for argument in arguments if argument.startswith("--")]
    if dashed:
        raise ConfigError(hints.flag(dashed[0], {*known_keys(), *GROUPS}))
    items = [split(argument) for argument in arguments]
    chosen: dict[str, str] = {}
    for key, value in items:
        if key in GROUPS and key in chosen:
            several = f"; give correction=[{chosen[key]},{value}]" if key == "correction" else ""
            raise ConfigError(f"{key}: given twice ({chosen[key]}, {value}){several}")
        if key in ("algo", "model", "data") and not value:
            raise ConfigError(f"{key}: empty; give a name, or leave it out for {key}={GROUPS[key]}")
        if key in GROUPS:
            chosen[key] = value
    recipe = read_recipe(chosen["recipe"]) if chosen.get("recipe") else Recipe()
    names = {group: chosen.get(group) or recipe.names.get(group, default) for group, default in GROUPS.items()}
    # An empty `correction=` on the command line removes the recipe's corrections.
    corrections = correction_names(chosen.get("correction", names["correction"]))
    names["correction"] = ",".join(corrections) or None
    tree = OmegaConf.create(defaults(RunConfig))
    tree.algo = algorithms.read(names["algo"], corrections)
    presets_used = [(f"{group}={names[group]}", _named(group, names[group])) for group in ("model", "data")]
    presets_used.append((f"recipe={names['recipe']}", recipe.tree))
    layers = [*_layers_of_algorithm(tree.algo, names), *((origin, _flat(part)) for origin, part in presets_used)]
    overrides = (text if text.startswith("correction.") else f"algo.{text}" for text in recipe.overrides)
    layers.append((f"recipe={names['recipe']}", dict(map(split, overrides))))
    layers.append(("the command line", {key: value for key, value in items if key not in GROUPS}))
    for origin, part in presets_used:
        tree = _merge(tree, part, origin)
    for key in NAMED & set(recipe.tree.get("data", {})):
        OmegaConf.update(tree, f"data.{key}", recipe.tree["data"][key], merge=False, force_add=True)
    tree, notes = _with_arguments(tree, items, names, recipe)
    try:
        whole = plain(tree, resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise ConfigError(f"{key}: {first_line(error)}; give it a value of its own") from error
    config = from_tree(RunConfig, whole)
    algorithm = algorithms.compose(whole["algo"], algorithms.stem(names["algo"]))
    notes = (*notes, *_idle_penalties(algorithm, config), *_noise(algorithm, config))
    return Composed(names, whole, config, algorithm, notes, (("the default", dict(_defaults())), *layers))


def _with_arguments(
    tree: DictConfig, items: Sequence[tuple[str, str]], names: Mapping[str, str | None], recipe: Recipe
) -> tuple[DictConfig, tuple[str, ...]]:
    """The configuration with the recipe's overrides and the command line's settings, and notes on what these split."""
    problems, overrides = Problems(), []
    for key, value in items:
        with problems:
            _refuse_choice(key)
            if key != "algo." and key.startswith(("algo.", "correction.")):
                overrides.append(f"{key.removeprefix('algo.')}={value}")
            elif key not in GROUPS:
                tree = _set(tree, key, value)
    notes: tuple[str, ...] = ()
    with problems:
        tree.algo, notes = _overridden(tree.algo, names, recipe.overrides, overrides)
    problems.raise_any()
    return tree, notes


def _refuse_choice(key: str) -> None:
    """Refuse the keys of an algorithm's tree that only algo=NAME and correction=NAME set."""
    if key == "algo.name" or key.startswith("algo.correction."):
        fix = "an algorithm is chosen by algo=NAME" if key == "algo.name" else f"write {key.removeprefix('algo.')}"
        raise ConfigError(f"{key}: is not a setting of the algorithm; {fix}")


def _defaults() -> Iterator[tuple[str, Any]]:
    return ((one.name, one.default) for one in settings(RunConfig) if one.name not in GROUPS)


def _layers_of_algorithm(node: DictConfig, names: Mapping[str, str | None]) -> list[tuple[str, dict[str, Any]]]:
    """The settings of the algorithm's file and of each correction's, with references as in the file."""
    tree = plain(node)
    corrections = tree.pop(algorithms.CORRECTION, {})
    own = {name: _flat({algorithms.CORRECTION: {name: part}}) for name, part in corrections.items()}
    return [
        (f"algo={names['algo']}", _flat({"algo": tree})),
        *((f"correction={name}", one) for name, one in own.items()),
    ]


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of every leaf."""
    return {".".join(map(str, where)): value for where, value in algorithms.leaves(tree)}


def _noise(algorithm: Algorithm | Pipeline, config: RunConfig) -> Iterator[str]:
    """A sentence on the noise of the sampler, if there is any."""
    if config.rollout.noise.is_on:
        without = "rollout.noise has no effect: the algorithm has no rollouts"
        yield config.rollout.noise.describe() if algorithm.needs.rollouts else without


def _idle_penalties(algorithm: Algorithm | Pipeline, config: RunConfig) -> Iterator[str]:
    """A sentence on each term that penalizes a change of the policy which a single update per step never sees."""
    if config.optimizer.mini_batches * config.optimizer.epochs > 1:
        return
    for stage, one in Pipeline.of(algorithm).stages.items():
        path = f"algo.stages.{stage}.algorithm" if isinstance(algorithm, Pipeline) else "algo"
        for name, term in one.algorithm.terms.items():
            if any(isinstance(part, RatioSign) for _, part in walk(term.estimator.advantage, "advantage")):
                yield (
                    f"{path}.terms.{name} has no effect: it penalizes changes since the start of the step, and a step "
                    "has a single update; set optimizer.mini_batches or optimizer.epochs to 2 or more"
                )


def read_recipe(name: str, above: tuple[str, ...] = ()) -> Recipe:
    """Read the recipe of this name; `above` are the recipes that it is the base of.

    Raises:
        ConfigError: there is no such recipe, its bases lead back to it, or `overrides` is not a list of strings.
    """
    if name in above:
        raise ConfigError(f"recipe={above[0]}: base: {' → '.join([*above, name])} leads back to itself")
    is_base = bool(above) and name not in presets("recipe")
    own = dict(_preset("recipe/base" if is_base else "recipe", name))
    bases, texts = own.pop("base", None) or [], own.pop("overrides", None) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"recipe={name}: overrides: found {texts!r}; give a list of texts such as terms.KEY=VALUE")
    names: dict[str, Any] = {}
    tree, overrides = OmegaConf.create({}), []
    for base in bases if isinstance(bases, list) else [bases]:
        below = read_recipe(str(base), (*above, name))
        names |= below.names
        tree, overrides = OmegaConf.merge(tree, below.tree), [*overrides, *below.overrides]
    for key, value in own.items():
        if key in GROUPS and not isinstance(value, dict):
            names[key] = value
        else:
            OmegaConf.update(tree, key, value, merge=True, force_add=True)
    return Recipe(names, OmegaConf.to_container(tree), (*overrides, *texts))


def _overridden(
    node: DictConfig, names: Mapping[str, str | None], given: Sequence[str], overrides: Sequence[str]
) -> tuple[DictConfig, tuple[str, ...]]:
    """The algorithm with a recipe's overrides, then those of the command line, and notes on what the latter split."""
    try:
        preset = algorithms.override(node, given)
    except ConfigError as error:
        raise ConfigError(
            f"recipe={names['recipe']}: its overrides do not fit algo={names['algo']} with correction="
            f"{names['correction']}: {error}; leave both to the recipe, or choose another recipe"
        ) from error
    changed = algorithms.override(preset, overrides)
    return changed, tuple(algorithms.split_settings(preset, changed))


def correction_names(value: Any) -> list[str]:
    """The corrections of `correction=tis`, `correction=tis,kl_k3`, `correction=[tis,kl_k3]`, or of a recipe's list.

    Raises:
        ConfigError: neither a name nor a list of names.
    """
    if isinstance(value, str):
        text = value if value.startswith("[") else f"[{value}]"
        try:
            value = parse("correction", text)
        except ConfigError:
            value = text
    names = [name for name in value or () if name is not None] if isinstance(value, (list, type(None))) else [value]
    if not all(isinstance(name, str) for name in names) or isinstance(value, str):
        raise ConfigError(f"correction: found {value!r}; give a name or a list such as correction=[tis,kl_k3]")
    return names


def _preset(group: str, name: str) -> dict[str, Any]:
    if name not in presets(group):
        raise ConfigError(f"{group}: no {group} '{name}'; {nearest(name, presets(group))}")
    return read_yaml(CONFIGS / group / f"{name}.yaml")


def _named(group: str, name: str) -> dict[str, Any]:
    """A preset's part of the tree; a model may also be a folder or a hub name."""
    is_place = "/" in name or name.lower().endswith(".gguf") or Path(name).is_dir()
    if group == "model" and name not in presets("model") and is_place:
        return {"model": {"path": name}}
    return _preset(group, name)


def _merge(tree: DictConfig, part: Mapping[str, Any], origin: str) -> DictConfig:
    part = dict(part)
    overrides = [key for key in ("algo", "correction") if part.pop(key, None)]
    try:
        tree = OmegaConf.merge(tree, OmegaConf.create(part))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {first_line(error)}") from error
    if overrides:
        raise ConfigError(
            f"{origin}: a preset cannot change `{overrides[0]}`; give {overrides[0]}.KEY=VALUE on the command line, or "
            "a recipe's `overrides`"
        )
    return tree


def _set(tree: DictConfig, key: str, value: str) -> DictConfig:
    """Set one key=value of the command line; the part before the first dot decides what checks the rest."""
    head, _, rest = key.partition(".")
    if head in ("algo", "data", "model") and not rest or head == "recipe":
        raise ConfigError(f"{key}: give a name, or a key below it such as {head}.KEY=VALUE")
    free = head == "data" or key.startswith(("model.overrides.", "deepspeed.config."))
    try:
        if not free and OmegaConf.select(tree, key, default=_ABSENT) is _ABSENT:
            raise ConfigError(f"{key}: unknown key; {_hint(tree, key)}")
        # A string value is taken literally, because a template's braces are not YAML.
        is_text = not free and isinstance(OmegaConf.select(tree, key), str)
        parsed = value if is_text else parse(key, value)
        OmegaConf.update(tree, key, parsed, merge=False, force_add=free)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {value!r} cannot be read: {first_line(error)}") from error
    return tree


_ABSENT = object()


def _hint(tree: DictConfig, key: str) -> str:
    """What to write in place of a key that does not exist."""
    if renamed := RENAMED_KEYS.get(key):
        return f"it was renamed; write {renamed}"
    if key.partition(".")[0] in tree.algo:
        return f"did you mean 'algo.{key}'?"
    return hints.unknown(key, {*known_keys(), *GROUPS, *_inner_keys(tree)})


def _inner_keys(tree: DictConfig) -> Iterator[str]:
    """The keys of the chosen algorithm's parts and of the data set."""
    for key in _flat({"algo": plain(tree.algo), "data": plain(tree.data)}):
        if key.rpartition(".")[2] not in (TARGET, "description", "name"):
            yield key


def known_keys() -> list[str]:
    """All dotted keys of a run except those inside `algo` and `data`, and those that name files."""

    def walk(tree: Mapping[str, Any], prefix: str) -> list[str]:
        keys = []
        for name, value in tree.items():
            inner = walk(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else []
            keys += inner or [f"{prefix}{name}"]
        return keys

    return [*walk(defaults(RunConfig), ""), "recipe", "correction"]


def suite_config(name: str) -> SuiteConfig:
    """The suite of a preset or of a YAML file.

    Raises:
        ConfigError: there is none, or a key or value of it is wrong.
    """
    return from_tree(SuiteConfig, resolved(OmegaConf.create(suite_tree(name))), "suite")


def suite_tree(name: str) -> dict[str, Any]:
    """A suite's file over the defaults.

    Raises:
        ConfigError: there is none, or it is not a suite's file.
    """
    path = CONFIGS / "suite" / f"{name}.yaml" if name in presets("suite") else Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"suite: no suite '{name}'; {nearest(name, presets('suite'))} (or give a YAML file)")
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        raise error.with_key("suite") from error
    if not isinstance(tree, Mapping) or list(tree) != ["suite"] or not isinstance(tree["suite"], Mapping):
        raise ConfigError(f"suite: {path} must be a mapping with the one key `suite`, and a suite's keys below it")
    suite = {**defaults(SuiteConfig), **tree["suite"]}
    benchmarks, alike = suite["benchmarks"], defaults(BenchmarkConfig)
    if isinstance(benchmarks, Mapping):
        suite["benchmarks"] = {n: {**alike, **b} if isinstance(b, Mapping) else b for n, b in benchmarks.items()}
    return suite


def resolved(tree: Any) -> dict[str, Any]:
    """A resolved OmegaConf tree as nested dictionaries.

    Raises:
        ConfigError: a reference in it leads nowhere.
    """
    try:
        return plain(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'suite'}: {first_line(error)}") from error
