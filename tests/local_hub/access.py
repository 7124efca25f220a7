"""Who may do what: tokens, private and gated repositories, signed URLs and tokens of the storage host."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlencode

from tests.local_hub.objects import Commit, Kind, Repo, RepoId
from tests.local_hub.store import Store
from tests.local_hub.wire import RefusalError, Request, Response
from tests.local_hub.xetstore import XetStore

_KINDS: dict[str, Kind] = {"datasets": "dataset", "dataset": "dataset", "spaces": "space", "space": "space"}
ADMIN = "me"
"""The user who is a member of every organisation."""


@dataclass(frozen=True)
class Signer:
    """Makes URLs of the storage host that need no token, and its tokens, and tells whether one may be used.

    Attributes:
        base: Where the storage host answers; not the Hub's own host, so that clients send it no token.
    """

    base: str
    secret: bytes
    clock: Callable[[], float]
    lifetime_seconds: float | int

    def url(self, method: str, path: str, parameters: Mapping[str, str]) -> str:
        """Sign a URL for one method, path (not encoded) and set of parameters."""
        return f"{self.base}{quote(path)}?{self._signed(method, path, parameters)}"

    def check(self, request: Request) -> None:
        """Raise `StorageRefusalError` unless the request is what was signed, and still in time."""
        if "authorization" in request.headers:
            raise StorageRefusalError(400, "InvalidArgument", "Only one auth mechanism allowed")
        method = "GET" if request.method == "HEAD" else request.method
        signed = {name: values[-1] for name, values in request.query.items()}
        if not self._is_genuine(method, request.path, signed):
            raise StorageRefusalError(
                403, "SignatureDoesNotMatch", "The signature does not match the request"
            )
        if self._is_late(signed):
            raise StorageRefusalError(403, "AccessDenied", "Request has expired")

    def token(self, claims: Mapping[str, str]) -> tuple[str, int]:
        """Sign a token that holds `claims`; return it and the second at which it ends."""
        token = self._signed("TOKEN", "", claims)
        return token, int(dict(parse_qsl(token))["expires"])

    def claims(self, token: str) -> Mapping[str, str]:
        """Return what a token holds.

        Raises:
            RefusalError: 401, if it was not signed here, or its time is over.
        """
        signed = dict(parse_qsl(token))
        if not self._is_genuine("TOKEN", "", signed):
            raise RefusalError(401, "Invalid access token")
        if self._is_late(signed):
            raise RefusalError(401, "The access token has expired")
        return signed

    def _signed(self, method: str, path: str, parameters: Mapping[str, str]) -> str:
        signed = {**parameters, "expires": str(int(self.clock() + self.lifetime_seconds))}
        return urlencode({**signed, "signature": self._signature(method, path, signed)})

    def _is_genuine(self, method: str, path: str, signed: Mapping[str, str]) -> bool:
        parameters = {name: value for name, value in signed.items() if name != "signature"}
        expected = self._signature(method, path, parameters)
        return hmac.compare_digest(signed.get("signature", ""), expected)

    def _is_late(self, signed: Mapping[str, str]) -> bool:
        return self.clock() >= int(signed["expires"])

    def _signature(self, method: str, path: str, parameters: Mapping[str, str]) -> str:
        text = "\n".join([method, path, *(f"{name}={value}" for name, value in sorted(parameters.items()))])
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()


class StorageRefusalError(RefusalError):
    """The storage host says no, in XML as such hosts do."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, message)
        self.storage_code = code

    def response(self) -> Response:
        fields = f"<Code>{self.storage_code}</Code><Message>{self.what}</Message>"
        text = f"<?xml version='1.0'?><Error>{fields}</Error>"
        return Response(self.status, {"Content-Type": "application/xml"}, text.encode())


@dataclass(frozen=True)
class Core:
    """What every request needs."""

    store: Store
    xet: XetStore
    signer: Signer
    users: Mapping[str, str]
    """From tokens to names; grows when a user is added."""
    orgs: tuple[str, ...] = ()
    """Organisations of `ADMIN`, beside the namespaces that hold repositories already."""

    @property
    def xet_address(self) -> str:
        """Where Xet is spoken; clients remember under it what they sent, so each store has another."""
        return f"{self.signer.base}/_xet/{self.xet.name}"


@dataclass(frozen=True)
class Call:
    """One request, matched to an endpoint; `arguments` are the parts of its path, not encoded."""

    core: Core
    request: Request
    arguments: Mapping[str, str]

    @property
    def user(self) -> str:
        """Who asks; empty for nobody.

        Raises:
            RefusalError: 401, if the token is not one of ours.
        """
        token = self.request.bearer
        if token and token not in self.core.users:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.core.users[token] if token else ""

    def require_user(self) -> str:
        """Return who asks.

        Raises:
            RefusalError: 401, if nobody does.
        """
        if not self.user:
            raise RefusalError(401, "Invalid username or password.")
        return self.user

    @property
    def repo_id(self) -> RepoId:
        return RepoId(_KINDS.get(self.arguments["kind"].rstrip("/"), "model"), self.arguments["name"])

    @property
    def page(self) -> str:
        """Address of the repository's page, on the host that the client used."""
        return f"http://{self.request.host}/{self.repo_id.web_path}"

    @property
    def api(self) -> str:
        """Address of what programs ask about the repository, on the host that the client used."""
        return f"http://{self.request.host}/api/{self.repo_id.kind}s/{self.repo_id.name}"

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Where the user may write: under their own name, and in organisations; sorted."""
        shared = {*self.core.orgs, *self.core.store.namespaces} if self.user == ADMIN else set()
        return tuple(sorted(shared | {self.user})) if self.user else ()

    def owns(self, namespace: str) -> bool:
        """Say whether the user may write in a namespace."""
        return namespace in self.namespaces

    def visible(self) -> Repo:
        """Return the repository, for its metadata.

        Raises:
            RefusalError: As the Hub does for repositories that are missing or private: 401 or 404.
        """
        repo = self.core.store.find(self.repo_id)
        if repo is None or (repo.private and not self.owns(repo.id.namespace)):
            status = 404 if self.user else 401
            raise RefusalError(status, "Repository not found", code="RepoNotFound")
        return repo

    def readable(self) -> Repo:
        """Return the repository, for its files.

        Raises:
            RefusalError: Also 401 or 403 for gated repositories.
        """
        repo = self.visible()
        if repo.gated and not self.owns(repo.id.namespace):
            restricted = f"Access to {repo.id.kind} {repo.id.name} is restricted"
            if not self.user:
                raise RefusalError(401, f"{restricted}. Please log in.", code="GatedRepo")
            raise RefusalError(403, f"{restricted} and you are not in the authorized list.", code="GatedRepo")
        return repo

    def writable(self) -> Repo:
        """Return the repository, for changes.

        Raises:
            RefusalError: Also 401 for nobody and 403 for users of another namespace.
        """
        repo = self.visible()
        self.require_user()
        if not self.owns(repo.id.namespace):
            raise RefusalError(
                403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            )
        return repo

    def proposable(self) -> Repo:
        """Return the repository for a change that may be a pull request, which any user may open."""
        if not self.request.flag("create_pr"):
            return self.writable()
        self.require_user()
        return self.readable()

    def xet_repo(self, scope: str) -> Repo:
        """Return the repository that the request's token for Xet is for.

        Raises:
            RefusalError: 401 or 403, if the token does not allow what `scope` names.
        """
        claims = self.core.signer.claims(self.request.bearer)
        if scope == "write" and claims["scope"] != "write":
            raise RefusalError(403, "The access token is for reading only")
        return self.core.store.repo(RepoId(_KINDS.get(claims["kind"], "model"), claims["name"]))

    def commit(self, repo: Repo) -> Commit:
        """Return the commit that the path names; main when it names none."""
        return self.core.store.resolve(repo, self.arguments.get("revision") or "main")
