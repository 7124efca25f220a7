"""Record of a task's training: what decided the checkpoint's bytes, and the loss on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hub_magmax.errors import OutputError
from hub_magmax.files import from_here, json_text, read_result
from hub_magmax.text import shown

#: File of a checkpoint's record, beside its weights.
RECORD_NAME = "finetune_report.json"

#: Values by part of a record.
Parts = Mapping[str, Mapping[str, Any]]

#: Parts in which the losses of all steps are stored, each as a mean.
NUM_PARTS = 20


@dataclass(frozen=True)
class TrainingRecord:
    """Training of one task.

    Attributes:
        task: Its name.
        settings: Values of `training` that count for it.
        start: Name of the checkpoint that it began at, and its hashes.
        data: Names, number and fingerprint of its examples.
        run: Steps, processes, precision and versions of packages.
        loss: Means over successive parts of the steps, each of the same length.
        held_out: As `stopping.Watch` has it, where examples were held out.
        scores: Of the tasks until this one, as `forgetting.Measuring` gives them, if it did.
    """

    task: str
    settings: Mapping[str, Any]
    start: Mapping[str, Any]
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    loss: tuple[float, ...] = ()
    held_out: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What decides the bytes, as JSON has it."""
        found: dict[str, dict[str, Any]] = json.loads(self.to_json())
        return {part: found[part] for part in ("settings", "start", "data", "run")}

    def to_json(self) -> str:
        return json_text({"format": 1, **asdict(self)})


def read_record(path: Path) -> TrainingRecord | None:
    """Return a stored record, None where there is none.

    Raises:
        OutputError: If it cannot be read.
    """
    if not path.is_file():
        return None
    again = "Delete its folder, and the task is trained again."
    return read_result(path, TrainingRecord, "the record of a training", again, ("format",))


def check_same(
    found: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Raise OutputError where a stored record differs in a value.

    Args:
        found: Values of the stored record, by part of it.
        wanted: Values of now, of some parts.
        path: The folder that was trained.
    """
    for part, values in wanted.items():
        stored = found[part]
        if changed := [key for key in {**stored, **values} if stored.get(key) != values.get(key)]:
            key = changed[0]
            raise OutputError(
                f"this was trained otherwise: {key if part == 'settings' else f'{part}, {key}'} was "
                f"{shown(stored.get(key))}, and is {shown(values.get(key))} now",
                where=from_here(path),
                expected="the training that the recipe describes",
                hint="Name another folder for the task; or delete this one, and it is trained again.",
            )


def in_parts(losses: Sequence[float]) -> tuple[float, ...]:
    """Return the means of at most `NUM_PARTS` successive parts of the losses."""
    size = -(-len(losses) // NUM_PARTS)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return tuple(sum(part) / len(part) for part in parts)
