"""What verifiers ask for, the range that they declare, sums of verifiers, and groups that are compared."""

from __future__ import annotations

import re
import sys
from concurrent.futures import wait
from pathlib import Path

import pytest

from tests.verify_pools import rewards
from upge.errors import ConfigError
from upge.verify import Declared, Item, Member, Reward, Verdict, VerifierPool, load, terms

OWN = "tests.reward_examples"
SUM = f"number + 0.5*{OWN}.Signed - 0.25*{OWN}.too_long"
GROUP = (f"{OWN}.shorter", f"{OWN}.ranks", f"{OWN}.bad_list")


@pytest.fixture(scope="module")
def pool():
    names = ["everything", "no_answer", "plain", "Signed", "shorter", "ranks", "bad_list", "too_long"]
    sums = [SUM, f"0.5*{OWN}.shorter + {OWN}.plain", f"0.5*{OWN}.plain"]
    with VerifierPool([*(f"{OWN}.{name}" for name in names), *sums], workers=2, time_limit=600.0) as pool:
        yield pool


def test_a_verifier_gets_what_it_asks_for_by_name(pool):
    row = {"level": 2, "word": "r"}
    full = Item("r", "a", "p", f"{OWN}.everything", row, 3, True)
    others = [full._replace(tokens=4), full._replace(is_truncated=False), full._replace(row={"level": 3})]
    assert rewards(pool.score([full, *others])) == [1, 0, 0, 0]
    named = Item("r", "", None, f"{OWN}.no_answer", row)
    assert rewards(pool.score([named, named._replace(row={"word": "s"})])) == [1, 0]
    assert rewards(pool.score([Item("an a", "a", verifier=f"{OWN}.plain")])) == [1]
    assert Declared.by(load(f"{OWN}.plain")).asks == {"response", "answer", "prompt"}
    assert Declared.by(lambda text, truth, question: 1.0).asks == frozenset(), "called by position"
    assert not Declared.by(load(f"{OWN}.no_answer")).needs_answer and Declared.by(load("math")).needs_answer


def test_a_row_goes_to_a_worker_only_where_it_is_asked_for(pool):
    item = Item("r", "a", "p", row={"level": 2, "word": "r"}, tokens=3, is_truncated=True)
    more = {name: pool._part(f"{OWN}.{name}", item).more for name in ("everything", "no_answer", "plain", "too_long")}
    assert more["plain"] == "" and more["too_long"] == '{"tokens": 3}'
    assert more["no_answer"] == '{"row": {"level": 2, "word": "r"}}' and "is_truncated" in more["everything"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("misspelled", "(response, anwser, row) with `anwser`; name them as in response, answer, prompt, row"),
        ("both", "asks for `response` and `responses`"),
        ("upside_down", "declares rewards from minimum=1.0 to maximum=1.0; give two numbers"),
    ],
)
def test_declarations_that_are_refused(name, said):
    with pytest.raises(ConfigError, match="verify.verifier") as caught:
        load(f"{OWN}.{name}")
    assert said in str(caught.value)


def test_rewards_lie_in_the_declared_range_and_a_failure_never_pays(pool):
    name = f"{OWN}.Signed"
    good = pool.score([Item(text, "", verifier=name) for text in ("-1", "-0.5", "2")])
    assert rewards(good) == [-1, -0.5, 2]
    above, below = pool.score([Item(text, "", verifier=name) for text in ("2.5", "nan")])
    with VerifierPool(name, workers=1, time_limit=0.5) as hurried:
        (hang,) = hurried.score([Item("hang", "")])
    assert (above.status, below.status, hang.status) == ("error", "error", "timeout")
    assert "must return a finite number in [-1, 2]" in above.detail
    assert [verdict.reward for verdict in (above, below, hang)] == [-1, -1, -1]
    assert (pool.reward(name).minimum, pool.reward(name).maximum) == (-1, 2)


def test_a_sum_of_verifiers_is_one_reward():
    assert terms("math") == (("math", 1.0, ""),) and terms("0.5 * a.b") == (("a.b", 0.5, ""),)
    assert terms("math+.2*a.b-3*c.d") == (("math", 1.0, ""), ("a.b", 0.2, ""), ("c.d", -3.0, ""))
    for text in ("", "math 2", "2", "a b", "math +", "math as", "math as a.b", "math as 2", "math as a as b"):
        assert terms(text) == ((text, 1.0, ""),), "no sum: `load` refuses the name"
    with pytest.raises(ConfigError, match="names 'math' twice"):
        terms("math + 2*math")
    with pytest.raises(ConfigError, match="found 'a.b': there is no module 'a'"):
        VerifierPool("math + a.b")


def test_the_verifiers_of_a_sum_give_rewards_with_names():
    named = terms("math as correct - 0.2 * a.b  as  style + as")
    assert named == (("math", 1.0, "correct"), ("a.b", -0.2, "style"), ("as", 1.0, ""))
    assert [term.reward for term in named] == ["correct", "style", "as"]
    for text, said in (
        ("math as a + 0.5*number as a", "has two rewards called 'a'; give each its own name"),
        ("math as number + number", "has two rewards called 'number'"),
        ("math as mean + number", "calls a reward 'mean', but the metric reward/mean is that of the sum"),
    ):
        with pytest.raises(ConfigError, match="verify.verifier") as caught:
            terms(text)
        assert said in str(caught.value)


def test_the_ends_of_a_sum_are_those_of_its_parts():
    signed = Reward.load(f"number as a - 0.5*{OWN}.Signed as b")
    assert signed.best() == Verdict(1.5, rewards=(("a", 1.0, 1.0), ("b", -1.0, -0.5)))
    assert signed.worst() == Verdict(-1.0, rewards=(("a", 0.0, 1.0), ("b", 2.0, -0.5)))
    assert (signed.minimum, signed.maximum) == (-1.0, 1.5)
    one = Reward.load("number as a")
    assert one.best() == Verdict(1.0) and one.named(one.worst()) == (("a", 0.0, 1.0),), "one verifier is no sum"
    assert signed.best().reward_of("b") == -1.0 and signed.best().reward_of("") == 1.5 == signed.best().reward_of("c")


def test_the_reward_that_decides_on_success():
    both, one = Reward.load("number as a + 0.5*boxed"), Reward.load("number as a")
    assert both.deciding("") is None and both.deciding("a").name == "number" and both.deciding("boxed").weight == 0.5
    assert one.deciding("a") is None and one.deciding("b") is None, "a single verifier decides itself"
    with pytest.raises(ConfigError, match="verify.success: found 'b', but .* the rewards a, boxed; give one of them"):
        both.deciding("b")


def test_the_parts_of_a_sum_are_told(pool):
    right, wrong = r"so \boxed{2}", r"so \boxed{3}"
    items = [Item(text, "2", verifier=f"{by}{OWN}.plain") for by in ("0.5*", "") for text in (right, wrong)]
    assert rewards(pool.score(items)) == [0.5, 0, 1, 0], "the same work has two rewards"
    numbers = [Item(text, "", verifier=SUM, tokens=n) for text, n in (("1", 3), ("-1", 5))]
    first, second = pool.score(numbers)
    assert first.rewards == (("number", 0.0, 1.0), (f"{OWN}.Signed", 1.0, 0.5), (f"{OWN}.too_long", 0.0, -0.25))
    assert (first.reward, second.reward) == (0.5, -0.75)
    (failed,) = pool.score([Item("five", "", verifier=SUM)])
    assert failed.status == "error" and failed.detail.startswith(f"{OWN}.Signed: ValueError")
    assert failed.reward == -0.75, "every part that failed counts as its worst case"
    assert failed.rewards == (("number", 0.0, 1.0), (f"{OWN}.Signed", -1.0, 0.5), (f"{OWN}.too_long", 1.0, -0.25))
    assert failed.reward == sum(one.weight * one.reward for one in failed.rewards)
    assert (pool.reward(SUM).minimum, pool.reward(SUM).maximum) == (-0.75, 2.0)


def test_a_verifier_compares_the_responses_to_a_prompt(pool):
    members = [Item(text, "", "p", GROUP[1], member=Member("g", 3, i)) for i, text in enumerate("cab")]
    futures = [pool.submit(item) for item in members[:0:-1]]
    assert not wait(futures, timeout=0.2).done, "the group is not complete"
    futures.append(pool.submit(members[0]))
    assert [future.result().reward for future in reversed(futures)] == [2 / 3, 0, 1 / 3]
    tokens = [Item("x", "", "p", GROUP[0], tokens=n, member=Member("h", 2, i)) for i, n in enumerate((5, 4))]
    assert rewards(pool.score(tokens)) == [0, 1]
    assert rewards(pool.score([tokens[0]._replace(member=None)])) == [1], "a group of its own"
    both = f"0.5*{OWN}.shorter + {OWN}.plain"
    assert rewards(pool.score([item._replace(verifier=both, answer="x") for item in tokens])) == [1, 1.5]


@pytest.mark.parametrize("text", ["short", "high", "text", "none"])
def test_a_list_that_does_not_fit_its_group_fails_for_all(pool, text):
    items = [Item(text, "", verifier=GROUP[2], member=Member(text, 2, i)) for i in range(2)]
    for verdict in pool.score(items):
        assert (verdict.reward, verdict.status) == (0, "error")
        assert "a list of 2 rewards, each a finite number in [0, 1]" in verdict.detail


def test_futures_of_sums_and_groups_can_be_cancelled():
    with VerifierPool([SUM, GROUP[1]], workers=1, time_limit=3600) as pool:
        hanging = pool.submit(Item("hang", "", verifier=SUM, tokens=1))
        assert hanging.cancel()
        assert pool.submit(Item("1", "", verifier=SUM, tokens=1)).result(300).reward == 0.5, "the worker is free"
        alone = pool.submit(Item("a", "", verifier=GROUP[1], member=Member("g", 2, 0)))
        other = pool.submit(Item("a", "", verifier=GROUP[1], member=Member("h", 2, 0)))
        assert len(pool._groups._waiting) == 2 and other.cancel() and len(pool._groups._waiting) == 1
    assert alone.cancelled(), "closing the pool ends the wait for a group"


def test_the_examples_of_the_docs_are_verifiers(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "verification.md").read_text("utf-8")
    for source, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_project").mkdir()
    score = "def compute_score(source, text, truth, extra=None): return float(text == truth and source == 'gsm8k')"
    (tmp_path / "my_project" / "rewards.py").write_text(score, "utf-8")
    names = [f"my_rewards.{name}" for name in ("names_the_unit", "in_time", "is_shortest")]
    total = "my_verl_rewards.verl_score + 0.2*my_rewards.in_time"
    with VerifierPool([*names, "my_verifiers.Palindrome", total], workers=1, time_limit=600) as pool:
        unit, late, early, word, whole = pool.score([
            Item("5 cm", "", verifier=names[0], row={"unit": "cm"}),
            Item("", "", verifier=names[1], tokens=9, is_truncated=True),
            Item("", "", verifier=names[1], tokens=250, is_truncated=False),
            Item("So:\nabba", "ab", verifier="my_verifiers.Palindrome"),
            Item("5", "5", verifier=total, row={"data_source": "gsm8k"}, tokens=500, is_truncated=False),
        ])  # fmt: skip
        assert (unit.reward, late.reward, early.reward, word.reward, whole.reward) == (1, -1, 0.75, 1, 1.1)
        pair = [Item("x", "", verifier=names[2], tokens=n, member=Member("g", 2, i)) for i, n in enumerate((7, 6))]
        assert rewards(pool.score(pair)) == [0, 1]
    for name in ("my_rewards", "my_verl_rewards", "my_verifiers", "my_project", "my_project.rewards"):
        sys.modules.pop(name, None)
