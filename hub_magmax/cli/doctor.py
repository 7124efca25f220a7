"""The verb that looks at the machine before a merge does."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hub_magmax.cli.terminal import ERROR, Answer, verb

if TYPE_CHECKING:
    from hub_magmax.cli.environment import Condition

#: Columns of the subjects.
_WIDTH = 11


@verb
def doctor() -> Answer:
    """Look at this machine: packages, memory, Hub, devices.

    Exits with 1 if something will stop a merge; a Hub that does not answer is a warning. The token is never
    shown.

    \b
    Example:
      hub-magmax doctor
    """
    from hub_magmax.cli.environment import conditions

    found = list(conditions())
    text = "\n".join([*(line for condition in found for line in _lines(condition)), "", _verdict(found)])
    values = {
        condition.subject: {
            **condition.facts,
            "problem": condition.problem or None,
            "warning": condition.warning or None,
        }
        for condition in found
    }
    return Answer(values, text, exit_code=ERROR if any(condition.problem for condition in found) else 0)


def _lines(condition: Condition) -> list[str]:
    """Return what was found, with what follows from it."""
    rows = (condition.subject, condition.text), ("STOPS", condition.problem), ("warning", condition.warning)
    return [line for subject, text in rows if text for line in _row(subject, text)]


def _verdict(found: Sequence[Condition]) -> str:
    stopping = ", ".join(condition.subject for condition in found if condition.problem)
    warned = ", ".join(condition.subject for condition in found if condition.warning)
    verdict = f"a merge will be stopped by: {stopping}" if stopping else "nothing here stops a merge"
    return f"{verdict}, but see the warnings: {warned}" if warned else verdict


def _row(subject: str, text: str) -> list[str]:
    """Return a subject and what was found, in lines of the terminal's width."""
    width = min(shutil.get_terminal_size().columns, 100) - 1
    start, rest = f"{subject:<{_WIDTH}}", " " * _WIDTH
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=rest, break_on_hyphens=False)
