"""A Hugging Face Hub on this machine, for tests, benchmarks and trying things out.

It speaks the Hub's protocol, so that huggingface_hub, transformers and datasets work against it
through `HF_ENDPOINT`. Large files travel by Xet, or by LFS from clients with `HF_HUB_DISABLE_XET=1`.

    python -m tests.local_hub --root my-hub

    with LocalHub() as hub:
        hub.add_repo("me/model", files={"config.json": b"{}"})
        HfApi(endpoint=hub.endpoint, token=hub.token).model_info("me/model")
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from hub_magmax.errors import OutputError, SourceError
from tests.local_hub.access import ADMIN, Core, Signer
from tests.local_hub.faults import Faults
from tests.local_hub.objects import Commit, Gate, Kind, Repo, RepoId
from tests.local_hub.server import Exchange, HubServer
from tests.local_hub.store import Store
from tests.local_hub.xetstore import XetStore

DEFAULT_TOKEN = "hf_local"


class LocalHub:
    """A Hub on 127.0.0.1, running between `start` and `close`, or as a context manager.

    Args:
        root: Folder that keeps the repositories; None for a temporary one.
        port: Port to listen on; 0 for any that is free.
        token: Token of the user `me`, who is a member of every organisation.
        orgs: Organisations that hold no repository yet.
        url_lifetime_seconds: How long a signed URL may be used.
        clock: Seconds since the epoch, for the dates of commits and the end of signed URLs; an attribute of
            the same name that may be set later.

    Raises:
        OutputError: If the port is taken or the folder cannot be written.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        port: int = 0,
        token: str = DEFAULT_TOKEN,
        orgs: Sequence[str] = (),
        url_lifetime_seconds: float | int = 3600,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.token = token
        self._users = {token: ADMIN}
        self._temporary = tempfile.TemporaryDirectory(prefix="local-hub-") if root is None else None
        self.root = Path(self._temporary.name) if self._temporary else Path(root or "")
        try:
            self.clock = clock
            self._store = Store(self.root, self._now)
            self._xet = XetStore(self.root, self._store)
            self._server = HubServer(port)
        except OSError as error:
            self._remove_temporary()
            raise OutputError(
                f"the local Hub cannot start: {error}",
                where=f"{self.root}, port {port}",
                hint="Choose others",
            ) from error
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        storage = f"http://localhost:{self._server.server_port}"
        signer = Signer(storage, secrets.token_bytes(32), self._now, url_lifetime_seconds)
        self._server.core = Core(self._store, self._xet, signer, self._users, tuple(orgs))
        self._thread: threading.Thread | None = None

    def _now(self) -> float:
        return self.clock()

    def start(self) -> LocalHub:
        """Begin to answer; the port is open already."""
        # The default of half a second would make every close as slow.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="local-hub")
        self._thread.start()
        return self

    def close(self) -> None:
        """End all connections, and remove the folder if it is a temporary one."""
        if self._thread is not None:
            self._server.stop()
            self._thread.join()
            self._thread = None
        self._server.server_close()
        self._remove_temporary()

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def faults(self) -> Faults:
        """What goes wrong, in the order in which it was added."""
        return self._server.faults

    @property
    def log(self) -> tuple[Exchange, ...]:
        """Every exchange since the start or the last reset, in the order in which they ended."""
        return self._server.journal.read()

    @property
    def counts(self) -> Counter[str]:
        """How many requests there were, by method and endpoint, such as `HEAD resolve`, `GET storage`."""
        return Counter(f"{exchange.method} {exchange.route}" for exchange in self.log)

    def reset_log(self) -> None:
        """Begin the log anew."""
        self._server.journal.reset()

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which another process uses this Hub as the user `me`, without Xet."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": self.token,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @property
    def xet_environment(self) -> dict[str, str]:
        """The same with Xet; hf_xet keeps what it knows of this Hub in the folder `xet` below `HF_HOME`."""
        return {**self.environment, "HF_HUB_DISABLE_XET": "0"}

    def add_user(self, name: str) -> str:
        """Add a user who may write in the namespace `name` only; return the token."""
        token = f"hf_{name}"
        self._users[token] = name
        return token

    def add_repo(
        self,
        repo: str,
        *,
        files: Mapping[str, bytes] | None = None,
        folder: Path | None = None,
        link: bool = False,
        repo_type: Kind = "model",
        revision: str = "main",
        private: bool | None = None,
        gated: bool | None = None,
        message: str = "Add files",
    ) -> str:
        """Commit files to a branch, making repository and branch first where they are missing.

        A new branch starts at main. A new repository starts with an empty commit.

        Args:
            repo: Name with namespace, such as `me/model`.
            files: Contents by path in the repository.
            folder: A folder whose files are added too, by their relative paths.
            link: Take the folder's files by hard link where possible; they must not change afterwards.
            repo_type: What kind of repository.
            revision: The branch.
            private: Whether only its owner sees it; None leaves it as it is, new ones public.
            gated: Whether only its owner downloads from it; None as above.
            message: The commit's title.

        Returns:
            The new commit; the branch's head if there is nothing to add.

        Raises:
            SourceError: If the name is not one, or `folder` is not a folder.
        """
        repo_id = _repo_id(repo, repo_type)
        if self._store.find(repo_id) is None:
            self._store.create(Repo(repo_id), {})
        gates: dict[bool | None, Gate | None] = {None: None, False: False, True: "auto"}
        self._store.set_access(repo_id, private=private, gated=gates[gated])
        if self._store.ref_of(self._store.repo(repo_id), revision) is None:
            self._store.set_ref(
                repo_id, f"refs/heads/{revision}", self.head(repo, repo_type=repo_type), new=True
            )
        sources: dict[str, bytes | Path] = {**_files_below(folder), **(files or {})}
        if not sources:
            return self.head(repo, revision=revision, repo_type=repo_type)
        added = {path: self._store.entry(path, source, link=link) for path, source in sorted(sources.items())}
        for entry in added.values():
            if entry.lfs:
                self._store.add_upload(repo_id, entry.sha256)
        commit, _ = self._store.commit(
            repo_id, revision, lambda tree: {**tree, **added}, text=message, author=ADMIN
        )
        return commit.sha

    def head(self, repo: str, *, revision: str = "main", repo_type: Kind = "model") -> str:
        """Return the commit that a revision names."""
        return self.commits(repo, revision=revision, repo_type=repo_type)[0].sha

    def files(self, repo: str, revision: str = "main", *, repo_type: Kind = "model") -> tuple[str, ...]:
        """Return the paths of all files at a revision, sorted."""
        return tuple(self.commits(repo, revision=revision, repo_type=repo_type)[0].tree)

    def read(self, repo: str, path: str, revision: str = "main", *, repo_type: Kind = "model") -> bytes:
        """Return the content of one file.

        Raises:
            SourceError: If there is no such file.
        """
        entry = self.commits(repo, revision=revision, repo_type=repo_type)[0].tree.get(path)
        if entry is None:
            raise SourceError(f"there is no file '{path}'", where=f"{repo}@{revision}")
        return self._store.blob_path(entry.sha256).read_bytes()

    def commits(self, repo: str, *, revision: str = "main", repo_type: Kind = "model") -> tuple[Commit, ...]:
        """Return a revision's history, newest first.

        Raises:
            SourceError: If there is no such repository or revision.
        """
        found = self._store.repo(_repo_id(repo, repo_type))
        return tuple(self._store.history(found, self._store.resolve(found, revision)))

    def forget_uploads(self, repo: str, *, repo_type: Kind = "model") -> tuple[str, ...]:
        """Lose the uploads that no commit holds, as the Hub may after a day; return their sha256."""
        return self._store.forget_uploads(_repo_id(repo, repo_type))


def _repo_id(repo: str, repo_type: Kind) -> RepoId:
    namespace, _, name = repo.partition("/")
    if not namespace or not name or "/" in name or ".." in repo:
        raise SourceError(
            f"'{repo}' is not the name of a repository", expected="namespace/name, such as me/model"
        )
    return RepoId(repo_type, repo)


def _files_below(folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise SourceError("this is not a folder", where=str(folder))
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
