"""Tables as text, Markdown, CSV and LaTeX: the same cells, escaped for each."""

import csv
import io
from dataclasses import replace

import pytest

from hub_magmax.evaluation.scores import Score, Scores
from hub_magmax.evaluation.tables import FORMATS, Measured, Shown, Table

TABLE = Table(
    ("method", "tuned", "accuracy"),
    (("a|b_1 & 50 %", 0.5, Measured(0.8125, 0.7, 0.9, 0.01)), ("base", None, Measured(0.5, 0.4, 0.6))),
    notes=("higher is better, 100 %",),
    is_drawn=True,
    lead=("best: <a|b_1>",),
)


def test_text_is_aligned():
    assert TABLE.write("text").split("\n") == [
        "best: <a|b_1>",
        "",
        "method        tuned                      accuracy",
        "a|b_1 & 50 %  0.500  0.812 ± 0.010 [0.700, 0.900]",
        "base              -          0.500 [0.400, 0.600]",
        "",
        "higher is better, 100 %",
    ]


def test_markdown_takes_no_name_for_a_column_or_a_tag():
    lines = TABLE.write("markdown").split("\n")
    assert lines[0] == "best: \\<a\\|b\\_1\\>"
    assert lines[2:5] == [
        "| method | tuned | accuracy |",
        "| :--- | ---: | ---: |",
        "| a\\|b\\_1 \\& 50 % | 0.500 | 0.812 ± 0.010 [0.700, 0.900] |",
    ]


def test_csv_has_every_number_in_a_column_of_its_own():
    rows = list(csv.DictReader(io.StringIO(TABLE.write("csv"))))
    assert rows[0] == {
        "method": "a|b_1 & 50 %", "tuned": "0.5",
        "accuracy": "0.8125", "accuracy low": "0.7", "accuracy high": "0.9", "accuracy sd": "0.01",
    }  # fmt: skip
    assert rows[1]["tuned"] == "" and rows[1]["accuracy sd"] == ""
    assert len(rows) == 2


def test_csv_has_a_column_of_deviations_by_what_the_table_may_hold_and_not_by_its_rows():
    table = Table(("n",), ((Measured(1.0, 0.0, 2.0),),))
    assert table.write("csv").split("\n")[0] == "n,n low,n high"
    drawn = replace(table, is_drawn=True)
    assert drawn.write("csv").split("\n") == ["n,n low,n high,n sd", "1.0,0.0,2.0,"]
    assert [*drawn.to_frame().columns] == ["n", "n low", "n high", "n sd"]


def test_people_read_a_text_and_programs_the_value():
    shown = Shown(Measured(1 / 3, 0.25, 0.5), "+0.333")
    table = Table(
        ("n", "p"), ((shown, Shown(None, "none")), (Shown(None, "the winner"), Shown(1 / 3, "0.3")))
    )
    assert [line.split() for line in table.write().split("\n")] == [
        ["n", "p"], ["+0.333", "none"], ["the", "winner", "0.3"],
    ]  # fmt: skip
    rows = [[repr(1 / 3), "0.25", "0.5", ""], ["", "", "", repr(1 / 3)]]
    assert [*csv.reader(io.StringIO(table.write("csv")))] == [["n", "n low", "n high", "p"], *rows]
    assert table.to_frame()["p"].dtype == "float64"


def test_latex_takes_no_name_for_a_command():
    lines = TABLE.write("latex").split("\n")
    assert lines[0] == "\\begin{tabular}{lrr}"
    assert "a\\textbar{}b\\_1 \\& 50 \\% & 0.500 & 0.812 $\\pm$ 0.010 [0.700, 0.900] \\\\" in lines
    assert lines[-3] == "\\end{tabular}" and lines[-1] == "% higher is better, 100 %"


@pytest.mark.parametrize("form", FORMATS)
def test_a_line_break_in_a_name_does_not_break_a_row(form):
    table = Table(("name", "n"), (("two\nlines", 1),))
    written = table.write(form)
    rows = list(csv.reader(io.StringIO(written))) if form == "csv" else written.split("\n")
    assert len(rows) == {"text": 2, "markdown": 3, "csv": 2, "latex": 7}[form]


def make_scores(num_tasks):
    tasks = [f"task-{number}" for number in range(num_tasks)]
    models = ["base_model", *tasks, "merged", "merged:int4"]
    found = [Score(m, t, 0.25, 0.2, 0.3, 20) for m in models for t in tasks]
    return Scores("accuracy", "image-classification", tuple(found), {task: {} for task in tasks})


def test_many_tasks_are_the_rows_of_the_table():
    few, many = make_scores(8).table(), make_scores(40).table()
    assert few.split("\n")[0].split() == ["accuracy", *(f"task-{number}" for number in range(8))]
    assert many.split("\n")[0].split("  ")[0] == "task" and max(map(len, many.split("\n"))) <= 120
    assert len(many.split("\n")) == 40 + 3


def test_csv_of_scores_has_a_line_for_every_model_and_task():
    rows = list(csv.DictReader(io.StringIO(make_scores(3).table("csv"))))
    assert len(rows) == 6 * 3
    assert rows[0] == {
        "model": "base_model", "task": "task-0", "examples": "20",
        "accuracy": "0.25", "accuracy low": "0.2", "accuracy high": "0.3",
    }  # fmt: skip
