"""Answers found in generated texts, and compared with the right ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

#: Marks of a final answer, the surest first; of several of a kind the last counts. The order is that of the
#: authors of arXiv:2606.19636. A number may begin with its point, if that ends no word or other number.
_MARKS = (
    re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL),
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"\banswer is:?\s*([^\n]+)", re.IGNORECASE),
    re.compile(r"([-+]?\$?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+))"),
)

#: Marks at either end of an answer that do not count; the point of a number such as .5 does.
_BEFORE = re.compile(r"""^(?:[ ,;:!?"']|\.(?!(?<!\.\.)\d))+""")
_AFTER = " .,;:!?\"'"


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

    Case, white space, and punctuation at the ends of words or numbers do not count. Nothing is no answer.
    """
    found, wanted = (_plain(ANSWER_RULES[rule](own)) for own in (text, right))
    if not found:
        return False
    numbers = _number(found), _number(wanted)
    return found == wanted if None in numbers else numbers[0] == numbers[1]


def is_told(text: str, rule: str) -> bool:
    """Say whether no later token changes the answer."""
    return rule == "line" and "\n" in text.lstrip()


def _plain(text: str) -> str:
    words = " ".join(text.casefold().split())
    return _BEFORE.sub("", words).rstrip(_AFTER) or words


def _number(text: str) -> Decimal | None:
    plain = text.replace(",", "").replace("$", "").removesuffix("%").strip()
    if not re.fullmatch(r"[-+]?(\d+(\.\d+)?|\.\d+)", plain):
        return None
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None
