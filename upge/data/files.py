"""Reads tables from JSON-lines, JSON, CSV and parquet files and from the hub. Errors name file and line."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upge.errors import ConfigError, DataError, nearest
from upge.trees import first_line


@dataclass(frozen=True)
class Record:
    """One row of a table.

    Attributes:
        values: column → value, which may be nested.
        number: its line in a JSON-lines file, else its row, from 1. If there are several files, the name of its file
            comes before it.
        where: its place for messages, `file:line` or `file: row N`.
    """

    values: Mapping[str, Any]  # Any: JSON or parquet values
    number: int | str
    where: str


def read_file(path: Path, key: str = "data.path") -> list[Record]:
    """The rows of a file, of all files of a folder, or of those that match a pattern such as `train-*.parquet`.

    Args:
        path: the suffix of a file is one of `READERS`; after that of a text file, .gz may follow.
        key: the setting that names it, for messages.

    Raises:
        ConfigError: the suffix is unknown, or pyarrow is needed and missing.
        DataError: there is no such file, it is unreadable or without rows, or a row is not an object.
    """
    if path.is_dir():
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        files = sorted(file for file in visible if _reader(file) is not None and file.is_file())
        if not files:
            raise DataError(f"{key}: the folder {path} has no data file; give {_KINDS}, or a folder of these")
    else:
        files = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
    if not files:
        raise DataError(f"data file {path} does not exist; check {key}")
    return (
        _read(files[0], key)
        if len(files) == 1
        else [replace(record, number=f"{file.name}:{record.number}") for file in files for record in _read(file, key)]
    )


def _read(path: Path, key: str) -> list[Record]:
    reader = _reader(path)
    if reader is None:
        raise ConfigError(
            f"{key}: found the suffix '{path.suffix}' of {path}; give {_KINDS}; {nearest(path.suffix, READERS)}"
        )
    if not path.is_file():
        raise DataError(f"{key}: {path} is not a file; give {_KINDS}, or a folder of these")
    records = reader(path)
    if not records:
        raise DataError(f"data file {path} is empty; expected at least one row, an object of named columns")
    return records


def _reader(path: Path) -> Callable[[Path], list[Record]] | None:
    """The function that reads a file of this name; None if there is none."""
    is_compressed = path.suffix == ".gz"
    suffix = Path(path.stem).suffix if is_compressed else path.suffix
    return None if is_compressed and suffix == ".parquet" else READERS.get(suffix)


def _lines(path: Path) -> list[Record]:
    """The rows of a JSON-lines file. Blank lines are skipped."""
    # Not str.splitlines, which also splits at characters that JSON strings may contain, such as U+2028.
    numbered = enumerate(_text(path).split("\n"), start=1)
    return [_line(text, number, f"{path}:{number}") for number, text in numbered if text.strip()]


def _line(text: str, number: int, where: str) -> Record:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", first_line(error))
        raise DataError(f"{where}: not JSON ({reason}); expected one object a line") from error
    return _record(values, number, where)


def _json(path: Path) -> list[Record]:
    """The rows of a JSON file with a list of objects."""
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        hint = "; a file of one object a line is called .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}); expected a list of objects{hint}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise DataError(f"{path}: not JSON ({reason}); expected a list of objects") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: found a JSON {type(rows).__name__}, expected a list of objects")
    return numbered_records(rows, str(path))


def _csv(path: Path) -> list[Record]:
    """The rows of a CSV file, whose first line names the columns. An empty cell is null."""
    csv.field_size_limit(2**31 - 1)  # a demonstration may be longer than the default of 131,072
    lines = csv.reader(io.StringIO(_text(path)), strict=True)
    records: list[Record] = []
    try:
        names = next(lines, [])
        if len(set(names)) != len(names) or "" in names:
            raise DataError(f"{path}:1: the first line must name every column once; found {', '.join(names)[:200]}")
        for cells in lines:
            if not cells:
                continue
            where = f"{path}:{lines.line_num}"
            if len(cells) != len(names):
                raise DataError(f"{where}: {len(cells)} cells; the first line names {len(names)} columns")
            values = {name: cell or None for name, cell in zip(names, cells, strict=True)}
            records.append(Record(values, len(records) + 1, where))
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: not CSV ({error})") from error
    return records


def _parquet(path: Path) -> list[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"reading {path} needs the package pyarrow: pip install 'upge[data]' ({error})") from error
    try:
        # Not by path: pyarrow would read parent folders with names such as a=b as columns.
        with path.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"data file {path} cannot be read as parquet: {first_line(error)}") from error
    return numbered_records(rows, str(path))


def numbered_records(rows: Sequence[object], name: str) -> list[Record]:
    """Rows as records whose place is `name: row N`.

    Raises:
        DataError: a row is not an object.
    """
    return [_record(values, number, f"{name}: row {number}") for number, values in enumerate(rows, start=1)]


def _record(values: object, number: int, where: str) -> Record:
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: found a {type(values).__name__}, expected an object of named columns")
    return Record(values, number, where)


def _text(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} cannot be read as UTF-8 text: {error}") from error


#: Suffix → function that reads the file.
READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
_KINDS = ".jsonl (an object per line), .json (a list of objects), .csv or .parquet"
#: Class name of an error of `datasets` → what it means and how to fix it.
_FIXES = {
    "DatasetNotFoundError": "it does not exist, or it is gated or private: ask for access on its page, then log in "
    "with `hf auth login` (`huggingface-cli login` in older versions)",
    "ConnectionError": "the hub cannot be reached; where it can be, download the data set",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set and it is not in the cache; unset it",
    "ValueError": "check data.subset and data.split",
}


def read_hub(name: str, subset: str | None, split: str) -> list[Record]:
    """The rows of one split of a hub data set, downloaded once into the cache of `datasets`.

    Args:
        name: name of the data set, such as `openai/gsm8k`.
        subset: its configuration; None means the only one.
        split: name of the split, such as `train`, or a slice, such as `train[:1000]`.

    Raises:
        ConfigError: the package `datasets` is missing.
        DataError: the data set cannot be loaded or has no rows; the message gives the reason and a fix.
    """
    title = f"{name}, {subset}, {split}" if subset else f"{name}, {split}"
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.hub: loading '{name}' needs the package datasets: pip install 'upge[data]' ({error}); or give a "
            "file as data.path"
        ) from error
    try:
        rows = list(datasets.load_dataset(name, subset, split=split))
    except Exception as error:  # downloads, caches and readers raise many kinds of errors
        kind = next((c.__name__ for c in type(error).__mro__ if c.__name__ in _FIXES), None)
        fix = f"; {_FIXES[kind]}" if kind else ""
        lines = str(error).strip().splitlines()
        raise DataError(
            f"data.hub: '{title}' could not be loaded ({type(error).__name__}: {lines[0] if lines else ''}){fix}; or "
            "give a file of it as data.path"
        ) from error
    if not rows:
        raise DataError(f"data.hub: '{title}' has no rows; check data.split")
    return numbered_records(rows, title)
