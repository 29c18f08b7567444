"""A suite: a set of benchmarks, with the source of their problems and the sampling settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from upge.config import Settings, from_tree, key
from upge.data import DataSet, Problem, Rows
from upge.errors import ConfigError, DataError, nearest
from upge.instantiate import build
from upge.train.config import GROUP, TOKENS
from upge.train.prompt_order import stream_seed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class BenchmarkConfig(Settings):
    """One benchmark of a suite."""

    data: dict = key({}, "its problems: a data set (_target_ and settings); one without rows() gives its evaluation")
    file: dict = key({}, "the same from a file whose path is below suite.folder; used if suite.folder is given")
    group: str = key("math", "the average that it belongs to; the paper's are math and ood")
    samples: int = key(
        1, "responses per problem: avg@n, and pass@k for every k up to n", minimum=1, limit=GROUP, fix="give at least 1"
    )
    limit: int = key(
        0,
        "maximum number of problems to use, chosen by a hash of their prompts; 0 = all",
        minimum=0,
        limit=10**9,
        fix="give a number of problems, or 0 for all",
    )
    verifier: str = key("", "the verifier of problems that name none; empty = verify.verifier")
    instruction: str = key("", "appended to every prompt, before model.instruction")


@dataclass(frozen=True)
class SuiteConfig(Settings):
    """Benchmarks that share sampling settings.

    Raises:
        ConfigError: a value is out of range, or a benchmark to skip does not exist.
    """

    folder: str = key("", "folder with the benchmarks' files; empty = use each benchmark's `data`, such as the hub")
    temperature: float = key(0.6, "sampling temperature; 0 = greedy", limit=100)
    top_p: float = key(0.95, "nucleus sampling; ignored by greedy sampling", above=0, maximum=1)
    max_prompt_tokens: int = key(2048, "longest prompt; a longer one is an error", minimum=1, limit=TOKENS)
    max_response_tokens: int = key(
        8192, "longest response; one that is cut off is verified as it is", minimum=1, limit=TOKENS
    )
    skip: list = key([], "names of benchmarks to leave out, such as [gpqa_diamond]")
    benchmarks: dict = key({}, "name -> benchmark; each has the keys below, as suite.benchmarks.NAME.KEY")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 0 and self.temperature < 0.01:
            raise ConfigError(f"found {self.temperature}; give 0 for greedy, or at least 0.01", "temperature")
        for name in self.skip:
            if name not in self.benchmarks:
                raise ConfigError(f"no benchmark '{name}'; {nearest(str(name), self.benchmarks)}", "skip")

    def chosen(self, section: str = "suite") -> dict[str, BenchmarkConfig]:
        """The settings of the benchmarks that are not skipped, in the suite's order; `section` is as for `load`.

        Raises:
            ConfigError: a key of a benchmark is unknown or wrong, or there is no benchmark.
        """
        chosen = {n: self._benchmark(str(n), tree) for n, tree in self.benchmarks.items() if n not in self.skip}
        if not chosen:
            fix = f"give some, or skip fewer ({section}.skip)"
            raise ConfigError(f"there is none to evaluate; {fix}", "suite.benchmarks")
        return chosen

    def _benchmark(self, name: str, tree: object) -> BenchmarkConfig:
        path = f"suite.benchmarks.{name}"
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: the name is also a file name; use letters, digits and . _ - only")
        if not isinstance(tree, Mapping):
            raise ConfigError(f"{path}: found {tree!r}, expected keys such as {path}.data and {path}.samples")
        config = from_tree(BenchmarkConfig, tree, path)
        if self.temperature == 0 and config.samples > 1:
            raise ConfigError(
                f"{path}.samples: {config.samples} with suite.temperature=0, where all responses to a problem are the "
                "same; give 1, or a temperature"
            )
        return config


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its problems, ready to be evaluated.

    Attributes:
        name, group, samples: as in the suite.
        problems: the problems to solve; their prompts include the benchmark's instruction, and each names its verifier.
        available: the number of problems before a limit.
    """

    name: str
    group: str
    samples: int
    problems: tuple[Problem, ...]
    available: int

    @property
    def responses(self) -> int:
        """The number of responses to sample."""
        return len(self.problems) * self.samples


def load(suite: SuiteConfig, verifier: str = "math", limit: int = 0, section: str = "suite") -> tuple[Benchmark, ...]:
    """The benchmarks that are not skipped, with their problems.

    Args:
        suite: their settings.
        verifier: the verifier of benchmarks that name none.
        limit: maximum number of problems of each benchmark; 0 = all. The choice depends on the prompts alone, so every
            model gets the same problems, and a larger limit includes the problems of a smaller one.
        section: the section in which the user gives `folder` and `skip`, for messages.

    Raises:
        ConfigError: a key of a benchmark, or its data set's settings, are wrong.
        DataError: problems cannot be loaded, or two of them have the same id.
    """
    if suite.folder and not Path(suite.folder).expanduser().is_dir():
        raise ConfigError(f"{suite.folder} is not a folder", f"{section}.folder")
    return tuple(_load(name, one, suite, verifier, limit, section) for name, one in suite.chosen(section).items())


def _load(name: str, config: BenchmarkConfig, suite: SuiteConfig, verifier: str, limit: int, section: str) -> Benchmark:
    path = f"suite.benchmarks.{name}"
    try:
        available = _problems(config, suite.folder, path, section)
    except DataError as error:
        skip = ",".join([*map(str, suite.skip), name])
        files = f"take it from a file with {section}.folder=FOLDER, " if config.file and not suite.folder else ""
        raise DataError(f"{path}: {error}; {files}or leave it out with {section}.skip=[{skip}]") from error
    seen: set[str] = set()
    for problem in available:
        if problem.id in seen:
            raise DataError(f"{path}: {problem.where or name}: the id '{problem.id}' occurs twice; ids must be unique")
        seen.add(problem.id)
    limits = [size for size in (limit, config.limit) if size]
    problems = tuple(
        replace(p, prompt=p.prompt + config.instruction, verifier=p.verifier or config.verifier or verifier)
        for p in _limited(available, min(limits, default=0))
    )
    return Benchmark(name, config.group, config.samples, problems, len(available))


def _problems(config: BenchmarkConfig, folder: str, path: str, section: str) -> Sequence[Problem]:
    """All problems of a benchmark; from its file if it has one and a folder is given."""
    if folder and config.file:
        below = config.file.get("path")
        if not isinstance(below, str):
            raise ConfigError(f"{path}.file.path: found {below!r}; give the file's path below {section}.folder")
        data = build({**config.file, "path": str(Path(folder).expanduser() / below)}, f"{path}.file", DataSet | Rows)
    elif config.data:
        data = build(config.data, f"{path}.data", DataSet | Rows)
    else:
        place = f", or {section}.folder=FOLDER, the folder of its file {config.file.get('path')}" if config.file else ""
        raise ConfigError(f"{path}.data: missing; give a data set{place}")
    return data.rows() if isinstance(data, Rows) else data.load().evaluation


def _limited(problems: Sequence[Problem], limit: int) -> list[Problem]:
    """The `limit` problems whose prompts have the smallest hashes, in their original order; all if `limit` is 0."""
    if not limit or limit >= len(problems):
        return list(problems)
    ranked = sorted(range(len(problems)), key=lambda i: (stream_seed("limit", problems[i].prompt), problems[i].id))
    return [problems[i] for i in sorted(ranked[:limit])]
