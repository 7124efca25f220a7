"""Cards say what was measured, and nothing that other people wrote can act in them."""

import ast
import functools
import json
import re
import subprocess
import sys
import unicodedata
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt
from pydantic import TypeAdapter

from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.evaluators import Outcome, described_inputs, make_evaluator
from hub_magmax.evaluation.evaluators.prompts import describe_joint
from hub_magmax.evaluation.intervals import NUM_RESAMPLES, paired_difference, wilson_interval
from hub_magmax.evaluation.scores import Score, Scores, make_score
from hub_magmax.evaluation.tails import LEVELS, MIN_TAIL_EXAMPLES
from hub_magmax.merging.output.report import MergeReport, ShardRecord
from hub_magmax.methods import get_method, method_names
from hub_magmax.planning.findings.faults import THRESHOLDS
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import Lock, LockedFile, LockedSource, ResolvedPreference
from hub_magmax.recipe.values import Data
from hub_magmax.reporting import card_template
from hub_magmax.reporting.card import Beside, render_card
from hub_magmax.reporting.diagnosis import Diagnosis
from hub_magmax.reporting.diagnosis_groups import make_group
from hub_magmax.reporting.score_formats import Unit
from hub_magmax.text import is_invisible
from tests.local_hub.metadata import validate
from tests.test_evaluation_tails import cvar

PARSER = MarkdownIt("commonmark").enable("table")

WEIGHTS = {"animals": 0.7, "plants": 0.3}
BASE_COMMIT, ANIMALS_COMMIT, PLANTS_COMMIT = "a" * 40, "b" * 40, "c" * 40

#: Per task and model: value, low, high, number of examples.
MEASURED = {
    ("animals", "base_model"): (0.125, 0.101, 0.152, 640),
    ("animals", "animals"): (0.953, 0.934, 0.967, 640),
    ("animals", "plants"): (0.211, 0.181, 0.244, 640),
    ("animals", "merged"): (0.902, 0.876, 0.922, 640),
    ("plants", "base_model"): (0.333, 0.281, 0.390, 288),
    ("plants", "animals"): (0.301, 0.251, 0.356, 288),
    ("plants", "plants"): (0.875, 0.832, 0.908, 288),
    ("plants", "merged"): (0.604, 0.547, 0.659, 288),
}


def make_recipe(**changes):
    values = {
        "base_model": "org/base",
        "tasks": [{"name": "animals", "model": "org/seq@one"}, {"name": "plants", "model": "org/seq@two"}],
        "method": {"name": "tunable_magmax", "scaling": 0.5},
        "preference": {"weights": WEIGHTS},
        "evaluation": {"tasks": {"animals": {"dataset": "org/photos"}, "plants": {"dataset": "./plants"}}},
        "output": {"path": "merged", "push_to_hub": "me/merged"},
        "seed": 11,
    }
    return parse_recipe(values | changes)


def make_source(reference="org/base", repo_id="org/base", commit=BASE_COMMIT, license="mit"):
    file = LockedFile("model.safetensors", 1234, "d" * 64, "e" * 64)
    return LockedSource(reference, "hub" if repo_id else "local", repo_id, commit, (file,), license)


def make_local(reference, license="mit"):
    return make_source(reference, None, None, license)


def make_lock(**changes):
    lock = Lock(
        base_model=make_source(),
        tasks={
            "animals": make_source("org/seq@one", "org/seq", ANIMALS_COMMIT),
            "plants": make_source("org/seq@two", "org/seq", PLANTS_COMMIT, "apache-2.0"),
        },
        method={"name": "tunable_magmax", "scaling": 0.5, "selection": "algorithm-1", "scope": "tensor"},
        preference=ResolvedPreference(WEIGHTS, "weights"),
        tensors=(),
        seed=11,
    )
    return replace(lock, **changes)


def make_report(**changes):
    report = MergeReport(
        plan_digest="sha256:" + "f" * 64,
        shards=(ShardRecord("model.safetensors", 4_321_000, "9" * 64, (7, 3)),),
        shares={"animals": 0.6875, "plants": 0.3125},
        num_unaligned={},
        duality_gap=None,
        elements_merged=1_080_000,
        bytes_in=12_960_000,
        bytes_out=4_321_000,
        seconds=12.34,
        peak_memory_bytes=512_000_000,
        versions={"python": "3.11.7", "hub_magmax": "0.1.0"},
    )
    return replace(report, **changes)


def make_scores(measured=MEASURED, **changes):
    scores = Scores(
        metric="accuracy",
        pipeline_tag="image-classification",
        scores=tuple(Score(model, task, *values) for (task, model), values in measured.items()),
        data={
            "animals": {"dataset": "org/photos", "split": "test", "revision": "v2", "examples": 640},
            "plants": {"dataset": "./plants", "config": "small", "split": "test[:288]", "examples": 288},
        },
    )
    return replace(scores, **changes)


def make_card(recipe=None, lock=None, report=None, scores="measured", **beside):
    measured = make_scores() if scores == "measured" else scores
    facts = recipe or make_recipe(), lock or make_lock(), report or make_report(), measured
    return render_card(*facts, **beside)


def cells(card, first):
    """Return the cells of the table row that starts with `first`."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def metadata(card):
    return ModelCard(card).data.to_dict()


def block(card, language):
    """Return the text of the first code block in `language`."""
    tokens = PARSER.parse(card)
    return next(token.content for token in tokens if token.type == "fence" and token.info == language)


def skeleton(card):
    """Return the structure of a card's text: kinds of blocks and what is inside them, without the words."""
    text = ModelCard(card).text
    return [
        (token.type, token.tag, [child.type for child in token.children or []])
        for token in PARSER.parse(text)
    ]


def test_a_row_of_the_table_holds_what_was_measured():
    assert cells(make_card(), "`animals`") == [
        "`animals`",
        "0.7",
        "0.6875",
        "12.5 [10.1, 15.2]",
        "95.3 [93.4, 96.7]",
        "90.2 [87.6, 92.2]",
        "−5.1",
        "+77.7",
    ]


def first_lines(card):
    """Return the paragraphs between the title and the first section, without the picture."""
    top = ModelCard(card).text.split("\n## ")[0]
    return [part for part in top.strip().split("\n\n")[1:] if not part.startswith("![")]


LLAMA = replace(make_source(), architectures=("LlamaForCausalLM",))


def test_the_first_lines_say_what_it_is_what_it_is_made_of_and_how_it_does():
    card = make_card(
        lock=make_lock(base_model=LLAMA),
        report=make_report(parameters={"BF16": 403_000, "I64": 296}),
        scores=make_scores(pipeline_tag="text-generation"),
    )
    # .7 · .902 + .3 · .604, and so on; .902 of .953 and .604 of .875.
    assert first_lines(card) == [
        "**A model for text generation**: `LlamaForCausalLM`, 403,000 parameters in bfloat16.",
        "Merged from 2 checkpoints fine-tuned from `org/base@aaaaaaa`, by `tunable_magmax` for the "
        "preference `animals` 0.7 and `plants` 0.3.",
        "`accuracy` is 81.3 % weighted by the preference, against 18.7 % for the base model and 93.0 % for "
        "each task's own checkpoint; it keeps 82 % of the own checkpoints' scores on average, and 69 % on "
        "the worst task, `plants` (87.5 % → 60.4 %).",
    ]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (999_999, "999,999"),
        (7_241_732_096, "7.24 billion"),
        (1_000_000, "1 million"),
        (2 * 10**12, "2 trillion"),
    ],
)
def test_large_models_have_their_size_in_words(count, words):
    card = make_card(report=make_report(parameters={"F32": count}))
    assert f"{words} parameters in float32." in first_lines(card)[0]


def test_being_below_the_base_model_is_said_first():
    worse = {("animals", "merged"): (0.1, 0.08, 0.12, 640), ("plants", "merged"): (0.303, 0.25, 0.36, 288)}
    line = first_lines(make_card(scores=make_scores(MEASURED | worse)))[2]
    # .7 · .1 + .3 · .303 = .1609, against .1874.
    assert line.startswith(
        "**Below its base model on average (16.1 % against 18.7 %) and on all 2 tasks, most on `plants` "
        "(33.3 % → 30.3 %).** `accuracy` is 16.1 % weighted by the preference"
    )
    one = {("plants", "merged"): (0.303, 0.25, 0.36, 288)}
    line = first_lines(make_card(scores=make_scores(MEASURED | one)))[2]
    assert line.startswith(
        "**Below its base model on 1 of 2 tasks, `plants` (33.3 % → 30.3 %).** `accuracy` is"
    )


def test_one_task_is_told_without_counting():
    measured = {key: value for key, value in MEASURED.items() if key[0] == "plants"}
    measured[("plants", "merged")] = (0.303, 0.25, 0.36, 288)
    lock = make_lock(
        tasks={"plants": make_source()}, preference=ResolvedPreference({"plants": 1.0}, "uniform")
    )
    assert first_lines(make_card(lock=lock, scores=make_scores(measured)))[1:] == [
        "Merged from one checkpoint fine-tuned from `org/base@aaaaaaa`, by `tunable_magmax` for the "
        "preference `plants` 1.",
        "**Below its base model on `plants` (33.3 % → 30.3 %).** `accuracy` is 30.3 % on average over 1 "
        "task, against 33.3 % for the base model and 87.5 % for each task's own checkpoint; it keeps 35 % of "
        "its own checkpoint's score on `plants` (87.5 % → 30.3 %).",
    ]


@pytest.mark.parametrize("count", [1, 5, 20, 40, 255])
def test_the_first_lines_stay_short_whatever_the_tasks(count):
    names = [f"{'a-long-name-of-a-task-' * 2}{number:03}" for number in range(count)]
    lock = make_lock(
        tasks=dict.fromkeys(names, make_source()),
        preference=ResolvedPreference(dict.fromkeys(names, 1 / count), "weights"),
    )
    measured = {
        (name, model): (value, 0.1, 0.9, 10)
        for name in names
        for model, value in (("base_model", 0.5), (name, 0.9), ("merged", 0.4))
    }
    card = make_card(lock=lock, scores=make_scores(measured))
    assert all(len(line) < 480 for line in first_lines(card))
    assert ModelCard(card).text.count("\n") < 150 + 5 * min(count, 100)


def test_means_are_weighted_by_the_preference():
    card = make_card()
    # .7 · .902 + .3 · .604, and so on; the checkpoint for animals alone beats that for plants.
    assert cells(card, "merged")[1] == "81.3"
    assert cells(card, "base model")[1] == "18.7"
    assert cells(card, "each task by its own checkpoint")[1] == "93.0"
    assert cells(card, "best single checkpoint, `animals`")[1] == "75.7"


def test_a_card_without_scores_says_that_nothing_was_evaluated():
    card = make_card(scores=None)
    assert first_lines(card)[2] == "Not evaluated: how well it does any task is not known."
    assert card.count("valuated") == 1
    assert not any(
        word in card for word in ("interval", "Wilson", "own checkpoint", "not measured", "canary")
    )
    assert cells(card, "`animals`") == ["`animals`", "0.7", "0.6875"]
    assert not {"model-index", "pipeline_tag"} & metadata(card).keys()


def test_what_is_missing_is_shown_as_a_dash_and_named():
    measured = {key: value for key, value in MEASURED.items() if key != ("plants", "plants")}
    card = make_card(scores=make_scores(measured))
    assert cells(card, "`plants`")[4] == "—" and cells(card, "`plants`")[6] == "—"
    assert "- `plants`: its own checkpoint." in card
    assert "each task by its own checkpoint |" not in card


def test_without_own_checkpoints_the_cost_is_told_from_the_base_model():
    measured = {
        (task, model): v for (task, model), v in MEASURED.items() if model in ("base_model", "merged")
    }
    assert first_lines(make_card(scores=make_scores(measured)))[2] == (
        "`accuracy` is 81.3 % weighted by the preference, against 18.7 % for the base model."
    )


def test_with_the_merged_model_alone_its_mean_is_told():
    measured = {key: value for key, value in MEASURED.items() if key[1] == "merged"}
    assert "`accuracy` is 81.3 % weighted by the preference." in make_card(scores=make_scores(measured))


def test_methods_that_mix_values_have_no_share_of_elements():
    card = make_card(report=make_report(shares={}))
    assert "share of elements" not in card and cells(card, "`animals`")[2] == "12.5 [10.1, 15.2]"


def with_outcomes(**outcomes):
    """Return scores of `animals`, each model's from its single outcomes."""
    kept = tuple(
        make_score(model, "animals", [Outcome(float(value)) for value in values], is_share=True)
        for model, values in outcomes.items()
    )
    return make_scores(scores=kept)


OUTCOMES = {"base_model": [0, 0, 1, 0] * 25, "animals": [1, 1, 1, 1] * 25, "merged": [1, 1, 1, 0] * 25}


def test_differences_have_the_interval_of_the_paired_comparison():
    row = cells(make_card(scores=with_outcomes(**OUTCOMES)), "`animals`")
    own = paired_difference(OUTCOMES["merged"], OUTCOMES["animals"])
    assert row[6] == f"−25.0 [−{-100 * own.low:.1f}, −{-100 * own.high:.1f}]"
    # The merged model is right wherever the base model is, so the interval of the gain stays above zero.
    assert row[7].startswith("+50.0 [+") and "−" not in row[7]


def test_where_nothing_differs_the_card_says_so_and_shows_no_interval():
    row = cells(make_card(scores=with_outcomes(**OUTCOMES | {"merged": OUTCOMES["animals"]})), "`animals`")
    assert row[6] == "+0.0 (identical answers)" and "[" in row[7]
    # As many gained as lost is no difference in the mean, and not the same answers.
    swapped = {"merged": [1, 0] * 50, "animals": [0, 1] * 50}
    row = cells(make_card(scores=with_outcomes(**OUTCOMES | swapped)), "`animals`")
    assert row[6].startswith("+0.0 [−")


def test_elements_of_no_task_are_told_apart():
    card = make_card(report=replace(make_report(), unchanged=0.375))
    assert "Of the merged elements 37.5 % are in tensors that no task changes" in card
    assert "that no task changes" not in make_card()


def test_a_checkpoint_below_the_base_model_is_said_in_the_headline():
    def card(*own):
        tasks = ("animals", "plants")
        kept = [
            make_score(model, task, [Outcome(float(n < right)) for n in range(100)], is_share=True)
            for task, value in zip(tasks, own, strict=True)
            for model, right in (("base_model", 60), (task, value), ("merged", 70))
        ]
        return make_card(scores=make_scores(scores=tuple(kept)))

    one = "The own checkpoint of `plants` is itself below the base model there (60.0 % → 50.0 %)."
    assert one in card(80, 50).split("##")[0]
    both = "The own checkpoints of 2 tasks are themselves below the base model there, most that of `animals`"
    assert f"{both} (60.0 % → 40.0 %)." in card(40, 50).split("##")[0]
    assert "below the base model there" not in card(80, 60)


def test_the_card_says_how_differences_were_compared():
    assert "A difference has no interval here" in make_card()
    card = make_card(scores=with_outcomes(**OUTCOMES))
    assert "A difference has no interval here" not in card
    assert "2,000 bootstrap resamples" in card


@pytest.mark.parametrize("model", OUTCOMES)
def test_every_single_outcome_reaches_the_card(model):
    changed = OUTCOMES | {model: [1 - OUTCOMES[model][0], *OUTCOMES[model][1:]]}
    rows = [cells(make_card(scores=with_outcomes(**o)), "`animals`") for o in (OUTCOMES, changed)]
    assert rows[0] != rows[1]


def test_scores_that_are_no_shares_are_not_shown_in_per_cent():
    measured = {("animals", model): (*v, 64) for model, v in {
        "base_model": (-3.25, -3.5, -3.0), "animals": (-1.5, -1.75, -1.25), "merged": (-2.0, -2.25, -1.75),
    }.items()}  # fmt: skip
    card = make_card(
        scores=make_scores(measured, metric="log-likelihood", is_share=False, unit="nats per token")
    )
    assert cells(card, "`animals`")[3:8] == [
        "−3.25 [−3.5, −3]",
        "−1.5 [−1.75, −1.25]",
        "−2 [−2.25, −1.75]",
        "−0.5",
        "+1.25",
    ]
    assert (
        "`log-likelihood` is −2 on average over 1 task, against −3.25 for the base model and −1.5 for each "
        "task's own checkpoint; furthest behind its own checkpoint on `animals` (−1.5 → −2)."
    ) in card
    assert "Values are `log-likelihood` in nats per token (higher is better), with" in card
    assert "(Student's t)" in card and "Wilson" not in card
    assert "per cent" not in card and " points" not in card and "Below" not in card


def with_probabilities(models, is_share=True):
    """Return scores of `animals`, right where the probability is above a half."""
    kept = [
        make_score(model, "animals", [Outcome(float(p > 0.5), p) for p in values], is_share=is_share)
        for model, values in models.items()
    ]
    return make_scores(scores=tuple(kept))


SURE = [0.9 + 0.0001 * number for number in range(100)]
SHAKY = [0.05, 0.2, *(p - 0.01 * (n % 7) for n, p in enumerate(SURE[2:]))]


def test_the_tails_are_told_by_task_and_by_bits():
    models = {"animals": SURE, "merged": SHAKY, "merged:int4": [0.1, *SHAKY[1:]], "merged:int3": SURE}
    card = make_card(scores=with_probabilities(models))
    section = card.split("## What the averages hide")[1].split("\n## ")[0]
    own, int4, int3 = (
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if "`animals`" in line
    )
    low, high = (100 * bound for bound in wilson_interval(2, 100))
    assert own[1] == f"2 of 100: 2.0 % [{low:.1f}, {high:.1f}]"
    assert own[2].startswith(f"{100 * cvar(np.subtract(SURE, SHAKY), 0.9):.1f} [")
    assert own[3].startswith(f"{100 * cvar(np.subtract(SURE, SHAKY), 0.95):.1f} [")
    assert own[4] == "—"
    assert own[5].startswith("0 (0.9 → 0.05), 1 (0.9 → 0.2), ")
    assert int4[:3] == ["`int4`", "`animals`", "+0.0 (identical answers)"]
    assert int3[:3] == ["`int3`", "`animals`", int3[2]] and int3[2].startswith("+2.0 [")
    assert int3[3] == f"0 of 98: 0.0 % [0.0, {100 * wilson_interval(0, 98)[1]:.1f}]"


def test_without_single_outcomes_no_tail_is_told():
    assert "averages hide" not in make_card()


def guarded_card(lost, margin):
    """Return a card whose guard has a hundred examples, of which the merged model loses some."""
    models = {"base_model": [1.0] * 100, "merged": [0.0] * lost + [1.0] * (100 - lost)}
    kept = [
        make_score(model, "general", [Outcome(v) for v in values], is_share=True)
        for model, values in models.items()
    ]
    spec = {"tasks": {}, "guard": {"general": {"dataset": "org/general"}}, "margin": margin}
    return make_card(recipe=make_recipe(evaluation=spec), scores=make_scores(scores=tuple(kept)))


@pytest.mark.parametrize(
    ("lost", "margin", "verdict"),
    [(0, 0.01, "held"), (8, 0.1, "not shown"), (8, 0.05, "regressed"), (20, 0.05, "regressed")],
)
def test_a_guard_has_its_row_and_its_verdict(lost, margin, verdict):
    card = guarded_card(lost, margin)
    row = cells(card, "`general`")
    assert row[1].startswith("100.0 [") and row[2].startswith(f"{100 - lost:.1f} [")
    assert row[3].startswith(f"−{lost:.1f} [" if lost else "+0.0 (identical answers)")
    assert row[4] == f"{min(1.0, 2 * 0.5**lost):.4g}"
    assert row[5:] == [verdict, "100"]
    assert f"at most {100 * margin:.1f} points less than the base model" in card
    assert ("**It falls behind the base model on `general`" in card) == (verdict == "regressed")


def leaves(value, path=()):
    """Yield the path of every number in plain values."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def changed_at(value, path):
    """Return a copy of plain values in which the number at `path` is another."""
    if not path:
        return 2 * value + 1
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed_at(value[path[0]], path[1:])
    return copied


#: Numbers that the report sums up for people in others that are on the card.
SUMMED_UP = {("shards", 0, "counts", 0), ("shards", 0, "counts", 1), ("shards", 0, "num_unchanged")}


def without_digests(card):
    return [line for line in card.splitlines() if "sha256:" not in line]


@pytest.mark.parametrize("path", list(leaves(asdict(make_report(duality_gap=0.1)))), ids=str)
def test_every_number_of_the_report_reaches_the_card(path):
    values = asdict(make_report(duality_gap=0.1))
    other = TypeAdapter(MergeReport).validate_python(changed_at(values, path))
    before, after = (make_card(report=report) for report in (make_report(duality_gap=0.1), other))
    assert (without_digests(before) != without_digests(after)) == (path not in SUMMED_UP)


def drawn_diagnosis(rng):
    """Return a diagnosis of random sums, by which both tasks lack much of their quota."""

    def group(name):
        vectors = np.vstack([rng.uniform(5, 9, 9), rng.random((2, 9))])
        agreeing, shared = rng.uniform(10, 20, (2, 2)), rng.uniform(20, 40, (2, 2))
        changed, wins, lacking = rng.uniform(40, 60, (3, 2))
        count = int(rng.integers(10**5, 10**6))
        return make_group(
            name, 2 * count + 1, count, vectors @ vectors.T, agreeing, shared, changed, wins, lacking
        )

    layers = (group("first"), group("second"))
    return Diagnosis(tuple(WEIGHTS), layers, group("matrices"), (0, 0), 9, (), (), 0.5)


def drawn_card(seed):
    """Return a card with every section, on which every stored number is random."""
    rng = np.random.default_rng(seed)
    digits = lambda: "".join(rng.choice(list("0123456789abcdef"), 64))  # noqa: E731
    count = lambda: int(rng.integers(1000, 10**6))  # noqa: E731
    number = lambda: float(rng.uniform(1, 9))  # noqa: E731
    outcomes = lambda size, bar: [Outcome(float(p > bar), float(p)) for p in rng.random(size)]  # noqa: E731
    share = float(rng.uniform(0.6, 0.9))
    weights = {"animals": share, "plants": 1 - share}
    scored = {
        ("animals", 600): ("base_model", "animals", "merged", "merged:int4"),
        ("plants", 700): ("base_model", "plants", "merged"),
        ("general", 800): ("base_model", "merged"),
    }
    kept = [
        make_score(model, task, outcomes(size + seed, 0.7 if model == "base_model" else 0.4), is_share=True)
        for (task, size), models in scored.items()
        for model in models
    ]
    data = {task: {"dataset": "org/x", "examples": count()} for task in ("animals", "plants", "general")}
    spec = {"tasks": {}, "guard": {"general": {"dataset": "org/g"}}, "margin": float(rng.uniform(0, 0.01))}
    explained = ResolvedPreference(weights, "labels", f"sha256:{digits()}", {"shares": [number(), number()]})
    lock = make_lock(
        base_model=make_source(commit=digits()[:40]),
        tasks={task: make_source("org/seq", "org/seq", digits()[:40]) for task in WEIGHTS},
        method={"name": "tunable_magmax", "scaling": number()},
        preference=explained,
        seed=count(),
        chosen={"examples": count(), "tried": count(), "best": {"ties": {"scaling": number()}}},
    )
    return make_card(
        recipe=make_recipe(evaluation=spec, seed=count()),
        lock=lock,
        report=make_report(
            plan_digest=f"sha256:{digits()}",
            shards=(ShardRecord("model.safetensors", count(), digits()),),
            shares={task: number() for task in WEIGHTS},
            num_unaligned={task: count() for task in WEIGHTS},
            duality_gap=number(),
            elements_merged=count(),
            bytes_in=count() * 10**6,
            bytes_out=count() * 10**3,
            seconds=number(),
            peak_memory_bytes=count() * 10**4,
            versions={"python": f"{seed}.{seed}.{seed}"},
        ),
        scores=make_scores(scores=tuple(kept), data=data),
        beside=Beside(diagnosis=drawn_diagnosis(rng)),
    )


def numbers_of(line):
    """Return the numbers of a line, without those that are part of a word, and without commits and hashes."""
    line = re.sub("(?<=[`@:/])[0-9a-f]{7,}", "", line)
    return re.findall(r"(?<![\w.])[.]?[0-9][\w.,]*(?<![.,])", line)


def test_no_number_is_on_the_card_that_nothing_stored_decides():
    cards_ = [drawn_card(seed) for seed in (1, 2, 3)]
    for card in cards_:
        for section in ("must not regress", "averages hide", "merged model to itself", "## Appendix"):
            assert section in card
    # The recipe is on the card as it is stored, which another test compares.
    aside = f"```(yaml)\n.*?```|{re.escape(constants.ENDPOINT)}"
    lines = [re.sub(aside, "", card, flags=re.S).splitlines() for card in cards_]
    fixed = set()
    for versions in zip(*lines, strict=True):
        places = zip(*map(numbers_of, versions), strict=True)
        fixed |= {place[0] for place in places if len(set(place)) == 1}
    template = files("hub_magmax.reporting").joinpath(card_template.TEMPLATE_NAME).read_text(encoding="utf-8")
    papers = [get_method(name).paper for name in method_names()]
    stated = {*numbers_of(template), *numbers_of(str(papers)), f"{NUM_RESAMPLES:,}"}
    stated |= {f"{level:.2f}"[1:] for level in LEVELS} | {f"{limit:g}" for limit, _ in THRESHOLDS.values()}
    assert fixed <= {*stated, str(MIN_TAIL_EXAMPLES), str(len(WEIGHTS))}
    assert len(numbers_of("\n".join(lines[0]))) > 150


LOCK, REPORT = make_lock(), make_report()
OTHER_WEIGHTS = {"animals": 0.25, "plants": 0.75}
FACTS = [
    ("lock", replace(LOCK, seed=987), "seed 987"),
    ("lock", replace(LOCK, method=dict(LOCK.method) | {"scaling": 0.375}), "scaling coefficient 0.375"),
    ("lock", replace(LOCK, method=dict(LOCK.method) | {"selection": "top-n"}), "`selection` `top-n`"),
    ("lock", replace(LOCK, base_model=make_source(commit="0123" * 10)), "/org/base/tree/" + "0123" * 10),
    ("lock", replace(LOCK, base_model=make_source(license="isc")), "| `isc` |"),
    ("lock", replace(LOCK, base_model=make_local("./base")), "| `base_model` | `./base` | — |"),
    ("lock", replace(LOCK, tensors=(("head.*", "animals"),)), "`head.*` and no earlier rule come from"),
    (
        "lock",
        replace(LOCK, tensors=({"match": "h.*", "layers": [0, 8], "take": "animals"},)),
        "tensors that match `h.*` in the blocks 0 to 7 and no earlier rule come from `animals`",
    ),
    (
        "lock",
        replace(LOCK, tensors=({"match": "*", "scaling": {"gradient": [0, 0.25]}, "options": {"a": "b"}},)),
        "tensors that match `*` and no earlier rule: scaling 0, 0.25 over the blocks; options `a` `b`.",
    ),
    ("lock", replace(LOCK, preference=ResolvedPreference(OTHER_WEIGHTS, "power")), "| 0.25 |"),
    (
        "lock",
        replace(LOCK, preference=ResolvedPreference(WEIGHTS, "labels", "sha256:5", {"examples": 1234})),
        "given as `labels`.\n  Estimated from examples with the fingerprint `sha256:5`.\n"
        "  What the estimate saw:\n  - `examples`: 1,234",
    ),
    ("report", replace(REPORT, shares={"animals": 0.65, "plants": 0.35}), "| 0.35 |"),
    ("report", replace(REPORT, num_unaligned={"animals": 0, "plants": 5678}), "`animals` 0, `plants` 5,678"),
    ("report", replace(REPORT, duality_gap=1.25e-06), "a relative duality gap of at most 1.25e-06"),
    ("report", replace(REPORT, elements_merged=2_222_222), "2,222,222 elements were merged"),
    ("report", replace(REPORT, bytes_in=77_700_000), "77.7 MB read"),
    ("report", replace(REPORT, bytes_out=88_800_000), "88.8 MB written"),
    ("report", replace(REPORT, seconds=98.76), "in 98.76 s"),
    ("report", replace(REPORT, peak_memory_bytes=1_900_000_000), "at most 1.9 GB of memory"),
    ("report", replace(REPORT, versions={"torch": "2.13.0"}), "**Software:** `torch` `2.13.0`."),
    ("report", replace(REPORT, parameters={"F16": 5}), "5 parameters in float16"),
    ("report", replace(REPORT, plan_digest="sha256:" + "3" * 64), "| plan | `sha256:" + "3" * 64),
    (
        "report",
        replace(REPORT, shards=(ShardRecord("model-1.safetensors", 5555, "8" * 64),)),
        f"| `model-1.safetensors`, 5,555 | `{'8' * 64}` |",
    ),
    ("scores", make_scores(metric="exact match"), "Values are `exact match` in per cent"),
    ("scores", make_scores(pipeline_tag="text-classification"), "AutoModelForSequenceClassification"),
    ("scores", make_scores(data={"plants": {"dataset": "o/x", "split": "dev"}}), "| `o/x` | — | `dev` | — |"),
    ("recipe", make_recipe(seed=654), "seed: 654"),
    ("recipe", make_recipe(output={"path": "elsewhere"}), 'from_pretrained("elsewhere")'),
    ("recipe", make_recipe(output={"license": "gpl-3.0"}), "The recipe sets `gpl-3.0`."),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "value", "text"), FACTS, ids=[text[:40] for _, _, text in FACTS])
def test_every_fact_reaches_the_card(argument, value, text):
    assert text not in make_card()
    assert text in make_card(**{argument: value})


@pytest.mark.parametrize("key", MEASURED, ids=str)
@pytest.mark.parametrize("field", range(3))
def test_every_score_and_bound_that_is_shown_reaches_its_row(key, field):
    values = list(MEASURED[key])
    values[field] = 0.444
    before, after = (
        cells(make_card(scores=make_scores(MEASURED | change)), f"`{key[0]}`")
        for change in ({}, {key: values})
    )
    shown = key[1] in (key[0], "base_model", "merged")
    assert ("44.4" in " ".join(after)) == shown
    assert (before != after) == shown


@pytest.mark.parametrize("digest", ["recipe", "lock", "report", "scores"])
def test_digests_are_those_of_the_values(digest):
    values = {"recipe": make_recipe(), "lock": LOCK, "report": REPORT, "scores": make_scores()}
    assert cells(make_card(), digest)[1] == f"`{values[digest].digest}`"


def test_a_method_that_ignores_the_preference_says_so():
    card = make_card(lock=make_lock(method={"name": "magmax", "scaling": 0.5}))
    assert "**The method ignores the preference:**" in card
    assert ", which the method ignores." in card
    assert "ignores" not in make_card()


@pytest.mark.parametrize(
    ("method", "paper"),
    [
        ("tunable_magmax", "2605.20803"),
        ("magmax", "2407.06322"),
        ("random_mix", "2407.06322"),
        ("ties", "2306.01708"),
        ("dare", "2311.03099"),
        ("breadcrumbs", "2312.06795"),
        ("task_arithmetic", "2212.04089"),
        ("average", "2203.05482"),
    ],
)
def test_the_paper_of_the_method_is_linked_and_cited(method, paper):
    card = make_card(lock=make_lock(method={"name": method, "scaling": 1.0}))
    assert f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" in card
    entry = block(card, "bibtex")
    assert f"eprint = {{{paper}}}" in entry
    assert entry.count("{") == entry.count("}")


def test_a_method_without_a_paper_cites_none():
    card = make_card(lock=make_lock(method={"name": "last_task", "scaling": 1.0}))
    assert "Source: `baseline`." in card
    assert "arxiv.org" not in card and "bibtex" not in card


def test_a_method_that_a_comparison_chose_is_shown_with_what_it_was_chosen_from():
    chosen = {
        "examples": 40,
        "tried": 63,
        "best": {"average": {"scaling": 0.7, "accuracy": 0.875}, "ties": {"scaling": 1.0, "accuracy": 0.8}},
    }
    card = make_card(lock=make_lock(chosen=chosen))
    assert "of 63 ways to merge, by 40 labelled examples of the target" in card
    assert "`average`: `scaling` 0.7, `accuracy` 0.875" in card
    assert "Chosen by comparison" not in make_card()


def test_uniform_preference_and_many_tasks_stay_one_readable_sentence():
    names = [f"task-{number}" for number in range(20)]
    lock = make_lock(
        tasks={name: make_source() for name in names},
        preference=ResolvedPreference(dict.fromkeys(names, 0.05), "uniform"),
    )
    card = make_card(lock=lock, scores=None)
    assert "20 checkpoints" in card
    named = ", ".join(f"`task-{number}`" for number in range(6))
    assert f"the same preference for each of {named} and 14 more" in card
    assert "none was given, so every task counts the same" in card
    folded = card.split("<summary>All 20 tasks</summary>")[1].split("</details>")[0]
    assert sum(line.startswith("| `task-") for line in folded.splitlines()) == 20


def test_with_many_tasks_the_most_wanted_are_named_first():
    weights = {f"task-{number}": number / 55 for number in range(1, 11)}
    lock = make_lock(
        tasks={name: make_source() for name in weights}, preference=ResolvedPreference(weights, "linear")
    )
    card = make_card(lock=lock, scores=None)
    assert "the preference `task-10` 0.182, `task-9` 0.164" in card
    rows = re.findall(r"^\| `(task-\d+)` \| 0", card, re.M)
    assert rows == [f"task-{number}" for number in range(10, 0, -1)]


def test_of_many_tasks_the_most_wanted_and_those_that_lost_most_stand_open():
    names = [f"task-{number:02}" for number in range(20)]
    weights = {name: (20 - number) / 210 for number, name in enumerate(names)}
    lock = make_lock(
        tasks=dict.fromkeys(names, make_source()), preference=ResolvedPreference(weights, "weights")
    )
    lost = {"task-19": 0.3, "task-07": 0.2, "task-11": 0.4}
    measured = {
        (name, model): (value, 0.1, 0.9, 10)
        for name in names
        for model, value in ((name, 0.9), ("merged", lost.get(name, 0.8)))
    }
    card = make_card(
        lock=lock, scores=make_scores(measured, data={name: {"dataset": "o/x"} for name in names})
    )
    open_ = re.sub("<details>.*?</details>", "", card, flags=re.S)
    shown = re.findall(r"^\| `(task-\d+)` \| 0", open_, re.M)
    assert shown == [*names[:5], "task-07", "task-11", "task-19"]
    assert "| `o/x` |" not in open_ and card.count("| `o/x` |") == 20
    assert MarkdownIt("commonmark", {"html": True}).enable("table").render(card).count("<table>") == 7


def test_the_hub_finds_what_the_model_was_made_from():
    data = metadata(make_card())
    assert data["base_model"] == ["org/base", "org/seq"]
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["merge", "hub_magmax", "tunable_magmax"]
    assert data["license"] == "apache-2.0"
    assert "license_name" not in data


def test_languages_and_data_sets_that_the_recipe_names_are_found_on_the_hub():
    said = {"language": ["en", "no"], "datasets": ["org/photos", "squad"]}
    card = make_card(recipe=make_recipe(output={"push_to_hub": "me/merged"} | said))
    assert {key: metadata(card)[key] for key in said} == said
    assert validate(card).errors == () and validate(card).warnings == ()
    assert not said.keys() & metadata(make_card()).keys()


@pytest.mark.parametrize("value", ["English", "e\nn", "en-US", "[en]"])
def test_a_language_that_the_hub_would_refuse_is_refused_early(value):
    with pytest.raises(RecipeError, match=r"output\.language"):
        make_recipe(output={"language": [value]})


@pytest.mark.parametrize("value", ["./photos", "a/b/c", "x\n---", "<b>"])
def test_a_data_set_that_the_hub_cannot_have_is_refused_early(value):
    with pytest.raises(RecipeError, match=r"output\.datasets"):
        make_recipe(output={"datasets": [value]})


def test_folders_never_appear_as_base_models():
    tasks = {
        "animals": make_local("./animals"),
        "plants": make_source("org/seq@two", "org/seq", PLANTS_COMMIT),
    }
    data = metadata(make_card(lock=make_lock(base_model=make_local("/data/base"), tasks=tasks)))
    assert data["base_model"] == ["org/seq"]
    local = {"animals": make_local("./animals"), "plants": make_local("./plants")}
    data = metadata(make_card(lock=make_lock(base_model=make_local("./base"), tasks=local)))
    assert not {"base_model", "base_model_relation"} & data.keys()


def test_a_name_that_no_repository_can_have_is_no_base_model():
    lock = make_lock(base_model=make_source(repo_id="org/a/b"))
    assert metadata(make_card(lock=lock))["base_model"] == ["org/seq"]
    assert f"| `{BASE_COMMIT}` |" in make_card(lock=lock)


def test_measured_scores_are_tied_to_their_data():
    (model,) = metadata(make_card())["model-index"]
    assert model["name"] == "me/merged"
    assert model["results"] == [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": "org/photos", "type": "org/photos", "split": "test", "revision": "v2"},
            "metrics": [{"type": "accuracy", "value": 0.902, "name": "accuracy on animals"}],
        },
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": "plants", "type": "plants", "config": "small", "split": "test[:288]"},
            "metrics": [{"type": "accuracy", "value": 0.604, "name": "accuracy on plants"}],
        },
    ]


def test_tasks_that_share_a_split_keep_their_own_results():
    shared = {task: {"dataset": "org/photos", "split": "test"} for task in WEIGHTS}
    (model,) = metadata(make_card(scores=make_scores(data=shared)))["model-index"]
    metrics = [metric for result in model["results"] for metric in result["metrics"]]
    assert [(m["name"], m["value"]) for m in metrics] == [
        ("accuracy on animals", 0.902),
        ("accuracy on plants", 0.604),
    ]


@pytest.mark.parametrize("scores", ["measured", None])
def test_the_front_matter_survives_a_round_trip_and_the_hub_accepts_it(scores, tmp_path):
    card = make_card(scores=scores)
    assert ModelCard(str(ModelCard(card))).data.to_dict() == metadata(card)
    assert ModelCard(str(ModelCard(card))).text == ModelCard(card).text
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert metadata_load(tmp_path / "README.md") == metadata(card)
    assert validate(card).errors == () and validate(card).warnings == ()


def test_a_mixture_of_licences_is_named_and_linked():
    data = metadata(make_card(lock=make_lock(base_model=make_source(license="llama3.1"))))
    assert data["license"] == "other"
    assert data["license_name"] == "llama3.1-and-mit-and-apache-2.0"
    assert data["license_link"] == f"{constants.ENDPOINT}/me/merged#licence"


def test_the_licence_of_every_source_is_in_the_table():
    card = make_card(lock=make_lock(base_model=make_source(license=None)))
    assert cells(card, "`base_model`")[3] == "—"
    assert cells(card, "`plants` | `org/seq@two`")[3] == "`apache-2.0`"
    assert metadata(card)["license"] == "other"


def test_the_picture_is_linked_by_its_name_alone():
    card = make_card(picture="/data/out/trade off).png")
    assert "](trade%20off%29.png)" in card
    assert "![" not in make_card()


def test_the_python_that_loads_the_model_is_valid():
    program = block(make_card(), "python")
    ast.parse(program)
    assert 'AutoModelForImageClassification.from_pretrained("me/merged")' in program
    unknown = block(make_card(scores=None), "python")
    ast.parse(unknown)
    assert 'load_file(Path(snapshot_download("me/merged")) / "model.safetensors")' in unknown


def test_commands_verify_rebuild_and_score_the_model_again():
    assert block(make_card(), "sh").splitlines() == [
        "hub-magmax verify me/merged  # every file is as merged",
        "hub-magmax verify me/merged --rebuild  # merge again, and compare every byte",
        "hub-magmax canary me/merged  # score it again, and compare example by example",
    ]
    signed = block(make_card(scores=None, beside=Beside(signature=True)), "sh").splitlines()
    assert [line.split("  #")[0] for line in signed] == [
        "hub-magmax verify me/merged",
        "hub-magmax verify me/merged --rebuild",
        "hub-magmax verify me/merged --public-key KEY",
    ]


def test_local_checkpoints_and_local_data_need_their_folder():
    lock = make_lock(base_model=make_local("./base"), local_data={"./plants": "sha256:" + "5" * 64})
    commands = block(make_card(lock=lock), "sh")
    assert "--rebuild --from FOLDER" in commands and "canary me/merged --from FOLDER" in commands


def test_local_data_is_known_by_name_and_digest_and_its_path_is_not_told():
    lock = make_lock(local_data={"../eval/plants.jsonl": "sha256:" + "5" * 64})
    data = {"plants": {"dataset": "../eval/plants.jsonl", "split": "test", "examples": 9}}
    card = make_card(lock=lock, scores=make_scores(data=data))
    assert "../eval" not in card
    assert cells(card, "`plants` | `plants.jsonl`")[1:5] == [
        "`plants.jsonl`",
        "—",
        "`test`",
        "`sha256:555555555555`",
    ]
    (result,) = [r for r in metadata(card)["model-index"][0]["results"] if r["dataset"]["name"] != "unknown"]
    assert result["dataset"] == {
        "name": "plants.jsonl",
        "type": "plants.jsonl",
        "split": "test",
        "revision": "sha256:" + "5" * 64,
    }


JOINT = "a space between prompt and answer, unless either has white space there"


def test_the_card_says_how_language_models_were_asked():
    data = {
        "animals": {"dataset": "./a.jsonl", "joint": JOINT, "template": "Q: {{ q }}\nA:"},
        "plants": {
            "dataset": "./b.jsonl",
            "joint": JOINT,
            "few_shot": "3 of ./eval/b.jsonl, split train, seed 0",
        },
    }
    lock = make_lock(local_data={"./eval/b.jsonl": "sha256:" + "0" * 64})
    card = make_card(lock=lock, scores=make_scores(data=data))
    template = r'`"Q: {{ q }}\nA:"`'
    assert f"\n- `animals`: `template` {template}, `joined by` `{JOINT}`.\n" in card
    assert f"\n- `plants`: `few shot` `3 of b.jsonl, split train, seed 0`, `joined by` `{JOINT}`.\n" in card
    chosen = {"judged": "the likeliest choice", "choices": "4", "question": "question", "joint": JOINT}
    told = "`judged by` `the likeliest choice`, `choices` `4`, `question column` `question`, `joined by`"
    assert told in make_card(scores=make_scores(data={task: {"dataset": "o/x"} | chosen for task in WEIGHTS}))
    same = {task: {"dataset": "o/x", "joint": JOINT} for task in WEIGHTS}
    assert f"\n- All tasks: `joined by` `{JOINT}`.\n" in make_card(scores=make_scores(data=same))
    assert "asked" not in make_card()


def test_the_card_says_what_an_evaluator_puts_around_inputs_and_classes():
    clip = {"name": "zero-shot-image-classification", "classes": ["cat", "dog"]}
    clip["templates"] = ["a photo of a {}.", "a sketch: {} "]
    t5 = {"name": "text-to-text", "prefix": "sort: "}
    data = {
        task: {"dataset": "o/x"} | described_inputs(make_evaluator(name, options), Data(dataset="o/x"))
        for task, (name, options) in zip(
            WEIGHTS, ((one.pop("name"), one) for one in (clip, t5)), strict=False
        )
    }
    card = make_card(scores=make_scores(data={task: data.get(task, {"dataset": "o/x"}) for task in WEIGHTS}))
    assert '`texts of a class` `["a photo of a {}.", "a sketch: {} "]`' in card
    assert '`prefix` `"sort: "`' in card


@pytest.mark.parametrize(
    "template",
    [
        "Q: {{ q }}\nA: ",
        "  {{ a  | trim }}\t\n\n",
        "```{{ q }}```",
        "/home/{{ q }}",
        "{{ q }} " * 90,
        "{{q}}\u202e",
    ],
)
def test_templates_and_joints_are_shown_to_the_last_sign(template):
    joint = describe_joint("  |`", chat=False)
    data = {task: {"dataset": "o/x", "template": template, "joint": joint} for task in WEIGHTS}
    card = make_card(scores=make_scores(data=data))
    (line,) = [t for t in PARSER.parse(card) if t.type == "inline" and t.content.startswith("All tasks")]
    spans = [child.content for child in line.children if child.type == "code_inline"]
    assert json.loads(spans[1]) == template
    assert spans[3] == joint and repr("  |`") in joint


def test_texts_that_were_cut_are_counted():
    scores = make_scores()
    cut = replace(
        scores, scores=tuple(replace(s, num_cut=3 if s.task == "plants" else 0) for s in scores.scores)
    )
    assert "\n- `plants`: 3 of 288 examples.\n" in make_card(scores=cut)
    assert "context" not in make_card()


def test_the_recipe_on_the_card_makes_the_same_model():
    card = make_card()
    assert "lock_version" not in card and "header_sha256" not in card
    found = parse_recipe(yaml.safe_load(block(card, "yaml")))
    assert found.digest == make_recipe().model_copy(update={"evaluation": None}).digest
    assert "plants" not in block(card, "yaml").split("preference:")[0].replace("name: plants", "")
    assert "The recipe, without what only scores it:" in card
    assert "[recipe.lock.json](recipe.lock.json)" in card and "[scores.json](scores.json)" in card
    assert "[scores.json]" not in make_card(scores=None)


@pytest.mark.parametrize(
    ("count", "shown", "folded"), [(3, True, False), (40, True, True), (41, False, False)]
)
def test_a_long_recipe_is_folded_and_a_very_long_one_linked_only(count, shown, folded):
    tasks = [{"name": f"task-{number}", "model": f"org/m{number}"} for number in range(count)]
    recipe = make_recipe(tasks=tasks, preference=None, evaluation=None)
    card = make_card(recipe=recipe, scores=None)
    assert ("```yaml" in card) == shown
    assert ("<summary>recipe.yaml</summary>" in card) == folded


def test_the_same_facts_give_the_same_card():
    assert make_card() == make_card()


HOSTILE = {
    "html": "<script>alert(1)</script><img src=x onerror=y></details>",
    "markdown": "[click](javascript:alert(1)) ![x](http://evil.example/x.png) **b** <http://evil.example>",
    "table": "a | b | c || d \\| e \\\\| f |",
    "front matter": "x\n---\nlicense: mit\n---\n# Title\n\n- item",
    "code": "a `b` ``c`` ```\n~~~\n```` d",
    "long": "x" * 10_000,
    "long words": "word | ` " * 1_200,
    "direction": "safe\u202egnp.exe\u202c\u2066\u200f\u200b\ufeff\u2028x\x85y\x00z\x1b[31m",
    "template": "{{ 7 * 7 }} {% raw %} {# x #} $\\alpha$",
    "entity": "&lt;script&gt; &#124; &amp;",
    "yaml": "!!python/object:os.system [x] {a: b} *alias &anchor # comment: : |",
    "surrogate": "a\ud800b",
    "blank": "   ",
}


def everywhere(text):
    """Return the arguments of `make_card` with `text` wherever other people's text can be."""
    # A recipe with longer names, control characters, or a repository that the Hub cannot have is refused.
    short = "".join(c for c in text[:4000] if not unicodedata.category(c).startswith("C") or c in "\n\t")
    license = short if short.strip() else "plain"  # a blank licence is none at all, which the card says
    data = {"dataset": f"./{short}", "split": short, "config": short, "input_column": short}
    recipe = make_recipe(
        base_model=f"./{short}",
        tasks=[{"name": task, "model": f"./{short}{task}"} for task in WEIGHTS],
        tensors=[{"match": short, "take": "base_model"}],
        evaluation={"tasks": {"animals": data}},
        output={
            "path": f"out/x{short}",
            "push_to_hub": "me/merged",
            "license": short if short.strip() else license,
        },
    )
    lock = make_lock(
        base_model=make_local(f"./{text}", license),
        tasks={
            "animals": make_source(text, f"o/{text}!", f"{text}!", license),
            "plants": make_source(f"hf://{text}", f"o/{text}!", f"{text}!", license),
        },
        method={"name": "tunable_magmax", "scaling": 0.5, "selection": text, text: text},
        preference=ResolvedPreference(WEIGHTS, text, text, {text: text, "list": [text]}),
        tensors=((text, text),),
        chosen={"tried": 9, "examples": 8, "best": {text: {text: text, "range": [text]}}},
    )
    report = make_report(
        plan_digest=text,
        shards=(ShardRecord(text, 1, text),),
        versions={text: text},
        num_unaligned={"animals": 1, "plants": 2},
        notices=(text, f"{text}\n{text}"),
    )
    scores = make_scores(
        metric=text,
        pipeline_tag=text,
        data={task: {"dataset": text, "config": text, "split": text, "revision": text} for task in WEIGHTS},
    )
    return {"recipe": recipe, "lock": lock, "report": report, "scores": scores}


@functools.cache
def hostile_card(text):
    if "\ud800" in text:  # a lone surrogate has no digest: it can only come in where none is taken
        return make_card(recipe=None, report=make_report(versions={text: text}))
    return make_card(**everywhere(text))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_changes_no_structure(text):
    benign = "plain" if text != HOSTILE["surrogate"] else "plain\ud800"
    assert skeleton(hostile_card(text)) == skeleton(hostile_card(benign))


FILES = (
    "recipe.yaml",
    "recipe.lock.json",
    "merge_report.json",
    "provenance.json",
    "scores.json",
    "outcomes.json",
)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_adds_no_html_link_or_picture(text):
    tokens = [
        t
        for token in PARSER.parse(ModelCard(hostile_card(text)).text)
        for t in (token, *(token.children or []))
    ]
    html = [token.content.strip() for token in tokens if token.type.startswith("html")]
    assert html in ([], ["<details>\n<summary>recipe.yaml</summary>", "</details>"])
    links = {token.attrs["href"] for token in tokens if token.type == "link_open"}
    assert all(
        link in FILES or link.startswith(("https://arxiv.org/abs/", constants.ENDPOINT)) for link in links
    )
    assert not any(token.type == "image" for token in tokens)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_leaves_the_front_matter_valid(text, tmp_path):
    card = hostile_card(text)
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    data = metadata_load(tmp_path / "README.md")
    assert data == ModelCard(str(ModelCard(card))).data.to_dict()
    assert data["tags"] == ["merge", "hub_magmax", "tunable_magmax"]
    assert validate(card).errors == ()
    assert set(data) <= {
        *("base_model", "base_model_relation", "library_name", "license", "license_name", "license_link"),
        *("model-index", "pipeline_tag", "tags"),
    }


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_nothing_invisible_is_in_a_card(text):
    assert not [c for c in hostile_card(text) if is_invisible(c) and c != "\n"]


def test_long_text_makes_no_long_lines_outside_the_code_blocks():
    tokens = PARSER.parse(ModelCard(make_card(**everywhere("x" * 10_000))).text)
    assert max(len(token.content) for token in tokens if token.type == "inline") < 1_500


@pytest.mark.parametrize("name", ["html", "table", "front matter", "code", "long", "direction", "yaml"])
def test_a_hostile_recipe_can_still_be_taken_from_the_card(name):
    arguments = everywhere(HOSTILE[name])
    card = make_card(**arguments)
    assert parse_recipe(yaml.safe_load(block(card, "yaml"))) == arguments["recipe"].model_copy(
        update={"evaluation": None}
    )


def test_no_absolute_path_of_the_machine_appears(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, data, output = (tmp_path / name for name in ("base-model", "plant-photos", "merged-model"))
    recipe = make_recipe(
        base_model=str(base),
        evaluation={"tasks": {"plants": {"dataset": str(data)}}},
        output={"path": str(output)},
    )
    scores = make_scores(data={"plants": {"dataset": str(data), "split": "test", "examples": 288}})
    lock = make_lock(base_model=make_local(str(base)))
    card = make_card(recipe=recipe, lock=lock, scores=scores, picture=str(tmp_path / "tradeoff.png"))
    assert str(tmp_path) not in card and tmp_path.name not in card and str(Path.home()) not in card
    assert "fine-tuned from `base-model`" in card
    assert "| `plants` | `plant-photos` |" in card
    assert "# `merged-model`" in card
    assert "base_model: ./base-model" in block(card, "yaml")


def test_a_path_that_only_the_lock_holds_is_shortened():
    card = make_card(lock=make_lock(base_model=make_local("/data/models/base")))
    assert "/data" not in card and "| `base_model` | `base` |" in card


def test_a_path_that_leads_far_out_names_no_folder_of_the_author():
    place = "../../home/someone/models/base"
    card = make_card(recipe=make_recipe(base_model=place), lock=make_lock(base_model=make_local(place)))
    assert "someone" not in card and "base_model: base\n" in card
    assert "not the one that the digest covers" in card


def test_tensors_that_are_left_out_are_said_to_be():
    card = make_card(lock=make_lock(tensors=(("pooler.*", "nothing"),)))
    assert "tensors that match `pooler.*` and no earlier rule are left out." in card


def test_relative_paths_are_shown_as_written():
    lock = make_lock(base_model=make_local("../models/base"))
    card = make_card(recipe=make_recipe(base_model="../models/base"), lock=lock)
    assert "| `base_model` | `../models/base` |" in card
    assert "base_model: ../models/base" in block(card, "yaml")
    assert "digests cover" not in card


def test_no_token_appears():
    token = "hf_" + "aB3" * 12
    reference = f"https://someone:{token}@huggingface.co/org/base"  # a recipe refuses it; a lock may be older
    recipe = make_recipe()
    output = recipe.output.model_copy(update={"path": f"./{token}", "license": token})
    recipe = recipe.model_copy(update={"output": output})  # a recipe that is read is refused
    lock = make_lock(base_model=make_source(reference, license=token))
    card = make_card(recipe=recipe, lock=lock, scores=make_scores(metric=token))
    assert token not in card and token.lower().replace("_", "-") not in card and "someone" not in card
    assert "| `https://huggingface.co/org/base` |" in card


def test_importing_the_module_is_light():
    heavy = "torch", "matplotlib", "transformers", "datasets"
    program = (
        f"import sys, hub_magmax.reporting.card; print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_rendering_needs_no_torch():
    program = (
        "import sys\nfrom tests.test_reporting_card import make_card\nmake_card()\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def test_a_template_that_asks_for_an_unknown_fact_fails():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        card_template.environment(Unit()).from_string("{{ nobody_measured_this }}").render()


def test_what_a_template_shows_is_code_unless_it_is_markdown():
    template = card_template.environment(Unit()).from_string("{{ a }} {{ a ~ b }} {{ none }} {{ 3 }}")
    assert template.render(a="<b>", b="*") == "`<b>` `<b>*` — 3"


def test_there_are_no_stray_gaps_in_the_text():
    for card in (make_card(), make_card(scores=None), make_card(lock=make_lock(tensors=(("a", "b"),)))):
        assert "\n\n\n" not in card.replace(block(card, "yaml"), "")
        assert not re.search(r"[ \t]+$", card, re.MULTILINE)
        assert card.endswith("\n") and not card.endswith("\n\n")


def test_languages_and_data_sets_of_the_sources_are_on_the_card():
    sources = [
        replace(make_source(), languages=("en", "de"), datasets=("org/one", "<script>")),
        replace(make_source("org/b", "org/b"), languages=("de", "klingon!"), datasets=None),
    ]
    lock = replace(LOCK, base_model=sources[0], tasks=dict.fromkeys(LOCK.tasks, sources[1]))
    data = metadata(make_card(lock=lock))
    assert (data["language"], data["datasets"]) == (["en", "de"], ["org/one"])


def test_what_a_card_says_is_read_as_text_or_list():
    from hub_magmax.checkpoints.pinning import card_facts
    from hub_magmax.checkpoints.source import MemorySource

    card = b"---\nlicense: mit\nlanguage: no\ndatasets: [org/a, {b: c}, org/d]\n---\n"
    facts = card_facts(MemorySource({"README.md": card}))
    assert facts == {"license": "mit", "languages": ("no",), "datasets": ("org/a", "org/d")}
    assert set(card_facts(MemorySource({"README.md": b"text"})).values()) == {None}


def test_the_line_of_the_docs_shows_a_value_of_the_lock():
    page = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text(encoding="utf-8")
    line = page.split("```jinja\n")[1].split("```")[0]
    assert card_template.environment(Unit()).from_string(line).render(lock=make_lock()).strip() == (
        "| seed of random draws | 11 |"
    )
