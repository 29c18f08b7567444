"""Checks before sampling: problems, answers, the model's prompts and limits, and the folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.evaluate.folder import EvaluationFolder, difference, fingerprint, output_folder
from experiments.evaluate.settings import Chosen
from experiments.run.prepare import load_prompting
from upge import verify
from upge.data import Prompting
from upge.errors import ConfigError, DataError, ModelError
from upge.evaluation.evaluator import Questions
from upge.evaluation.suite import Benchmark, load
from upge.models import local_path
from upge.models.loading import read_config
from upge.rollout import Sampling
from upge.train.config import ModelConfig
from upge.train.distributed import world_size


@dataclass(frozen=True)
class Prepared:
    """What an evaluation starts from.

    Attributes:
        model: the model's settings; a GGUF file is replaced by the folder with the converted model.
        prompting: how problems become prompts.
        questions: the benchmarks with their encoded prompts, in the suite's order.
        sampling: the sampling settings.
        verifiers: names of the verifiers; every problem names its own.
        folder, continues: where the samples go, and whether there already are some.
        weights: the fingerprint of the model's weights.
        notes: sentences for the user.
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
    """Loads and checks everything that an evaluation needs besides the weights.

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
    _check_model(config.model)
    model = replace(config.model, path=local_path(config.model.path))
    _check_length(model, config.suite.max_prompt_tokens, config.suite.max_response_tokens)
    weights = fingerprint(model.path)
    folder.check_weights(weights, config.model.path)
    prompting = load_prompting(model)
    questions = tuple(Questions.of(one, prompting, config.suite.max_prompt_tokens) for one in benchmarks)
    sampling = Sampling(
        temperature=config.suite.temperature,
        top_p=config.suite.top_p,
        max_tokens=config.suite.max_response_tokens,
        stop_token_ids=prompting.stop_token_ids,
    )
    notes = [*chosen.notes, *notes]
    return Prepared(model, prompting, questions, sampling, verifiers, folder, continues, weights, tuple(notes))


def check_unchanged(prepared: Prepared) -> None:
    """Checks, once the model is loaded, that its weights are still those that were checked before.

    Raises:
        ModelError: they were overwritten while they were loaded.
    """
    changed = difference(fingerprint(prepared.model.path), prepared.weights)
    if changed:
        raise ModelError(
            f"model: the weights in {prepared.model.path} were overwritten while they were loaded: {changed}; copy the "
            "folder, with a run's config.yaml and run.json beside it, and evaluate the copy"
        )


def _verifiers(benchmarks: Sequence[Benchmark]) -> tuple[tuple[str, ...], list[str]]:
    """The names of the verifiers, and a note for each benchmark of which a verifier refuses some ground truths.

    Such problems stay: the benchmark is kept complete, and a response with exactly the same words still counts. Where
    most are refused it is the verifier that is wrong, or the column.
    """
    names = tuple(dict.fromkeys(str(p.verifier) for one in benchmarks for p in one.problems))
    checks = {name: getattr(verify.load(name), "check_answer", None) for name in names}
    notes = []
    for one in benchmarks:
        refused: list[str] = []
        for problem in one.problems:
            try:
                if checks[str(problem.verifier)] is not None:
                    checks[str(problem.verifier)](problem.answer)
            except ValueError as error:
                refused.append(f"{problem.where or problem.id}: {error}")
        if 2 * len(refused) > len(one.problems):
            raise DataError(
                f"suite.benchmarks.{one.name}: {len(refused)} of {len(one.problems)} answers cannot be verified; the "
                f"first is {refused[0]}"
            )
        if refused:
            place = refused[0].partition(": the ground truth")[0]
            notes.append(
                f"{one.name}: the verifier cannot compare {len(refused)} of {len(one.problems)} answers; there only "
                f"the same words are right ({place}{', ...' if refused[1:] else ''})"
            )
    return names, notes


def _check_model(model: ModelConfig) -> None:
    """Refuses a run's folder; the model is in a folder below it."""
    path = Path(model.path).expanduser()
    inner = [name for name in ("final", "best") if (path / name / "config.json").is_file()]
    if inner and not (path / "config.json").is_file():
        paths = " or ".join(f"model={model.path.rstrip('/')}/{name}" for name in inner)
        raise ModelError(f"model: {model.path} is the folder of a run; give {paths}")


def _check_length(model: ModelConfig, max_prompt_tokens: int, max_response_tokens: int) -> None:
    """Refuses limits that exceed the model's positions."""
    longest = getattr(read_config(model.path, model.overrides), "max_position_embeddings", None)
    wanted = max_prompt_tokens + max_response_tokens
    if longest is not None and wanted > longest:
        raise ConfigError(
            f"suite.max_prompt_tokens + suite.max_response_tokens = {wanted} exceeds the {longest} positions of "
            f"'{model.path}'; lower one of them, or raise model.overrides.max_position_embeddings"
        )
