"""Files of the output's tokenizer that are not those of the source of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hub_magmax.checkpoints.config import with_values
from hub_magmax.checkpoints.pinning import read_side_file
from hub_magmax.checkpoints.rows.vocabulary import (
    TOKENIZER_NAME,
    OutputRows,
    Vocabulary,
    read_vocabularies,
    wanted_rows,
)
from hub_magmax.checkpoints.side_files import is_tokenizer_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.planning.tokenizers.chat import NAMED, OLD_NAME, TEMPLATE_NAME, template_of
from hub_magmax.planning.tokenizers.token_ids import Moved, moved_ids
from hub_magmax.planning.tokenizers.united import Source, united
from hub_magmax.recipe.lockfile import Lock, LockedTokenizer
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tokenizer import UNION
from hub_magmax.text import listed, shown

CONFIG_NAME, SPECIAL_NAME, ADDED_NAME = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
GENERATION_NAME = "generation_config.json"

#: Files of a tokenizer that can have more tokens.
_GROWING = (TOKENIZER_NAME, CONFIG_NAME, SPECIAL_NAME, ADDED_NAME, TEMPLATE_NAME, OLD_NAME)


@dataclass(frozen=True)
class TokenizerFiles:
    """What the tokenizer of an output is.

    Attributes:
        contents: Files by path that are not copied as they are; None for one that is left out.
        ids: Values of configurations that name tokens by rows: by those of the source of the output's files,
            those that the tokens have in the output, None for tokens that it lacks; empty where they are the
            same.
        notes: Facts for people.
    """

    contents: Mapping[str, bytes | None] = field(default_factory=dict)
    ids: Moved = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def tokenizer_files(recipe: Recipe, lock: Lock, opened: Mapping[str, TensorSource]) -> TokenizerFiles:
    """Return the files of the output's tokenizer.

    Args:
        recipe: Says whose files the output gets.
        lock: For the tokenizer and what files were.
        opened: The sources by name.

    Raises:
        RecipeError: If tokenizers have no union, or a source has no chat template.
        LockError: If a file is no longer what was locked.
    """
    if lock.tokenizer is None:
        return TokenizerFiles()
    return _Making(recipe.output.files_from, lock, lock.tokenizer, opened).made()


class _Making:
    """The files in the making."""

    def __init__(
        self, files_from: str, lock: Lock, tokenizer: LockedTokenizer, opened: Mapping[str, TensorSource]
    ) -> None:
        self.files_from, self.lock, self.tokenizer, self.opened = files_from, lock, tokenizer, opened
        named = tokenizer.source not in (None, UNION)
        self.owner = tokenizer.source if named and tokenizer.source is not None else files_from
        self.contents: dict[str, bytes | None] = {}
        self.notes: list[str] = []

    def made(self) -> TokenizerFiles:
        own = self._of(self.owner)
        if self.owner != self.files_from:
            self.contents |= dict.fromkeys(self._paths(self.files_from)) | own
        if self.tokenizer.source == UNION:
            self._unite(own)
        if (template := self.tokenizer.chat_template) is not None:
            present = {path: content for path, content in self.contents.items() if content is not None}
            self._set_template(template, {**own, **present})
        ids = self._moved() if self.owner != self.files_from else {}
        if ids and GENERATION_NAME in self.lock.sources[self.files_from].side_files:
            content, theirs = self._read(self.files_from, GENERATION_NAME), self._generation_of(self.owner)
            self.contents[GENERATION_NAME] = with_values(content, moved_ids(json.loads(content), ids, theirs))
        return TokenizerFiles(self.contents, ids, tuple(self.notes))

    def _paths(self, source: str) -> list[str]:
        return [path for path in self.lock.sources[source].side_files if is_tokenizer_file(path)]

    def _read(self, source: str, path: str) -> bytes:
        return read_side_file(self.opened[source], path, self.lock.sources[source])

    def _of(self, source: str) -> dict[str, bytes]:
        return {path: self._read(source, path) for path in self._paths(source)}

    @cached_property
    def _vocabularies(self) -> dict[str, Vocabulary | None]:
        return read_vocabularies(self.lock, {name: self.opened[name] for name in self.lock.sources})

    @cached_property
    def _rows(self) -> OutputRows:
        found = wanted_rows(self.lock, self._vocabularies, self.files_from)
        assert found is not None, "the tokenizer says something of tokens"
        return found

    def _unite(self, own: Mapping[str, bytes]) -> None:
        """Add the tokens that other sources have more."""
        known, tokens = {*(self._vocabularies[self.owner] or {}).values()}, self._rows.tokens
        new = tokens.keys() - known
        if not new:
            return
        names = [name for name, found in self._vocabularies.items() if name != self.owner and found]
        first, *others = (
            Source(name, json.loads(self._read(name, TOKENIZER_NAME))) for name in (self.owner, *names)
        )
        values, unwritten = united(first, others, tokens)
        self.contents[TOKENIZER_NAME] = _written(own[TOKENIZER_NAME], values)
        self._grow(own, names, [entry for entry in values["added_tokens"] if entry["content"] in new])
        left = [*filter(_knows_fewer, own)]
        self.contents |= dict.fromkeys(left)
        self.notes += _united_notes(first.name, (len(tokens), len(new)), left, unwritten)

    def _grow(self, own: Mapping[str, bytes], names: list[str], entries: list[Mapping[str, Any]]) -> None:
        """Add tokens to the files beside tokenizer.json that list added ones.

        Args:
            own: Files of the first tokenizer.
            names: Sources of the others.
            entries: The added tokens that are new.
        """
        for path, change in ((CONFIG_NAME, more_config), (SPECIAL_NAME, more_special)):
            if path in own:
                configs = [json.loads(self._read(n, path)) for n in names if path in self._paths(n)]
                self.contents[path] = _written(own[path], change(json.loads(own[path]), configs, entries))
        if ADDED_NAME in own:
            more = {entry["content"]: entry["id"] for entry in entries}
            self.contents[ADDED_NAME] = _written(own[ADDED_NAME], {**json.loads(own[ADDED_NAME]), **more})

    def _set_template(self, name: str, own: Mapping[str, bytes]) -> None:
        """Write the chat template, and take others out of the tokenizer's files."""
        text, needed = NAMED.get(name, ("", ()))
        if self.tokenizer.template is not None:
            text, needed = self.tokenizer.template, ()
        elif name not in NAMED:
            text = template_of(self._of(name), name)
        self.contents |= {TEMPLATE_NAME: text.encode("utf-8")} | dict.fromkeys({OLD_NAME} & own.keys())
        values = json.loads(own.get(CONFIG_NAME, b"{}"))
        if values.pop("chat_template", None) is not None:
            self.contents[CONFIG_NAME] = _written(own[CONFIG_NAME], values)
        tokens = self._rows.tokens if self.tokenizer.source else {}
        known = {*tokens, *(self._vocabularies[self.owner] or {}).values()}
        if missing := [shown(token) for token in needed if token not in known]:
            self.notes.append(f"the chat template {name} writes {listed(missing)}, which are no tokens")

    def _generation_of(self, source: str) -> Any:
        has_one = GENERATION_NAME in self.lock.sources[source].side_files
        return json.loads(self._read(source, GENERATION_NAME)) if has_one else {}

    def _moved(self) -> Moved:
        """Return the rows of tokens that are others in the output, by those in the source of the files."""
        tokens = self._rows.tokens
        known = self._vocabularies[self.files_from] or {}
        return {row: tokens.get(token) for row, token in known.items() if tokens.get(token) != row}


def _written(old: bytes, values: Mapping[str, Any]) -> bytes:
    """Return JSON, indented as it was."""
    indented = re.match(rb"\s*\{\s*?\n([ \t]+)", old)
    indent = indented[1].decode() if indented else None
    return (json.dumps(values, indent=indent, ensure_ascii=False) + "\n").encode("utf-8")


def _knows_fewer(path: str) -> bool:
    """Say whether a file lists the tokens of one tokenizer in a form that no others are added to."""
    return path not in _GROWING and not path.endswith(".jinja")


def _united_notes(owner: str, counts: tuple[int, int], left: list[str], unwritten: set[str]) -> Iterator[str]:
    """Yield how many tokens there are, in all and of others, and what becomes of files and tokens."""
    without = f"; {listed(left)} know fewer tokens, and are left out" if left else ""
    total, new = counts
    tokens = f"{new:,} token{'s' if new > 1 else ''}"
    yield f"the tokenizer is that of {owner} with {tokens} of others, {total:,} in all{without}"
    if unwritten:
        some = f"{len(unwritten):,} of the tokens, such as {shown(min(unwritten))}"
        yield f"no merge of the tokenizer gives {some}: they have rows, and text is written without them"


#: Keys with lists of special tokens that have no role.
_EXTRA = ("additional_special_tokens", "extra_special_tokens")

#: Added tokens, as tokenizer.json has them.
Entries = Sequence[Mapping[str, Any]]


def more_config(own: dict[str, Any], others: Sequence[Mapping[str, Any]], entries: Entries) -> dict[str, Any]:
    """Return a tokenizer_config.json with added tokens; `more_special` says what the arguments are."""
    if isinstance(own.get("added_tokens_decoder"), dict):
        more = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries}
        own = {**own, "added_tokens_decoder": {**own["added_tokens_decoder"], **more}}
    return more_special(own, others, entries)


def more_special(
    own: dict[str, Any], others: Sequence[Mapping[str, Any]], entries: Entries
) -> dict[str, Any]:
    """Return a configuration that lists the special tokens without a role that others list more.

    Args:
        own: The configuration.
        others: Those of other tokenizers, in order.
        entries: The added tokens that it gets.
    """
    new = {entry["content"] for entry in entries}
    for key in _EXTRA:
        more = [token for config in others for token in _listed(config.get(key)) if token in new]
        known: list[Any] = own[key] if isinstance(own.get(key), list) else []
        missing = [token for token in dict.fromkeys(more) if token not in _listed(known)]
        own = {**own, key: [*known, *missing]} if missing else own
    return own


def _listed(value: Any) -> list[str]:
    return [*_texts(value)] if isinstance(value, list) else []


def _texts(values: list[Any]) -> Iterator[str]:
    for one in values:
        yield str(one.get("content") if isinstance(one, dict) else one)
