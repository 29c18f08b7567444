"""Where the final answer of a response is: the box, and what counts where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.growth import growth
from upge.verify import final_answer, final_text, last_boxed
from upge.verify.answers import LONGEST


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{ 7 } and more text }", "7"),
        (r"\boxed {3}", "3"),
        (r"\fbox{4}", "4"),
        (r"\fbox{4} \boxed{5}", "5"),
        (r"\boxed{5} \fbox{4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1} wait, \boxed{2", None),
        (r"\boxed{1} wait, \boxed", None),
        (r"\boxed 5", "5"),
        (r"so $\boxed5$.", "5"),
        (r"\boxed 12", None),
        (r"\boxed 1.5", None),
        (r"\boxed 1/2", None),
        (r"\boxed a", None),
        (r"\boxed{3} in a \boxed figure", "3"),
        (r"\boxeda{5}", None),
        (r"boxed{5}", None),
        (r"\boxed", None),
        ("the answer is 5", None),
        ("", None),
        (rf"\boxed{{{'x' * (LONGEST - 1)}}}", "x" * (LONGEST - 1)),
        (rf"\boxed{{{'x' * LONGEST}}}", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A box, whatever else there is; an unfinished one is none.
        (r"The answer is 3. \boxed{4} The answer is 5.", "4"),
        (r"The answer is 3. \boxed{4", None),
        (r"#### 3 \boxed", None),
        (r"\boxed{}", ""),
        # Behind ####, unless that is the heading of a section that goes on.
        ("She has 5.\n#### 72", "72"),
        ("#### 72\n\nQuestion: what is 3+4?", "72"),
        ("#### 1\n#### 2\n", "2"),
        ("####-5", "-5"),
        ("#### $1,250.50", "1,250.50"),
        ("#### 72 red apples", "72"),
        ("#### Step 4: the sum\nThat makes $x=9$.", "x=9"),
        ("#### 4. The sum\nThat makes 9.", "9"),
        ("#### Evelyn", "Evelyn"),
        ("We get 7.\n####", None),
        # A sentence that states it.
        ("The answer is 42.", "42"),
        ("5 and 6. **Final Answer**: 42", "42"),
        ("Answer:\n\n42\n", "42"),
        ("The final answer is $\\frac{1}{2}$ since 3 < 4.", r"\frac{1}{2}"),
        ("The answer to the question is therefore \\(x+1\\).", "x+1"),
        ("The answer is 3.5 cm.", "3.5"),
        ("The answer is 5 or 6.", "5 or 6"),
        ("The answer is 5 million.", "5 million"),
        ("The answer is $18 per day.", "18"),
        ("The answers are 1, 2. The answer is 3", "3"),
        ("We had 7. So the answer is", None),
        # The last formula.
        ("With $a=1$ we get $x = 5$.", "x = 5"),
        ("Hence $$\n\\sqrt{2}\n$$", r"\sqrt{2}"),
        ("Hence \\[ 3 \\]", "3"),
        ("Hence \\(3\\), done", "3"),
        # The last number, where dollars are money.
        ("It costs $5 and then $6.", "6"),
        ("Each is $3 each, so 4*3=$12 in all.", "12"),
        ("A total of 1,234,567.50 is left", "1,234,567.50"),
        ("x − 5 = −3", "−3"),
        ("from 10-3 we have 7", "7"),
        ("10-3", "3"),
        ("It is 3/4 of the 2nd part.", "3/4"),
        ("a 20% discount", "20%"),
        ("H2O and x_5", None),
        ("none at all", None),
        ("", None),
        # Half a number at the cut of what is looked at would be another number.
        ("1234567" + "x" * 1997, None),
        ("77 " + "x" * 1996 + " ", "77"),
    ],
)
def test_final_answer(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"first <answer>1</answer> then \boxed{2}", "2"),
        (r"first \boxed{2} then <answer>1</answer>", "1"),
        (r"<answer>\boxed{2}</answer>", "2"),
        (r"\boxed{2} then <answer>1", None),
        (r"<answer>1</answer> then \boxed{2", None),
        ("<answer>\nthe\nlines\n</answer> and more", "the\nlines"),
        ("1\n2\n3 4\n", "3 4"),
        ("thinking ...\nThe answer is: Paris.", "Paris"),
        ("#### yes", "yes"),
        ("**B**\n\n", "B"),
        ("\n \n", None),
        ("", None),
    ],
)
def test_final_text(text: str, expected: str | None) -> None:
    assert final_text(text) == expected


PIECES = ["a", "9", "9,", "$", "$a", "\\", "{", "}", " \n", "####", "answer ", "(\n#### "]
OPENINGS = [r"\boxed", r"\boxed{", r"\fbox \boxed ", "\\(", "<answer>"]


def long_texts(length: int) -> Iterator[str]:
    """Texts of about `length` characters."""
    for piece in PIECES:
        yield piece * (length // len(piece))
    for piece in OPENINGS:
        yield piece * (length // len(piece)) + "x"
    for begin, piece in ((r"\boxed{", "{"), (r"\boxed", " "), ("answer", " ")):
        yield begin + piece * length + "x"


@pytest.mark.parametrize("find", [last_boxed, final_answer, final_text])
def test_time_is_linear_in_the_length(find: Callable[[str], str | None]) -> None:
    for short, long in zip(long_texts(150_000), long_texts(3_000_000), strict=True):
        assert growth(find, short, long) < 60, f"20 times the length of {short[:20]!r}"
