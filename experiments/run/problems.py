"""The problems of a run: loading, answers that can be verified, evaluation problems, and encoding within the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from experiments.config import Composed, suite_config
from experiments.run import answer_check
from upge import data
from upge.errors import ConfigError, DataError
from upge.evaluation.suite import load as benchmarks
from upge.instantiate import TARGET, build
from upge.train.config import EvalConfig, RunConfig
from upge.verify.reward import Reward


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


def measured_problems(config: RunConfig, splits: data.Splits) -> Sequence[data.Problem]:
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


def overlap_notes(train: Sequence[data.Problem], measured: Sequence[data.Problem]) -> list[str]:
    """A note if evaluation problems are also trained on; within one data set this cannot happen."""
    seen = {p.conversation for p in train}
    both = sum(p.conversation in seen for p in measured)
    return [f"{both} of the {len(measured)} evaluation problems are also training problems"] if both else []


def encode_problems(
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
