"""Checks that a run has the teacher that its algorithm needs, and that the teacher can read what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upge import data
from upge.data.prompting import load_tokenizer
from upge.data.teacher import TeacherPrompts
from upge.errors import ConfigError, ModelError
from upge.models.loading import read_config
from upge.needs import Needs
from upge.train.config import RunConfig, TeacherConfig


def check_teacher(config: RunConfig, needs: Needs) -> None:
    """Check that a run has a teacher if and only if its algorithm needs one.

    Raises:
        ConfigError: it has none or a useless one.
    """
    teacher = config.teacher
    if not needs.teacher:
        if teacher != TeacherConfig():
            raise ConfigError(
                "the algorithm learns from no teacher; leave teacher.* out, or choose algo=gkd", "teacher"
            )
        return
    if not teacher.path and not teacher.self:
        raise ConfigError(
            "the algorithm learns from a teacher; give the folder or hub name of a model with the tokenizer of "
            "model.path, or teacher.self=true with teacher.template",
            "teacher.path",
        )
    if teacher.self and teacher.weights == "present" and not teacher.template:
        raise ConfigError(
            "with its present weights and the same prompt the policy has nothing to learn from itself; give "
            "teacher.template, such as '{prompt}\\n\\nA worked solution:\\n{demonstration}', or teacher.weights=first",
            "teacher.template",
        )


def check_teaching(config: RunConfig, prompting: data.Prompting, problems: Sequence[data.Problem]) -> None:
    """Check the teacher's tokenizer, and that its prompts can be written and fit.

    Raises:
        UserError: the tokenizers differ, a problem lacks what the template holds, or prompts may be too long.
    """
    teacher = config.teacher
    if teacher.path:
        check_same_tokenizer(prompting.tokenizer, load_tokenizer(teacher.path), teacher.path)
    if not teacher.template:
        return
    prompts = TeacherPrompts(prompting, teacher.template)
    prompts.check(problems)
    bare = len(prompting.tokenizer.encode(teacher.template, add_special_tokens=False))
    limits = config.rollout
    given = limits.max_response_tokens * (1 + len(prompts.fields & {"demonstration", "feedback"}))
    longest = limits.max_prompt_tokens + bare + given
    path = teacher.path or config.model.path
    positions = getattr(read_config(path), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ModelError(
            f"teacher.template: its prompts with a response can have {longest} tokens, and '{path}' has {positions} "
            "positions; lower rollout.max_response_tokens or rollout.max_prompt_tokens"
        )


def check_same_tokenizer(own: Any, other: Any, path: str) -> None:
    """Raise ModelError unless every token of the policy's tokenizer is the same token of the teacher's."""
    theirs = other.get_vocab()
    differing = [(token, i, theirs.get(token)) for token, i in own.get_vocab().items() if theirs.get(token) != i]
    if differing:
        token, here, there = min(differing, key=lambda one: one[1])
        raise ModelError(
            f"teacher.path: the tokenizer of '{path}' differs from the policy's in {len(differing)} tokens, such as "
            f"{token!r} ({here} here, {'missing' if there is None else there} there); give a model with the same one"
        )
