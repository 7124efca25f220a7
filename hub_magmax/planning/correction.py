"""Correction of the merged model's representation, as plans, reports and cards tell it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hub_magmax.recipe.lockfile import Lock
from hub_magmax.text import shown


def correction_row(lock: Lock) -> str:
    """Return in words what is corrected and how; empty without a correction."""
    found = lock.correction
    return f"{found['name']}, ridge {found['ridge']:g}, in {shown(found['tensor'])}" if found else ""


def described_correction(lock: Lock) -> dict[str, Any] | None:
    """Return name, options and tensor, for programs; None without a correction."""
    return dict(lock.correction) or None


def correction_notices(lock: Lock) -> Iterator[str]:
    """Yield that the head is no longer that of the merge."""
    if found := lock.correction:
        yield (
            f"{shown(found['tensor'])} is the merged one times a matrix that {found['name']} made for this "
            "merge and preference: it fits no other model's body"
        )
