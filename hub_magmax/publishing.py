"""Put a finished model on the Hub in one commit, and check what arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_magmax.cards import CARD_NAME, PICTURE_NAME, render_card
from hub_magmax.errors import HubMagmaxError, OutputError, PublishError
from hub_magmax.evaluation import SCORES_NAME, read_scores
from hub_magmax.io.fetching import hub_api
from hub_magmax.io.opening import file_sha256
from hub_magmax.io.remote import open_hub, resolve_commit
from hub_magmax.io.source import LocalSource, TensorSource
from hub_magmax.lockfile import LOCK_NAME, read_lock
from hub_magmax.recipe import RECIPE_NAME, load_recipe
from hub_magmax.reports import REPORT_NAME, MergeReport, parse_report, read_report
from hub_magmax.sidefiles import is_side_file
from hub_magmax.surface import EXPLORER_NAME


@dataclass(frozen=True)
class Published:
    """What a push left on the Hub: `commit` is 40 hexadecimal digits, `url` shows it."""

    repo_id: str
    commit: str
    url: str


_SIGN_IN = "Run `hf auth login` or set HF_TOKEN to a token with write access."


@contextmanager
def publish_errors(where: str) -> Iterator[None]:
    """Turn what huggingface_hub raises while writing into a PublishError that says what to do."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    try:
        yield
    except RepositoryNotFoundError as error:
        raise PublishError(
            "there is no such repository that this token may write to", where=where, hint=_SIGN_IN
        ) from error
    except RevisionNotFoundError as error:
        raise PublishError(
            "there is no such branch", where=where, hint="Create it first, or name another one."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PublishError(
                f"this token may not write here (status {status})", where=where, hint=_SIGN_IN
            ) from error
        reason = (error.server_message or "").strip().split("\n")[0]
        raise PublishError(
            f"the Hub answered {status or 'nothing'}" + (f" ({reason})" if reason else ""),
            where=where,
            hint="Nothing was published; run the same command again, what was uploaded is not sent twice.",
        ) from error
    except RuntimeError as error:  # how huggingface_hub reports an upload that failed
        raise PublishError(
            f"{str(error).rstrip('.')} ({type(error.__cause__ or error).__name__})",
            where=where,
            hint="Nothing was published; run the same command again, what was uploaded is not sent twice. "
            "If the server does not speak Xet, set HF_HUB_DISABLE_XET=1.",
        ) from error
    except HFValidationError as error:
        raise PublishError(f"not a valid repository id: {error}", where=where) from error
    except (httpx.HTTPError, OfflineModeIsEnabled) as error:
        raise PublishError(
            f"the Hub cannot be reached ({type(error).__name__})",
            where=where,
            hint="Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, then run the same command again.",
        ) from error


def prepare_repository(repo_id: str, *, private: bool = False) -> None:
    """Create the repository if it is not there, and check that this token may write to it.

    Raises:
        PublishError: If it may not. Called before a merge, so that it is known before, not after.
    """
    with publish_errors(repo_id):
        api = hub_api()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.auth_check(repo_id, write=True)


def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add merged model",
) -> Published:
    """Publish the files of `folder` as one commit, then compare every shard with the report.

    Args:
        folder: A finished output folder.
        repo_id: `org/model`; created if it is not there.
        private: Whether a new repository is private.
        revision: Branch to commit to; the default branch if None.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Title of the commit.

    Raises:
        OutputError: If `folder` does not hold a merged model.
        PublishError: If the Hub refuses, or holds other bytes afterwards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    folder = Path(folder)
    if not folder.is_dir():
        raise OutputError("there is no such folder", where=str(folder), hint="Give a merged model's folder.")
    report = read_report(folder / REPORT_NAME)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    prepare_repository(repo_id, private=private)
    contents: dict[str, Any] = {path.name: path for path in paths}
    if (card := _card_for(folder, repo_id)) is not None:
        contents[CARD_NAME] = card.encode()
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    with publish_errors(repo_id):
        api = hub_api()
        info = api.model_info(repo_id, revision=revision)
        # Weights of an earlier push would be loaded beside, or instead of, the new ones.
        stale = {file.rfilename for file in info.siblings or []} - {path.name for path in paths}
        operations += [CommitOperationDelete(name) for name in sorted(stale) if _holds_weights(name)]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    _compare_with_hub(repo_id, commit.oid, {shard.file: shard.sha256 for shard in report.shards})
    return Published(repo_id, commit.oid, commit.pr_url or commit.commit_url)


def _card_for(folder: Path, repo_id: str) -> str | None:
    """Return the folder's card with this repository's name in it; None where people changed the card."""
    card = folder / CARD_NAME
    if not card.is_file():
        return None
    scores_path = folder / SCORES_NAME
    facts = (
        load_recipe(folder / RECIPE_NAME),
        read_lock(folder / LOCK_NAME),
        read_report(folder / REPORT_NAME),
        read_scores(scores_path.parent) if scores_path.is_file() else None,
    )
    picture = PICTURE_NAME if (folder / PICTURE_NAME).is_file() else None
    explorer = EXPLORER_NAME if (folder / EXPLORER_NAME).is_file() else None
    if card.read_text(encoding="utf-8") != render_card(*facts, picture=picture, explorer=explorer):
        return None
    return render_card(*facts, picture=picture, explorer=explorer, repo_id=repo_id)


def _holds_weights(path: str) -> bool:
    return "/" not in path and path.endswith((".safetensors", ".safetensors.index.json"))


def _compare_with_hub(repo_id: str, commit: str, expected: dict[str, str]) -> None:
    with publish_errors(repo_id):
        found = hub_api().get_paths_info(repo_id, list(expected), revision=commit)
    hashes = {file.path: file.lfs.sha256 if file.lfs else None for file in found if hasattr(file, "lfs")}
    for path, sha256 in expected.items():
        if hashes.get(path) != sha256:
            raise PublishError(
                f"sha256 is {hashes.get(path)}, the merge report says {sha256}",
                where=f"{repo_id}@{commit[:7]}, {path}",
                hint="Do not use this revision; push again.",
            )


def verify(model: str, *, revision: str | None = None) -> dict[str, str]:
    """Compare every file that a merge wrote with the sha256 in the model's merge report.

    What people may write afterwards (the card, its picture, the scores) is not compared. Weights and other
    files that loaders read, and that the merge did not write, are errors.

    Args:
        model: A folder, or a repository id.
        revision: Of the repository; the default branch if None.

    Returns:
        The sha256 of each file that was compared; all of them are as recorded.

    Raises:
        OutputError: If there is no report, or a file of the folder differs, is missing or was added.
        PublishError: The same of a repository.
    """
    folder = Path(model)
    if folder.is_dir():
        report = read_report(folder / REPORT_NAME)
        with closing(LocalSource(folder, model)) as source:
            return _compare(source, report, OutputError)
    commit = resolve_commit(model, revision)
    with closing(open_hub(model, commit)) as source:
        if REPORT_NAME not in source.sizes:
            raise PublishError(
                f"there is no {REPORT_NAME}, so this is not a model that hub_magmax made",
                where=source.label,
            )
        content = source.read_bytes(REPORT_NAME, 0, source.sizes[REPORT_NAME])
        return _compare(source, parse_report(content, f"{source.label}, {REPORT_NAME}"), PublishError)


_AFTER_CHANGE: Mapping[type[HubMagmaxError], str] = {
    OutputError: "The folder changed after the merge; merge again into a new folder.",
    PublishError: "Do not use this revision; push again.",
}


def _compare(source: TensorSource, report: MergeReport, kind: type[HubMagmaxError]) -> dict[str, str]:
    expected = report.sha256
    found = {path: file_sha256(source, path) if path in source.sizes else "missing" for path in expected}
    changed = [path for path in expected if found[path] != expected[path]]
    if changed:
        others = f"; also changed: {', '.join(changed[1:])}" if len(changed) > 1 else ""
        raise kind(
            f"sha256 is {found[changed[0]]}, the merge report says {expected[changed[0]]}{others}",
            where=f"{source.label}, {changed[0]}",
            hint=_AFTER_CHANGE[kind],
        )
    # A report of an earlier version lists the weights only.
    added = [path for path in source.sizes if _is_loaded(path, weights_only=not report.files)]
    if surplus := [path for path in added if path not in expected]:
        raise kind(
            "the merge did not write this file, and what loads the model reads it",
            where=f"{source.label}, {surplus[0]}",
            hint=_AFTER_CHANGE[kind],
        )
    return expected


def _is_loaded(path: str, *, weights_only: bool) -> bool:
    """Say whether loading a model reads a file of this name: weights, code, or what lies beside them."""
    if weights_only or path.endswith((".safetensors", ".bin")):
        return path.endswith((".safetensors", ".bin"))
    return path.endswith((".index.json", ".py")) or is_side_file(path)
