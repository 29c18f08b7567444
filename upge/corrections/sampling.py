"""The corrections that choose prompts, and the algorithms that they would work against."""

from __future__ import annotations

from dataclasses import dataclass, replace

from upge import prompt_sampling as core
from upge.algorithm import Algorithm
from upge.corrections.base import Correction, NotApplicable, rollout_terms
from upge.gates import Gate, PassRateBetween, ProductOf
from upge.prompt_memory import DecayedMean, PromptMemory
from upge.prompt_sampling import NearPassRate, PromptWeight


@dataclass(frozen=True)
class DynamicSampling(Correction):
    """Dynamic sampling (arXiv 2503.14476): replaces prompts on which `gate` is closed until the batch is full.

    Prompts on which it is still closed after the last round do not count in the divisors.

    Attributes:
        gate: the gate; it may read only rewards, groups and the memory of prompts.
    """

    gate: Gate = PassRateBetween(0.0, 1.0)
    rounds: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sampling()

    def _sampling(self) -> core.DynamicSampling:
        return core.DynamicSampling(self.gate, self.rounds)

    def apply(self, algorithm: Algorithm) -> Algorithm:
        terms = rollout_terms(algorithm)
        _check_learns_from_sampled(algorithm, self.gate)
        if algorithm.dynamic_sampling is not None:
            raise NotApplicable("it already has `sampling`; change that by algo.sampling.KEY=VALUE")
        if algorithm.replay is not None:
            raise NotApplicable("it replays earlier rollouts, which cannot be sampled again; remove its `replay`")
        gated = {name: replace(term, gate=ProductOf((term.gate, self.gate))) for name, term in terms.items()}
        sampling = self._sampling()
        if algorithm.curriculum is not None:
            sampling = replace(algorithm.curriculum, redraw=sampling)
        return replace(algorithm, terms={**algorithm.terms, **gated}, sampling=sampling)


@dataclass(frozen=True)
class Curriculum(Correction):
    """Draws prompts with probabilities proportional to `weight`. Dynamic sampling, if there is any, is kept.

    Attributes:
        weight: the weight of a prompt, from its memory.
        memory: what is tracked of each prompt, for algorithms without a memory of their own.
    """

    weight: PromptWeight = NearPassRate()
    memory: PromptMemory = DecayedMean()

    def apply(self, algorithm: Algorithm) -> Algorithm:
        rollout_terms(algorithm)
        if algorithm.replay is not None:
            raise NotApplicable("its replay replaces drawn prompts, so prompts would not be drawn by their weights")
        if algorithm.curriculum is not None:
            raise NotApplicable("it already draws prompts by weights; change these by algo.sampling.weight.KEY=VALUE")
        sampling = core.Curriculum(self.weight, redraw=algorithm.dynamic_sampling)
        return replace(algorithm, sampling=sampling, memory=algorithm.memory or self.memory)


_IN_A_FILE = "to use it nevertheless, write an algorithm file of your own with such a `sampling`"


def _check_learns_from_sampled(algorithm: Algorithm, sampling_gate: Gate) -> None:
    """Refuse an algorithm that learns from prompts on which `sampling_gate` is closed, because they are replaced."""
    for name, term in algorithm.terms.items():
        if term.source != "rollouts":
            source = term.source.replace("_", " ")
            learned, lost = source, f"their {source}"
            if algorithm.guidance is not None:
                learned, lost = "the beginnings of demonstrations that its rollouts continue", "these beginnings"
            raise NotApplicable(
                f"its term '{name}' learns from {learned}, and sampling would replace the prompts that all rollouts "
                f"fail or solve, together with {lost}; {_IN_A_FILE}"
            )
    if algorithm.interleaved_update is not None:
        raise NotApplicable(
            "its `interleaved_update` collects prompts by their pass rate, and sampling would replace these; "
            f"{_IN_A_FILE}"
        )
    for name, term in algorithm.terms.items():
        rate = _open_rate(term.gate, sampling_gate)
        if rate is not None:
            raise NotApplicable(
                f"the gate of its term '{name}' chooses prompts by their pass rate and is open at {rate:g}, where "
                f"sampling would replace them; {_IN_A_FILE}"
            )


def _open_rate(gate: Gate, sampling_gate: Gate) -> float | None:
    """A pass rate at which `gate` may be open although `sampling_gate` is closed.

    None if there is none, or if `gate` does not read rewards.
    """
    if "rewards" not in gate.columns:
        return None
    number = 24  # its multiples of 1/24 include halves, thirds, quarters and eighths
    rates = [solved / number for solved in range(number + 1)]
    closed = (rate for rate in rates if sampling_gate.at_pass_rate(rate) == 0)
    return next((rate for rate in closed if gate.at_pass_rate(rate) != 0), None)
