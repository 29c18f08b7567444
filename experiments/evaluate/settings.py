"""The settings of an evaluation: defaults, a suite's file, a model's preset, and the command line, in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from experiments.config import compose, presets, resolved, suite_tree
from upge.config import Settings, from_tree, key, meanings, parse, section, split
from upge.errors import ConfigError, nearest
from upge.evaluation.suite import BenchmarkConfig, SuiteConfig
from upge.train.config import ModelConfig, VerifyConfig

#: Settings of the model that apply only to training.
TRAINING_ONLY = ("model.gradient_checkpointing",)
#: Model settings taken from the run whose model is evaluated, unless the command line gives them.
FROM_RUN = ("dtype", "template", "system", "instruction", "opening")


@dataclass(frozen=True)
class EngineConfig(Settings):
    """The engine that responses are sampled with."""

    engine: Literal["auto", "vllm", "transformers"] = key("auto", "inference engine; auto takes vllm where installed")
    memory_fraction: float = key(0.4, "share of a GPU's memory for the vLLM engine", above=0, maximum=1)


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """A whole evaluation."""

    seed: int = key(0, "seed of all sampling")
    limit: int = key(
        0,
        "maximum number of problems of each benchmark, chosen by a hash of their prompts; 0 = all",
        minimum=0,
        fix="give a number of problems, or 0 for all",
    )
    output: str = key("", "folder of the evaluation; empty = the next free evals/MODEL-SUITE")
    resume: Literal["auto", "never"] = key("auto", "auto = continue an interrupted evaluation found in `output`")
    model: ModelConfig = section(ModelConfig)
    rollout: EngineConfig = section(EngineConfig)
    verify: VerifyConfig = section(VerifyConfig)
    suite: SuiteConfig = section(SuiteConfig)


@dataclass(frozen=True)
class Chosen:
    """A checked configuration.

    Attributes:
        config: the settings.
        names: which `model` and `suite` were selected.
        tree: everything resolved, as written to config.yaml.
        notes: sentences for the user about settings taken from elsewhere.
    """

    config: EvaluateConfig
    names: Mapping[str, str]
    tree: dict[str, Any]
    notes: tuple[str, ...]


def choose(arguments: Sequence[str]) -> Chosen:
    """The settings of a command line.

    Raises:
        ConfigError: an unknown key, name or value, by its key.
    """
    items = [split(argument) for argument in arguments]
    names = {"model": "", "suite": ""} | {k: value for k, value in items if k in ("model", "suite")}
    for name, what in (("model", "a preset, a hub name or a folder"), ("suite", "a preset or a YAML file")):
        if not names[name]:
            raise ConfigError(f"{name}: missing; give {name}=NAME, {what}; presets: {', '.join(presets(name))}")
    suite = OmegaConf.create({"suite": suite_tree(names["suite"])})
    place = dict(items).get("model.path", names["model"])
    shared, own = [f"model={names['model']}", *_of_run(place, items)], {}
    notes = _note_of_run(place, shared[1:])
    for name, value in items:
        if name in names:
            continue
        _check_key(name, suite)
        if name == "limit":
            own["limit"] = parse(name, value)
        elif name.startswith("suite."):
            is_text = isinstance(OmegaConf.select(suite, name), str)
            OmegaConf.update(suite, name, value if is_text else parse(name, value), merge=False, force_add=True)
        else:
            shared.append(f"{name}={value}")
    # Keys that a run also has are read by `compose`, as for a run.
    run = compose(shared).config
    engine = {"engine": run.rollout.engine, "memory_fraction": run.rollout.memory_fraction}
    tree = {
        "seed": run.seed,
        "limit": 0,
        "output": run.output,
        "resume": run.resume,
        **own,
        "model": asdict(run.model),
        "rollout": engine,
        "verify": asdict(run.verify),
        **resolved(suite),
    }
    config = from_tree(EvaluateConfig, tree)
    for name in TRAINING_ONLY:
        del tree[name.partition(".")[0]][name.partition(".")[2]]
    return Chosen(config, names, tree, notes)


def keys() -> list[tuple[str, Any, str]]:
    """(key, default, meaning) of every setting; those of a benchmark as suite.benchmarks.NAME.KEY."""
    rows = [row for row in meanings(EvaluateConfig) if row[0] not in TRAINING_ONLY]
    return rows + meanings(BenchmarkConfig, "suite.benchmarks.NAME.")


def _check_key(name: str, suite: Any) -> None:
    """Refuses a key that an evaluation does not have."""
    known = [row[0] for row in keys() if not row[0].startswith("suite.benchmarks")]
    if name.startswith("suite.benchmarks."):
        _, _, benchmark, *rest = name.split(".")
        fields = [field.name for field in dataclasses.fields(BenchmarkConfig)]
        if benchmark not in suite.suite.benchmarks:
            raise ConfigError(f"{name}: no benchmark '{benchmark}'; {nearest(benchmark, suite.suite.benchmarks)}")
        if not rest or rest[0] not in fields:
            raise ConfigError(f"{name}: unknown key; {nearest(rest[0] if rest else '', fields)}")
        if rest[0] not in ("data", "file") and rest[1:]:
            raise ConfigError(f"{name}: unknown key; suite.benchmarks.{benchmark}.{rest[0]} has none below it")
    elif name not in known and not name.startswith("model.overrides."):
        raise ConfigError(f"{name}: unknown key; {nearest(name, known)}")


def _of_run(model: str, items: Sequence[tuple[str, str]]) -> list[str]:
    """model.KEY=VALUE of the run that `model` (its final/, best/ or another folder) belongs to; empty if none."""
    path = Path(model).expanduser()
    config, given = path.parent / "config.yaml", {name for name, _ in items}
    if not (path / "config.json").is_file() or not config.is_file() or not (path.parent / "run.json").is_file():
        return []
    settings = OmegaConf.to_container(OmegaConf.load(config)).get("model") or {}
    wanted = [name for name in FROM_RUN if name in settings and f"model.{name}" not in given]
    return [f"model.{name}={settings[name]}" for name in wanted]


def _note_of_run(model: str, taken: Sequence[str]) -> tuple[str, ...]:
    names = ", ".join(one.partition("=")[0] for one in taken)
    return (f"{names} as in {Path(model).expanduser().parent / 'config.yaml'}",) if taken else ()
