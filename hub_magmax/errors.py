"""Every error a user can cause, in one tree.

    HubMagmaxError
    ├── RecipeError              the YAML, a preference, a method's options, a schedule
    ├── CheckpointError          one checkpoint is malformed: header, index, shard, value
    │   ├── NonFiniteError       a NaN or an infinity, with tensor and element
    │   └── DamagedError         bytes that are not those that the Hub states
    ├── MismatchError            checkpoints that do not fit each other
    ├── SourceError              a file, repository or revision that cannot be reached
    ├── LockError                a lock that no longer describes its sources
    ├── OutputError              an output folder that cannot be written or is taken
    ├── EvaluationError          data or models that cannot be scored
    ├── PublishError             the Hub refused, or what it holds differs
    ├── SignatureError           a signature that cannot be made, or does not fit
    ├── DistributedError         processes that disagree about the world they are in
    ├── SystemRefusalError       no memory, no room for temporary files, no more threads
    └── MissingDependencyError   an optional package, with the line that installs it

A message is one paragraph made of four facts: what was wrong, where, what was expected,
and what to do next. The facts stay on the exception as attributes, so that a program can
use them without parsing the text. Whatever is quoted in them, access tokens are taken out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial
from typing import Any

from hub_magmax.text import without_secrets


class HubMagmaxError(Exception):
    """Say what was wrong, where, what was expected, and what to do next.

    Args:
        what: What is wrong, as a clause without a full stop.
        where: File, key path, tensor, or repository at a commit.
        expected: What would have been right.
        hint: What the person can do now, as a sentence in the imperative.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", hint: str = "") -> None:
        facts = tuple(without_secrets(fact) for fact in (what, where, expected, hint))
        self.what, self.where, self.expected, self.hint = facts
        super().__init__(*facts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error travel between processes."""
        facts = {"where": self.where, "expected": self.expected, "hint": self.hint}
        return partial(type(self), self.what, **facts), ()

    def __str__(self) -> str:
        start = f"{self.where}: {self.what}" if self.where else self.what
        expected = f"Expected {self.expected}" if self.expected else ""
        sentences = (part.strip() for part in (start, expected, self.hint))
        return " ".join(s if s.endswith((".", "?", "!")) else f"{s}." for s in sentences if s)


class RecipeError(HubMagmaxError):
    """The recipe cannot be carried out as written."""


class CheckpointError(HubMagmaxError):
    """One checkpoint is malformed."""


class NonFiniteError(CheckpointError):
    """A tensor to be merged holds a NaN or an infinity."""


class DamagedError(CheckpointError):
    """A file's bytes are not those that its hash was stated for, so nothing made of them is kept."""


class MismatchError(HubMagmaxError):
    """The checkpoints do not fit each other."""


class SourceError(HubMagmaxError):
    """A file, repository or revision cannot be reached."""


class LockError(HubMagmaxError):
    """The lock no longer describes what it locked."""


class OutputError(HubMagmaxError):
    """The output cannot be written where the recipe says."""


class EvaluationError(HubMagmaxError):
    """The data or the models cannot be scored."""


class PublishError(HubMagmaxError):
    """The Hub refused the upload, or holds something else than was sent."""


class SignatureError(HubMagmaxError):
    """A signature cannot be made, or does not fit the model and the key."""


class DistributedError(HubMagmaxError):
    """The processes disagree about how many they are, or one of them is gone."""


class SystemRefusalError(HubMagmaxError):
    """The system refuses memory, room for a temporary file, or another thread."""


class MissingDependencyError(HubMagmaxError):
    """An optional package is not installed."""


def explained(error: BaseException) -> HubMagmaxError | None:
    """Return what a command says about `error`; None where the error is a mistake in this program."""
    if any(_is_out_of_memory(cause) for cause in _causes(error)):
        return SystemRefusalError(
            "the memory ran out",
            hint="Free some memory, raise the limit (ulimit -v) or take a larger machine, then run the same "
            "command again; `hub-magmax plan RECIPE` says how much a merge needs.",
        )
    if isinstance(error, HubMagmaxError):
        return error
    if isinstance(error, OSError):
        return SystemRefusalError(
            f"the system refuses this ({error.strerror or type(error).__name__})",
            where=str(error.filename or ""),
            hint="Check the path, its permissions and the room on the disk (TMPDIR for temporary files), "
            "then run the same command again.",
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory is missing: torch and threads report that as errors of other kinds."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = ("can't allocate memory", "out of memory", "can't start new thread")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in told)
    )
