"""What takes memory during a step, and how much of it is in use at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.run.model_shape import ModelShape
from experiments.run.workload import GIB, Machine

Moment = Literal["sampling", "refresh", "training", "step"]
#: The parts of a step: sampling, copying the weights to the sampler, forward and backward passes, AdamW's update.
MOMENTS: dict[Moment, str] = {
    "sampling": "while sampling",
    "refresh": "while the sampler's weights are replaced",
    "training": "in forward and backward passes",
    "step": "in the optimizer step",
}


@dataclass(frozen=True)
class Item:
    """One thing that takes memory.

    Attributes:
        what: a description, with the numbers behind it.
        bytes: size on one rank.
        when: the part of a step in which it is allocated.
        is_certain: whether `bytes` is a lower bound, whatever the libraries do.
    """

    what: str
    bytes: int
    when: Moment | Literal["always"] = "always"
    is_certain: bool = True


@dataclass(frozen=True)
class Shapes:
    """The models of a run; None for one that the algorithm does not need or that shares the weights of another."""

    policy: ModelShape
    critic: ModelShape | None = None
    reference: ModelShape | None = None
    teacher: ModelShape | None = None

    @property
    def frozen(self) -> dict[str, ModelShape]:
        """The models without gradients by name."""
        named = {"reference policy": self.reference, "teacher": self.teacher}
        return {name: shape for name, shape in named.items() if shape is not None}


@dataclass(frozen=True)
class Memory:
    """Memory of one rank.

    Attributes:
        machine: the machine of the run.
        states: the models' weights, gradients and optimizer states.
        engine: the inference engine.
        update: the forward and backward pass.
        offloaded: what is kept in the main memory of a machine with GPUs.
        host: what else takes its main memory, one item at a time.
        remembered: earlier weights and rollouts that its main memory holds.
    """

    machine: Machine
    states: tuple[Item, ...]
    engine: tuple[Item, ...]
    update: tuple[Item, ...]
    offloaded: tuple[Item, ...] = ()
    host: tuple[Item, ...] = ()
    remembered: tuple[Item, ...] = ()

    @property
    def host_peak(self) -> int:
        """The most main memory of a machine with GPUs that is in use at the same time, in bytes."""
        kept = sum(item.bytes for item in (*self.offloaded, *self.remembered))
        return kept + max((item.bytes for item in self.host), default=0)

    def total(self, when: Moment, certain: bool = False) -> int:
        """Bytes in use at the same time in a part of a step; with `certain`, a lower bound."""
        items = [*self.states, *self.engine, *self.update]
        return sum(i.bytes for i in items if i.when in ("always", when) and (i.is_certain or not certain))

    def __str__(self) -> str:
        items = [*self.states, *self.engine, *self.update]
        rows = [f"{item.bytes / GIB:8.2f}  {item.when:<8}  {item.what}" for item in items]
        there = self.machine.memory / GIB
        for when, words in MOMENTS.items():
            rows.append(f"{self.total(when) / GIB:8.2f}  {'in all':<8}  {words}, of {there:.2f} GiB")
        rows += [
            f"{item.bytes / GIB:8.2f}  {'host':<8}  {item.what}"
            for item in (*self.offloaded, *self.remembered, *self.host)
        ]
        return "\n".join(rows)
