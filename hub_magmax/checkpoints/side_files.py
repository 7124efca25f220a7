"""Side files: files beside the weights that belong to a model, and comparisons of them by hash.

The Hub states the sha256 of large files and git's id of small ones, so a file is compared without reading
it; for a folder both hashes are computed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

#: Files beside the weights that make a model usable.
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")

#: Files about a checkpoint's own weights, training or merge, and not about the model.
_ABOUT_WEIGHTS = (
    "diagnosis.json",
    "recipe.lock.json",
    "merge_report.json",
    "outcomes.json",
    "provenance.json",
    "scores.json",
    "trainer_state.json",
    "training_args.json",
)

#: Names that lead elsewhere on some systems: separators, and Windows' devices with any suffix.
_FOREIGN = re.compile(r"[\\/:]|^(con|prn|aux|nul|com\d|lpt\d)\.", re.IGNORECASE)

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def is_side_file(path: str) -> bool:
    """Say whether a file belongs to a model besides its weights, and is copied with them."""
    return (
        Path(path).suffix in _SUFFIXES
        and path not in _ABOUT_WEIGHTS
        and not path.endswith(".index.json")
        and path.isprintable()  # a name that cannot be shown, or stored as UTF-8, is not published
        and _FOREIGN.search(path) is None
    )


def is_tokenizer_file(path: str) -> bool:
    """Say whether a file decides how text becomes tokens; chat templates count."""
    return path in _TOKENIZER_FILES or path.endswith(".tiktoken")


def content_hashes(content: bytes) -> str:
    """Return `sha256:` of `content` and `git:`, its id as a blob, with a space between."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return f"sha256:{hashlib.sha256(content).hexdigest()} git:{blob}"


def same_content(one: str, other: str) -> bool | None:
    """Compare two texts of hashes; None if they have no kind of hash in common."""
    first, second = (dict(part.split(":", 1) for part in text.split()) for text in (one, other))
    shared = first.keys() & second.keys()
    return all(first[kind] == second[kind] for kind in shared) if shared else None


def tokenizer_notices(side_files: Mapping[str, Mapping[str, str]], files_from: str) -> tuple[str, ...]:
    """Return a line for each difference between a source's tokenizer and that of the output.

    Args:
        side_files: By source, the hashes of its side files by name.
        files_from: The source whose files are copied.
    """
    copied = {path: text for path, text in side_files[files_from].items() if is_tokenizer_file(path)}
    sources: dict[str, list[str]] = {}
    for name, files in side_files.items():
        found = {path: text for path, text in files.items() if is_tokenizer_file(path)}
        if found and (differences := _differences(copied, found)):
            sources.setdefault(", ".join(differences), []).append(name)
    return tuple(
        f"the tokenizer of {', '.join(names)} differs from that of {files_from}, which the merged model "
        f"gets: {differences}"
        for differences, names in sources.items()
    )


def _differences(copied: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    listed = []
    for path in sorted(copied.keys() | found.keys()):
        if path not in found:
            listed.append(f"{path} (missing)")
        elif path not in copied:
            listed.append(f"{path} (added)")
        elif (same := same_content(copied[path], found[path])) is not True:
            listed.append(f"{path} ({'other content' if same is False else 'not compared'})")
    return listed
