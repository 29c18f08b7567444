"""Encodes problems as token ids, with limits on lengths. What the limits drop or cut is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from upge.checks import mismatch
from upge.data.prompting import Prompting
from upge.data.splits import Problem
from upge.errors import ConfigError, DataError

OverlongPrompts = Literal["error", "drop"]
OverlongDemonstrations = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class Example:
    """A problem as token ids.

    Attributes:
        problem: the encoded problem.
        prompt_ids: the prompt in its template.
        demonstrations: the expert responses that were not dropped for their length. Each ends with the end-of-sequence
            token unless it was truncated.
        rejected_ids: the rejected response of a preference pair, whose chosen response is the first demonstration. None
            if there is none or if the first demonstration was dropped.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    demonstrations: tuple[Sequence[int], ...] = ()
    rejected_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Encoded:
    """Examples, and the number of those that the limits on lengths affected.

    Attributes:
        examples: in the order of the problems.
        dropped_prompts: problems dropped because their prompt was too long.
        dropped_demonstrations: demonstrations dropped because they were too long.
        truncated_demonstrations: demonstrations cut to the limit, which therefore have no final answer.
        dropped_pairs: examples that lost their preference pair because one of its responses was too long.
        truncated_pairs: examples with a preference pair in which a response was cut to the limit.
    """

    examples: tuple[Example, ...]
    dropped_prompts: int = 0
    dropped_demonstrations: int = 0
    truncated_demonstrations: int = 0
    dropped_pairs: int = 0
    truncated_pairs: int = 0


def encode(
    problems: Sequence[Problem],
    prompting: Prompting,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    overlong_prompts: OverlongPrompts = "error",
    overlong_demonstrations: OverlongDemonstrations = "drop",
    demonstrations: bool = True,
    pairs: bool = True,
) -> Encoded:
    """Encode prompts, demonstrations and rejected responses.

    Args:
        problems: what to encode.
        prompting: encodes prompts and responses.
        max_prompt_tokens: limit for prompts.
        max_response_tokens: limit for demonstrations and rejected responses, including the end-of-sequence token.
        overlong_prompts: policy for problems whose prompt exceeds the limit.
        overlong_demonstrations: policy for demonstrations and rejected responses that exceed the limit. The problem
            remains, and so does a demonstration whose rejected response is dropped.
        demonstrations: whether to encode demonstrations; False also leaves out pairs.
        pairs: whether to encode rejected responses.

    Raises:
        ConfigError: a policy does not exist.
        DataError: a length exceeds its limit under the policy 'error', or no problem is left.
    """
    _check_policy("overlong_prompts", overlong_prompts, OverlongPrompts)
    _check_policy("overlong_demonstrations", overlong_demonstrations, OverlongDemonstrations)
    prompts = prompting.prompt_ids(problems)
    long = [i for i, ids in enumerate(prompts) if len(ids) > max_prompt_tokens]
    if long and overlong_prompts == "error":
        raise _prompt_error(problems, prompts, long, max_prompt_tokens)
    kept = [i for i, ids in enumerate(prompts) if len(ids) <= max_prompt_tokens]
    if not kept:
        raise DataError(
            f"no problem is left: all {len(problems)} prompts are longer than rollout.max_prompt_tokens="
            f"{max_prompt_tokens}; raise it"
            if problems
            else "there are no problems to encode; check data.path and the sizes under data"
        )
    own = [problems[i] if demonstrations else replace(problems[i], demonstrations=()) for i in kept]
    answers = _Responses(own, prompting, max_response_tokens, overlong_demonstrations, pairs)
    examples = (Example(problems[i], prompts[i], *answers.of(k)) for k, i in enumerate(kept))
    return Encoded(tuple(examples), dropped_prompts=len(long), **answers.counts())


class _Responses:
    """The encoded demonstrations and rejected responses of problems, and the effects of the limit on them."""

    def __init__(self, problems: Sequence[Problem], prompting: Prompting, limit: int, policy: str, pairs: bool) -> None:
        self._policy = policy
        flat = [(k, text) for k, p in enumerate(problems) for text in p.demonstrations]
        experts, self._long = _limited("demonstration", problems, flat, prompting, limit, policy)
        paired = [(k, p.rejected) for k, p in enumerate(problems) if pairs and p.rejected and p.demonstrations]
        others, long_others = _limited("rejected response", problems, paired, prompting, limit, policy)
        self._experts: list[list[Sequence[int] | None]] = [[] for _ in problems]
        for (k, _), ids in zip(flat, experts, strict=True):
            self._experts[k].append(ids)
        self._rejected = dict(zip((k for k, _ in paired), others, strict=True))
        # The first demonstration is the chosen response of a pair. Without it there is no pair.
        first = {k: i for i, (k, _) in reversed(list(enumerate(flat)))}
        self._pairs = {paired[i][0] for i in long_others} | {k for k, _ in paired if first[k] in self._long}

    def of(self, k: int) -> tuple[tuple[Sequence[int], ...], Sequence[int] | None]:
        """The demonstrations and the rejected response of problem `k`."""
        experts = self._experts[k]
        chosen = bool(experts) and experts[0] is not None
        return tuple(ids for ids in experts if ids is not None), self._rejected.get(k) if chosen else None

    def counts(self) -> dict[str, int]:
        """How many the limit affected, by the attributes of `Encoded`."""
        done = {"drop": "dropped", "truncate": "truncated"}.get(self._policy)
        return {f"{done}_demonstrations": len(self._long), f"{done}_pairs": len(self._pairs)} if done else {}


def _limited(
    what: str,
    problems: Sequence[Problem],
    texts: Sequence[tuple[int, str]],
    prompting: Prompting,
    limit: int,
    policy: str,
) -> tuple[list[Sequence[int] | None], set[int]]:
    """Encode (index of problem, text) pairs under a policy for those over the limit.

    Returns:
        The token ids of each text, None for a dropped one, and the set of those that were too long.
    """
    encoded = prompting.response_arrays([text for _, text in texts])
    long = {i for i, ids in enumerate(encoded) if len(ids) > limit}
    if long and policy == "error":
        worst = max(sorted(long), key=lambda i: len(encoded[i]))
        problem = problems[texts[worst][0]]
        raise DataError(
            f"{problem.where or problem.id}: the {what} has {len(encoded[worst])} tokens with its end-of-sequence "
            f"token, the limit is rollout.max_response_tokens={limit} ({len(long)} of {len(texts)} are longer; this is "
            "the longest); raise it, or set data_policy.overlong_demonstrations to drop or truncate"
        )
    limited: list[Sequence[int] | None] = list(encoded)
    for i in long:
        limited[i] = encoded[i][:limit] if policy == "truncate" else None
    return limited, long


def _check_policy(name: str, value: str, allowed: Any) -> None:  # Any: a type annotation
    if wrong := mismatch(value, allowed):
        raise ConfigError(f"data_policy.{name}: {wrong}")


def _prompt_error(
    problems: Sequence[Problem], prompts: Sequence[Sequence[int]], long: Sequence[int], limit: int
) -> DataError:
    worst = max(long, key=lambda i: len(prompts[i]))
    return DataError(
        f"{problems[worst].where or problems[worst].id}: the prompt has {len(prompts[worst])} tokens, the limit is "
        f"rollout.max_prompt_tokens={limit} ({len(long)} of {len(problems)} prompts are longer; this is the longest); "
        "raise it, or drop such problems with data_policy.overlong_prompts=drop"
    )
