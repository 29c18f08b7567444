"""What an evaluation prints: its plan, its progress, its table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from experiments.cli import help_row
from experiments.config import presets, suite_config
from experiments.evaluate.settings import keys
from upge.evaluation import Sample
from upge.evaluation.evaluator import Questions
from upge.evaluation.scores import NONE, same_answer

USAGE = """\
Usage: python -m experiments.evaluate model=NAME|PATH suite=NAME|FILE [key=value ...] [--dry-run]

Samples responses to the problems of a suite's benchmarks, verifies them, and leaves a folder with config.yaml,
run.json, samples/BENCHMARK.jsonl (one line per response) and scores.json. The same command with output=FOLDER continues
an interrupted evaluation. --dry-run checks everything that can be checked before sampling, prints the benchmarks and
one prompt, and exits.
"""


def help_text() -> str:
    """What --help prints, at most 120 columns wide."""
    models = ", ".join(presets("model"))
    lines = [USAGE, f"Models (model=NAME, a folder, or a hub name): {models}\n", "Suites (suite=NAME):"]
    for name in presets("suite"):
        suite = suite_config(name)
        drawn = f"temperature {suite.temperature:g}" if suite.temperature else "greedy"
        lines.append(help_row(name, f"{', '.join(suite.benchmarks)}; {drawn}, {suite.max_response_tokens} tokens"))
    lines.append("\nKeys, with their defaults (a suite's file and a model's preset set others):")
    for key, default, meaning in keys():
        shown = default if isinstance(default, str) and default else json.dumps(default)
        lines.append(help_row(f"{key}={shown}", meaning))
    return "\n".join(lines)


def plan(questions: Sequence[Questions], max_response_tokens: int) -> str:
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
    rows: list[Sequence[Any]] = [("benchmark", "problems", "n", "avg@n, %", "pass@n, %", "cut off", "not verified")]
    for group, average in scores["averages"].items():
        for name in average["benchmarks"]:
            one = scores["benchmarks"][name]
            cut = f"{100 * one['unfinished']:.1f} %"
            rows.append((name, *_accuracy(one), cut, one["timeouts"] + one["errors"]))
            rows += [(f"  {level}", *_accuracy(part), "", "") for level, part in one["levels"].items()]
        rows.append((f"{group}, average", "", "", _interval(average["avg"]), "", "", ""))
    return "\n".join([_columns(rows), *(f"note: {note}" for note in answer_notes(scores))])


def answer_notes(scores: Mapping[str, Any]) -> list[str]:
    """Notes on benchmarks in which most responses give the same answer; older scores.json files lack this number."""
    benchmarks = scores["benchmarks"].items()
    sentences = ((name, same_answer(one.get("commonest", NONE), one["problems"])) for name, one in benchmarks)
    return [f"{name}: {sentence}" for name, sentence in sentences if sentence]


class Progress:
    """A bar over the responses of an evaluation; a context manager."""

    def __init__(self, total: int, done: int) -> None:
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=total, initial=done, unit="response", mininterval=interval, dynamic_ncols=True)
        self._right = self._seen = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def begin(self, name: str) -> None:
        """Starts the next benchmark."""
        self._right = self._seen = 0
        self._bar.set_description(name, refresh=False)

    def wrote(self, sample: Sample) -> None:
        """Counts a response that has been verified and written."""
        self._seen += 1
        self._right += sample.correct
        self._bar.set_postfix({"right": f"{100 * self._right / self._seen:.1f} %"}, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line to standard output without breaking the bar."""
        tqdm.write(text)
        sys.stdout.flush()


def _columns(rows: Sequence[Sequence[Any]]) -> str:
    """Aligns cells in columns; columns of numbers are right-aligned."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    right = [all(isinstance(row[i], int) or row[i] == "" for row in rows[1:]) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{cell!s:{'>' if right[i] else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _accuracy(one: Mapping[str, Any]) -> tuple[int, int, str, str]:
    """Problems, samples, avg@n and pass@n; with one sample the two are the same."""
    n = one["samples"]
    # Read back from a file, the numbers of responses are texts.
    passed = {int(k): interval for k, interval in one["pass_at"].items()}[n]
    return one["problems"], n, _interval(one["avg"]), _interval(passed) if n > 1 else ""


def _interval(one: Mapping[str, float]) -> str:
    return f"{100 * one['value']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
