"""From problems to token ids, with limits on the lengths whose effect is counted, never silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from upge.checks import mismatch
from upge.data.problem import Problem
from upge.data.prompting import Prompting
from upge.errors import ConfigError, DataError

OverlongPrompts = Literal["error", "drop"]
OverlongDemonstrations = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class Example:
    """A problem in tokens.

    Fields:
        problem: where it comes from.
        prompt_ids: the prompt in its template.
        demonstrations: the token ids of the expert responses; each ends with the end-of-sequence token unless it was
            truncated. Those that were dropped for their length are missing.
        rejected_ids: the other side of a preference pair, whose chosen side is the first demonstration. None where
            there is none, or where the first demonstration was dropped.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    demonstrations: tuple[Sequence[int], ...] = ()
    rejected_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Encoded:
    """The examples, and how many problems the limits have touched.

    Fields:
        examples: in the order of the problems.
        dropped_prompts: problems that were left out for the length of their prompt.
        dropped_demonstrations: demonstrations that were left out for their length.
        truncated_demonstrations: demonstrations that were cut to the limit, and so have no final answer.
        dropped_pairs: examples that lost their preference pair because one of its sides was too long.
        truncated_pairs: examples with a pair of which a side was cut to the limit.
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
    """Encodes prompts, demonstrations and rejected responses.

    Args:
        problems: what to encode.
        prompting: the model's tokenizer and template.
        max_prompt_tokens, max_response_tokens: the limits; a demonstration's includes its end-of-sequence token.
        overlong_prompts: what becomes of a problem whose prompt is longer than the limit.
        overlong_demonstrations: what becomes of a demonstration or rejected response that is longer; the problem itself
            stays, and so does a demonstration that has only lost its counterpart.
        demonstrations: False leaves demonstrations, and so pairs, out.
        pairs: False leaves the rejected responses out.

    Raises:
        ConfigError: a policy that does not exist.
        DataError: a length over its limit under the policy 'error', or no problem left.
    """
    _check_policy("overlong_prompts", overlong_prompts, OverlongPrompts)
    _check_policy("overlong_demonstrations", overlong_demonstrations, OverlongDemonstrations)
    prompts = prompting.prompt_ids(problems)
    long = [i for i, ids in enumerate(prompts) if len(ids) > max_prompt_tokens]
    if long and overlong_prompts == "error":
        raise _prompt_error(problems, prompts, long, max_prompt_tokens)
    dropped = set(long)
    kept = [i for i in range(len(problems)) if i not in dropped]
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
    return Encoded(tuple(examples), dropped_prompts=len(dropped), **answers.counts())


class _Responses:
    """The demonstrations and rejected responses of some problems in tokens, and what the limit has done to them."""

    def __init__(self, problems: Sequence[Problem], prompting: Prompting, limit: int, policy: str, pairs: bool) -> None:
        self._policy = policy
        flat = [(k, text) for k, p in enumerate(problems) for text in p.demonstrations]
        experts, self._long = _limited("demonstration", problems, flat, prompting, limit, policy)
        paired = [(k, p.rejected) for k, p in enumerate(problems) if pairs and p.rejected and p.demonstrations]
        others, long_others = _limited("rejected response", problems, paired, prompting, limit, policy)
        self._experts: list[list] = [[] for _ in problems]
        for (k, _), ids in zip(flat, experts, strict=True):
            self._experts[k].append(ids)
        self._rejected = dict(zip((k for k, _ in paired), others, strict=True))
        # Of a pair the first demonstration is the chosen side; without it there is no pair.
        first = {k: i for i, (k, _) in reversed(list(enumerate(flat)))}
        self._pairs = {paired[i][0] for i in long_others} | {k for k, _ in paired if first[k] in self._long}

    def of(self, k: int) -> tuple[tuple[Sequence[int], ...], Sequence[int] | None]:
        """The demonstrations and the rejected response of a problem."""
        experts = self._experts[k]
        chosen = bool(experts) and experts[0] is not None
        return tuple(ids for ids in experts if ids is not None), self._rejected.get(k) if chosen else None

    def counts(self) -> dict[str, int]:
        """What the limit has touched, by the fields of `Encoded`."""
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
    """The texts, each of the problem at its index, in tokens as the policy leaves them, and which were too long."""
    found: list[Sequence[int] | None] = list(prompting.response_arrays([text for _, text in texts]))
    long = {i for i, ids in enumerate(found) if len(ids) > limit}
    if long and policy == "error":
        worst = max(sorted(long), key=lambda i: len(found[i]))
        problem = problems[texts[worst][0]]
        raise DataError(
            f"{problem.where or problem.id}: the {what} has {len(found[worst])} tokens with its end-of-sequence token, "
            f"the limit is rollout.max_response_tokens={limit} ({len(long)} of {len(texts)} are longer; this is the "
            "longest); raise it, or set data_policy.overlong_demonstrations to drop or truncate"
        )
    for i in long:
        found[i] = found[i][:limit] if policy == "truncate" else None
    return found, long


def _check_policy(name: str, value: str, allowed: Any) -> None:
    wrong = mismatch(value, allowed)
    if wrong:
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
