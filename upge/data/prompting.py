"""Chat template, stop tokens and padding of a model, and the encoding of prompts and responses."""

from __future__ import annotations

import functools
import re
import signal
import string
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from upge.data.splits import Problem
from upge.data.tokens import Tokenizer, tokens_of
from upge.errors import ConfigError, ModelError, nearest
from upge.trees import first_line

FIELDS = ("prompt", "system")
#: Arguments of transformers' `apply_chat_template` that are not variables of a template, or that are set here.
RESERVED = (
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)
#: Bounds of a format string, so that no prompt becomes many times as long as its problem.
LONGEST_TEMPLATE, MOST_FIELDS = 100_000, 100
#: Seconds of CPU time that a chat template may take for one prompt.
LONGEST_RENDERING = 5.0
#: A tag and white space at the end of a generation prompt.
_OPENED = re.compile(r"(<[A-Za-z_]+>)(\s*)\Z")
#: A folder with a tokenizer has at least one of these files.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Prompting:
    r"""Encodes problems as prompts of a model, and responses as its output.

    Attributes:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        template: "chat" for the tokenizer's chat template with the generation prompt, else a format string with
            {prompt} and optionally {system} (empty without a system message). Plain braces are doubled.
        system: the system message of problems without their own; empty for none.
        instruction: appended unchanged to every prompt, such as "\nPut the final answer in \boxed{}."
        opening: the beginning of every response, which is written into the prompt, such as a tag for thoughts. It is
            removed from demonstrations that begin with it, as is a tag with which the chat template opens a response.
        template_arguments: variables of the chat template, such as {"enable_thinking": False}.
        stop_token_ids: tokens that end a response. The tokenizer's end of sequence, with which demonstrations end, is
            added in front, and the special token that ends a turn in a chat template is added at the end.

    Raises:
        ConfigError: the template is not a format string with {prompt}; the tokenizer has no chat template, or one
            without a variable of `template_arguments`; or, by `text`, the chat template refuses a problem's messages or
            a format string gets a conversation of several turns.
        ModelError: the tokenizer has no end-of-sequence token.
    """

    tokenizer: Tokenizer
    template: str = "chat"
    system: str = ""
    instruction: str = ""
    opening: str = ""
    stop_token_ids: tuple[int, ...] = ()
    template_arguments: Mapping[str, object] = field(default_factory=dict, hash=False)

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
        self._check_arguments(name)
        stops = [self.tokenizer.eos_token_id, *self.stop_token_ids, *self._turn_end()]
        object.__setattr__(self, "stop_token_ids", tuple(dict.fromkeys(stops)))

    @classmethod
    def load(cls, path: str, **settings: Any) -> Prompting:
        """Load the tokenizer and the stop tokens of a model.

        Args:
            path: a folder or hub name. Its generation_config.json may add stop tokens.
            **settings: template, system, instruction, opening and template_arguments, as for the class.

        Raises:
            ModelError: there is no tokenizer; and as for the class.
        """
        return cls(load_tokenizer(path), stop_token_ids=_generation_stops(path), **settings)

    @property
    def has_system(self) -> bool:
        """Whether the template has a place for system messages."""
        return self.template == "chat" or "system" in _fields(self.template)

    def text(self, problem: Problem) -> str:
        """The text of the prompt that the model gets."""
        prompt, system = problem.prompt + self.instruction, problem.system or self.system
        if self.template != "chat":
            if problem.history:
                raise ConfigError(
                    f"model.template: {self.template!r} has no place for the {len(problem.history)} turns before the "
                    f"last one of {problem.where or problem.id}; use the chat template (model.template=chat)"
                )
            return self.template.format(prompt=prompt, system=system) + self.opening
        turns = [*([("system", system)] if system else []), *problem.history, ("user", prompt)]
        messages = [{"role": role, "content": content} for role, content in turns]
        return self._chat(messages, add_generation_prompt=True) + self.opening

    def prompt_ids(self, problems: Sequence[Problem]) -> list[tuple[int, ...]]:
        """The token ids of the prompts. For many problems they are cached, see `tokens_of`."""
        settings = ("prompts", self.template == "chat", *self._ends())
        encoded = tokens_of([self.text(p) for p in problems], self._prompt_ids, self.tokenizer, settings)
        return [tuple(ids) for ids in encoded]

    def _prompt_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        # A chat template writes the special tokens itself. For a format string, the tokenizer adds its BOS.
        if self.template == "chat":
            return self._tokens(texts, add_special_tokens=False)
        encoded = self._tokens(texts, add_special_tokens=True)
        end = self.tokenizer.eos_token
        return [self._opened_once(ids, keep_end=text.endswith(end)) for ids, text in zip(encoded, texts, strict=True)]

    def response_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids of responses, each followed by the end of sequence, unless its text ends with a stop token."""
        return [tuple(ids) for ids in self.response_arrays(texts)]

    def response_arrays(self, texts: Sequence[str]) -> list[array[int]]:
        """`response_ids` with four bytes per token, for many long responses. They are cached like prompts."""
        bare = [self._continuing(text) for text in texts]
        return tokens_of(bare, self._ended_ids, self.tokenizer, ("responses", *self._ends(), self.stop_token_ids))

    def _continuing(self, text: str) -> str:
        """A response without what the prompt has already opened, and without white space after a stop token."""
        text = text.removeprefix(self.opening)
        tag, space = self._template_opening
        if tag and not self.opening and text.startswith(tag):
            text = text.removeprefix(tag).removeprefix(space)
        ended = text.rstrip()
        return ended if ended.endswith(self._stop_texts) else text

    @functools.cached_property
    def _template_opening(self) -> tuple[str, str]:
        """The tag, such as <think>, with which the chat template opens a response, and the white space after it."""
        if self.template != "chat":
            return "", ""
        try:
            text = self._chat([{"role": "user", "content": "?"}], add_generation_prompt=True)
        except ConfigError:
            return "", ""
        opened = _OPENED.search(text)
        # A special token belongs to the template's turns.
        if opened is None or opened[1] in self.tokenizer.all_special_tokens:
            return "", ""
        return opened[1], opened[2]

    @functools.cached_property
    def _stop_texts(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.convert_ids_to_tokens(list(self.stop_token_ids)))

    def _ended_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        ends, stops = (self.tokenizer.eos_token_id,), set(self.stop_token_ids)
        encoded = self._tokens(texts, add_special_tokens=False)
        return [ids if ids and ids[-1] in stops else (*ids, *ends) for ids in encoded]

    def _ends(self) -> tuple[int | str | None, ...]:
        """What the tokenizer adds at the ends of a text, apart from its backend."""
        return self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.eos_token

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Responses as text, without special tokens."""
        # The tokenizer would turn an empty list into one text.
        return self.tokenizer.batch_decode(list(responses), skip_special_tokens=True) if responses else []

    def read(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, including special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def describe(self, problem: Problem) -> str:
        """A text for the user: template, stop tokens, padding, and one rendered prompt."""
        tokens = self.tokenizer
        stops = ", ".join(f"{tokens.convert_ids_to_tokens(i)!r} ({i})" for i in self.stop_token_ids)
        # Training packs sequences. Only one engine pads: on the left, masked, with the first stop token.
        pad = f"{tokens.convert_ids_to_tokens(self.stop_token_ids[0])!r}"
        kind = "the tokenizer's chat template" if self.template == "chat" else "a format string (model.template)"
        ids = self.prompt_ids([problem])[0]
        begins = f"{tokens.convert_ids_to_tokens(ids[0])!r}" if ids else "nothing"
        return (
            f"prompts: {kind}; responses end with {stops}; padding token: {pad}\n"
            f"example prompt ({len(ids)} tokens, starting with {begins}):\n"
            + "\n".join(f"  | {line}" for line in self.text(problem).split("\n"))
        )

    def _chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        options = {**self.template_arguments, "add_generation_prompt": add_generation_prompt, "tokenize": False}
        longest = LONGEST_TEMPLATE + MOST_FIELDS * sum(len(message["content"]) for message in messages)
        try:
            with _cpu_limit(LONGEST_RENDERING):
                text = self.tokenizer.apply_chat_template(messages, **options)
            if len(text) > longest:
                raise ValueError(f"it makes a prompt of {len(text)} characters, more than {longest}")
            return text
        except Exception as error:  # a template is a program, which may fail in any way
            roles = " and ".join(dict.fromkeys(message["role"] for message in messages))
            raise ConfigError(
                f"model.template: the tokenizer's chat template refuses messages of {roles} ({error!s:.200}); give a "
                "format string with {prompt}, or leave system messages out (model.system, data.system=drop)"
            ) from error

    def _check_arguments(self, name: str) -> None:
        """Refuse arguments that would have no effect: the template is a format string or does not read them."""
        if not self.template_arguments:
            return
        if self.template != "chat":
            raise ConfigError(
                f"model.template_arguments: {dict(self.template_arguments)} are variables of a chat template, and "
                f"model.template={self.template!r} is none; set model.template=chat, or leave them out"
            )
        template = self.tokenizer.chat_template
        text = template if isinstance(template, str) else " ".join(map(str, dict(template).values()))
        for argument in self.template_arguments:
            if argument in RESERVED:
                raise ConfigError(f"model.template_arguments.{argument}: this is not a variable of a chat template")
            if not re.search(rf"\b{re.escape(argument)}\b", text):
                raise ConfigError(
                    f"model.template_arguments.{argument}: the chat template of {name} has no such variable; leave it "
                    "out, or correct its name"
                )

    def _turn_end(self) -> tuple[int, ...]:
        """The special token that the chat template writes after the assistant's message, if there is one.

        A model trained with the template ends its turn with this token, even if its end of sequence is another.
        """
        if self.template != "chat":
            return ()
        message = "the answer"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": message}]
        try:
            turn = self._chat(messages, add_generation_prompt=False)
        except ConfigError:
            return ()
        ids = self._tokens([turn.rpartition(message)[2]], add_special_tokens=False)[0]
        return ids[:1] if ids and ids[0] in self._special_ids() else ()

    def _special_ids(self) -> set[int]:
        """All special tokens, also those that the tokenizer does not name among its extra ones."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def _opened_once(self, ids: tuple[int, ...], keep_end: bool) -> tuple[int, ...]:
        """`ids` without a second BOS, if the template has its own, and without the EOS that some tokenizers add."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == (bos, bos):
            ids = ids[1:]
        return ids[:-1] if len(ids) > 1 and ids[-1] == eos and (not keep_end or ids[-2] == eos) else ids

    def _tokens(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
        if not texts:
            return []
        return [tuple(ids) for ids in self.tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]]


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the model at `path`.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make an empty tokenizer from config.json.
        raise ModelError(
            f"model.path: '{path}' has no tokenizer; the folder needs one of {', '.join(TOKENIZER_FILES)}, as "
            "tokenizer.save_pretrained(folder) writes them"
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a file of the hub or of a user may be wrong in any way
        raise ModelError(
            f"model.path: no tokenizer could be loaded for '{path}' ({first_line(error)}). Give the folder of "
            "a Hugging Face causal LM, or a hub name that is in the local cache or can be downloaded"
        ) from error


def _generation_stops(path: str) -> tuple[int, ...]:
    """The tokens that end a response according to generation_config.json, such as the end of a turn.

    Raises:
        ModelError: there is such a file, but it cannot be read, or names no tokens.
    """
    from transformers import GenerationConfig

    file = Path(path) / "generation_config.json"
    try:
        more = GenerationConfig.from_pretrained(path).eos_token_id
    except Exception as error:  # a file of the hub or of a user may be wrong in any way
        if not file.is_file():
            return ()
        raise ModelError(f"model.path: {file} cannot be read ({first_line(error)}); remove or fix it") from error
    stops = () if more is None else tuple(more) if isinstance(more, (list, tuple)) else (more,)
    if not all(type(token) is int for token in stops):
        raise ModelError(f"model.path: eos_token_id in {file} is {more!r}; give a token's number, or a list of them")
    return stops


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once the process has computed for this long; only in the main thread."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it does not end within {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def format_fields(template: str, key: str) -> set[str]:
    """The names in braces of a format string, the setting `key`.

    Raises:
        ConfigError: it is not a format string, formats its fields, or is too long.
    """
    try:
        fields = _fields(template)
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r} is not a format string ({error}); double a plain brace") from error
    formatted = [name for _, name, spec, conversion in string.Formatter().parse(template) if spec or conversion]
    if formatted:
        raise ConfigError(f"{key}: {template[:80]!r} formats {{{formatted[0]}}}; write the plain {{prompt}}")
    if len(template) > LONGEST_TEMPLATE or template.count("{") > MOST_FIELDS:
        raise ConfigError(
            f"{key}: {len(template)} characters with {template.count('{')} braces; give at most {LONGEST_TEMPLATE} "
            f"characters and {MOST_FIELDS} braces"
        )
    return fields


def _check_template(template: str) -> None:
    fields = format_fields(template, "model.template")
    for name in fields - set(FIELDS):
        hint = nearest(name, FIELDS) if name else "name it {prompt}"
        raise ConfigError(f"model.template: {template!r} has the unknown field '{{{name}}}'; {hint}")
    if "prompt" not in fields:
        raise ConfigError(
            f"model.template: {template!r} has no {{prompt}}; give 'chat' or a format string with {{prompt}}"
        )
