"""The settings of a diagnosis: its own keys, and the keys of a run for model, data and sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import algorithms
from experiments import hints
from experiments.config import compose, resolved
from upge.algorithm import Algorithm
from upge.config import Settings, from_tree, key, meanings, parse, split
from upge.errors import ConfigError
from upge.needs import COMPUTED
from upge.pipeline import Pipeline
from upge.train.config import RunConfig
from upge.trees import read_yaml

ALL = "all"
#: Keys of a run that a diagnosis also has; a dot at the end stands for all keys below.
SHARED = ("model", "data", "recipe", "seed", "teacher.path")
SHARED += ("model.", "data.", "rollout.", "verify.", "reference.", "data_policy.")
#: Defaults that replace those of a run, which are for a training step.
_OF_A_BATCH = {"prompts_per_step": 16, "group_size": 8}


def _at_least(least: int, default: int, meaning: str) -> Any:
    return key(default, meaning, minimum=least, limit=10**7, fix=f"give at least {least}")


@dataclass(frozen=True)
class DiagnoseConfig(Settings):
    """What is measured, and the sizes of the samples."""

    algos: list = key(
        ["sft", "grpo", "hpt", "luffy", "srft"],
        "algorithms to measure, or all; names, files, NAME+tis with corrections",
    )
    prompts: int = _at_least(1, 64, "prompts of the pool, from the training side")
    prompts_per_step: int = _at_least(1, 16, "prompts of a batch; divides prompts")
    group_size: int = _at_least(2, 8, "rollouts of a prompt in a batch")
    batches: int = _at_least(2, 32, "batches to estimate means and variances from, each with its own rollouts")
    reference: int = _at_least(4, 64, "rollouts of each prompt for the true gradient, in 8 parts of at least two")
    pass_samples: int = _at_least(1, 32, "rollouts of each prompt for its pass rate")
    held_out: int = _at_least(0, 0, "prompts of the evaluation side for the true gradient on held-out data; 0 = none")
    sketch: int = _at_least(0, 8192, "size of the gradients' random projection; 0 = whole gradients, for small models")
    step: int = _at_least(0, 0, "training step of the batch, for schedules")
    policies: list = key([], "models to measure one after the other in place of model; LABEL:PATH gives a label")
    run: str = key("", "folder of a run: its model, data and sampling, and each of its kept checkpoints as a policy")
    behavior: str = key("", "model that the batches' rollouts are sampled from; empty = the policy itself")
    exact: bool = key(False, "no model: a policy of seven responses, with exact sums over all batches")
    output: str = key("", "folder of the diagnosis; empty = the next free diagnoses/MODEL-DATA")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts % self.prompts_per_step:
            raise ConfigError(
                f"prompts_per_step: {self.prompts_per_step} does not divide prompts={self.prompts}; choose a divisor, "
                "so that every round has each prompt once"
            )
        if not self.algos or not all(isinstance(name, str) for name in [*self.algos, *self.policies]):
            raise ConfigError(f"algos={self.algos}, policies={self.policies}: give lists of names such as [sft,grpo]")

    @property
    def rounds(self) -> int:
        """The number of times that each prompt occurs: enough for `batches`, and at least three.

        Products of estimates need two rounds, and their errors come from leaving one round out.
        """
        return max(3, -(-self.batches * self.prompts_per_step // self.prompts))


@dataclass(frozen=True)
class Chosen:
    """A checked command line.

    Attributes:
        run: the settings of model, data and sampling.
        tree: everything resolved, as recorded; `tree["data"]` builds the data set.
        algorithms: given name, such as NAME+tis with a correction → algorithm.
        left_out: name → why it is not measured.
    """

    config: DiagnoseConfig
    run: RunConfig
    tree: dict[str, Any]
    algorithms: Mapping[str, Algorithm]
    left_out: Mapping[str, str]
    names: Mapping[str, str]

    @property
    def remarks(self) -> list[str]:
        """Sentences on the parts of algorithms that the results do not include."""
        noisy = self.run.rollout.noise.is_on
        sentences = ["rollout.noise is not applied: all rollouts are of the exact policy"] if noisy else []
        for name, one in self.algorithms.items():
            if one.curriculum is not None:
                sentences.append(f"{name}: all prompts are measured alike; its curriculum is not applied")
            if one.dynamic_sampling is not None:
                sentences.append(f"{name}: all prompts are measured; dynamic sampling is not applied")
            if one.interleaved_update is not None:
                sentences.append(f"{name}: the interleaved updates are not measured, only the step's own update")
        return sentences


def without_pairs(chosen: Chosen) -> tuple[Chosen, list[str]]:
    """Remove the algorithms that learn from preference pairs, and return their names.

    Raises:
        ConfigError: no other algorithm is left.
    """
    kept = {name: one for name, one in chosen.algorithms.items() if not one.needs.preference_pairs}
    if not kept:
        raise ConfigError("algos: all of them learn from preference pairs, and the data set has none; choose others")
    return replace(chosen, algorithms=kept), [name for name in chosen.algorithms if name not in kept]


def choose(arguments: Sequence[str]) -> Chosen:
    """The settings of a command line.

    Raises:
        ConfigError: an unknown key, name or value, by its key.
    """
    own: dict[str, Any] = {}
    shared: list[str] = []
    fields = DiagnoseConfig.__dataclass_fields__
    for name, text in map(split, arguments):
        if name in fields:
            own[name] = parse(name, text)
            # A list may also be given as names separated by commas.
            if name in ("algos", "policies") and isinstance(own[name], str):
                own[name] = [part for part in own[name].split(",") if part]
        elif name in SHARED or name.startswith(tuple(k for k in SHARED if k.endswith("."))):
            shared.append(f"{name}={text}")
        else:
            known = [*fields, *(k for k in SHARED if not k.endswith(".")), *(r[0] for r in _shared_rows())]
            raise ConfigError(f"{name}: unknown key; {hints.unknown(name, known)}")
    config = from_tree(DiagnoseConfig, own)
    if config.exact:
        _check_exact([*own, *(argument.partition("=")[0] for argument in shared)])
    sizes = [f"{name}={getattr(config, name)}" for name in _OF_A_BATCH]
    if config.run:
        tree, names = _of_run(Path(config.run), shared)
    else:
        composed = compose([*shared, *sizes])
        tree, names = composed.tree, {name: str(composed.names[name]) for name in ("model", "data")}
    tree |= {name: getattr(config, name) for name in _OF_A_BATCH}
    names_wanted = algorithms.names() if config.algos == [ALL] else list(dict.fromkeys(config.algos))
    wanted = {name: algorithm_of(name, tree) for name in names_wanted}
    run = from_tree(RunConfig, tree)
    reasons = {
        name: unmeasurable(one, config.group_size, config.exact, run.teacher.path) for name, one in wanted.items()
    }
    measurable = {name: replace(one, name=name) for name, one in wanted.items() if not reasons[name]}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if not measurable:
        raise ConfigError("algos: nothing is left to measure: " + "; ".join(f"{n}: {r}" for n, r in left_out.items()))
    return Chosen(config, run, tree, measurable, left_out, names)


def _check_exact(given: Sequence[str]) -> None:
    """Refuse settings of a model or of sampling with exact=true."""
    idle = [name for name in given if name not in ("exact", "algos", "group_size", "output")]
    if idle:
        raise ConfigError(
            f"{idle[0]}: has no effect with exact=true, which uses no model, no data and no sampling; leave out "
            f"{', '.join(idle)}"
        )


def unmeasurable(algorithm: Algorithm | Pipeline, group_size: int, exact: bool = False, teacher: str = "") -> str:
    """Why an algorithm cannot be measured here; empty if it can.

    Args:
        exact: whether it is measured in the exact setting, which has a critic and a teacher.
        teacher: `teacher.path`.
    """
    if isinstance(algorithm, Pipeline):
        return f"it has the stages {', '.join(algorithm.stages)}, each a separate algorithm: give those"
    if algorithm.needs.critic and not exact:
        return "it needs a critic's values, and a policy's folder has no critic"
    if algorithm.guidance is not None:
        return "its rollouts continue demonstrations, and only plain rollouts are measured"
    if algorithm.replay is not None:
        return "it replays earlier rollouts, and only fresh ones are measured"
    if algorithm.needs.teacher and not exact and not teacher:
        return "it needs a teacher; give another model with teacher.path"
    try:
        provided = {"sampler_logprobs", "entropies", "preference", "finished"} | COMPUTED - {"values"}
        algorithm.check(group_size=group_size, provided=provided)
    except ConfigError as error:
        return str(error)
    return ""


def keys() -> list[tuple[str, Any, str]]:
    """(key, default, meaning) of every setting."""
    return [*meanings(DiagnoseConfig), *_shared_rows()]


def _shared_rows() -> list[tuple[str, Any, str]]:
    prefixes = tuple(k for k in SHARED if k.endswith(".") and k != "data.")
    return [row for row in meanings(RunConfig) if row[0].startswith(prefixes) or row[0] in SHARED]


def _of_run(folder: Path, shared: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a run's folder, changed by those of the command line.

    Raises:
        ConfigError: the folder is not a run's, or a key selects a preset, which the run has already fixed.
    """
    path = folder.expanduser() / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run: {folder} has no config.yaml; give the folder of a run")
    tree = OmegaConf.create(_read_run(path))
    for argument in shared:
        name, text = split(argument)
        if name in ("model", "data", "recipe"):
            raise ConfigError(f"{name}: the run fixes it; leave it out, or give policies=[PATH,...] without run=")
        OmegaConf.update(tree, name, parse(name, text), merge=False, force_add=name.startswith("data."))
    whole = resolved(tree)
    return whole, {"model": folder.name, "data": str(whole["data"].get("_target_", "")).rpartition(".")[2].lower()}


def _read_run(path: Path) -> dict[str, Any]:
    """The tree of a run's config.yaml.

    Raises:
        ConfigError: it is not one.
    """
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        raise error.with_key("run") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("data"), dict):
        raise ConfigError(f"run: {path} is not the config.yaml of a run: it has no `data`; give the folder of a run")
    return tree


def algorithm_of(name: str, tree: Mapping[str, Any], key: str = "algos") -> Algorithm | Pipeline:
    """The algorithm NAME, or NAME+CORRECTION+..., as in a run with these settings; `key` is what names it."""
    plain, *corrections = name.split("+")
    algorithms.find(plain, path=key)
    whole = OmegaConf.create({**tree, "algo": OmegaConf.to_container(algorithms.read(plain, corrections))})
    return algorithms.compose(whole.algo, algorithms.stem(plain))
