"""Log records on stderr, as lines or as JSON objects, and the state of long work meanwhile.

All of the package reports through the standard library's `logging`, below the logger `hub_magmax`. A terminal
shows the state in its bottom line; elsewhere it is a line every few seconds.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import click

from hub_magmax.cli.work import Work
from hub_magmax.text import STATE_LEVEL, format_seconds, listed, printable, without_secrets

#: Seconds between two lines about failures of one kind.
PAUSE_SECONDS = 60.0


class Repeats(logging.Filter):
    """Leaves failures out that were told of late, and says when they end.

    Records of a failure have `fails`, its kind, and those of a success after failures have `passes`. Many
    threads may ask a Hub that is lost, each of them several times.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told_at: dict[str, float] = {}
        self._count, self._is_open = 0, False

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether to write a record, whose text changes where it stands for several."""
        if kind := getattr(record, "fails", ""):
            self._count += 1
            return record.levelno < logging.INFO or self._is_due(kind, record)
        if hasattr(record, "passes"):
            if self._is_open:
                record.levelno, record.levelname = logging.INFO, "INFO"
                record.msg, record.args = "requests are answered again, after %d that failed", (self._count,)
            self._count, self._is_open = 0, False
        return True

    def _is_due(self, kind: str, record: logging.LogRecord) -> bool:
        before = self._told_at.get(kind)
        if before is not None and record.created - before < PAUSE_SECONDS:
            return False
        if self._is_open:
            record.msg, record.args = "%s; %d requests failed by now, and are sent again", (kind, self._count)
        self._told_at[kind], self._is_open = record.created, True
        return True


LOG = logging.getLogger("hub_magmax")

#: Loggers of other libraries that tell details: huggingface_hub's of requests that are sent again.
_DETAILS = ("huggingface_hub.utils._http",)

#: Seconds between two looks at the work, from a change of work to the first line about it where there is no
#: terminal, and at most between two lines while nothing is counted.
_TICK_SECONDS, LINE_SECONDS, MAX_LINE_SECONDS = 0.25, 5.0, 60.0


@dataclass(frozen=True)
class LogOptions:
    """Options of the log: `verbose` adds details and times, `quiet` leaves errors only."""

    verbose: bool = False
    quiet: bool = False
    log_format: str = "text"

    @property
    def threshold(self) -> int:
        """Level of the least important record that is written."""
        if self.quiet:
            return logging.ERROR
        if os.environ.get("RANK", "0") != "0":  # the first process speaks for all
            return logging.WARNING
        return logging.DEBUG if self.verbose else logging.INFO


@dataclass(frozen=True)
class _Step:
    """Work that goes on, since when, and what counts it if something does."""

    key: object
    doing: str
    since: float
    work: Work | None = None


class Display(logging.Handler):
    """Writes records to stderr, and shows meanwhile what goes on.

    Of steps inside each other the innermost is shown, unless the work around it moves: what counts examples,
    bytes or models says more.

    Args:
        options: Which records, and in which form.
        doing: What goes on where nothing else has a name.
    """

    def __init__(self, options: LogOptions, doing: str = "working") -> None:
        super().__init__()
        self._options = options
        self._as_json = options.log_format == "json"
        self._shows_state = options.threshold <= logging.INFO
        self._has_bottom_line = self._shows_state and not self._as_json and sys.stderr.isatty()
        self._written_at = time.monotonic()
        self._steps = [_Step(None, doing, self._written_at)]
        self._pause = LINE_SECONDS
        self._drawn, self._last_line = "", ""
        self._unstoppable: list[str] = []
        self._stream = sys.stderr
        if not options.verbose:
            self.addFilter(Repeats())

    @property
    def doing(self) -> str:
        """Name of the innermost step that goes on."""
        return self._steps[-1].doing

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, and keep the steps that begin and end with it."""
        level = logging.DEBUG if record.name in _DETAILS else record.levelno
        if (key := getattr(record, "step_begins", None)) is not None:
            self._begin(_Step(key, _line_of(record), time.monotonic()))
        if (key := getattr(record, "step_ends", None)) is not None:
            self._end(key)
        if begun := getattr(record, "begins", ""):
            self._unstoppable.append(begun)
        if (ended := getattr(record, "ends", "")) in self._unstoppable:
            self._unstoppable.remove(ended)
        if level >= self._options.threshold:
            self.clear()
            click.echo(self._written(record), file=self._stream)
            self._written_at, self._last_line = time.monotonic(), _line_of(record)

    def _begin(self, step: _Step) -> None:
        self._steps, self._pause = [*self._steps, step], LINE_SECONDS

    def _end(self, key: object) -> None:
        """Forget a step; those of other threads may have begun after it, and go on."""
        self._steps, self._pause = [step for step in self._steps if step.key is not key], LINE_SECONDS

    def _written(self, record: logging.LogRecord) -> str:
        line, at = _line_of(record), datetime.fromtimestamp(record.created).astimezone()
        if self._as_json:
            facts = {
                "time": at.isoformat(timespec="milliseconds"),
                "level": record.levelname.lower(),
                "message": line,
            }
            return json.dumps(facts | getattr(record, "state", {}), ensure_ascii=False)
        start = f"{at:%H:%M:%S}.{at.microsecond // 1000:03d} " if self._options.verbose else ""
        return f"{start}warning: {line}" if record.levelno == logging.WARNING else start + line

    def say_what_is_waited_for(self) -> None:
        """Say after a request to end what has to be finished first, by threads that cannot be interrupted."""
        if self._unstoppable:
            LOG.info("stopping when %s, which takes up to a minute", listed(self._unstoppable))

    @contextmanager
    def counting(self, work: Work) -> Iterator[Work]:
        """Show this work while it goes on."""
        with self._alone():
            self._begin(_Step(work, work.doing, time.monotonic(), work))
        try:
            yield work
        finally:
            with self._alone():
                self._end(work)
                work.sample(time.monotonic())
                if work.done and (self._as_json or 0 < work.told_at < work.done):
                    self._write_state(str(work), work.facts())
                self.clear()

    def tick(self) -> None:
        """Show the state, if it is time to."""
        with self._alone():
            now = time.monotonic()
            for step in self._steps:
                if step.work is not None:
                    step.work.sample(now)
            if self._has_bottom_line:
                self._draw(now)
            elif self._shows_state and now - self._written_at >= self._pause:
                self._write_line(now)

    def _write_line(self, now: float) -> None:
        """Write a line about what goes on; while nothing is counted the next one comes later and later."""
        shown, work = self._shown(now)
        if work is None or work.moved_at < now - self._pause:
            self._pause = min(2 * self._pause, MAX_LINE_SECONDS)
        if work is not None:
            told = str(work)
            same = f", unchanged for {format_seconds(now - work.moved_at)}" if told == work.told else ""
            work.told, work.told_at = told, work.done
            self._write_state(told + same, work.facts())
            return
        seconds = now - shown.since
        so_far = f": {format_seconds(seconds)} so far" if seconds >= 1 else ""
        self._write_state(shown.doing + so_far, {"seconds": round(seconds, 1)})

    def _shown(self, now: float) -> tuple[_Step, Work | None]:
        """Return the step to show: the outermost that counted of late, or else the innermost; its work."""
        inner = self._steps[-1]
        moving = (s for s in self._steps if s.work is not None and s.work.moved_at >= now - self._pause)
        shown = next(moving, inner)
        return shown, shown.work if shown.work is not None and shown.work.done else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _write_state(self, line: str, facts: dict[str, Any]) -> None:
        LOG.info("%s", line, extra={"state": facts})

    def _draw(self, now: float) -> None:
        """Draw the bottom line, unless a library shows a bar of its own there."""
        if _is_bar_of_others_shown():
            self._drawn = ""
            return
        width = shutil.get_terminal_size().columns - 1
        shown, work = self._shown(now)
        seconds = format_seconds(now - shown.since)
        told = seconds if shown.doing == self._last_line else f"{shown.doing}, {seconds}"
        line = f"… {told}" if work is None else _bar(work, width)
        if line != self._drawn:
            click.echo(f"\r\x1b[2K{line[:width]}", file=self._stream, nl=False)
            self._drawn = line

    def clear(self) -> None:
        """Remove the bottom line."""
        if self._drawn:
            click.echo("\r\x1b[2K", file=self._stream, nl=False)
            self._drawn = ""


def _is_bar_of_others_shown() -> bool:
    """Say whether a library shows a bar by tqdm, which another thread may be importing or using now."""
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    try:
        return any(not getattr(bar, "disable", True) for bar in bars)
    except RuntimeError:  # one more while they were looked at
        return True


def _bar(work: Work, width: int) -> str:
    """Return the state of some work with a bar, where there is room for one."""
    text = str(work)
    room = min(width - len(text) - 1, 30)
    if room < 5:
        return text
    filled = round(room * work.done / work.total) if work.total else room
    return f"{text} {'█' * filled}{'░' * (room - filled)}"


def _line_of(record: logging.LogRecord) -> str:
    """Return the message as it may be shown; of a Python warning the first line."""
    message = record.getMessage()
    if record.name == "py.warnings":
        message = message.split("\n")[0]
    return without_secrets(printable(message))


#: Variables that switch the progress bars of huggingface_hub, datasets, and all others by tqdm off.
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


@contextmanager
def library_bars_off(options: LogOptions) -> Iterator[None]:
    """Keep progress bars of other libraries out of what is no terminal; they read this when imported."""
    has_bars = sys.stderr.isatty() and options.log_format == "text" and not options.quiet
    added = [] if has_bars else [name for name in _BARS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class _ForeignLines(io.TextIOBase):
    """Stands for stderr while its lines are JSON: what others write there becomes records."""

    def __init__(self) -> None:
        self._begun = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun = f"{self._begun}{text}".replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            LOG.warning("%s", line)
        return len(text)

    def end(self) -> None:
        """Write the last line, which may lack its line break."""
        if self._begun:
            self.write("\n")


@contextmanager
def displayed(options: LogOptions, doing: str = "working") -> Iterator[Display]:
    """Send the package's records and Python's warnings to stderr while this lasts, and show the state."""
    display = Display(options, doing)
    details = [logging.getLogger(name) for name in ("py.warnings", *_DETAILS)]
    before = [(logger, logger.level, logger.propagate) for logger in (LOG, *details)]
    LOG.setLevel(STATE_LEVEL)
    for logger, _, _ in before:
        logger.addHandler(display)
        logger.propagate = False
    logging.captureWarnings(True)
    stream, foreign = sys.stderr, _ForeignLines()
    if options.log_format == "json":
        sys.stderr = foreign
    ended = threading.Event()
    pulse = threading.Thread(target=_beat, args=(display, ended), daemon=True)
    pulse.start()
    try:
        yield display
    finally:
        ended.set()
        pulse.join()
        display.clear()
        foreign.end()
        logging.captureWarnings(False)
        sys.stderr = stream
        for logger, level, propagate in before:
            logger.removeHandler(display)
            logger.setLevel(level)
            logger.propagate = propagate


def _beat(display: Display, ended: threading.Event) -> None:
    while not ended.wait(_TICK_SECONDS):
        with suppress(OSError, ValueError):  # stderr is closed
            display.tick()
