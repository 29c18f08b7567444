"""`python -m tests.faults.disturbed ARGUMENTS`: experiments.run with a fault that the variable FAULT asks for, as JSON.

`kind` is one of the functions below; the other entries are their arguments. `rank` is where it happens (default: 0).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import tests.undrawn  # noqa: F401
from experiments.run import __main__ as command
from upge.rollout.base import Sampler
from upge.rollout.vllm_engine import VLLMSampler
from upge.train.engine import Engine
from upge.train.trainer import Trainer

Patched = Callable[..., Any]


def wrapped(owner: type, name: str, make: Callable[[Patched], Patched]) -> None:
    """Replaces a method by one that is made of it."""
    setattr(owner, name, make(getattr(owner, name)))


def in_step(step: int, owner: type, name: str, make: Callable[[Patched], Patched]) -> None:
    """Replaces a method by one that is made of it, once `step` steps are complete."""

    def watched(run_step: Patched) -> Patched:
        def of_trainer(trainer: Trainer) -> Any:
            before = getattr(owner, name)
            if trainer.state.step == step:
                setattr(owner, name, make(before))
            try:
                return run_step(trainer)
            finally:
                setattr(owner, name, before)

        return of_trainer

    wrapped(Trainer, "_step", watched)


def signal_in_sampling(step: int, number: int, after: int, limit: int) -> None:
    """Sends a signal to this process in decoding step `after`, and fails if `limit` more decoding steps follow."""

    def make(sample: Patched) -> Patched:
        def disturbed(sampler: Sampler, *arguments: Any) -> Any:
            *given, interrupted = arguments
            questions = itertools.count()

            def asked() -> bool:
                question = next(questions)
                if question == after:
                    os.kill(os.getpid(), number)
                assert question < after + limit, "sampling went on after the signal"
                return interrupted()

            return sample(sampler, *given, asked)

        return disturbed

    in_step(step, Sampler, "sample", make)


def signal_in_evaluation(number: int) -> None:
    """Sends a signal to this process when a later evaluation than the first begins to sample."""

    def make(evaluate: Patched) -> Patched:
        def of_trainer(trainer: Trainer) -> None:
            if trainer.state.step:
                os.kill(os.getpid(), number)
            evaluate(trainer)

        return of_trainer

    wrapped(Trainer, "_evaluate", make)


def signal_in_update(step: int, number: int) -> None:
    """Sends a signal to this process in the first micro-batch of a step, and fails if a third one follows."""
    calls = itertools.count(1)

    def make(loss: Patched) -> Patched:
        def disturbed(engine: Engine, *arguments: Any) -> Any:
            call = next(calls)
            if call == 1:
                os.kill(os.getpid(), number)
            assert call < 3, "the update went on after the signal"
            return loss(engine, *arguments)

        return disturbed

    in_step(step, Engine, "loss", make)


def endless_step(step: int) -> None:
    """Decodes for ever in a step."""

    def make(sample: Patched) -> Patched:
        def disturbed(sampler: Sampler, *arguments: Any) -> Any:
            while not arguments[-1]():
                time.sleep(0.05)
            return sample(sampler, *arguments)

        return disturbed

    in_step(step, Sampler, "sample", make)


def failing_engine(step: int, times: int) -> None:
    """vLLM raises an error in its next `times` decoding steps, from a step of the run on."""
    left = itertools.count(1)

    def make(start: Patched) -> Patched:
        def started(sampler: VLLMSampler) -> None:
            start(sampler)
            engine: Any = sampler._llm.llm_engine
            decode = engine.step

            def fails() -> Any:
                if steps_done[0] == step and next(left) <= times:
                    raise RuntimeError("the engine has died\nand more lines")
                return decode()

            engine.step = fails

        return started

    steps_done = [0]

    def counted(run_step: Patched) -> Patched:
        def of_trainer(trainer: Trainer) -> Any:
            steps_done[0] = trainer.state.step
            return run_step(trainer)

        return of_trainer

    wrapped(Trainer, "_step", counted)
    wrapped(VLLMSampler, "_start", make)


def failing_rank(step: int) -> None:
    """An error in the update of a step."""

    def make(loss: Patched) -> Patched:
        def disturbed(engine: Engine, *arguments: Any) -> Any:
            raise LookupError("no such thing")

        return disturbed

    in_step(step, Engine, "loss", make)


def main() -> int:
    """Plants the fault and runs the command."""
    fault = json.loads(os.environ.pop("FAULT"))
    if int(os.environ.get("RANK", "0")) == fault.pop("rank", 0):
        globals()[fault.pop("kind")](**fault)
    return command.main()


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    sys.exit(main())
