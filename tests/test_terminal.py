import io
import json
import logging
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import types
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from hub_magmax import pipeline
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.cli import display
from hub_magmax.cli.display import LOG, Display, LogOptions
from hub_magmax.cli.work import Work
from hub_magmax.errors import OutputError, RegressedError
from hub_magmax.kernels.compiled import cache
from hub_magmax.merging.execution import told
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.text import format_seconds
from tests.families import write_recipe
from tests.test_cli import call

ROOT = Path(__file__).parents[1]


def interrupted(*arguments):
    """Call the command line as in a process of its own, of which a second Ctrl-C ends the rest."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return call(*arguments)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_an_interruption_has_its_own_code_and_says_that_finished_work_is_kept(
    family, monkeypatch, number, code
):
    monkeypatch.setattr(SourceCache, "read_headers", lambda *args: signal.raise_signal(number))
    recipe = write_recipe(family)
    for verb in ("plan", "merge", "run", "diagnose"):
        found, out, err = interrupted(verb, recipe)
        assert (found, out) == (code, "")
        assert err == "Interrupted. What is finished is kept, and the same command goes on from there.\n"
        found, out, _ = interrupted(verb, recipe, "--json")
        assert found == code
        assert json.loads(out)["error"]["problems"][0]["kind"] == "Interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_an_interruption_says_at_once_which_loop_is_waited_for(family, monkeypatch, number):
    def compiled(name, kinds):
        signal.raise_signal(number)

    def compile_two(*args):
        monkeypatch.setattr(cache, "compile_loop", lambda name, kinds: pytest.fail("it is not waited for"))
        with suppress(pytest.fail.Exception):
            cache.draw(np.zeros(1, np.uint8))
        monkeypatch.setattr(cache, "compile_loop", compiled)
        cache.rank(np.zeros(1, np.uint8))

    monkeypatch.setattr(SourceCache, "read_headers", compile_two)
    code, _, err = interrupted("plan", write_recipe(family))
    assert code == 128 + number
    assert [line for line in err.splitlines() if not line.startswith("compiled the loop")] == [
        "compiling the loop draw, once on this machine",
        "compiling the loop rank, once on this machine",
        "stopping when the loop rank is compiled, which takes up to a minute",
        "Interrupted. What is finished is kept, and the same command goes on from there.",
    ]


def test_values_of_a_finished_merge_are_not_looked_at_again(family):
    recipe = write_recipe(family)
    for verb in ("run", "merge"):
        first, again = (call(verb, recipe, "-v", "--output", family / verb)[2] for _ in range(2))
        assert "looking at samples of values" in first
        assert "looking at samples of values" not in again
    assert "looking at samples of values" in call("plan", recipe, "-v")[2]


def test_fault_of_a_finished_merge_is_not_asked_about_again(family):
    shutil.rmtree(family / "b")
    shutil.copytree(family / "base", family / "b")
    recipe = write_recipe(family)
    assert call("merge", recipe)[0] == 1
    assert call("merge", recipe, "--in-spite-of", "unchanged:b")[0] == 0
    assert call("run", recipe)[0] == 0


def test_a_merge_that_is_interrupted_says_how_many_files_are_kept_and_how_many_it_resumes_with(
    family, monkeypatch
):
    from hub_magmax.merging.output.journal import Journal

    recipe = write_recipe(family, output={"path": "merged", "shard_size": "1KB"})
    real, recorded = Journal.record, []

    def record(self, found):
        real(self, found)
        recorded.append(found.file)
        if len(recorded) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Journal, "record", record)
    code, _, err = interrupted("merge", recipe)
    total = int(re.search(r"(\d+) of (\d+) files are finished, and kept", err)[2])
    assert code == 130 and total > 2
    assert "Aborted" not in err
    monkeypatch.setattr(Journal, "record", real)
    code, out, err = call("merge", recipe)
    assert code == 0 and f"resuming: 2 of {total} files are there\n" in err
    assert f"wrote {family / 'merged'}" in out


@pytest.mark.parametrize("verb", ["run", "merge"])
def test_a_finished_merge_is_called_finished_and_shows_no_times_of_then(family, verb):
    recipe = write_recipe(family)
    first, again = call(verb, recipe), call(verb, recipe)
    assert "peak memory" in first[1] and "merging 6 tensors by tunable_magmax" in first[2]
    assert again[0] == 0 and "merging" not in again[2].replace("nothing is merged", "")
    assert again[2].startswith(f"{family / 'merged'} is finished already")
    assert f"already there: {family / 'merged'}" in again[1]
    assert "peak memory" not in again[1] and " s," not in again[1] and "wrote" not in again[1]


def test_a_taken_output_is_refused_before_a_word_about_merging(family):
    recipe = write_recipe(family, output={"path": "base"})
    code, _, err = call("run", recipe)
    assert code == 1 and "merging" not in err and "already holds a model" in err


def with_fault(family):
    """Return a recipe whose task `b` is its base model, unchanged."""
    (family / "b" / "model.safetensors").write_bytes((family / "base" / "model.safetensors").read_bytes())
    return write_recipe(family)


def test_a_plan_that_would_be_refused_exits_with_one_until_the_fault_is_accepted(family):
    recipe = with_fault(family)
    code, out, _ = call("plan", recipe)
    assert code == 1 and "FAULT" in out
    option = re.search(r"not merged without --in-spite-of (\S+)\)", out)[1]
    assert call("plan", recipe, "--in-spite-of", option)[0] == 0
    code, out, _ = call("plan", recipe, "--json")
    assert code == 1 and json.loads(out)["findings"]
    assert call("merge", recipe)[0] == 1


def test_a_diagnosis_with_a_fault_exits_with_one(family):
    assert call("diagnose", with_fault(family))[0] == 1


def test_a_regressed_guard_has_its_own_code(family, monkeypatch):
    def fall_behind(*args, **options):
        raise RegressedError("the merged model falls behind")

    monkeypatch.setattr(pipeline, "run", fall_behind)
    for more in ((), ("--json",)):
        assert call("run", write_recipe(family), *more)[0] == 3


def test_wrong_usage_for_programs_is_json_too():
    code, out, err = call("merge", "--json")
    assert (code, err) == (2, "")
    error = json.loads(out)["error"]
    assert (error["kind"], error["what"]) == ("UsageError", "Missing argument 'RECIPE'.")
    assert error["problems"][0]["kind"] == "UsageError"
    assert call("merge", "-v", "-q", "recipe.yaml")[0] == 2
    assert "No such command 'mrege'. Did you mean 'merge'?" in call("mrege")[2]


@pytest.mark.parametrize("place", ["before", "after"])
def test_options_of_the_log_stand_before_or_after_the_verb(family, place):
    def say(*options):
        words = ("plan", write_recipe(family))
        return call(*options, *words) if place == "before" else call(*words, *options)

    # Other programs write to the same disk in between.
    quiet, plain = (re.sub(r"[\d.]+ \w+ are free", "", say(*options)[1]) for options in (["-q"], []))
    assert quiet == plain != ""
    assert say()[2] == ""
    stamped = say("-v")[2].splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} ", line) for line in stamped)
    assert any(line.endswith("opened ./a, 2 files") for line in stamped)
    records = [json.loads(line) for line in say("-v", "--log-format", "json")[2].splitlines()]
    assert all(record.keys() >= {"time", "level", "message"} for record in records)
    assert {record["level"] for record in records} == {"debug"}


def test_quiet_leaves_errors(family):
    code, _, err = call("merge", write_recipe(family), "-q")
    assert (code, err) == (0, "")
    code, out, err = call("merge", family / "none.yaml", "-q")
    assert (code, out) == (1, "") and err.startswith("Error: ")


def test_an_error_in_json_lines_is_one_of_them(family):
    code, out, err = call("merge", family / "none.yaml", "--log-format", "json")
    (record,) = map(json.loads, err.splitlines())
    assert (code, out, record["level"]) == (1, "", "error")
    assert record["message"].startswith("Error: ") and "none.yaml" in record["message"]


def test_json_lines_of_a_merge_tell_bytes_and_time_left(family):
    _, _, err = call("run", write_recipe(family), "--log-format", "json")
    *_, last = [record for record in map(json.loads, err.splitlines()) if "bytes" in record]
    assert last["bytes"] == last["total"] > 0
    assert last.keys() >= {"rate", "seconds_left"}
    assert last["message"].startswith("merging: 100%, ")


def test_work_tells_rate_and_time_left_of_what_was_done_meanwhile():
    work = Work("merging", 1000)
    work.sample(0.0)
    assert (work.rate, work.seconds_left) == (None, None)
    work.advance(400)  # there already, from before an interruption
    work.sample(5.0)
    assert work.rate is None
    work.advance(200)
    work.sample(7.0)
    assert (work.rate, work.seconds_left) == (100.0, 4.0)
    assert str(work) == "merging: 60%, 600 B of 1.0 kB, 100 B/s, 4 s left"
    assert work.facts() == {"bytes": 600, "total": 1000, "rate": 100, "seconds_left": 4.0}


def test_rate_of_slow_steps_is_that_of_the_last_few_and_falls_in_a_stall():
    work = Work("scoring a", 64, "examples")
    for second in range(0, 201):
        if second % 40 == 0:
            work.advance(8)
        work.sample(float(second))
    # Eight examples in 40 s, though the last 15 s had none.
    work.sample(215.0)
    assert str(work) == "scoring a: 75%, 48 of 64 examples, 12 examples/min, 1 min 20 s left"
    assert work.facts() == {"examples": 48, "total": 64, "rate": 0.2, "seconds_left": 80.0}
    work.sample(400.0)
    # Its last four steps began at 80 s, and one that takes 40 s would have ended at 240 s.
    assert work.rate == pytest.approx(24 / 280)
    fast = Work("comparing", 100, "models")
    for second in range(3):
        fast.advance(20)
        fast.sample(float(second))
    assert str(fast) == "comparing: 60%, 60 of 100 models, 20 models/s, 2 s left"


def test_a_rate_keeps_its_unit_and_is_the_mean_of_all_at_the_end():
    work = Work("merging", 10**10)
    for second, count in enumerate([10**8, 9 * 10**8, 10**9, 3 * 10**9]):
        work.advance(count)
        work.sample(float(second))
        str(work)
    assert str(work) == "merging: 50%, 5.0 GB of 10.0 GB, 1633.3 MB/s, 3 s left"
    work.sample(103.0)
    work.advance(5 * 10**9)
    work.sample(104.0)
    assert str(work) == "merging: 100%, 10.0 GB of 10.0 GB, 95.2 MB/s"
    slow = Work("comparing", 8, "models")
    for second in (0, 2, 4, 4.1, 4.2, 4.3):
        slow.advance(1)
        slow.sample(second)
        told = str(slow)
    assert told == "comparing: 75%, 6 of 8 models, 69.8 models/min, 2 s left"


def test_where_there_is_no_terminal_a_line_comes_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    shown = Display(LogOptions(), "reading the headers")
    LOG.addHandler(shown)
    monkeypatch.setattr(LOG, "level", logging.DEBUG)
    shown.tick()
    with shown.counting(Work("merging", 1000)) as work:
        work.advance(500)
        shown.tick()
        shown.tick()
        work.advance(500)
    LOG.removeHandler(shown)
    first, half, same, whole = capsys.readouterr().err.splitlines()
    assert (first, half) == ("reading the headers", "merging: 50%, 500 B of 1.0 kB")
    assert same == f"{half}, unchanged for 0 s" and whole.startswith("merging: 100%, 1.0 kB of 1.0 kB")


def test_a_line_that_was_written_is_not_repeated_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    shown = Display(LogOptions())
    LOG.addHandler(shown)
    monkeypatch.setattr(LOG, "level", logging.DEBUG)
    with shown.counting(Work("merging", 1000)) as work:
        work.advance(1000)
        shown.tick()
    LOG.removeHandler(shown)
    assert capsys.readouterr().err.splitlines() == ["merging: 100%, 1.0 kB of 1.0 kB"]


def test_seconds_are_written_as_people_read_them():
    assert [format_seconds(n) for n in (0.4, 59.6, 200, 7500)] == [
        "0 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]


def test_a_terminal_shows_in_its_bottom_line_what_goes_on_and_clears_it(family):
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hub_magmax", "run", str(write_recipe(family))],
        stdout=subprocess.DEVNULL,
        stderr=writer,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80", "TERM": "xterm"},
    )
    os.close(writer)
    shown = b""
    while select.select([reader], [], [], 120)[0]:
        try:
            shown += os.read(reader, 4096)
        except OSError:
            break
    assert process.wait(timeout=60) == 0
    os.close(reader)
    lines = re.split(r"\r\x1b\[2K|\r\n", shown.decode())
    assert any(line.startswith("… hub-magmax run, ") for line in lines)
    assert all(len(line) < 80 for line in lines if line.startswith(("…", "merging:")))
    assert lines[-1] == ""


def test_bars_of_other_libraries_stay_out_of_what_is_no_terminal(monkeypatch):
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    with display.library_bars_off(LogOptions()):
        code = (
            "import io, datasets\n"
            "from tqdm.auto import tqdm\n"
            "from huggingface_hub.utils import are_progress_bars_disabled\n"
            "assert are_progress_bars_disabled() and datasets.are_progress_bars_disabled()\n"
            "assert tqdm(range(2), file=io.StringIO()).disable"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
    assert "TQDM_DISABLE" not in os.environ


def test_processes_that_take_part_are_told_and_those_that_have_nothing_to_do(family):
    made = pipeline.plan(load_recipe(write_recipe(family, method="average", output={"shard_size": "1KB"})))
    files, start = len(made.shards), "merging 6 tensors by average, scaling 1,"
    assert files > 2
    assert told(made, Processes()) == start
    assert told(made, Processes(0, 2)) == f"{start} in 2 processes"
    more = f"(1 with nothing to do: {files} files, and more by output.shard_size)"
    assert told(made, Processes(0, files + 1)) == f"{start} in {files + 1} processes {more}"


def test_requests_that_are_sent_again_are_details(family, hub):
    hub.add_repo("me/patience", folder=family / "a")
    recipe = write_recipe(family, tasks=[{"name": "a", "model": "me/patience"}])
    for option, is_told in (("-v", True), ("--log-format=text", False)):
        hub.faults.add("/api/models/*", "status", status=503, times=1)
        code, _, err = call("plan", recipe, option)
        assert code == 0 and ("again" in err or "503" in err) == is_told
        assert "Retrying" not in err or is_told


def test_what_others_write_to_stderr_is_json_too(family, monkeypatch):
    def shout(*args, **options):
        print("one line\nand another", file=sys.stderr)
        warnings.warn("look out", UserWarning, stacklevel=1)
        raise OutputError("no room")

    monkeypatch.setattr(pipeline, "plan", shout)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = call("plan", write_recipe(family), "--log-format", "json")
    found = [(record["level"], record["message"]) for record in map(json.loads, err.splitlines())]
    assert code == 1
    assert found[:2] == [("warning", "one line"), ("warning", "and another")]
    assert found[2][0] == "warning" and found[2][1].endswith("UserWarning: look out")
    assert found[3:] == [("error", "Error: no room.")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bottom_line_makes_room_for_bars_of_other_libraries(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = Display(LogOptions(), "planning")
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))  # as while it is being imported
    shown.tick()
    assert sys.stderr.getvalue() == "\r\x1b[2K… planning, 0 s"
    shown.clear()
    before = sys.stderr.getvalue()
    bar = types.SimpleNamespace(disable=False)
    sys.modules["tqdm"].tqdm = types.SimpleNamespace(_instances=[bar])
    shown.tick()
    assert sys.stderr.getvalue() == before
    bar.disable = True
    shown.tick()
    assert sys.stderr.getvalue() == f"{before}\r\x1b[2K… planning, 0 s"


def test_a_last_line_of_others_without_line_break_is_a_record_too(capsys):
    with display.displayed(LogOptions(log_format="json")):
        sys.stderr.write("first\nand then it")
        sys.stderr.write(" died")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == [
        "first", "and then it died",
    ]  # fmt: skip
