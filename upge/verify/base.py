"""Verifiers: their base class, loading by name, and the inputs and outputs of a `VerifierPool`."""

from __future__ import annotations

import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from upge.errors import ConfigError, UserError, nearest
from upge.verify.answers import final_text
from upge.verify.declared import Declared

LONGEST_ANSWER = 1000
"""The maximum number of characters of an answer that is parsed as mathematics; a longer one can only match exactly."""


MOST_WORKERS, LONGEST_TIME, MOST_MEMORY = 1024, 86_400.0, 4096.0
"""Upper bounds of a pool's settings: processes, seconds per answer, GiB per answer."""
WORKERS_PER_CORE = 32
"""The maximum number of processes of a pool per core of the machine."""


class VerifierError(UserError, RuntimeError):
    """Verifiers cannot run, or fail on too many responses."""


class AnswerVerifier(ABC):
    """A verifier that reads only the final answer of a response.

    Its steps are separate so that a `VerifierPool` can run the cheap ones in the caller's process. `extract` and
    `glance` take microseconds for any response and never raise. `judge` may take hours; a pool runs it in a process
    that can be killed.
    """

    def extract(self, response: str) -> str | None:
        """The final answer as text, or None if there is none; by default `final_text`."""
        return final_text(response)

    def glance(self, given: str, answer: str, prompt: str | None = None) -> float | None:
        """The reward of an extracted answer if it is known at once, else None; by default None."""
        return None

    def judge(self, given: str, answer: str, prompt: str | None = None) -> float:
        """The reward of an extracted answer for which `glance` returns None."""
        raise NotImplementedError(f"{type(self).__name__}.glance decides on every answer")

    @abstractmethod
    def check_answer(self, answer: str) -> None:
        """Refuse a ground truth that no answer can be compared with.

        Raises:
            ValueError: no answer can be compared with `answer`.
        """

    def warm_up(self) -> None:
        """Import and cache what `judge` needs. Called once, before worker processes are forked."""

    def __call__(self, response: str, answer: str, prompt: str | None = None) -> float:
        """The reward in [0, 1]; 0 if the response has no answer, or if `judge` fails on it."""
        given = self.extract(response)
        if not given:
            return 0.0
        known = self.glance(given, answer, prompt)
        if known is not None:
            return known
        try:
            return self.judge(given, answer, prompt)
        except ImportError:
            raise
        except Exception:  # the answer is the cause, because the ground truth has passed check_answer
            return 0.0


def shown(answer: str) -> str:
    """A ground truth for messages, with at most 200 of its characters."""
    return repr(answer if len(answer) <= 200 else answer[:200] + "...")


BUILT_IN = {
    "math": "upge.verify.math.MathVerifier",
    "math_last": "upge.verify.math.LAST_ANSWER",
    "number": "upge.verify.number.NumberVerifier",
    "choice": "upge.verify.choice.ChoiceVerifier",
    "boxed": "upge.verify.choice.BoxedVerifier",
    "regex": "upge.verify.choice.RegexVerifier",
    "reasoning_gym": "upge.verify.gym.ReasoningGymVerifier",
}

Verifier = Callable[..., Any]
"""(response, ground truth, prompt) → reward, or with the parameters that `Declared` lists."""


def load(name: str) -> Verifier:
    """The verifier called `name`: a key of `BUILT_IN`, or the dotted path of a callable in any importable module.

    The callable takes (response, answer, prompt), or some of the arguments in `declared.ARGUMENTS` by name, and returns
    a number in its range (`Declared`). A class is instantiated without arguments, and its instance is the verifier.

    Raises:
        ConfigError: nothing has that name, or it is not such a callable.
    """
    verifier = find(name)
    if inspect.isclass(verifier):
        try:
            verifier = verifier()
        except Exception as error:
            raise _refusal(name, f"its class cannot be made without arguments ({error!r})") from error
    if not callable(verifier):
        raise _refusal(name, f"it is a {type(verifier).__name__}, not a callable (response, answer, prompt) -> reward")
    try:
        Declared.by(verifier)
    except ValueError as error:
        raise _refusal(name, f"it {error}") from error
    return cast(Verifier, verifier)


def find(name: str) -> object:
    """The object that `name` stands for, imported but neither checked nor instantiated.

    Raises:
        ConfigError: as for `load`.
    """
    path = BUILT_IN.get(name, name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise _refusal(name, f"there is no such verifier; {nearest(name, BUILT_IN)}")
    if module_name == "__main__":
        raise _refusal(name, "worker processes cannot import it from the main script; move it into a module")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise _refusal(name, f"there is no module '{error.name}' on the import path") from error
        raise _refusal(name, f"importing '{module_name}' failed: {error}") from error
    except Exception as error:
        raise _refusal(name, f"importing '{module_name}' failed: {error!r}") from error
    if not hasattr(module, attribute):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _refusal(name, f"module '{module_name}' has no '{attribute}'; {nearest(attribute, known)}")
    return getattr(module, attribute)


def _refusal(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"verify.verifier: found '{name}': {what}. Give one of {', '.join(sorted(BUILT_IN))}, "
        "or a dotted path such as my_package.my_module.my_verifier."
    )


LONGEST_EXTRACT = 1000
"""The maximum number of characters of an extracted answer in a verdict."""


class Member(NamedTuple):
    """A response's place among those to the same prompt, for verifiers that compare them.

    Attributes:
        group: identifies the group: responses with equal values are compared.
        size: the number of responses in the group, which is verified as soon as all of them are submitted.
        place: the response's place, from 0; the verifier gets the responses in this order.
    """

    group: object
    size: int
    place: int


class Item(NamedTuple):
    """One response to verify.

    Attributes:
        response: the text that a model wrote.
        answer: the ground truth, in the form that the verifier reads.
        prompt: the prompt of the response; some verifiers read it.
        verifier: the name of one of the pool's verifiers; None = the pool's first.
        row: the problem's row in its data set, by column.
        tokens: the length of the response in tokens.
        is_truncated: whether the response was cut off at the length limit.
        member: the response's place in its group; None = it is the only response.
    """

    response: str
    answer: str
    prompt: str | None = None
    verifier: str | None = None
    row: Mapping[str, Any] | None = None
    tokens: int | None = None
    is_truncated: bool | None = None
    member: Member | None = None


class NamedReward(NamedTuple):
    """The reward of one verifier in a sum, before it is multiplied by its weight."""

    name: str
    reward: float
    weight: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """The result of verifying one item.

    Attributes:
        reward: the reward, in the range that the verifier declares, by default [0, 1].
        status: "ok", "timeout" or "error"; for the last two the reward is the smallest of the range.
        detail: the reason for a timeout or an error.
        extracted: the answer that the verifier read in the response, at most `LONGEST_EXTRACT` characters; None if it
            found none or does not report it.
        traceback: the traceback of the exception in the verifier; empty if there was none.
        rewards: for a sum of verifiers, the individual reward of each; empty for one verifier.
    """

    reward: float
    status: str = "ok"
    detail: str = ""
    extracted: str | None = None
    traceback: str = ""
    rewards: tuple[NamedReward, ...] = ()

    def reward_of(self, name: str) -> float:
        """The individual reward with this name in a sum; `reward` if there is none, as for an empty name."""
        return next((one.reward for one in self.rewards if one.name == name), self.reward)

    @property
    def error(self) -> str:
        """The traceback of an error, or its detail; empty unless the status is "error"."""
        return (self.traceback.rstrip() or self.detail) if self.status == "error" else ""


def checked(item: Item) -> Item:
    """Return `item` after checking the types of its fields.

    Raises:
        TypeError: a field of `item` has another type.
    """
    parts = tuple(item)
    if 2 <= len(parts) <= len(Item._fields) and all(isinstance(part, str) for part in parts[:2]):
        kinds = zip(parts[2:], (str, str, Mapping, int, bool, Member), strict=False)
        if all(part is None or isinstance(part, kind) for part, kind in kinds):
            return Item(*cast("tuple[str, str]", parts))
    raise TypeError(
        "an item must be (response, answer, prompt or None, verifier or None), all text; found " + repr(parts)[:200]
    )


def as_json(values: Mapping[str, Any]) -> str:
    """Values of an item as JSON. Dates and other values that JSON does not have become strings."""
    return json.dumps(values, default=str)


def printable(text: str) -> str:
    """A verifier's text for a terminal or a file, with all but printable characters and line breaks escaped."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    escaped = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(escaped)


def shortened(extracted: str | None) -> str | None:
    """An extracted answer for a verdict: at most `LONGEST_EXTRACT` characters, and encodable in UTF-8."""
    if extracted is None:
        return None
    return extracted[:LONGEST_EXTRACT].encode("utf-8", "backslashreplace").decode("utf-8")
