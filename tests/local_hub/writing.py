"""The endpoints that write: repositories, refs, uploads, commits."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.local_hub.access import Call, StorageRefusalError
from tests.local_hub.metadata import validate
from tests.local_hub.objects import (
    MAX_REGULAR_BYTES,
    Entry,
    Kind,
    Repo,
    RepoId,
    Tree,
    belongs_in_lfs,
    git_oid,
    gitattributes,
    lfs_entry,
)
from tests.local_hub.wire import RefusalError, Response, json_response

Change = Callable[[dict[str, Entry]], None]
"""One line of a commit, applied to the tree so far."""


def create_repo(call: Call) -> Response:
    """Make a repository with its first commit; answer 409 and its address if it exists."""
    asked = call.request.body.json()
    repo_id = _repo_id(call, asked)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    url = f"http://{call.request.host}/{repo_id.web_path}"
    if not call.owns(repo_id.namespace):
        rights = f"You don't have the rights to create a {repo_id.kind} under the namespace"
        raise RefusalError(403, f'{rights} "{repo_id.namespace}"')
    if call.core.store.find(repo_id) is not None:
        message = f"You already created this {repo_id.kind} repo"
        return json_response({"error": message, "url": url}, status=409, headers={"X-Error-Message": message})
    call.core.store.create(Repo(repo_id, private=private), {".gitattributes": gitattributes()})
    return json_response({"url": url, "name": repo_id.name, "private": private})


def delete_repo(call: Call) -> Response:
    """Remove a repository."""
    repo_id = _repo_id(call, call.request.body.json())
    kind = "" if repo_id.kind == "model" else f"{repo_id.kind}s/"
    repo = Call(call.core, call.request, {"kind": kind, "name": repo_id.name}).writable()
    call.core.store.delete(repo.id)
    return json_response({})


def settings(call: Call) -> Response:
    """Change who may see or download a repository."""
    repo = call.writable()
    asked = call.request.body.json()
    visibility = asked.get("visibility")
    private = asked.get("private") if visibility is None else visibility == "private"
    call.core.store.set_access(repo.id, private=private, gated=asked.get("gated"))
    return json_response({})


def create_branch(call: Call) -> Response:
    """Add a branch that starts at a revision, main unless told."""
    repo = call.writable()
    start = call.core.store.resolve(repo, call.request.body.json().get("startingPoint") or "main")
    call.core.store.set_ref(repo.id, f"refs/heads/{call.arguments['ref']}", start.sha, new=True)
    return json_response({})


def delete_branch(call: Call) -> Response:
    """Remove a branch other than main."""
    if call.arguments["ref"] == "main":
        raise RefusalError(403, "Cannot delete the default branch")
    call.core.store.set_ref(call.writable().id, f"refs/heads/{call.arguments['ref']}", None)
    return json_response({})


def create_tag(call: Call) -> Response:
    """Name a revision."""
    repo = call.writable()
    tag = call.request.body.json().get("tag", "")
    call.core.store.set_ref(repo.id, f"refs/tags/{tag}", call.commit(repo).sha, new=True)
    return json_response({})


def delete_tag(call: Call) -> Response:
    """Remove a tag."""
    call.core.store.set_ref(call.writable().id, f"refs/tags/{call.arguments['revision']}", None)
    return json_response({})


def validate_yaml(call: Call) -> Response:
    """Check a card."""
    findings = validate(str(call.request.body.json().get("content", "")))
    return json_response(findings.body(), status=400 if findings.errors else 200)


def preupload(call: Call) -> Response:
    """Say of each file whether it belongs in LFS, and what the revision holds in its place."""
    tree = call.commit(call.proposable()).tree
    modes = []
    for file in call.request.body.json()["files"]:
        path, sample = file["path"], base64.b64decode(file.get("sample", ""))
        mode = "lfs" if belongs_in_lfs(path, file["size"], sample) else "regular"
        oid = tree[path].etag if path in tree else None
        modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return json_response({"files": modes})


def lfs_batch(call: Call) -> Response:
    """Say where to send each LFS object; nowhere if the repository has it.

    Whoever may read may send: a pull request needs its files before it exists, and they show nowhere else.
    """
    call.require_user()
    repo = call.readable()
    asked = call.request.body.json()
    if asked.get("operation") != "upload" or "basic" not in asked.get("transfers", ["basic"]):
        raise RefusalError(400, "Only uploads by the basic transfer are served here")
    objects = [_upload(call, repo, item["oid"], item["size"]) for item in asked["objects"]]
    return json_response({"transfer": "basic", "objects": objects})


def store_object(call: Call) -> Response:
    """Take an LFS object, on the storage host; keep it only if size and sha256 are right."""
    call.core.signer.check(call.request)
    store, oid = call.core.store, call.arguments["oid"]
    sha256, num_bytes = store.keep(call.request.body.blocks())
    if num_bytes != int(call.request.query["size"][-1]):
        raise StorageRefusalError(400, "IncompleteBody", "The number of bytes is not the one announced")
    if sha256 != oid:
        raise StorageRefusalError(400, "BadDigest", "The sha256 is not the one announced")
    store.add_upload(call.repo_id, oid)
    return Response(200, {"ETag": f'"{oid}"'})


def verify_object(call: Call) -> Response:
    """Say whether an LFS object has arrived."""
    call.require_user()
    repo = call.readable()
    asked = call.request.body.json()
    if asked["oid"] not in repo.uploads:
        raise RefusalError(404, f"LFS object not found: {asked['oid']}")
    if call.core.store.blob_path(asked["oid"]).stat().st_size != asked["size"]:
        raise RefusalError(422, f"LFS object has another size: {asked['oid']}")
    return json_response({"message": "ok"})


@dataclass(frozen=True)
class _Payload:
    """A commit as it was sent, one JSON value a line."""

    header: Mapping[str, Any]
    changes: tuple[Change, ...]

    def apply(self, before: Tree) -> Tree:
        tree = dict(before)
        for change in self.changes:
            change(tree)
        return tree


def commit(call: Call) -> Response:
    """Carry out all changes as one commit, or none of them."""
    repo = call.proposable()
    author = call.require_user()
    payload = _payload(call, repo)
    as_request = call.request.flag("create_pr")
    made, ref = call.core.store.commit(
        repo.id,
        call.arguments["revision"],
        payload.apply,
        text=f"{payload.header['summary']}\n\n{payload.header.get('description', '')}",
        author=author,
        parent=str(payload.header.get("parentCommit", "")),
        pull_request=as_request,
    )
    answer = {
        "success": True,
        "commitOid": made.sha,
        "commitUrl": f"{call.page}/commit/{made.sha}",
        "hookOutput": "",
    }
    if as_request:
        answer["pullRequestUrl"] = f"{call.page}/discussions/{ref.rpartition('/')[2]}"
    return json_response(answer)


def _payload(call: Call, repo: Repo) -> _Payload:
    header: Mapping[str, Any] = {}
    changes = []
    for line in filter(bytes.strip, call.request.body.lines()):
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise RefusalError(400, f"Malformed line in the commit: {error}") from error
        if key == "header":
            header = value
        else:
            changes.append(_change(call, repo, key, value))
    if not header.get("summary"):
        raise RefusalError(400, '"header.summary" is required')
    return _Payload(header, tuple(changes))


def _change(call: Call, repo: Repo, key: str, value: Mapping[str, Any]) -> Change:
    path = _checked_path(str(value.get("path", "")))
    if key == "file":
        entry = _regular(call, path, value)
        return lambda tree: tree.update({path: entry})
    if key == "lfsFile":
        entry = _large(call, repo, path, value)
        return lambda tree: tree.update({path: entry})
    if key == "deletedFile":
        return lambda tree: _delete(tree, [path] if path in tree else [], path)
    if key == "deletedFolder":
        return lambda tree: _delete(tree, [name for name in tree if name.startswith(f"{path}/")], path)
    raise RefusalError(400, f'"{key}" is not a kind of change')


def _delete(tree: dict[str, Entry], paths: list[str], asked: str) -> None:
    if not paths:
        raise RefusalError(404, f"A file with this name doesn't exist: {asked}", code="EntryNotFound")
    for path in paths:
        del tree[path]


def _regular(call: Call, path: str, value: Mapping[str, Any]) -> Entry:
    text = str(value.get("content", ""))
    content = base64.b64decode(text) if value.get("encoding") == "base64" else text.encode()
    if len(content) > MAX_REGULAR_BYTES:
        raise RefusalError(400, f"Files larger than 10 MB must go through LFS: {path}")
    if path == "README.md":
        findings = validate(content.decode(errors="replace"))
        if findings.errors:
            raise RefusalError(400, f"Invalid metadata in README.md: {'; '.join(findings.errors)}")
    sha256, num_bytes = call.core.store.keep([content])
    return Entry(sha256, num_bytes, git_oid("blob", content), lfs=False)


def _large(call: Call, repo: Repo, path: str, value: Mapping[str, Any]) -> Entry:
    oid = str(value.get("oid", ""))
    if oid not in repo.uploads:
        raise RefusalError(
            400, f"Your push was rejected: LFS pointer pointed to a file that does not exist: {path}"
        )
    num_bytes = call.core.store.blob_path(oid).stat().st_size
    if value.get("size", num_bytes) != num_bytes:
        raise RefusalError(400, f"LFS pointer has the wrong size: {path}")
    return lfs_entry(oid, num_bytes)


def _upload(call: Call, repo: Repo, oid: str, num_bytes: int) -> dict[str, Any]:
    known = {"oid": oid, "size": num_bytes}
    if len(oid) != 64 or not oid.isalnum():
        return {**known, "error": {"code": 422, "message": "The oid is not a sha256"}}
    if oid in repo.uploads:
        return known
    put = call.core.signer.url("PUT", f"/_storage/{repo.id.web_path}/{oid}/upload", {"size": str(num_bytes)})
    verify = f"{call.page}.git/info/lfs/objects/verify"
    return {**known, "actions": {"upload": {"href": put}, "verify": {"href": verify}}}


def _repo_id(call: Call, asked: Mapping[str, Any]) -> RepoId:
    kinds: dict[object, Kind] = {"dataset": "dataset", "space": "space"}
    namespace = asked.get("organization") or call.require_user()
    return RepoId(kinds.get(asked.get("type"), "model"), f"{namespace}/{asked.get('name', '')}")


def _checked_path(path: str) -> str:
    path = path.rstrip("/")
    parts = path.split("/")
    if not path or any(part in ("", ".", "..", ".git") for part in parts):
        raise RefusalError(400, f"Invalid path in a commit: '{path}'")
    return path
