"""Sentences about tensors that a source calls otherwise than the merged model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.renaming import LockedJoint, Renaming, collapsed
from hub_magmax.text import listed

#: Changes of names that are shown.
_MOST_SHOWN = 3


def renaming_notices(lock: Lock, names: Iterable[str]) -> tuple[str, ...]:
    """Return a line for every source whose tensors have other names than those of the merged model.

    Args:
        lock: Holds the renamings.
        names: Of the base model's tensors, without wrappers.
    """
    renamed = {task: source.renamed for task, source in lock.sources.items() if source.renamed}
    counts = Counter(collapsed(name)[0] for name in names) if renamed else Counter()
    return tuple(_notice(task, renaming, counts) for task, renaming in renamed.items())


def _notice(task: str, renaming: Renaming, counts: Counter[str]) -> str:
    changes: Counter[str] = Counter()
    for own, base in renaming.names:
        changes[change(own, base)] += counts.get(base, 1)
    shown = [text for text, _ in changes.most_common()]
    joints = [_joint(joint) for joint in renaming.joints]
    num_tensors = f", {changes.total():,} tensors" if changes else ""
    return f"{task}: its tensors are called {listed(shown + joints, _MOST_SHOWN)}{num_tensors}"


def change(own: str, base: str) -> str:
    """Return how one name differs from another: `` `_orig_mod.X` for `X` ``."""
    mine, theirs = own.split("."), base.split(".")
    least = min(len(mine), len(theirs))
    behind = next((n for n in range(least) if mine[-1 - n] != theirs[-1 - n]), least)
    before = next((n for n in range(least - behind) if mine[n] != theirs[n]), least - behind)
    if not behind:
        return f"`{_shown(mine[before:], start='X.')}` for `{_shown(theirs[before:], start='X.')}`"
    start, end = ("X.", ".Y") if before else ("", ".X")
    cuts = (segments[before : len(segments) - behind] for segments in (mine, theirs))
    one, other = (f"{start}{'.'.join(cut)}{end}" if cut else f"{start}{end[1:]}" for cut in cuts)
    return f"`{one}` for `{other}`"


def _shown(segments: list[str], start: str) -> str:
    return start + ".".join(segments)


def _joint(joint: LockedJoint) -> str:
    parts = listed([f"`{part}`" for part in joint.parts])
    return f"`{joint.whole}` for {parts}" if joint.is_own else f"{parts} for `{joint.whole}`"
