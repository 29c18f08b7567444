"""Any table of problems: a file or a hub data set, read by a map of its columns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from upge.checks import check_fields
from upge.data import columns as cells
from upge.data.files import Record, read_file, read_hub
from upge.data.problem import Problem, Splits
from upge.data.splits import check_disjoint, check_sizes, divide
from upge.errors import ConfigError, DataError, nearest

REQUIRED = ("prompt", "answer")
#: Of these a row may have null or nothing at all, as long as some row has the column.
OPTIONAL = ("demonstrations", "rejected", "system", "level", "verifier")
COLUMNS = (*REQUIRED, *OPTIONAL, "id", "options")

Found = TypeVar("Found")


@dataclass(frozen=True)
class Table:
    """The rows of a .jsonl, .json (a list of objects) or .parquet file, or of a hub data set.

    Fields:
        path: the file; where it is given, `hub` is not used.
        hub, subset, split: a hub data set, such as openai/gsm8k, its configuration and the split to train on. Written
            against the documentation of `datasets`, never run.
        evaluation_path: a file for the evaluation side.
        evaluation_split: a split for it, where `hub` is read and there is no `evaluation_path`.
        evaluation_share: without either, so much of the rows is for evaluation, by a hash of the prompt (see
            `upge.data.splits`). 0 leaves the evaluation side empty.
        columns: what is read → the column's name. A dotted name (reward_model.ground_truth) leads into nested values;
            null is as good as leaving it out. Known are
            prompt: text, or chat messages: one of the user, with or without one of the system before it;
            answer: text or a number, or a list of one of them;
            demonstrations: text, a list of texts, chat messages (the assistant's turn), or a list of such lists;
            rejected: a flawed response, text or chat messages, beside the first demonstration;
            system: the system message, before that among a prompt's messages;
            level: text; a whole number n becomes "Level n";
            id: text or a whole number, unique; without it an id is made of the file's name and the line or row;
            options: a list of texts or {text: [...], label: [...]}, written under the prompt as lines "A) ..."; the
            answer, a label or an index from 0, becomes the letter;
            verifier: the name of the verifier that reads the row's answer.
        verifier: that of rows whose column does not say; None takes the run's.
        system: `drop` leaves out the system messages that the data bring.
        unanswered: what becomes of rows whose answer is empty: `error`, or `drop`, which is logged.
        train_size, evaluation_size: take only the first so many problems of each side; None takes all.

    Raises:
        ConfigError: an unknown column, a share or a size out of range, neither path nor hub (by `load` and `rows`).
        DataError: (by `load` and `rows`) a file or data set that cannot be read, a row that is not as the columns say,
            an id or, on both sides, a prompt that comes twice; with file and line.
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    evaluation_path: str | None = None
    evaluation_split: str | None = None
    evaluation_share: float = 0.0
    columns: Mapping[str, str | None] = field(default_factory=lambda: {"prompt": "prompt", "answer": "answer"})
    verifier: str | None = None
    system: Literal["keep", "drop"] = "keep"
    unanswered: Literal["error", "drop"] = "error"
    train_size: int | None = None
    evaluation_size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name, column in self.columns.items():
            if name not in COLUMNS:
                raise ConfigError(f"data.columns.{name}: unknown; {nearest(str(name), COLUMNS)}")
            if column is not None and (not isinstance(column, str) or not column):
                raise ConfigError(f"data.columns.{name}: found {column!r}, expected a column's name, or null for none")
        for name in REQUIRED:
            if self.columns.get(name) is None:
                raise ConfigError(f"data.columns.{name}: missing; name the column that holds it")
        if not 0 <= self.evaluation_share < 1:
            raise ConfigError(f"data.evaluation_share: found {self.evaluation_share}; give a share from 0 to below 1")
        if self.evaluation_split is not None and self.hub is None:
            raise ConfigError(
                "data.evaluation_split: only a hub data set has splits, and data.hub is not set; give "
                "data.evaluation_path or data.evaluation_share"
            )
        check_sizes(self.train_size, self.evaluation_size)

    def rows(self) -> tuple[Problem, ...]:
        """All problems of `path`, or of `hub` and `split`, undivided."""
        name, records = self._table("path", self.split)
        return tuple(self._problems(name, records))

    def load(self) -> Splits:
        """The two sides; rows keep their order."""
        name, records = self._table("path", self.split)
        train, evaluation = self._problems(name, records), []
        if self.evaluation_path is not None or (self.path is None and self.evaluation_split is not None):
            other, records = self._table("evaluation_path", self.evaluation_split)
            evaluation = self._problems(other if other != name else f"evaluation/{other}", records)
            fix = "remove one of the two, or let data.evaluation_share divide one of the tables"
            check_disjoint(train, evaluation, fix)
            _check_ids([*train, *evaluation])
        elif self.evaluation_share:
            fix = "give more rows, another data.evaluation_share, or data.evaluation_path"
            train, evaluation = divide(train, self.evaluation_share, name, fix)
        return Splits(tuple(train[: self.train_size]), tuple(evaluation[: self.evaluation_size]))

    def _table(self, key: str, split: str | None) -> tuple[str, list[Record]]:
        """The name and the rows of the file that a setting names, without one of a split of the hub."""
        path = getattr(self, key)
        if path is not None:
            file = Path(path).expanduser()
            return file.name, read_file(file, f"data.{key}")
        if self.hub is None:
            raise ConfigError(
                "data.path is not set; give a .jsonl, .json or .parquet file, or the name of a hub data set as data.hub"
            )
        parts = [self.hub, self.subset, split]
        return "/".join(part for part in parts if part), read_hub(self.hub, self.subset, split or self.split)

    def _problems(self, name: str, records: Sequence[Record]) -> list[Problem]:
        """The rows as problems; `name` begins the ids of those that have none."""
        for optional in OPTIONAL:
            column = self.columns.get(optional)
            if column is not None and not any(cells.has(record, column) for record in records):
                cells.value(records[0], column)  # says that there is none, and what there is
        answered = self._answered(records)
        problems = [self._problem(record, name) for record in answered]
        _check_ids(problems)
        return problems

    def _answered(self, records: Sequence[Record]) -> list[Record]:
        column = self.columns["answer"]
        blank = [record for record in records if cells.is_blank(record, column)]
        if not blank:
            return list(records)
        said = f"{len(blank)} of {len(records)} rows have nothing in the column '{column}'"
        if self.unanswered == "error" or len(blank) == len(records):
            raise DataError(f"{blank[0].where}: {said}, this is the first; mend them, or set data.unanswered=drop")
        _LOG.warning("data: %s, the first is %s; they are left out (data.unanswered)", said, blank[0].where)
        without = {id(record) for record in blank}
        return [record for record in records if id(record) not in without]

    def _problem(self, record: Record, name: str) -> Problem:
        prompt, system = cells.prompt(record, self.columns["prompt"])
        system = self._cell(record, "system", cells.text) or system
        demonstrations = self._cell(record, "demonstrations", cells.responses) or ()
        rejected = self._cell(record, "rejected", cells.responses) or ()
        _check_pair(record, demonstrations, rejected)
        choices = self.columns.get("options")
        if choices is not None:
            lines, answer = cells.options(record, choices, self.columns["answer"])
            prompt = f"{prompt.rstrip()}\n\n{lines}"
        else:
            answer = cells.answer(record, self.columns["answer"])
        own = self.columns.get("id")
        return Problem(
            id=cells.label(record, own) if own is not None else f"{name}:{record.number}",
            prompt=prompt,
            answer=answer,
            demonstrations=demonstrations,
            level=self._cell(record, "level", cells.level),
            system=system if self.system == "keep" else None,
            where=record.where,
            rejected=rejected[0] if rejected else None,
            verifier=self._cell(record, "verifier", cells.text) or self.verifier,
        )

    def _cell(self, record: Record, name: str, read: Callable[[Record, str], Found]) -> Found | None:
        """What is read from a column that may be absent, in the map or in the row; None where it is."""
        column = self.columns.get(name)
        return read(record, column) if column is not None and cells.has(record, column) else None


def _check_pair(record: Record, demonstrations: Sequence[str], rejected: Sequence[str]) -> None:
    if len(rejected) > 1 or (rejected and not demonstrations):
        found = f"{len(rejected)} rejected responses and {len(demonstrations)} demonstrations"
        raise DataError(f"{record.where}: {found}; a preference pair needs one of them beside a demonstration")
    if rejected and rejected[0] == demonstrations[0]:
        raise DataError(
            f"{record.where}: the rejected response is the first demonstration once more; a pair needs two responses"
        )


def _check_ids(problems: Sequence[Problem]) -> None:
    seen: dict[str, str] = {}
    for problem in problems:
        other = seen.setdefault(problem.id, problem.where)
        if other != problem.where:
            raise DataError(f"{problem.where}: the id '{problem.id}' is also that of {other}; ids must be unique")


_LOG = logging.getLogger(__name__)
