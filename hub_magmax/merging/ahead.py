"""Calls that run ahead of whoever takes their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

from hub_magmax.merging.profile import Clock

T = TypeVar("T")


#: Calls that run or wait ahead.
_DEPTH = 3


def ahead(executor: Executor, calls: Iterable[Callable[[], T]], clock: Clock | None = None) -> Iterator[T]:
    """Yield the results of `calls` in order, with a few of them running or waiting ahead."""
    clock = clock or Clock()
    pending: deque[Future[T]] = deque()

    def first() -> T:
        with clock.spend("wait"):
            return pending.popleft().result()

    for call in calls:
        pending.append(executor.submit(call))
        if len(pending) > _DEPTH:
            yield first()
    while pending:
        yield first()
