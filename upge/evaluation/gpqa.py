"""GPQA: graduate-level science questions with four options, loaded from the hub only, as its authors ask."""

from __future__ import annotations

import random
from dataclasses import dataclass

from upge.checks import check_fields
from upge.data import Problem
from upge.data import columns as cells
from upge.data.files import Record, read_hub
from upge.errors import DataError

HUB = "Idavidrein/gpqa"
QUESTION, RIGHT = "Question", "Correct Answer"
WRONG = tuple(f"Incorrect Answer {number}" for number in (1, 2, 3))
ID, LEVEL = "Record ID", "High-level domain"
LETTERS = "ABCD"


@dataclass(frozen=True)
class GPQA:
    """Rows with `Question`, `Correct Answer` and `Incorrect Answer 1` to `3`; the answer of a problem is a letter.

    The options follow the question as lines `A) ...` to `D) ...`, with runs of white space replaced by single spaces.
    Their order depends on the seed and the question alone. If a row has them, `Record ID` is the problem's id and
    `High-level domain` its level.

    The `subset` is gpqa_diamond, gpqa_main or gpqa_extended.
    """

    subset: str = "gpqa_diamond"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def rows(self) -> tuple[Problem, ...]:
        """All problems, in the hub's order.

        Raises:
            DataError: the hub cannot be reached, access was not granted, or a row lacks a column.
        """
        try:
            records = read_hub(HUB, self.subset, "train")
        except DataError as error:
            raise DataError(
                f"{error}. It is gated: accept its terms on https://huggingface.co/datasets/{HUB}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from error
        return tuple(self._problem(record) for record in records)

    def _problem(self, record: Record) -> Problem:
        question = cells.text(record, QUESTION).strip()
        options = [" ".join(cells.text(record, column).split()) for column in (RIGHT, *WRONG)]
        order = random.Random(f"{self.seed}/{question}").sample(range(len(options)), len(options))
        lines = [f"{letter}) {options[i]}" for letter, i in zip(LETTERS, order, strict=True)]
        return Problem(
            id=cells.label(record, ID) if cells.has(record, ID) else f"{self.subset}:{record.number}",
            prompt="\n".join([question, "", *lines]),
            answer=LETTERS[order.index(0)],
            level=cells.text(record, LEVEL) if cells.has(record, LEVEL) else None,
            where=record.where,
        )
