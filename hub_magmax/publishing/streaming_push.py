"""Streaming push: each file is uploaded while the next is merged, and one commit publishes them all.

At most two files of weights are on this machine at a time. Several processes need no disk in common: each
sends what it makes, and only names, sizes and hashes travel between them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.checkpoints.source import FileSource, TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.checkpoints.storage.hub import open_hub
from hub_magmax.errors import HubMagmaxError, PublishError, SourceError
from hub_magmax.files import write_text
from hub_magmax.merging.execution import make_shards, prepare, share, told
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.output.opening import open_output
from hub_magmax.merging.output.report import REPORT_NAME, MergeReport, ShardRecord, parse_report
from hub_magmax.merging.output.side_files import report_of, write_beside_weights
from hub_magmax.merging.profile import Progress, Spent
from hub_magmax.planning.plan import Plan
from hub_magmax.processes import Processes
from hub_magmax.publishing.commits import (
    CollectedError,
    Destination,
    Head,
    Published,
    candidates,
    commit,
    hashes_of,
    upload,
    uploaded,
)
from hub_magmax.publishing.comparing import compare_reported
from hub_magmax.publishing.pushing import contents_of, operations
from hub_magmax.reporting.card_file import write_card

LOG = logging.getLogger(__name__)

#: Attempts to make and send files that the Hub lost.
_ROUNDS = 3


def merge_to_hub(
    plan: Plan,
    destination: Destination,
    head: Head | None,
    progress: Progress | None,
    processes: Processes,
    cache: SourceCache,
) -> tuple[MergeReport, Published | None]:
    """Carry out `plan` straight to the Hub, without a folder, and return the report and the commit.

    Called again after an interruption or a failure, it makes and sends what the Hub does not have yet; if
    the commit was made already it returns that.

    Args:
        plan: From `pipeline.plan`.
        destination: Where to.
        head: The branch as it is now; of the first process.
        progress: As for `merging.merge`.
        processes: Which of how many processes this is; the first one commits.
        cache: Checkpoints that are open already.

    Raises:
        PublishError: If the Hub refuses, or the branch moved meanwhile.
        OutputError: If there is no room for two files.
    """
    started = time.perf_counter()
    place = PartialFolder(plan.recipe.output_path, plan.digest)
    if (done := processes.first_decides(lambda: published_already(destination, plan))) is not None:
        LOG.info("%s holds this merge already, nothing is merged again", destination.name)
        discard(place, processes)
        return done
    LOG.info("%s straight to %s", told(plan, processes), destination.name)
    own = _prepare(place, plan, processes, cache)
    try:
        with open_inputs(plan.recipe, plan.lock, cache) as sources:
            spent = Spent()

            def report() -> MergeReport:
                return report_of(plan, place, time.perf_counter() - started, spent)

            finish = _Finish(plan, destination, head, place, sources, report)
            for _ in range(_ROUNDS):
                with closing(_UploadedShards(place, destination)) as shards:
                    spent = make_shards(plan, sources, place, shards, progress, None, processes)
                    shards.finish()
                _tell_the_first(place, plan, processes)
                outcome = processes.first_decides(finish.commit)
                if not isinstance(outcome, CollectedError):
                    break
                if own:
                    place.forget()  # the Hub names one at a time, and they were sent at about the same time
                processes.wait()
        if isinstance(outcome, HubMagmaxError):
            raise outcome
        if own:
            place.remove()
        return outcome
    finally:
        place.abandon()


def _prepare(place: PartialFolder, plan: Plan, processes: Processes, cache: SourceCache) -> bool:
    """Prepare the folder once on each disk; return whether this process did, and cleans up after it.

    Raises:
        HubMagmaxError: Why it could not be prepared somewhere, the same in all processes.
    """
    mark = processes.first_decides(lambda: uuid4().hex)
    own, refusal = False, None
    for rank in range(processes.count):
        if rank == processes.rank and not place.is_marked(mark):
            own, refusal = True, prepare(place, plan, cache) or _mark(place, mark)
        processes.wait()  # the next one looks whether it shares the disk
    refusals = [error for error in processes.gather(refusal) if error is not None]
    if refusals:
        place.abandon()
        raise refusals[0]
    return own


def _mark(place: PartialFolder, text: str) -> HubMagmaxError | None:
    try:
        place.mark(text)
    except HubMagmaxError as error:
        return error
    return None


def _tell_the_first(place: PartialFolder, plan: Plan, processes: Processes) -> None:
    """Wait for all processes, and note in the first one's journal what they made on other disks."""
    made = [place.journal.recorded(shard.file) for shard in share(plan.shards, processes)]
    records = [record for records in processes.gather(made) for record in records if record is not None]
    if processes.is_first:
        for record in records:
            if place.journal.recorded(record.file) != record:
                place.journal.record(record)


def discard(place: PartialFolder, processes: Processes) -> None:
    """Remove the files left on any disk of a merge that is on the Hub already."""
    for rank in range(processes.count):  # one after the other, since some may share a disk
        if rank == processes.rank and prepare(place, None, SourceCache()) is None:
            place.remove()
        processes.wait()


def published_already(destination: Destination, plan: Plan) -> tuple[MergeReport, Published] | None:
    """Return the report and the commit of this very merge if the destination holds it, complete."""
    for found in candidates(destination):
        with closing(open_hub(found.repo_id, found.commit)) as source:
            if REPORT_NAME in source.sizes and (report := _whole(source, plan)) is not None:
                return report, found
    return None


def _whole(source: FileSource, plan: Plan) -> MergeReport | None:
    """Return the report of a published model if `plan` made it, and every file is as merged."""
    content = source.read_bytes(REPORT_NAME, 0, source.sizes[REPORT_NAME])
    try:
        report = parse_report(content, source.label)
        if report.plan_digest == plan.digest:
            compare_reported(source, report, PublishError)
            return report
    except SourceError:  # the Hub does not answer, which says nothing of what it holds
        raise
    except HubMagmaxError:
        pass
    return None


class _UploadedShards:
    """Keeps finished files on the Hub: one is on its way there while the next is made."""

    num_open = 1

    def __init__(self, place: PartialFolder, destination: Destination) -> None:
        self._place, self._destination = place, destination
        self._pool = ThreadPoolExecutor(1)
        self._sending: Future[None] | None = None

    def intact(self, file: str) -> ShardRecord | None:
        if (sent := self._place.journal.sent(file, self._destination.repo_id)) is not None:
            return sent
        if (found := self._place.journal.intact(file)) is not None:
            self._send(found)
        return found

    def record(self, record: ShardRecord) -> None:
        self._place.journal.record(record)
        self._send(record)

    def _send(self, record: ShardRecord) -> None:
        self.finish()
        self._sending = self._pool.submit(self._upload, record.file)

    def _upload(self, file: str) -> None:
        if upload(self._destination, self._place.folder / file):
            self._place.journal.send(file, self._destination.repo_id)

    def finish(self) -> None:
        """Wait until the file that is on its way has arrived."""
        if self._sending is not None:
            self._sending.result()
            self._sending = None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Finish:
    """What the first process does once all files are made: write the rest, and commit."""

    def __init__(
        self,
        plan: Plan,
        destination: Destination,
        head: Head | None,
        place: PartialFolder,
        sources: Mapping[str, TensorSource],
        report: Callable[[], MergeReport],
    ) -> None:
        self._plan, self._destination, self._head = plan, destination, head
        self._place, self._sources, self._report = place, sources, report

    def commit(self) -> tuple[MergeReport, Published] | HubMagmaxError:
        """Return the report and the commit, or why there is none, so that every process learns it."""
        try:
            return self._commit()
        except HubMagmaxError as error:
            return error

    def _commit(self) -> tuple[MergeReport, Published]:
        plan, folder, head = self._plan, self._place.folder, self._head
        assert head is not None, "the first process found it"
        self._place.sweep()  # files that an earlier round left
        report = write_beside_weights(plan, self._sources, folder, self._report())
        report = replace(report, opened=open_output(plan, folder))
        write_text(folder / REPORT_NAME, report.to_json())
        write_card(plan.recipe, plan.lock, report, None, folder)
        small = self._small_files(folder, report)
        weights = {shard.file: self._weights(shard) for shard in report.shards}
        expected = {shard.file: f"sha256:{shard.sha256}" for shard in report.shards}
        expected |= {name: hashes_of(content) for name, content in small.items()}
        return report, commit(self._destination, operations(weights | small, head), head, expected)

    def _small_files(self, folder: Path, report: MergeReport) -> dict[str, Path | bytes]:
        weights = {shard.file for shard in report.shards}
        found = contents_of(folder, self._destination.repo_id)
        return {name: content for name, content in found.items() if name not in weights}

    def _weights(self, record: ShardRecord) -> Any:
        path = self._place.folder / record.file
        return path if path.exists() else uploaded(record)
