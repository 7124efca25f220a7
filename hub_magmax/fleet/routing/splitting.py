"""Division of examples between fitting, calibrating and measuring a router."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64

from hub_magmax.errors import EvaluationError

#: Shares of the examples that a verifier is fitted on, and that calibrate it; the others measure it.
FIT, CALIBRATE = 0.4, 0.2

#: Different examples that a router needs: with fewer its parts hold next to nothing.
MIN_EXAMPLES = 50


@dataclass(frozen=True)
class Parts:
    """Indices of the examples of each part, ascending."""

    fit: Int64[np.ndarray, " fit"]
    calibrate: Int64[np.ndarray, " calibrate"]
    held_out: Int64[np.ndarray, " held_out"]


def divided(contents: Sequence[str], seed: int) -> Parts:
    """Divide examples by their content, at random by a seed, whatever their order.

    Examples with equal inputs go to one part, so none is measured on what it was fitted to.

    Args:
        contents: A digest of the input of each example.
        seed: Of the division.

    Raises:
        EvaluationError: If there are too few.
    """
    different = _drawn(contents, seed)
    _check_number(len(different), MIN_EXAMPLES, "evaluation", "fitted and measured on")
    cuts = [round(FIT * len(different)), round((FIT + CALIBRATE) * len(different))]
    return _parts(contents, different, cuts)


def divided_beside(contents: Sequence[str], measuring: Sequence[str], seed: int) -> Parts:
    """Divide examples between fitting and calibrating, two to one, where others measure.

    What has the input of an example that measures is in no part. Indices are of both, those that measure
    last.

    Args:
        contents: A digest of the input of each example to fit to.
        measuring: The same of those that measure.
        seed: Of the division.

    Raises:
        EvaluationError: If there are too few of either.
    """
    held_out = set(measuring)
    drawn = _drawn(contents, seed)
    different = [content for content in drawn if content not in held_out]
    fitting = FIT + CALIBRATE
    both = len(drawn) - len(different)
    _check_number(len(different), round(fitting * MIN_EXAMPLES), "routing", "fitted to", both)
    _check_number(len(held_out), round((1 - fitting) * MIN_EXAMPLES), "evaluation", "measured on")
    some = _parts(contents, different, [round(FIT / fitting * len(different)), len(different)])
    return replace(some, held_out=len(contents) + np.arange(len(measuring)))


def _drawn(contents: Sequence[str], seed: int) -> list[str]:
    """Return the different contents in an order that the seed draws."""
    return sorted(set(contents), key=lambda content: _place(content, seed))


def _check_number(found: int, least: int, where: str, verb: str, both: int = 0) -> None:
    """Raise an error where examples are too few, `both` of them left out since they measure."""
    if found < least:
        aside = f": {both} more are left out, since the evaluation has them too, and measures on them"
        which = " that are not the evaluation's, such as another split" if both else ""
        raise EvaluationError(
            f"a router cannot be {verb} {found} different examples{aside if both else ''}",
            where=where,
            expected=f"at least {least} of all tasks together",
            hint=f"Name more examples of each task{which}.",
        )


def _parts(contents: Sequence[str], different: Sequence[str], cuts: Sequence[int]) -> Parts:
    """Return the parts of examples, by the ranks at which the second and the third begin."""
    part_of = {content: sum(rank >= cut for cut in cuts) for rank, content in enumerate(different)}
    parts = np.array([part_of.get(content) for content in contents])
    return Parts(*(np.flatnonzero(parts == number) for number in range(3)))


def _place(content: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/router/{content}".encode()).hexdigest()
