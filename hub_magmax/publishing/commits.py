"""Commits on the Hub: made once however often the answer is lost, and compared with the files sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, SELECTION_SUFFIX
from hub_magmax.checkpoints.side_files import content_hashes, same_content
from hub_magmax.errors import PublishError
from hub_magmax.hub import NOT_FROM_CACHE, hub_api, is_passing, is_token_empty, retry, token_in_use
from hub_magmax.merging.output.report import ShardRecord
from hub_magmax.publishing.authorship import signed_text
from hub_magmax.recipe.model_names import repository_problem, revision_problem

#: Part of the Hub's answer about a large file that was uploaded and has been removed.
_COLLECTED = "LFS pointer"

#: Text of hf_xet's errors for a refused token; they have no attributes.
_TOKEN_REFUSED = re.compile(r"\((401|403) ")

#: Pull requests that are looked at for a commit whose answer was lost.
_SHOWN_REQUESTS = 20


@dataclass(frozen=True)
class Destination:
    """Repository and branch of a model, and the form of its commit.

    Attributes:
        repo_id: `org/model`; created if it is not there.
        private: Whether a new repository is private.
        revision: Branch to commit to; the default branch if None.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Title of the commit; empty for one by what the branch holds.
        commit_description: Text below it.
        private_key: File of the key with which the model is signed before it is published.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str = ""
    commit_description: str = ""
    private_key: Path | None = None

    def __post_init__(self) -> None:
        problem = repository_problem(self.repo_id) or (
            revision_problem(self.revision) if self.revision else ""
        )
        if problem:
            raise PublishError(problem, hint="Write org/model, and the branch as --revision.")
        if self.create_pr and self.revision is not None:
            raise PublishError(
                "a pull request is opened against the default branch, and another one is named",
                where=self.name,
                hint="Leave out --revision or --create-pr.",
            )

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def title(self, head: Head) -> str:
        """Return the title of a commit on top of `head`: the first model is added, later ones update it."""
        return self.commit_message or f"{'Update' if head.holds_model else 'Add'} merged model"


@dataclass(frozen=True)
class Published:
    """Commit of a push, 40 hexadecimal digits, and its address; not `is_new` if the Hub held the same."""

    repo_id: str
    commit: str
    url: str
    is_new: bool = field(default=True, kw_only=True)


class CollectedError(PublishError):
    """The Hub has removed large files that were sent, and that no commit held; `files` names them."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message, where=where, hint="Run the same command again; they are sent again.")


@contextmanager
def publish_errors(where: str) -> Iterator[None]:
    """Turn errors of huggingface_hub while writing into a PublishError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    try:
        yield
    # RuntimeError and ConnectionError: how huggingface_hub and hf_xet report failed uploads.
    except (HfHubHTTPError, RuntimeError, OSError, httpx.HTTPError, ValueError) as error:
        told = _known(error, where) or _by_kind(error, where)
        if told is None:
            raise
        raise told from error


def _known(error: Exception, where: str) -> PublishError | None:
    """Return the error to raise for one of huggingface_hub that means one thing."""
    from huggingface_hub import errors

    known: tuple[tuple[type[Exception], str, str], ...] = (
        (
            errors.RepositoryNotFoundError,
            f"there is no such repository that {token_in_use()} may write to",
            _sign_in(),
        ),
        (errors.RevisionNotFoundError, "there is no such branch", "Create it first, or name another one."),
        (errors.LocalTokenNotFoundError, "nobody is signed in", _sign_in()),
        (
            errors.OfflineModeIsEnabled,  # which is a ConnectionError too
            "nothing can be published offline",
            "Unset HF_HUB_OFFLINE" + NOT_FROM_CACHE + ", then run the same command again.",
        ),
        (errors.HFValidationError, f"not a valid repository id: {error}", "Write org/model."),
    )
    found = (
        PublishError(what, where=where, hint=hint) for kind, what, hint in known if isinstance(error, kind)
    )
    return next(found, None)


def _by_kind(error: Exception, where: str) -> PublishError | None:
    """Return the error to raise for one that can mean several things; None for those of the system."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        return _refusal(error, where)
    if isinstance(error, RuntimeError | ConnectionError):
        return _failed_upload(error, where)
    if isinstance(error, httpx.HTTPError):
        return PublishError(
            f"the Hub cannot be reached ({type(error).__name__})",
            where=where,
            hint="Check the connection and HF_ENDPOINT, then run the same command again.",
        )
    if isinstance(error, ValueError):  # also how huggingface_hub refuses a card
        return PublishError(
            " ".join(str(error).split())[:500],
            where=where,
            hint="Nothing was published; run the same command again when that is mended.",
        )
    return None


def _sign_in() -> str:
    empty = " HF_TOKEN is set and empty: unset it." if is_token_empty() else ""
    return f"Run `hf auth login` or set HF_TOKEN to a token with write access.{empty}"


def _failed_upload(error: Exception, where: str) -> PublishError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    again = (
        "Nothing was published; run the same command again, files that arrived are not sent twice. "
        "If the server does not speak Xet, set HF_HUB_DISABLE_XET=1."
    )
    return PublishError(
        f"{reason} ({type(error.__cause__ or error).__name__})",
        where=where,
        hint=_sign_in() if _TOKEN_REFUSED.search(reason) else again,
    )


def _refusal(error: Any, where: str) -> PublishError:
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return PublishError(
            f"{token_in_use()} may not write here (status {status})", where=where, hint=_sign_in()
        )
    reason = (error.server_message or "").strip().split("\n")[0]
    if status == 400 and _COLLECTED in reason:
        return CollectedError(f"the Hub has lost files that were sent to it ({reason})", where)
    return PublishError(
        f"the Hub answered {status or 'nothing'}" + (f" ({reason})" if reason else ""),
        where=where,
        hint="Nothing was published; run the same command again, what was uploaded is not sent twice.",
    )


@dataclass(frozen=True)
class Head:
    """A branch as it is now: its commit, and the files it holds."""

    commit: str
    files: tuple[str, ...]

    @property
    def holds_model(self) -> bool:
        return any(map(holds_weights, self.files))

    def as_published(self, destination: Destination) -> Published:
        """Return its commit as that of an earlier push."""
        url = f"{hub_api().endpoint}/{destination.repo_id}/commit/{self.commit}"
        return Published(destination.repo_id, self.commit, url, is_new=False)


def holds_weights(path: str) -> bool:
    """Say whether a file of a repository is one of a model's weights, or belongs to those of an adapter."""
    weights = "/" not in path and path.endswith((".safetensors", ".safetensors.index.json", SELECTION_SUFFIX))
    return weights or path == ADAPTER_CONFIG_NAME


def prepare_repository(destination: Destination) -> Head:
    """Create the repository if it is not there, and check that this token may commit to the branch.

    Raises:
        PublishError: If it may not. Called before a merge, so that it is known before, not after.
    """
    api, repo_id = hub_api(), destination.repo_id
    with publish_errors(destination.name):
        if not (destination.create_pr and retry(lambda: api.repo_exists(repo_id))):
            retry(lambda: api.create_repo(repo_id, private=destination.private, exist_ok=True))
            retry(lambda: api.auth_check(repo_id, write=True))
    return find_head(destination)


def find_head(destination: Destination) -> Head:
    """Return the branch as it is now.

    Raises:
        PublishError: If there is no such repository or branch.
    """
    with publish_errors(destination.name):
        info = retry(lambda: hub_api().model_info(destination.repo_id, revision=destination.revision))
    assert info.sha is not None
    return Head(info.sha, tuple(file.rfilename for file in info.siblings or []))


def upload(destination: Destination, path: Path) -> bool:
    """Send a large file that no commit shows yet; return False if the Hub wants it in the commit itself."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(path.name, path)
    with publish_errors(f"{destination.name}, {path.name}"):
        retry(
            lambda: hub_api().preupload_lfs_files(
                destination.repo_id,
                [operation],
                revision=destination.revision,
                create_pr=destination.create_pr,
            ),
            _may_pass,
        )
    # How huggingface_hub itself remembers it between an upload and its commit.
    return operation._is_uploaded


def _may_pass(error: Exception) -> bool:
    """Say whether sending again may succeed; a signed address may have expired, or a connection broken."""
    return is_passing(error) or (isinstance(error, RuntimeError) and error.__cause__ is not None)


def uploaded(record: ShardRecord) -> Any:
    """Return the operation that puts a file into a commit whose content the Hub has already."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(record.file, b"")
    # What preupload_lfs_files leaves in an operation; a process that goes on has nothing else left of it.
    operation.upload_info = UploadInfo(record.size_bytes, b"", bytes.fromhex(record.sha256))
    operation._upload_mode, operation._is_uploaded = "lfs", True
    return operation


def commit(
    destination: Destination, operations: Sequence[Any], head: Head, expected: Mapping[str, str]
) -> Published:
    """Publish `operations` as one commit on top of `head`, and compare every file with the one sent.

    The commit is sent again after a failure that may pass. That is safe: on top of `head` there can be one
    only, and a branch that holds the expected files already is recognised as done.

    Args:
        destination: Where to.
        operations: huggingface_hub's operations.
        head: The branch as it was when the work began.
        expected: Hashes of each file that the commit must hold, as `side_files.content_hashes` writes them.

    Raises:
        PublishError: If the Hub refuses, the branch moved meanwhile, or it holds other bytes afterwards.
    """

    def attempt() -> Published:
        try:
            made = hub_api().create_commit(
                destination.repo_id,
                operations,
                commit_message=destination.title(head),
                commit_description=signed_text(destination.commit_description),
                revision=destination.revision,
                create_pr=destination.create_pr,
                parent_commit=head.commit,
            )
        except Exception as error:
            if (done := _done_already(destination, head, expected, error)) is not None:
                return done
            raise
        found = Published(destination.repo_id, made.oid, made.pr_url or made.commit_url)
        _compare(found, expected)
        return found

    try:
        return retry(attempt)
    except Exception as error:
        _explain(error, destination, head)
        raise


def _explain(error: Exception, destination: Destination, head: Head) -> None:
    """Raise the PublishError that explains a failed commit."""
    with publish_errors(destination.name):
        if _status(error) != 412:
            raise error
        now = find_head(destination).commit
        if now == head.commit:
            raise error
        raise PublishError(
            f"the branch moved meanwhile, from {head.commit[:7]} to {now[:7]}, so nothing was published "
            "(status 412)",
            where=destination.name,
            hint="Nothing is lost: look at what was committed there. The same command then publishes on top "
            "of it, and sends nothing again.",
        ) from error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _done_already(
    destination: Destination, head: Head, expected: Mapping[str, str], error: Exception
) -> Published | None:
    """Return the commit that was made although its answer was an error, or got lost."""
    if not (is_passing(error) or _status(error) == 412):
        return None
    with publish_errors(destination.name):
        for found in candidates(destination):
            if found.commit != head.commit and not differing(found, expected):
                return replace(found, is_new=True)
    return None


def candidates(destination: Destination) -> Iterator[Published]:
    """Yield the commits that may be an earlier push: the branch's, or the newest pull requests'."""
    if not destination.create_pr:
        yield find_head(destination).as_published(destination)
        return
    base = f"{hub_api().endpoint}/{destination.repo_id}"
    with publish_errors(destination.name):
        refs = retry(lambda: hub_api().list_repo_refs(destination.repo_id, include_pull_requests=True))
    numbered = sorted(refs.pull_requests or [], key=lambda ref: int(ref.ref.rpartition("/")[2]), reverse=True)
    for ref in numbered[:_SHOWN_REQUESTS]:
        number = ref.ref.rpartition("/")[2]
        yield Published(destination.repo_id, ref.target_commit, f"{base}/discussions/{number}", is_new=False)


def _compare(found: Published, expected: Mapping[str, str]) -> None:
    for path, hashes in differing(found, expected).items():
        raise PublishError(
            f"the Hub holds {hashes or 'no such file'}, and {expected[path]} was sent",
            where=f"{found.repo_id}@{found.commit[:7]}, {path}",
            hint="Do not use this revision; push again.",
        )


def differing(found: Published, expected: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of the files at a commit that are not as expected; empty ones for missing files."""
    from huggingface_hub.hf_api import RepoFile

    with publish_errors(found.repo_id):
        rows = retry(lambda: hub_api().get_paths_info(found.repo_id, list(expected), revision=found.commit))
    hashes = {
        row.path: f"sha256:{row.lfs.sha256}" if row.lfs else f"git:{row.blob_id}"
        for row in rows
        if isinstance(row, RepoFile)
    }
    return {
        path: hashes.get(path, "")
        for path, text in expected.items()
        if path not in hashes or same_content(hashes[path], text) is not True
    }


def hashes_of(content: Path | bytes) -> str:
    """Return the hashes by which the Hub knows a small file."""
    return content_hashes(content if isinstance(content, bytes) else content.read_bytes())
