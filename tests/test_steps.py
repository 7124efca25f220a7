"""Names of long steps: whatever takes long has its own while it lasts, and none of them outlives it."""

import json
from contextlib import contextmanager

import click
import datasets
import pytest
import transformers

from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.cli import display
from hub_magmax.cli.display import LOG, Display, LogOptions
from hub_magmax.cli.work import Work
from hub_magmax.evaluation import scoring
from hub_magmax.evaluation.evaluators.classification import ImageClassification
from hub_magmax.merging.engine import Engine
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.output import opening
from hub_magmax.reporting import card_file
from hub_magmax.text import STATE_LEVEL, step
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.test_cli import call

ROWS = {"dataset": "./rows.parquet"}

#: What takes long: owner and name of a function, and how what is shown meanwhile begins.
LONG = {
    "data": (datasets, "load_dataset", "loading the examples of ./"),
    "load": (transformers.AutoModelForImageClassification, "from_pretrained", "loading "),
    "score": (ImageClassification, "outcomes", "scoring "),
    "prepare": (scoring, "load_evaluation_data", ("preparing to score", "checking what a merge")),
    "between": (scoring, "make_score", "scoring the models"),
    "headers": (SourceCache, "read_headers", ("reading the headers", "planning from", "looking at samples")),
    "merge": (InMemoryMerger, "merge", "merging in memory by "),
    "write": (Engine, "make", "merging"),
    "open": (opening, "open_folder", "opening the merged model as its library does"),
    "card": (card_file, "render_card", "writing the card"),
}
#: Which of that each command does.
DONE = {
    "run": ("data", "load", "score", "prepare", "between", "write", "open", "card"),
    "evaluate": ("data", "load", "score", "prepare", "between"),
    "compare": ("data", "load", "score", "merge"),
    "sweep": ("data", "load", "score", "merge"),
    "lock auto": ("data", "load", "score", "merge"),
    "lock search": ("data", "load", "score", "merge"),
}


@pytest.fixture
def folder(tmp_path):
    write_classifiers(tmp_path, {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)})
    write_rows(tmp_path / "others.parquet", [0] * 5 + [2] * 3)
    return tmp_path


def seen_during(monkeypatch, *arguments):
    """Call the command line, and return by name of what takes long what was shown meanwhile."""
    seen = {name: set() for name in LONG}

    def spied(name, function):
        def call_it(*args, **options):
            # Modules that are imported meanwhile keep this function.
            if (context := click.get_current_context(silent=True)) is not None:
                seen[name].add(context.meta["hub_magmax.display"].doing)
            return function(*args, **options)

        return call_it

    for name, (owner, attribute, _) in LONG.items():
        monkeypatch.setattr(owner, attribute, spied(name, getattr(owner, attribute)))
    code, _, err = call(*arguments)
    assert code == 0, err
    return seen


@pytest.mark.parametrize("command", DONE)
def test_whatever_takes_long_is_named_while_it_lasts(folder, monkeypatch, command):
    verb, _, how = command.partition(" ")
    changes = {
        "auto": {"method": "auto", "compare": {"tune": ROWS, "methods": ["average"], "scaling": [0.5, 1.0]}},
        "search": {"preference": {"search": {"target": ROWS, "budget": 4}}},
    }.get(how, {"compare": {"tune": ROWS, "report": {"dataset": "./others.parquet"}, "methods": ["average"]}})
    values = classifier_recipe(evaluation={"tasks": {"a": ROWS, "b": ROWS}}, sweep={"budget": 5}, **changes)
    (folder / "recipe.yaml").write_text(json.dumps(values))
    if verb == "evaluate":
        assert call("merge", folder / "recipe.yaml")[0] == 0
    seen = seen_during(monkeypatch, verb, folder / "recipe.yaml")
    for name in DONE[command]:
        assert seen[name], name
        assert all(text.startswith(LONG[name][2]) for text in seen[name]), (name, seen[name])


@pytest.mark.parametrize("verb", ["compare", "sweep", "lock"])
def test_examples_are_counted_while_a_merged_model_is_scored(folder, monkeypatch, verb):
    seen = set()
    counting = Display.counting

    def spied(self, work):
        seen.add((work.doing, work.total, work.unit))
        return counting(self, work)

    monkeypatch.setattr(Display, "counting", spied)
    changes = {"compare": {"tune": ROWS, "report": {"dataset": "./others.parquet"}, "methods": ["average"]}}
    if verb == "lock":
        changes = {"method": "auto", "compare": {"tune": ROWS, "methods": ["average"], "scaling": [0.5, 1.0]}}
    values = classifier_recipe(evaluation={"tasks": {"a": ROWS, "b": ROWS}}, sweep={"budget": 5}, **changes)
    (folder / "recipe.yaml").write_text(json.dumps(values))
    assert call(verb, folder / "recipe.yaml")[0] == 0
    last = {"scoring the best of each method on other examples"}
    (whole,) = {doing for doing, _, unit in seen if unit in ("ways", "preferences")} - last
    assert whole == {"compare": "comparing", "sweep": "sweeping", "lock": "choosing the method"}[verb]
    num_examples = {"compare": {10, 8}, "sweep": {10, 20}, "lock": {10}}[verb]
    assert {total for doing, total, unit in seen if unit == "examples"} == num_examples


@contextmanager
def displayed():
    """Show records as the command line does, without the thread that looks at the clock."""
    found, before = Display(LogOptions(), "hub-magmax run"), LOG.level
    LOG.setLevel(STATE_LEVEL)
    LOG.addHandler(found)
    yield found
    LOG.removeHandler(found)
    LOG.setLevel(before)


def test_a_step_that_ended_gives_its_place_to_the_work_around_it():
    with displayed() as shown:
        with step("locking"):
            with step("loading the examples"):
                LOG.debug("opened ./lora-pack, 2 files")
                LOG.warning("look out")
                assert shown.doing == "loading the examples"
            assert shown.doing == "locking"
        assert shown.doing == "hub-magmax run"


def test_steps_of_several_threads_end_in_any_order():
    with displayed() as shown:
        first, second = step("compiling one"), step("compiling another")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert shown.doing == "compiling another"
        second.__exit__(None, None, None)
        assert shown.doing == "hub-magmax run"


def test_a_reported_step_is_written_once(capsys):
    with displayed(), step("pushing to me/x", LOG.info):
        LOG.info("something else")
    assert capsys.readouterr().err.splitlines() == ["pushing to me/x", "something else"]


def test_work_that_stands_still_makes_room_for_the_step_inside(capsys, monkeypatch):
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    with displayed() as shown, shown.counting(Work("comparing", 4, "models")) as work:
        work.advance(1)
        shown.tick()
        with step("merging in memory by ties"):
            shown.tick()
            work.advance(1)
            shown.tick()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" models")[0] for line in lines] == [
        "comparing: 25%, 1 of 4",
        "merging in memory by ties",
        "comparing: 50%, 2 of 4",
    ]


def test_of_work_that_has_not_begun_no_share_is_told_and_the_loops_that_are_compiled_are(capsys, monkeypatch):
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    with displayed() as shown, shown.counting(Work("merging", 1000)) as work:
        shown.tick()
        with step("compiling the loop merge_chunk"):
            shown.tick()
        work.advance(1000)
        shown.tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["merging", "compiling the loop merge_chunk"]
    assert [line.partition(",")[0] for line in lines[2:]] == ["merging: 100%"]
