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
    "blind_spots.json",
    "diagnosis.json",
    "finetune_report.json",
    "model_index.json",  # of a pipeline, whose parts are models of their own, in sub-folders
    "recipe.lock.json",
    "merge_report.json",
    "outcomes.json",
    "predictions.json",
    "provenance.json",
    "router.json",
    "scores.json",
    "trainer_state.json",
    "training_args.json",
)

#: Names the modules of a sentence-transformers model, each with its folder.
MODULES_NAME = "modules.json"

#: Further files that loaders read, or that a licence asks to hand on.
_NEEDED = re.compile(
    r".*\.(spm|bpe|vocab|codes|tokenizer)|vocab\.bin|.*vocab.*\.gz|tokenizer\.model\..+|"
    r"(hyperparams|config|model_config|params)\.ya?ml|"
    r"(licen[cs]e|copying|notice|(acceptable_)?use_policy)([.-].*)?",
    re.IGNORECASE,
)

#: Names that lead elsewhere on some systems: separators, and Windows' devices with any suffix.
_FOREIGN = re.compile(r"[\\/:]|^(con|prn|aux|nul|com\d|lpt\d)\.", re.IGNORECASE)

_DEVICE = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)
_MAX_PATH_LENGTH = 500

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
        and not path.endswith((".index.json", ".scores.json", ".outcomes.json"))
        and path.isprintable()  # a name that cannot be shown, or stored as UTF-8, is not published
        and _FOREIGN.search(path) is None
    )


def is_needed(path: str) -> bool:
    """Say whether a file at the top of a checkpoint is copied for its name: to load the model, or by licence.

    Earlier versions copied what `is_side_file` says.
    """
    return is_side_file(path) or (_NEEDED.fullmatch(path) is not None and is_safe(path))


def is_safe(path: str) -> bool:
    """Say whether a relative path leads to the same file inside a folder on every system."""
    parts = path.split("/")
    return (
        len(path) <= _MAX_PATH_LENGTH
        and path.isprintable()  # a name that cannot be shown, or stored as UTF-8, is not published
        and not any(part in ("", ".", "..") or part.endswith((".", " ")) for part in parts)
        and not any(_FOREIGN.search(part) or _DEVICE.fullmatch(part) for part in parts)
    )


def is_tokenizer_file(path: str) -> bool:
    """Say whether a file decides how text becomes tokens; chat templates count."""
    return path in _TOKENIZER_FILES or path.endswith(
        (".tiktoken", ".spm", ".bpe", ".vocab", ".codes", ".jinja")
    )


class ContentHashes:
    """`sha256:` of a file's content and `git:`, its id as a blob, with a space between; block by block.

    Args:
        size: Bytes of the file.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def update(self, block: bytes) -> None:
        """Add the next block."""
        self._sha256.update(block)
        self._blob.update(block)

    def __str__(self) -> str:
        return f"sha256:{self._sha256.hexdigest()} git:{self._blob.hexdigest()}"


def content_hashes(content: bytes) -> str:
    """Return `sha256:` of `content` and `git:`, its id as a blob, with a space between."""
    hashes = ContentHashes(len(content))
    hashes.update(content)
    return str(hashes)


def same_content(one: str, other: str) -> bool | None:
    """Compare two texts of hashes; None if they have no kind of hash in common."""
    first, second = (dict(part.split(":", 1) for part in text.split()) for text in (one, other))
    shared = first.keys() & second.keys()
    return all(first[kind] == second[kind] for kind in shared) if shared else None


#: Files of tokenizers without lists of tokens.
_BESIDE_TOKENS = re.compile(r"tokenizer_config\.json|chat_template\.(jinja|json)")


def tokenizer_notices(
    side_files: Mapping[str, Mapping[str, str]], files_from: str, *, are_united: bool = False
) -> tuple[str, ...]:
    """Return a line for each difference between a source's tokenizer and that of the output.

    Args:
        side_files: By source, the hashes of its side files by name.
        files_from: The source whose files are copied.
        are_united: Whether the tokens of all are in the output, so that their lists may differ.
    """
    counts = _BESIDE_TOKENS.fullmatch if are_united else is_tokenizer_file
    copied = {p: text for p, text in side_files[files_from].items() if counts(p)}
    sources: dict[str, list[str]] = {}
    for name, files in side_files.items():
        found = {path: text for path, text in files.items() if counts(path)}
        if found and (differences := _differences(copied, found)):
            sources.setdefault(", ".join(differences), []).append(name)
    return tuple(
        f"the tokenizer of {', '.join(names)} differs from that of {files_from}, which the merged model "
        f"gets: {differences}"
        for differences, names in sources.items()
    )


def unmerged_notices(side_files: Mapping[str, Mapping[str, str]], files_from: str) -> tuple[str, ...]:
    """Return a line about weights in sub-folders, and code, which are copied, where other sources' differ.

    Args:
        side_files: By source, the hashes of its side files by name.
        files_from: The source whose files are copied.
    """
    kept = side_files[files_from].items()
    copied = {path: text for path, text in kept if path.endswith((".safetensors", ".py"))}
    others = {
        path: [
            name
            for name, files in side_files.items()
            if path in files and same_content(copied[path], files[path]) is not True
        ]
        for path in copied
    }
    return tuple(
        f"{path} is copied from {files_from} and not merged; that of {', '.join(names)} differs"
        for path, names in others.items()
        if names
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
