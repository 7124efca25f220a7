"""Pages for a browser: the repositories, and of each its files and its card."""

from __future__ import annotations

from html import escape

from hub_magmax.text import format_bytes
from tests.local_hub.access import Call
from tests.local_hub.rendering import POLICY, STYLE, rendered
from tests.local_hub.wire import Response

CARD = "README.md"


def root(call: Call) -> Response:
    """List the repositories that everybody may see."""
    shown = [repo.id.web_path for repo in call.core.store.repos if not repo.private]
    links = "".join(f'<li><a href="/{escape(path)}">{escape(path)}</a></li>' for path in shown)
    return _page("Local Hub", f"<ul>{links}</ul>" if links else "<p>No public repository yet.</p>")


def repository(call: Call) -> Response:
    """Show the files of a repository at a revision, and its card."""
    repo = call.readable()
    commit = call.commit(repo)
    start = f"/{escape(repo.id.web_path)}/resolve/{commit.sha}"
    files = "".join(
        f'<li><a href="{escape(f"{start}/{path}")}">{escape(path)}</a>, {format_bytes(entry.num_bytes)}</li>'
        for path, entry in sorted(commit.tree.items())
    )
    card = ""
    if CARD in commit.tree:
        text = call.core.store.blob_path(commit.tree[CARD].sha256).read_text(errors="replace")
        card = rendered(text, start)
    return _page(repo.id.web_path, f"<p>{commit.sha}: {escape(commit.title)}</p><ul>{files}</ul>{card}")


def _page(title: str, body: str) -> Response:
    head = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": POLICY}
    return Response(200, headers, f"{head}<h1>{escape(title)}</h1>{body}\n".encode())
