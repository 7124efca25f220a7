"""Division of examples between fitting, calibrating and measuring a router."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
    different = sorted(set(contents), key=lambda content: _place(content, seed))
    if len(different) < MIN_EXAMPLES:
        raise EvaluationError(
            f"a router cannot be fitted and measured on {len(different)} different examples",
            where="evaluation",
            expected=f"at least {MIN_EXAMPLES} of all tasks together",
            hint="Name more examples of each task.",
        )
    cuts = round(FIT * len(different)), round((FIT + CALIBRATE) * len(different))
    part_of = {content: sum(rank >= cut for cut in cuts) for rank, content in enumerate(different)}
    parts = np.array([part_of[content] for content in contents])
    return Parts(*(np.flatnonzero(parts == number) for number in range(3)))


def _place(content: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/router/{content}".encode()).hexdigest()
