"""Train: `python -m experiments.run algo=hpt model=tiny data=arithmetic steps=100`; `--help` lists the keys."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from experiments import cli
from upge.errors import UserError
from upge.train.distributed import World, check_launched, connect, launched_rank, leave

if TYPE_CHECKING:
    from experiments.config import Composed
    from experiments.run.prepare import Prepared

USAGE = """\
Usage: python -m experiments.run [algo=NAME] [correction=NAME] [model=NAME] [data=NAME] [recipe=NAME] [key=value ...]
       [gpus=N] [--dry-run]

Trains a model and leaves a folder with config.yaml, metrics.jsonl, evaluations.jsonl, rollouts/, checkpoints/, final/
and report.html. gpus=N starts one process for each of N GPUs of this machine with torchrun. On several machines start
torchrun yourself: torchrun --nnodes 2 --nproc_per_node 8 ... -m experiments.run ...
--dry-run builds everything except the weights. It prints the configuration, formula, prompt, work per step and memory
per rank, and refuses a run that cannot fit.
"""
#: What most runs set, in the order of `--help`.
COMMON = (
    *("algo", "data", "model.path", "output", "resume", "steps", "seed", "prompts_per_step", "group_size"),
    *("rollout.engine", "rollout.temperature", "rollout.max_prompt_tokens", "rollout.max_response_tokens"),
    *("optimizer.lr", "optimizer.micro_batch_tokens", "model.lora.rank"),
    *("verify.verifier", "eval.every", "checkpoint.every", "log_to"),
)
_MORE = (
    "\nupge explain KEY: where a key's value comes from and what it does; upge describe algo=NAME: an algorithm.",
    "--help all: every key, and what each algorithm, correction, model, data set and recipe is.",
)
_HEADS = {
    "model": "Models (model=NAME, or a folder, or a hub name with a slash):",
    "data": "Data sets (data=NAME):",
    "recipe": "Recipes, named settings of several keys (recipe=NAME):",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 failed, 2 bad input, 3 not finite, 128 + signal)."""
    return cli.run_command(_run, arguments, help_text)


def _run(arguments: list[str]) -> int:
    arguments, given = cli.flags(arguments, "--dry-run")
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    check_launched()
    with cli.collector_paused():
        from experiments.config import compose
        from experiments.run.dry_run import plan
        from experiments.run.launch import check_gpus, on_gpus
        from experiments.run.loggers import check_loggers
        from experiments.run.memory_check import check_fits
        from experiments.run.prepare import check_verifiers, prepare, with_local_models

        arguments = on_gpus(arguments, given["--dry-run"])
        composed = with_local_models(compose(arguments))
        check_loggers(composed.config)
        if given["--dry-run"]:
            text = plan(composed)
            if launched_rank() == 0:
                print(text)
            return cli.DONE
        prepared = prepare(composed)
        notes = (*composed.notes, *prepared.notes, *check_gpus(composed, arguments), *check_fits(composed))
        notes += tuple(check_verifiers(prepared.verifiers, composed.config.verify))
        world = connect()
        # All ranks take the main rank's folder, because a rank that looked later may have found another one free.
        folder, continues = world.broadcast((prepared.folder, prepared.continues))
    return _train(composed, replace(prepared, notes=notes, folder=folder, continues=continues), world)


def _train(composed: Composed, prepared: Prepared, world: World) -> int:
    """Train in the folder that was chosen, record how the run ended, and leave the process."""
    from experiments.run.ending import ExitRecord
    from experiments.run.limits import limits_explained
    from experiments.run.train import train
    from upge.train.launcher import announce
    from upge.train.stopping import FAILED, Ending, StopSignals
    from upge.train.watch import Watch

    folder, continues = prepared.folder, prepared.continues
    stop, record, is_shared = StopSignals(), ExitRecord(folder.path), False
    watch = Watch(world, stop, record.lost)
    try:
        with contextlib.ExitStack() as held, limits_explained(composed.config, folder):
            with world.together():
                if world.is_main:
                    held.enter_context(folder.locked())
                    # Another run may have begun or ended in the folder since it was checked.
                    continues = folder.open(composed.tree, composed.config.resume)
            continues = world.broadcast(continues)
            prepared = replace(prepared, continues=continues)
            ending, is_shared = train(composed, prepared, world, stop, watch, record), True
    except UserError as error:
        # Before the ranks are connected all of them raise the same error; afterwards errors may differ between ranks.
        is_shared = error.is_shared
        cli.print_error(error, None if is_shared or world.size == 1 else world.rank)
        ending = Ending(cli.BAD_INPUT, str(error))
    except Exception as error:
        # If another rank has ended, the collectives of this one fail, and the watch says why, even if the launcher
        # terminates this rank in the meantime.
        with stop.noted():
            watch.wait()
        traceback.print_exc()
        ending = Ending(FAILED, f"{type(error).__name__}: {error}".splitlines()[0])
    prints = world.is_main
    if not is_shared:
        prints = watch.fail(ending)
    if prints:
        record.write(ending)
    announce(ending, prints)
    leave(world, ending.code, together=is_shared)
    return ending.code


def help_text(everything: bool = False) -> str:
    """What `--help` prints: the names and the keys that most runs set; or what `--help all` prints: all of them."""
    from experiments.config import GROUPS, presets
    from experiments.keys import shown
    from upge.config import meanings
    from upge.train.config import RunConfig

    rows = [(key, f"{key}={GROUPS.get(key) or shown(value)}", meaning) for key, value, meaning in meanings(RunConfig)]
    if everything:
        return "\n".join([USAGE, *_every_name(), *_every_key(rows)])
    lines = ["Keys of most runs, with their defaults (presets may set others):", *cli.common_rows(rows, COMMON), ""]
    lines += [_wrapped(f"{group}: {', '.join(presets(group))}") for group in ("algo", "correction", *_HEADS)]
    return "\n".join([USAGE, *lines, *_MORE])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, subsequent_indent="  ", break_on_hyphens=False)


def _every_name() -> list[str]:
    """A line for each algorithm, correction, model, data set and recipe, and for each key of a data set."""
    import algorithms
    from experiments.config import CONFIGS, presets
    from experiments.describe import correction_description
    from experiments.keys import data_keys, first_comment, shown

    parts = ["Algorithms (algo=NAME; each part is a key, for example algo.terms.rl.estimator.mask.high=0.28):"]
    parts += [cli.help_row(name, algorithms.load(name).description) for name in presets("algo")]
    parts.append("\nCorrections (correction=NAME or [NAME,NAME]; a setting is correction.NAME.KEY=VALUE):")
    parts += [cli.help_row(name, correction_description(name)) for name in presets("correction")]
    for group, head in _HEADS.items():
        parts.append(f"\n{head}")
        parts += [cli.help_row(name, first_comment(CONFIGS / group / f"{name}.yaml")) for name in presets(group)]
    for name in presets("data"):
        parts.append(f"\nKeys of data={name}:")
        parts += [cli.help_row(f"data.{key}={shown(value)}", meaning) for key, value, meaning in data_keys(name)]
    return parts


def _every_key(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """A line for each key of a run, and which of them a run that continues may change."""
    from upge.train.folder import FREE_KEYS

    parts = ["\nKeys of a run, with their defaults (presets may set others):"]
    parts += [cli.help_row(left, meaning) for _, left, meaning in rows]
    keys = [key for key, *_ in rows]
    free = [one if one in keys else f"{one}.*" for one in FREE_KEYS]
    parts.append("\nWhen a run continues, these keys may have other values, and no others:")
    return [*parts, textwrap.fill(", ".join(free), 118, initial_indent="  ", subsequent_indent="  ")]


if __name__ == "__main__":
    sys.exit(main())
