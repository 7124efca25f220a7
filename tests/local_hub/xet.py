"""The endpoints of Xet that give tokens and take uploads; they are under `/_xet` on the storage host.

The bytes of xorbs travel by signed URLs under `/_storage`, like every other content. A client first asks for
a grant, which is such a URL, and falls back to sending the xorb with its token. Not served: the hashes of a
file's changed chunks (`file-chunk-hashes`, to edit it in place), and plans of several files at once.

Source: Xet protocol specification 1.1; for grants, what hf_xet 1.8 asks.
"""

from __future__ import annotations

import uuid

from tests.local_hub.access import Call, StorageRefusalError
from tests.local_hub.shards import describe
from tests.local_hub.wire import RefusalError, Response, json_response

_KNOWN_FOR_SECONDS = 7 * 24 * 3600


def token(call: Call) -> Response:
    """Return a token for Xet, with the scope that the path names, and the address where it is good."""
    scope = call.arguments["scope"]
    repo = call.readable() if scope == "read" else call.proposable()
    if not call.request.flag("create_pr"):
        call.commit(repo)
    signed, expires = call.core.signer.token({"scope": scope, "kind": repo.id.kind, "name": repo.id.name})
    headers = {
        "X-Xet-Cas-Url": call.core.xet_address,
        "X-Xet-Access-Token": signed,
        "X-Xet-Token-Expiration": str(expires),
    }
    body = {"casUrl": call.core.xet_address, "accessToken": signed, "exp": expires}
    return json_response(body, headers=headers)


def chunk(call: Call) -> Response:
    """Describe a xorb that holds a chunk, so that the client refers to it and does not send it again."""
    call.xet_repo("read")
    xorb = call.core.xet.holder_of(call.arguments["hash"])
    if xorb is None:
        raise RefusalError(404, "There is no such chunk")
    now = int(call.core.signer.clock())
    shard = describe(xorb, made_seconds=now, expires_seconds=now + _KNOWN_FOR_SECONDS)
    return Response(200, {"Content-Type": "application/octet-stream"}, shard)


def grant(call: Call) -> Response:
    """Say where to send a xorb; nowhere if it is here."""
    call.xet_repo("write")
    xorb, asked = call.arguments["hash"], call.request.body.json()
    if call.core.xet.has_xorb(xorb):
        return json_response({"was_inserted": False})
    url = call.core.signer.url("PUT", f"/_storage/_xorbs/{xorb}", {"size": str(asked["length"])})
    return json_response({"id": uuid.uuid4().hex, "method": "PUT", "url": url, "headers": {}}, status=201)


def store_xorb(call: Call) -> Response:
    """Take a xorb, on the storage host; keep it only if it has the announced size, and is one."""
    call.core.signer.check(call.request)
    content = b"".join(call.request.body.blocks())
    if len(content) != int(call.request.query["size"][-1]):
        raise StorageRefusalError(400, "IncompleteBody", "The number of bytes is not the one announced")
    call.core.xet.keep_xorb(call.arguments["hash"], [content])
    return Response(200)


def commit_xorb(call: Call) -> Response:
    """Say whether a xorb has arrived."""
    call.xet_repo("write")
    if not call.core.xet.has_xorb(call.arguments["hash"]):
        raise RefusalError(404, "Nothing was sent for this grant")
    return json_response({"was_inserted": True})


def receive_xorb(call: Call) -> Response:
    """Take a xorb that is sent with a token."""
    call.xet_repo("write")
    known = call.core.xet.has_xorb(call.arguments["hash"])
    call.core.xet.keep_xorb(call.arguments["hash"], call.request.body.blocks())
    return json_response({"was_inserted": not known})


def receive_shard(call: Call) -> Response:
    """Put the files of a shard together; from now on the token's repository may commit them."""
    repo = call.xet_repo("write")
    for file in call.core.xet.register(b"".join(call.request.body.blocks())):
        call.core.store.add_upload(repo.id, file.sha256)
    if call.arguments["version"] == "v1":
        return json_response({"result": 1})
    # The second form reports progress in lines, and ends with this one.
    return Response(200, {"Content-Type": "application/x-ndjson"}, b'{"type": "result"}\n')
