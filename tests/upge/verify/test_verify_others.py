"""The verifiers beside the mathematical one: exact numbers, options, patterns, reasoning-gym's."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from tests.verify_pools import boxed
from upge.verify import VerifierPool, load
from upge.verify.choice import named
from upge.verify.number import read_number

# --- numbers -------------------------------------------------------------------------------------------------------

NUMBERS = {
    "42": 42, "-3": -3, "+5": 5, "05": 5, "5.": 5, ".5": Fraction(1, 2), "142.0": 142, "\u22125": -5, "1,000": 1000,
    "1 000": 1000, "1{,}000": 1000, "5\\,000": 5000, "12,345,678.9": Fraction(123456789, 10),
    "$1,000.50": Fraction(2001, 2), r"\$5": 5, "-$5": -5, "$-5$": -5, "5\u20ac": 5, "5%": 5, r"5\%": 5,
    "5 percent": 5, "3/4": Fraction(3, 4), "-3/4": Fraction(-3, 4), r"\frac{3}{4}": Fraction(3, 4),
    r"-\dfrac34": Fraction(-3, 4), r"\frac{-3}{4}": Fraction(-3, 4), "1 3/4": Fraction(7, 4),
    r"1\frac{3}{4}": Fraction(7, 4), r"-1\frac12": Fraction(-3, 2), "1.5e3": 1500, "2E-1": Fraction(1, 5),
    r"1.6\times 10^{-3}": Fraction(16, 10_000), "2*10^5": 200_000, "10^{3}": 1000, "x = 5": 5, "3+5=8": 8,
    r"\approx 5": 5, "5 cm": 5, r"5\text{ cm}^2": 5, "5 cm^2": 5, "10 m/s": 10, r"5^\circ": 5, r"5 \mathrm{~km/h}": 5,
    "60 miles per hour": 60, "5 apples.": 5, "1/2 cup": Fraction(1, 2), "5 million": 5_000_000,
    r"2.5\text{ billion dollars}": 2_500_000_000, "9" * 999: int("9" * 999), r"\text{5}": 5, "{5}": 5,
    "\uff15": 5, "\uff0d5": -5,
}  # fmt: skip
NO_NUMBERS = [
    "", "cm", "five", "5 or 6", "5 and 6", "5, 6", "60, 120", "5; 6", "5-6", "5 - 6", "5 or six", "5 feet six",
    "5 ft. 6 in.", "5:30", "1.2.3", "1,23", "12,34", "1,000,00", "1 0", "12 34", "5^2", "5!", "(3)(5)", r"\sqrt{4}",
    r"5\pi", "5i", "5 x", "2 pi", "--5", "5 -", "5/0", "1/2/3", r"\frac{1}{-2}", "5 and a half", "5 dozen",
    "5 is not right", "not 5", "0x1F", "1_000", "inf", "nan", "1e", "5e999999", "1e1001", "10^{999999}",
    r"5\times 10^{3", "9" * 1001, "4\u200b2", "\u202e24", "\u0665", "\U0001d7d3", "5\0", "\ud800", "O", "l",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:20])
def test_a_number_is_read_exactly(text: str) -> None:
    assert read_number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: ascii(text[:20]))
def test_what_is_no_single_number_is_none(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (boxed("1,250"), "1250", 1.0),
        (boxed("0.3333333333"), "1/3", 0.0),
        (boxed(r"\frac{2}{6}"), "1/3", 1.0),
        (boxed("0.1") + boxed("0.2"), "0.1", 0.0),
        ("18 eggs, so 18 * 2 = $36 every day.", "36", 1.0),
        ("The answer is 36 dollars.", "36.00", 1.0),
        ("#### 36", "36", 1.0),
        ("The answer is 36 or 37.", "36", 0.0),
        (boxed("36") + r" so \boxed{", "36", 0.0),
        ("36 is what I hoped for, it is 35", "36", 0.0),
        (boxed("what?"), "what?", 0.0),
    ],
)
def test_number(response: str, answer: str, reward: float) -> None:
    assert load("number")(response, answer) == reward


# --- options -------------------------------------------------------------------------------------------------------

PROMPT = "Which one?\n\nA) It will decrease.\nB) Vitamin A\nC) 5\nD) 7 or 8\nE) Both\nF) both"
DIGITS = "Which one?\n1) 3\n2) 1\n3) 4\n4) 2"
NAMED = {
    "C": "C", "c": "C", "(C)": "C", "C)": "C", "C.": "C", "[C]": "C", r"\text{C}": "C", r"\textbf{(C)}": "C",
    "**C**": "C", r"\textbf{(C) }5": "C", "C) 5": "C", "(C) 5": "C", "C: 5": "C", "Option C": "C", "choice (C)": "C",
    "Answer: C": "C", "C, because it is": "C", "C because A is not": "C", "A, since": "A", "5": "C", "$5$": "C",
    "It will decrease": "A", "it will  DECREASE.": "A", "Vitamin A": "B", "B) Vitamin A": "B", "D) 7 or 8": "D",
    "7 or 8": "D", "A or C": "", "A, C": "", "C or D": "", "C, D": "", "A and C": "", "B/C": "", "B & C": "",
    "(B)(C)": "", "(B) (C)": "", "B. C.": "", "BC": "", "B) and C)": "", "C or D because": "", "B) 5": "", "G": "",
    "G) new": "", "A planet": "", "B is wrong": "", "Both": "", "both": "", "E) Both": "E", "Neither": "",
    "All of the above": "", "3": "", "": "", "?": "", "C" * 2000: "", "\u0421": "", "\uff23": "", "\u202eC": "",
    "C\u200b": "", "C\0": "", "I think it must be C": "",
}  # fmt: skip


@pytest.mark.parametrize("given", NAMED, ids=lambda text: ascii(text[:20]))
def test_the_option_that_an_answer_names(given: str) -> None:
    assert named(given, PROMPT) == NAMED[given]


def test_options_without_letters_or_without_a_list() -> None:
    assert [named(text, DIGITS) for text in ("2", "(2)", "2) 1", "2) 4", "5", "B")] == ["2", "2", "2", "", "", ""]
    assert [named(text) for text in ("E", "(e)", "E) anything", "5", "Vitamin A")] == ["E", "E", "E", "5", ""]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("It is 5.\nThe answer is (C).", 1.0),
        ("A is wrong, B is wrong.\n\nC) 5", 1.0),
        (r"Hence \boxed{\text{C}}", 1.0),
        (r"\boxed{C} or rather \boxed{D}", 0.0),
        (r"\boxed{D} or rather \boxed{C}", 1.0),
        ("<answer> C </answer>", 1.0),
        ("<answer> C", 0.0),
        (PROMPT, 0.0),
        ("C is not it", 0.0),
        ("", 0.0),
    ],
)
def test_choice(response: str, reward: float) -> None:
    assert load("choice")(response, "C", PROMPT) == reward


# --- patterns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "pattern", "reward"),
    [
        (boxed("yes"), "yes|no", 1.0),
        (boxed("yes, or no"), "yes|no", 0.0),
        (boxed("YES"), "(?i)yes", 1.0),
        ("The answer is 2024-05-17.", r"\d{4}-\d\d-\d\d", 1.0),
        ("<answer>a\nb</answer>", "a.b", 0.0),
        ("<answer>a\nb</answer>", "(?s)a.b", 1.0),
        ("", ".*", 0.0),
        (boxed(""), ".*", 0.0),
    ],
)
def test_regex(response: str, pattern: str, reward: float) -> None:
    assert load("regex")(response, pattern) == reward


def test_a_pattern_that_never_ends_costs_its_answer_alone() -> None:
    with VerifierPool(["regex"], workers=1, time_limit=1.0) as pool:
        slow, quick = pool.score([(boxed("a" * 60), "(a+)+b"), (boxed("a"), "(a+)+")])
    assert (slow.status, quick.reward) == ("timeout", 1.0)


# --- reasoning-gym -------------------------------------------------------------------------------------------------

REFUSED = {
    "number": ["", "five", "5 or 6", "1e5000"],
    "choice": ["", "AB", "the first", "A, B", "\u0421"],
    "regex": ["", "(", "a{2,1}"],
    "reasoning_gym": ["", "5", "{}", '{"answer": "5", "metadata": {"source_dataset": "nothing"}}'],
}


@pytest.mark.parametrize(("name", "answer"), [(name, answer) for name, all_ in REFUSED.items() for answer in all_])
def test_ground_truths_that_are_refused(name: str, answer: str) -> None:
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="the ground truth ") as caught:
        load(name).check_answer(answer)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("name", "answer"), [("number", "3/4"), ("choice", "(C)"), ("choice", "2"), ("regex", "a|b")])
def test_ground_truths_that_are_taken(name: str, answer: str) -> None:
    assert load(name).check_answer(answer) is None


#: One of reasoning-gym's sources leaves a file open.
LEAVES_FILES = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


def entry(task: str, **settings) -> dict:
    gym = pytest.importorskip("reasoning_gym")
    made = gym.create_dataset(task, size=1, seed=5, **settings)[0]
    return json.loads(json.dumps(made, default=str))


@LEAVES_FILES
@pytest.mark.parametrize("task", ["chain_sum", "prime_factorization", "arc_agi", "countdown", "graph_color"])
def test_reasoning_gym_scores_by_its_own_rules(task: str) -> None:
    made = entry(task)
    verifier, answer = load("reasoning_gym"), json.dumps(made)
    assert verifier.check_answer(answer) is None
    if made["answer"] is not None:
        right = f"<answer>{made['answer']}</answer>"
        assert verifier(right, answer) == 1.0
        assert verifier(right + " no: <answer>", answer) == 0.0
    for wrong in ("no idea", "", "<answer></answer>", boxed("9" * 5000), "\ud800\0"):
        assert verifier(wrong, answer) < 0.1


def test_reasoning_gym_in_a_pool_with_a_part_of_the_reward() -> None:
    made = entry("letter_counting")
    answer = json.dumps(made | {"answer": "12"})
    with VerifierPool(["math", "reasoning_gym"], workers=1, time_limit=20.0) as pool:
        items = [(f"I find\n{text}", answer, None, "reasoning_gym") for text in ("12", "12 xx", "13")]
        verdicts = pool.score([*items, (boxed("12"), answer, None, "reasoning_gym"), (boxed("2/4"), "1/2")])
    assert [v.reward for v in verdicts] == [1.0, 0.4, 0.0, 1.0, 1.0]
    assert [v.extracted for v in verdicts] == ["12", "12 xx", "13", "12", "2/4"]


def test_reasoning_gym_refuses_an_entry_whose_own_answer_is_wrong() -> None:
    made = entry("countdown")
    with pytest.raises(ValueError, match="earns 0.* from reasoning-gym's own verifier"):
        load("reasoning_gym").check_answer(json.dumps(made | {"answer": "1 + 1"}))


@LEAVES_FILES
@pytest.mark.slow
def test_every_task_of_reasoning_gym_scores_its_own_answer_after_json() -> None:
    gym = pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    verifier = load("reasoning_gym")
    for task in sorted(set(DATASETS) - {"composite"}):  # that one is made of others
        made = gym.create_dataset(task, size=2, seed=3)
        for index in range(2):
            verifier.check_answer(json.dumps(made[index], default=str))
