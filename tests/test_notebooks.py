"""Results as notebooks show them: tables for pandas, HTML, and pictures."""

import csv
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pandas
import pytest

import hub_magmax as hm
from hub_magmax.analysis.candidates import Candidate
from hub_magmax.analysis.comparing import Compared, Comparison
from hub_magmax.evaluation.intervals import Difference
from hub_magmax.evaluation.tables import Measured, Table
from hub_magmax.fleet.canaries import Canary, TaskChange
from tests.drawn import draw_diagnosis, draw_score, draw_scores, draw_surface
from tests.families import accepted, write_recipe

TASKS = ("animals", "<b>vehicles</b>")
CHANGE = TaskChange("animals", 0.8, 0.7, Difference(-0.1, -0.15, -0.05, 0.01, 200, 1, 21), True)


def make_comparison() -> Comparison:
    def row(label: str, value: float, difference: Difference | None) -> Compared:
        candidate = Candidate({"name": label, "scaling": 0.5}, "uniform", (0.5, 0.5))
        return Compared(label, candidate, value, draw_score("merged", "report", value), difference)

    same = Difference(0.0, 0.0, 0.0, 1.0, 200, 0, 0)
    rows = (row("ties", 0.75, None), row("average", 0.7, CHANGE.difference), row("magmax", 0.75, same))
    base = draw_score("base_model", "report", 0.4)
    tried = tuple({"label": n, "merit": m, "is_recipe": False} for n, m in (("ties", 1.0), ("average", 0.5)))
    return Comparison("accuracy", True, 100, 200, base, rows, "ties", tried)


RESULTS = {
    "scores": replace(draw_scores(TASKS), data={task: {} for task in TASKS}),
    "comparison": make_comparison(),
    "sweep": draw_surface(TASKS, num_points=5),
    "diagnosis": draw_diagnosis(TASKS),
    "canary": Canary("me/model", "abc", "accuracy", 0.01, (CHANGE,), {}),
}


def test_a_measured_number_is_three_columns_of_a_frame():
    table = Table(("task", "n", "accuracy"), (("a", 3, Measured(0.5, 0.4, 0.6)), ("b", 4, None)))
    frame = table.to_frame()
    assert [*frame.columns] == ["task", "n", "accuracy", "accuracy low", "accuracy high"]
    assert frame.loc[0].tolist() == ["a", 3, 0.5, 0.4, 0.6]
    assert frame.loc[1].isna().tolist() == [False, False, True, True, True]
    assert frame["n"].dtype == "int64" and frame["accuracy"].dtype == "float64"


def test_names_that_csv_would_take_for_something_else_stay_names():
    frame = Table(("task", "n"), (("NA", 1), ("007", 2))).to_frame()
    assert frame["task"].tolist() == ["NA", "007"]


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
def test_results_are_frames_and_tables(result):
    frame = result.to_frame()
    assert isinstance(frame, pandas.DataFrame) and len(frame) >= 1
    page = ET.fromstring(f"<div>{result._repr_html_()}</div>")
    shape = [len(row) for row in page.iter("tr")]
    assert len(set(shape)) == 1 and len(shape) >= 2
    assert "<b>" not in result._repr_html_()


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
def test_every_column_of_csv_has_one_type_and_full_precision(result):
    head, *rows = csv.reader(io.StringIO(result.table("csv")))
    assert all(head) and len({*head}) == len(head)
    for name, cells in zip(head, zip(*rows, strict=True), strict=True):
        numbers = [is_number(cell) for cell in cells if cell]
        assert all(numbers) or not any(numbers), name
    shown = {float(cell) for row in rows for cell in row if cell and is_number(cell)}
    known = result.to_frame().select_dtypes("number").to_numpy().ravel()
    assert {value for value in known if value % 1 > 0} <= shown


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
def test_results_are_printed_as_tables_and_named_in_a_line(result):
    assert str(result) == result.table()
    name, columns = type(result).__name__, ", ".join(filter(None, result.as_table().head))
    assert re.fullmatch(rf"<{name}: \d+ rows of {re.escape(columns)}; print it to read them>", repr(result))


def test_plans_locks_and_reports_are_named_in_a_line(family):
    write_recipe(family)
    made = accepted(hm.plan(family / "recipe.yaml"))
    report = hm.merge(made, family / "out")
    assert (
        repr(made)
        == "<Plan: 6 tensors in 1 file, 11.0 kB read, 2.7 kB written; hub_magmax.explain tells all>"
    )
    assert (
        repr(made.lock) == f"<Lock: tunable_magmax of ./base, ./a, ./b and 1 more, {made.lock.digest[:19]}>"
    )
    assert re.fullmatch(
        r"<MergeReport: 673 elements merged, 11\.0 kB read, .* written in .* s>", repr(report)
    )


def test_frame_of_scores_has_every_model_on_every_task():
    scores = RESULTS["scores"]
    frame = scores.to_frame().set_index(["model", "task"])
    assert len(frame) == len(scores.scores)
    for score in scores.scores:
        found = frame.loc[(score.model, score.task)]
        assert (found["accuracy"], found["accuracy low"]) == (score.value, score.low)


def test_frame_of_a_sweep_has_every_preference():
    surface = RESULTS["sweep"]
    frame = surface.to_frame()
    assert frame["weight of animals"].tolist() == [point.weights[0] for point in surface.points]
    assert [*frame["point"][frame["on front"] == 1]] == [*surface.front]
    assert [*frame.columns] == surface.to_csv().split("\n")[0].split(",")


def test_measured_columns_of_a_frame_are_numbers_where_nothing_was_measured():
    for name in ("sweep", "comparison"):
        frame = RESULTS[name].to_frame()
        kinds = {c: str(frame[c].dtype) for c in frame if c.endswith((" low", " high", " sd"))}
        assert len(kinds) >= 3 and {*kinds.values()} == {"float64"}, name
        assert all(frame[c].isna().all() for c in kinds if c.endswith(" sd"))


@pytest.mark.parametrize("name", ["scores", "comparison", "sweep", "diagnosis"])
def test_pictures_are_shown_in_notebooks(name):
    picture = hm.picture(RESULTS[name])
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert re.search(r"<svg[^>]*>", picture.svg) and "<script" not in picture.svg
    assert hm.picture(RESULTS[name]).png == picture.png
    assert len(repr(picture)) < 200
