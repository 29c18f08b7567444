"""Evaluate: `python -m experiments.evaluate model=runs/my-run/final suite=paper`; `--help` lists every key."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm import tqdm

from experiments import cli
from experiments.files import command, git_commit, machine, now, versions
from upge.train.distributed import leave

USAGE = """\
Usage: python -m experiments.evaluate model=NAME|PATH suite=NAME|FILE [key=value ...] [--dry-run]

Samples responses to the problems of a suite's benchmarks, verifies them, and leaves a folder with config.yaml,
run.json, samples/BENCHMARK.jsonl (one line per response) and scores.json. The same command with output=FOLDER continues
an interrupted evaluation. --dry-run checks everything that can be checked before sampling, prints the benchmarks and
one prompt, and exits.
"""

#: What most evaluations set, in the order of `--help`.
COMMON = (
    *("output", "resume", "limit", "seed", "suite.temperature", "suite.top_p", "suite.max_prompt_tokens"),
    *("suite.max_response_tokens", "suite.folder", "suite.skip", "suite.benchmarks.NAME.samples"),
    *("rollout.engine", "rollout.memory_fraction", "model.dtype", "model.template", "verify.verifier"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 failed, 2 bad input, 3 not finite, 128 + signal)."""
    code = cli.run_command(_stoppable, arguments, help_text)
    if arguments is None:
        leave(None, code)
    return code


def help_text(everything: bool = False) -> str:
    """What `--help` prints, or `--help all`, at most 120 columns wide."""
    from experiments.config import presets, suite_config
    from experiments.evaluate.prepare import keys
    from experiments.keys import shown

    models = textwrap.fill(f"Models (model=NAME, a folder, or a hub name): {', '.join(presets('model'))}", 120)
    lines = [USAGE, f"{models}\n", "Suites (suite=NAME):"]
    for name in presets("suite"):
        suite = suite_config(name)
        drawn = f"temperature {suite.temperature:g}" if suite.temperature else "greedy"
        lines.append(cli.help_row(name, f"{', '.join(suite.benchmarks)}; {drawn}, {suite.max_response_tokens} tokens"))
    lines.append("\nKeys, with their defaults (a suite's file and a model's preset set others):")
    rows = [(key, f"{key}={shown(default)}", meaning) for key, default, meaning in keys()]
    return "\n".join([*lines, *cli.common_rows(rows, [key for key, *_ in rows] if everything else COMMON)])


def _stoppable(arguments: list[str]) -> int:
    arguments, given = cli.flags(arguments, "--dry-run")
    with cli.stopped_by_signals():
        return _evaluate(arguments, dry_run=given["--dry-run"])


def _evaluate(arguments: Sequence[str], dry_run: bool) -> int:
    from experiments.evaluate.prepare import choose, prepare

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
    with folder.locked():
        # Another evaluation may have begun or ended in the folder since it was checked.
        continues = folder.open(chosen.tree, chosen.config.resume)
        return _evaluate_into(folder, chosen, replace(prepared, continues=continues), arguments)


def _evaluate_into(folder: Any, chosen: Any, prepared: Any, arguments: Sequence[str]) -> int:
    """Sample what is missing in the folder and score it."""
    from upge.evaluation.scores import suite_scores

    benchmarks = [one.benchmark for one in prepared.questions]
    left = sum(len(one.missing(folder.samples(one.benchmark.name))) for one in prepared.questions)
    total = sum(one.responses for one in benchmarks)
    if prepared.continues:
        print(f"continuing {folder.path}: {total - left} of {total} responses are there", flush=True)
    try:
        if left:
            with _failures_explained(folder):
                _sample(chosen, prepared, total, left, arguments)
        else:
            # scores.json may get new benchmarks, and config.yaml must match it.
            folder.start(chosen.tree, _metadata(chosen, prepared, arguments))
    except cli.Stopped:
        print(f"complete results are saved; the same command with output={folder.path} continues", flush=True)
        raise
    groups = {one.name: one.group for one in benchmarks}
    outcomes = [_outcomes(one, folder) for one in benchmarks]
    scores = suite_scores(outcomes, groups, _how(chosen)) | _fault(prepared.model.path)
    folder.finish(scores)
    print(table(scores))
    print(f"scores: {folder.path / 'scores.json'}", flush=True)
    return 0


@contextmanager
def _failures_explained(folder: Any) -> Iterator[None]:
    """Add to the error of a failed engine or a full memory how to continue.

    Raises:
        CapacityError: the memory is used up.
        EngineError: the engine failed.
    """
    from upge.errors import CapacityError, EngineError, is_out_of_memory
    from upge.trees import first_line

    fix = f"the same command with output={folder.path} continues"
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{error}; {fix}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lower = "lower rollout.memory_fraction or rollout.max_sequences (for vLLM), or free memory"
        raise CapacityError(f"out of memory ({first_line(error)}); {lower}; {fix}") from error


def _sample(chosen: Any, prepared: Any, total: int, missing: int, arguments: Sequence[str]) -> None:
    """Sample the missing responses."""
    from experiments.evaluate.prepare import check_unchanged
    from experiments.run.prepare import load_sampler, verifier_pool
    from upge.evaluation.evaluator import Evaluator
    from upge.rollout.verified_sampling import FirstError, VerifiedSampler

    config, folder = chosen.config, prepared.folder
    length = config.suite.max_prompt_tokens + config.suite.max_response_tokens
    with verifier_pool(prepared.verifiers, config.verify) as pool:
        sampler = load_sampler(prepared.model, config.rollout, length, config.seed)
        print(f"rollouts: {sampler.reason}", flush=True)
        check_unchanged(prepared)
        others = folder.start(chosen.tree, _metadata(chosen, prepared, arguments, sampler))
        if others and missing < total:
            print(f"note: earlier responses in {folder.path} were drawn with {', '.join(others)}", flush=True)
        with Progress(total, total - missing) as progress:
            first_error = FirstError(partial(tqdm.write, file=sys.stderr))
            passing = {"pass_threshold": config.verify.pass_threshold, "success": config.verify.success}
            verified = VerifiedSampler(sampler, pool, prepared.prompting, first_error, **passing)
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


def _fault(model: str) -> dict[str, str]:
    """The fault that the model was trained with, for comparisons to show; empty without one."""
    from upge.train.faults import NONE, marked

    found = marked(model)
    return {} if found == NONE else {"fault": found}


def _how(chosen: Any) -> dict[str, Mapping[str, Any]]:
    """Benchmark → the settings that must match for its scores to be comparable between models."""
    from upge.views import PASS_THRESHOLD

    suite, default = chosen.config.suite, chosen.config.verify.verifier
    drawn = {"temperature": suite.temperature, "top_p": suite.top_p if suite.temperature else 1.0}
    drawn["max_response_tokens"] = suite.max_response_tokens
    if chosen.config.verify.pass_threshold != PASS_THRESHOLD:
        drawn["pass_threshold"] = chosen.config.verify.pass_threshold
    if chosen.config.verify.success:
        drawn["success"] = chosen.config.verify.success
    own = {name: (one.verifier or default, one.instruction) for name, one in suite.chosen().items()}
    return {name: {**drawn, "verifier": v, "instruction": text} for name, (v, text) in own.items()}


def _metadata(chosen: Any, prepared: Any, arguments: Sequence[str], sampler: Any = None) -> dict[str, Any]:
    """run.json: how this evaluation was made; without a sampler nothing was sampled."""
    from upge.models.loading import has_cuda

    return {
        "command": command("experiments.evaluate", arguments),
        "started": now(),
        "names": dict(chosen.names),
        "seed": chosen.config.seed,
        "device": "cuda" if has_cuda() else "cpu",
        "machine": machine(),
        "engine": sampler and sampler.name,
        "engine_reason": sampler and sampler.reason,
        "weights": prepared.weights,
        "stop_token_ids": list(prepared.prompting.stop_token_ids),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def plan(questions: Sequence[Any], max_response_tokens: int) -> str:
    """A table of the benchmarks and how many responses each will get."""
    head = ("benchmark", "group", "problems", "samples", "responses", "longest prompt", "verifier")
    rows = []
    for one in questions:
        benchmark, longest = one.benchmark, max(map(len, one.prompt_ids))
        size = str(len(benchmark.problems))
        if benchmark.available > len(benchmark.problems):
            size += f" of {benchmark.available}"
        verifiers = ", ".join(dict.fromkeys(str(p.verifier) for p in benchmark.problems))
        rows.append((benchmark.name, benchmark.group, size, benchmark.samples, benchmark.responses, longest, verifiers))
    total = sum(row[4] for row in rows)
    return f"{_columns([head, *rows])}\n{total} responses, at most {total * max_response_tokens} tokens"


def table(scores: Mapping[str, Any]) -> str:
    """The table of scores.json, in percent with 95 % intervals."""
    from experiments.evaluate.folder import answer_notes

    rows: list[Sequence[Any]] = [("benchmark", "problems", "n", "avg@n, %", "pass@n, %", "cut off", "not verified")]
    for group, average in scores["averages"].items():
        for name in average["benchmarks"]:
            one = scores["benchmarks"][name]
            cut = f"{100 * one['unfinished']:.1f} %"
            rows.append((name, *_accuracy(one), cut, one["timeouts"] + one["errors"]))
            rows += [(f"  {level}", *_accuracy(part), "", "") for level, part in one["levels"].items()]
        rows.append((f"{group}, average", "", "", _interval(average["avg"]), "", "", ""))
    return "\n".join([_columns(rows), *(f"note: {note}" for note in answer_notes(scores))])


class Progress:
    """A bar over the responses of an evaluation; a context manager."""

    def __init__(self, total: int, done: int) -> None:
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=total, initial=done, unit="response", mininterval=interval, dynamic_ncols=True)
        self._right = self._seen = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def begin(self, name: str) -> None:
        """Start the next benchmark."""
        self._right = self._seen = 0
        self._bar.set_description(name, refresh=False)

    def wrote(self, sample: Any) -> None:
        """Count a response that has been verified and written."""
        self._seen += 1
        self._right += sample.correct
        self._bar.set_postfix({"right": f"{100 * self._right / self._seen:.1f} %"}, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a line to standard output without breaking the bar."""
        tqdm.write(text)
        sys.stdout.flush()


def _columns(rows: Sequence[Sequence[Any]]) -> str:
    """Align cells in columns; columns of numbers are right-aligned."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    right = [all(isinstance(row[i], int) or row[i] == "" for row in rows[1:]) for i in range(len(rows[0]))]
    lines = ([f"{cell!s:{'>' if right[i] else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def _accuracy(one: Mapping[str, Any]) -> tuple[int, int, str, str]:
    """Problems, samples, avg@n and pass@n; with one sample the two are the same."""
    n = one["samples"]
    # Read back from a file, the numbers of responses are texts.
    passed = {int(k): interval for k, interval in one["pass_at"].items()}[n]
    return one["problems"], n, _interval(one["avg"]), _interval(passed) if n > 1 else ""


def _interval(one: Mapping[str, float]) -> str:
    return f"{100 * one['value']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


if __name__ == "__main__":
    sys.exit(main())
