"""Vocabulary and tokenizer of the output in a recipe: whose tokens, which rows, and the chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from hub_magmax.errors import KeyPath, Problem
from hub_magmax.recipe.lockfile import LockedTokenizer, LockedTokenRow
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.values import Place, Spec
from hub_magmax.text import nearest, shown

#: The vocabulary of all sources together.
UNION = "union"

#: A row of zeros.
ZERO = "zero"

#: The mean of the rows of the tasks that have a token.
MEAN = "mean"

#: Chat templates by name.
CHATML = "chatml"

#: Ends of the names of files with a chat template.
_TEMPLATE_ENDS = (".jinja", ".jinja2", ".j2", ".txt")


class TokenRow(Spec):
    """Row of one token: that of `take`, for the sources that lack it, or with `force` for all.

    `token`, or `token_id`, names another token of that source, whose row is taken. In place of a source,
    `zero` is a row of zeros, and `mean` the mean of the rows of the tasks that have the token.
    """

    take: Annotated[str, Field(min_length=1)]
    token: str | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None
    force: bool = False

    @model_validator(mode="before")
    @classmethod
    def _allow_bare_source(cls, value: Any) -> Any:
        return {"take": value} if isinstance(value, str) else value


class Tokenizer(Spec):
    """Tokenizer of the output; a bare name is its `source`.

    `source` is `base_model`, a task, or `union` for the tokens of all; by default that of the output's files.
    `tokens` says of single tokens whose row they get. `pad_to_multiple_of` adds rows without a token.
    `chat_template` is that of a source, of a file, or `chatml`.
    """

    source: Annotated[str, Field(min_length=1)] | None = None
    tokens: dict[str, TokenRow] = Field(default_factory=dict, max_length=10_000)
    pad_to_multiple_of: Annotated[int, Field(gt=0, le=2**20)] | None = None
    chat_template: Place | None = None

    @model_validator(mode="before")
    @classmethod
    def _allow_bare_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @property
    def is_of_tokens(self) -> bool:
        """Whether it says anything of tokens, and not of a chat template alone."""
        return self.source is not None or bool(self.tokens) or self.pad_to_multiple_of is not None

    def locked(self, files_from: str, template: str | None = None) -> LockedTokenizer:
        """Return it as a lock stores it.

        Args:
            files_from: Source of the output's files, whose tokens it has by default.
            template: Text of the file of the chat template.
        """
        return LockedTokenizer(
            (self.source or files_from) if self.is_of_tokens else None,
            {token: LockedTokenRow(**row.model_dump()) for token, row in self.tokens.items()},
            self.pad_to_multiple_of,
            self.chat_template,
            template,
        )

    @property
    def template_file(self) -> str | None:
        """The file of the chat template, as written; None where it is that of a source, or named."""
        written = self.chat_template
        is_file = written is not None and ("/" in written or written.endswith(_TEMPLATE_ENDS))
        return written if is_file else None


def tokenizer_problems(tokenizer: Tokenizer | None, sources: Sequence[str]) -> Iterator[Problem]:
    """Yield what contradicts itself, or the sources, in a recipe's tokenizer.

    Args:
        tokenizer: Of the recipe.
        sources: `base_model` and the tasks.
    """
    if tokenizer is None:
        return
    key: KeyPath = ("tokenizer",)
    yield from _unknown((*key, "source"), tokenizer.source, (*sources, UNION))
    for token, row in tokenizer.tokens.items():
        yield from _row_problems((*key, "tokens", token), row, sources)
    if tokenizer.template_file is None:
        yield from _unknown((*key, "chat_template"), tokenizer.chat_template, (*sources, CHATML))


def _row_problems(key: KeyPath, row: TokenRow, sources: Sequence[str]) -> Iterator[Problem]:
    yield from _unknown((*key, "take"), row.take, (*sources, ZERO, MEAN))
    if row.token is not None and row.token_id is not None:
        yield conflict(key, "token and token_id both say which row it is", "name one of them")
    if row.take in (ZERO, MEAN) and (row.token is not None or row.token_id is not None):
        what = "a row of zeros" if row.take == ZERO else "the mean of the tasks' rows"
        yield conflict(key, f"{what} is no other token's", "leave out token and token_id")


def _unknown(key: KeyPath, name: str | None, known: Sequence[str]) -> Iterator[Problem]:
    if name is not None and name not in known:
        hint = nearest(name, known) or f"the choices are {', '.join(known)}"
        more = ", or the path of a file such as ./chat.jinja" if key[-1] == "chat_template" else ""
        yield conflict(key, f"there is no {shown(name)}", hint + more)
