"""Files of a checkpoint before any is read: their sizes, and names of weight files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hub_magmax.checkpoints.headers import HEADER_READERS, ReadBytes

#: Suffixes of the files of weights whose headers are read.
SUFFIXES = tuple(f".{suffix}" for suffix in HEADER_READERS)

#: A file of weights, or the index of several, with its variant as transformers calls it.
_WEIGHTS = re.compile(
    r"[^/]*?(\.(?P<variant>[\w-]+?))?"
    rf"\.({'|'.join(HEADER_READERS)})(\.index(\.(?P<index_variant>[\w-]+))?\.json)?"
)

#: Bytes of the files of a folder by path, and its sub-folders; `source.Folder` is one.
Contents = tuple[Mapping[str, int], tuple[str, ...]]


def _nothing(folder: str) -> Contents:
    return {}, ()


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint, from whose headers its index is read.

    Attributes:
        label: Name of the checkpoint in messages.
        sizes: Bytes of every file, by its path relative to the checkpoint.
        read_bytes: Returns the bytes `[start, stop)` of a file.
        weights: The file of weights, or the index, that counts if there are several.
        origin: Arguments of `from_pretrained` that load it, as Python writes them, for messages.
        address: Name of its folder in a recipe, to which `/` and the name of a part can be added.
        contents: Lists a folder in the checkpoint, the top for an empty path.
    """

    label: str
    sizes: Mapping[str, int]
    read_bytes: ReadBytes
    weights: str = ""
    origin: str = ""
    address: str = ""
    contents: Callable[[str], Contents] = _nothing

    def part(self, path: str) -> str:
        """Return the name that a recipe gives to a file or folder in the checkpoint."""
        return f"{self.address or self.label}/{path}"


def is_weights(name: str) -> bool:
    """Say whether a file of this name holds weights, or is an index of such files."""
    return _WEIGHTS.fullmatch(name) is not None


def split_part(part: str) -> tuple[str, str]:
    """Return the folder, and the file of weights in it, that a part of a repository names; empty for none."""
    folder, _, name = part.rpartition("/")
    return (folder, name) if is_weights(name) else (part, "")


def variant_of(name: str) -> str | None:
    """Return the variant of a file of weights as transformers calls it; None for the usual one."""
    match = _WEIGHTS.fullmatch(name)
    return match and (match["index_variant"] or match["variant"])
