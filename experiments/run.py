"""Train: `python -m experiments.run algo=hpt model=tiny data=arithmetic steps=100`; `--help` lists every key."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import surroundings
from upge.errors import UserError
from upge.train.distributed import World, connect, launched_rank, leave

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 bad input, 3 not finite, 128 + signal)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Started by torchrun, deepspeed or python -m alike, the user's own files are found in the folder of the start.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if "-h" in arguments or "--help" in arguments:
        from experiments.help import help_text

        print(help_text())
        return 0
    dry_run = "--dry-run" in arguments
    arguments = [a for a in arguments if a != "--dry-run" and not a.startswith("--local_rank")]
    world = None
    surroundings.quiet()
    try:
        with surroundings.collector_paused():
            from experiments.config import compose
            from experiments.dry_run import plan
            from experiments.planning.fits import check_fits
            from experiments.prepare import prepare, with_local_models

            composed = with_local_models(compose(arguments))
            if dry_run:
                text = plan(composed)
                if launched_rank() == 0:
                    print(text)
                return 0
            prepared = prepare(composed)
            notes = check_fits(composed)
            world = connect()
        code = _train(composed, replace(prepared, notes=(*prepared.notes, *notes)), world)
    except UserError as error:
        # Before the ranks are connected all of them find the same; afterwards each speaks for itself.
        if world is not None and world.size > 1:
            print(f"error on rank {world.rank}: {error}", file=sys.stderr)
        elif launched_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    if world is not None:
        leave(world, code)
    return code


def _train(composed: Any, prepared: Any, world: World) -> int:
    from experiments.dry_run import in_print
    from experiments.progress import Progress
    from upge.train.trainer import Parts, Trainer
    from upge.verify import VerifierPool

    config, folder = composed.config, prepared.folder
    say = _printer(world)
    names = composed.names
    corrections = f" with {names['correction']}" if names["correction"] else ""
    say(f"{names['algo']}{corrections} on {names['model']}, {names['data']} → {folder.path}")
    say(in_print(composed.algorithm))
    for note in prepared.notes:
        say(f"note: {note}")
    say(prepared.prompting.describe(prepared.train[0].problem))
    limits = (config.verify.workers, config.verify.time_limit, config.verify.memory_limit)
    with VerifierPool(prepared.verifiers, *limits) as pool:
        with surroundings.collector_paused():
            models = _models(composed, world)
        with surroundings.collector_paused():
            sampler = _sampler(config)
        say(f"rollouts: {sampler.reason}")
        resume_from = world.share(_resume_point(prepared))
        progress = Progress(config.steps, resume_from or 0, enabled=world.is_main)
        parts = Parts(
            config,
            composed.algorithm,
            prepared.train,
            prepared.evaluation,
            prepared.weights,
            prepared.prompting,
            models,
            sampler,
            pool,
            folder,
            world,
        )
        trainer = Trainer(parts, progress.step, progress.evaluation)
        if resume_from is not None:
            trainer.restore(resume_from)
        # Only now, when nothing can refuse the checkpoint any more, is anything recorded dropped.
        if world.is_main:
            if prepared.continues:
                folder.rewind(resume_from if resume_from is not None else -1)
            facts = _facts(composed, world, sampler, models.policy, resume_from or 0)
            folder.start(composed.tree, facts, prepared.continues)
        world.barrier()
        if prepared.continues:
            say(f"continuing {folder.path} from step {resume_from or 0}")
        with progress:
            code = trainer.run()
        world.barrier()
        sampler.close()
    if world.is_main:
        _finish(folder.path, code, say)
    return code


def _models(composed: Any, world: World) -> Any:
    """The policy, and a critic and a frozen policy where the algorithm asks for them."""
    from upge.pipeline import Pipeline
    from upge.train.critic import CriticEngine
    from upge.train.engine import Engine
    from upge.train.frozen import FrozenPolicy
    from upge.train.learner import Models

    config, stages = composed.config, Pipeline.of(composed.algorithm).stages.values()
    policy = Engine(config.model, config.optimizer, world, config.rollout.temperature)
    critic = frozen = None
    if any(stage.algorithm.critic is not None for stage in stages):
        critic = CriticEngine(config.model, config.critic, config.optimizer, world)
    if composed.algorithm.needs.reference:
        model, key = config.model, "model.path"
        if config.reference.path:
            model, key = replace(model, path=config.reference.path, overrides={}), "reference.path"
        frozen = FrozenPolicy(model, world, config.rollout.temperature, key=key)
    return Models(policy, critic, frozen)


def _sampler(config: Any) -> Any:
    from upge import rollout

    return rollout.load(
        config.rollout.engine,
        config.model.path,
        dtype=config.model.dtype,
        max_length=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        memory_fraction=config.rollout.memory_fraction,
        seed=config.seed,
        overrides=config.model.overrides,
    )


def _resume_point(prepared: Any) -> int | None:
    steps = prepared.folder.checkpoint_steps() if prepared.continues else []
    return steps[-1] if steps else None


def _finish(path: Path, code: int, say: Any) -> None:
    """The table and the report; a run that stopped early has what there is."""
    from experiments.report import write_report
    from experiments.table import print_table
    from upge.train.folder import RunFolder, read_lines
    from upge.train.trainer import NOT_FINITE

    evaluations = read_lines(path / "evaluations.jsonl") if (path / "evaluations.jsonl").is_file() else []
    if len(evaluations) > 1:
        print_table(evaluations[0], evaluations[-1])
    if (path / "metrics.jsonl").is_file():
        say(f"report: {write_report(path)}")
    if code == NOT_FINITE:
        say("stopped: too many non-finite updates in a row (stop.nonfinite_updates); the state is in checkpoints/")
    elif code:
        say(f"stopped by signal {code - 128}; the state is saved, the same command with output={path} continues it")
    else:
        say(f"model:  {path / 'final'}")
    best = RunFolder(path).best_facts
    if best:
        say(f"best:   {path / 'best'}, step {best['step']}, mean@{best['samples']} {100 * best['mean']:.1f} %")


def _facts(composed: Any, world: World, sampler: Any, engine: Any, from_step: int) -> dict[str, Any]:
    """run.json: how this run was made."""
    return {
        "command": surroundings.command("experiments.run", sys.argv[1:]),
        "started": surroundings.now(),
        "from_step": from_step,
        "names": dict(composed.names),
        "seed": composed.config.seed,
        "world_size": world.size,
        "device": str(world.device.type),
        "machine": surroundings.machine(),
        "engine": sampler.name,
        "engine_reason": sampler.reason,
        "parameters": engine.parameters,
        "formula_text": composed.algorithm.formula(),
        "formula_latex": composed.algorithm.formula("latex"),
        "versions": surroundings.versions(),
        "git_commit": surroundings.git_commit(),
    }


def _printer(world: World) -> Any:
    return (lambda text: print(text, flush=True)) if world.is_main else (lambda text: None)


if __name__ == "__main__":
    sys.exit(main())
