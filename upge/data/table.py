"""A table of problems: a file or a hub data set whose columns are mapped to the attributes of a problem."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from upge.checks import check_fields
from upge.data import columns as cells
from upge.data.files import Record, read_file, read_hub
from upge.data.splits import Problem, Splits, check_disjoint, check_sizes, divide
from upge.errors import ConfigError, DataError, nearest

REQUIRED = ("prompt",)
#: A row may lack these or have null in them, as long as some row has the column.
OPTIONAL = ("demonstrations", "rejected", "system", "level", "verifier")
COLUMNS = (*REQUIRED, *OPTIONAL, "answer", "id", "options")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Table:
    """The rows of files (.jsonl, .json with a list of objects, .csv, .parquet), or of a hub data set.

    Attributes:
        path: the file, a folder of files, or a pattern such as `train-*.parquet`; if it is given, `hub` is not used. A
            text file may be compressed (.gz).
        hub, subset, split: a hub data set, such as openai/gsm8k, its configuration and the split to train on.
        evaluation_path: a file for the evaluation side.
        evaluation_split: a split of `hub` for the evaluation side, if there is no `evaluation_path`.
        evaluation_share: without either of these, the share of the rows that is for evaluation, chosen by a hash of the
            prompt (see `upge.data.splits`). 0 leaves the evaluation side empty.
        columns: attribute → name of the column. A dotted name (reward_model.ground_truth) refers to a nested value;
            null means that there is no such column. The attributes are

            - prompt: text, or chat messages: at most one system message, then turns of user and assistant that end with
              the user's. If the column also holds the demonstrations, an assistant's turn follows at the end;
            - answer: text or a number, or a list of accepted ones; {value, rtol} is a number with its tolerance. null
              if the data has none, for algorithms without rollouts and for verifiers that need none;
            - demonstrations: text, a list of texts, chat messages that end with the assistant's turn, or a list of
              such lists; empty ones are left out;
            - rejected: a flawed response, text or chat messages; the first demonstration is the chosen response;
            - system: the system message, which takes precedence over one among the prompt's messages;
            - level: text; a whole number n becomes "Level n";
            - id: text or a whole number, unique; without it, the id is the file's name and the line or row;
            - options: a list of texts or {text: [...], label: [...]}, appended to the prompt as lines "A) ..."; the
              answer, a label or an index from 0, becomes the letter;
            - verifier: the name of the verifier that reads the row's answer.
        verifier: the verifier of rows whose column names none; None means the run's verifier.
        system: `drop` leaves out the system messages of the data.
        unanswered: policy for rows with an empty answer: `error`, or `drop`, which is logged.
        train_size, evaluation_size: number of problems to take from the beginning of each side; None takes all.

    Raises:
        ConfigError: a column is unknown, a share or size is out of range, or (by `load` and `rows`) neither path nor
            hub is given.
        DataError: (by `load` and `rows`) a file or data set cannot be read, a row does not match the columns, an id is
            not unique, or a prompt is on both sides. The message names file and line.
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
        if "answer" not in self.columns:
            raise ConfigError("data.columns.answer: missing; name the column that holds it, or give null for none")
        if self.columns.get("options") is not None and self.columns["answer"] is None:
            raise ConfigError(
                "data.columns.answer: null, but data.columns.options needs the column of the right option"
            )
        if not 0 <= self.evaluation_share < 1:
            raise ConfigError(f"data.evaluation_share: found {self.evaluation_share}; give a share from 0 to below 1")
        if self.evaluation_split is not None and self.hub is None:
            raise ConfigError(
                "data.evaluation_split: only a hub data set has splits, and data.hub is not set; give "
                "data.evaluation_path or data.evaluation_share"
            )
        check_sizes(self.train_size, self.evaluation_size)

    def rows(self) -> tuple[Problem, ...]:
        """All problems of `path`, or of `hub` and `split`, without dividing them."""
        name, records = self._table("path", self.split)
        return tuple(self._problems(name, records))

    def load(self) -> Splits:
        """The two sides. Rows keep their order."""
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
        """(name, rows) of the file that the setting `key` names; if it is not set, of a split of the hub data set."""
        path = getattr(self, key)
        if path is not None:
            file = Path(path).expanduser()
            return file.name, read_file(file, f"data.{key}")
        if self.hub is None:
            raise ConfigError(
                "data.path is not set; give a .jsonl, .json, .csv or .parquet file, or the name of a hub data set as "
                "data.hub"
            )
        name = "/".join(filter(None, [self.hub, self.subset, split]))
        return name, read_hub(self.hub, self.subset, split or self.split)

    def _problems(self, name: str, records: Sequence[Record]) -> list[Problem]:
        """The rows as problems. `name` begins the ids of rows without one."""
        for optional in OPTIONAL:
            column = self.columns.get(optional)
            if column is not None and not any(cells.has(record, column) for record in records):
                cells.value(records[0], column, optional)  # raises: no row has the column
        problems = [self._problem(record, name) for record in self._answered(records)]
        _check_ids(problems)
        return problems

    def _answered(self, records: Sequence[Record]) -> Sequence[Record]:
        """The rows that have an answer, under the policy `unanswered`."""
        column = self.columns["answer"]
        if column is None:
            return records
        blank = [record for record in records if cells.is_blank(record, column)]
        if not blank:
            return records
        finding = f"{len(blank)} of {len(records)} rows have nothing in the column '{column}'"
        if self.unanswered == "error" or len(blank) == len(records):
            raise DataError(f"{blank[0].where}: {finding}, this is the first; fix them, or set data.unanswered=drop")
        _LOG.warning("data: %s, the first is %s; they are left out (data.unanswered)", finding, blank[0].where)
        return [record for record in records if not cells.is_blank(record, column)]

    def _problem(self, record: Record, name: str) -> Problem:
        column = self._required("prompt")
        asked = cells.prompt(record, column, has_response=column == self.columns.get("demonstrations"))
        prompt, system = asked.prompt, self._cell(record, "system", cells.text_if_any) or asked.system
        responses = partial(cells.responses, asked=asked)
        demonstrations = self._cell(record, "demonstrations", responses) or ()
        rejected = self._cell(record, "rejected", responses) or ()
        _check_pair(record, demonstrations, rejected)
        choices = self.columns.get("options")
        if choices is not None:
            lines, answer = cells.options(record, choices, self._required("answer"))
            prompt = f"{prompt.rstrip()}\n\n{lines}"
        else:
            answer = cells.answer(record, self._required("answer")) if self.columns["answer"] is not None else ""
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
            history=asked.history,
            row=record.values,
        )

    def _required(self, name: str) -> str:
        """The column of an attribute that every row has."""
        column = self.columns[name]
        assert column is not None, name
        return column

    def _cell(self, record: Record, name: str, read: Callable[[Record, str], Value]) -> Value | None:
        """The value of an optional attribute; None if the table or the row has no such column."""
        column = self.columns.get(name)
        return read(record, column) if column is not None and cells.has(record, column) else None


def _check_pair(record: Record, demonstrations: Sequence[str], rejected: Sequence[str]) -> None:
    if len(rejected) > 1 or (rejected and not demonstrations):
        counts = f"{len(rejected)} rejected responses and {len(demonstrations)} demonstrations"
        raise DataError(f"{record.where}: {counts}; a preference pair needs one rejected response and a demonstration")
    if rejected and rejected[0] == demonstrations[0]:
        raise DataError(
            f"{record.where}: the rejected response equals the first demonstration; a pair needs two responses"
        )


def _check_ids(problems: Sequence[Problem]) -> None:
    seen: dict[str, str] = {}
    for problem in problems:
        other = seen.setdefault(problem.id, problem.where)
        if other != problem.where:
            raise DataError(f"{problem.where}: the id '{problem.id}' is also that of {other}; ids must be unique")


_LOG = logging.getLogger(__name__)
