"""Judgement of a finished merge: counts by hand and by an oracle, what is not measured, and the page."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hub_magmax as hm
from hub_magmax.analysis.judgement_answers import parts, sentence
from hub_magmax.analysis.judgement_before import PUBLISHED_WEIGHTS
from hub_magmax.analysis.judgement_page import in_words, render_judgement
from hub_magmax.analysis.judging import Judgement, judge
from hub_magmax.analysis.merge_history import method_label
from hub_magmax.analysis.mergeability import Worth
from hub_magmax.analysis.predicting_merges import (
    Footing,
    MergePredictions,
    Prediction,
    Told,
)
from hub_magmax.evaluation.assessment import assess
from hub_magmax.evaluation.blind_spots import BlindSpots, Reached
from hub_magmax.evaluation.chains import ChainProtocol
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.scores import Scores, make_score, read_scores, write_scores
from hub_magmax.files import write_json
from hub_magmax.pipeline import run
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, read_lock
from hub_magmax.recipe.result_files import ResultFiles
from hub_magmax.reporting.card_file import write_own_card
from hub_magmax.reporting.diagnosis import verdict
from hub_magmax.reporting.pair_metrics import METRICS
from tests.browser import Page, find_browser
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.families import yaml_text
from tests.test_cli import call

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Merge classifiers of one answer each: base says dog, a says cat, b says emu, and their mean emu."""
    folder = tmp_path_factory.mktemp("judged")
    write_classifiers(folder, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    write_rows(folder / "a.parquet", [0] * 30 + [1] * 20 + [2] * 10)
    write_rows(folder / "b.parquet", [0] * 5 + [1, 1, 2, 2, 2])
    tasks = {name: {"dataset": f"./{name}.parquet"} for name in "ab"}
    evaluation = {"evaluator": "image-classification", "tasks": tasks}
    values = classifier_recipe(evaluation=evaluation, method="average", output={"path": "merged"})
    (folder / "recipe.yaml").write_text(yaml_text(values))
    run(load_recipe(folder / "recipe.yaml"))
    return folder


def judged(folder, **beside):
    recipe, locked = load_recipe(folder / "recipe.yaml"), read_lock(folder / "merged" / LOCK_NAME)
    return judge(recipe, locked, ResultFiles(folder, "recipe.")), locked


def test_counts_of_models_that_always_say_the_same_by_hand(made):
    found, locked = judged(made)
    a, b = found.broken
    assert (a.loss.task, a.loss.right_before, a.loss.flipped, a.num_of_base, a.num_won) == (
        "a",
        30,
        30,
        0,
        10,
    )
    assert (b.loss.task, b.loss.right_before, b.loss.flipped, b.num_of_base, b.num_won) == ("b", 3, 0, 0, 0)
    assert found.lost == (30, 33) and found.num_won == 10
    assert found.kept == pytest.approx((10 / 30 + 1) / 2)
    assert sentence(found, locked) == (
        "Did not merge: a keeps 33 % of its own checkpoint's score. It lost 30 of the 33 right answers that "
        "the tasks' own checkpoints give (90.9 % [76.4, 96.9]), most on a (100 %)."
    )
    assert found.verdict == "no" and [row.task for row in found.unmerged] == ["a"]
    # Its errors are of two sizes and heap up: nothing is said of the shape of their tail.
    assert found.tail is not None and found.tail.failed is not None
    assert found.tail.samples[0].num_examples == 60


def test_what_was_not_measured_is_named_with_the_command_that_would(made):
    found, locked = judged(made)
    merges, broke, worst, _, before = parts(found, locked)
    assert merges.answer.startswith("No. Accuracy is ")
    assert merges.facts == ("Not predicted: no prediction for these tasks was found.",)
    assert dict(merges.commands + before.commands) == {
        "Not measured: a prediction.": "hub-magmax predict-merge recipe.yaml --history FOLDER",
        "Not measured: metrics of pairs.": "hub-magmax diagnose recipe.yaml --metrics",
    }
    assert (
        broke.answer
        == "30 of 33 right answers of the own checkpoints are wrong now, and 10 wrong ones are right."
    )
    assert "REFUSED, by the gate of " in worst.facts[0]
    nothing = Judgement(found.tasks, found.method)
    assert sentence(nothing, locked) == "Not scored: what this merge lost is not known."
    commands = [command for part in parts(nothing, locked) for _, command in part.commands]
    assert commands.count("hub-magmax evaluate recipe.yaml") == 4
    assert "Not measured" in render_judgement(nothing, locked, "merged")
    assert nothing.to_dict()["won"] is None and nothing.to_dict()["lost"] is None
    assert nothing.verdict is None and "evaluate recipe.yaml" in in_words(nothing, locked)


def test_scores_of_base_own_checkpoint_and_merge_stand_in_one_table(made):
    found, locked = judged(made)
    merges = parts(found, locked)[0]
    assert merges.head == (
        "task",
        "base model",
        "own checkpoint",
        "merged",
        "from base",
        "from own",
        "kept of own",
    )
    a, b = merges.rows
    assert (a[:4], a[6]) == (("a", "33.3", "50.0", "16.7"), "33 %")
    assert a[4].startswith("−16.7 [−") and a[5].startswith("−33.3 [−")
    assert b[:4] == ("b", "20.0", "30.0", "30.0") and b[5:] == ("+0.0 [+0.0, +0.0]", "100 %")


@pytest.mark.parametrize(
    ("base", "own", "merged", "expected"),
    [
        ([1] * 20 + [0] * 80, [1] * 90 + [0] * 10, [1] * 89 + [0] * 11, "yes"),
        ([1] * 20 + [0] * 80, [1] * 90 + [0] * 10, [1] * 60 + [0] * 40, "in part"),
        ([1] * 50 + [0] * 50, [1] * 90 + [0] * 10, [1] * 20 + [0] * 80, "no"),
        ([1] * 50 + [0] * 50, [1] * 90 + [0] * 10, [1] * 49 + [0] * 51, "in part"),  # below by chance
        ([1] * 20 + [0] * 80, [1] * 90 + [0] * 10, [1] * 44 + [0] * 56, "no"),  # less than half is kept
        ([1] * 90 + [0] * 10, [1] * 90 + [0] * 10, [1] * 90 + [0] * 10, "yes"),
    ],
)
def test_the_verdict_by_hand(tmp_path, made, base, own, merged, expected):
    answers = {("base_model", t): base for t in "ab"} | {("own", t): own for t in "ab"}
    found, locked = with_answers(made, tmp_path, answers | {("merged", t): merged for t in "ab"})
    assert found.verdict == expected == found.to_dict()["verdict"]
    steps = [command for _, command in parts(found, locked)[3].commands]
    verbs = ("compare", "sweep", "route") if expected != "yes" else ()
    assert steps == [f"hub-magmax {verb} recipe.yaml" for verb in verbs]
    words = {"yes": "Merged well.", "in part": "Merged in part.", "no": "Did not merge: "}
    assert sentence(found, locked).startswith(words[expected])
    if expected == "no" and sum(merged) >= sum(own) / 2:
        assert "a falls below the base model (" in sentence(found, locked)


def test_a_task_that_the_preference_leaves_out_decides_no_verdict(tmp_path, made):
    bad, good = [0] * 40, [1] * 40
    answers = {(m, t): good for m in ("base_model", "own") for t in "ab"}
    found, _ = with_answers(made, tmp_path, answers | {("merged", "a"): good, ("merged", "b"): bad})
    assert found.verdict == "no"
    only_a = replace(found, assessment=assess(found.scores, {"a": 1.0, "b": 0.0}))
    assert only_a.verdict == "yes"


def test_a_task_without_a_score_of_its_own_checkpoint_leaves_the_verdict_open(tmp_path, made):
    good, bad = [1] * 40, [0] * 40
    answers = {("own", "a"): good, ("merged", "a"): good, ("merged", "b"): good}
    found, locked = with_answers(made, tmp_path, answers)
    assert found.verdict is None
    assert "hub-magmax evaluate recipe.yaml" in [command for _, command in parts(found, locked)[3].commands]
    found, _ = with_answers(made, tmp_path, answers | {("merged", "a"): bad})
    assert found.verdict == "no" and [row.task for row in found.unmerged] == ["a"]
    found, _ = with_answers(made, tmp_path, answers | {("base_model", "b"): good, ("merged", "b"): bad})
    assert found.verdict == "no" and [row.task for row in found.unmerged] == ["b"]


def test_a_checkpoint_below_the_base_model_on_its_own_task_is_to_be_looked_at(tmp_path, made):
    answers = {("base_model", t): [1, 1, 1, 1] for t in "ab"} | {("own", t): [1, 1, 0, 0] for t in "ab"}
    found, locked = with_answers(made, tmp_path, answers | {("merged", t): [1, 1, 1, 1] for t in "ab"})
    [(why, command)] = parts(found, locked)[3].commands
    assert why.startswith("a: its own checkpoint is below the base model")
    assert command == "hub-magmax diagnose recipe.yaml" and found.verdict == "yes"


def with_answers(made, folder, answers):
    """Return the judgement of the merge as if it had given these answers, and its lock."""
    locked, recipe = read_lock(made / "merged" / LOCK_NAME), load_recipe(made / "recipe.yaml")
    write_scores(scores_of(answers), folder)
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"path": str(folder)})})
    return judge(recipe, locked), locked


def test_own_checkpoints_without_a_right_answer_lose_none_and_what_was_won_is_told(tmp_path, made):
    answers = {(m, t): [0, 0, 0, 0] for m in ("base_model", "own") for t in "ab"}
    answers |= {("merged", "a"): [1, 1, 0, 0], ("merged", "b"): [0, 0, 0, 1]}
    found, locked = with_answers(made, tmp_path, answers)
    told = "The own checkpoints have no right answer; 3 wrong ones are right now."
    assert parts(found, locked)[1].answer == told
    assert sentence(found, locked).endswith(told)
    assert [row[-1] for row in parts(found, locked)[1].rows] == ["1", "2"]
    assert found.lost is None and found.to_dict()["won"] == 3


def test_scores_that_are_not_right_or_wrong_have_nothing_lost_or_won(tmp_path, made):
    answers = {(m, t): [0.5, 0.25, 0.5] for m in ("base_model", "own", "merged") for t in "ab"}
    found, locked = with_answers(made, tmp_path, answers)
    assert parts(found, locked)[1].answer.startswith("Scores are not right or wrong")
    assert "right answer" not in sentence(found, locked)
    assert found.to_dict()["won"] is None


def test_predictions_of_one_task_which_are_none_are_set_aside(tmp_path, made):
    write_json(tmp_path / "predictions.json", MergePredictions((), (), {}).to_dict())
    found = judge(load_recipe(made / "recipe.yaml"), judged(made)[1], ResultFiles(tmp_path))
    assert found.predictions is None


def test_counts_agree_with_a_plain_count_of_the_stored_answers(tmp_path, made):
    rng = np.random.default_rng(0)
    answers = {(m, t): rng.integers(0, 2, 200) for m in ("base_model", "own", "merged") for t in "ab"}
    found, _ = with_answers(made, tmp_path, answers)
    for one in found.broken:
        base, own, merged = (answers[model, one.loss.task] for model in ("base_model", "own", "merged"))
        triples = [*zip(base, own, merged, strict=True)]
        assert one.loss.flipped == sum(o == 1 and m == 0 for _, o, m in triples)
        assert one.num_of_base == sum(b == 1 and o == 1 and m == 0 for b, o, m in triples)
        assert one.num_won == sum(o == 0 and m == 1 for _, o, m in triples)
    assert found.broken[0].loss.flip_rate >= found.broken[1].loss.flip_rate
    assert [row[0] for row in found.as_table().rows] == [one.loss.task for one in found.broken]
    assert json.dumps(found.to_dict())


def scores_of(answers, **more):
    """Return scores of answers by model and task, where `own` is the task's own checkpoint."""
    made = [
        make_score(task if model == "own" else model, task, [Outcome(float(v)) for v in own], is_share=True)
        for (model, task), own in answers.items()
    ]
    values = {"metric": "accuracy", "pipeline_tag": "text-classification"} | more
    return Scores(scores=tuple(made), data={task: {"dataset": "x"} for task in "ab"}, **values)


def predictions(locked, kept, refusal="", measured=None):
    """Return predictions of a, b and their pair; two tasks are a pair and all at once."""
    label = method_label(locked.method)
    told = Told(kept, refusal)
    made = (Prediction(("a", "b"), label, measured, Told(kept, refusal), told),)
    worth = Worth(0.5, 0.06)
    return MergePredictions(made, (Footing(label, 2, 9, worth, worth, 0.0),), {})


def test_predictions_and_their_worth_are_told_whether_made_refused_or_known(tmp_path, made):
    found, locked = judged(made)
    place = tmp_path / "predictions.json"
    write_json(place, predictions(locked, 0.9).to_dict())
    beside = ResultFiles(tmp_path)
    recipe = load_recipe(made / "recipe.yaml")
    (first, *_, before), told = parts(judge(recipe, locked, beside), locked), "of its checkpoints' scores"
    assert first.facts == (f"Predicted to keep 90 % (by tasks) and 90 % (by metrics) {told}; it keeps 67 %.",)
    assert before.facts[0] == (
        "Predictions for 2 tasks, tested on 9 merges by leaving out each task in turn; r between predicted "
        "and measured, and mean error: by metrics 0.50 and 6 points; by tasks 0.50 and 6 points."
    )
    cases = {
        "Not predicted: too far.": predictions(locked, None, "too far"),
        f"{told}; it keeps 67 %. This merge itself is in the history.": predictions(
            locked, 0.9, measured=0.5
        ),
        "Not predicted: no merge by this method is in the history.": replace(
            predictions(locked, 0.9),
            predictions=(Prediction(("a", "b"), "other", None, Told(1.0), Told(1.0)),),
        ),
    }
    for expected, one in cases.items():
        assert expected in parts(replace(found, predictions=one), locked)[0].facts[0]
    other = Prediction(("x",), "", None, Told(1.0), Told(1.0))
    write_json(place, replace(predictions(locked, 0.9), predictions=(other,)).to_dict())
    of_others = judge(recipe, locked, beside)
    assert of_others.predictions is None
    told = parts(of_others, locked)[0].facts
    assert told == ("Not predicted: no prediction for these tasks was found.",)
    place.write_text("{}")
    with pytest.raises(hm.HubMagmaxError, match="not a prediction of this version"):
        judge(recipe, locked, beside)


@pytest.mark.parametrize(
    ("measured", "kept", "expected"),
    [
        ((0.9, 0.76, 0.8), None, "Among the 3 pairs merged by themselves, a and c kept least: 76 %."),
        (
            (0.9, None, 0.8),
            0.7,
            "Among the 3 pairs measured or predicted, a and c are predicted to keep least: "
            "70 % by metrics and 70 % by tasks.",
        ),
        ((None, 0.76, None), None, "Only one pair is measured or predicted: a and c kept 76 %."),
        (
            (None, None, None),
            0.7,
            "Among the 3 pairs, a and b are predicted to keep least: 70 % by metrics and 70 % by tasks.",
        ),
    ],
)
def test_the_pair_that_keeps_least_is_told_with_how_it_is_known(made, measured, kept, expected):
    found, locked = judged(made)
    pairs = zip([("a", "b"), ("a", "c"), ("b", "c")], measured, strict=True)
    told = Told(kept, "" if kept else "too few")
    of_pairs = tuple(Prediction(pair, found.method, value, told, told) for pair, value in pairs)
    of_three = replace(found, tasks=("a", "b", "c"), predictions=MergePredictions(of_pairs, (), {}))
    assert expected in parts(of_three, locked)[-1].facts


def test_a_diagnosis_is_told_where_it_names_checkpoints_to_look_at(made):
    found, locked = judged(made)
    for suspects, told in ((("a",), ["Diagnosis: Do not merge before looking at a."]), ((), [])):
        diagnosis = SimpleNamespace(suspects=suspects, verdict=verdict(suspects, notes=True), metrics=None)
        facts = parts(replace(found, diagnosis=diagnosis), locked)[-1].facts
        assert [*facts] == told


def test_blind_spots_of_language_models_are_told_or_named_as_not_measured(made):
    _, locked = judged(made)
    answers = {(m, t): [1, 0, 1, 1] for m in ("base_model", "own", "merged") for t in "ab"}
    scores = scores_of(answers, pipeline_tag="text-generation")
    found, _ = judged(made)
    found = replace(found, scores=scores, assessment=assess(scores, locked.preference.shares))
    blind = {"Not measured: blind spots.": "hub-magmax blindspots recipe.yaml"}
    assert dict(parts(found, locked)[1].commands) == blind
    before = Reached("a", "a", 0, 2, {"greedy": "100", "zero": "-00"}, ("110",), ("--0",))
    after = Reached("merged", "a", 0, 2, {"greedy": "100", "zero": "-00"}, ("000",), ("000",))
    spots = BlindSpots((before, after), ChainProtocol(grafts=("zero",)))
    facts = parts(replace(found, blind_spots=spots), locked)[1].facts
    assert "a: of 2 items that samples solved, 1 are left to grafts and 1 to nothing; 0 by chance." in facts


def test_published_weights_are_those_that_the_benchmark_read():
    stored = json.loads((RESULTS / "mergeability.json").read_text())["stored"]["v4"]["weights"]
    names = {metric.name for metric in METRICS}
    for one in PUBLISHED_WEIGHTS:
        weight, num_methods = stored[one.metric.removesuffix("_as_published")]
        assert (one.weight, one.num_methods) == (round(weight, 3), num_methods) and one.metric in names


def test_the_verb_writes_a_page_that_the_card_links_as_long_as_it_is_of_its_scores(made):
    recipe = made / "recipe.yaml"
    assert call("diagnose", recipe, "--metrics", "--rank", "2", "--examples", "2")[0] == 0
    code, out, _ = call("card", recipe, "--judgement")
    assert code == 0 and out.startswith(
        "Did not merge: a keeps 33 % of its own checkpoint's score. It lost 30"
    )
    assert "How bad is the worst? Worst task: a, " in out
    assert "Try every method and scaling on these examples: hub-magmax compare recipe.yaml" in out
    page = (made / "merged" / "judgement.html").read_text()
    assert "published distance of gradients" in page and "overlap of directions" in page
    assert str(made) not in page and "a.parquet" in page
    card = (made / "merged" / "README.md").read_text()
    assert "[judgement.html](judgement.html)" in card
    assert "Metrics of pairs of task vectors" in card and "| task\\_vector\\_l2\\_distance |" in card
    values = json.loads(call("card", recipe, "--judgement", "--json")[1])
    assert values["lost"]["count"] == 30 and values["tail"]["claimed"] is False
    assert call("card", recipe, "--judgement")[0] == 0
    scores = read_scores(made / "merged")
    (made / "merged" / "judgement.html").write_text(page.replace(scores.digest, "of before"))
    assert "judgement.html" not in write_own_card(made / "merged").read_text()


def test_the_page_fits_a_laptop_a_phone_and_one_sheet_of_paper(tmp_path, made):
    if (program := find_browser()) is None:
        pytest.skip("no browser: install chromium to test the page that people open")
    found, locked = judged(made)
    names = [f"a-task-with-a-long-name-{n}" for n in range(20)]
    rows = [replace(found.broken[0], loss=replace(found.broken[0].loss, task=name)) for name in names]
    path = tmp_path / "judgement.html"
    path.write_text(render_judgement(replace(found, broken=tuple(rows)), locked, "merged <b>"))
    browser = Page(program, tmp_path / "profile")
    try:
        for width in (1280, 390):
            browser.open(path, width=width)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.querySelector('h1').textContent") == "merged <b>"
        printed = browser.call("Page.printToPDF", preferCSSPageSize=True)["data"]
        assert browser.complaints == [] and browser.requests == [path.as_uri()] * 2
    finally:
        browser.close()
    assert num_pages(printed) == 1
    assert "12 other tasks lost less" in path.read_text()


def num_pages(pdf):
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", base64.b64decode(pdf)))


def test_the_documentation_shows_what_the_benchmark_stored():
    from benchmarks import judgement

    text = judgement.PAGE.read_text(encoding="utf-8")
    found = json.loads(judgement.RESULTS.read_text(encoding="utf-8"))
    parts = {"predicted": judgement.predicted(found["prediction"]), "measured": judgement.section(found)}
    for name, lines in parts.items():
        start, end = judgement.START.format(name), judgement.END.format(name)
        shown = text[text.index(start) + len(start) : text.index(end)]
        assert shown.strip() == "\n".join(lines).strip()
