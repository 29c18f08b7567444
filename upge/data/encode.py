"""From problems to token ids, with limits on the lengths whose effect is counted, never silent."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from upge.checks import mismatch
from upge.data.problem import Problem
from upge.errors import ConfigError, DataError, ModelError, nearest

OverlongPrompts = Literal["error", "drop"]
OverlongDemonstrations = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class Example:
    """A problem in tokens.

    Fields:
        problem: where it comes from.
        prompt_ids: the prompt in its template.
        demonstration_ids: the expert response; it ends with the end-of-sequence token unless it was truncated. None
            where there is none, or where it was dropped for its length.
        rejected_ids: the other side of a preference pair, likewise. None where there is none, or no demonstration to
            prefer to it.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    demonstration_ids: tuple[int, ...] | None
    rejected_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Encoded:
    """The examples, and how many problems the limits have touched.

    Fields:
        examples: in the order of the problems.
        dropped_prompts: problems that were left out for the length of their prompt.
        dropped_demonstrations: examples that lost their demonstration for its length.
        truncated_demonstrations: examples whose demonstration was cut to the limit, and so has no final answer.
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
    tokenizer: Any,
    *,
    template: str,
    max_prompt_tokens: int,
    max_response_tokens: int,
    overlong_prompts: OverlongPrompts = "error",
    overlong_demonstrations: OverlongDemonstrations = "drop",
    pairs: bool = True,
) -> Encoded:
    """Encodes prompts, demonstrations and rejected responses.

    Args:
        problems: what to encode.
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        template: "chat" for the tokenizer's chat template with the generation prompt, else a format string with
            {prompt} and optionally {system} (empty where a problem has no system message).
        max_prompt_tokens, max_response_tokens: the limits; a demonstration's includes its end-of-sequence token.
        overlong_prompts: what becomes of a problem whose prompt is longer than the limit.
        overlong_demonstrations: what becomes of a demonstration or rejected response that is longer; the problem itself
            stays, and so does a demonstration that has only lost its counterpart.
        pairs: False leaves the rejected responses out.

    Raises:
        ConfigError: the template or a policy cannot be used.
        DataError: a length over its limit under the policy 'error', or no problem left.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    _check_policy("overlong_prompts", overlong_prompts, OverlongPrompts)
    _check_policy("overlong_demonstrations", overlong_demonstrations, OverlongDemonstrations)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no end-of-sequence token")
    prompts = _prompt_ids(problems, tokenizer, template)
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
    own = [problems[i] for i in kept]
    limit, policy = max_response_tokens, overlong_demonstrations
    chosen, long = _limited("demonstration", own, [p.demonstration for p in own], tokenizer, limit, policy)
    other = [p.rejected if pairs and p.demonstration is not None else None for p in own]
    rejected, long_rejected = _limited("rejected response", own, other, tokenizer, limit, policy)
    touched = len({k for k in long if other[k] is not None} | long_rejected)
    rejected = [None if ids is None else other_ids for ids, other_ids in zip(chosen, rejected, strict=True)]
    rows = zip(own, (prompts[i] for i in kept), chosen, rejected, strict=True)
    return Encoded(
        tuple(Example(*row) for row in rows),
        dropped_prompts=len(dropped),
        dropped_demonstrations=len(long) * (policy == "drop"),
        truncated_demonstrations=len(long) * (policy == "truncate"),
        dropped_pairs=touched * (policy == "drop"),
        truncated_pairs=touched * (policy == "truncate"),
    )


def _limited(
    what: str, problems: Sequence[Problem], texts: Sequence[str | None], tokenizer: Any, limit: int, policy: str
) -> tuple[list[tuple[int, ...] | None], set[int]]:
    """The texts in tokens as the policy leaves them, and which of them were longer than the limit."""
    found = _response_ids(texts, tokenizer)
    long = {k for k, ids in enumerate(found) if ids is not None and len(ids) > limit}
    if long and policy == "error":
        raise _response_error(what, problems, found, long, limit)
    for k in long:
        found[k] = found[k][:limit] if policy == "truncate" else None
    return found, long


def _check_policy(name: str, value: str, allowed: Any) -> None:
    wrong = mismatch(value, allowed)
    if wrong:
        raise ConfigError(f"data_policy.{name}: {wrong}")


def _prompt_ids(problems: Sequence[Problem], tokenizer: Any, template: str) -> list[tuple[int, ...]]:
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "model.template: 'chat' needs a chat template, and the tokenizer of "
                f"{tokenizer.name_or_path or 'the model'} has none; give a format string such as '{{prompt}}\\n'"
            )
        texts = [
            tokenizer.apply_chat_template(_messages(p), add_generation_prompt=True, tokenize=False) for p in problems
        ]
    else:
        _check_template(template)
        texts = [template.format(prompt=p.prompt, system=p.system or "") for p in problems]
    # A chat template writes the special tokens itself; in a format string the tokenizer's own BOS is wanted.
    found = _tokenize(texts, tokenizer, add_special_tokens=template != "chat")
    return found if template == "chat" else [_opened_once(ids, tokenizer) for ids in found]


def _opened_once(ids: tuple[int, ...], tokenizer: Any) -> tuple[int, ...]:
    """Without a second BOS, where the template has one of its own, and without an EOS, which some tokenizers add."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == (bos, bos):
        ids = ids[1:]
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def _messages(problem: Problem) -> list[dict[str, str]]:
    system = [{"role": "system", "content": problem.system}] if problem.system else []
    return [*system, {"role": "user", "content": problem.prompt}]


def _check_template(template: str) -> None:
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError(
            f"model.template: {template!r} is no format string ({error}); double a plain brace"
        ) from error
    for name in fields - {"prompt", "system"}:
        hint = nearest(name, ("prompt", "system")) if name else "name it {prompt}"
        raise ConfigError(f"model.template: {template!r} has the unknown field '{{{name}}}'; {hint}")
    if "prompt" not in fields:
        raise ConfigError(
            f"model.template: {template!r} has no {{prompt}}; give 'chat' or a format string with {{prompt}}"
        )


def _response_ids(texts: Sequence[str | None], tokenizer: Any) -> list[tuple[int, ...] | None]:
    present = [text for text in texts if text is not None]
    ids = iter(_tokenize(present, tokenizer, add_special_tokens=False))
    return [None if text is None else (*next(ids), tokenizer.eos_token_id) for text in texts]


def _tokenize(texts: Sequence[str], tokenizer: Any, *, add_special_tokens: bool) -> list[tuple[int, ...]]:
    if not texts:
        return []
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]]


def _prompt_error(
    problems: Sequence[Problem], prompts: Sequence[Sequence[int]], long: Sequence[int], limit: int
) -> DataError:
    worst = max(long, key=lambda i: len(prompts[i]))
    return DataError(
        f"{problems[worst].where or problems[worst].id}: the prompt has {len(prompts[worst])} tokens, the limit is "
        f"rollout.max_prompt_tokens={limit} ({len(long)} of {len(problems)} prompts are longer; this is the longest); "
        "raise it, or drop such problems with data_policy.overlong_prompts=drop"
    )


def _response_error(
    what: str, problems: Sequence[Problem], responses: Sequence[Sequence[int] | None], long: set[int], limit: int
) -> DataError:
    worst = max(sorted(long), key=lambda i: len(responses[i] or ()))
    return DataError(
        f"{problems[worst].where or problems[worst].id}: the {what} has "
        f"{len(responses[worst] or ())} tokens with its end-of-sequence token, the limit is "
        f"rollout.max_response_tokens={limit} ({len(long)} of {len(problems)} are longer; this is the longest); raise "
        "it, or set data_policy.overlong_demonstrations to drop or truncate"
    )
