"""Check that verifiers accept right answers: `python -m experiments.check_answers FILE ... | folder=DIR [--docs]`.

Every ground truth of a data file is verified against itself, in a box, and every worked solution against its ground
truth. Failures are printed with the reason. The files are JSON, JSON Lines or Parquet; their columns determine the
format (`LAYOUTS`). `folder=` takes all such files below a folder; --docs writes the result into docs/verification.md.
Twenty thousand answers take about a minute. The result is deterministic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.files import DOCS, replace_block
from experiments.grid import markdown_table
from upge.errors import ConfigError, DataError, UserError
from upge.verify import Item, Verdict, VerifierPool, last_boxed, load

PAGE = DOCS / "verification.md"
BEGIN = "<!-- checked: begin (python -m experiments.check_answers folder=DIR --docs) -->"
END = "<!-- checked: end -->"
SUFFIXES = (".json", ".jsonl", ".parquet")
TIME_LIMIT = 30.0
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """Something that must verify.

    Attributes:
        row: its number in the file, from 1.
        what: "ground truth" or a kind of worked solution.
        item: the input of the verifier pool.
    """

    row: int
    what: str
    item: Item


@dataclass(frozen=True)
class Result:
    """A file with its cases and their verdicts, in order."""

    name: str
    cases: tuple[Case, ...]
    verdicts: tuple[Verdict, ...]

    def pairs(self) -> Iterator[tuple[Case, Verdict]]:
        """The cases with their verdicts."""
        return zip(self.cases, self.verdicts, strict=True)

    def failures(self) -> Iterator[tuple[Case, Verdict]]:
        """The cases without the full reward."""
        return ((case, verdict) for case, verdict in self.pairs() if verdict.reward != 1.0)


def _gsm8k(row: Row) -> list[tuple[str, Item]]:
    worked, _, number = (part.strip() for part in row["answer"].rpartition("####"))
    boxed = rf"{worked} \boxed{{{number}}}"
    responses = [("solution with ####", row["answer"], name) for name in ("math_last", "number")]
    responses += [("solution with a box", boxed, name) for name in ("math", "math_last", "number")]
    return [(what, Item(text, number, row["question"], name)) for what, text, name in responses]


def _math(row: Row) -> list[tuple[str, Item]]:
    prompt, answer = row["problem"], row["answer"]
    return _own(prompt, answer, "math") + [("solution", Item(row["solution"], answer, prompt))]


def _openr1(row: Row) -> list[tuple[str, Item]]:
    prompt, answer = row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]
    return _own(prompt, answer, "math") + [("solution", Item(row["target"][0]["content"], answer, prompt))]


def _plain(row: Row) -> list[tuple[str, Item]]:
    prompt, answer = row["prompt"], str(row["answer"])
    is_choice = len(answer) == 1 and f"\n{answer})" in prompt
    return _own(prompt, answer, "choice" if is_choice else "math")


def _own(prompt: str, answer: str, verifier: str) -> list[tuple[str, Item]]:
    return [("ground truth", Item(rf"\boxed{{{answer}}}", answer, prompt, verifier))]


LAYOUTS: dict[tuple[str, ...], Callable[[Row], list[tuple[str, Item]]]] = {
    ("question", "answer"): _gsm8k,
    ("problem", "solution", "answer"): _math,
    ("prompt", "target", "reward_model"): _openr1,
    ("prompt", "answer"): _plain,
}


def read(path: Path) -> tuple[Case, ...]:
    """The cases of a file.

    Raises:
        DataError: the file cannot be read, or its columns match none of `LAYOUTS`.
    """
    try:
        rows = _rows(path)
        made = next((make for columns, make in LAYOUTS.items() if rows and all(c in rows[0] for c in columns)), None)
        if made is None:
            known = "; ".join(", ".join(columns) for columns in LAYOUTS)
            columns = ", ".join(rows[0]) if rows else "of no row"
            raise DataError(f"{path}: found the columns {columns}; known are: {known}")
        return tuple(Case(number, what, item) for number, row in enumerate(rows, 1) for what, item in made(row))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _rows(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return json.loads(text)


def check(files: Mapping[str, Path], workers: int = 2) -> list[Result]:
    """Verify the files; `files` maps the displayed name to the path."""
    cases = {name: read(path) for name, path in files.items()}
    with VerifierPool(("math", "math_last", "number", "choice"), workers, TIME_LIMIT) as pool:
        return [Result(name, own, tuple(pool.score(case.item for case in own))) for name, own in cases.items()]


def reason(case: Case, verdict: Verdict) -> str:
    """Why a case has failed, as far as the texts show."""
    answer = case.item.answer
    if "matrix" in answer and _letters(answer) == _letters(verdict.extracted or ""):
        return "the ground truth has lost a separator of rows"
    try:
        load(case.item.verifier or "math").check_answer(answer)
    except ValueError:
        if not answer.strip():
            return "the ground truth is empty"
        if last_boxed(rf"\boxed{{{answer}}}") is None:
            return "the braces of the ground truth do not match"
        return "the ground truth cannot be parsed as mathematics"
    if verdict.status != "ok":
        return verdict.detail
    if verdict.extracted is None:
        return "no answer was found"
    return "ground truth and answer differ"


def _letters(text: str) -> str:
    return "".join(text.split()).replace("\\\\", "\\").replace("}\\\\", "}").replace("\\", "")


def report(results: Sequence[Result]) -> str:
    """Two Markdown tables: how many cases of each kind verify, and each failure with its reason."""
    rows, failed = [], []
    for result in results:
        counts: dict[tuple[str, str], list[bool]] = {}
        for case, verdict in result.pairs():
            counts.setdefault((case.what, case.item.verifier or "math"), []).append(verdict.reward == 1.0)
        for (what, verifier), right in counts.items():
            rows.append([result.name, what, f"`{verifier}`", sum(right), len(right)])
        for case, verdict in result.failures():
            cells = (_code(case.item.answer), _code(verdict.extracted or ""), reason(case, verdict))
            failed.append([f"{result.name}, {case.row}", case.what, *cells])
    return "\n\n".join([
        markdown_table(["file", "what", "verifier", "right", "of"], rows),
        markdown_table(["file, row", "what", "ground truth", "answer read", "reason"], failed),
    ])  # fmt: skip


def _code(text: str) -> str:
    return f"`{text.replace('|', '¦')}`" if text else ""


def updated(page: str, results: Sequence[Result]) -> str:
    """The text of the page with the tables between its markers updated.

    Raises:
        ConfigError: a marker is missing.
    """
    return replace_block(page, PAGE.name, BEGIN, END, f"\n\n{report(results)}\n\n", "where the tables go")


def find(arguments: Sequence[str]) -> dict[str, Path]:
    """The files that the arguments name: displayed name → path.

    Raises:
        ConfigError: there is no such file or folder, or no data file is named.
    """
    files: dict[str, Path] = {}
    for argument in arguments:
        folder = Path(argument.removeprefix("folder=")).expanduser()
        if not argument.startswith("folder="):
            files[Path(argument).name] = Path(argument).expanduser()
            continue
        if not folder.is_dir():
            raise ConfigError(f"folder: there is no folder '{folder}'")
        below = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
        files |= {path.relative_to(folder).as_posix(): path for path in below}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing or not files:
        problem = f"there is no file '{missing[0]}'" if missing else "no data file is named"
        raise ConfigError(f"{problem}; give FILE ... or folder=DIR with {', '.join(SUFFIXES)} files")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or update the page; return the exit code, 2 on bad input."""
    return cli.run_command(_check_answers, arguments, lambda everything: str(__doc__))


def _check_answers(arguments: list[str]) -> int:
    files, given = cli.flags(arguments, "--docs")
    results = check(find(files))
    if given["--docs"]:
        PAGE.write_text(updated(PAGE.read_text("utf-8"), results), "utf-8")
    else:
        print(report(results))
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
