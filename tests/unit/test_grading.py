"""launch/grading.py: what counts as the answer, what as equal to the reference, and how sure a share is."""

from __future__ import annotations

import pytest

from launch.evaluation import grading

RIGHT = [
    # GSM8K's mark, MetaMathQA's words, MATH's box, and no mark at all
    ("3 + 4 = 7\n#### 7", "#### 7"),
    ("#### $1,200.0 in all 5", "#### 1,200"),
    ("#### **18**", "#### 18"),
    ("#### -12", "#### -12"),
    ("12 first. The answer is: 18", "#### 18"),
    ("The answer is 18 apples and 3 pears", "#### 18"),
    ("The answer is:\n$$5$$ of 6", "#### 5"),
    (r"It is \boxed{\frac{1}{2}}, not 7", r"\boxed{\frac12}"),
    ("First 3, then 4, so -12.", "#### -12"),
    ("I get 70,000 dollars", "#### 70000"),
    # the same value in another form
    ("so it is 0.5", r"\boxed{\frac12}"),
    ("#### 2/3", r"\boxed{\frac{2}{3}}"),
    (r"The answer is: 2\sqrt{3}", r"so $\boxed{\sqrt{12}}$"),
    ("The answer is: x(x + 1)", r"\boxed{x^2+x}"),
    ("The answer is: 4,3", r"\boxed{3,4}"),
    (r"The answer is: \text{east}", r"\boxed{\text{east}}"),
    ("The answer is: 20%", r"\boxed{20\%}"),
    ("The answer is: x=5", r"\boxed{5}"),
    (r"\boxed{5\text{ cm}}", r"\boxed{5}"),
    ("The answer is: [2,5)", r"\boxed{[2,5)}"),
]
WRONG = [
    ("#### 8", "#### 7"),
    ("7 is right. #### 8", "#### 7"),
    ("The answer is: 8, and not 7", "#### 7"),
    (r"7 \boxed{8} 7", "#### 7"),
    ("The answer is: (2,5)", r"\boxed{[2,5)}"),
    ("#### 12", "#### -12"),
    ("no number", "#### 7"),
    ("#### ", "#### 7"),
    ("", "#### 7"),
]


@pytest.mark.parametrize(("text", "reference", "expected"), [(*r, True) for r in RIGHT] + [(*w, False) for w in WRONG])
def test_an_answer_is_judged_by_its_value(text: str, reference: str, expected: bool) -> None:
    assert grading.Parsed(text).answers(grading.Parsed(reference)) is expected


@pytest.mark.parametrize(
    ("text", "extracted"), [("so\n#### 1,200", "1,200"), ("none", None), (r"\boxed{\frac12}", r"\frac{1}{2}")]
)
def test_what_was_taken_for_the_answer_is_told(text: str, extracted: str | None) -> None:
    assert grading.Parsed(text).text == extracted
