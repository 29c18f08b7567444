"""`--dry-run`: builds everything except the weights, prints what a run would do, and refuses one that cannot fit."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments.config import MODELS, Composed
from experiments.describe import members
from experiments.run.disk import check_disk
from experiments.run.memory_check import Outlook, outlook
from experiments.run.prepare import (
    PROVIDED,
    Prepared,
    check_length,
    check_stages,
    load_prompting,
    output_folder,
    prepare,
)
from experiments.run.problems import load_splits
from experiments.run.rewards import named_rewards
from experiments.run.workload import planned, pluralize
from upge import verify
from upge.algorithm import Algorithm
from upge.data import Problem
from upge.data.prompting import TOKENIZER_FILES
from upge.errors import DataError, ModelError
from upge.models.loading import read_config
from upge.pipeline import Pipeline
from upge.prompt_memory import PromptColumns, PromptRecord
from upge.train.config import RunConfig
from upge.trajectories import Trajectories

#: Stands in for a problem of the data set if the data cannot be read.
EXAMPLE = Problem("example", "What is 2 + 3?", "5")


def plan(composed: Composed) -> str:
    """The text of a dry run.

    Raises:
        UserError: the first setting that is wrong or cannot fit, with its keys, its value and the fix.
    """
    names, tree = composed.names, composed.tree
    composed, notes = with_known_models(composed)
    config = composed.config
    machine = planned(config.hardware)
    check_length(config.model, config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
    has_tokenizer = _tokenizer_exists(config.model.path)
    if not has_tokenizer:
        notes.append(f"model.path: '{tree['model']['path']}' has no tokenizer here, so no prompt is shown or measured")
    prepared, problems = _prepared(composed, has_tokenizer, notes)
    expected = outlook(composed, machine)
    disk = check_disk(expected.disk, config, machine, output_folder(composed))
    notes += [*composed.notes, *(prepared.notes if prepared else ()), *expected.notes, *disk]
    selected = ", ".join(f"{group}={name}" for group, name in names.items() if name)
    tokens = max(config.rollout.max_response_tokens // 2, 1)
    by_stage = balances(composed.algorithm, config.group_size, tokens)
    label = "stage {}: " if isinstance(composed.algorithm, Pipeline) else ""
    parts = {
        "configuration": OmegaConf.to_yaml(OmegaConf.create(tree)).rstrip(),
        "run": "\n".join([selected, f"on {machine}", f"output: {output_folder(composed)}", *problems]),
        "formula": in_print(composed.algorithm),
        "gradient": "\n".join(f"{label.format(name)}{one}" for name, one in by_stage.items()),
        "prompt": _prompt(config, prepared, has_tokenizer),
        "each step": _steps(composed.algorithm, expected, config),
        "memory of a rank, GiB": str(expected.memory),
        "disk, GiB": str(expected.disk),
        "notes": "\n".join(f"note: {note}" for note in notes),
    }
    return "\n\n".join(f"{head}:\n{textwrap.indent(text, '  ')}" for head, text in parts.items() if text)


def _prepared(composed: Composed, has_tokenizer: bool, notes: list[str]) -> tuple[Prepared | None, list[str]]:
    """What a run would start from, None without a tokenizer or without the hub, and the sizes of its data."""
    config = composed.config
    try:
        if has_tokenizer:
            prepared = prepare(composed)
            having = sum(bool(example.problem.demonstrations) for example in prepared.train)
            if composed.algorithm.needs.data_demonstrations:
                having = sum(bool(example.demonstrations) for example in prepared.train)
            return prepared, [_sizes(len(prepared.train), having, len(prepared.evaluation))]
        composed.algorithm.check(group_size=config.group_size, provided=PROVIDED)
        check_stages(composed.algorithm, config.steps)
        verify.Reward.load(config.verify.verifier)
        splits = load_splits(composed.tree["data"])
        names = named_rewards(splits.train, composed.algorithm.needs, config.verify.verifier)
        composed.algorithm.check(group_size=config.group_size, provided=PROVIDED, rewards=names)
        having = sum(bool(problem.demonstrations) for problem in splits.train)
        return None, [_sizes(len(splits.train), having, len(splits.evaluation)) + ", whatever their length"]
    except DataError as error:
        if not _is_unreachable(error):
            raise
        notes.append(f"{error}; the data could not be checked here")
    return None, []


def _sizes(train: int, having: int, evaluation: int) -> str:
    return f"{train} training problems, {having} with a demonstration; {evaluation} evaluation problems"


def in_print(algorithm: Algorithm | Pipeline) -> str:
    """The formula and the other objectives: a critic, interleaved updates, a validation objective."""
    lines = [algorithm.formula()]
    for path, one in members(algorithm):
        if path and not path.startswith("stages."):
            lines.append(f"{path.split('.')[0]}: {one.formula()}")
        if one.critic is not None:
            lines.append(f"critic: minimizes {one.critic.formula().text}")
    return "\n".join(lines)


def _prompt(config: RunConfig, prepared: Prepared | None, has_tokenizer: bool) -> str:
    """The first training prompt as the model sees it; without a tokenizer, the settings of the prompt."""
    if prepared is not None:
        return prepared.prompting.describe(prepared.train[0].problem)
    if has_tokenizer:
        return load_prompting(config.model).describe(EXAMPLE)
    model = config.model
    lines = ["model.template: " + ("chat, the tokenizer's own" if model.template == "chat" else repr(model.template))]
    for key in ("system", "instruction", "opening", "template_arguments"):
        if getattr(model, key):
            lines.append(f"model.{key}: {getattr(model, key)!r}")
    return "\n".join(lines)


def _steps(algorithm: Algorithm | Pipeline, expected: Outlook, config: RunConfig) -> str:
    """The work of a step, per stage if there are several."""
    prompts = pluralize(config.prompts_per_step, "prompt")
    if len(expected.workloads) == 1:
        return f"{pluralize(config.steps, 'step')} of {prompts}\n{next(iter(expected.workloads.values()))}"
    lines = []
    for span in Pipeline.of(algorithm).spans(config.steps):
        head = f"stage {span.name}: {pluralize(span.end - span.first, 'step')} of {prompts}"
        lines += [head, textwrap.indent(str(expected.workloads[span.name]), "  ")]
    return "\n".join(lines)


_QWEN = (
    *(f"Qwen2.5-{size}{kind}" for size in ("0.5B", "1.5B", "3B", "7B") for kind in ("", "-Instruct")),
    *(f"Qwen3-{size}{kind}" for size in ("0.6B", "1.7B", "4B", "8B") for kind in ("-Base", "")),
    *("Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B"),
)
_SMOL = ("SmolLM2-135M-Instruct", "SmolLM2-360M-Instruct", "SmolLM2-1.7B-Instruct", "SmolLM3-3B")
_LLAMA = ("Llama-3.1-8B", "Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct")
#: Hub name → folder in experiments/models with the model's config.json and nothing else; it is the preset's name.
KNOWN = {
    f"{owner}/{name}": name.lower()
    for owner, names in (
        ("Qwen", _QWEN),
        ("HuggingFaceTB", _SMOL),
        ("meta-llama", _LLAMA),
        ("google", ("gemma-3-1b-it",)),
    )
    for name in names
}


def with_known_models(composed: Composed) -> tuple[Composed, list[str]]:
    """Replace models that cannot be found by the folders of `KNOWN`, and return a sentence about each.

    Raises:
        ModelError: a model is neither found nor known.
    """
    config, notes = composed.config, []
    for key in ("model", "critic", "reference", "teacher"):
        section = getattr(config, key)
        folder = _folder(section.path, f"{key}.path", notes)
        config = replace(config, **{key: replace(section, path=folder)})
    return replace(composed, config=config), notes


def _folder(path: str, key: str, notes: list[str]) -> str:
    if path not in KNOWN:
        return path
    try:
        read_config(path)
    except ModelError:
        folder = MODELS / KNOWN[path]
        notes.append(
            f"{key}: '{path}' is not in the local cache and the hub cannot be reached; its sizes are those of "
            f"{folder.relative_to(MODELS.parent.parent)}/config.json, which has neither weights nor tokenizer"
        )
        return str(folder)
    return path


def _tokenizer_exists(path: str) -> bool:
    """Whether a model that has a configuration also has a tokenizer.

    For a folder this checks the files, because transformers makes an empty tokenizer from a configuration alone.
    """
    if Path(path).is_dir():
        return any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
    from upge.data.prompting import load_tokenizer

    try:
        return load_tokenizer(path) is not None
    except ModelError:
        return False


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether the cause of an error is that the hub could not be reached."""
    while error is not None:
        if isinstance(error, ConnectionError):
            return True
        error = error.__cause__
    return False


#: Token probability and entropy at which weights that depend on them are evaluated (two equally likely tokens).
PROBABILITY, ENTROPY = 0.5, math.log(2)


@dataclass(frozen=True)
class Balance:
    """Σ_tokens |weight| of one prompt, times the number of prompts in the update.

    The weight is the factor of ∇log π_θ.

    Attributes:
        rollouts: the sum over the rollouts of a prompt.
        demonstration: the sum over that prompt's demonstration; if the algorithm does not use it there, over the
            demonstration of a prompt that no rollout has solved.
        right: the number of the prompt's rollouts that are right.
        tokens: the length of each of these responses.
    """

    rollouts: float
    demonstration: float
    right: int
    group_size: int
    tokens: int

    @property
    def ratio(self) -> float | None:
        """Rollouts over demonstration; None if one of them is zero."""
        return self.rollouts / self.demonstration if self.rollouts and self.demonstration else None

    def __str__(self) -> str:
        if self.ratio is None:
            sources = [n for n, w in (("rollouts", self.rollouts), ("demonstrations", self.demonstration)) if w]
            return (
                f"a step learns from {sources[0]} alone"
                if sources
                else "such prompts do not contribute to the gradient"
            )
        return (
            f"rollouts : demonstration = {self.rollouts:.4g} : {self.demonstration:.4g} = {self.ratio:.4g}\n"
            f"(Σ|weight| of a prompt with {self.right} of {self.group_size} rollouts right, {self.tokens:,} tokens per "
            f"response, probability {PROBABILITY:g} and entropy {ENTROPY:.2f} per token)"
        )


def balance(algorithm: Algorithm, group_size: int, tokens: int) -> Balance:
    """The balance of an algorithm at its first step.

    The batch has two prompts with a demonstration each, and is strictly on-policy. No rollout of the second is right.

    Args:
        group_size: rollouts per prompt. Half of the first prompt's, rounded down, are right.
        tokens: length of every response.
    """
    right, size = group_size // 2, group_size + 1
    rewards = torch.tensor([*[1.0] * right, *[0.0] * (group_size - right), 1.0, *[0.0] * group_size, 1.0])
    places, logprobs = torch.arange(2 * size), torch.full((2 * size, tokens), math.log(PROBABILITY))
    memory, entropies = algorithm.memory, torch.full_like(logprobs, ENTROPY)
    new: dict[str, Any] = (
        {} if memory is None else PromptColumns.of([memory.remembered(PromptRecord(), 0)] * len(places)).named()
    )
    batch = Trajectories(
        logprobs=logprobs,
        response_mask=torch.ones_like(logprobs, dtype=torch.bool),
        rewards=rewards,
        group=places // size,
        is_demonstration=places % size == size - 1,
        finished=torch.ones_like(places, dtype=torch.bool),
        behavior_logprobs=logprobs,
        sampler_logprobs=logprobs,
        reference_logprobs=logprobs,
        teacher_logprobs=logprobs,
        values=torch.zeros_like(logprobs),
        entropies=entropies,
        score_norms=torch.full_like(logprobs, 2 * (1 - PROBABILITY) ** 2),
        preference=torch.zeros_like(places),
        state=algorithm.initial_state(),
        named_rewards=dict.fromkeys(algorithm.step_needs.rewards, rewards),
        **new,
    )
    # Leave out the kind of trajectories that the algorithm's steps do not have.
    needs = algorithm.step_needs
    there = torch.where(batch.is_demonstration, needs.demonstrations, needs.rollouts).nonzero()[:, 0]
    own = {"logprobs": logprobs[there], "entropies": entropies[there], "row": torch.arange(len(there))}
    weights = torch.zeros(len(rewards), dtype=torch.float64)
    weights[there] = algorithm.estimate(batch.select(there, **own)).weights.double().abs().sum(dim=1)
    rows = weights.view(2, size) * 2
    demonstration = rows[0, -1] if rows[0, -1] else rows[1, -1]
    return Balance(float(rows[0, :-1].sum()), float(demonstration), right, group_size, tokens)


def balances(algorithm: Algorithm | Pipeline, group_size: int, tokens: int) -> dict[str, Balance]:
    """The balance of each stage by its name, without those with preference pairs, a teacher or guided rollouts."""
    stages = {name: stage.algorithm for name, stage in Pipeline.of(algorithm).stages.items()}
    plain = {
        name: one
        for name, one in stages.items()
        if not (one.needs.preference_pairs or one.needs.teacher or one.supports or one.guidance)
    }
    return {name: balance(one, group_size, tokens) for name, one in plain.items()}
