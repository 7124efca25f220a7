"""Samples of scores from files and from merges, and the verb that compares them."""

from __future__ import annotations

import json

import pytest

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.scores import MERGED, Scores, make_score, write_scores
from hub_magmax.evaluation.tail_samples import read_sample
from tests.test_cli import call


def _write(path, values, head="loss"):
    path.write_text("\n".join([head, *(str(value) for value in values)]))
    return str(path)


def _merge(folder, losses, tasks=("animals",), examples=""):
    """Write scores of a merge that loses as much on each example of each task."""
    folder.mkdir()
    scores = []
    for task in tasks:
        own = [Outcome(1.0, 0.9) for _ in losses]
        merged = [Outcome(1.0, 0.9 - loss) for loss in losses]
        scores += [
            make_score(task, task, own, is_share=True),
            make_score(MERGED, task, merged, is_share=True),
        ]
    data = {task: {"fingerprint": examples} for task in tasks}
    write_scores(Scores("accuracy", "text-classification", tuple(scores), data), folder)
    return str(folder)


def test_column_of_a_file(tmp_path):
    sample = read_sample(_write(tmp_path / "a.csv", [1, 2.5, -3]))
    assert sample.values.tolist() == [1, 2.5, -3]
    assert sample.bounds is None


def test_losses_of_a_merge_are_against_the_own_checkpoint(tmp_path):
    sample = read_sample(_merge(tmp_path / "merged", [0.1, 0.2, 0.0]), "animals")
    assert sample.values == pytest.approx([0.1, 0.2, 0.0])
    assert sample.bounds == (-1, 1)


def test_task_of_a_merge_is_asked_for_where_there_are_several(tmp_path):
    folder = _merge(tmp_path / "merged", [0.1], tasks=("animals", "plants"))
    with pytest.raises(EvaluationError, match=r"several tasks.*animals, plants.*--column"):
        read_sample(folder)
    with pytest.raises(EvaluationError, match=r"no scores of 'cars'.*animals, plants"):
        read_sample(folder, "cars")


@pytest.mark.parametrize("values", [["a", "b"], ["1", "two"]])
def test_words_are_no_scores(tmp_path, values):
    with pytest.raises(EvaluationError, match="no numbers"):
        read_sample(_write(tmp_path / "a.csv", values))


def test_blank_line_is_refused_since_later_lines_would_be_of_other_examples(tmp_path):
    with pytest.raises(EvaluationError, match="line 4 is blank"):
        read_sample(_write(tmp_path / "a.csv", [1, 2, "", 3]))
    assert (
        read_sample(_write(tmp_path / "b.csv", ["1,a", '2,"x\n\ny"'], head="loss,text"), "loss").values.size
        == 2
    )


def test_file_without_a_head_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="names no column"):
        read_sample(_write(tmp_path / "a.csv", [1, 2, 3], head="0.5"))


def test_verb_tells_and_refuses(tmp_path):
    one = _write(tmp_path / "one.csv", range(40))
    other = _write(tmp_path / "other.csv", range(0, 80, 2))
    code, out, _ = call("tails", one, other)
    assert code == 0
    assert "REFUSED, by the gate of equivalent means" in out
    code, out, _ = call("tails", one, other, "--json", "--lower", "--margins", "50", "50")
    assert code == 0
    values = json.loads(out)
    assert values["refused_by"] == "number of exceedances", values["verdict"]
    assert [own["mean"] for own in values["samples"]] == [-19.5, -39]


def test_verb_compares_merges(tmp_path):
    losses = [n / 100 for n in range(40)]
    one, other = (_merge(tmp_path / name, losses) for name in ("one", "other"))
    code, out, _ = call("tails", one, other, "--column", "animals", "--paired")
    assert code == 0
    assert "equivalent means: passed" in out


def test_merges_that_were_scored_on_different_examples_are_no_pairs(tmp_path):
    losses = [n / 100 for n in range(40)]
    one, other = (_merge(tmp_path / name, losses, examples=name) for name in ("one", "other"))
    code, _, err = call("tails", one, other, "--paired")
    assert code == 1
    assert "different examples" in err
    assert call("tails", one, other)[0] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("one.csv", "none.csv"), "no such file"),
        (("one.csv", "two.csv"), "several columns"),
        (("one.csv", "two.csv", "--column", "x"), "no column 'x'"),
        (("one.csv", "short.csv"), "there are 3 scores"),
        (("one.csv", "gap.csv", "--column", "loss"), "score 1 is nan"),
        (("one.csv", "one.csv", "--bounds", "0", "1"), "reach from 0 to 39"),
        (("one.csv", "one.csv", "--margins", "0", "1"), "mean_margin is 0"),
    ],
)
def test_errors_are_told_in_a_line(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "one.csv", range(40))
    _write(tmp_path / "two.csv", [f"{n},{n}" for n in range(40)], head="a,b")
    _write(tmp_path / "short.csv", range(3))
    _write(tmp_path / "gap.csv", [f"{n}," if n != 1 else ",b" for n in range(40)], head="loss,b")
    code, _, err = call("tails", *words)
    assert code == 1
    assert told in err
    assert "Traceback" not in err
