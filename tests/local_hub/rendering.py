"""A card as a page shows it: CommonMark with tables; of its HTML only a few tags without attributes.

Others write cards, so nothing of them may run: any other HTML is shown as text, addresses are checked by
markdown-it, and `POLICY` forbids scripts, frames and whatever is not on this server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any
from urllib.parse import urlsplit

#: Value of the header Content-Security-Policy; large pictures come from the storage, at another name.
POLICY = (
    "default-src 'none'; img-src 'self' http://localhost:*; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)

STYLE = (
    "body{max-width:60rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 sans-serif;color-scheme:light dark}"
    "img{max-width:100%}table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{border:1px solid #8886;padding:.2rem .6rem}pre{overflow-x:auto;background:#8882;padding:.6rem}"
)

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.S)
_ALLOWED = re.compile(r"</?(?:details|summary|br|sub|sup)>")
_COMMENT = re.compile(r"<!--.*?-->", re.S)


def rendered(card: str, files: str) -> str:
    """Return a card as HTML.

    Args:
        card: Text of a README.md.
        files: Address below which the repository's files are, without a slash at the end.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:  # it comes with the extra `test`
        return f"<pre>{escape(card)}</pre>"
    head = _FRONT_MATTER.match(card)
    text = card[head.end() :] if head else card
    reader = MarkdownIt("commonmark").enable("table")
    for rule in ("html_block", "html_inline"):
        reader.add_render_rule(rule, _html)
    tokens = reader.parse(text)
    for token in _all(tokens):
        for name in ("src", "href"):
            if (address := token.attrGet(name)) is not None and _is_relative(str(address)):
                token.attrSet(name, f"{files}/{address}")
    shown = reader.renderer.render(tokens, reader.options, {})
    facts = f"<details><summary>front matter</summary><pre>{escape(head[1])}</pre></details>" if head else ""
    return f"{facts}<article>{shown}</article>"


def _html(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """Return HTML in a card as text, but for harmless tags; comments are left out."""
    text = _COMMENT.sub("", tokens[index].content)
    between = _ALLOWED.split(text)
    tags = [*_ALLOWED.findall(text), ""]
    return "".join(escape(part) + tag for part, tag in zip(between, tags, strict=True))


def _all(tokens: Any) -> Iterator[Any]:
    for token in tokens:
        yield token
        yield from _all(token.children or ())


def _is_relative(address: str) -> bool:
    parts = urlsplit(address)
    return not (parts.scheme or parts.netloc) and not address.startswith(("#", "/"))
