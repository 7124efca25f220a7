"""The endpoint of Xet that says from which bytes of which xorbs a file is put together.

Source: Xet protocol specification 1.1, "Download protocol".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.local_hub.access import Call
from tests.local_hub.objects import Repo
from tests.local_hub.shards import Term, XetFile
from tests.local_hub.wire import RefusalError, Response, bounds, json_response


@dataclass(frozen=True)
class _Fetch:
    """A stretch of chunks of one xorb, its bytes (the last one included), and a signed URL for them."""

    chunks: tuple[int, int]
    taken: tuple[int, int]
    url: str

    def first_form(self) -> object:
        return {"range": _span(*self.chunks), "url": self.url, "url_range": _span(*self.taken)}

    def second_form(self) -> object:
        return {"url": self.url, "ranges": [{"chunks": _span(*self.chunks), "bytes": _span(*self.taken)}]}


_FORMS = {"v1": ("fetch_info", _Fetch.first_form), "v2": ("xorbs", _Fetch.second_form)}


def plan(call: Call) -> Response:
    """Return the terms of a file, or of one range of it, and where the chunks of each xorb are."""
    repo = call.xet_repo("read")
    file = _file(call, repo)
    start, stop = bounds(call.request.range, file.num_bytes) or (0, file.num_bytes)
    if start >= file.num_bytes:
        raise RefusalError(416, "The file ends before this range")
    skipped, terms = _terms_of(file, start, stop)
    part, written = _FORMS[call.arguments["version"]]
    places = {
        xorb: [written(fetch) for fetch in _fetches(call, repo, xorb, terms)]
        for xorb in sorted({term.xorb for term in terms})
    }
    rows = [
        {"hash": term.xorb, "unpacked_length": term.num_bytes, "range": _span(term.start, term.stop)}
        for term in terms
    ]
    return json_response({"offset_into_first_range": start - skipped, "terms": rows, part: places})


def _file(call: Call, repo: Repo) -> XetFile:
    file = call.core.xet.file(call.arguments["hash"])
    if file is None or file.sha256 not in repo.uploads:
        raise RefusalError(404, "There is no such file")
    return file


def _terms_of(file: XetFile, start: int, stop: int) -> tuple[int, list[Term]]:
    """Return the terms that hold bytes from `start` up to `stop`, and the bytes before the first."""
    position, skipped, found = 0, 0, []
    for term in file.terms:
        if position + term.num_bytes <= start:
            skipped = position + term.num_bytes
        elif position < stop:
            found.append(term)
        position += term.num_bytes
    return skipped, found


def _fetches(call: Call, repo: Repo, xorb: str, terms: Iterable[Term]) -> list[_Fetch]:
    chunks = call.core.xet.layout(xorb)
    path = f"/_storage/{repo.id.web_path}/{call.core.xet.xorb_sha256(xorb)}/xorb"
    url = call.core.signer.url("GET", path, {})
    return [
        _Fetch((start, stop), (chunks[start].header_start, chunks[stop - 1].stop - 1), url)
        for start, stop in _stretches((term.start, term.stop) for term in terms if term.xorb == xorb)
    ]


def _stretches(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch or overlap, so that no byte is fetched twice."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _span(start: int, end: int) -> dict[str, int]:
    return {"start": start, "end": end}
