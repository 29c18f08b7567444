"""GSM8K in its own files: grade-school word problems whose worked solutions serve as demonstrations."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upge.checks import check_fields
from upge.data.jsonl import Row, read_rows
from upge.data.problem import Problem, Splits
from upge.errors import ConfigError, DataError

TRAIN_FILE, EVALUATION_FILE = "train.jsonl", "test.jsonl"

#: Of a single file, one question in this many is for evaluation.
EVALUATION_EVERY = 10

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")


@dataclass(frozen=True)
class GSM8K:
    r"""Rows with `question` and `answer`, where `answer` is a worked solution, then `####` and the final number.

    The demonstration is the worked solution without its calculator annotations (`<<48/2=24>>`), then the final number,
    without thousands commas, in a box on a line of its own.

    GSM8K itself has no preference pairs. A file of its form may have them: where a row has a column `rejected`, that
    text, written just as `answer` is, becomes the rejected response.

    Fields:
        path: a folder with train.jsonl and test.jsonl (training and evaluation), or one file. Of one file, a question
            is for evaluation if the SHA-256 of its text, its white space made single, is divisible by 10: where a
            question goes depends on nothing else in the file.
        train_size, evaluation_size: take only the first so many rows of each side; None takes all.

    Raises:
        ConfigError: no path was given, or a size is below 1.
        DataError: (by `load`) a file is missing, empty or not JSON lines, a row lacks a column or the `####`, or a
            question is on both sides; with file and line.
    """

    path: str | None = None
    train_size: int | None = None
    evaluation_size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for key in ("train_size", "evaluation_size"):
            size = getattr(self, key)
            if size is not None and size < 1:
                raise ConfigError(f"data.{key}: found {size}; give a number of at least 1, or null for all rows")

    def load(self) -> Splits:
        """Reads the files; rows keep their order."""
        if not self.path:
            raise ConfigError(
                f"data.path is not set; give the folder that holds GSM8K's {TRAIN_FILE} and {EVALUATION_FILE}, or one "
                "such file, for example data.path=data/gsm8k"
            )
        path = Path(self.path).expanduser()
        if path.is_dir():
            train, evaluation = _read(path / TRAIN_FILE), _read(path / EVALUATION_FILE)
            _check_disjoint(train, evaluation)
        else:
            train, evaluation = _divide(_read(path), path)
        return Splits(tuple(train[: self.train_size]), tuple(evaluation[: self.evaluation_size]))


def _read(path: Path) -> list[Problem]:
    return [_as_problem(row, path) for row in read_rows(path, ("question", "answer"), optional=("rejected",))]


def _as_problem(row: Row, path: Path) -> Problem:
    answer, demonstration = _solution(row, "answer")
    rejected = _solution(row, "rejected")[1] if "rejected" in row.columns else None
    if rejected == demonstration:
        raise DataError(f"{row.where}: the columns 'answer' and 'rejected' say the same; a pair needs two responses")
    return Problem(
        id=f"{path.name}:{row.line}",
        prompt=row.columns["question"].strip(),
        answer=answer,
        demonstration=demonstration,
        level=None,
        where=row.where,
        rejected=rejected,
    )


def _solution(row: Row, column: str) -> tuple[str, str]:
    """The final number of a column, and the response that it makes."""
    worked, mark, last = row.columns[column].rpartition("####")
    number = _THOUSANDS.sub("", last.strip())
    if not mark or not number:
        found = "nothing after" if mark else "no"
        raise DataError(
            f"{row.where}: {found} '####' in the column '{column}'; expected a worked solution, '####' and the number"
        )
    return number, f"{_ANNOTATION.sub('', worked).strip()}\n\\boxed{{{number}}}".lstrip()


def _is_for_evaluation(question: str) -> bool:
    digest = hashlib.sha256(_normal(question).encode()).digest()
    return int.from_bytes(digest, "big") % EVALUATION_EVERY == 0


def _normal(question: str) -> str:
    return " ".join(question.split())


def _divide(problems: Sequence[Problem], path: Path) -> tuple[list[Problem], list[Problem]]:
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        sides[_is_for_evaluation(problem.prompt)].append(problem)
    for side, name in zip(sides, ("training", "evaluation"), strict=True):
        if not side:
            raise DataError(
                f"{path}: none of its {len(problems)} rows falls on the {name} side (one question in "
                f"{EVALUATION_EVERY} is for evaluation, by a hash of its text); give more rows, or a folder with "
                f"{TRAIN_FILE} and {EVALUATION_FILE}"
            )
    return sides


def _check_disjoint(train: Sequence[Problem], evaluation: Sequence[Problem]) -> None:
    seen = {_normal(p.prompt): p.where for p in train}
    for problem in evaluation:
        if _normal(problem.prompt) in seen:
            raise DataError(
                f"{problem.where}: the same question is in the training file, at {seen[_normal(problem.prompt)]}; "
                "remove one of the two"
            )
