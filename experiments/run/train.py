"""A training run from its checked configuration to its report: models, sampler, verifiers, progress, run.json."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import files
from experiments.cli import BAD_INPUT, collector_paused, print_error
from experiments.run.loggers import Loggers, Start
from upge.train.distributed import World
from upge.train.stopping import FAILED, StopSignals
from upge.train.watch import Watch
from upge.trees import first_line


class Progress:
    """The progress bar, a context manager around training; does nothing if not `enabled`."""

    def __init__(self, steps: int, done: int, enabled: bool) -> None:
        # A bar that is redrawn twice a second would fill a log file with thousands of lines.
        interval = 0.5 if sys.stderr.isatty() else 15.0
        style = {"unit": "step", "disable": not enabled, "mininterval": interval, "dynamic_ncols": True}
        self._bar = tqdm(total=steps, initial=done, **style)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def step(self, metrics: dict[str, Any]) -> None:
        """Show the metrics of a finished training step."""
        shown = {"reward": metrics.get("reward/mean"), "demos": metrics.get("gate/demonstration_share")}
        shown |= {"grad": metrics.get("grad_norm"), "loss": metrics.get("loss") if shown["reward"] is None else None}
        self._bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items() if v is not None}, refresh=False)
        self._bar.update()

    def alarm(self, text: str) -> None:
        """Print an alarm."""
        tqdm.write(f"alarm: {text}")

    def evaluation(self, line: dict[str, Any]) -> None:
        """Print the line of a finished evaluation."""
        k, scores = line["samples"], line["all"]
        text = f"step {line['step']}: greedy {scores['greedy']:.3f}, pass@{k} {scores[f'pass@{k}']:.3f}, "
        text += f"mean@{k} {scores[f'mean@{k}']:.3f} on {scores['problems']} problems"
        if line["errors"] or line["timeouts"]:
            text += f", {line['errors']} verifier errors and {line['timeouts']} timeouts count as wrong"
        if not self._bar.disable:
            tqdm.write(f"{text} ({line['time']:.0f} s)")

    def note(self, text: str) -> None:
        """Print a sentence on something unusual."""
        tqdm.write(f"note: {text}")


class Told:
    """What happens on the main rank after each step and evaluation: console, loggers and report.

    A context manager around training, after which the loggers end with the exit code `code`.
    """

    def __init__(self, progress: Progress, folder: Path, steps: int) -> None:
        self.progress, self.folder, self.steps, self.code = progress, folder, steps, FAILED
        self.loggers: Loggers | None = None

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.loggers is not None:
            self.loggers.close(self.code)

    def step(self, metrics: dict[str, Any]) -> None:
        """Show and log the metrics of a finished training step."""
        self.progress.step(metrics)
        if self.loggers is not None:
            self.loggers.step(metrics)

    def evaluation(self, line: dict[str, Any]) -> None:
        """Show and log a finished evaluation, and write the report with it."""
        self.progress.evaluation(line)
        if self.loggers is not None:
            self.loggers.evaluation(line)
        # After the last step the report is written in any case.
        if line["step"] < self.steps and (self.folder / "metrics.jsonl").is_file():
            try:
                from experiments.report.page import write_report

                write_report(self.folder)
            except Exception as error:  # the run goes on, and writes the report again when it ends
                self.progress.note(f"report.html was not written: {type(error).__name__}: {first_line(error)}")


def _say(text: str) -> None:
    """Print a line, above the progress bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


def train(composed: Any, prepared: Any, world: World, stop: StopSignals, watch: Watch, record: Any) -> Any:
    """Train, evaluate and write the report.

    Args:
        composed, prepared, world: of the run.
        stop: asks the run to stop.
        watch: ends as soon as no rank needs the others any more.
        record: an `experiments.run.ending.ExitRecord`.

    Returns:
        How the run ended, the same on every rank: an `upge.train.trainer.Ending`.
    """
    from experiments.run import faults
    from experiments.run.launch import check_shared
    from experiments.run.prepare import verifier_pool
    from upge.train.trainer import Trainer

    config, folder = composed.config, prepared.folder
    say = _say if world.is_main else lambda text: None
    fault = faults.load(config.fault, config.group_size)
    _introduce(composed, prepared, fault, say)
    with verifier_pool(prepared.verifiers, config.verify) as pool:
        with collector_paused():
            models = _models(composed, world)
        with collector_paused():
            sampler = _sampler(config)
        say(f"rollouts: {sampler.reason}")
        resume_from = world.broadcast(folder.resume_step(config.resume) if prepared.continues else None)
        progress = Progress(config.steps, resume_from or 0, world.is_main and "console" in config.log_to)
        told = Told(progress, folder.path, config.steps)
        parts = _parts(composed, prepared, world, stop, models, sampler, pool, fault)
        trainer = Trainer(parts, told.step, told.evaluation, progress.note, progress.alarm)
        if resume_from is not None:
            trainer.restore(resume_from)
        # Drop recorded lines only now, after the checkpoint has been restored without an error.
        with world.together():
            if world.is_main:
                metadata = _metadata(composed, world, sampler, models.policy, resume_from or 0)
                start = _start_folder(composed, prepared, metadata, resume_from)
                told.loggers = Loggers(config.log_to, start, progress.note)
        check_shared(folder, world)
        record.begin(world)
        if prepared.continues:
            say(f"continuing {folder.path} from step {resume_from or 0}{_saved_by(folder, resume_from, world)}")
        with stop.noted():
            with progress, told:
                ending = trainer.run()
                told.code = ending.code
            if world.is_main:
                record.write(ending)
                _finish(folder.path, ending, say)
            # vLLM ends the process group with its engine. Then the ranks leave without waiting for each other, and a
            # launcher ends the others as soon as one has left with an error.
            world.barrier()
            watch.end()
            sampler.close()
    return ending


def _parts(
    composed: Any, prepared: Any, world: World, stop: StopSignals, models: Any, sampler: Any, pool: Any, fault: Any
) -> Any:
    """What the trainer works with: data, models, verified rollouts and the evaluation during training."""
    from upge.evaluation.evaluator import training_accuracy
    from upge.rollout.verified_sampling import FirstError, VerifiedSampler
    from upge.train.parts import Parts

    config = composed.config
    verified = VerifiedSampler(
        sampler,
        pool,
        prepared.prompting,
        FirstError(partial(tqdm.write, file=sys.stderr)),
        stop.requested,
        rewards=pool.rewards,
        pass_threshold=config.verify.pass_threshold,
        success=config.verify.success,
    )
    # Evaluations never have the fault of the training rollouts.
    training = replace(verified, engine=fault.sampler(sampler))
    data = (fault.examples(prepared.train), prepared.weights, prepared.prompting)
    measure = partial(training_accuracy, config, prepared.evaluation, verified, world)
    return Parts(config, composed.algorithm, *data, models, training, measure, prepared.folder, world, stop, fault)


def _introduce(composed: Any, prepared: Any, fault: Any, say: Any) -> None:
    """Print what runs: names, formula, notes, and one rendered prompt."""
    from experiments.run.dry_run import in_print

    names = composed.names
    corrections = f" with {names['correction']}" if names["correction"] else ""
    corrections += f" with fault={fault.name}" if fault.is_on else ""
    say(f"{names['algo']}{corrections} on {names['model']}, {names['data']} → {prepared.folder.path}")
    say(in_print(composed.algorithm))
    for note in prepared.notes:
        say(f"note: {note}")
    say(prepared.prompting.describe(prepared.train[0].problem))


def _start_folder(composed: Any, prepared: Any, metadata: dict[str, Any], resume_from: int | None) -> Start:
    """Drop what was recorded after the checkpoint and write config.yaml and run.json; return what loggers need."""
    folder, step = prepared.folder, resume_from or 0
    if prepared.continues:
        folder.rewind(resume_from if resume_from is not None else -1)
    folder.start(composed.tree, metadata, prepared.continues)
    tree = {**composed.tree, "command": metadata["command"]}
    return Start(folder.path, composed.config.log_project, tree, prepared.continues, step)


def _saved_by(folder: Any, step: int | None, world: World) -> str:
    """A remark if a different number of ranks wrote the checkpoint of `step`; None = no checkpoint."""
    from experiments.run.workload import pluralize
    from upge.train.resharding import saved_ranks

    ranks = world.size if step is None else saved_ranks(folder.checkpoints / folder.tag(step))
    return "" if ranks == world.size else f", saved by {pluralize(ranks, 'rank')}; this run has {world.size}"


def _models(composed: Any, world: World) -> Any:
    """The policy, and a critic, a reference policy and a teacher if the algorithm needs them."""
    from experiments.run.models import check_secondary_partition, frozen_models, teacher_model
    from upge.pipeline import Pipeline
    from upge.train.engine import BasePolicy, CriticEngine, Engine, ReferencePolicy
    from upge.train.learner import Models

    config, needs = composed.config, composed.algorithm.needs
    check_secondary_partition(composed)
    deepspeed, temperature = config.deepspeed, config.rollout.temperature
    policy = Engine(config.model, config.optimizer, world, temperature, seed=config.seed, deepspeed=deepspeed)
    critic = reference = teacher = None
    if any(stage.algorithm.critic is not None for stage in Pipeline.of(composed.algorithm).stages.values()):
        critic = CriticEngine(config.model, config.critic, config.optimizer, world, deepspeed)
    frozen = {
        name: ReferencePolicy(one.model, world, temperature, key=one.key, deepspeed=deepspeed)
        for name, one in frozen_models(config, needs).items()
    }
    if needs.reference:
        reference = frozen.get("reference") or BasePolicy(policy)
    if needs.teacher and config.teacher.self and config.teacher.weights == "present":
        teacher = policy
    elif needs.teacher:
        # A teacher without weights of its own is the reference policy's model, or the policy's without adapters.
        is_base = teacher_model(config) is None
        teacher = BasePolicy(policy) if is_base else frozen.get("teacher", frozen.get("reference"))
    return Models(policy, critic, reference, teacher)


def _sampler(config: Any) -> Any:
    from experiments.run.prepare import load_sampler

    length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    return load_sampler(config.model, config.rollout, length, config.seed, config.rollout.tensor_parallel)


def _finish(path: Path, ending: Any, say: Any) -> None:
    """Print the table and write the report, with what there is if the run stopped early."""
    from experiments.grid import print_table
    from experiments.report.page import write_report
    from upge.train.files import read_lines
    from upge.train.folder import RunFolder

    try:
        evaluations = read_lines(path / "evaluations.jsonl") if (path / "evaluations.jsonl").is_file() else []
        if len(evaluations) > 1:
            print_table(evaluations[0], evaluations[-1])
        if (path / "metrics.jsonl").is_file():
            say(f"report: {write_report(path)}")
        best = RunFolder(path).best_metadata
        if best:
            say(f"best:   {path / 'best'}, step {best['step']}, mean@{best['samples']} {100 * best['mean']:.1f} %")
    except Exception as error:  # whatever it is, the run itself has ended as its exit code says
        reason = (str(error).splitlines() or [""])[0]
        say(f"report: failed ({type(error).__name__}: {reason}); python -m experiments.report {path} tries again")
    if ending.code == BAD_INPUT:
        print_error(ending.reason)
    if ending.code:
        reason = "stopped before the next update" if ending.code == BAD_INPUT else ending.reason
        say(f"{reason}; the same command with output={path} continues it")
    else:
        say(f"model:  {path / 'final'}")


def _metadata(composed: Any, world: World, sampler: Any, engine: Any, from_step: int) -> dict[str, Any]:
    """run.json: how this run was made."""
    from upge.models.loading import attention_sizes
    from upge.train.faults import NONE
    from upge.train.packed_attention import kernel_name

    *_, head_size = attention_sizes(engine.network.config)
    fault = composed.config.fault
    return {
        "command": files.command("experiments.run", sys.argv[1:]),
        "started": files.now(),
        "from_step": from_step,
        "names": dict(composed.names),
        **({} if fault == NONE else {"fault": fault}),
        "seed": composed.config.seed,
        "world_size": world.size,
        "device": str(world.device.type),
        "machine": files.machine(),
        "engine": sampler.name,
        "engine_reason": sampler.reason,
        "attention": kernel_name(world.device, composed.config.model.dtype, head_size),
        "parameters": engine.parameters,
        "formula_text": composed.algorithm.formula(),
        "formula_latex": composed.algorithm.formula("latex"),
        "versions": files.versions(),
        "git_commit": files.git_commit(),
    }
