"""GSM8K in its own format: grade-school word problems whose worked solutions serve as demonstrations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upge.checks import check_fields
from upge.data import columns as cells
from upge.data.files import Record, read_file, read_hub
from upge.data.splits import Problem, Splits, check_disjoint, check_sizes, divide
from upge.errors import DataError

HUB, SUBSET = "openai/gsm8k", "main"
TRAIN_FILE, EVALUATION_FILE = "train.jsonl", "test.jsonl"

#: Approximate share of a single file that is for evaluation.
EVALUATION_SHARE = 0.1

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")


@dataclass(frozen=True)
class GSM8K:
    r"""Rows with `question` and `answer`, where `answer` is a worked solution followed by `####` and the final number.

    The demonstration is the worked solution without its calculator annotations (`<<48/2=24>>`), followed by the final
    number, without thousands commas, in a box on a line of its own.

    GSM8K itself has no preference pairs. A file of the same format may have them: the text in a row's column
    `rejected`, which has the form of `answer`, becomes the rejected response.

    Attributes:
        path: a folder with train.jsonl and test.jsonl (training and evaluation), or one file. Of one file, a tenth of
            the questions is for evaluation. A hash of the question alone decides which (see `upge.data.splits`). None
            loads GSM8K from the hub (openai/gsm8k).
        train_size, evaluation_size: number of rows to take from the beginning of each side; None takes all.

    Raises:
        ConfigError: a size is below 1, or (by `load`) a package is missing.
        DataError: (by `load`) a file is missing, empty or not JSON lines, a row lacks a column or the `####`, or a
            question is on both sides, with file and line; or the hub cannot be reached.
    """

    path: str | None = None
    train_size: int | None = None
    evaluation_size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_sizes(self.train_size, self.evaluation_size)

    def load(self) -> Splits:
        """Read the files, or the hub's two splits. Rows keep their order."""
        path = Path(self.path).expanduser() if self.path else None
        if path is None or path.is_dir():
            train, evaluation = _sides(path)
            check_disjoint(train, evaluation, "remove one of the two")
        else:
            fix = f"give more rows, or a folder with {TRAIN_FILE} and {EVALUATION_FILE}"
            train, evaluation = divide(_problems(path.name, read_file(path)), EVALUATION_SHARE, str(path), fix)
        return Splits(tuple(train[: self.train_size]), tuple(evaluation[: self.evaluation_size]))


def _sides(folder: Path | None) -> list[list[Problem]]:
    if folder is None:
        return [_problems(f"{HUB}/{split}", read_hub(HUB, SUBSET, split)) for split in ("train", "test")]
    return [_problems(name, read_file(folder / name)) for name in (TRAIN_FILE, EVALUATION_FILE)]


def _problems(name: str, records: Sequence[Record]) -> list[Problem]:
    return [_as_problem(record, name) for record in records]


def _as_problem(record: Record, name: str) -> Problem:
    question = cells.text(record, "question").strip()
    answer, demonstration = _solution(record, "answer")
    rejected = _solution(record, "rejected")[1] if cells.has(record, "rejected") else None
    if rejected == demonstration:
        raise DataError(f"{record.where}: the columns 'answer' and 'rejected' are equal; a pair needs two responses")
    return Problem(
        id=f"{name}:{record.number}",
        prompt=question,
        answer=answer,
        demonstrations=(demonstration,),
        where=record.where,
        rejected=rejected,
    )


def _solution(record: Record, column: str) -> tuple[str, str]:
    """(final number, response) of the worked solution in a column."""
    worked, mark, last = cells.text(record, column).rpartition("####")
    number = _THOUSANDS.sub("", last.strip())
    if not mark or not number:
        fault = "nothing after" if mark else "no"
        raise DataError(
            f"{record.where}: {fault} '####' in the column '{column}'; expected a worked solution, '####' and the "
            "number"
        )
    return number, f"{_ANNOTATION.sub('', worked).strip()}\n\\boxed{{{number}}}".lstrip()
