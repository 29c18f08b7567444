"""The records of a run's prompts: read before a step, updated after it, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upge.data import Example
from upge.prompt_memory import PromptColumns, PromptMemory, PromptRecord, Remembered
from upge.train.sample import Trajectory

_NEW = PromptRecord()


@dataclass
class Prompts:
    """What a run remembers of its prompts, by `prompt_key`. Prompts that were never sampled have no entry.

    Attributes:
        records: the record of each prompt.
        responses: the ids of a prompt's last response and their log-probs under the policy that sampled it; kept only
            for a memory that uses the drift.
    """

    records: dict[str, PromptRecord] = field(default_factory=dict)
    responses: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Prompts:
        """The prompts, from their `dataclasses.asdict` in a checkpoint."""
        records = {
            key: PromptRecord(**{**one, "tracked": tuple(one["tracked"])}) for key, one in saved["records"].items()
        }
        return cls(records, dict(saved["responses"]))


def prompt_key(example: Example) -> str:
    """What identifies a prompt within a run: the problem's id, preceded in a mixture by its data set's name."""
    problem = example.problem
    return f"{problem.source}/{problem.id}" if problem.source else problem.id


class PromptReader(NamedTuple):
    """Reads what is remembered before a step.

    Attributes:
        memory: the algorithm's prompt memory.
        prompts: what the run remembers.
        examples: the training set.
        step: the step within the stage, from 0.
    """

    memory: PromptMemory
    prompts: Prompts
    examples: Sequence[Example]
    step: int

    def of(self, index: int) -> Remembered:
        """What is remembered of an example's prompt."""
        record = self.prompts.records.get(prompt_key(self.examples[index]), _NEW)
        return self.memory.remembered(record, self.step)

    def columns(self, indices: Iterable[int]) -> PromptColumns:
        """What is remembered of several examples' prompts, in order."""
        return PromptColumns.of([self.of(index) for index in indices])


def effective_number(weights: Iterable[Tensor]) -> float:
    """The effective number (Σa)²/Σa² of the weights a; with equal weights it is their count."""
    every = torch.cat(list(weights))
    return float(every.sum() ** 2 / every.square().sum())


class Visit(NamedTuple):
    """A prompt that a step has sampled.

    Attributes:
        key: the prompt's key.
        rollouts: its rollouts, except those that continue a demonstration.
    """

    key: str
    rollouts: list[Trajectory]


def visits(sampled: Iterable[Trajectory], examples: Sequence[Example]) -> list[Visit]:
    """The prompts that a step has sampled, each once, in the order of their first rollouts."""
    by_key: dict[str, list[Trajectory]] = {}
    for one in sampled:
        if not one.guiding_tokens:
            by_key.setdefault(prompt_key(examples[one.example]), []).append(one)
    return [Visit(key, rollouts) for key, rollouts in by_key.items()]


class Drift(NamedTuple):
    """How far the policy has moved on the prompts of a step, since each was last sampled.

    Attributes:
        by_key: mean_t |log π(y_t) - log π_then(y_t)| over the remembered response; only for prompts that have one.
        responses: the responses of this step that replace the remembered ones.
    """

    by_key: dict[str, float]
    responses: dict[str, tuple[Tensor, Tensor]]


NO_DRIFT = Drift({}, {})


def compared(seen: Sequence[Visit], prompts: Prompts) -> list[Trajectory]:
    """The responses whose log-probs `drift` needs: the first one of each visit, then the remembered ones."""
    new = [visit.rollouts[0] for visit in seen]
    pairs = [(one, tuple(one.response_ids)) for one in new]
    pairs += [
        (visit.rollouts[0], tuple(prompts.responses[visit.key][0].tolist()))
        for visit in seen
        if visit.key in prompts.responses
    ]
    return [
        Trajectory(one.example, number, one.prompt_ids, ids, 0.0, is_demonstration=False, index=number)
        for number, (one, ids) in enumerate(pairs)
    ]


def drift(seen: Sequence[Visit], prompts: Prompts, logprobs: Sequence[Tensor]) -> Drift:
    """The drift, from the log-probs [t] of each response in `compared` under the policy that sampled this step."""
    responses = {
        visit.key: (torch.tensor(visit.rollouts[0].response_ids, dtype=torch.int32), values)
        for visit, values in zip(seen, logprobs, strict=False)
    }
    again = [visit.key for visit in seen if visit.key in prompts.responses]
    by_key = {
        key: float((values.double() - prompts.responses[key][1].double()).abs().sum()) / max(len(values), 1)
        for key, values in zip(again, logprobs[len(seen) :], strict=True)
    }
    return Drift(by_key, responses)


def remember(
    memory: PromptMemory, prompts: Prompts, seen: Sequence[Visit], step: int, moved: Drift = NO_DRIFT
) -> dict[str, float]:
    """Update the records after a step; return metrics of the memory as it was before the step."""
    before = [prompts.records.get(visit.key, _NEW) for visit in seen]
    metrics = {"memory/prompts": float(len(prompts.records))}
    if seen:
        read = [memory.remembered(record, step) for record in before]
        means = [fmean(t.reward for t in visit.rollouts) for visit in seen]
        metrics["memory/new_share"] = fmean(one.attempts == 0 for one in read)
        metrics["memory/value_mean"] = fmean(one.value for one in read)
        metrics["memory/value_error"] = fmean(abs(one.value - mean) for one, mean in zip(read, means, strict=True))
        metrics["memory/age_mean"] = fmean(one.age for one in read)
    if moved.by_key:
        metrics["memory/drift_mean"] = fmean(moved.by_key.values())
    for visit, record in zip(seen, before, strict=True):
        rewards = [t.reward for t in visit.rollouts]
        successes = sum(t.passed for t in visit.rollouts)
        prompts.records[visit.key] = memory.recorded(record, rewards, successes, step, moved.by_key.get(visit.key, 0.0))
    prompts.responses.update(moved.responses)
    return metrics
