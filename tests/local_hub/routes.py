"""Which request goes to which endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from tests.local_hub import pages, plans, reading, writing, xet
from tests.local_hub.access import Call, Core
from tests.local_hub.wire import RefusalError, Request, Response

_REPO = r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*?)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_WEB = rf"/(?P<kind>datasets/|spaces/)?{_REPO}"
_STORED = r"/_storage/(?P<kind>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/[^/]+"
_XET = r"/_xet/[0-9a-f]+"
_HASH = r"(?P<hash>[0-9a-f]{64})"
_REVISION = r"(?P<revision>[^/]+)"
# Signed URLs, and tokens that are signed in the same way, stand for themselves.
_OTHER_CREDENTIALS = ("/_storage/", "/_xet/")


@dataclass(frozen=True)
class Route:
    """One endpoint; `name` is what the log and the counts call it."""

    method: str
    pattern: re.Pattern[str]
    name: str
    endpoint: Callable[[Call], Response]


def _route(method: str, pattern: str, name: str, endpoint: Callable[[Call], Response]) -> Route:
    return Route(method, re.compile(pattern), name, endpoint)


ROUTES = (
    _route("GET", _STORED, "storage", reading.stored),
    _route("PUT", _STORED, "storage", writing.store_object),
    _route("PUT", rf"/_storage/_xorbs/{_HASH}", "storage", xet.store_xorb),
    _route("GET", rf"{_XET}/(?P<version>v[12])/reconstructions/{_HASH}", "xet-reconstruction", plans.plan),
    _route("GET", rf"{_XET}/v1/chunks/[^/]+/{_HASH}", "xet-chunk", xet.chunk),
    _route("POST", rf"{_XET}/v1/xorb-grants/default/{_HASH}", "xet-grant", xet.grant),
    _route("POST", rf"{_XET}/v1/xorb-commits/default/{_HASH}/grant/[^/]+", "xet-commit", xet.commit_xorb),
    _route("POST", rf"{_XET}/v1/xorbs/default/{_HASH}", "xet-xorb", xet.receive_xorb),
    _route("POST", rf"{_XET}/(?P<version>v[12])/shards", "xet-shard", xet.receive_shard),
    _route("GET", rf"{_WEB}/resolve/{_REVISION}/(?P<path>.+)", "resolve", reading.resolve),
    _route("POST", rf"{_WEB}\.git/info/lfs/objects/batch", "lfs-batch", writing.lfs_batch),
    _route("POST", rf"{_WEB}\.git/info/lfs/objects/verify", "lfs-verify", writing.verify_object),
    _route("GET", r"/api/whoami-v2", "whoami", reading.whoami),
    _route("POST", r"/api/validate-yaml", "validate-yaml", writing.validate_yaml),
    _route("POST", r"/api/repos/create", "create-repo", writing.create_repo),
    _route("DELETE", r"/api/repos/delete", "delete-repo", writing.delete_repo),
    _route("GET", r"/api/models", "list", reading.listing),
    _route("GET", _API, "info", reading.info),
    _route("GET", rf"{_API}/revision/{_REVISION}", "info", reading.info),
    _route("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", "tree", reading.tree),
    _route("POST", rf"{_API}/paths-info/{_REVISION}", "paths-info", reading.paths_info),
    _route("GET", rf"{_API}/refs", "refs", reading.refs),
    _route("GET", rf"{_API}/commits/{_REVISION}", "commits", reading.commits),
    _route("GET", rf"{_API}/auth-check(?P<write>/write)?", "auth-check", reading.auth_check),
    _route("GET", rf"{_API}/xet-(?P<scope>read|write)-token/{_REVISION}", "xet-token", xet.token),
    _route("PUT", rf"{_API}/settings", "settings", writing.settings),
    _route("POST", rf"{_API}/branch/(?P<ref>[^/]+)", "branch", writing.create_branch),
    _route("DELETE", rf"{_API}/branch/(?P<ref>[^/]+)", "branch", writing.delete_branch),
    _route("POST", rf"{_API}/tag/{_REVISION}", "tag", writing.create_tag),
    _route("DELETE", rf"{_API}/tag/{_REVISION}", "tag", writing.delete_tag),
    _route("POST", rf"{_API}/preupload/{_REVISION}", "preupload", writing.preupload),
    _route("POST", rf"{_API}/commit/{_REVISION}", "commit", writing.commit),
    _route("GET", "/", "page", pages.root),
    _route("GET", rf"(?!/(?:api|_)){_WEB}(?:/(?:tree|commit)/{_REVISION})?", "page", pages.repository),
)


def route_name(request: Request) -> str:
    """Return the name of the endpoint that a request is for; empty for none."""
    found = _find(request)
    return found[0].name if found else ""


def answer(core: Core, request: Request) -> Response:
    """Carry out a request; a refusal is an answer too."""
    found = _find(request)
    try:
        if found is None:
            raise RefusalError(404, "Sorry, we can't find the page you are looking for.")
        route, match = found
        # A repository keeps the slashes of its path; an encoded slash belongs to its part.
        arguments = {key: unquote(value) for key, value in match.groupdict(default="").items()}
        call = Call(core, request, arguments)
        if not request.target.startswith(_OTHER_CREDENTIALS):
            _ = call.user  # A wrong token is refused everywhere, as by the Hub.
        return route.endpoint(call)
    except RefusalError as refusal:
        return refusal.response()


def _find(request: Request) -> tuple[Route, re.Match[str]] | None:
    method = "GET" if request.method == "HEAD" else request.method
    for route in ROUTES:
        if route.method == method and (match := route.pattern.fullmatch(request.target)):
            return route, match
    return None
