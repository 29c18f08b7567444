"""Checks before training: data, tokenizer, limits, answers, what the algorithm needs of the data, and the folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.config import Composed, suite_config
from experiments.describe import members
from experiments.files import free_folder, output_path
from experiments.run import answer_check, faults
from experiments.run.models import check_distributions
from experiments.run.rewards import check_success, named_rewards
from experiments.run.teacher import check_teacher, check_teaching
from upge import data, rollout
from upge.algorithm import Algorithm
from upge.errors import ConfigError, DataError, ModelError
from upge.evaluation.suite import load as benchmarks
from upge.instantiate import TARGET, build
from upge.models import local_path
from upge.models.loading import check_files, read_config
from upge.needs import COMPUTED
from upge.pipeline import Pipeline
from upge.train.config import EvalConfig, ModelConfig, RunConfig, VerifyConfig
from upge.train.faults import NONE
from upge.train.folder import RunFolder
from upge.train.metric_names import check_signals
from upge.train.sample import has_pair, usable
from upge.verify import VerifierPool
from upge.verify.base import BUILT_IN
from upge.verify.isolation import can_leave_network
from upge.verify.pool import check_limits
from upge.verify.reward import Reward
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
    measured = _measured(config, splits)
    verified = splits.train if algorithm.needs.rollouts else [p for p in splits.train if p.answer]
    verifiers = check_answers([*verified, *measured], config.verify.verifier)
    check_success(verifiers, config.verify)
    check_length(config.model, config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
    prompting = load_prompting(config.model)
    notes += _overlap(splits.train, measured)
    if algorithm.needs.teacher:
        check_teaching(config, prompting, splits.train)
    train, more = _encode("training", with_rows(splits.train, verifiers), prompting, composed)
    notes += more
    measured = with_rows(measured, verifiers)
    evaluation, more = _encode("evaluation", measured, prompting, composed) if measured else ([], [])
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


def load_problems(node: Mapping, config: RunConfig) -> tuple[data.Splits, list[str]]:
    """The problems of the resolved settings' `data` that `data_policy` keeps, and notes about the others."""
    splits, notes = _verifiable(load_splits(node), config)
    limits = config.data_policy
    kept = data.limit_demonstrated(data.limit_levels(splits.train, limits.per_level), limits.demonstrated_prompts)
    return replace(splits, train=kept), notes


def load_splits(node: Mapping) -> data.Splits:
    """The problems of the resolved settings' `data`.

    Raises:
        UserError: they cannot be loaded, or a user's data set returns something else.
    """
    splits = build(node, "data", data.DataSet).load()
    if not isinstance(splits, data.Splits):
        raise ConfigError(f"data: load() of {node[TARGET]} returned a {type(splits).__name__}; return upge.data.Splits")
    return splits


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


def check_answers(problems: Sequence[data.Problem], default: str) -> tuple[str, ...]:
    """The names of these problems' verifiers, the run's own first.

    Raises:
        ConfigError: a verifier does not exist.
        DataError: an answer that its verifier could never accept.
    """
    for problem, reason in answer_check.refused(problems, default):
        if not problem.answer:
            raise DataError(
                f"{problem.where or problem.id}: there is no answer, and the verifier '{problem.verifier or default}' "
                "compares responses with it. Set data.columns.answer to its column, or verify.verifier to a verifier "
                "that needs no answer. An algorithm that learns only from demonstrations or pairs, such as sft or dpo, "
                "needs no answers for training; eval.every=-1 measures no accuracy"
            )
        raise DataError(
            f"{problem.where or problem.id}: the answer cannot be verified: {reason}; for training "
            "data_policy.unverifiable_answers=drop leaves such problems out"
        )
    return answer_check.names(problems, default)


def with_rows(problems: Sequence[data.Problem], verifiers: Sequence[str]) -> Sequence[data.Problem]:
    """The problems, without their rows if no verifier asks for these, which may take much memory."""
    if any("row" in Reward.load(text).asks for text in verifiers):
        return problems
    return [problem if problem.row is None else replace(problem, row=None) for problem in problems]


def _verifiable(splits: data.Splits, config: RunConfig) -> tuple[data.Splits, list[str]]:
    """The problems without those that the policy drops, and a note of how many these are."""
    if config.data_policy.unverifiable_answers == "error":
        return splits, []
    answered = [problem for problem in (*splits.train, *splits.evaluation) if problem.answer]
    refused = list(answer_check.refused(answered, config.verify.verifier))
    if not refused:
        return splits, []
    out = {problem.id for problem, _ in refused}
    train, evaluation = (tuple(p for p in side if p.id not in out) for side in (splits.train, splits.evaluation))
    first, reason = refused[0]
    if not train or (splits.evaluation and not evaluation):
        side = "evaluation" if train else "training"
        raise DataError(f"{first.where or first.id}: no answer of the {side} side can be verified; here: {reason}")
    note = f"{len(refused)} problems dropped: their answers cannot be verified; the first: {first.where}: {reason}"
    return replace(splits, train=train, evaluation=evaluation), [note]


def _check_pairs(algorithm: Algorithm | Pipeline, pairs: int) -> None:
    for path, one in members(algorithm):
        owner = next((owner for owner, source in one.sources.items() if source == "preference_pairs"), None)
        if owner and not pairs:
            raise ConfigError(
                f"algo.{path}{owner}.source: preference_pairs, but the data set has no rejected responses; choose data "
                "that has them within rollout.max_response_tokens, or an algorithm that learns from other responses"
            )


def _measured(config: RunConfig, splits: data.Splits) -> Sequence[data.Problem]:
    """The problems on which accuracy is measured during training; empty if it is not measured."""
    if config.eval.suite:
        return suite_problems(config.eval, config.verify.verifier)
    for name in ("folder", "skip", "limit"):
        if getattr(config.eval, name):
            raise ConfigError(
                f"eval.{name}: works only with eval.suite; data.evaluation_size sets the number of problems of the "
                "data's own evaluation side"
            )
    if config.eval.every < 0:
        return ()
    if not splits.evaluation:
        raise DataError(
            "data: there is no evaluation side to measure accuracy on; give data.evaluation_share=0.02 (of the rows, "
            "by a hash of their prompts), data.evaluation_path, benchmarks with eval.suite=NAME, or eval.every=-1 to "
            "measure nothing"
        )
    return splits.evaluation


def _overlap(train: Sequence[data.Problem], measured: Sequence[data.Problem]) -> list[str]:
    """A note if evaluation problems are also trained on; within one data set this cannot happen."""
    seen = {p.conversation for p in train}
    both = sum(p.conversation in seen for p in measured)
    return [f"{both} of the {len(measured)} evaluation problems are also training problems"] if both else []


def suite_problems(config: EvalConfig, verifier: str) -> tuple[data.Problem, ...]:
    """The problems of `eval.suite` for an evaluation during training, each with its benchmark's name as its level.

    The suite's own sampling settings are not used here. `verifier` serves the benchmarks that name none.

    Raises:
        UserError: there is no such suite, or its problems cannot be loaded.
    """
    chosen = suite_config(config.suite)
    try:
        chosen = replace(chosen, folder=config.folder or chosen.folder, skip=[*chosen.skip, *config.skip])
    except ConfigError as error:
        raise error.under("eval") from None
    loaded = benchmarks(chosen, verifier, config.limit, section="eval")
    return tuple(replace(p, id=f"{one.name}/{p.id}", level=one.name) for one in loaded for p in one.problems)


def _encode(
    which: str, problems: Sequence[data.Problem], prompting: data.Prompting, composed: Composed
) -> tuple[list, list[str]]:
    """The examples of these problems that fit the length limits, and notes about the others."""
    config, needs, policy = composed.config, composed.algorithm.needs, composed.config.data_policy
    without = next((p for p in problems if p.system), None) if not prompting.has_system else None
    if without is not None:
        raise ConfigError(
            f"model.template: {config.model.template!r} has no place for system messages, and {without.where} has one; "
            "put {system} into it, or leave them out (data.system=drop for tables)"
        )
    encoded = data.encode(
        problems,
        prompting,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        overlong_prompts=policy.overlong_prompts,
        overlong_demonstrations=policy.overlong_demonstrations,
        demonstrations=which == "training" and (needs.data_demonstrations or needs.preference_pairs),
        pairs=which == "training" and needs.preference_pairs,
    )
    prompts = encoded.dropped_prompts
    notes = [f"{which}: {prompts} problems dropped: prompt longer than rollout.max_prompt_tokens"] if prompts else []
    counts = {
        "demonstrations dropped: longer than": encoded.dropped_demonstrations,
        "demonstrations cut to": encoded.truncated_demonstrations,
        "preference pairs dropped: one side longer than": encoded.dropped_pairs,
        "preference pairs cut to": encoded.truncated_pairs,
    }
    shown = [f"{count} {what}" for what, count in counts.items() if count and which == "training"]
    notes += [f"{which}: {one} rollout.max_response_tokens" for one in shown]
    return list(encoded.examples), notes
