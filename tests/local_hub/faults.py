"""Faults to order: what goes wrong, for which requests, how often.

Whether a rule strikes depends on its seed, the request's method, path and range, and how often that
very request came before, so that threads that overtake each other cannot change the outcome.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from hub_magmax.errors import HubMagmaxError
from tests.local_hub.wire import Request, Response

FaultKind = Literal[
    "status",  # answer with `status` and do nothing
    "expired",  # the storage host says that the signed URL has expired
    "latency",  # wait `seconds` before doing anything
    "bandwidth",  # send and receive `bytes_per_second`
    "ignore_range",  # answer 200 with the whole file
    "lose_response",  # do what was asked, then close the connection without an answer
    "reset_upload",  # reset the connection after `after_bytes` of the request's body
    "reset",  # reset the connection after `after_bytes` of the response's body
    "truncate",  # close it cleanly after `after_bytes`, though more were announced
    "short",  # announce and send `after_bytes` only
    "corrupt",  # flip every bit of the byte at `after_bytes`
]
Match = str | Callable[[Request], bool]

# These wait until it is known that there is a body to spoil.
_OF_RESPONSES: tuple[FaultKind, ...] = ("reset", "truncate", "short", "corrupt")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong with one exchange."""

    kind: FaultKind
    status: int = 503
    error_code: str = ""
    retry_after_seconds: int | None = None
    after_bytes: int | None = None
    seconds: float | int = 0
    bytes_per_second: float | int = 0
    fraction: float = 0.0
    """Drawn; places the fault in a body when `after_bytes` is None."""

    def position(self, num_bytes: int) -> int:
        """Return the place in a body of `num_bytes` where the fault strikes, before its end."""
        wanted = int(self.fraction * num_bytes) if self.after_bytes is None else self.after_bytes
        return max(0, min(wanted, num_bytes - 1))


@dataclass
class _Rule:
    match: Match
    method: str | None
    fault: Fault
    times: int | None
    probability: float | int
    seed: int
    num_struck: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def fits(self, request: Request) -> bool:
        if self.method is not None and request.method != self.method:
            return False
        if isinstance(self.match, str):
            return fnmatchcase(request.path, self.match)
        return self.match(request)

    def strike(self, request: Request) -> Fault | None:
        if self.times is not None and self.num_struck >= self.times:
            return None
        key = f"{request.method} {request.path} {request.range}"
        generator = random.Random(f"{self.seed} {key} {self.seen[key]}")
        self.seen[key] += 1
        if generator.random() >= self.probability:
            return None
        self.num_struck += 1
        return replace(self.fault, fraction=generator.random())


class Faults:
    """The rules of one local Hub; none to begin with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []

    def add(
        self,
        match: Match,
        kind: FaultKind,
        *,
        method: str | None = None,
        times: int | None = None,
        probability: float | int = 1,
        seed: int = 0,
        status: int = 503,
        error_code: str = "",
        retry_after_seconds: int | None = None,
        after_bytes: int | None = None,
        seconds: float | int = 0,
        bytes_per_second: float | int = 0,
    ) -> None:
        """Let requests fail from now on.

        Args:
            match: Pattern for the whole path (`*` also crosses `/`), such as `*/resolve/*.safetensors`,
                `/_storage/*` or `/_xet/*/shards`, or a function of the request.
            kind: What goes wrong; see `FaultKind`. Kinds that spoil a response's body wait for an answer
                of 200 or 206 that has one.
            method: Only requests of this method.
            times: Strike so often, then never again; None for always.
            probability: Chance of each request to be struck.
            seed: Of the draws.
            status: For `status`.
            error_code: For `status`: the `X-Error-Code`, such as `GatedRepo`.
            retry_after_seconds: For `status`: the `Retry-After`.
            after_bytes: Where in a body; None draws a place.
            seconds: For `latency`.
            bytes_per_second: For `bandwidth`.

        Raises:
            HubMagmaxError: If the kind is unknown, or lacks what it needs.
        """
        if kind not in get_args(FaultKind):
            raise HubMagmaxError(
                f"there is no fault '{kind}'", expected=f"one of {', '.join(get_args(FaultKind))}"
            )
        if kind == "bandwidth" and bytes_per_second <= 0:
            raise HubMagmaxError("a bandwidth of zero would never end", expected="bytes_per_second above 0")
        fault = Fault(kind, status, error_code, retry_after_seconds, after_bytes, seconds, bytes_per_second)
        with self._lock:
            self._rules.append(_Rule(match, method, fault, times, probability, seed))

    def clear(self) -> None:
        """Let everything work again."""
        with self._lock:
            self._rules.clear()

    def before(self, request: Request) -> tuple[Fault, ...]:
        """Return what strikes a request before it is carried out, in the order of the rules."""
        return self._draw(request, lambda kind: kind not in _OF_RESPONSES and _applies(kind, request))

    def after(self, request: Request, response: Response) -> tuple[Fault, ...]:
        """Return what strikes the answer on its way back."""
        if request.method == "HEAD" or response.status not in (200, 206) or not len(response.content):
            return ()
        return self._draw(request, lambda kind: kind in _OF_RESPONSES)

    def _draw(self, request: Request, eligible: Callable[[FaultKind], bool]) -> tuple[Fault, ...]:
        with self._lock:
            rules = [rule for rule in self._rules if eligible(rule.fault.kind) and rule.fits(request)]
            struck = [rule.strike(request) for rule in rules]
        return tuple(fault for fault in struck if fault is not None)


def _applies(kind: FaultKind, request: Request) -> bool:
    if kind == "ignore_range":
        return bool(request.range)
    if kind == "reset_upload":
        return request.method in ("POST", "PUT")
    if kind == "expired":
        return request.target.startswith("/_storage/")
    return True
