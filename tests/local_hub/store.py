"""Repositories with commits and refs as git has them, and contents as files named by their sha256.

root/
  blobs/ab/abcd...                               one content, whatever number of repositories hold it
  repos/model/me/name/repo.json                  visibility, refs, finished uploads
  repos/model/me/name/commits/0123....json       one commit: its parent, message and whole tree
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from tests.local_hub.objects import (
    SAMPLE_BYTES,
    Commit,
    Entry,
    Gate,
    Repo,
    RepoId,
    Tree,
    belongs_in_lfs,
    folder_oids,
    git_oid,
    lfs_entry,
)
from tests.local_hub.wire import BLOCK_BYTES, RefusalError

_COMMIT_ID = re.compile(r"[0-9a-f]{7,40}")


class Store:
    """All repositories under one folder.

    Readers get frozen values; writers replace them under one lock, the file on disk first.
    """

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._root, self._clock = root, clock
        self._lock = threading.RLock()
        self._commits: dict[str, Commit] = {}
        for folder in ("blobs", "repos", "incoming"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self._repos = {repo.id: repo for repo in map(_load_repo, sorted(root.glob("repos/*/*/*/repo.json")))}

    # Contents.

    def blob_path(self, sha256: str) -> Path:
        """Return the file that holds a content."""
        return self._root / "blobs" / sha256[:2] / sha256

    def keep(self, blocks: Iterable[bytes]) -> tuple[str, int]:
        """Write a content to disk; return its sha256 and its size."""
        incoming = self._root / "incoming" / uuid.uuid4().hex
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with incoming.open("wb") as file:
                for block in blocks:
                    digest.update(block)
                    num_bytes += file.write(block)
            self._adopt(incoming, digest.hexdigest())
        finally:
            incoming.unlink(missing_ok=True)
        return digest.hexdigest(), num_bytes

    def keep_file(self, source: Path, *, link: bool) -> tuple[str, int]:
        """Keep a copy of a file, or with `link` the file itself where the file system allows it."""
        if not link:
            with source.open("rb") as file:
                return self.keep(iter(lambda: file.read(BLOCK_BYTES), b""))
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        incoming = self._root / "incoming" / uuid.uuid4().hex
        try:
            os.link(source.resolve(), incoming)
        except OSError:
            return self.keep_file(source, link=False)
        self._adopt(incoming, sha256)
        return sha256, source.stat().st_size

    def entry(self, path: str, content: bytes | Path, *, link: bool = False) -> Entry:
        """Keep the content of a file and describe it as the Hub would store it at `path`."""
        if isinstance(content, bytes):
            sample, num_bytes = content[:SAMPLE_BYTES], len(content)
            sha256, _ = self.keep([content])
        else:
            with content.open("rb") as file:
                sample = file.read(SAMPLE_BYTES)
            sha256, num_bytes = self.keep_file(content, link=link)
        if belongs_in_lfs(path, num_bytes, sample):
            return lfs_entry(sha256, num_bytes)
        return Entry(sha256, num_bytes, git_oid("blob", self.blob_path(sha256).read_bytes()), lfs=False)

    def _adopt(self, incoming: Path, sha256: str) -> None:
        blob = self.blob_path(sha256)
        blob.parent.mkdir(exist_ok=True)
        incoming.replace(blob)

    # Repositories.

    @property
    def repos(self) -> tuple[Repo, ...]:
        """All repositories as they are now, by their addresses."""
        with self._lock:
            return tuple(sorted(self._repos.values(), key=lambda repo: repo.id.web_path))

    @property
    def namespaces(self) -> set[str]:
        """The namespaces that hold repositories."""
        with self._lock:
            return {repo_id.namespace for repo_id in self._repos}

    def find(self, repo_id: RepoId) -> Repo | None:
        """Return a repository as it is now, or None."""
        return self._repos.get(repo_id)

    def repo(self, repo_id: RepoId) -> Repo:
        """Return a repository as it is now.

        Raises:
            RefusalError: 404, if there is none.
        """
        repo = self.find(repo_id)
        if repo is None:
            raise RefusalError(404, f"Repository not found: {repo_id.web_path}", code="RepoNotFound")
        return repo

    def create(self, repo: Repo, files: Mapping[str, bytes]) -> Repo:
        """Add a repository whose first commit, on main, holds `files`.

        Raises:
            RefusalError: 409, if it exists.
        """
        tree = {path: self.entry(path, content) for path, content in files.items()}
        with self._lock:
            if repo.id in self._repos:
                raise RefusalError(409, f"You already created this {repo.id.kind} repo")
            repo = replace(repo, created_seconds=int(self._clock()))
            commit = self._write_commit(repo.id, tree, "", "initial commit", "system")
            return self._put(replace(repo, refs={"refs/heads/main": commit.sha}))

    def delete(self, repo_id: RepoId) -> None:
        """Forget a repository; its contents stay for others that hold them."""
        with self._lock:
            self.repo(repo_id)
            del self._repos[repo_id]
            shutil.rmtree(self._folder(repo_id))

    def set_access(self, repo_id: RepoId, *, private: bool | None, gated: Gate | None) -> None:
        """Change who may see or download a repository; None changes nothing."""
        with self._lock:
            repo = self.repo(repo_id)
            private, gated = (
                repo.private if private is None else private,
                repo.gated if gated is None else gated,
            )
            self._put(replace(repo, private=private, gated=gated))

    def add_upload(self, repo_id: RepoId, sha256: str) -> None:
        """Note that an LFS object has arrived for a repository."""
        with self._lock:
            repo = self.repo(repo_id)
            self._put(replace(repo, uploads=tuple(sorted({*repo.uploads, sha256}))))

    def forget_uploads(self, repo_id: RepoId) -> tuple[str, ...]:
        """Drop the LFS objects that no commit of the repository holds; return their sha256."""
        with self._lock:
            repo = self.repo(repo_id)
            commits = (_load_commit(path) for path in self._folder(repo_id).glob("commits/*.json"))
            committed = {entry.sha256 for commit in commits for entry in commit.tree.values()}
            kept = tuple(sha256 for sha256 in repo.uploads if sha256 in committed)
            self._put(replace(repo, uploads=kept))
            return tuple(sha256 for sha256 in repo.uploads if sha256 not in committed)

    def set_ref(self, repo_id: RepoId, ref: str, sha: str | None, *, new: bool = False) -> None:
        """Move, add or (with None) remove a branch or tag.

        Raises:
            RefusalError: 409, if the ref must be new and exists; 404, if it must exist and does not.
        """
        with self._lock:
            refs = dict(self.repo(repo_id).refs)
            if new and ref in refs:
                raise RefusalError(409, f"Reference already exists: {ref}")
            if sha is None and refs.pop(ref, None) is None:
                raise RefusalError(404, f"Reference not found: {ref}", code="RevisionNotFound")
            if sha is not None:
                refs[ref] = sha
            self._put(replace(self.repo(repo_id), refs=refs))

    def _folder(self, repo_id: RepoId) -> Path:
        return self._root / "repos" / repo_id.kind / repo_id.name

    def _put(self, repo: Repo) -> Repo:
        _write_json(self._folder(repo.id) / "repo.json", asdict(repo))
        self._repos[repo.id] = repo
        return repo

    # Commits.

    def ref_of(self, repo: Repo, revision: str) -> str | None:
        """Return the full name of the ref that `revision` names: full, branch or tag; None for none."""
        candidates = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((ref for ref in candidates if ref in repo.refs), None)

    def resolve(self, repo: Repo, revision: str) -> Commit:
        """Return the commit that a branch, tag, full ref or commit id (7 digits suffice) names.

        Raises:
            RefusalError: 404, if it names none.
        """
        ref = self.ref_of(repo, revision)
        sha = repo.refs[ref] if ref else revision.lower()
        found = (
            sorted(self._folder(repo.id).glob(f"commits/{sha}*.json")) if _COMMIT_ID.fullmatch(sha) else []
        )
        if len(found) != 1:
            raise RefusalError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        if found[0].stem not in self._commits:
            self._commits[found[0].stem] = _load_commit(found[0])
        return self._commits[found[0].stem]

    def history(self, repo: Repo, commit: Commit) -> Iterator[Commit]:
        """Return a commit and its ancestors, newest first."""
        yield commit
        while commit.parent:
            commit = self.resolve(repo, commit.parent)
            yield commit

    def last_change(self, repo: Repo, commit: Commit, path: str) -> Commit:
        """Return the newest commit that changed a file or something in a folder."""

        def seen(tree: Tree) -> list[tuple[str, str]]:
            return sorted((p, e.oid) for p, e in tree.items() if p == path or p.startswith(f"{path}/"))

        wanted = seen(commit.tree)
        for ancestor in self.history(repo, commit):
            if seen(ancestor.tree) != wanted:
                break
            commit = ancestor
        return commit

    def commit(
        self,
        repo_id: RepoId,
        revision: str,
        change: Callable[[Tree], Tree],
        *,
        text: str,
        author: str,
        parent: str = "",
        pull_request: bool = False,
    ) -> tuple[Commit, str]:
        """Add one commit to a branch or pull request, or open a pull request with it.

        Args:
            change: From the tree before to the tree after; called while nobody else can commit.
            text: The message; its first line is the title.
            author: Name of the user.
            parent: Start of the commit id that must be the head; for a pull request its base. Empty: any.

        Returns:
            The commit and the full name of its ref.

        Raises:
            RefusalError: 404, if `revision` is no branch or pull request; 412, if the head is not `parent`.
        """
        with self._lock:
            repo = self.repo(repo_id)
            ref = self.ref_of(repo, revision)
            if ref is None or ref.startswith("refs/tags/"):
                raise RefusalError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
            base = self.resolve(repo, repo.refs[ref])
            if pull_request:
                base = self.resolve(repo, parent) if parent else base
                ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}"
            elif not base.sha.startswith(parent.lower()):
                raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            commit = self._write_commit(repo_id, change(base.tree), base.sha, text, author)
            self._put(replace(repo, refs={**repo.refs, ref: commit.sha}))
            return commit, ref

    def _write_commit(self, repo_id: RepoId, tree: Tree, parent: str, text: str, author: str) -> Commit:
        seconds = int(self._clock())
        lines = [f"tree {folder_oids(tree)['']}", *([f"parent {parent}"] if parent else [])]
        lines += [f"{role} {author} <> {seconds} +0000" for role in ("author", "committer")]
        sha = git_oid("commit", "\n".join([*lines, "", f"{text.strip()}\n"]).encode())
        commit = Commit(sha, dict(sorted(tree.items())), parent, text.strip(), author, seconds)
        _write_json(self._folder(repo_id) / "commits" / f"{sha}.json", asdict(commit))
        self._commits[sha] = commit
        return commit


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(path)


def _load_repo(path: Path) -> Repo:
    data = json.loads(path.read_text())
    return Repo(**{**data, "id": RepoId(**data["id"]), "uploads": tuple(data["uploads"])})


def _load_commit(path: Path) -> Commit:
    data = json.loads(path.read_text())
    return Commit(**{**data, "tree": {name: Entry(**entry) for name, entry in data["tree"].items()}})
