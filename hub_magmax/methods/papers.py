"""Papers that methods come from, as cards cite them."""

from __future__ import annotations

from dataclasses import dataclass


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
