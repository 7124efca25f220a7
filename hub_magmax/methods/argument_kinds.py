"""Declarations of merge methods: papers that they come from, and checks of the arguments."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from hub_magmax.errors import ArgumentError


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv that a method comes from, as cards cite it.

    Attributes:
        arxiv: Number of the paper.
        key: Key of its BibTeX entry.
        author: First author, surname first.
        title: In BibTeX, braces around what keeps its capitals.
    """

    arxiv: str
    key: str
    author: str
    year: int
    title: str

    @property
    def bibtex(self) -> str:
        """The entry of a bibliography."""
        return (
            f"@misc{{{self.key},\n  title = {{{self.title}}},\n  author = {{{self.author} and others}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n}}"
        )


# Complex by its table: one line for each argument.
def check_kinds(
    name: Any, source: Any, scaling: Any, held_bytes: Any, uses: Any, in_comparison: Any, is_portable: Any
) -> None:
    """Raise ArgumentError for an argument of `merge_method` of another kind than it takes."""
    is_bytes = held_bytes is None or callable(held_bytes) or isinstance(held_bytes, int)
    told = isinstance(in_comparison, list | tuple) and all(isinstance(one, Mapping) for one in in_comparison)
    taken = {
        "name, a text": isinstance(name, str) and bool(name.strip()),
        "source, a text or a Paper": isinstance(source, str | Paper),
        "scaling, a finite number": isinstance(scaling, Real) and math.isfinite(scaling),
        "held_bytes, a whole number, a function or None": is_bytes,
        "uses, a function or None": uses is None or callable(uses),
        "in_comparison, a list of mappings": told,
        "is_portable, True or False": isinstance(is_portable, bool),
    }
    if wrong := next((kind for kind, holds in taken.items() if not holds), None):
        parameter, _, expected = wrong.partition(", ")
        raise ArgumentError("this is of another kind", where=f"merge_method, {parameter}", expected=expected)


#: Arguments that only functions of some forms may have.
_OF_FORMS = {
    "base": ("tensor", "elementwise"),
    "sides": ("matrix",),
    "gram": ("matrix",),
    "merged_gram": ("matrix",),
    "fisher": ("rule",),
}


def check_forms(name: str, form: str, parameters: Container[str]) -> None:
    """Raise ArgumentError for arguments of a method's function that its form, or each other, rule out."""
    for parameter, forms in _OF_FORMS.items():
        if parameter in parameters and form not in forms:
            told = f"form{'s' * (len(forms) > 1)} {' and '.join(forms)}"
            raise ArgumentError(f"{parameter} is for the {told}, not for {form!r}", where=f"method {name}")
    of_inputs = [parameter for parameter in ("gram", "merged_gram") if parameter in parameters]
    if of_inputs and "sides" in parameters:
        raise ArgumentError(
            f"{of_inputs[0]} and sides cannot both be asked for",
            where=f"method {name}",
            expected="either: statistics are of a layer's inputs, and coordinates of factors are others",
        )
