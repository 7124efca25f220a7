"""Every error a user can cause, in one tree.

    HubMagmaxError
    ├── RecipeError              the YAML, a preference, a method's options, a schedule
    ├── CheckpointError          one checkpoint is malformed: header, index, shard, value
    │   ├── NonFiniteError       a NaN or an infinity, with tensor and element
    │   └── DamagedError         bytes that are not those that the Hub states
    ├── MismatchError            checkpoints that do not fit each other
    ├── SourceError              a file, repository or revision that cannot be reached
    │   └── HubSettingError      the address of the Hub or the access token, from the environment
    ├── LockError                a lock that no longer describes its sources
    ├── OutputError              an output folder that cannot be written or is taken
    ├── EvaluationError          data or models that cannot be scored
    ├── PublishError             the Hub refused, or what it holds differs
    │   └── RegressedError       the model falls behind on a guard
    ├── RecordError              a record of decisions that is not as it was written
    ├── SignatureError           a signature that cannot be made, or does not fit
    ├── DistributedError         processes that disagree about the world they are in
    ├── ArgumentError            an argument of a Python function that is of another kind
    ├── SystemRefusalError       no memory, no room for temporary files, no more threads
    └── MissingDependencyError   an optional package, with the line that installs it

A message is one paragraph made of four facts: what was wrong, where, what was expected,
and what to do next. The facts stay on the exception as attributes, so that a program can
use them without parsing the text; of several problems at once each has its own (`Problem`).
Whatever is quoted in them, access tokens are taken out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from hub_magmax.text import shown, without_secrets

#: Keys and positions that lead to a value of a recipe.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, for programs.

    Attributes:
        kind: `unknown_key`, `missing_key`, `value` or `conflict` in a recipe, else the name of the error.
        message: What is wrong, as a clause.
        file: The file that holds it, where that is known.
        key: Where it is in a recipe.
        line, column: Where that is in its file, from 1; None where it is not known.
        expected: What would have been right.
        hint: What the person can do now.
    """

    kind: str
    message: str
    file: str = ""
    key: KeyPath = ()
    line: int | None = None
    column: int | None = None
    expected: str = ""
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("message", "file", "expected", "hint"):
            object.__setattr__(self, name, without_secrets(getattr(self, name)))

    @property
    def place(self) -> str:
        """Line, column and key, in words; empty where none is known."""
        line = f"line {self.line}" + (f", column {self.column}" if self.column else "") if self.line else ""
        key = ".".join(shown(part).strip("'") for part in self.key)
        return ", ".join(part for part in (line, key) if part)


def place_in_recipe(key: KeyPath) -> str:
    """Return where a key of a recipe is whose file is not known; empty without a key."""
    return f"recipe, {'.'.join(map(str, key))}" if key else ""


class HubMagmaxError(Exception):
    """Say what was wrong, where, what was expected, and what to do next.

    Args:
        what: What is wrong, as a clause without a full stop.
        where: File, key path, tensor, or repository at a commit; by default the recipe's `key`.
        expected: What would have been right.
        hint: What the person can do now, as a sentence in the imperative.
        key: Keys of the recipe that lead to what is wrong.
        problems: The same for programs, one by one; by default the one that the other arguments describe.

    Attributes:
        exit_code: Of a command that ends by it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        expected: str = "",
        hint: str = "",
        key: KeyPath = (),
        problems: tuple[Problem, ...] = (),
    ) -> None:
        where = where or place_in_recipe(key)
        facts = tuple(without_secrets(fact) for fact in (what, where, expected, hint))
        self.what, self.where, self.expected, self.hint = facts
        alone = Problem(type(self).__name__, self.what, key=key, expected=self.expected, hint=self.hint)
        self.problems = problems or (alone,)
        super().__init__(*facts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error travel between processes."""
        return partial(type(self), self.what, **self._facts(), problems=self.problems), ()

    def _facts(self) -> dict[str, Any]:
        return {"where": self.where, "expected": self.expected, "hint": self.hint}

    def with_problem(self, problem: Problem, where: str) -> HubMagmaxError:
        """Return the same error with its one problem described more closely."""
        return type(self)(self.what, **self._facts() | {"where": where}, problems=(problem,))

    def is_about(self, key: KeyPath) -> None:
        """Note the key of the recipe that leads to what is wrong, unless one is known; `where` stays."""
        if not self.problems[0].key:
            self.is_below(key)

    def is_below(self, key: KeyPath) -> None:
        """Note the key of the recipe below which the known one is, or which is all that is known."""
        if key and len(self.problems) == 1:
            problem = self.problems[0]
            self.problems = (replace(problem, key=(*key, *problem.key)),)

    def is_in(self, before: KeyPath, after: KeyPath) -> None:
        """Note that what is known as below the key `before` is below `after`, in the recipe as written."""
        size, places = len(before), (place_in_recipe(before), place_in_recipe(after))
        if f"{self.where}.".startswith(f"{places[0]}."):
            self.where = self.where.replace(*places, 1)
        self.problems = tuple(
            replace(one, key=(*after, *one.key[size:])) if one.key[:size] == before else one
            for one in self.problems
        )

    def add_hint(self, sentence: str) -> None:
        """Say more of what the person can do, where there is one problem."""
        self.hint = f"{self.hint} {without_secrets(sentence)}".strip()
        if len(self.problems) == 1:
            self.problems = (replace(self.problems[0], hint=self.hint),)

    def take_from_hints(self, advice: str) -> None:
        """Take advice out of what the person can do, where it cannot be followed."""
        self.hint = self.hint.replace(advice, "")
        self.problems = tuple(replace(one, hint=one.hint.replace(advice, "")) for one in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs."""
        problems = [asdict(problem) for problem in self.problems]
        return {"kind": type(self).__name__, "what": self.what, **self._facts(), "problems": problems}

    def __str__(self) -> str:
        start = f"{self.where}: {self.what}" if self.where else self.what
        expected = f"Expected {self.expected}" if self.expected else ""
        sentences = (part.strip() for part in (start, expected, self.hint))
        between = "\n" if "\n" in start else " "
        return between.join(s if s.endswith((".", "?", "!")) else f"{s}." for s in sentences if s)


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


class HubSettingError(SourceError):
    """The Hub's address or the access token, as the environment gives them, cannot be used."""


class LockError(HubMagmaxError):
    """The lock no longer describes what it locked."""


class OutputError(HubMagmaxError):
    """The output cannot be written where the recipe says."""


class EvaluationError(HubMagmaxError):
    """The data or the models cannot be scored."""


class PublishError(HubMagmaxError):
    """The Hub refused the upload, or holds something else than was sent."""


class RegressedError(PublishError):
    """The merged model falls behind on a guard, so it is not published."""

    exit_code = 3


class RecordError(HubMagmaxError):
    """A record of decisions is not as it was written."""


class SignatureError(HubMagmaxError):
    """A signature cannot be made, or does not fit the model and the key."""


class DistributedError(HubMagmaxError):
    """The processes disagree about how many they are, or one of them is gone."""


class ArgumentError(HubMagmaxError, ValueError):
    """An argument of a Python function is of another kind than it takes."""


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
