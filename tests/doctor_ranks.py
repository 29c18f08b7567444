"""Run by test_doctor.py, on one rank or several: check-ups of things that are broken on purpose.

usage: doctor_ranks.py FOLDER NAME...

For each name of `BROKEN` it leaves FOLDER/NAME/doctor.json and FOLDER/NAME.code, the exit code.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from experiments.doctor import kernels, machine
from experiments.doctor.__main__ import main as doctor
from upge.models import loading
from upge.rollout.base import Rollout
from upge.rollout.transformers_engine import TransformersSampler
from upge.train.distributed import leave
from upge.train.engine import Engine

Patch = pytest.MonkeyPatch


def wrong_sum(patch: Patch) -> None:
    right = dist.all_reduce

    def all_reduce(values, *arguments, **named):
        result = right(values, *arguments, **named)
        values[-1] += 1
        return result

    patch.setattr(dist, "all_reduce", all_reduce)


def sequences_mixed(patch: Patch) -> None:
    """Attention over the row as if it were one sequence."""
    right = kernels.packed_attention
    patch.setattr(
        kernels,
        "packed_attention",
        lambda *arguments, sequence_lengths, **named: right(
            *arguments, sequence_lengths=(sum(sequence_lengths),), **named
        ),
    )


def temperature_dropped(patch: Patch) -> None:
    right = kernels.token_loss
    patch.setattr(kernels, "token_loss", lambda *a, temperature, **named: right(*a, temperature=1.0, **named))


def entropy_slope_dropped(patch: Patch) -> None:
    """The gradient of the other way through the head lacks the entropies."""
    right = kernels.token_logprobs

    def token_logprobs(*arguments, **named):
        logprobs, entropies = right(*arguments, **named)
        return logprobs, entropies.detach()

    patch.setattr(kernels, "token_logprobs", token_logprobs)


def gradient_doubled(patch: Patch) -> None:
    right = Engine.backward
    patch.setattr(Engine, "backward", lambda engine, loss, last: right(engine, 2 * loss, last))


def weights_ignored(patch: Patch) -> None:
    """A sampler that keeps the weights that it started with."""

    def load_weights(sampler, weights):
        for _ in weights:
            pass

    patch.setattr(TransformersSampler, "_load_weights", load_weights)


def logprob_wrong(patch: Patch) -> None:
    """The log-prob of the last token of each response is off."""
    right = TransformersSampler._sample

    def sample(sampler, requests, sampling, complete, poll):
        def shifted(index, copy, rollout):
            complete(
                index, copy, Rollout(rollout.token_ids, (*rollout.logprobs[:-1], rollout.logprobs[-1] + 0.1), True)
            )

        right(sampler, requests, sampling, shifted, poll)

    patch.setattr(TransformersSampler, "_sample", sample)


def updates_ignored(patch: Patch) -> None:
    right = Engine.step
    patch.setattr(Engine, "step", lambda engine, lr, limit=0.0: right(engine, 0.0, limit))


def engine_gone(patch: Patch) -> None:
    def sample(*_):
        raise RuntimeError("the engine is gone\nand more lines")

    patch.setattr(TransformersSampler, "_sample", sample)


def last_rank_fails(patch: Patch) -> None:
    def attention(context):
        if context.world.rank == context.world.size - 1:
            raise RuntimeError("no kernel image")
        return right(context)

    right = kernels.attention
    patch.setattr(kernels, "attention", attention)


def last_rank_waits(patch: Patch) -> None:
    def attention(context):
        if context.world.rank == context.world.size - 1:
            time.sleep(600)
        return right(context)

    right = kernels.attention
    patch.setattr(kernels, "attention", attention)


def disk_full(patch: Patch) -> None:
    right = machine.shutil.disk_usage
    patch.setattr(machine.shutil, "disk_usage", lambda path: right(path)._replace(free=1000))


def old_driver(patch: Patch) -> None:
    """A GPU that torch cannot use."""
    for module, name in ((loading, "_NVIDIA_DEVICE"), (machine, "NVIDIA_CONTROL")):
        patch.setattr(module, name, Path("/dev/null"))
    patch.setattr(machine, "driver_version", lambda: "470.82")
    patch.setattr(machine.torch.version, "cuda", "13.0")


def nothing(patch: Patch) -> None:
    pass


#: Name → what breaks it, and the arguments of the check-up.
BROKEN: dict[str, tuple[Callable[[Patch], None], list[str]]] = {
    "wrong_sum": (wrong_sum, ["checks=collectives"]),
    "sequences_mixed": (sequences_mixed, ["checks=kernels"]),
    "temperature_dropped": (temperature_dropped, ["checks=kernels"]),
    "entropy_slope_dropped": (entropy_slope_dropped, ["checks=kernels"]),
    "gradient_doubled": (gradient_doubled, ["checks=gradients"]),
    "weights_ignored": (weights_ignored, ["checks=sampler"]),
    "logprob_wrong": (logprob_wrong, ["checks=sampler"]),
    "updates_ignored": (updates_ignored, ["checks=sampler"]),
    "engine_gone": (engine_gone, ["checks=sampler,kernels,machine"]),
    "disk_full": (disk_full, ["checks=machine"]),
    "old_driver": (old_driver, ["checks=machine,collectives,kernels"]),
    "no_model": (nothing, ["model=no/such-model", "checks=machine,kernels,gradients"]),
    "last_rank_fails": (last_rank_fails, ["checks=kernels,collectives"]),
    "last_rank_waits": (last_rank_waits, ["checks=collectives,kernels", "time_limit=5"]),
}


def main(folder: str, *names: str) -> None:
    for name in names:
        broken, arguments = BROKEN[name]
        with pytest.MonkeyPatch.context() as patch:
            broken(patch)
            code = doctor([*arguments, "prompts=1", "group_size=2", f"output={folder}/{name}"])
        Path(folder, f"{name}.code").write_text(str(code))
    leave(None, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
