"""Train: `python -m experiments.run algo=hpt model=tiny data=arithmetic steps=100`; `--help` lists every key."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from experiments import cli
from upge.errors import UserError
from upge.train.distributed import connect, launched_rank, leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 bad input, 3 not finite, 128 + signal)."""
    return cli.run_command(_run, arguments, _help_text)


def _run(arguments: list[str]) -> int:
    arguments, given = cli.flags(arguments, "--dry-run")
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    with cli.collector_paused():
        from experiments.config import compose
        from experiments.run.dry_run import plan
        from experiments.run.memory_check import check_fits
        from experiments.run.prepare import prepare, with_local_models
        from experiments.run.train import train

        composed = with_local_models(compose(arguments))
        if given["--dry-run"]:
            text = plan(composed)
            if launched_rank() == 0:
                print(text)
            return cli.DONE
        prepared = prepare(composed)
        notes = check_fits(composed)
        world = connect()
    try:
        code = train(composed, replace(prepared, notes=(*prepared.notes, *notes)), world)
    except UserError as error:
        # Before the ranks are connected all of them raise the same error; afterwards errors may differ between ranks.
        cli.print_error(error, world.rank if world.size > 1 else None)
        code = cli.BAD_INPUT
    leave(world, code)
    return code


def _help_text() -> str:
    from experiments.run.help import help_text

    return help_text()


if __name__ == "__main__":
    sys.exit(main())
