"""From problems to tokens: several demonstrations, limits whose effect is counted, messages that name the row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.pretrain import build_tokenizer
from upge.data import Problem, Prompting, encode
from upge.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def chat():
    return Prompting(build_tokenizer())


@pytest.fixture(scope="module")
def plain(chat):
    return replace(chat, template="{prompt}")


def texts(prompting: Prompting, responses) -> list[str]:
    return [prompting.tokenizer.decode(ids) for ids in responses]


def test_by_hand(chat):
    problem = Problem("a", "1+2=?", "3", ("1+2=\\boxed{3}", "\\boxed{3}"))
    limits = {"max_prompt_tokens": 32, "max_response_tokens": 64}
    (example,) = encode([problem], chat, **limits).examples
    assert chat.tokenizer.decode(example.prompt_ids) == "1+2=?\n" and len(example.prompt_ids) == 6
    assert texts(chat, example.demonstrations) == ["1+2=\\boxed{3}<eos>", "\\boxed{3}<eos>"]
    assert [len(ids) for ids in example.demonstrations] == [14, 10]
    assert example.problem == problem and example.rejected_ids is None
    (other,) = encode([replace(problem, system="Be", demonstrations=())], chat, **limits).examples
    assert chat.tokenizer.decode(other.prompt_ids) == "Be\n1+2=?\n" and other.demonstrations == ()


def test_any_text_with_the_tiny_tokenizer(chat):
    """What the vocabulary does not have becomes some token of it; nothing is lost, the decoded prompt is the text."""
    problem = Problem("a", "Tom’s café sold 5 cups at £2.", "10", ("It earned £10.\n\\boxed{10}",))
    (example,) = encode([problem], chat, max_prompt_tokens=99, max_response_tokens=99).examples
    assert chat.tokenizer.decode(example.prompt_ids) == problem.prompt + "\n"
    assert max([*example.prompt_ids, *example.demonstrations[0]]) < len(chat.tokenizer)


def test_counts_what_the_limits_touch(plain):
    problems = [
        Problem("fits", "12=?", "12", ("12",)),
        Problem("long prompt", "1234567=?", "1", ("1",), where="file:2"),
        Problem("long demonstration", "5=?", "5", ("55555",), where="file:3"),
        Problem("edge", "12345=?", "5", ("5555",)),
    ]
    limits = {"max_prompt_tokens": 7, "max_response_tokens": 5}
    dropped = encode(problems, plain, overlong_prompts="drop", **limits)
    assert [e.problem.id for e in dropped.examples] == ["fits", "long demonstration", "edge"]
    assert [len(e.demonstrations) for e in dropped.examples] == [1, 0, 1]
    assert (dropped.dropped_prompts, dropped.dropped_demonstrations, dropped.truncated_demonstrations) == (1, 1, 0)
    cut = encode(problems, plain, overlong_prompts="drop", overlong_demonstrations="truncate", **limits)
    assert texts(plain, cut.examples[1].demonstrations) == ["55555"]
    assert (cut.dropped_prompts, cut.dropped_demonstrations, cut.truncated_demonstrations) == (1, 0, 1)


def test_of_several_demonstrations_the_long_ones_go(plain):
    """Each is counted; the pair hangs on the first, which is its chosen side."""
    limits = {"max_prompt_tokens": 7, "max_response_tokens": 5}
    long, short = "55555", "5"
    for demonstrations, kept, pair in (
        ((short, long, "6"), ["5<eos>", "6<eos>"], True),
        ((long, short, long), ["5<eos>"], False),
        ((long, long), [], False),
    ):
        problem = Problem("a", "5=?", "5", demonstrations, rejected="7")
        dropped = encode([problem], plain, **limits)
        assert texts(plain, dropped.examples[0].demonstrations) == kept
        assert (dropped.examples[0].rejected_ids is not None) == pair
        assert (dropped.dropped_demonstrations, dropped.dropped_pairs) == (demonstrations.count(long), int(not pair))
        cut = encode([problem], plain, overlong_demonstrations="truncate", **limits)
        assert len(cut.examples[0].demonstrations) == len(demonstrations)
        assert cut.truncated_demonstrations == demonstrations.count(long)
        assert cut.examples[0].rejected_ids is not None and cut.truncated_pairs == int(not pair)


def test_errors_name_the_row_the_length_and_the_key(plain):
    long = Problem("a", "1234567=?", "1", ("1", "123456"), where="file:2")
    limits = {"max_prompt_tokens": 7, "max_response_tokens": 5}
    said = r"file:2.* 9 tokens.*rollout\.max_prompt_tokens=7.*data_policy\.overlong_prompts"
    with pytest.raises(DataError, match=said):
        encode([long], plain, **limits)
    with pytest.raises(DataError, match=r"no problem is left: all 1 .*rollout\.max_prompt_tokens=7"):
        encode([long], plain, overlong_prompts="drop", **limits)
    limits["max_prompt_tokens"] = 9
    said = r"file:2.* 7 tokens.*rollout\.max_response_tokens=5.*data_policy\.overlong_demonstrations"
    with pytest.raises(DataError, match=said):
        encode([long], plain, overlong_demonstrations="error", **limits)
    with pytest.raises(ConfigError, match=r"data_policy\.overlong_prompts: 'dorp'.*did you mean 'drop'"):
        encode([long], plain, overlong_prompts="dorp", **limits)
    with pytest.raises(DataError, match="no problems"):
        encode([], plain, **limits)
