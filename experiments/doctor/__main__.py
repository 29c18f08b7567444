"""Check this machine: `python -m experiments.doctor [model=NAME]`; `--help` lists every key."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.files import command, free_folder, git_commit, machine, now, output_path, versions
from upge.train.distributed import World, check_launched, connect, launched_rank, leave

USAGE = """\
Usage: python -m experiments.doctor [model=NAME] [gpus=N] [key=value ...]

Checks this machine before a run, in about two minutes: GPU, driver, packages, memory, disk; the all-reduce between the
ranks; attention and output head; the gradient of every algorithm against a plain model on the CPU; and the sampler,
whose log-probs must agree with the trainer's before and after an update. Prints a table and writes doctor.json; attach
this file to a bug report. gpus=N starts one process for each of N GPUs. The exit code is 0 if there is no problem, and
1 otherwise.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 no problem, 1 some problem, 2 bad input)."""
    return cli.run_command(lambda given: _doctor(given, is_program=arguments is None), arguments, help_text)


def help_text(everything: bool = False) -> str:
    """What --help prints."""
    from experiments.doctor.settings import keys

    rows = [(f"{name}={'' if default == '' else json.dumps(default)}", meaning) for name, default, meaning in keys()]
    return "\n".join([USAGE, "Keys, with their defaults:", *(cli.help_row(left, meaning) for left, meaning in rows)])


def _doctor(arguments: list[str], is_program: bool) -> int:
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    check_launched()
    with cli.collector_paused():
        from experiments.doctor.settings import choose

        chosen = choose([argument for argument in arguments if not argument.startswith("gpus=")])
        _start_ranks(arguments)
    with ExitStack() as stack:
        checkup = CheckUp(chosen, arguments, stack)
        rows = checkup.run()
        code = 1 if checkup.problems(rows) else 0
        if checkup.world.is_main:
            checkup.report(rows)
        # The other ranks stay until the report is written, because launchers stop all ranks when one has failed.
        checkup.world.barrier()
    if is_program:
        leave(checkup.world, code)
    return code


class CheckUp:
    """A check-up on all ranks.

    Args:
        chosen: the command line, checked.
        arguments: the command line, for doctor.json.
        stack: closes the temporary folder.
    """

    def __init__(self, chosen: Any, arguments: Sequence[str], stack: ExitStack) -> None:
        from experiments.doctor.rows import Context, failed

        self.chosen, self.arguments, self.seconds = chosen, arguments, {}
        self.connection = []
        try:
            with cli.collector_paused():
                self.world = connect()
        except Exception as error:  # a driver, a port, a launcher: whatever it is, the other checks still run
            self.connection = [_not_connected(failed("ranks", error))]
            self.world = _alone()
        own = stack.enter_context(tempfile.TemporaryDirectory(prefix="upge-doctor-"))
        places = self.world.gather((socket.gethostname(), own))
        scratch = next(folder for host, folder in places if host == socket.gethostname())
        at_end = stack.enter_context(ExitStack())
        self.context = Context(chosen.config, chosen.run, self.world, chosen.shape, Path(scratch), at_end)
        self.folder = self._output()

    def run(self) -> list[Any]:
        """The rows of all checks, the same on every rank."""
        from experiments.doctor import gradients, kernels, machine, sampling
        from experiments.doctor.rows import Row, Verdict

        checks = {
            "machine": machine.check,
            "collectives": kernels.collectives,
            "kernels": kernels.check,
            "gradients": gradients.check,
            "sampler": sampling.check,
        }
        rows = [*self.connection]
        for name in [name for name in checks if name in self.chosen.config.checks]:
            if name == "collectives" and self.connection:
                continue
            if name in ("kernels", "gradients", "sampler"):
                if self.connection:
                    rows.append(Row(name, Verdict.NOT_HERE, "the ranks are not connected"))
                    continue
                if "model" not in self.seconds:
                    rows += self._timed("model", self._model, rows)
                if any(row.name.startswith("model") and row.verdict is Verdict.PROBLEM for row in rows):
                    rows.append(Row(name, Verdict.NOT_HERE, "there is no model"))
                    continue
            rows += self._timed(name, checks[name], rows)
        return rows

    @staticmethod
    def problems(rows: Sequence[Any]) -> list[Any]:
        """The rows that are problems."""
        from experiments.doctor.rows import Verdict

        return [row for row in rows if row.verdict is Verdict.PROBLEM]

    def report(self, rows: Sequence[Any]) -> None:
        """Print the table and write doctor.json; on rank 0."""
        from rich.console import Console

        console = Console(highlight=False)
        print_rows(rows, console)
        if self.context.fault.is_on:
            console.print(self.context.fault.describe(), style="bold red", markup=False)
        file = self.folder / "doctor.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self._record(rows), indent=1, default=str) + "\n", "utf-8")
        count = len(self.problems(rows))
        console.print(f"{count or 'no'} problem{'' if count == 1 else 's'}; wrote {file}", markup=False, soft_wrap=True)

    def _timed(self, name: str, check: Any, before: Sequence[Any]) -> list[Any]:
        from experiments.doctor.rows import run_check

        began = time.perf_counter()
        made = run_check(name, check, self.context, lambda rows: self.report([*before, *rows]))
        self.seconds[name] = round(time.perf_counter() - began, 2)
        return made

    def _model(self, context: Any) -> Any:
        """The check of the model; later checks use its weights."""
        from experiments.doctor.models import described, with_weights
        from experiments.doctor.settings import shape_of

        given = context.run.model
        shape = shape_of(given)
        run = dataclasses.replace(context.run, model=with_weights(context))
        self.context = dataclasses.replace(context, run=run, shape=shape)
        yield from described(self.context, given, self.chosen.name)

    def _output(self) -> Path:
        """The folder of doctor.json, chosen by rank 0."""
        given, name = self.chosen.config.output, Path(self.chosen.name).name
        return output_path(given) if given else self.world.broadcast(free_folder("doctor", name))

    def _record(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The contents of doctor.json."""
        return {
            "command": command("experiments.doctor", self.arguments),
            "made": now(),
            "ranks": self.world.size,
            "machine": machine(),
            "versions": versions(),
            "git_commit": git_commit(),
            "settings": dataclasses.asdict(self.chosen.config),
            "model": dataclasses.asdict(self.chosen.run.model),
            "seconds": self.seconds,
            "rows": [dataclasses.asdict(row) for row in rows],
        }


def print_rows(rows: Sequence[Any], console: Any) -> None:
    """Print a table of rows, and what to do about each problem below it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    styles: Mapping[str, str] = {"ok": "green", "problem": "bold red", "not here": "dim"}
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("check", "verdict", "measured"):
        table.add_column(name, no_wrap=name != "measured", overflow="fold")
    for row in rows:
        table.add_row(Text(row.name), Text(row.verdict, styles[row.verdict]), Text(row.measured))
    console.print(table)
    console.print()
    for row in CheckUp.problems(rows):
        console.print(Text.assemble((f"{row.name}: ", "bold red"), row.advice))


def _start_ranks(arguments: Sequence[str]) -> None:
    """With gpus=N, replaces this process by torchrun with N ranks.

    Raises:
        ConfigError: N is not a number of GPUs that this machine has. GPUs that torch cannot use are not an error here:
            the check-up reports them.
    """
    from experiments.run.launch import on_gpus
    from upge.errors import ConfigError
    from upge.models.loading import has_cuda

    try:
        has_cuda()
    except ConfigError:
        return
    on_gpus(arguments, is_dry=False, module="experiments.doctor")


def _alone() -> World:
    """The world of a process that could not join the others."""
    import torch

    return World(launched_rank(), 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def _not_connected(row: Any) -> Any:
    if row.details["error"] == "ConfigError":
        return dataclasses.replace(row, advice="do what the message says, then check again")
    advice = (
        "start at most as many ranks on a machine as it has GPUs, with torchrun; check the network between machines"
    )
    return dataclasses.replace(row, advice=advice)


if __name__ == "__main__":
    sys.exit(main())
