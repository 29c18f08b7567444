"""Evaluate: `python -m experiments.evaluate model=runs/my-run/final suite=paper`; `--help` lists every key."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import cli
from experiments.files import command, git_commit, machine, now, versions
from upge.train.distributed import leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 bad input, 128 + signal)."""
    code = cli.run_command(_stoppable, arguments, _help_text)
    if arguments is None:
        leave(None, code)
    return code


def _help_text() -> str:
    from experiments.evaluate.show import help_text

    return help_text()


def _stoppable(arguments: list[str]) -> int:
    arguments, given = cli.flags(arguments, "--dry-run")
    with cli.stopped_by_signals():
        return _evaluate(arguments, dry_run=given["--dry-run"])


def _evaluate(arguments: Sequence[str], dry_run: bool) -> int:
    from experiments.evaluate.prepare import prepare
    from experiments.evaluate.settings import choose
    from experiments.evaluate.show import plan, table
    from upge.evaluation.scores import suite_scores

    chosen = choose(arguments)
    prepared = prepare(chosen)
    folder, benchmarks = prepared.folder, [one.benchmark for one in prepared.questions]
    print(f"{chosen.names['model']} on {chosen.names['suite']} → {folder.path}")
    for note in prepared.notes:
        print(f"note: {note}")
    print(plan(prepared.questions, chosen.config.suite.max_response_tokens))
    print(prepared.prompting.describe(benchmarks[0].problems[0]), flush=True)
    if dry_run:
        return 0
    left = sum(len(one.missing(folder.samples(one.benchmark.name))) for one in prepared.questions)
    total = sum(one.responses for one in benchmarks)
    if prepared.continues:
        print(f"continuing {folder.path}: {total - left} of {total} responses are there", flush=True)
    try:
        if left:
            _sample(chosen, prepared, total, left, arguments)
        else:
            # scores.json may get new benchmarks, and config.yaml must match it.
            folder.start(chosen.tree, _facts(chosen, prepared, arguments))
    except cli.Stopped:
        print(f"complete results are saved; the same command with output={folder.path} continues", flush=True)
        raise
    groups = {one.name: one.group for one in benchmarks}
    outcomes = [_outcomes(one, folder) for one in benchmarks]
    scores = suite_scores(outcomes, groups, _how(chosen))
    folder.finish(scores)
    print(table(scores))
    print(f"scores: {folder.path / 'scores.json'}", flush=True)
    return 0


def _sample(chosen: Any, prepared: Any, total: int, missing: int, arguments: Sequence[str]) -> None:
    """Samples the missing responses."""
    from experiments.evaluate.prepare import check_unchanged
    from experiments.evaluate.show import Progress
    from upge import rollout
    from upge.evaluation.evaluator import Evaluator
    from upge.rollout.verified_sampling import VerifiedSampler
    from upge.verify import VerifierPool

    config, folder = chosen.config, prepared.folder
    limits = (config.verify.workers, config.verify.time_limit, config.verify.memory_limit)
    with VerifierPool(prepared.verifiers, *limits) as pool:
        sampler = rollout.load(
            config.rollout.engine,
            prepared.model.path,
            dtype=prepared.model.dtype,
            max_length=config.suite.max_prompt_tokens + config.suite.max_response_tokens,
            memory_fraction=config.rollout.memory_fraction,
            seed=config.seed,
            overrides=prepared.model.overrides,
        )
        print(f"rollouts: {sampler.reason}", flush=True)
        check_unchanged(prepared)
        others = folder.start(chosen.tree, _facts(chosen, prepared, arguments, sampler))
        if others and missing < total:
            print(f"note: earlier responses in {folder.path} were drawn with {', '.join(others)}", flush=True)
        with Progress(total, total - missing) as progress:
            verified = VerifiedSampler(sampler, pool, prepared.prompting)
            evaluator = Evaluator(verified, prepared.sampling, config.seed, progress.wrote)
            for questions in prepared.questions:
                name = questions.benchmark.name
                progress.begin(name)
                evaluator.run(questions, folder.samples(name))
                average = _outcomes(questions.benchmark, folder).average().mean().item()
                progress.say(f"{name}: avg@{questions.benchmark.samples} {100 * average:.1f} %")
        sampler.close()


def _outcomes(benchmark: Any, folder: Any) -> Any:
    from upge.evaluation.scores import Outcomes

    ids = [problem.id for problem in benchmark.problems]
    return Outcomes.of(benchmark.name, folder.samples(benchmark.name).read(), benchmark.samples, ids)


def _how(chosen: Any) -> dict[str, Mapping[str, Any]]:
    """Benchmark → the settings that must match for its scores to be comparable between models."""
    suite = chosen.config.suite
    drawn = {
        "temperature": suite.temperature,
        "top_p": suite.top_p if suite.temperature else 1.0,
        "max_response_tokens": suite.max_response_tokens,
    }
    settings = {}
    for name, one in suite.chosen().items():
        verifier = one.verifier or chosen.config.verify.verifier
        settings[name] = {**drawn, "verifier": verifier, "instruction": one.instruction}
    return settings


def _facts(chosen: Any, prepared: Any, arguments: Sequence[str], sampler: Any = None) -> dict[str, Any]:
    """run.json: how this evaluation was made; without a sampler nothing was sampled."""
    import torch

    return {
        "command": command("experiments.evaluate", arguments),
        "started": now(),
        "names": dict(chosen.names),
        "seed": chosen.config.seed,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "machine": machine(),
        "engine": sampler and sampler.name,
        "engine_reason": sampler and sampler.reason,
        "weights": prepared.weights,
        "stop_token_ids": list(prepared.prompting.stop_token_ids),
        "versions": versions(),
        "git_commit": git_commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
