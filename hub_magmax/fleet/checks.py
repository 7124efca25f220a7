"""Journal of checks: when a model was verified and scored again on this machine, and with which result."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from hub_magmax.checkpoints.locations import repository_of
from hub_magmax.checkpoints.storage.hub import resolve_commit
from hub_magmax.errors import HubMagmaxError
from hub_magmax.files import user_cache

LOG = logging.getLogger(__name__)

#: Names the file, in place of the one in the user's cache; empty: nothing is noted.
FILE_VARIABLE = "HUB_MAGMAX_CHECKS"

Kind = Literal["verify", "canary"]
Result = Literal["passed", "failed", "regressed"]


@dataclass(frozen=True)
class Check:
    """One check of a model.

    Attributes:
        kind: The verb.
        model: Repository id, or absolute path of a folder.
        commit: Of the repository; empty for a folder.
        time: When it ended, in ISO 8601, UTC.
        result: Of the verb: `failed` is of `verify`, `regressed` of `canary`.
    """

    kind: str
    model: str
    commit: str
    time: str
    result: str


def checks_file() -> Path | None:
    """Return the journal, `hub_magmax/checks.jsonl` in the user's cache unless named; None for none."""
    return user_cache("checks.jsonl", FILE_VARIABLE)


def note(kind: Kind, model: str, result: Result, *, revision: str | None = None, commit: str = "") -> None:
    """Append a check to the journal; what cannot be noted is a warning, since the check itself was done.

    Args:
        kind: Of the check.
        model: A folder, or a repository, as `verify` takes it.
        result: What came of it.
        revision: Of the repository; the default branch if None.
        commit: The same, where it is known already.
    """
    if (path := checks_file()) is None:
        return
    try:
        name = str(Path(model).absolute())
        if not Path(model).is_dir():
            name, revision = repository_of(model, revision)
            commit = commit or resolve_commit(name, revision)
        line = json.dumps(asdict(Check(kind, name, commit, now(), result)), ensure_ascii=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")  # one write, which other processes do not break into
    except (OSError, HubMagmaxError) as error:
        LOG.warning("this check is not noted in %s (%s)", path, error)


@contextlib.contextmanager
def noting_failures(
    kind: Kind, model: str, revision: str | None, failures: tuple[type[HubMagmaxError], ...]
) -> Iterator[None]:
    """Note that a check failed where its block raises one of `failures`; of other errors nothing is noted.

    Args:
        kind, model, revision: As `note` takes them.
        failures: Errors that say something of the model. The others say that it could not be checked.
    """
    try:
        yield
    except failures:
        note(kind, model, "failed", revision=revision)
        raise


def noted() -> tuple[Check, ...]:
    """Return the checks in the journal, the oldest first; lines that are none are passed over."""
    path, found = checks_file(), []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().splitlines() if path else ():
            with contextlib.suppress(ValueError, TypeError):
                check = Check(**json.loads(line))
                if all(isinstance(value, str) for value in asdict(check).values()):
                    found.append(check)
    return tuple(found)


def latest(checks: Iterable[Check], kind: Kind, model: str, commit: str) -> Check | None:
    """Return the last check of this revision, or else the last one of another revision of the model."""
    found = [check for check in checks if (check.kind, check.model) == (kind, model)]
    return next(iter(reversed([check for check in found if check.commit == commit] or found)), None)


def now() -> str:
    """Return the time in ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
