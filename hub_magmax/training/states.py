"""States of an unfinished training, in a folder beside the checkpoint that it makes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hub_magmax.errors import OutputError
from hub_magmax.files import from_here, os_errors, write_text
from hub_magmax.training.record import RECORD_NAME, TrainingRecord, check_same, read_record

_STATE = re.compile(r"step-\d{9}")

#: Beside the state of model, optimiser and schedule, which accelerate writes.
_LOSSES_NAME = "losses.json"


class TrainingFolder:
    """Folder `NAME.training` in which a task is trained until its checkpoint `NAME` is complete.

    `step-N` holds the state after N steps; it gets that name when it is whole, and the one before goes.

    Args:
        checkpoint: The folder that the task's checkpoint will be.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.root = checkpoint.with_name(checkpoint.name + ".training")
        #: Where the checkpoint is written before it gets its name.
        self.finished = self.root / "finished"

    @contextmanager
    def claimed(self, record: TrainingRecord) -> Iterator[None]:
        """Hold the folder for this process; a state that is there has to be of the same training.

        Raises:
            OutputError: If another process holds it, or it cannot be written; if what was begun there was
                described otherwise.
        """
        taken = OutputError(
            "another process is training this task",
            where=from_here(self.root),
            hint="Wait for it to end, or name another folder for the task.",
        )
        with os_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                raise taken from None
        try:
            self._compare(record)
            yield
        finally:
            lock.release()

    def _compare(self, record: TrainingRecord) -> None:
        path = self.root / RECORD_NAME
        if self.latest is not None and (found := read_record(path)) is not None:
            check_same(found.identity, record.identity, self.root)
        else:
            write_text(path, record.to_json())  # whatever was begun before kept no state

    @property
    def latest(self) -> Path | None:
        """The newest state; None before the first."""
        return max((path for path in self.root.glob("step-*") if _STATE.fullmatch(path.name)), default=None)

    def writing(self, step: int) -> Path:
        """Return an empty place for the state after some steps; `keep` gives it its name."""
        place = self.root / f"step-{step:09d}.partial"
        with os_errors(self.root):
            shutil.rmtree(place, ignore_errors=True)
        return place

    def keep(self, place: Path, losses: list[float]) -> None:
        """Give a state that is whole its name, with the losses until then, and remove the one before."""
        earlier = self.latest
        write_text(place / _LOSSES_NAME, json.dumps(losses))
        with os_errors(self.root):
            place.rename(place.with_suffix(""))
            if earlier is not None:
                shutil.rmtree(earlier)

    @contextmanager
    def readable(self, state: Path) -> Iterator[None]:
        """Turn an error of reading a state into OutputError: it is damaged, or of another version."""
        import torch

        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):  # the latter is a RuntimeError
            raise
        except Exception as error:  # of any library that wrote a part of it
            told = " ".join(str(error).split())[:200]
            raise OutputError(
                f"this state of a training cannot be read ({type(error).__name__}: {told})",
                where=from_here(state),
                hint=f"Delete {from_here(self.root)}, and the task is trained from its start.",
            ) from error

    def losses(self, state: Path) -> list[float]:
        """Return the losses of all steps until a state."""
        found: list[float] = json.loads((state / _LOSSES_NAME).read_text())
        return found

    def publish(self) -> None:
        """Give the finished checkpoint its name, and remove the states."""
        with os_errors(self.checkpoint):
            self.finished.rename(self.checkpoint)
            self.remove()

    def remove(self) -> None:
        """Remove all that is left of a training."""
        shutil.rmtree(self.root, ignore_errors=True)
