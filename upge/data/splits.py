"""Problems with verifiable answers, their division into training and evaluation sides, and mixtures of data sets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import Any, Protocol, runtime_checkable

from upge.checks import check_fields
from upge.errors import ConfigError, DataError, UserError, nearest


@dataclass(frozen=True)
class Problem:
    """A question, usually with a verifiable answer.

    Attributes:
        id: unique within its data set and stable across runs.
        prompt: the question, without any template; in a conversation the user's last turn.
        answer: the ground truth, in the form that the verifier reads; empty if the data has none.
        demonstrations: expert responses, each of which ends with the final answer; empty if the data has none.
        level: the difficulty level under which accuracy is reported; None if the data has none.
        system: the system message; None if the data has none.
        where: the place that it comes from (`file:line` for files), for messages.
        rejected: a flawed response, which makes a preference pair with the first demonstration as the chosen response;
            None if the data has none.
        verifier: the name of the verifier that reads `answer`, as in `upge.verify.load`; None means the run's verifier.
        source: in a mixture, the name of its data set; else empty.
        history: the turns of a conversation before `prompt`, as pairs of role ("user" or "assistant") and content.
        row: the row of its table, by column, for verifiers that ask for it; None if there is none.
    """

    id: str
    prompt: str
    answer: str
    demonstrations: tuple[str, ...] = ()
    level: str | None = None
    system: str | None = None
    where: str = ""
    rejected: str | None = None
    verifier: str | None = None
    source: str = ""
    history: tuple[tuple[str, str], ...] = ()
    row: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)  # Any: JSON or parquet values

    @property
    def conversation(self) -> str:
        """All turns as one text, with every run of white space as a single space. Equal texts mean equal problems."""
        return normal("\n".join([*(f"{role}: {content}" for role, content in self.history), self.prompt]))


@dataclass(frozen=True)
class Splits:
    """The two sides of a data set. No prompt is on both.

    Attributes:
        train: problems for updates.
        evaluation: problems for evaluation.
        weights: in a mixture, the share of the training prompts for each source (`Problem.source`). Shares need not add
            up to 1. If empty, every problem is equally frequent.
    """

    train: tuple[Problem, ...]
    evaluation: tuple[Problem, ...]
    weights: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class DataSet(Protocol):
    """What `data` names: a class with this method, upge's or the user's own."""

    def load(self) -> Splits:
        """The problems of both sides."""
        ...


@runtime_checkable
class Rows(Protocol):
    """What a benchmark may name instead: problems that are not divided into sides."""

    def rows(self) -> Sequence[Problem]:
        """All problems."""
        ...


def normal(prompt: str) -> str:
    """A prompt with every run of white space as a single space. Prompts that are then equal count as the same."""
    return " ".join(prompt.split())


def for_evaluation(prompt: str, share: float) -> bool:
    """Whether a problem with this prompt is on the evaluation side, which has a share of about `share`.

    Only the SHA-256 of the prompt (see `normal`) decides this, not its place in the file or a seed. A larger share
    keeps the problems of a smaller one.
    """
    digest = hashlib.sha256(normal(prompt).encode()).digest()
    return int.from_bytes(digest[:6], "big") < share * 2**48


def divide(problems: Sequence[Problem], share: float, name: str, fix: str) -> tuple[list[Problem], list[Problem]]:
    """Divide problems into (training, evaluation), which keep their order; `share` is about the evaluation side's.

    Raises:
        DataError: one side is empty; the message has the `name` of the data and the `fix`.
    """
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        sides[for_evaluation(problem.conversation, share)].append(problem)
    for side, which in zip(sides, ("training", "evaluation"), strict=True):
        if not side:
            raise DataError(
                f"{name}: none of its {len(problems)} rows falls on the {which} side (a share of {share:g} is for "
                f"evaluation, by a hash of the prompt); {fix}"
            )
    return sides


def check_disjoint(
    train: Sequence[Problem], evaluation: Sequence[Problem], fix: str, name: Callable[[Problem], str] = lambda p: ""
) -> None:
    """Check that no prompt is on both sides.

    Raises:
        DataError: one is. The message names both places, each after `name(problem)`, and the `fix`.
    """
    seen = {problem.conversation: problem for problem in train}
    for problem in evaluation:
        other = seen.get(problem.conversation)
        if other is not None:
            raise DataError(
                f"{name(problem)}{problem.where or problem.id}: the same question is on the training side, at "
                f"{name(other)}{other.where or other.id}; {fix}"
            )


def even_shares(size: int, parts: int) -> list[int]:
    """`size` divided into `parts` numbers; if there is a remainder, the first ones are larger by one."""
    share, rest = divmod(size, parts)
    return [share + (part < rest) for part in range(parts)]


def interleaved(columns: Iterable[Sequence[Problem]]) -> tuple[Problem, ...]:
    """The first problem of every column, then the second ones, and so on."""
    return tuple(problem for problem in chain.from_iterable(zip_longest(*columns)) if problem is not None)


#: The largest size of a side, for data that are generated as well as for data that are read.
LARGEST_SIDE = 10**7


def check_sizes(train: int | None, evaluation: int | None) -> None:
    """Check the sizes of both sides; None means all problems.

    Raises:
        ConfigError: a size is below 1 or beyond `LARGEST_SIDE`.
    """
    for key, size in (("train_size", train), ("evaluation_size", evaluation)):
        if size is not None and size < 1:
            raise ConfigError(f"data.{key}: found {size}; give a number of at least 1, or null for all rows")
        if size is not None and size > LARGEST_SIDE:
            raise ConfigError(f"data.{key}: found {size}; give a number of at most {LARGEST_SIDE}")


def limit_levels(problems: Sequence[Problem], per_level: Mapping[str, int]) -> tuple[Problem, ...]:
    """Take the first problems of each level.

    Args:
        problems: to choose from.
        per_level: level → number of problems. Other levels are left out. If it is empty, all problems are returned.

    Raises:
        ConfigError: a level has fewer problems, or a number is not a positive integer.
    """
    if not per_level:
        return tuple(problems)
    kept: list[Problem] = []
    left: dict[str | None, int] = {**per_level}
    for level, count in per_level.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"data_policy.per_level: found {count!r} for '{level}'; give a number of at least 1")
    for problem in problems:
        if left.get(problem.level, 0):
            left[problem.level] -= 1
            kept.append(problem)
    for level, count in per_level.items():
        if left[level]:
            have = sorted({str(problem.level) for problem in problems})
            raise ConfigError(
                f"data_policy.per_level: {count} problems of '{level}' are asked for, and there are "
                f"{count - left[level]}; the levels of the data are {', '.join(have)}"
            )
    return tuple(kept)


def limit_demonstrated(problems: Sequence[Problem], count: int) -> tuple[Problem, ...]:
    """Remove the demonstrations of all but `count` problems; 0 keeps all demonstrations.

    The problems that keep them are spread as evenly as possible over the levels. The choice depends only on the
    problems, so a larger count keeps the choice of a smaller one, and all algorithms learn from the same
    demonstrations. A rejected response is removed with its demonstration, because it then has no chosen response.
    """
    demonstrated = [problem for problem in problems if problem.demonstrations]
    if not count or len(demonstrated) <= count:
        return tuple(problems)
    per_level: dict[tuple[str, str | None], int] = {}
    ranked: list[tuple[int, bytes, str]] = []
    for problem in sorted(demonstrated, key=_rank):
        level = (problem.source, problem.level)
        per_level[level] = per_level.get(level, 0) + 1
        ranked.append((per_level[level], _rank(problem), problem.id))
    kept = {name for *_, name in sorted(ranked)[:count]}
    return tuple(p if p.id in kept else replace(p, demonstrations=(), rejected=None) for p in problems)


def _rank(problem: Problem) -> bytes:
    """A pseudorandom sort key that depends only on the problem."""
    return hashlib.sha256(f"demonstrated/{problem.source}/{problem.id}/{problem.prompt}".encode()).digest()


@dataclass(frozen=True)
class Mixture:
    """The problems of several data sets.

    A problem's `source` is the name of its set, which is also a prefix of its id. On the evaluation side it is a prefix
    of its level as well ("gsm8k", "math, Level 5"), so that accuracy is reported for each set.

    Attributes:
        sets: name → data set, each with `load() -> Splits`.
        weights: name → share of the training prompts of every step. Shares need not add up to 1. A set with share 0 is
            only evaluated. None mixes by size: every problem is equally frequent.

    Raises:
        ConfigError: there is no set, a value is not a data set or is a mixture, or the weights do not match the sets.
        DataError: (by `load`) a set raises it, or a prompt is on both sides. The message names the set.
    """

    sets: Mapping[str, DataSet]
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.sets:
            raise ConfigError("data.sets: empty; give a data set or more, as name: {_target_: upge.data.NAME, ...}")
        for name, one in self.sets.items():
            if not name or not isinstance(name, str):
                raise ConfigError(f"data.sets: found the name {name!r}, expected a text")
            if not isinstance(one, DataSet):
                raise ConfigError(
                    f"data.sets.{name}: found {str(one)[:80]!r} ({type(one).__name__}), expected a data set; give a "
                    "mapping such as {_target_: upge.data.GSM8K, path: gsm8k}"
                )
            if isinstance(one, Mixture):
                raise ConfigError(f"data.sets.{name}: is a mixture itself; list its sets here, with their own weights")
        if self.weights is not None:
            _check_weights(self.weights, self.sets)

    def load(self) -> Splits:
        """Load all sets in order."""
        train: list[Problem] = []
        evaluation: list[Problem] = []
        for name, one in self.sets.items():
            try:
                splits = one.load()
            except UserError as error:
                raise type(error)(f"data.sets.{name}: {error}") from error
            # A set with share 0 is not trained on, so its training side is left out.
            if self.weights is None or self.weights[name] > 0:
                train += _named(splits.train, name)
            evaluation += [_levelled(problem) for problem in _named(splits.evaluation, name)]
        fix = "remove one of the two, or give both sets the same division (data.sets.NAME.evaluation_share)"
        check_disjoint(train, evaluation, fix, lambda problem: f"data.sets.{problem.source}: ")
        shares = {name: weight for name, weight in (self.weights or {}).items() if weight > 0}
        return Splits(tuple(train), tuple(evaluation), shares)


def _named(problems: Sequence[Problem], name: str) -> list[Problem]:
    return [replace(problem, id=f"{name}/{problem.id}", source=name) for problem in problems]


def _levelled(problem: Problem) -> Problem:
    return replace(problem, level=f"{problem.source}, {problem.level}" if problem.level else problem.source)


def _check_weights(weights: Mapping[str, float], sets: Collection[str]) -> None:
    for name, weight in weights.items():
        if name not in sets:
            raise ConfigError(f"data.weights.{name}: no such set; {nearest(str(name), sets)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ConfigError(f"data.weights.{name}: found {weight!r}, expected a number of at least 0")
    for name in sets:
        if name not in weights:
            raise ConfigError(f"data.weights.{name}: missing; give it a share, or 0 to leave it out of training")
    if not sum(weights.values()) > 0:
        raise ConfigError("data.weights: all are 0; give one set a share")
