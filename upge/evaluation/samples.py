"""The samples file of one benchmark: a JSON line per response, appended as it arrives, continued after an interruption.

These lines are all that an evaluation records; every score can be recomputed from them.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from upge.checks import field_types, mismatch
from upge.errors import DataError

#: The status and the field types of lines that passed the check.
_SEEN: set[tuple[object, ...]] = set()


@dataclass(frozen=True)
class Sample:
    """One sampled response with the verifier's verdict.

    Attributes:
        benchmark: the name of the benchmark.
        id: the problem's id, unique within the benchmark.
        level: the problem's difficulty level; None if it has none.
        sample: the number of the response among those to this problem, from 0.
        prompt, answer: of the problem, with its reference answer.
        response: the model's text.
        extracted: the answer that the verifier extracted from it; None if there was none.
        reward: a finite number.
        correct: whether the response counts as solving the problem.
        status: how the verification ended.
        detail: the verifier's remark; may be empty.
        tokens: the length of the response.
        finished: False if the response was cut off at the length limit.
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
    """The samples file of a benchmark at `path`, which need not exist yet.

    Reading ignores a last line that an interruption cut off. The first `append` removes that line. While a file is open
    for appending, no other process can append to it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, samples: Iterable[Sample]) -> None:
        """Add a line per sample, and pass each to the operating system immediately.

        Raises:
            DataError: the file cannot be written, or another process is appending to it.
        """
        try:
            if self._file is None:
                self._file = self._open()
            for sample in samples:
                _write(self._file, _line(sample))
        except OSError as error:
            self.close()  # opening the file again repairs a partly written line
            raise DataError(
                f"{self.path}: cannot be written ({error.strerror}); check disk space and permissions"
            ) from error

    def close(self) -> None:
        """Release the file for other processes; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self) -> Iterator[Sample]:
        """Iterate over the samples in the order of the file, so the texts need not fit in memory together.

        Raises:
            DataError: a line other than a cut-off last one is not a sample, or a pair of problem and sample number
                occurs twice; the message names file and line.
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
        """The pairs (id, sample number) in the file.

        Args:
            problems: id → (prompt, answer) of the problems to evaluate. Every line of the file must belong to one of
                them; None accepts all.

        Raises:
            DataError: as in `read`, or the file belongs to other problems.
        """
        pairs: set[tuple[str, int]] = set()
        for sample in self.read():
            if problems is not None:
                self._check(sample, problems)
            pairs.add((sample.id, sample.sample))
        return pairs

    def _check(self, sample: Sample, problems: Mapping[str, tuple[str, str]]) -> None:
        fix = "give another output folder, or the data that this evaluation started with"
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
        # Unbuffered, so each line is one write, and lines that were reported as written survive the process.
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
    """Complete the last line: add a missing newline to a whole line, and remove a partial one."""
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
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8 encoding, but can be escaped
        return (json.dumps(fields, allow_nan=False) + "\n").encode("ascii")


def _is_whole(line: bytes) -> bool:
    """Whether a line is whole; a proper prefix of a JSON object is never valid JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(line: bytes, where: str) -> Sample:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); delete the line to sample this response again") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: found a JSON {type(row).__name__}, expected an object with the fields of a sample")
    types = field_types(Sample)
    missing = [name for name in types if name not in row]
    if missing:
        raise DataError(f"{where}: no field '{missing[0]}'; this is not a samples file of an evaluation")
    values = {name: row[name] for name in types}
    _check_types(values, types, where)
    if not math.isfinite(values["reward"]):
        raise DataError(f"{where}: reward: found {values['reward']}, expected a finite number")
    return Sample(**values)


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    # Lines with the same types have the same result, so each combination is checked only once.
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
