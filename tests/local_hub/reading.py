"""The endpoints that read: metadata, listings, files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlencode

from tests.local_hub.access import Call
from tests.local_hub.metadata import card_data, tags
from tests.local_hub.objects import Commit, Entry, Repo, folder_oids, pointer
from tests.local_hub.wire import RefusalError, Response, file_response, json_response


def whoami(call: Call) -> Response:
    """Say whose token it is."""
    name = call.require_user()
    orgs = [{"type": "org", "name": space} for space in call.namespaces if space != name]
    access_token = {"displayName": "local", "role": "write"}
    auth = {"type": "access_token", "accessToken": access_token}
    return json_response(
        {"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": auth}
    )


def auth_check(call: Call) -> Response:
    """Say whether the files may be read, or with `/write` changed."""
    _ = call.writable() if call.arguments.get("write") else call.readable()
    return json_response({})


def info(call: Call) -> Response:
    """Describe a repository at a revision."""
    repo = call.visible()
    commit = call.commit(repo)
    card = _card(call, commit)
    first = repo.id.name
    described: dict[str, Any] = {
        "_id": first,
        "id": first,
        "author": repo.id.namespace,
        "sha": commit.sha,
        "createdAt": _date(repo.created_seconds),
        "lastModified": _date(commit.seconds),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags(card),
        "cardData": card,
        "usedStorage": sum(entry.num_bytes for entry in commit.tree.values()),
        "siblings": [
            _sibling(path, entry, call.request.flag("blobs")) for path, entry in commit.tree.items()
        ],
    }
    if repo.id.kind == "model":
        described["modelId"] = first
        described |= {
            key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card
        }
    wanted = call.request.query.get("expand") or call.request.query.get("expand[]")
    if wanted:
        described = {key: value for key, value in described.items() if key in ("_id", "id", *wanted)}
    return json_response(described)


def listing(call: Call) -> Response:
    """List the models that the user may see, of an author where one is named; with `full` their files."""
    author = call.request.query.get("author", [""])[-1]
    rows = []
    for repo in call.core.store.repos:
        is_seen = not repo.private or call.owns(repo.id.namespace)
        if repo.id.kind == "model" and is_seen and author in ("", repo.id.namespace):
            head = call.core.store.resolve(repo, "main")
            row: dict[str, Any] = {"_id": repo.id.name, "id": repo.id.name, "private": repo.private}
            row |= {"modelId": repo.id.name, "createdAt": _date(repo.created_seconds), "likes": 0}
            if call.request.flag("full"):
                row |= {"sha": head.sha, "lastModified": _date(head.seconds), "gated": repo.gated}
                row["siblings"] = [_sibling(path, entry, blobs=False) for path, entry in head.tree.items()]
            rows.append(row)
    return _page(call, rows, page_size=1000)


def refs(call: Call) -> Response:
    """List branches and tags, and pull requests when asked."""
    repo = call.visible()
    groups = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
    if call.request.flag("include_prs"):
        groups["pullRequests"] = "refs/pr/"
    return json_response({group: _refs_under(repo, prefix) for group, prefix in groups.items()})


def commits(call: Call) -> Response:
    """List a revision's history, newest first."""
    repo = call.visible()
    history = [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": _date(commit.seconds),
        }
        for commit in call.core.store.history(repo, call.commit(repo))
    ]
    return _page(call, history, page_size=50)


def tree(call: Call) -> Response:
    """List a folder, or with `recursive` everything below it."""
    repo = call.visible()
    commit = call.commit(repo)
    folder = call.arguments.get("path", "").strip("/")
    folders = folder_oids(commit.tree)
    if folder not in folders:
        raise _no_entry(folder, commit)
    prefix = f"{folder}/" if folder else ""
    below = sorted(path for path in {*commit.tree, *folders} if path.startswith(prefix) and path != folder)
    if not call.request.flag("recursive"):
        below = [path for path in below if "/" not in path[len(prefix) :]]
    expand = call.request.flag("expand")
    rows = [_row(call, repo, commit, path, folders, expand=expand) for path in below]
    return _page(call, rows, page_size=50 if expand else 1000)


def paths_info(call: Call) -> Response:
    """Describe the named files and folders, passing over those that do not exist."""
    repo = call.visible()
    commit = call.commit(repo)
    if "json" in call.request.headers.get("content-type", ""):
        asked = call.request.body.json()
        paths, expand = asked.get("paths", []), bool(asked.get("expand"))
    else:
        form = parse_qs(b"".join(call.request.body.blocks()).decode())
        paths, expand = form.get("paths", []), form.get("expand", [""])[-1].lower() == "true"
    folders = folder_oids(commit.tree)
    known = [path for path in dict.fromkeys(paths) if path in commit.tree or (path and path in folders)]
    return json_response([_row(call, repo, commit, path, folders, expand=expand) for path in known])


def resolve(call: Call) -> Response:
    """Return a small file, or the way to a large one."""
    repo = call.readable()
    commit = call.commit(repo)
    path = call.arguments["path"]
    entry = commit.tree.get(path)
    if entry is None:
        raise _no_entry(path, commit)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry.etag}"'}
    if not entry.lfs:
        headers["Content-Type"] = "text/plain; charset=utf-8"
        return file_response(call.request, call.core.store.blob_path(entry.sha256), entry.num_bytes, headers)
    stored = f"/_storage/{repo.id.web_path}/{entry.sha256}/{path.rpartition('/')[2]}"
    location = call.core.signer.url("GET", stored, {})
    headers |= {
        "Location": location,
        "X-Linked-Size": str(entry.num_bytes),
        "X-Linked-ETag": f'"{entry.sha256}"',
        "Content-Type": "text/plain; charset=utf-8",
        **_ways_by_xet(call, commit, entry),
    }
    return Response(302, headers, f"Found. Redirecting to {location}".encode())


def stored(call: Call) -> Response:
    """Return an LFS object, on the storage host."""
    call.core.signer.check(call.request)
    sha256 = call.arguments["oid"]
    path = call.core.store.blob_path(sha256)
    headers = {"ETag": f'"{sha256}"', "Content-Type": "application/octet-stream"}
    return file_response(call.request, path, path.stat().st_size, headers)


def _ways_by_xet(call: Call, commit: Commit, entry: Entry) -> dict[str, str]:
    """Return the headers that tell a client how to get a large file by Xet, if it came by Xet."""
    file_hash = call.core.xet.hash_of(entry.sha256)
    if not file_hash:
        return {}
    auth = f"{call.api}/xet-read-token/{commit.sha}"
    plan = f"{call.core.xet_address}/v1/reconstructions/{file_hash}"
    return {
        "X-Xet-Hash": file_hash,
        "Link": f'<{auth}>; rel="xet-auth", <{plan}>; rel="xet-reconstruction-info"',
    }


def _card(call: Call, commit: Commit) -> dict[str, Any]:
    readme = commit.tree.get("README.md")
    if readme is None:
        return {}
    return card_data(call.core.store.blob_path(readme.sha256).read_bytes().decode(errors="replace"))


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    sibling: dict[str, Any] = {"rfilename": path, "size": entry.num_bytes, "blobId": entry.oid}
    if entry.lfs:
        sibling["lfs"] = {**_lfs(entry), "sha256": entry.sha256}
    return sibling


def _lfs(entry: Entry) -> dict[str, Any]:
    return {"size": entry.num_bytes, "pointerSize": len(pointer(entry.sha256, entry.num_bytes))}


def _row(
    call: Call, repo: Repo, commit: Commit, path: str, folders: dict[str, str], *, expand: bool
) -> dict[str, Any]:
    entry = commit.tree.get(path)
    if entry is None:
        row: dict[str, Any] = {"type": "directory", "oid": folders[path], "size": 0, "path": path}
    else:
        row = {"type": "file", "oid": entry.oid, "size": entry.num_bytes, "path": path}
        if entry.lfs:
            row["lfs"] = {**_lfs(entry), "oid": entry.sha256}
            if file_hash := call.core.xet.hash_of(entry.sha256):
                row["xetHash"] = file_hash
    if expand:
        last = call.core.store.last_change(repo, commit, path)
        row["lastCommit"] = {"id": last.sha, "title": last.title, "date": _date(last.seconds)}
    return row


def _refs_under(repo: Repo, prefix: str) -> list[dict[str, str]]:
    cut = "refs/" if prefix == "refs/pr/" else prefix
    names = sorted(name for name in repo.refs if name.startswith(prefix))
    return [{"name": name.removeprefix(cut), "ref": name, "targetCommit": repo.refs[name]} for name in names]


def _page(call: Call, rows: Sequence[object], *, page_size: int) -> Response:
    """Return one page of a listing, with a link to the next."""
    query = {name: values[-1] for name, values in call.request.query.items()}
    start = int(query.get("cursor", "0"))
    page_size = min(page_size, int(query.get("limit", page_size)))
    headers = {}
    if start + page_size < len(rows):
        next_query = urlencode({**query, "cursor": start + page_size})
        headers["Link"] = f'<http://{call.request.host}{call.request.target}?{next_query}>; rel="next"'
    return json_response(rows[start : start + page_size], headers=headers)


def _no_entry(path: str, commit: Commit) -> RefusalError:
    # Clients remember by this commit that the file does not exist.
    return RefusalError(
        404, f"Entry not found: {path}", code="EntryNotFound", headers={"X-Repo-Commit": commit.sha}
    )


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
