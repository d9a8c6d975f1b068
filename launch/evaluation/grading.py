"""Whether an answer is right: extraction and equivalence by math-verify."""

from __future__ import annotations

import re
from typing import Any

from ds_agsel.errors import ConfigError

try:
    import math_verify
except ImportError:
    raise ConfigError(
        "launch/evaluate.py needs the package math-verify. Install it with: pip install math-verify"
    ) from None

_MARK = re.compile(r"####|the (?:final )?answer is:?", re.IGNORECASE)
_LATEX_FENCE = re.compile(r"\$.*\$|\\\[|\\\(", re.DOTALL)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_BRACED_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textbf|operatorname|begin|end)\s*\{[^{}]*\}")


class Parsed:
    """The answer in a text; ``text`` is the answer as math-verify reads it, None if it finds none."""

    def __init__(self, text: str) -> None:
        self.candidates: list[Any] = math_verify.parse(_marked_for_math_verify(text))
        written = [candidate for candidate in self.candidates if isinstance(candidate, str)]
        self.text: str | None = written[-1] if written else None

    def answers(self, reference: Parsed) -> bool:
        """Return whether this is equivalent to the reference: 0.5 to 1/2, 1,200.00 to 1200, x(x+1) to x²+x."""
        return bool(math_verify.verify(reference.candidates, self.candidates))


def _marked_for_math_verify(text: str) -> str:
    r"""``text`` with its final answer marked in a way that math-verify knows, whose own rules hold for the rest.

    In this order: ``\boxed{}`` (MATH); what follows the last ``####`` (GSM8K) or "the answer is" (MetaMathQA), which
    may be LaTeX without dollar signs; the text's last number or formula.
    """
    marks = list(_MARK.finditer(text))
    if "\\boxed" in text or not marks:
        return text
    after = text[marks[-1].end() :].strip()
    if _LATEX_FENCE.search(after):
        return f"The final answer is {after}"
    line = after.partition("\n")[0].strip(" .*")
    if _WORD.search(_BRACED_WORDS.sub("", line)):
        return f"The final answer is {line}"
    formula = line.replace("$", "").replace("\\%", "%").replace("%", "\\%")
    return f"${formula}$" if formula else ""
