"""The verb that looks at the machine before a merge does."""

from __future__ import annotations

import shutil
import textwrap

from hub_magmax.cli.terminal import ERROR, Answer, verb

#: Columns of the subjects.
_WIDTH = 11


@verb
def doctor() -> Answer:
    """Look at this machine: packages, memory, disks, Hub, devices.

    Exits with 1 if something will stop a merge. The token is never shown.

    \b
    Example:
      hub-magmax doctor
    """
    from hub_magmax.cli.environment import conditions

    found = list(conditions())
    stopping = [condition for condition in found if condition.problem]
    lines = []
    for condition in found:
        lines += _row(condition.subject, condition.text)
        lines += _row("STOPS", condition.problem) if condition.problem else []
    names = ", ".join(condition.subject for condition in stopping)
    lines += ["", f"a merge will be stopped by: {names}" if names else "nothing here stops a merge"]
    values = {
        condition.subject: {**condition.facts, "problem": condition.problem or None} for condition in found
    }
    return Answer(values, "\n".join(lines), exit_code=ERROR if stopping else 0)


def _row(subject: str, text: str) -> list[str]:
    """Return a subject and what was found, in lines of the terminal's width."""
    width = min(shutil.get_terminal_size().columns, 100) - 1
    start, rest = f"{subject:<{_WIDTH}}", " " * _WIDTH
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=rest, break_on_hyphens=False)
