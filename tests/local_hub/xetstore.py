"""What was uploaded by Xet: xorbs and shards, and which file consists of what.

root/
  xet/name              random, so that no other store has it
  xet/xorbs/0123...     the sha256 of a xorb's bytes, which are kept among the other contents
  xet/shards/abcd...    a shard, named by its sha256
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.local_hub import xorbs
from tests.local_hub.shards import Shard, XetFile, XorbRows, parse
from tests.local_hub.store import Store
from tests.local_hub.wire import RefusalError


class XetStore:
    """All xorbs and shards under one folder; contents are in `store`.

    That a xorb has the hash it is named by is not checked, the sha256 of every file is.
    """

    def __init__(self, root: Path, store: Store) -> None:
        self._root, self._store = root / "xet", store
        self._lock = threading.Lock()
        self._files: dict[str, XetFile] = {}
        self._hashes: dict[str, str] = {}
        self._chunks: dict[str, XorbRows] = {}
        for folder in ("xorbs", "shards"):
            (self._root / folder).mkdir(parents=True, exist_ok=True)
        if not (self._root / "name").exists():
            self._write("name", secrets.token_hex(4).encode())
        self.name = (self._root / "name").read_text()
        for path in sorted(self._root.glob("shards/*")):
            self._index(parse(path.read_bytes()))

    def keep_xorb(self, xorb: str, blocks: Iterable[bytes]) -> None:
        """Keep a xorb.

        Raises:
            RefusalError: 400, if it is not one.
        """
        sha256, _ = self._store.keep(blocks)
        xorbs.layout(self._store.blob_path(sha256))
        self._write(f"xorbs/{xorb}", sha256.encode())

    def has_xorb(self, xorb: str) -> bool:
        return (self._root / "xorbs" / xorb).exists()

    def xorb_sha256(self, xorb: str) -> str:
        """Return the sha256 of a xorb's bytes.

        Raises:
            RefusalError: 400, if it was not uploaded.
        """
        if not self.has_xorb(xorb):
            raise RefusalError(400, f"There is no xorb {xorb}")
        return (self._root / "xorbs" / xorb).read_text()

    def layout(self, xorb: str) -> tuple[xorbs.Chunk, ...]:
        """Return the chunks of a xorb."""
        return xorbs.layout(self._store.blob_path(self.xorb_sha256(xorb)))

    def register(self, content: bytes) -> tuple[XetFile, ...]:
        """Put the files of a shard together, keep their contents, and return them.

        Raises:
            RefusalError: 400, if a xorb is missing, or a file is not what the shard says; then none is known.
        """
        shard = parse(content)
        for xorb in shard.xorbs:
            self.xorb_sha256(xorb.hash)
        for file in shard.files:
            self._keep_content(file)
        self._write(f"shards/{hashlib.sha256(content).hexdigest()}", content)
        self._index(shard)
        return shard.files

    def file(self, file_hash: str) -> XetFile | None:
        """Return the file of an Xet hash, if it is known."""
        return self._files.get(file_hash)

    def hash_of(self, sha256: str) -> str:
        """Return the Xet hash of a content; empty if it did not come by Xet."""
        return self._hashes.get(sha256, "")

    def holder_of(self, chunk: str) -> XorbRows | None:
        """Return a xorb that holds a chunk, if there is one."""
        return self._chunks.get(chunk)

    def _index(self, shard: Shard) -> None:
        with self._lock:
            self._files |= {file.hash: file for file in shard.files}
            self._hashes |= {file.sha256: file.hash for file in shard.files}
            self._chunks |= {chunk: xorb for xorb in shard.xorbs for chunk in xorb.chunks}

    def _keep_content(self, file: XetFile) -> None:
        sha256, num_bytes = self._store.keep(self._content(file))
        if (sha256, num_bytes) != (file.sha256, file.num_bytes):
            raise RefusalError(
                400, f"The chunks of file {file.hash} give {sha256}, and the shard says {file.sha256}"
            )

    def _content(self, file: XetFile) -> Iterator[bytes]:
        for term in file.terms:
            chunks = self.layout(term.xorb)
            if not term.start < term.stop <= len(chunks):
                raise RefusalError(400, f"Xorb {term.xorb} has {len(chunks)} chunks, and not {term.stop}")
            path = self._store.blob_path(self.xorb_sha256(term.xorb))
            yield from xorbs.contents(path, chunks[term.start : term.stop])

    def _write(self, name: str, content: bytes) -> None:
        unfinished = self._root / uuid.uuid4().hex
        unfinished.write_bytes(content)
        unfinished.replace(self._root / name)
