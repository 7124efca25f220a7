"""Decisions of a record made again, and compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.locations import Location, Pin, location_of
from hub_magmax.errors import EvaluationError, HubMagmaxError, RecordError
from hub_magmax.evaluation.column_values import column_values
from hub_magmax.files import canonical_json, from_here
from hub_magmax.fleet.decision_inputs import digest_of, restored_input
from hub_magmax.fleet.decision_record import TORN, Checked, Decision, Header, check_record, read_decisions
from hub_magmax.fleet.model_contents import HEADER
from hub_magmax.fleet.predicting import GENERATION, INPUT_COLUMNS, Decoding, load_predictor, place_of
from hub_magmax.recipe.arguments import checked, opened
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.text import ProgressBar, Report, listed, number_of, shown, unseen

#: Digests that are null where nothing is known of a model's files.
_OF_FILES = {"weights", "configuration", "tokenizer", "router", "adapter", "base", "tasks", "recipe", "lock"}

#: Of these, what lies beside a model, or tells of the merge that made it; of an adapter, its own.
_OF_MERGE = {"router", "recipe", "lock", "base", "tasks"}

#: Of these, what the lock tells.
_OF_LOCK = {"lock", "base", "tasks"}

#: Beginnings of digests.
_DIGESTS = ("sha256:", HEADER)

#: Differences of models that a text shows.
_MOST_SHOWN = 10


@dataclass(frozen=True)
class Change:
    """A value that is not what was recorded.

    Attributes:
        name: Of the value, with the keys that lead to it.
        recorded, here: As the record says, and as found; None where it is not there.
    """

    name: str
    recorded: Any
    here: Any

    @property
    def text(self) -> str:
        return f"{self.name}: recorded {_told(self.recorded)}, here {_told(self.here)}"


def _told(value: Any) -> str:
    if value is None:
        return "nothing"
    return value[:23] + "…" if isinstance(value, str) and value.startswith(_DIGESTS) else shown(value)


@dataclass(frozen=True)
class Replay:
    """Result of making the decisions of a record again.

    Attributes:
        record: Its file.
        decisions, same: How many there are, and how many came out bit for bit.
        model: What the model is made of otherwise than recorded: digests.
        not_seen: Digests that are not compared: model and commit are those of the record, and the local cache
            had no such file when the model was recorded, or has none here.
        by_headers: Sources of the merge of which the lock knows the headers alone, so that others with the
            same names, dtypes and shapes pass for them.
        environment: Software, device, threads and settings otherwise than recorded; no fault by itself.
        first_line: Line of the first decision that came out otherwise; None where there is none.
        first: Its first value that did.
        last: The sha256 of the record's last line. Lines that are missing at the end are known by it alone.
        torn_bytes: Of a last line that was cut short, whose decision does not count.
    """

    record: str
    decisions: int
    same: int
    model: tuple[Change, ...]
    not_seen: tuple[str, ...]
    by_headers: tuple[str, ...]
    environment: tuple[Change, ...]
    first_line: int | None
    first: Change | None
    last: str | None
    torn_bytes: int

    @property
    def is_same(self) -> bool:
        """Whether the model is the recorded one and every decision came out bit for bit."""
        return self.same == self.decisions and not self.model

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_same": self.is_same}

    @property
    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.record}: every line follows the one before; {number_of(self.decisions, 'decision')}"
        if self.torn_bytes:
            yield TORN % ("at the end", self.torn_bytes)
        yield f"{self.same} of {self.decisions} came out again, bit for bit"
        if self.first is not None:
            yield f"first difference: line {self.first_line}, {self.first.text}"
        for title, changes in (
            ("the model differs", self.model),
            ("the environment differs", self.environment),
        ):
            for change in changes[:_MOST_SHOWN]:
                yield f"{title}: {change.text}"
            if len(changes) > _MOST_SHOWN:
                yield f"{title}: {len(changes) - _MOST_SHOWN} more, which --json lists"
        yield from self._notes()
        if self.last is not None:
            yield f"sha256 of the last line: {self.last}"

    def _notes(self) -> Iterator[str]:
        if self.not_seen:
            yield f"not compared, since the local cache has or had no such file: {listed(self.not_seen)}"
        if self.by_headers:
            yield f"compared by the headers of their weights alone, not the values: {listed(self.by_headers)}"
        if any(change.name == "threads" for change in self.environment):
            yield "OMP_NUM_THREADS sets the number of threads"


@checked
def replay(
    record: Path,
    *,
    model: str | None = None,
    inputs: str | None = None,
    column: str | None = None,
    split: str = "test",
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Replay:
    """Make the decisions of a record again, after its lines were checked, and compare them bit for bit.

    Args:
        record: From `recording`.
        model: Where the model is now, if not where the record says.
        inputs: Where the inputs are, if the record holds their digests alone: a file or folder of data.
        column, split: Of these; `image` or `text`, and `test`.
        report: Called with a line before each model.
        progress: Opens what is called with each decision; see `text.ProgressBar`.

    Raises:
        RecordError: If a line was changed, is missing or stands elsewhere, or an input is not there.
        EvaluationError: If the model cannot be loaded or run.
    """
    found = check_record(record)
    if not found.num_decisions:
        raise RecordError(
            "the record holds no decision, so nothing can be made again",
            where=from_here(record),
            hint="Look at the command that was to write it: `predict --record`.",
        )
    made = _Made(record, found, model, _Inputs(inputs, column, split), report)
    with opened(progress, found.num_decisions, "asking the model again", "decisions") as advance:
        for line, decision in read_decisions(record, found):
            made.compare(line, decision)
            if advance is not None:
                advance(1)
    return made.result()


@dataclass(frozen=True)
class _Inputs:
    """Inputs of which a record holds the digests alone.

    Attributes:
        place, column, split: Where they are; None and the usual column where nothing is said.
    """

    place: str | None
    column: str | None
    split: str

    def find(self, digest: object, task: str) -> Any:
        """Return the input of a digest; None where it is not there."""
        if self.place is None:
            return None
        column = self.column or INPUT_COLUMNS[task]
        if column not in self._read:
            values = column_values(self.place, column, self.split, "inputs")
            self._read[column] = values, {digest_of(value): number for number, value in enumerate(values)}
        values, numbers = self._read[column]
        return values[numbers[digest]] if digest in numbers else None

    @cached_property
    def _read(self) -> dict[str, tuple[Any, dict[object, int]]]:
        return {}


class _Made:
    """Decisions that are made again, one after the other; each header's model is loaded when it is needed."""

    def __init__(
        self, record: Path, found: Checked, model: str | None, inputs: _Inputs, report: Report
    ) -> None:
        self._record, self._found, self._model = from_here(record), found, model
        self._inputs, self._report = inputs, report
        self._header = ""
        self._same = self._num = 0
        self._model_changes: dict[str, Change] = {}
        self._not_seen: set[str] = set()
        self._by_headers: dict[str, None] = {}
        self._environment: dict[str, Change] = {}
        self._first: tuple[int, Change] | None = None

    def compare(self, line: int, decision: Decision) -> None:
        """Make a decision again; `line` is its number in the record."""
        if decision.header != self._header:
            self._load(self._found.headers[decision.header])
            self._header = decision.header
        where = f"{self._record}, line {line}"
        try:
            output = self._predictor.answer(self._asked(decision, where), decision.seed)
        except EvaluationError as error:
            raise EvaluationError(
                error.what, where=where, expected=error.expected, hint=error.hint
            ) from error
        self._num += 1
        changes = _changes(decision.output, output)
        if not changes:
            self._same += 1
        elif self._first is None:
            self._first = line, changes[0]

    def _asked(self, decision: Decision, where: str) -> Any:
        found = restored_input(decision.input)
        if found is None:
            found = self._inputs.find(decision.input.get("digest"), self._predictor.task)
        if found is None:
            raise RecordError(
                f"the record holds the digest of the input alone ({decision.input.get('digest')})",
                where=where,
                hint="Name the data that has it with --inputs, and its column with --column.",
            )
        return found

    def _load(self, header: Header) -> None:
        location, written = _place(header, self._model, self._record)
        self._report(f"loading {written}")
        task = str(header.model.get("task"))
        try:
            self._predictor = load_predictor(location, written, _decoding(header, self._record), task)
        except HubMagmaxError as error:
            error.add_hint("--model names another place of the model.")
            raise
        here = self._predictor.header
        compared = header.contents.keys() - (_OF_FILES if header.contents.get("weights") is None else set())
        compared -= (not_seen := _not_seen(header, here))
        self._not_seen |= not_seen
        for change in _changes(_part(header.contents, compared), _part(here.contents, compared)):
            if not _is_earlier_form(change):
                self._model_changes.setdefault(change.name, change)
        self._by_headers |= dict.fromkeys(_known_by_headers(_part(here.contents, compared)))
        for recorded, found in ((header.environment, here.environment), (header.settings, here.settings)):
            for change in _changes(recorded, found):
                self._environment.setdefault(change.name, change)

    def result(self) -> Replay:
        line, first = self._first or (None, None)
        return Replay(
            self._record,
            self._num,
            self._same,
            tuple(self._model_changes.values()),
            tuple(sorted(self._not_seen)),
            tuple(self._by_headers),
            tuple(self._environment.values()),
            line,
            first,
            self._found.last,
            self._found.torn_bytes,
        )


def _not_seen(recorded: Header, here: Header) -> set[str]:
    """Return which digests one side lacks though model and commit are the same, so that no file differs.

    The local cache may hold a part of a commit's files, and a null does not tell this from a file that is not
    there.
    """
    if not recorded.model.get("commit") or any(
        recorded.model.get(key) != here.model.get(key) for key in Pin._fields
    ):
        return set()
    one, other = recorded.contents, here.contents
    found = {key for key in _OF_MERGE if (one.get(key) is None) != (other.get(key) is None)}
    return found | _OF_LOCK if "lock" in found else found


def _is_earlier_form(change: Change) -> bool:
    """Say whether a digest of headers differs by its beginning alone: earlier records wrote `sha256:`."""
    return str(change.here).startswith(HEADER) and change.recorded == "sha256:" + change.here.removeprefix(
        HEADER
    )


def _known_by_headers(contents: Mapping[str, Any]) -> list[str]:
    """Return the names of a merge's sources whose digests are of headers."""
    sources = {"base": contents.get("base"), **(contents.get("tasks") or {})}
    return [name for name, source in sources.items() if source and source["files"].startswith(HEADER)]


def _part(values: Mapping[str, Any], keys: Set[str]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}


def _place(header: Header, model: str | None, record: str) -> tuple[Location, str]:
    """Return where a model is and its name: as `model` says, or as recorded, with its commit on the Hub."""
    written = header.model.get("place") if model is None else model
    if not isinstance(written, str):
        raise RecordError(
            "the record does not say where the model was", where=record, hint="Name it with --model."
        )
    try:
        if model is None and header.model.get("commit"):
            repo_id, commit, part = (str(header.model.get(key) or "") for key in Pin._fields)
            kind = str(header.model.get("kind"))
            pinned = LockedSource(written, kind, repo_id, commit, files=(), part=part or None)
            return location_of(pinned, Path()), written
        return place_of(written), written
    except HubMagmaxError as error:
        error.add_hint("--model names another place of the model.")
        raise


def _decoding(header: Header, record: str) -> Decoding | None:
    if header.model.get("task") != GENERATION:
        return None
    try:
        return Decoding.from_dict(header.settings)
    except (KeyError, TypeError) as error:
        raise RecordError("the settings of generation are not there", where=record) from error


def _changes(recorded: Any, here: Any, name: str = "") -> list[Change]:
    """Return the values that differ, by the keys and positions that lead to them, in order."""
    pairs = _pairs(recorded, here, name)
    if pairs is not None:
        return [change for inner, one, other in pairs for change in _changes(one, other, inner)]
    # By the texts of JSON, which stand for the bits: 0.0 and -0.0 differ.
    return [] if canonical_json(recorded) == canonical_json(here) else [Change(name, recorded, here)]


def _pairs(recorded: Any, here: Any, name: str) -> list[tuple[str, Any, Any]] | None:
    """Return the values in two mappings or two lists, each with its name; None for values of other kinds."""
    if isinstance(recorded, Mapping) and isinstance(here, Mapping):
        start = f"{name}." if name else ""
        return [(f"{start}{key}", recorded.get(key), here.get(key)) for key in sorted({*recorded, *here})]
    if isinstance(recorded, list) and isinstance(here, list):
        both = enumerate(zip_longest(recorded, here))
        return [(f"{name}[{number}]", one, other) for number, (one, other) in both]
    return None
