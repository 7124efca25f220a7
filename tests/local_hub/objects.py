"""What a repository is made of: entries, commits, refs, and git's ids for them.

Every object id is computed as git computes it, with LFS pointers in place of large files.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from tests.local_hub.wire import RefusalError

Kind = Literal["model", "dataset", "space"]
Gate = Literal[False, "auto", "manual"]
Tree = Mapping[str, "Entry"]

MAX_REGULAR_BYTES = 10_000_000
SAMPLE_BYTES = 512
# As in the .gitattributes that the Hub gives every new repository.
_LFS_SUFFIXES = """
7z arrow bin bz2 ckpt gguf gz h5 joblib model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar
safetensors tar tflite tgz wasm xz zip zst
"""
_LFS_PATTERNS = tuple(f"*.{suffix}" for suffix in _LFS_SUFFIXES.split())


@dataclass(frozen=True)
class RepoId:
    """A repository's kind and its name with namespace, such as `me/model`."""

    kind: Kind
    name: str

    @property
    def namespace(self) -> str:
        return self.name.partition("/")[0]

    @property
    def web_path(self) -> str:
        """The path of its page: `me/model`, `datasets/me/data`."""
        return self.name if self.kind == "model" else f"{self.kind}s/{self.name}"


@dataclass(frozen=True)
class Entry:
    """One file of a tree.

    Attributes:
        oid: The git object id: of the content, or of the pointer when the file is in LFS.
    """

    sha256: str
    num_bytes: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One state of a repository; `seconds` since the epoch, `parent` empty for the first."""

    sha: str
    tree: Tree
    parent: str
    text: str
    author: str
    seconds: int

    @property
    def title(self) -> str:
        """The first line of the text."""
        return self.text.partition("\n")[0]

    @property
    def message(self) -> str:
        """The text below the title."""
        return self.text.partition("\n")[2].strip()


@dataclass(frozen=True)
class Repo:
    """Everything about a repository that can change."""

    id: RepoId
    private: bool = False
    gated: Gate = False
    created_seconds: int = 0
    refs: Mapping[str, str] = field(default_factory=dict)
    """From full names (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) to commits."""
    uploads: tuple[str, ...] = ()
    """sha256 of the LFS objects sent to this repository, committed or not."""


def git_oid(kind: str, content: bytes) -> str:
    """Return git's object id of a blob, tree or commit."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def pointer(sha256: str, num_bytes: int) -> bytes:
    """Return the text that git keeps in place of an LFS object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {num_bytes}\n".encode()


def lfs_entry(sha256: str, num_bytes: int) -> Entry:
    """Describe a file whose content is an LFS object."""
    return Entry(sha256, num_bytes, git_oid("blob", pointer(sha256, num_bytes)), lfs=True)


def belongs_in_lfs(path: str, num_bytes: int, sample: bytes) -> bool:
    """Say whether the Hub would take a file as an LFS object: by name, by size, or because it is binary."""
    if not num_bytes:
        return False
    by_name = any(fnmatchcase(path.rpartition("/")[2], pattern) for pattern in _LFS_PATTERNS)
    return by_name or num_bytes > MAX_REGULAR_BYTES or _is_binary(sample[:SAMPLE_BYTES])


def gitattributes() -> bytes:
    """Return the first file of a repository made through the protocol."""
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS).encode()


def folder_oids(tree: Tree) -> dict[str, str]:
    """Return git's object id of every folder, by path; the root is the empty path.

    Raises:
        RefusalError: 400, if a path names both a file and a folder.
    """
    children: dict[str, list[tuple[str, str, str]]] = {"": []}
    for path, entry in tree.items():
        parent, _, name = path.rpartition("/")
        children.setdefault(parent, []).append((name, "100644", entry.oid))
        while parent:
            children.setdefault(parent, [])
            parent = parent.rpartition("/")[0]
    oids: dict[str, str] = {}
    for folder in sorted(children, key=lambda path: (-path.count("/") if path else 1, path)):
        if folder in tree:
            raise RefusalError(400, f"'{folder}' cannot be both a file and a folder")
        # git sorts a folder as if its name ended in a slash.
        rows = sorted(
            children[folder], key=lambda row: f"{row[0]}/".encode() if row[1] == "40000" else row[0].encode()
        )
        content = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, mode, oid in rows)
        oids[folder] = git_oid("tree", content)
        if folder:
            parent, _, name = folder.rpartition("/")
            children[parent].append((name, "40000", oids[folder]))
    return oids


def _is_binary(sample: bytes) -> bool:
    # A full sample may end inside a character; a whole file may not.
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return "\0" in decoder.decode(sample, final=len(sample) < SAMPLE_BYTES)
    except UnicodeDecodeError:
        return True
