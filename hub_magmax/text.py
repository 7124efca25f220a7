"""What must not reach a reader with a text: access tokens, and characters that act on a terminal."""

from __future__ import annotations

import os
import re
import unicodedata

_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|hf_oauth|api_org)_[A-Za-z0-9]{20,}")
_CREDENTIALS = re.compile(r"(https?://)[^/@\s]+@", re.IGNORECASE)

#: Variables whose value is a token, whatever it looks like.
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

#: A shorter value is a word of its own that means nothing, and may stand anywhere.
_SHORTEST_TOKEN = 8


def holds_token(text: str) -> bool:
    """Say whether `text` holds what looks like an access token, or an address with a password."""
    return bool(_TOKEN.search(text) or _CREDENTIALS.search(text))


def without_tokens(text: str) -> str:
    """Return `text` without what looks like an access token, and without passwords in addresses."""
    return _TOKEN.sub(r"\1_…", _CREDENTIALS.sub(r"\1", text))


def without_secrets(text: str) -> str:
    """Return `without_tokens(text)`, and without the token in use, whatever it looks like."""
    for name in TOKEN_VARIABLES:
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST_TOKEN:
            text = text.replace(token, "hf_…")
    return without_tokens(text)


def holds_control(text: str) -> bool:
    """Say whether `text` holds control characters, line breaks too, or bytes that are not text."""
    return any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


def spelled_out(text: str) -> str:
    """Return `text` in one line: as `printable`, with line breaks spelled out too."""
    return printable(text).replace("\n", "\\u000a")


def printable(text: str) -> str:
    """Return `text` with control characters spelled out, and characters that turn the writing direction.

    Line breaks stay.
    """
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{ord(c):04x}"
        for c in text
    )
