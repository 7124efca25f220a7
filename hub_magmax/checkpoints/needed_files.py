"""Files that loaders need beside the weights: known by name, or pointed to by a checkpoint's own files.

Names decide at the top of a checkpoint. Below it, only what something points to is taken: the folders of
`modules.json` (sentence-transformers), templates of chats, code that `auto_map` and its relatives name with
what that code imports beside it, and files that a configuration names by their path. Code is read as text
and never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from hub_magmax.checkpoints.headers import parse_json
from hub_magmax.checkpoints.leftovers import is_never_copied
from hub_magmax.checkpoints.listing import is_weights
from hub_magmax.checkpoints.side_files import MODULES_NAME, is_needed, is_safe
from hub_magmax.checkpoints.source import Folder, TensorSource
from hub_magmax.errors import CheckpointError

#: Folders of templates; transformers reads them by these names.
_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")

#: Code that replaces `generate`, and what it says that it needs.
_GENERATE_FILES = ("custom_generate/generate.py", "custom_generate/requirements.txt")

#: Files that loaders read and whose values can name other files. Vocabularies, which can be large, hold none.
_POINTING = re.compile(
    r"(config|(tokenizer|(video_)?preprocessor|processor|generation|open_clip|sentence_\w+)_config|modules|"
    r"config_sentence_transformers|speaker_embeddings_path|params)\.json"
)

#: Files of data, which a configuration of a training may name, and no model needs.
_DATA = re.compile(r".*\.(csv|tsv|jsonl|parquet|arrow|db|log)(\.\w+)?", re.IGNORECASE)

_MAX_POINTING_BYTES = 1_000_000
_MAX_CODE_BYTES = 5_000_000

#: Files below the top of a checkpoint that belong to a model.
_MAX_NESTED_FILES = 1000

#: `module.Class`, as `auto_map`, `custom_pipelines` and `modules.json` write it.
_CLASS = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.[A-Za-z_]\w*")

_FROM = re.compile(r"^[ \t]*from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#;]+)", re.MULTILINE)
_IMPORT = re.compile(r"^[ \t]*import[ \t]+([\w., \t]+)", re.MULTILINE)


def needed_files(source: TensorSource) -> tuple[str, ...]:
    """Return the paths of the files beside the weights that a model needs, sorted.

    Raises:
        CheckpointError: If `modules.json` is no JSON, or names a folder with more files than any module.
    """
    search = _Search(source)
    found = {path for path in source.sizes if is_needed(path)}
    found.update(*map(search.files_in, _TEMPLATE_FOLDERS), *map(search.below, module_folders(source)))
    found.update(*map(search.named_in, filter(_POINTING.fullmatch, tuple(found))))
    found.update(filter(search.has, _GENERATE_FILES))
    found |= search.imported_by(path for path in found if path.endswith(".py"))
    return tuple(sorted(found))


def loaded_files(source: TensorSource) -> tuple[str, ...]:
    """Return the paths of all files that a loader may read, sorted: weights at the top, and `needed_files`.

    Raises:
        CheckpointError: As `needed_files`.
    """
    weights = (path for path in source.sizes if "/" not in path and is_weights(path))
    return tuple(sorted({*needed_files(source), *weights}))


def module_folders(source: TensorSource) -> tuple[str, ...]:
    """Return the folders that a sentence-transformers model names in `modules.json`, in its order.

    Raises:
        CheckpointError: If that is no JSON: loaders need it.
    """
    size = source.size_of(MODULES_NAME)
    if size is None or size > _MAX_POINTING_BYTES:
        return ()
    content = source.read_bytes(MODULES_NAME, 0, size) if size else b""
    modules = parse_json(content, f"{source.label}, {MODULES_NAME}")
    entries = [entry for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    folders = (_normal(entry.get("path")) for entry in entries)
    return tuple(dict.fromkeys(folder for folder in folders if folder))


def _values(source: TensorSource, path: str) -> Any:
    """Return the values of a configuration; None if it is not there, too large, or not JSON."""
    size = source.size_of(path)
    if size is None or size > _MAX_POINTING_BYTES:
        return None
    try:
        return json.loads(source.read_bytes(path, 0, size))
    except (ValueError, RecursionError):
        return None


def _normal(written: Any) -> str:
    """Return a path as the checkpoint's files have it; empty where it leads elsewhere or is no path."""
    if not isinstance(written, str) or not 0 < len(written) <= 500 or not written.isprintable():
        return ""
    path = str(PurePosixPath(written))
    return path if is_safe(path) else ""


class _Search:
    """Looks for files of a checkpoint; each folder is listed once."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._contents: dict[str, Folder] = {}

    def _folder(self, path: str) -> Folder:
        if path not in self._contents:
            above = path.rpartition("/")[0]
            is_there = not path or path in self._folder(above).folders
            self._contents[path] = self._source.contents(path) if is_there else Folder({}, ())
        return self._contents[path]

    def has(self, path: str) -> bool:
        return path in self._folder(path.rpartition("/")[0]).sizes

    def files_in(self, folder: str) -> list[str]:
        """Return the files of a folder that belong to a model."""
        return [path for path in self._folder(folder).sizes if is_safe(path) and not is_never_copied(path)]

    def below(self, folder: str) -> list[str]:
        """Return the files of a folder and of its sub-folders that belong to a model."""
        found: list[str] = []
        waiting = [folder]
        while waiting:
            inner = waiting.pop()
            if is_safe(inner) and not is_never_copied(f"{inner}/"):
                found += self.files_in(inner)
                waiting += self._folder(inner).folders
            if len(found) + len(waiting) > _MAX_NESTED_FILES:
                raise CheckpointError(
                    f"{folder}, which {MODULES_NAME} names, holds more than {_MAX_NESTED_FILES:,} files",
                    where=self._source.label,
                    expected="the folder of one module of a sentence-transformers model",
                    hint=f"Move what is no part of the model out of it, or correct {MODULES_NAME}.",
                )
        return found

    def named_in(self, config: str) -> Iterator[str]:
        """Yield the files that the values of a configuration name: by path, or as `module.Class`."""
        for text in _texts(_values(self._source, config)):
            candidates = [_normal(text)]
            if match := _CLASS.fullmatch(text):
                candidates.append(match[1].replace(".", "/") + ".py")
            for path in candidates:
                if path and self.has(path) and _may_be_named(path):
                    yield path

    def imported_by(self, files: Iterable[str]) -> set[str]:
        """Return what Python files import of the files beside them, and what those import."""
        found: set[str] = set()
        waiting = sorted(files)
        while waiting and len(found) < _MAX_NESTED_FILES:
            path = waiting.pop()
            new = {target for target in self._imports(path) if target not in found}
            found |= new
            waiting += sorted(new)
        return found

    def _imports(self, path: str) -> Iterator[str]:
        size = self._source.size_of(path) or 0
        text = self._source.read_bytes(path, 0, min(size, _MAX_CODE_BYTES)).decode(errors="replace")
        here = path.split("/")[:-1]
        for dots, module, names in _FROM.findall(text):
            if len(dots) <= len(here) + 1:
                start = here[: len(here) + 1 - len(dots)] if dots else here
                yield from self._modules(start, module, re.findall(r"\w+", names))
        for line in _IMPORT.findall(text):
            for module in re.findall(r"[\w.]+", line):
                yield from self._modules(here, module, [])

    def _modules(self, start: list[str], module: str, names: list[str]) -> Iterator[str]:
        """Yield the files of a module, of the packages around it, and of `names` in it, that are there."""
        parts = [part for part in module.split(".") if part]
        places = [start + parts[:count] for count in range(1, len(parts) + 1)]
        places += [[*start, *parts, name] for name in names]
        for place in places:
            base = "/".join(place)
            yield from (path for path in (f"{base}.py", f"{base}/__init__.py") if self.has(path))


def _may_be_named(path: str) -> bool:
    """Say whether a file is copied where a configuration names it. Weights at the top are merged."""
    is_weights = path.endswith((".safetensors", ".index.json"))
    return not (is_never_copied(path) or _DATA.fullmatch(path)) and ("/" in path or not is_weights)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value of JSON, however deep."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict):
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner
