"""How a model is spoken to: chat template, stop tokens, padding, all decided here and nowhere else."""

from __future__ import annotations

import functools
import string
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upge.data.problem import Problem
from upge.data.tokens import tokens_of
from upge.errors import ConfigError, ModelError, nearest

FIELDS = ("prompt", "system")
#: One of these is there where a folder has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Prompting:
    r"""Turns problems into the token ids that a model is given, and responses into those it should give.

    Fields:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        template: "chat" for the tokenizer's chat template with the generation prompt, else a format string with
            {prompt} and optionally {system} (empty where there is no system message); plain braces are doubled.
        system: the system message of problems that bring none; empty for none.
        instruction: added to every prompt as it stands, such as "\nPut the final answer in \boxed{}."
        opening: what every response begins with, written into the prompt, such as a tag for thoughts. A demonstration
            that begins with it loses it, since it is there already.
        stop_token_ids: tokens that end a response. Added to them are the tokenizer's end of sequence, which comes
            first and with which demonstrations end, and the special token that ends a turn in a chat template.

    Raises:
        ConfigError: the template is no format string with {prompt}, or the tokenizer has no chat template, or (by
            `text`) one that refuses a problem's messages.
        ModelError: the tokenizer has no end-of-sequence token.
    """

    tokenizer: Any
    template: str = "chat"
    system: str = ""
    instruction: str = ""
    opening: str = ""
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        name = getattr(self.tokenizer, "name_or_path", "") or "the model"
        if self.tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {name} has no end-of-sequence token; no response could end")
        if self.template != "chat":
            _check_template(self.template)
            if self.system and not self.has_system:
                raise ConfigError(
                    f"model.system: {self.system!r} has no place in model.template={self.template!r}; put {{system}} "
                    "into the template, or leave it empty"
                )
        elif not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                f"model.template: 'chat' needs a chat template, and the tokenizer of {name} has none; give a format "
                "string such as '{prompt}\\n'"
            )
        stops = [self.tokenizer.eos_token_id, *self.stop_token_ids, *self._turn_end()]
        object.__setattr__(self, "stop_token_ids", tuple(dict.fromkeys(stops)))

    @classmethod
    def load(cls, path: str, **settings: Any) -> Prompting:
        """That of the model at `path`, a folder or hub name; generation_config.json may add stop tokens.

        Raises:
            ModelError: no tokenizer, or one without an end-of-sequence token.
            ConfigError: as for the class.
        """
        return cls(load_tokenizer(path), stop_token_ids=_generation_stops(path), **settings)

    @property
    def has_system(self) -> bool:
        """Is there a place for system messages?"""
        return self.template == "chat" or "system" in _fields(self.template)

    def text(self, problem: Problem) -> str:
        """The prompt as the model sees it, before it becomes tokens."""
        prompt, system = problem.prompt + self.instruction, problem.system or self.system
        if self.template != "chat":
            return self.template.format(prompt=prompt, system=system) + self.opening
        messages = [{"role": "system", "content": system}] if system else []
        return self._chat([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True) + self.opening

    def prompt_ids(self, problems: Sequence[Problem]) -> list[tuple[int, ...]]:
        """The token ids of the prompts; of many problems they are remembered, see `upge.data.tokens`."""
        settings = ("prompts", self.template == "chat", *self._ends())
        found = tokens_of([self.text(p) for p in problems], self._prompt_ids, self.tokenizer, settings)
        return [tuple(ids) for ids in found]

    def _prompt_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        # A chat template writes the special tokens itself; in a format string the tokenizer's own BOS is wanted.
        chat = self.template == "chat"
        found = self._tokens(texts, add_special_tokens=not chat)
        own_end = self.tokenizer.eos_token
        return (
            found
            if chat
            else [
                self._opened_once(ids, keep_end=text.endswith(own_end)) for ids, text in zip(found, texts, strict=True)
            ]
        )

    def response_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids of these responses, each with the end of sequence behind it."""
        return [tuple(ids) for ids in self.response_arrays(texts)]

    def response_arrays(self, texts: Sequence[str]) -> list[array]:
        """The same in four bytes a token, for many and long ones; remembered as those of prompts."""
        bare = [text.removeprefix(self.opening) for text in texts]
        return tokens_of(bare, self._ended_ids, self.tokenizer, ("responses", *self._ends()))

    def _ended_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        end = self.tokenizer.eos_token_id
        return [ids if ids[-1:] == (end,) else (*ids, end) for ids in self._tokens(texts, add_special_tokens=False)]

    def _ends(self) -> tuple[Any, ...]:
        """What the tokenizer says of the ends of a text, beside what its backend does."""
        return self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.eos_token

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Responses as text, without special tokens; no responses, no texts (where the tokenizer would make one)."""
        return self.tokenizer.batch_decode(list(responses), skip_special_tokens=True) if responses else []

    def read(self, token_ids: Sequence[int]) -> str:
        """Token ids as the text that they are, special tokens included."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def describe(self, problem: Problem) -> str:
        """For the user: what was decided, and one prompt as the model sees it."""
        tokens = self.tokenizer
        stops = ", ".join(f"{tokens.convert_ids_to_tokens(i)!r} ({i})" for i in self.stop_token_ids)
        # Training packs sequences; the one engine that pads does so on the left, under a mask, with the first of these.
        pad = f"{tokens.convert_ids_to_tokens(self.stop_token_ids[0])!r}"
        kind = "the tokenizer's chat template" if self.template == "chat" else "a format string (model.template)"
        ids = self.prompt_ids([problem])[0]
        begins = f"{tokens.convert_ids_to_tokens(ids[0])!r}" if ids else "nothing"
        return (
            f"prompts: {kind}; responses end with {stops}; padding, where there is any, {pad}\n"
            f"an example, {len(ids)} tokens, the first of them {begins}:\n"
            + "\n".join(f"  | {line}" for line in self.text(problem).split("\n"))
        )

    def _chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:
            roles = " and ".join(message["role"] for message in messages)
            raise ConfigError(
                f"model.template: the tokenizer's chat template refuses messages of {roles} ({error}); give a format "
                "string with {prompt}, or leave system messages out (model.system, data.system=drop)"
            ) from error

    def _turn_end(self) -> tuple[int, ...]:
        """The special token that follows what the assistant says, where the chat template writes one: a model that was
        trained on it ends its turn with it, whatever its end of sequence is."""
        if self.template != "chat":
            return ()
        said = "the answer"
        try:
            turn = self._chat(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}], add_generation_prompt=False
            )
        except ConfigError:
            return ()
        ids = self._tokens([turn.rpartition(said)[2]], add_special_tokens=False)[0]
        return ids[:1] if ids and ids[0] in self.tokenizer.all_special_ids else ()

    def _opened_once(self, ids: tuple[int, ...], keep_end: bool) -> tuple[int, ...]:
        """Without a second BOS, where the template has one of its own, and without an EOS that some tokenizers add."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == (bos, bos):
            ids = ids[1:]
        return ids[:-1] if len(ids) > 1 and ids[-1] == eos and (not keep_end or ids[-2] == eos) else ids

    def _tokens(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
        if not texts:
            return []
        return [tuple(ids) for ids in self.tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]]


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Any:
    """The tokenizer beside the model.

    Raises:
        ModelError: no such model.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make an empty one of what config.json says.
        raise ModelError(
            f"model.path: '{path}' has no tokenizer; the folder needs one of {', '.join(TOKENIZER_FILES)}, as "
            "tokenizer.save_pretrained(folder) writes them"
        )
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.path: no tokenizer could be loaded for '{path}' ({str(error).splitlines()[0]}). Give the folder of "
            "a Hugging Face causal LM, or a hub name that is in the local cache or can be downloaded"
        ) from error


def _generation_stops(path: str) -> tuple[int, ...]:
    """What generation_config.json says ends a response, the end of a turn for example."""
    from transformers import GenerationConfig

    try:
        more = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        return ()
    return () if more is None else (more,) if isinstance(more, int) else tuple(more)


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _check_template(template: str) -> None:
    try:
        fields = _fields(template)
    except ValueError as error:
        raise ConfigError(
            f"model.template: {template!r} is no format string ({error}); double a plain brace"
        ) from error
    for name in fields - set(FIELDS):
        hint = nearest(name, FIELDS) if name else "name it {prompt}"
        raise ConfigError(f"model.template: {template!r} has the unknown field '{{{name}}}'; {hint}")
    if "prompt" not in fields:
        raise ConfigError(
            f"model.template: {template!r} has no {{prompt}}; give 'chat' or a format string with {{prompt}}"
        )
