"""Output folder, complete or absent.

Everything goes into `NAME.partial` beside the output; one rename makes it the output. Each
finished shard leaves a small record in the journal there, so that the same merge, started
again, goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from hub_magmax.errors import HubMagmaxError, OutputError
from hub_magmax.files import os_errors, sync, write_durably, write_text
from hub_magmax.merging.output.journal import Journal


class PartialFolder:
    """Folder beside the output in which one merge is being made.

    `NAME.partial/model` becomes the output; `NAME.partial/journal` records finished shards, and
    `NAME.partial/survey` statistics of the whole model.

    Attributes:
        folder, survey_folder: The first and the last of these.
        journal: The finished shards.

    Args:
        output: Where the finished folder will be.
        plan_digest: Identifies the merge; finished shards of another one are thrown away.
    """

    def __init__(self, output: Path, plan_digest: str) -> None:
        if not output.name or not _can_be_made(output):
            raise OutputError(
                "this cannot be the path of a new folder" if output.name else "the output is the root folder",
                where=ascii(str(output)),
                expected="a new or empty folder",
                hint="Choose another output.path.",
            )
        self.output, self.plan_digest = output, plan_digest
        self._root = output.with_name(output.name + ".partial")
        self.folder = self._root / "model"
        self.journal = Journal(self._root / "journal", self.folder)
        self.survey_folder = self._root / "survey"
        self._lock = FileLock(self._root / "lock", blocking=False)

    def prepare(self, sources: str = "") -> None:
        """Create the folder, or keep only the finished shards of this merge in it; one process does this.

        Args:
            sources: Versions of the sources; shards made from other versions are made again.

        Raises:
            OutputError: If the output is taken, being written by another process, or cannot be.
        """
        self.clean_up()
        refuse_taken(self.output)
        with os_errors(self.output):
            self._root.mkdir(parents=True, exist_ok=True)
            try:
                if not self._acquire():
                    raise OutputError(
                        "another process is writing this output",
                        where=str(self.output),
                        hint="Wait for it to end, or choose another output.path.",
                    )
                refuse_taken(self.output)  # the other one may have ended a moment ago
                self._keep_finished_shards(f"{self.plan_digest}\n{sources}")
            except BaseException:  # memory can run out too
                self.abandon()
                with contextlib.suppress(OSError):
                    self._root.rmdir()  # where there was not even room for a lock
                raise

    def clean_up(self) -> None:
        """Remove the partial folder of a finished output whose merge was killed after the rename."""
        with contextlib.suppress(OSError):
            if self.output.is_dir() and self._root.is_dir() and not self.folder.exists() and self._acquire():
                self.remove()

    def _acquire(self) -> bool:
        try:
            self._lock.acquire()
        except Timeout:
            return False
        return True

    def _keep_finished_shards(self, identity: str) -> None:
        """Remove all but this merge's finished shards: nothing else may come into the output."""
        if self._stored_identity() != identity:
            for folder in (self.journal.folder, self.survey_folder):
                if folder.exists():
                    shutil.rmtree(folder)
        for folder in (self.journal.folder, self.folder):
            folder.mkdir(exist_ok=True)
        self.sweep()
        write_durably(self.journal.folder / "plan", identity)

    def sweep(self) -> None:
        """Remove all files but finished shards."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif self.journal.recorded(path.name) is None:
                path.unlink()

    def _stored_identity(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            return (self.journal.folder / "plan").read_text(encoding="utf-8")
        return ""

    def forget(self) -> None:
        """Take no shard for finished any more: the same merge makes them again."""
        shutil.rmtree(self.survey_folder, ignore_errors=True)
        self.journal.clear()

    def mark(self, text: str) -> None:
        """Leave a mark by which other processes see that they share this folder."""
        write_text(self._root / "mark", text)

    def is_marked(self, text: str) -> bool:
        """Say whether this very mark was left here."""
        with contextlib.suppress(OSError, ValueError):
            return (self._root / "mark").read_text(encoding="utf-8") == text
        return False

    def publish(self) -> None:
        """Turn the folder into the output by one rename, after which it survives a loss of power."""
        refuse_taken(self.output)
        with os_errors(self.output):
            for path in (*self.folder.rglob("*"), self.folder):
                sync(path)
            if self.output.exists():
                self.output.rmdir()  # empty, or refuse_taken had objected
            self.folder.rename(self.output)
            with contextlib.suppress(OSError):  # from here on the output is there, whatever fails
                sync(self.output.parent)
        self.remove()

    def abandon(self) -> None:
        """Remove the folder if nothing in it can be gone on from, and let others write; after an error."""
        finished = any(self.journal.finished()) or any(self.survey_folder.glob("*.json"))
        if self._lock.is_locked and not finished:
            self.remove()
        self.release()

    def remove(self) -> None:
        """Remove everything: it is published, or worth nothing."""
        # The lock goes last and is released after that: nobody else can begin in a folder that vanishes.
        for path in (self.folder, self.survey_folder, self.journal.folder, self._root):
            shutil.rmtree(path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let another process write this output."""
        self._lock.release()


#: Where the folder of a single model is named.
_OF_ONE_MODEL = " (--output FOLDER, or output.path in the recipe)"


def refuse_taken(output: Path) -> None:
    """Raise OutputError unless `output` is absent or an empty folder that a rename can replace."""
    with os_errors(output):
        link, mount, there = output.is_symlink(), output.is_mount(), output.exists()
        empty = output.is_dir() and not any(output.iterdir())
        holds_model = output.is_dir() and any(output.glob("*.safetensors*"))
    if link or mount:
        kind = "link" if link else "mount point"
        raise OutputError(
            f"the output path is a {kind}, which a finished folder cannot replace",
            where=str(output),
            expected="a new or empty folder",
            hint=f"Choose a new folder inside it as output.path, such as {output.name}/model.",
        )
    if there and not empty:
        raise OutputError(
            "the output folder already holds a model" if holds_model else "the output path is taken",
            where=str(output),
            expected="a new or empty folder",
            hint=f"Choose another folder{_OF_ONE_MODEL}, or move the old one away; nothing is ever "
            "overwritten.",
        )


def advise_site(error: HubMagmaxError, site: str) -> None:
    """Name a site's own key in an error about a folder that is taken, in place of an option for one model."""
    if _OF_ONE_MODEL in error.hint:
        error.take_from_hints(_OF_ONE_MODEL)
        error.add_hint(
            f"The site's own folder is sites.{site}.output.path in the recipe, such as {site}-2: "
            'docs/sites.md, "The next version".'
        )


def _can_be_made(path: Path) -> bool:
    """Say whether the system can take `path`, and UTF-8 its last part, which is stored in the recipe."""
    try:
        path.name.encode()
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
