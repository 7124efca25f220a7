"""Model that a push replaces: by which values of its lock it was merged otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from hub_magmax.checkpoints.pinning import stored_lock
from hub_magmax.checkpoints.storage.hub import open_hub
from hub_magmax.errors import LockError
from hub_magmax.methods import get_method
from hub_magmax.publishing.commits import Destination, Head
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock
from hub_magmax.text import weight_in_words


def replaced_model(head: Head, destination: Destination, lock: Lock, elsewhere: str) -> str:
    """Return in a sentence that the model on a branch is another one than a push brings; empty if it is not.

    Args:
        head: The branch as it is now.
        destination: Its repository.
        lock: Of the model that is pushed.
        elsewhere: How to name another repository, in words.

    Raises:
        SourceError: If the Hub does not answer.
    """
    if not head.holds_model:
        return ""
    keep = f"to keep it, name another repository with {elsewhere}"
    if LOCK_NAME not in head.files:
        return f"it was not merged by hub_magmax: {keep}"
    try:
        with closing(open_hub(destination.repo_id, head.commit)) as source:
            there = stored_lock(source)
    except LockError:
        return f"what it was merged from is not known, since its {LOCK_NAME} cannot be read: {keep}"
    differ = [*_differences(there, lock)]
    return f"it was merged otherwise ({'; '.join(differ)}): {keep}" if differ else ""


def _differences(there: Lock, here: Lock) -> Iterator[str]:
    """Yield what differs between two locks, that of the published model first, in words."""
    if _sources(there) != _sources(here):
        yield "other checkpoints"
    for name, value_of in {"method": _method, "preference": _weights}.items():
        before, now = value_of(there), value_of(here)
        if before != now:
            yield f"{name} {before}, and now {now}"
    if _method(there) == _method(here):
        yield from _options_and_seed(there, here)
    if there.tensors != here.tensors:
        yield "other rules for tensors"


def _options_and_seed(there: Lock, here: Lock) -> Iterator[str]:
    """Yield what differs in the merge by one method; a seed decides nothing where it does not draw."""
    if dict(there.method) != dict(here.method):
        yield "other options of the method"
    if there.seed != here.seed and "generator" in get_method(here.method["name"]).supplied:
        yield f"seed {there.seed}, and now {here.seed}"


def _sources(lock: Lock) -> dict[str, str]:
    return {name: source.label for name, source in lock.every_source.items()}


def _method(lock: Lock) -> str:
    return f"{lock.method['name']}, scaling {lock.method['scaling']:g}"


def _weights(lock: Lock) -> str:
    return ", ".join(f"{name} {weight_in_words(weight)}" for name, weight in lock.preference.weights.items())
