import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from safetensors.numpy import load, save
from transformers import BertConfig, BertForSequenceClassification, ViTForImageClassification

import hub_magmax as hm
from benchmarks.routing import RESULTS, section
from hub_magmax.checkpoints.index import ROUTER_NAME, ROUTER_WEIGHTS_NAME
from hub_magmax.errors import (
    ArgumentError,
    CheckpointError,
    EvaluationError,
    LockError,
    OutputError,
    RecipeError,
    SourceError,
)
from hub_magmax.evaluation.evaluators.classification import TextClassification
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.files import digest
from hub_magmax.fleet.routing.bounds import AtThreshold, at_thresholds, supported, upper_bound
from hub_magmax.fleet.routing.curves import area_under_risk_coverage, cost_quality, risk_coverage
from hub_magmax.fleet.routing.measuring import NEVER, Aim, candidates, choose, measure, threshold_for
from hub_magmax.fleet.routing.observing import Observed, look
from hub_magmax.fleet.routing.splitting import MIN_EXAMPLES, divided, divided_beside
from hub_magmax.fleet.routing.verifier import OTHERS, Verifier, calibrated, fit, kinds_of
from hub_magmax.pipeline import run
from hub_magmax.publishing.pushing import contents_of
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from tests.classifiers import CLASSES, classifier_recipe, write_classifiers
from tests.families import yaml_text
from tests.oracles_routing import chance_of_at_most, slow_area_under_risk_coverage, slow_upper_bound
from tests.test_cli import call
from tests.test_readme import ROOT
from tests.tiny_llama import tokenizer

# Bounds


def test_bounds_by_hand():
    assert upper_bound(0, 1, 0.95) == pytest.approx(0.95)  # 1 - .05
    assert upper_bound(0, 59, 0.95) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert upper_bound(0, 59, 0.95) < 0.05 < upper_bound(0, 58, 0.95)  # the known sample size for 5 %
    assert upper_bound(1, 2, 0.95) == pytest.approx(0.95**0.5)  # 1 - p² = .05
    assert upper_bound(3, 3, 0.95) == upper_bound(0, 0, 0.95) == 1.0


@pytest.mark.parametrize("trials", [1, 7, 40])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.999])
def test_bounds_are_those_of_the_binomial_distribution(trials, confidence):
    for errors in range(trials):
        found = upper_bound(errors, trials, confidence)
        assert found == pytest.approx(slow_upper_bound(errors, trials, confidence), abs=1e-9)
        assert chance_of_at_most(errors, trials, found) == pytest.approx(1 - confidence, abs=1e-9)


def test_testing_in_sequence_ends_at_the_first_failure():
    tested = [
        AtThreshold(0.0, 9, 1, 0.05),
        AtThreshold(0.2, 5, 2, 0.08),
        AtThreshold(0.4, 3, 4, 0.2),
        AtThreshold(0.6, 0, 0, 0.01),
    ]
    assert supported(tested, 0.1) == tested[1]  # the last one would do, and does not count
    assert supported(tested, 0.05) == tested[0]
    assert supported(tested, 0.04) is None
    assert supported(tested, 0.2) == tested[3]


def test_a_stated_risk_is_wrong_no_oftener_than_it_says():
    """The errors above a threshold t are 5 + 20 t %: of many samples few state more than is true."""
    rng, wrong, stated = np.random.default_rng(0), 0, 0
    thresholds = [step / 10 for step in range(11)]
    for _ in range(400):
        gain = rng.uniform(size=200)
        kept, escalated = rng.uniform(size=(2, 200)) < [[0.75], [0.95]]
        found = supported(at_thresholds(thresholds, gain, kept, escalated, 0.9), 0.15)
        stated += found is not None
        wrong += found is not None and 0.05 + 0.2 * found.threshold > 0.15 + 1e-12
    assert stated > 350
    assert wrong / 400 < 0.1 + 2 * (0.09 / 400) ** 0.5


# Curves

scores_and_errors = st.lists(
    st.tuples(st.sampled_from([0.1, 0.5, 0.7, 0.9]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=6
)


@given(scores_and_errors)
@settings(deadline=None)
def test_areas_are_those_of_the_definition(pairs):
    trust, errors = map(list, zip(*pairs, strict=True))
    found = area_under_risk_coverage(np.array(trust), np.array(errors))
    assert found == pytest.approx(slow_area_under_risk_coverage(trust, errors))


def test_an_area_by_hand():
    errors = np.array([0.0, 1.0, 0.0, 1.0])
    assert risk_coverage(np.array([4.0, 3, 2, 1]), errors) == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert area_under_risk_coverage(np.array([4.0, 3, 2, 1]), errors) == pytest.approx(
        (1 / 2 + 1 / 3 + 1 / 2) / 4
    )
    assert area_under_risk_coverage(np.ones(4), errors) == pytest.approx(0.5)  # no order: the share of errors


rights = st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(-1, 1)), min_size=1, max_size=30)


@given(rights, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_curves_lie_between_never_and_the_oracle(triples, random):
    kept, escalated, gain = (np.array(column, dtype=float) for column in zip(*triples, strict=True))
    curve = cost_quality(gain, kept, escalated)
    assert curve[0] == pytest.approx(kept.mean()) and curve[-1] == pytest.approx(escalated.mean())
    assert (cost_quality(escalated - kept, kept, escalated) >= curve - 1e-12).all()
    straight = np.linspace(kept.mean(), escalated.mean(), len(kept) + 1)
    assert cost_quality(np.zeros(len(kept)), kept, escalated) == pytest.approx(straight)  # at random
    thresholds = candidates(gain)
    assert thresholds == sorted(thresholds) and thresholds[0] >= 0
    shares = [tested.escalated for tested in at_thresholds(thresholds, gain, kept > 0, escalated > 0, 0.95)]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0


def test_random_escalation_is_the_mean_of_many_draws():
    rng = np.random.default_rng(1)
    kept, escalated = rng.integers(0, 2, size=(2, 40)).astype(float)
    drawn = [cost_quality(rng.permutation(40).astype(float), kept, escalated)[12] for _ in range(3000)]
    expected = cost_quality(np.zeros(40), kept, escalated)[12]
    assert np.mean(drawn) == pytest.approx(expected, abs=4 * np.std(drawn) / 3000**0.5)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_no_more_than_the_budget_is_escalated(gains, budget):
    gain = np.array(gains)
    threshold = threshold_for(gain, budget)
    assert threshold >= 0
    assert (gain > threshold).sum() <= budget * len(gain) + 1e-9
    assert (gain > NEVER).sum() == 0


# Parts


def test_equal_inputs_go_to_one_part_in_any_order():
    contents = [f"sha256:{number % 70}" for number in range(100)]
    parts = divided(contents, 0)
    held = [{contents[row] for row in part} for part in (parts.fit, parts.calibrate, parts.held_out)]
    assert [len(part) for part in held] == [28, 14, 28]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    assert sorted([*parts.fit, *parts.calibrate, *parts.held_out]) == list(range(100))
    backwards = divided(contents[::-1], 0)
    assert {contents[::-1][row] for row in backwards.fit} == held[0]
    assert {contents[row] for row in divided(contents, 1).fit} != held[0]


def test_few_examples_are_refused():
    with pytest.raises(EvaluationError, match="5 different examples") as caught:
        divided([f"sha256:{number % 5}" for number in range(500)], 0)
    assert str(MIN_EXAMPLES) in str(caught.value)


def test_examples_of_their_own_fit_and_the_others_all_measure():
    contents = [f"sha256:{number % 60}" for number in range(80)]
    measuring = [f"sha256:{number}" for number in (*range(57, 90), 89)]
    parts = divided_beside(contents, measuring, 0)
    some = [{contents[row] for row in part} for part in (parts.fit, parts.calibrate)]
    assert [len(part) for part in some] == [38, 19] and not some[0] & some[1]
    # Three contents measure, so they fit nothing.
    assert some[0] | some[1] == {f"sha256:{number}" for number in range(57)}
    assert parts.held_out.tolist() == [*range(80, 114)]
    for few, where in (((contents[:25], measuring), "routing"), ((contents, measuring[:15]), "evaluation")):
        with pytest.raises(EvaluationError, match="different examples") as caught:
            divided_beside(*few, 0)
        assert caught.value.where == where
    with pytest.raises(EvaluationError, match=r"0 different examples: 60 more are left out, .*another split"):
        divided_beside(contents, [*contents, *measuring], 0)


# Verifier


def drawn(count=1000, seed=0, noise=0.3):
    """Examples of two tasks that a feature tells; the merged model is right on the first task only."""
    rng = np.random.default_rng(seed)
    tasks = rng.integers(0, 2, size=count)
    confidence = rng.normal(size=count)
    columns = [tasks + noise * rng.normal(size=count), np.ones(count), confidence]
    features = np.stack(columns, axis=1)
    right = np.stack([tasks == 0, tasks == 0, tasks == 1], axis=1) ^ (rng.uniform(size=(count, 3)) < 0.05)
    contents = tuple(f"sha256:{seed}/{number}" for number in range(count))
    answers = np.where(right[:, 0], tasks, 1 - tasks)  # the class is the task's number
    return Observed(tasks, tasks, answers, contents, features, rng.uniform(size=count) < 0.5, right)


MODELS, BUDGET = ("merged", "first", "second"), Aim()


def fitted(observed, parts):
    return calibrated(fit(observed.at(parts.fit)), observed.at(parts.calibrate))


def reported(observed, aim=BUDGET):
    parts = divided(observed.contents, 0)
    return measure(observed, parts, fitted(observed, parts), MODELS, aim)


def test_a_verifier_tells_whom_to_ask():
    found = reported(drawn(), Aim(budget=0.5))
    assert found.is_useful and found.kept > 0.8
    assert found.operation.escalated.value == pytest.approx(0.5, abs=0.06)
    never, always = found.never.value, found.always.value
    for point in found.costs:
        assert point.random == pytest.approx((1 - point.share) * never + point.share * always)
        assert point.router.low <= point.router.value <= point.router.high
        assert point.oracle >= point.router.value
    by_name = {signal.name: signal for signal in found.signals}
    assert found.best_aurc < by_name["verifier"].aurc.value < by_name["confidence"].aurc.value
    assert by_name["verifier"].brier < by_name["agreement"].brier
    assert "gains" in found.verdict and "merged model alone" in str(found)


def test_a_budget_is_told_as_a_target_and_what_became_of_it():
    found = [reported(drawn(), Aim(budget=step / 40)) for step in range(1, 20)]
    exceeded = [one for one in found if one.operation.escalated.value > one.operation.budget]
    assert exceeded and len(exceeded) < len(found), "held-out examples may exceed it, and need not"
    for one in found:
        how = "more than that" if one in exceeded else "within it"
        share = one.operation.escalated.value
        told = "is a target and no limit: the threshold keeps to it on the examples that chose it; of the"
        assert (
            f"The budget of {one.operation.budget:g} {told} held-out ones {share:.3f} are escalated, {how}."
            in one.table()
        )
        assert one.to_dict()["operation"]["budget"] == one.operation.budget
    assert replace(found[0].operation, budget=None).target == "", "as in reports of earlier versions"


def test_probabilities_are_those_of_scikit_learn_and_calibrated():
    from sklearn.linear_model import LogisticRegression

    observed = drawn()
    parts = divided(observed.contents, 0)
    verifier = fitted(observed, parts)
    logits = verifier.logits(observed.features[parts.calibrate])[:, 2]
    own = LogisticRegression(C=1.0).fit(logits[:, None], observed.right[parts.calibrate, 2])
    expected = own.predict_proba(verifier.logits(observed.features)[:, 2:])[:, 1]
    found = verifier.probabilities(observed.features, observed.answers)
    assert found[:, 2] == pytest.approx(expected)
    held = found[parts.held_out]
    assert held.mean(axis=0) == pytest.approx(observed.right[parts.held_out].mean(axis=0), abs=0.05)


def test_kinds_are_classes_of_tasks_rare_classes_together():
    tasks = np.array([0] * 12 + [1] * 9 + [2] * 4)
    labels = np.array([3] * 5 + [4] * 5 + [5] * 2 + [3] * 4 + [7] * 3 + [8] * 2 + [9] * 4)
    kind_of, classes = kinds_of(tasks, labels)
    # Of task 0 the classes 3 and 4, and two examples too few; of task 1 all together; task 2 is too small.
    assert kind_of.tolist() == [0] * 5 + [1] * 5 + [-1] * 2 + [2] * 9 + [-1] * 4
    assert classes.tolist() == [3, 4, OTHERS]
    assert [found.tolist() for found in kinds_of(tasks[-4:], labels[-4:])] == [[0] * 4, [OTHERS]]


def test_the_expected_class_tells_where_the_merged_model_errs():
    """Kinds have the probabilities .8 and .2 where the feature is 0, and no class 7 is known."""
    verifier = Verifier(
        mean=np.zeros(1), scale=np.ones(1), merged=np.zeros(2), rates=np.full((2, 1), 0.5),
        kinds=np.array([[0, np.log(0.8)], [0, np.log(0.2)]]), classes=np.array([4.0, 6.0]),
        calibration=np.array([[0, 1.0, 0, 0], [1.0, 0, 0, 0]]),
    )  # fmt: skip
    found = verifier.probabilities(np.zeros((3, 1)), np.array([4, 6, 7]))
    assert found[:, 0] == pytest.approx([0.8, 0.2, 0.5])
    assert found[:, 1] == pytest.approx([0.5] * 3)


def test_answers_of_unexpected_classes_are_found_without_any_example_of_a_wrong_one():
    """The merged model errs where nothing but its class tells: the regression on features alone is blind."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, size=600)
    tasks, features = labels // 2, np.zeros((600, 5))
    features[np.arange(600), labels] = 3
    features[:, :4] += 0.3 * rng.normal(size=(600, 4))
    is_right = rng.uniform(size=600) < 0.6
    answers = np.where(is_right, labels, (labels + rng.integers(1, 4, size=600)) % 4)
    right = np.stack([is_right, tasks == 0, tasks == 1], axis=1)
    contents = tuple(f"sha256:{number}" for number in range(600))
    found = reported(Observed(tasks, labels, answers, contents, features, is_right, right), Aim(budget=0.4))
    (area,) = (signal.aurc.value for signal in found.signals if signal.name == "verifier")
    assert area == pytest.approx(found.best_aurc, abs=0.01)
    assert found.kept > 0.9


def test_a_router_of_shuffled_labels_is_worthless():
    """All answers are those of other inputs; of eight such routers at most one passes by luck."""
    observed, rng, found = drawn(400), np.random.default_rng(0), []
    for _ in range(8):
        order = rng.permutation(400)
        names = "tasks", "labels", "answers", "right"
        shuffled = replace(observed, **{name: getattr(observed, name)[order] for name in names})
        found.append(reported(shuffled, Aim(budget=0.5)))
    assert sum(report.is_useful for report in found) <= 1
    assert all("Worthless" in report.verdict for report in found if not report.is_useful)


@pytest.mark.parametrize("everything", [True, False])
def test_models_that_are_all_right_or_all_wrong(everything):
    observed = drawn(200)
    observed = replace(observed, right=np.full((200, 3), everything))
    found = reported(observed, Aim(risk=0.1))
    assert not found.is_useful
    assert found.operation.escalated.value == 0
    if everything:
        assert "nothing to gain" in found.verdict
        assert found.kept is None
        assert found.stated.threshold == NEVER  # the merged model alone is within the risk
    else:
        assert found.stated.threshold is None and "No threshold" in found.stated.text


def test_a_risk_is_stated_where_the_examples_support_it():
    observed = drawn(2000)
    found = reported(observed, Aim(risk=0.15))
    assert found.operation.chosen_by == "risk"
    assert found.stated.bound <= 0.15
    assert found.stated.threshold == found.operation.threshold
    assert found.stated.errors == round((1 - found.operation.accuracy.value) * found.stated.num_examples)
    refused = reported(observed, Aim(risk=0.05))
    assert found.operation.budget is None and "is a target" not in found.table()
    assert refused.stated.threshold is None and refused.operation.chosen_by == "budget"
    assert refused.stated.bound > 0.05


def test_of_equally_promising_checkpoints_the_first():
    choice = choose(np.array([[0.2, 0.6, 0.6], [0.9, 0.1, 0.3]]))
    assert choice.expert.tolist() == [0, 1]
    assert choice.gain == pytest.approx([0.4, -0.6])


def test_arrays_that_are_no_verifier_are_refused():
    verifier = fitted(drawn(), divided(drawn().contents, 0))
    arrays = verifier.arrays()
    again = Verifier.from_arrays(load(save(arrays)), "here")
    asked = drawn().features, drawn().answers
    assert (again.probabilities(*asked) == verifier.probabilities(*asked)).all()
    broken = {
        "missing": {k: v for k, v in arrays.items() if k != "mean"},
        "another": {**arrays, "more": np.zeros(1)},
        "float32": {**arrays, "mean": arrays["mean"].astype(np.float32)},
        "NaN": {**arrays, "scale": arrays["scale"] * np.nan},
        "shape": {**arrays, "mean": np.zeros(7)},
        "experts": {**arrays, "rates": np.zeros((2, 3))},
        "classes": {**arrays, "classes": np.zeros(3)},
        "dimensions": {**arrays, "merged": np.zeros((4, 1))},
    }
    for values in broken.values():
        with pytest.raises(EvaluationError, match="not the arrays"):
            Verifier.from_arrays(values, "here")


# The page


def test_the_page_is_written_from_the_stored_results():
    found = section(json.loads(RESULTS.read_text()))
    page = (ROOT / "docs" / "routing.md").read_text("utf-8")
    assert f"<!-- measured -->\n{found}<!-- /measured -->" in page, "python -m benchmarks.routing --render"


# Models

#: Lines of the documentation that use a router.
(EXAMPLE,) = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "routing.md").read_text("utf-8"), re.M | re.S
)


def write_family(folder: Path) -> None:
    """Write models that say cat, cat and dog to every image, and dark cats and bright dogs."""
    torch.manual_seed(0)
    write_classifiers(folder, {"base": [1.0, 0.0, 0.0], "a": [2.0, 0.0, 0.0], "b": [0.0, 1.5, 0.0]})
    rng = np.random.default_rng(0)
    for name, label, light in (("cats", 0, 60), ("dogs", 1, 180)):
        pixels = rng.integers(light - 50, light + 50, size=(60, 8, 8, 3)).astype(np.uint8)
        features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
        rows = {"image": [PillowImage.fromarray(p) for p in pixels], "label": [label] * 60}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{name}.parquet"))


def recipe_of(**changes):
    data = {"a": {"dataset": "./cats.parquet"}, "b": {"dataset": "./dogs.parquet"}}
    evaluation = {"evaluator": "image-classification", "tasks": data, **changes.pop("evaluation", {})}
    return classifier_recipe(**{"method": "average", "evaluation": evaluation, **changes})


def write_recipe(folder, **changes):
    """Write a recipe, and return it as it is read."""
    (folder / "recipe.yaml").write_text(yaml_text(recipe_of(**changes)))
    return hm.load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A folder with the family, its recipe, and the merged model without a router."""
    folder = tmp_path_factory.mktemp("routing")
    write_family(folder)
    run(write_recipe(folder))
    return folder


@pytest.fixture
def here(merged, tmp_path, monkeypatch):
    """A copy of it in the current folder, without scores of earlier tests."""
    folder = shutil.copytree(merged, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def routed(merged, tmp_path_factory):
    """The same with a router."""
    folder = shutil.copytree(merged, tmp_path_factory.mktemp("routed") / "here")
    route(folder, budget=0.5)
    return folder


def test_files_of_a_router_name_no_folder_of_this_machine(routed):
    for name in ("router.json", "router.safetensors", "README.md"):
        (path,) = routed.rglob(name)
        content = path.read_bytes()
        assert [place for place in (routed, Path.home()) if str(place).encode() in content] == []


@pytest.fixture
def there(routed, tmp_path, monkeypatch):
    folder = shutil.copytree(routed, tmp_path / "there")
    monkeypatch.chdir(folder)
    return folder


def route(folder, **settings):
    recipe = hm.load_recipe(folder / "recipe.yaml")
    return hm.route(recipe, read_lock(recipe.output_path / "recipe.lock.json"), **settings)


def output(folder: Path) -> Path:
    return hm.load_recipe(folder / "recipe.yaml").output_path


DARK, BRIGHT = (PillowImage.new("RGB", (8, 8), (light,) * 3) for light in (60, 180))


def test_a_router_asks_the_checkpoint_that_knows(there):
    router = hm.Router.load(str(output(there)))
    dark, bright = router([DARK, BRIGHT])
    assert (dark.label, dark.model) == ("cat", "merged")
    assert (bright.label, bright.model) == ("dog", "b")
    assert bright.expected["b"] > 0.8 and bright.expected["merged"] < 0.2
    assert "above the threshold" in bright.why and "b is expected right" in bright.why
    assert "not above" in dark.why
    assert router([]) == ()
    assert [one.label for one in router([DARK] * 40 + [BRIGHT])] == ["cat"] * 40 + ["dog"]


def test_the_example_of_the_docs_runs(there, capsys):
    output(there).rename("merged")
    exec(compile(EXAMPLE, "routing.md", "exec"), {"images": [DARK, BRIGHT]})
    dark, bright = capsys.readouterr().out.splitlines()
    assert dark.startswith("cat merged ") and bright.startswith("dog b ")


def test_files_and_card_of_a_router(there):
    folder = output(there)
    assert hm.verify(str(folder))
    assert {*load((folder / ROUTER_WEIGHTS_NAME).read_bytes())} == {*Verifier.__dataclass_fields__}
    values = json.loads((folder / ROUTER_NAME).read_text())
    assert values["report"]["is_useful"] and values["report"]["models"] == ["merged", "a", "b"]
    assert values["digest"] == digest({key: value for key, value in values.items() if key != "digest"})
    assert values["data"]["a"]["examples"] == 60
    assert not list(folder.glob("*.pkl"))
    card = (folder / "README.md").read_text()
    assert "## Routing to the tasks' own checkpoints" in card and "The router gains" in card
    assert "is a target and no limit" in card
    assert {"router.json", "router.safetensors", "router.png", "router.svg"} <= {*contents_of(folder, "me/m")}


def test_the_same_seed_gives_the_same_bytes(there):
    folder = output(there)
    names = (ROUTER_NAME, ROUTER_WEIGHTS_NAME, "router.png", "README.md")
    before = {name: (folder / name).read_bytes() for name in names}
    route(there, budget=0.5)
    assert {name: (folder / name).read_bytes() for name in names} == before
    route(there, budget=0.5, seed=1)
    assert (folder / ROUTER_WEIGHTS_NAME).read_bytes() != before[ROUTER_WEIGHTS_NAME]


def test_the_command_writes_a_router_and_says_what_it_is_worth(here):
    code, out, _ = call("route", "recipe.yaml", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["parts"] == {"fit": 48, "calibrate": 24, "held_out": 48}
    assert told["operation"]["chosen_by"] == "budget"
    assert (output(here) / ROUTER_NAME).is_file()
    code, out, _ = call("route", "recipe.yaml", "--risk", "0.01")
    assert code == 3
    assert "No threshold is stated" in out and "at random" in out


def test_examples_of_the_key_routing_fit_and_all_of_the_evaluation_measure(here):
    names = {"b": "dogs", "a": "cats"}  # not in the order of the tasks
    first, others = (
        {task: {"dataset": f"./{name}.parquet", "split": split} for task, name in names.items()}
        for split in ("test[:40]", "test[35:]")
    )
    write_recipe(here, evaluation={"tasks": others}, routing={"tasks": first})
    found = route(here)
    # Five images of each are examples of both, and fit nothing.
    assert found.parts == {"fit": 47, "calibrate": 23, "held_out": 50}
    assert (found.by_task.value, found.never.value, found.kept) == (1.0, 0.5, pytest.approx(0.6, abs=0.3))
    values = json.loads((output(here) / ROUTER_NAME).read_text())
    assert [values[key]["a"]["examples"] for key in ("routing", "data")] == [40, 25]
    assert hm.Router.load(str(output(here)))([BRIGHT])[0].model == "b"


def test_errors_about_examples_of_the_key_routing_name_it(here):
    rows = Dataset.from_parquet(str(here / "cats.parquet"))
    rows.rename_column("image", "picture").to_parquet(str(here / "pictures.parquet"))
    for key, other in (("routing", "evaluation"), ("evaluation", "routing")):
        names = {key: "pictures", other: "cats"}
        data = {
            part: {"tasks": {"a": {"dataset": f"./{name}.parquet"}, "b": {"dataset": "./dogs.parquet"}}}
            for part, name in names.items()
        }
        write_recipe(here, **data)
        with pytest.raises(EvaluationError) as caught:
            route(here)
        assert caught.value.problems[0].key[:3] == (key, "tasks", "a")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": {"a": {"dataset": "x"}, "c": {"dataset": "x"}}}, r"routing\.tasks\.c: .*'c'"),
        ({"tasks": {"a": {"dataset": "x"}}}, "routing.tasks: there are no examples of b"),
        ({"data": {}}, "routing.*data"),
    ],
)
def test_examples_that_fit_no_router_of_the_recipe_are_refused(changes, told):
    with pytest.raises(RecipeError, match=told):
        parse_recipe(recipe_of(routing=changes))


def test_examples_of_routing_need_an_evaluation():
    values = {key: value for key, value in recipe_of(routing={"tasks": {}}).items() if key != "evaluation"}
    with pytest.raises(RecipeError, match="routing: no evaluation measures a router"):
        parse_recipe(values)


@pytest.mark.parametrize(
    "settings", [{"budget": 1.5}, {"risk": 0.0}, {"confidence": 1.0}, {"budget": float("nan")}]
)
def test_numbers_out_of_range_are_refused(here, settings):
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        route(here, **settings)


def test_other_evaluators_and_few_examples_are_refused(here):
    write_recipe(here, evaluation={"evaluator": "log-likelihood"})
    with pytest.raises(EvaluationError, match="'log-likelihood'"):
        route(here)
    names = {"a": "cats", "b": "dogs"}
    few = {task: {"dataset": f"./{names[task]}.parquet", "split": "test[:3]"} for task in names}
    write_recipe(here, evaluation={"tasks": few})
    with pytest.raises(EvaluationError, match="6 different examples"):
        route(here)
    assert not (output(here) / ROUTER_NAME).exists()


def test_models_that_give_no_finite_values_are_refused(here):
    model = ViTForImageClassification.from_pretrained(here / "a")
    with torch.no_grad():
        model.vit.layernorm.weight.fill_(float("nan"))
        model.classifier.weight.fill_(1.0)
    pixels = torch.zeros(2, 3, 8, 8)

    class Encoded(dict):
        def to(self, device):
            return self

    with pytest.raises(EvaluationError, match="not finite on 2 of 2"):
        look(LoadedModel(model.eval(), None, "a"), [Encoded(pixel_values=pixels)])


def test_padding_changes_no_features(tmp_path):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=3, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    words = tokenizer()
    words.pad_token = words.convert_ids_to_tokens(0)
    model = LoadedModel(BertForSequenceClassification(config).eval(), words, "bert")
    texts = ["a good film", "bad", "an odd one: was it good?"]
    evaluator = TextClassification()
    together = look(model, evaluator.encode_inputs(model, texts)[0]).features
    alone = [look(model, evaluator.encode_inputs(model, [text])[0]).features for text in texts]
    assert together.shape == (3, 2 * 16 + 3 + 1)
    assert together == pytest.approx(np.concatenate(alone), abs=1e-4)


def rewritten(path: Path, change) -> None:
    """Change a record, and write its digest anew, as somebody would who knows the format."""
    values = json.loads(path.read_text())
    del values["digest"]
    change(values)
    path.write_text(json.dumps({"digest": digest(values), **values}))


def test_changed_files_are_refused(there):
    folder = output(there)
    record, arrays = folder / ROUTER_NAME, folder / ROUTER_WEIGHTS_NAME
    stored = {path: path.read_bytes() for path in (record, arrays)}

    def refused(match, kind=EvaluationError):
        with pytest.raises(kind, match=match):
            hm.Router.load(str(folder))
        for path, content in stored.items():
            path.write_bytes(content)

    record.write_bytes(stored[record].replace(b'"seed": 0', b'"seed": 1'))
    refused("was changed")
    record.write_bytes(b"[" * 100_000)
    refused("no record")
    rewritten(record, lambda values: values.update(format=1))
    refused("format 1")
    arrays.write_bytes(stored[arrays][:-1] + b"\0")
    refused("not the file")
    content = save({**load(stored[arrays]), "mean": np.full(3, np.nan)})
    arrays.write_bytes(content)
    from hub_magmax.fleet.routing.record import sha256

    rewritten(record, lambda values: values.update(weights=sha256(content)))
    refused("not the arrays")
    arrays.unlink()
    refused("has no whole router.* Fit it again")
    for path in stored:
        path.unlink()
    refused("has no router.* Fit one: hub-magmax route RECIPE")
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    refused("sha256|differs|changed", OutputError)
    weights.write_bytes(before)
    assert hm.Router.load(str(folder))


def test_a_router_of_another_merge_is_refused(there):
    other = recipe_of(method={"name": "average", "scaling": 0.5}, output={"path": "other"})
    run(hm.parse_recipe(other, folder=there))
    for name in (ROUTER_NAME, ROUTER_WEIGHTS_NAME):
        shutil.copy(output(there) / name, there / "other" / name)
    with pytest.raises(EvaluationError, match="another merge"):
        hm.Router.load(str(there / "other"))


def test_a_missing_or_changed_checkpoint_is_told_when_the_router_is_loaded(there):
    (there / "b").rename(there / "elsewhere")
    with pytest.raises((SourceError, CheckpointError, LockError), match="b"):
        hm.Router.load(str(output(there)))
    shutil.copytree(there / "a", there / "b")
    weights = there / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0" * 8)
    with pytest.raises((LockError, CheckpointError)):
        hm.Router.load(str(output(there)))


@pytest.mark.parametrize("inputs", ["a text", [1], ["a text"], None, DARK])
def test_other_inputs_are_refused(there, inputs):
    router = hm.Router.load(str(output(there)))
    with pytest.raises(ArgumentError, match="images of Pillow"):
        router(inputs)
