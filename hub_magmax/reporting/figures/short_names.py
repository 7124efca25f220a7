"""Names cut to a width: in the middle, and so that different names stay different."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile

#: Most characters of the part in which names differ that are kept where both ends of a name are cut.
_PART = 12


def cut_names(names: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Return names that fit, each cut where it has to be.

    The middle is left out, unless names differ there alone: then the part in which they differ is kept. Where
    that does not tell them apart, they are numbered.

    Args:
        names: All that are shown together.
        fits: Says whether a text is short enough; what is shorter than one that fits does as well.
    """
    found = [cut(name, fits) for name in names]
    for alike in _groups(found, names):
        for number in alike:
            found[number] = _around_difference(names[number], [names[n] for n in alike], fits)
    for alike in _groups(found, names):
        for number in alike:
            start = f"{number + 1}: "
            found[number] = start + cut(names[number], partial(_fits_after, start, fits))
    return found


def cut(name: str, fits: Callable[[str], bool]) -> str:
    """Return a name without as much of its middle as it takes to fit."""
    return _first_that_fits(
        [name, *(_without_middle(name, length) for length in range(len(name) - 2, -1, -1))], fits
    )


def _fits_after(start: str, fits: Callable[[str], bool], text: str) -> bool:
    return fits(start + text)


def _without_middle(name: str, length: int) -> str:
    return f"{name[: length - length // 2]}…{name[len(name) - length // 2 :]}"


def _around_difference(name: str, alike: Sequence[str], fits: Callable[[str], bool]) -> str:
    """Return the part of a name in which it differs from names like it, and as much of its ends as fits."""
    start = _num_common(alike)
    stop = len(name) - _num_common([other[::-1] for other in alike])
    part = name[start : min(max(stop, start + 1), start + _PART)]
    cuts = [
        f"{name[:length]}…{part}…{name[len(name) - length // 2 :]}"
        for length in range(min(start, 2 * (len(name) - stop)) - 1, -1, -1)
    ]
    return _first_that_fits([*cuts, part], fits)


def _num_common(names: Sequence[str]) -> int:
    """Return how many characters all names begin with."""
    columns = zip(*names, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _first_that_fits(cuts: Sequence[str], fits: Callable[[str], bool]) -> str:
    """Return the first of ever shorter texts that fits, or else the last."""
    number = bisect_left(range(len(cuts)), True, key=lambda number: fits(cuts[number]))
    return cuts[min(number, len(cuts) - 1)]


def _groups(found: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Return the places of different names that were cut to the same text."""
    places: dict[str, list[int]] = {}
    for number, text in enumerate(found):
        places.setdefault(text, []).append(number)
    return [alike for alike in places.values() if len({names[number] for number in alike}) > 1]
