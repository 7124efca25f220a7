"""Answers found in generated texts, and compared with the right ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

#: Marks of a final answer, the surest first; of several of a kind the last counts. The order is that of the
#: authors of arXiv:2606.19636.
_MARKS = (
    re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL),
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"\banswer is:?\s*([^\n]+)", re.IGNORECASE),
    re.compile(r"([-+]?\$?\d[\d,]*(?:\.\d+)?)"),
)


def first_line(text: str) -> str:
    """Return the first line that is not blank."""
    return next((line for line in text.split("\n") if line.strip()), "")


def final_answer(text: str) -> str:
    """Return what a mark of a final answer holds, else the last number, else the whole text."""
    return next((found[-1] for mark in _MARKS if (found := mark.findall(text))), text)


#: Where an answer is looked for in a text, by name.
ANSWER_RULES: Mapping[str, Callable[[str], str]] = {"line": first_line, "final": final_answer}


def is_right(text: str, right: str, rule: str) -> bool:
    """Say whether a text has the right answer: the same number, or the same words.

    Case, white space, and punctuation at the ends do not count.
    """
    found, wanted = (_plain(ANSWER_RULES[rule](own)) for own in (text, right))
    numbers = _number(found), _number(wanted)
    return found == wanted if None in numbers else numbers[0] == numbers[1]


def is_told(text: str, rule: str) -> bool:
    """Say whether no later token changes the answer."""
    return rule == "line" and "\n" in text.lstrip()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def _number(text: str) -> Decimal | None:
    plain = text.replace(",", "").replace("$", "").removesuffix("%").strip()
    if not re.fullmatch(r"[-+]?\d+(\.\d+)?", plain):
        return None
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None
