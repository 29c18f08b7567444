"""What is checked before training: the algorithm, the folder, the model, the limits, and what the data must have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.config import Composed
from experiments.describe import members
from experiments.files import free_folder, output_path
from experiments.run import faults
from experiments.run.models import check_distributions
from experiments.run.problems import (
    check_answers,
    encode_problems,
    load_problems,
    measured_problems,
    overlap_notes,
    with_rows,
)
from experiments.run.rewards import check_success, named_rewards
from experiments.run.teacher import check_teacher, check_teaching
from upge import data, rollout
from upge.algorithm import Algorithm
from upge.errors import ConfigError, ModelError
from upge.models import local_path
from upge.models.loading import check_files, read_config
from upge.needs import COMPUTED
from upge.pipeline import Pipeline
from upge.train.config import ModelConfig, VerifyConfig
from upge.train.faults import NONE
from upge.train.folder import RunFolder
from upge.train.metric_names import check_signals
from upge.train.sample import has_pair, usable
from upge.verify import VerifierPool
from upge.verify.base import BUILT_IN
from upge.verify.isolation import can_leave_network
from upge.verify.pool import check_limits
from upge.verify.reward import names as reward_names

#: Columns that this trainer fills beyond rewards, masks and groups.
PROVIDED = frozenset({"sampler_logprobs", "entropies", "preference", "finished"}) | COMPUTED - {"values"}


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Attributes:
        evaluation: the examples on which accuracy is measured.
        weights: the shares of a mixture's sources.
        verifiers: names of the verifiers; the first one serves problems that name none.
        continues: whether the run continues an earlier one.
    """

    prompting: data.Prompting
    train: Sequence[data.Example]
    evaluation: Sequence[data.Example]
    weights: Mapping[str, float]
    verifiers: tuple[str, ...]
    folder: RunFolder
    continues: bool
    notes: tuple[str, ...]


def prepare(composed: Composed) -> Prepared:
    """Load and check everything that a run needs besides the weights.

    Raises:
        UserError: the first thing that is wrong; the message names the key or file, its value and the fix.
    """
    config, algorithm = composed.config, composed.algorithm
    algorithm.check(group_size=config.group_size, provided=PROVIDED)
    check_stages(algorithm, config.steps)
    check_teacher(config, algorithm.needs)
    check_distributions(config, algorithm.needs)
    notes = faults.prepare(composed)
    for path, one in members(algorithm):
        check_signals(one, f"algo.{path}")
    folder = RunFolder(output_folder(composed))
    continues = folder.open(composed.tree, config.resume)
    _check_installed()
    splits, more = load_problems(composed.tree["data"], config)
    notes += more
    measured = measured_problems(config, splits)
    verified = splits.train if algorithm.needs.rollouts else [p for p in splits.train if p.answer]
    verifiers = check_answers([*verified, *measured], config.verify.verifier)
    check_success(verifiers, config.verify)
    check_length(config.model, config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
    prompting = load_prompting(config.model)
    notes += overlap_notes(splits.train, measured)
    if algorithm.needs.teacher:
        check_teaching(config, prompting, splits.train)
    train, more = encode_problems("training", with_rows(splits.train, verifiers), prompting, composed)
    notes += more
    measured = with_rows(measured, verifiers)
    evaluation, more = encode_problems("evaluation", measured, prompting, composed) if measured else ([], [])
    notes += more
    check_vocabulary([*train, *evaluation], config.model)
    demonstrations = sum(bool(example.demonstrations) for example in train)
    pairs = sum(has_pair(example) for example in train)
    try:
        algorithm.check(
            group_size=config.group_size,
            demonstrations=demonstrations,
            provided=PROVIDED,
            rewards=named_rewards(splits.train, algorithm.needs, config.verify.verifier),
        )
        _check_pairs(algorithm, pairs)
    except ConfigError as error:
        # The notes say if the length limits have dropped all of them.
        raise ConfigError("; ".join([str(error), *notes])) from error
    if algorithm.needs.data_demonstrations and demonstrations < len(train):
        notes.append(f"{demonstrations} training problems have a demonstration within the limit")
    if algorithm.needs.preference_pairs and pairs < len(train):
        notes.append(f"{pairs} training problems have a preference pair within the limit")
    train = [train[i] for i in usable(train, algorithm.needs)]
    return Prepared(prompting, train, evaluation, splits.weights, verifiers, folder, continues, tuple(notes))


def check_stages(algorithm: Algorithm | Pipeline, steps: int) -> None:
    """Raise ConfigError if a stage of the run would have no step."""
    for span in Pipeline.of(algorithm).spans(steps) if steps else ():
        if span.first == span.end:
            raise ConfigError(
                f"steps: {steps} leaves none for algo.stages.{span.name} (share {span.stage.share:g}); give more "
                "steps, or stages of more equal shares"
            )


def output_folder(composed: Composed) -> Path:
    """`output`, or the next free runs/ALGO-MODEL-DATA; corrections are appended as in ALGO+tis, a fault at the end."""
    if composed.config.output:
        return output_path(composed.config.output)
    names = composed.names
    algo, model, data = (Path(str(names[group])).name.removesuffix(".yaml") for group in ("algo", "model", "data"))
    stem = f"{'+'.join([algo, *filter(None, str(names['correction'] or '').split(','))])}-{model}-{data}"
    fault = "" if composed.config.fault == NONE else f"-fault={composed.config.fault}"
    return free_folder("runs", f"{stem}{fault}")


def _check_installed() -> None:
    """Raise ConfigError if a package is missing that is needed only after training."""
    for package in ("jinja2", "matplotlib", "rich", "tqdm"):
        if importlib.util.find_spec(package) is None:
            fix = "pip install 'upge[all]'"
            raise ConfigError(f"the report needs the package {package}, which is not installed: {fix}")


def with_local_models(composed: Composed) -> Composed:
    """Replace GGUF files by folders with the converted models; the tree, which is recorded, keeps the given names."""
    sections = {name: getattr(composed.config, name) for name in ("model", "critic", "reference", "teacher")}
    local = {name: replace(section, path=local_path(section.path)) for name, section in sections.items()}
    return replace(composed, config=replace(composed.config, **local))


def load_prompting(model: ModelConfig) -> data.Prompting:
    """The prompt format of these model settings; raises the errors of `Prompting.load`."""
    names = ("template", "system", "instruction", "opening", "template_arguments")
    parts = {name: getattr(model, name) for name in names}
    return data.Prompting.load(model.path, **parts)


def load_sampler(
    model: ModelConfig, engine: Any, max_length: int, seed: int, tensor_parallel: int = 1
) -> rollout.Sampler:
    """Start the engine of the settings `rollout` (of a run or an evaluation) with a model.

    `tensor_parallel` is a separate argument, because only runs and the doctor divide an engine over ranks.
    """
    return rollout.load(
        engine.engine,
        model.path,
        dtype=model.dtype,
        max_length=max_length,
        memory_fraction=engine.memory_fraction,
        max_sequences=engine.max_sequences,
        max_batched_tokens=engine.max_batched_tokens,
        tensor_parallel=tensor_parallel,
        seed=seed,
        overrides=model.overrides,
    )


def verifier_pool(verifiers: Sequence[str], config: VerifyConfig) -> VerifierPool:
    """The processes that verify a run's or an evaluation's responses."""
    limits = config.workers, config.time_limit, config.memory_limit
    return VerifierPool(verifiers, *limits, config.environment, config.network)


def check_verifiers(verifiers: Sequence[str], config: VerifyConfig) -> list[str]:
    """Check that this machine can run these verifiers as the settings say; return notes about the network.

    Only verifiers that execute code of other packages or of the user are noted.

    Raises:
        ConfigError: there are too many workers for the machine, or an environment variable is not set.
    """
    check_limits(config.workers, config.time_limit, config.memory_limit, config.environment)
    single = reward_names(verifiers)
    own = [name for name in single if name not in BUILT_IN]
    if config.network or not {*own, "reasoning_gym"} & {*single}:
        return []
    if not can_leave_network():
        return ["verifiers can use the network, because this system lets no process leave it (unshare)"]
    return [f"{', '.join(own)} cannot use the network; verify.network=true lets verifiers use it"] if own else []


def check_length(
    model: ModelConfig, max_prompt_tokens: int, max_response_tokens: int, section: str = "rollout"
) -> None:
    """Check the model's files, and that no prompt with its response can exceed the model's positions.

    Raises:
        ModelError: there is no model, one of its files is truncated, or it has too few positions.
    """
    if not model.path:
        raise ModelError("model.path: empty; give the folder of a Hugging Face causal LM, a hub name, or model=NAME")
    longest = getattr(read_config(model.path, model.overrides), "max_position_embeddings", None)
    check_files(model.path)
    wanted = max_prompt_tokens + max_response_tokens
    if longest is not None and wanted > longest:
        raise ModelError(
            f"{section}.max_prompt_tokens + {section}.max_response_tokens = {wanted} exceeds the {longest} positions "
            f"of '{model.path}'; lower one of them, or raise model.overrides.max_position_embeddings"
        )


def check_vocabulary(examples: Sequence[data.Example], model: ModelConfig) -> None:
    """Raise ModelError if the tokenizer makes a token of these examples that the model has no embedding for."""
    vocabulary = read_config(model.path, model.overrides).get_text_config().vocab_size
    for example in examples:
        highest = max((max(ids, default=0) for ids in _token_ids(example)), default=0)
        if highest >= vocabulary:
            problem = example.problem
            raise ModelError(
                f"model.path: '{model.path}' has {vocabulary} embeddings, but its tokenizer makes the token {highest} "
                f"of {problem.where or problem.id}; give the tokenizer that belongs to the model"
            )


def _token_ids(example: data.Example) -> Iterator[Sequence[int]]:
    yield example.prompt_ids
    yield from example.demonstrations
    if example.rejected_ids is not None:
        yield example.rejected_ids


def _check_pairs(algorithm: Algorithm | Pipeline, pairs: int) -> None:
    for path, one in members(algorithm):
        owner = next((owner for owner, source in one.sources.items() if source == "preference_pairs"), None)
        if owner and not pairs:
            raise ConfigError(
                f"algo.{path}{owner}.source: preference_pairs, but the data set has no rejected responses; choose data "
                "that has them within rollout.max_response_tokens, or an algorithm that learns from other responses"
            )
