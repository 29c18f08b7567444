"""Faults on purpose, `fault=NAME`: ways in which published frameworks have trained wrongly.

Each function below is one fault; its docstring says what it changes and where it was seen. A fault wraps an object of
the run: the training examples, the engine of the sampler, or what makes the updates. docs/faults.md says which check
notices which.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from experiments.config import Composed
from experiments.run.fault_plans import averaged, rescaled, scaled
from upge.algorithm import Algorithm
from upge.data import Example
from upge.errors import ConfigError, nearest
from upge.pipeline import Pipeline
from upge.plan import Plan
from upge.regularizers import KLPenalty
from upge.rollout import Sampler, Sampling
from upge.train.faults import NONE, Fault, check_mark
from upge.train.step_batch import StepBatch
from upge.train.update import Updater

_TOP_P, _COLDER = 0.9, 0.7


class _Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        make: makes the fault, for groups of this size.
        changes: whether the fault changes anything in runs of an algorithm.
        needs: what an algorithm must have for that.
    """

    make: Callable[[int], Fault]
    changes: Callable[[Algorithm], bool]
    needs: str


def _dropped_micro_batches(group_size: int) -> Fault:
    """Only the gradient of an update's last micro-batch survives.

    DeepSpeed's ZeRO 1 and 2 with the optimizer on the CPU and several backward passes per step (DeepSpeed #7967,
    #7981). With gradient accumulation inside DeepSpeed, as in the published comparisons that arXiv 2604.23747
    examined, the first one survives as well. On several ranks each rank's last micro-batch survives.
    """

    def with_engine(updater: Updater) -> Updater:
        engine = updater.engine

        def backward(loss: Tensor, last: bool) -> None:
            engine.drop_gradient()
            engine.backward(loss, last)

        return _with(updater, engine=_Replaced(engine, backward=backward))

    return Fault(updater=with_engine)


def _mean_of_means(group_size: int) -> Fault:
    """Each micro-batch's loss is divided by the counts of the micro-batch, and the micro-batches are averaged.

    OpenRLHF (#489, arXiv 2604.23747), SkyRL (#1504), prime-rl (#583), open-instruct (#1137).
    """
    return Fault(updater=lambda updater: _with_plans(updater, averaged))


def _gradient_over_group(group_size: int) -> Fault:
    """The gradient is divided by the group size once more.

    Reported of ms-swift under ZeRO-3 (#10117); the referee finds the number of micro-batches as the divisor there.
    """

    def with_engine(updater: Updater) -> Updater:
        engine = updater.engine
        divided = _Replaced(engine, backward=lambda loss, last: engine.backward(loss / group_size, last))
        return _with(updater, engine=divided)

    return Fault(updater=with_engine)


def _micro_batch_std(group_size: int) -> Fault:
    """Advantages are divided by the standard deviation over their micro-batch instead of their group.

    Statistics over other rows than the group's, as in AReaL #1419.
    """
    return Fault(updater=lambda updater: _with_plans(updater, rescaled))


def _sampler_top_p(group_size: int) -> Fault:
    """The sampler draws with top_p=0.9, and the trainer's log-probs are those of the full distribution.

    TRL (#6789) and ms-swift (#8442), where top_p is a setting of the sampler alone.
    """
    return Fault(sampler=lambda sampler: _sampling(sampler, lambda asked: replace(asked, top_p=_TOP_P)))


def _sampler_temperature(group_size: int) -> Fault:
    """The sampler's temperature is 0.7 times the trainer's.

    TRL before #3029, whose trainer did not divide the logits by the temperature that the sampler used.
    """
    return Fault(
        sampler=lambda sampler: _sampling(
            sampler, lambda asked: replace(asked, temperature=_COLDER * asked.temperature)
        )
    )


def _stale_weights(group_size: int) -> Fault:
    """The sampler keeps the first weights that it received.

    TRL with vLLM's sleep mode (#5312). The evaluations during the run use the same engine, and therefore these weights.
    """

    def kept(sampler: Sampler) -> Sampler:
        first: dict[str, Tensor] = {}

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> None:
            is_first = not first
            # All ranks must gather every weight, even those that are not used.
            for name, weight in weights:
                if is_first:
                    first[name] = weight.detach().to("cpu", copy=True)
            sampler.load_weights(first.items())

        return cast(Sampler, _Replaced(sampler, load_weights=load_weights))

    return Fault(sampler=kept)


def _cut_demonstrations(group_size: int) -> Fault:
    """Demonstrations longer than the median are cut there, without their end-of-sequence token and without a note.

    Trainers that cut at a `max_length` of their own: unsloth (#2904), TRL (#4698).
    """

    def cut(examples: Sequence[Example]) -> Sequence[Example]:
        lengths = sorted(len(one) for example in examples for one in example.demonstrations)
        if not lengths:
            return examples
        # The longest one is cut even if all have the same length.
        most = min(lengths[len(lengths) // 2], max(1, lengths[-1] - 1))
        return [
            replace(example, demonstrations=tuple(tuple(one[:most]) for one in example.demonstrations))
            for example in examples
        ]

    return Fault(examples=cut)


def _k1_in_loss(group_size: int) -> Fault:
    """The KL penalty is differentiated as k1 = log π_θ/π_0, whose expected gradient is zero on-policy.

    OpenRLHF (#1309, #797), open-instruct (#534): the estimator that is right in the reward, used as a loss.
    """
    return Fault(updater=lambda updater: _with(updater, algorithm=with_k1(updater.algorithm)))


def _has_std(algorithm: Algorithm) -> bool:
    return any(scaled(term.estimator.advantage) is not None for term in algorithm.terms.values())


def _has_kl(algorithm: Algorithm) -> bool:
    return any(isinstance(one, KLPenalty) and one.kind != "k1" for one in algorithm.regularizers.values())


def _any(algorithm: Algorithm) -> bool:
    return True


def _samples(algorithm: Algorithm) -> bool:
    return algorithm.needs.rollouts


_ROLLOUTS = "rollouts; choose an algorithm that samples, such as grpo"
#: Name → the fault.
FAULTS: Mapping[str, _Kind] = {
    "dropped_micro_batches": _Kind(_dropped_micro_batches, _any, ""),
    "mean_of_means": _Kind(_mean_of_means, _any, ""),
    "gradient_over_group": _Kind(_gradient_over_group, _samples, _ROLLOUTS),
    "micro_batch_std": _Kind(
        _micro_batch_std, _has_std, "an advantage that is divided by a standard deviation; choose one such as grpo"
    ),
    "sampler_top_p": _Kind(_sampler_top_p, _samples, _ROLLOUTS),
    "sampler_temperature": _Kind(_sampler_temperature, _samples, _ROLLOUTS),
    "stale_weights": _Kind(_stale_weights, _samples, _ROLLOUTS),
    "cut_demonstrations": _Kind(
        _cut_demonstrations,
        lambda algorithm: algorithm.needs.data_demonstrations,
        "demonstrations; choose an algorithm that learns from them, such as sft",
    ),
    "k1_in_loss": _Kind(_k1_in_loss, _has_kl, "a KL penalty by k2 or k3; add one with correction=kl_k3"),
}


def load(name: str, group_size: int) -> Fault:
    """The fault of this name for groups of this size; 'none' changes nothing.

    Raises:
        ConfigError: there is no such fault.
    """
    if name == NONE:
        return Fault()
    if name not in FAULTS:
        raise ConfigError(f"no fault {name!r}; {nearest(name, [NONE, *FAULTS])}", "fault")
    return replace(FAULTS[name].make(group_size), name=name, summary=summary(name))


def check(name: str, algorithm: Algorithm | Pipeline, only: Sequence[str] = ()) -> None:
    """Refuse a fault that would change nothing in a run of this algorithm, or in its stages `only`.

    Raises:
        ConfigError: the message says what the algorithm lacks.
    """
    stages = {key: stage.algorithm for key, stage in Pipeline.of(algorithm).stages.items() if not only or key in only}
    if name in FAULTS and not any(FAULTS[name].changes(one) for one in stages.values()):
        lacking = " and ".join(f"'{one.name}'" for one in stages.values()) if only else f"'{algorithm.name}'"
        raise ConfigError(f"{name} would change nothing: {lacking} lacks {FAULTS[name].needs}", "fault")


def prepare(composed: Composed) -> list[str]:
    """Check the fault of a run and the marks of its models; return a note on the fault if there is one.

    Raises:
        ConfigError: there is no such fault, it would change nothing, or a model was trained with another one.
    """
    config = composed.config
    fault = load(config.fault, config.group_size)
    _check_stages(fault, config.fault_stages, composed.algorithm)
    check(config.fault, composed.algorithm, config.fault_stages)
    for name in ("model", "critic", "reference", "teacher"):
        check_mark(getattr(config, name).path, config.fault, f"{name}.path")
    return [fault.describe()] if fault.is_on else []


def _check_stages(fault: Fault, names: Sequence[str], algorithm: Algorithm | Pipeline) -> None:
    """Refuse stages that the algorithm does not have, and stages for a fault that does not change the updates."""
    known = list(algorithm.stages) if isinstance(algorithm, Pipeline) else []
    for name in names:
        if name not in known:
            hint = nearest(str(name), known) if known else "leave it out, because the algorithm has no stages"
            raise ConfigError(f"no stage {name!r}; {hint}", "fault_stages")
    if names and fault.updater is Fault().updater:
        raise ConfigError(
            f"found {list(names)}, but fault={fault.name} does not change the updates; leave it out", "fault_stages"
        )


def summary(name: str) -> str:
    """What a fault changes: the first line of its docstring."""
    return str(inspect.getdoc(FAULTS[name].make)).splitlines()[0]


def origin(name: str) -> str:
    """Where a fault was seen: the rest of its docstring, as one line."""
    return " ".join(str(inspect.getdoc(FAULTS[name].make)).splitlines()[1:]).strip()


def with_k1(algorithm: Algorithm) -> Algorithm:
    """The algorithm with k1 in every KL penalty on sampled tokens."""
    regularizers = {
        name: replace(part, kind="k1", importance=False) if isinstance(part, KLPenalty) else part
        for name, part in algorithm.regularizers.items()
    }
    return replace(algorithm, regularizers=regularizers)


class _Replaced:
    """A proxy with some attributes of its own; all other reads, and every assignment, go to the inner object."""

    def __init__(self, inner: Any, **changed: Any) -> None:
        vars(self).update(_inner=inner, **changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_inner"], name, value)


def _with(updater: Updater, **changed: Any) -> Updater:
    """A copy of an updater with other parts."""
    one = copy.copy(updater)
    vars(one).update(changed)
    return one


def _sampling(sampler: Sampler, change: Callable[[Sampling], Sampling]) -> Sampler:
    """A sampler that changes the settings that it is called with before it samples."""

    def sample(prompts: Any, n: int, asked: Sampling, *rest: Any, **more: Any) -> Any:
        return sampler.sample(prompts, n, change(asked), *rest, **more)

    return cast(Sampler, _Replaced(sampler, sample=sample))


def _with_plans(updater: Updater, change: Callable[..., Plan]) -> Updater:
    """The updater with plans that depend on how their update is split into micro-batches."""
    filler, algorithm = updater.filler, updater.algorithm

    def evaluated(batch: StepBatch, plan: Plan, *rest: Any) -> tuple[Plan, list[Any]]:
        ready, current = filler.evaluated(batch, plan, *rest)
        rows = ready.contributing.nonzero()[:, 0].tolist()
        split = filler.micro_batch_rows(batch, rows, whole_groups=algorithm.reach == "group") if rows else []
        own = [torch.tensor(some, dtype=torch.long) for some in split if some]
        of_ranks = [rows for of_rank in updater.engine.world.gather(own) for rows in of_rank]
        return change(algorithm, batch, ready, of_ranks), current

    return _with(updater, filler=_Replaced(filler, evaluated=evaluated))
