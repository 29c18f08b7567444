"""The samples file of one benchmark: a JSON line per response, written as it comes and continued after an interruption.

What an evaluation knows is in these lines; every figure can be worked out from them again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from upge.checks import field_types, mismatch
from upge.errors import DataError

#: The status and the types of fields of lines that were found to be right.
_SEEN: set[tuple] = set()


@dataclass(frozen=True)
class Sample:
    """One sampled response and what the verifier said about it.

    Fields:
        benchmark: name of the benchmark.
        id: the problem's, unique within the benchmark.
        level: the problem's difficulty level; None where it has none.
        sample: number of the response among those to this problem, from 0.
        prompt: what was asked.
        answer: the problem's gold answer.
        response: the text that the model wrote.
        extracted: the answer that the verifier found in it; None if none.
        reward: in [0, 1].
        correct: whether the response counts as solving the problem.
        status: how the verification ended.
        detail: the verifier's remark; empty if none.
        tokens: length of the response.
        finished: False for a response that was cut off at the length limit.
    """

    benchmark: str
    id: str
    level: str | None
    sample: int
    prompt: str
    answer: str
    response: str
    extracted: str | None
    reward: float
    correct: bool
    status: Literal["ok", "timeout", "error"]
    detail: str
    tokens: int
    finished: bool


class SampleFile:
    """The file `path`, which need not exist yet.

    Reading passes over a last line that an interruption cut off; the first `append` removes it, so that the next line
    does not stick to it. While a file is open for appending no other process can append to it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, samples: Iterable[Sample]) -> None:
        """Adds a line per sample, each handed to the operating system as soon as it is made.

        Raises:
            DataError: the file cannot be written, or another process is appending to it.
        """
        try:
            if self._file is None:
                self._file = self._open()
            for sample in samples:
                _write(self._file, _line(sample))
        except OSError as error:
            self.close()  # part of a line may have been written: opening the file again mends it
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); check disk and rights") from error

    def close(self) -> None:
        """Lets others append; a later `append` opens the file again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self) -> Iterator[Sample]:
        """The samples in the order of the file, one at a time: the texts of a large evaluation need not fit in memory.

        Raises:
            DataError: a line other than a cut-off last one is not a sample, or a pair of problem and sample number
                comes twice; with file and line.
        """
        if not self.path.is_file():
            return
        seen: dict[tuple[str, int], int] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{self.path}:{number}"
                if not line.endswith(b"\n") and not _is_whole(line):
                    return
                sample = _parse(line, where)
                first = seen.setdefault((sample.id, sample.sample), number)
                if first != number:
                    raise DataError(
                        f"{where}: sample {sample.sample} of problem '{sample.id}' is also on line {first}; "
                        "delete one of the two lines"
                    )
                yield sample

    def done(self, problems: Mapping[str, tuple[str, str]] | None = None) -> set[tuple[str, int]]:
        """The pairs (id, sample number) that the file holds.

        Args:
            problems: id → (prompt, answer) of the problems that are to be evaluated, as they will be written. Every
                line of the file must belong to one of them.

        Raises:
            DataError: as in `read`, or the file belongs to other problems.
        """
        found = set()
        for sample in self.read():
            if problems is not None:
                self._check(sample, problems)
            found.add((sample.id, sample.sample))
        return found

    def _check(self, sample: Sample, problems: Mapping[str, tuple[str, str]]) -> None:
        fix = "give another output folder, or the data that this evaluation was begun with"
        if sample.id not in problems:
            raise DataError(f"{self.path}: it has samples of problem '{sample.id}', which is not in the data; {fix}")
        prompt, answer = problems[sample.id]
        for name, was, now in (("prompt", sample.prompt, prompt), ("answer", sample.answer, answer)):
            if was != now:
                raise DataError(
                    f"{self.path}: the {name} of problem '{sample.id}' is {_short(was)} in it, "
                    f"but {_short(now)} in the data; {fix}"
                )

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line is one write, so that what was reported as written survives the end of the process.
        file = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _repair(file)
        except BlockingIOError:
            file.close()
            raise DataError(
                f"{self.path}: another process is writing to it; wait for it, or give another output folder"
            ) from None
        except OSError:
            file.close()
            raise
        return file


def _write(file: BinaryIO, line: bytes) -> None:
    while line:
        line = line[file.write(line) :]


def _repair(file: BinaryIO) -> None:
    """Ends the last line: a whole one gets its newline, a part of one goes."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start > 0 and b"\n" not in tail:
        size = min(start, 1 << 16)
        start = file.seek(start - size)
        tail = file.read(size) + tail
    last = tail.rpartition(b"\n")[2]
    if last and _is_whole(last):
        file.write(b"\n")
    elif last:
        file.truncate(end - len(last))


def _line(sample: Sample) -> bytes:
    fields = asdict(sample)
    try:
        return (json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair has no UTF-8, but an escape
        return (json.dumps(fields, allow_nan=False) + "\n").encode("ascii")


def _is_whole(line: bytes) -> bool:
    """No proper part of a JSON object, from its beginning, is itself JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse(line: bytes, where: str) -> Sample:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); delete the line to have its sample drawn again") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: found a JSON {type(row).__name__}, expected an object with the fields of a sample")
    types = field_types(Sample)
    missing = [name for name in types if name not in row]
    if missing:
        raise DataError(f"{where}: no field '{missing[0]}'; this is not a samples file of an evaluation")
    values = {name: row[name] for name in types}
    _check_types(values, types, where)
    if not 0 <= values["reward"] <= 1:
        raise DataError(f"{where}: reward: found {values['reward']}, expected a number from 0 to 1")
    return Sample(**values)


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    # Values of the same types pass or fail alike: asked once, not for each of a million lines.
    kinds = (values["status"] if isinstance(values["status"], str) else "", *map(type, values.values()))
    if kinds in _SEEN:
        return
    for name, annotation in types.items():
        wrong = mismatch(values[name], annotation)
        if wrong:
            raise DataError(f"{where}: {name}: {wrong}")
    _SEEN.add(kinds)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
