"""The settings of an evaluation, and the checks before sampling: problems, answers, prompts, limits and the folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from experiments import hints
from experiments.config import compose, presets, resolved, suite_tree
from experiments.evaluate.folder import EvaluationFolder, difference, fingerprint, output_folder
from experiments.run import answer_check
from experiments.run.prepare import check_length, check_verifiers, load_prompting
from experiments.run.problems import with_rows
from experiments.run.rewards import check_success
from upge.config import Settings, from_tree, key, meanings, parse, section, split
from upge.data import Prompting
from upge.errors import ConfigError, DataError, ModelError, nearest
from upge.evaluation.evaluator import Questions
from upge.evaluation.suite import Benchmark, BenchmarkConfig, SuiteConfig, load
from upge.models import local_path
from upge.rollout import Sampling
from upge.train.config import SEED, TOKENS, ModelConfig, VerifyConfig
from upge.train.distributed import world_size
from upge.train.faults import NONE, marked
from upge.trees import read_yaml

#: The settings of the model that apply only to training.
TRAINING_ONLY = ("gradient_checkpointing", "lora")
#: Model settings taken from the run whose model is evaluated, unless the command line gives them.
FROM_RUN = ("dtype", "template", "system", "instruction", "opening", "template_arguments")


@dataclass(frozen=True)
class EngineConfig(Settings):
    """The engine that responses are sampled with."""

    engine: Literal["auto", "vllm", "transformers"] = key(
        "auto",
        "inference engine; auto = vllm where it is installed and supports the device, except for models below 5 M "
        "parameters on a CPU",
    )
    memory_fraction: float = key(0.4, "share of a GPU's memory for the vLLM engine", above=0, maximum=1)
    max_sequences: int = key(0, "responses that vLLM generates at once; 0 = vLLM's default", minimum=0, limit=TOKENS)
    max_batched_tokens: int = key(
        0, "tokens that vLLM processes in a step; 0 = vLLM's default", minimum=0, limit=TOKENS
    )


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """A whole evaluation."""

    seed: int = key(0, "seed of all sampling", minimum=0, limit=SEED)
    limit: int = key(
        0,
        "maximum number of problems of each benchmark, chosen by a hash of their prompts; 0 = all",
        minimum=0,
        limit=10**9,
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
    taken, notes = _of_run(place, {name for name, _ in items})
    shared, own = [f"model={names['model']}", *taken], {}
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
    tree = {"seed": run.seed, "limit": 0, "output": run.output, "resume": run.resume, **own, "model": asdict(run.model)}
    tree["rollout"] = {field.name: getattr(run.rollout, field.name) for field in fields(EngineConfig)}
    tree |= {"verify": asdict(run.verify), **resolved(suite)}
    config = from_tree(EvaluateConfig, tree)
    for name in TRAINING_ONLY:
        del tree["model"][name]
    return Chosen(config, names, tree, notes)


def keys() -> list[tuple[str, Any, str]]:
    """(key, default, meaning) of every setting; those of a benchmark as suite.benchmarks.NAME.KEY."""
    training = tuple(f"model.{name}" for name in TRAINING_ONLY)
    rows = [row for row in meanings(EvaluateConfig) if not row[0].startswith(training)]
    return rows + meanings(BenchmarkConfig, "suite.benchmarks.NAME.")


def _check_key(name: str, suite: Any) -> None:
    """Refuse a key that an evaluation does not have."""
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
    elif name not in known and not name.startswith(("model.overrides.", "model.template_arguments.")):
        raise ConfigError(f"{name}: unknown key; {hints.unknown(name, known)}")


def _of_run(model: str, given: set[str]) -> tuple[list[str], tuple[str, ...]]:
    """model.KEY=VALUE of the run that `model` (its final/, best/ or another folder) belongs to, and a note of them."""
    path = Path(model).expanduser()
    config = path.parent / "config.yaml"
    if not all(file.is_file() for file in (path / "config.json", config, path.parent / "run.json")):
        return [], ()
    tree = read_yaml(config)
    settings = tree.get("model") if isinstance(tree, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    wanted = [name for name in FROM_RUN if name in settings and f"model.{name}" not in given]
    note = f"{', '.join(f'model.{name}' for name in wanted)} as in {config}"
    values = {name: settings[name] for name in wanted}
    written = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}
    return [f"model.{name}={value}" for name, value in written.items()], (note,) if wanted else ()


@dataclass(frozen=True)
class Prepared:
    """What an evaluation starts from.

    Attributes:
        model: the model's settings; a GGUF file is replaced by the folder with the converted model.
        questions: the benchmarks with their encoded prompts, in the suite's order.
        verifiers: names of the verifiers; every problem names its own.
        folder, continues: where the samples go, and whether there already are some.
        weights: the fingerprint of the model's weights.
    """

    model: ModelConfig
    prompting: Prompting
    questions: tuple[Questions, ...]
    sampling: Sampling
    verifiers: tuple[str, ...]
    folder: EvaluationFolder
    continues: bool
    weights: dict[str, str]
    notes: tuple[str, ...]


def prepare(chosen: Chosen) -> Prepared:
    """Load and check everything that an evaluation needs besides the weights.

    Raises:
        UserError: the first thing that is wrong; the message names the key or file, its value and the fix.
    """
    config = chosen.config
    if world_size() > 1:
        raise ConfigError(
            f"started as {world_size()} processes, but an evaluation is one process; start it without torchrun (with "
            "several GPUs give each a part of the suite by suite.skip, CUDA_VISIBLE_DEVICES and an output of its own)"
        )
    folder = EvaluationFolder(output_folder(config.output, chosen.names["model"], chosen.names["suite"]))
    continues = folder.open(chosen.tree, config.resume)
    benchmarks = load(config.suite, config.verify.verifier, config.limit)
    verifiers, notes = _verifiers(benchmarks)
    check_success(verifiers, config.verify)
    _check_model(config.model)
    model = replace(config.model, path=local_path(config.model.path))
    check_length(model, config.suite.max_prompt_tokens, config.suite.max_response_tokens, "suite")
    if (found := marked(model.path)) != NONE:
        notes = [*notes, f"this model was trained with a fault on purpose, fault={found}; scores.json records it"]
    weights = fingerprint(model.path)
    folder.check_weights(weights, config.model.path)
    prompting = load_prompting(model)
    benchmarks = tuple(replace(one, problems=tuple(with_rows(one.problems, verifiers))) for one in benchmarks)
    questions = tuple(Questions.of(one, prompting, config.suite.max_prompt_tokens) for one in benchmarks)
    sampling = Sampling(
        temperature=config.suite.temperature,
        top_p=config.suite.top_p,
        max_tokens=config.suite.max_response_tokens,
        stop_token_ids=prompting.stop_token_ids,
    )
    notes = [*chosen.notes, *notes, *check_verifiers(verifiers, config.verify)]
    return Prepared(model, prompting, questions, sampling, verifiers, folder, continues, weights, tuple(notes))


def check_unchanged(prepared: Prepared) -> None:
    """Check, once the model is loaded, that its weights are still those that were checked before.

    Raises:
        ModelError: they were overwritten while they were loaded.
    """
    changed = difference(fingerprint(prepared.model.path), prepared.weights)
    if changed:
        raise ModelError(
            f"model: the weights in {prepared.model.path} were overwritten while they were loaded: {changed}; copy the "
            "folder, with a run's config.yaml and run.json next to it, and evaluate the copy"
        )


def _verifiers(benchmarks: Sequence[Benchmark]) -> tuple[tuple[str, ...], list[str]]:
    """The names of the verifiers, and a note for each benchmark with ground truths that its verifier refuses.

    Such problems stay: the benchmark is kept complete, and a response with exactly the same words still counts. If most
    are refused, the verifier or the column is wrong.
    """
    names = tuple(dict.fromkeys(str(p.verifier) for one in benchmarks for p in one.problems))
    notes = []
    for one in benchmarks:
        refusals = answer_check.refused(one.problems, str(one.problems[0].verifier))
        refused = [f"{problem.where or problem.id}: {reason}" for problem, reason in refusals]
        if 2 * len(refused) > len(one.problems):
            raise DataError(
                f"suite.benchmarks.{one.name}: {len(refused)} of {len(one.problems)} answers cannot be verified; the "
                f"first is {refused[0]}"
            )
        if refused:
            place = refused[0].partition(": the ground truth")[0]
            notes.append(
                f"{one.name}: the verifier cannot compare {len(refused)} of {len(one.problems)} answers; for these "
                f"only exactly the same words are right ({place}{', ...' if refused[1:] else ''})"
            )
    return names, notes


def _check_model(model: ModelConfig) -> None:
    """Refuse a run's folder; the model is in a folder below it."""
    path = Path(model.path).expanduser()
    inner = [name for name in ("final", "best") if (path / name / "config.json").is_file()]
    if inner and not (path / "config.json").is_file():
        paths = " or ".join(f"model={model.path.rstrip('/')}/{name}" for name in inner)
        raise ModelError(f"model: {model.path} is the folder of a run; give {paths}")
