"""A sweep: real merges in memory, what it writes, and what it refuses."""

import csv
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from benchmarks.sweeps import METHODS, RESULTS
from hub_magmax.analysis.sweeping import sweep, sweepable
from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe, parse_recipe, updated
from hub_magmax.reporting.explorer import render_explorer
from hub_magmax.reporting.figures import front_figure
from hub_magmax.reporting.pareto import hypervolume
from tests.classifiers import classifier_recipe, write_leaning
from tests.test_reporting_explorer import make_surface, measured_in
from tests.test_reporting_figures import check_texts


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_leaning(folder)
    return folder


def recipe_values_(**changes):
    tasks = {"a": {"dataset": "./cats.parquet"}, "b": {"dataset": "./dogs.parquet"}}
    values = classifier_recipe(
        method={"name": "average", "scaling": 1.0},
        evaluation={"tasks": tasks},
        sweep={"walk": "grid", "budget": 5},
    )
    return values | changes


def make_recipe(family, **changes):
    return parse_recipe(recipe_values_(**changes), folder=family)


def swept(recipe):
    return sweep(recipe, lock(sweepable(recipe)))


def test_every_point_is_what_a_written_merge_scores(family, tmp_path):
    recipe = make_recipe(family)
    surface = swept(recipe)
    assert [point.weights for point in surface.points] == [
        (0.5, 0.5),  # the recipe's own
        (0, 1),
        (0.25, 0.75),
        (0.75, 0.25),
        (1, 0),
    ]
    for number, point in enumerate(surface.points[2:4]):
        written = updated(recipe, {"preference": {"weights": dict(zip("ab", point.weights, strict=True))}})
        locked = lock(written)
        merge(plan(written, locked), tmp_path / str(number))
        scores = evaluate(written, locked, tmp_path / str(number))
        for found in point.scores:
            stored = scores.get("merged", found.task)
            assert replace(stored, outcomes=(), probabilities=()) == found


def test_base_model_and_own_checkpoints_are_scored_too(family):
    surface = swept(make_recipe(family))
    # By hand: the base model says emu, `a` says cat, `b` says dog.
    assert [score.value for score in surface.base_model] == [0.1, 0.3]
    assert [(score.model, score.task, score.value) for score in surface.own] == [
        ("a", "a", 0.9),
        ("b", "b", 0.7),
    ]
    assert [[score.value for score in point.scores] for point in surface.points] == [
        [0.9, 0], [0, 0.7], [0, 0.7], [0.9, 0], [0.9, 0],
    ]  # fmt: skip
    assert surface.front == (0, 1, 2, 3, 4)
    assert surface.hypervolume == 0


def test_the_adaptive_walk_spends_its_budget_and_no_more(family):
    surface = swept(make_recipe(family, sweep={"budget": 9}))
    assert len(surface.points) == len({point.weights for point in surface.points}) == 9
    assert all(sum(point.weights) == pytest.approx(1, abs=1e-12) for point in surface.points)


def test_the_command_writes_table_picture_and_page_beside_the_recipe(family, tmp_path):
    shutil.copytree(family, tmp_path / "work")
    path = tmp_path / "work" / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values_()))
    done = CliRunner().invoke(main, ["sweep", str(path), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    values = json.loads(done.stdout)
    assert values["front"] == [0, 1, 2, 3, 4] and len(values["points"]) == 5
    assert (path.parent / "recipe.tradeoffs.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO((path.parent / "recipe.tradeoffs.csv").read_text())))
    assert [float(row["accuracy of a"]) for row in rows] == [0.9, 0, 0, 0.9, 0.9]
    assert [float(row["weight of b"]) for row in rows] == [0.5, 1, 0.75, 0.25, 0]
    assert [int(row["recipe"]) for row in rows] == [1, 0, 0, 0, 0]
    # Beside a merged model the page is linked from its card.
    assert CliRunner().invoke(main, ["run", str(path)], catch_exceptions=False).exit_code == 0
    card = path.parent / "merged" / "README.md"
    assert "tradeoffs.html" not in card.read_text()
    done = CliRunner().invoke(main, ["sweep", str(path)], catch_exceptions=False)
    best = "for the recipe's weights (a 0.5, b 0.5) the best of 5 preferences is the recipe's own: "
    assert done.stdout.startswith(
        best + "mean accuracy 0.450 under these weights, where the base model has 0.200"
    )
    # True of every sweep as small as this one, and therefore not said.
    assert "on the front" not in done.stdout and "hypervolume" not in done.stdout
    assert "[tradeoffs.html](tradeoffs.html)" in card.read_text()
    assert (path.parent / "merged" / "tradeoffs.html").is_file()
    assert CliRunner().invoke(main, ["verify", str(card.parent)], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize("verb", ["sweep", "compare"])
def test_faults_of_checkpoints_are_found_as_by_a_merge(family, tmp_path, verb):
    shutil.copytree(family, tmp_path / "work")
    shutil.copy(tmp_path / "work/base/model.safetensors", tmp_path / "work/a/model.safetensors")
    path = tmp_path / "work" / "recipe.yaml"
    compared = {"tune": {"dataset": "./cats.parquet"}, "report": {"dataset": "./dogs.parquet"}}
    path.write_text(yaml.safe_dump(recipe_values_(compare={**compared, "methods": ["average"]})))
    done = CliRunner().invoke(main, [verb, str(path)])
    assert done.exit_code == 1 and "--in-spite-of unchanged:a" in done.stderr
    words = [verb, str(path), "--in-spite-of", "unchanged:a", "--format", "csv"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0 and "wrote" in done.stderr
    assert len(list(csv.DictReader(io.StringIO(done.stdout)))) == (5 if verb == "sweep" else 3)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"evaluation": None}, EvaluationError, "needs examples to score by"),
        ({"method": "magmax"}, RecipeError, "magmax ignores the preference"),
        ({"tasks": [{"name": "a", "model": "./a"}], "sweep": None}, RecipeError, "one task has one"),
    ],
)
def test_sweeps_that_say_nothing_are_refused(family, changes, kind, message):
    if "tasks" in changes:
        changes = changes | {"evaluation": {"tasks": {"a": {"dataset": "./cats.parquet"}}}}
    with pytest.raises(kind, match=message):
        swept(make_recipe(family, **changes))


@pytest.mark.parametrize(
    ("preference", "wanted"),
    [
        (None, (0.5, 0.5)),
        ({"weights": {"a": 0.7, "b": 0.3}}, (0.7, 0.3)),
        ({"geometric": {"ratio": 3}}, (0.25, 0.75)),
        ({"labels": {"target": {"dataset": "./cats.parquet"}, "classes": {"a": [0], "b": [1]}}}, ()),
    ],
)
def test_a_sweep_knows_the_weights_that_the_recipe_itself_wants(family, preference, wanted):
    recipe = parse_recipe(recipe_values_(preference=preference), folder=family)
    assert sweep(recipe, lock(sweepable(recipe))).wanted == pytest.approx(wanted)


def test_the_recipes_own_weights_are_a_point_that_table_and_verdict_name(family):
    surface = swept(make_recipe(family, preference={"weights": {"a": 0.4, "b": 0.6}}))
    # One more than the lattice of five, and the first: merged for b it answers dog, as 0.25, 0.75 does.
    assert len(surface.points) == 6 and surface.asked == 0
    assert surface.points[0].weights == (0.4, 0.6)
    assert [score.value for score in surface.points[0].scores] == [0, 0.7]
    assert "the recipe's own: mean accuracy 0.420" in surface.verdict[0]
    liked = swept(make_recipe(family, preference={"weights": {"a": 0.55, "b": 0.45}}, method="average"))
    assert (liked.asked, liked.best) == (0, 0)
    assert surface.table().splitlines()[2].startswith("point ")
    assert surface.table().splitlines()[3].startswith("recipe, front  ")
    assert surface.to_frame()["recipe"].tolist() == [1, 0, 0, 0, 0, 0]


def test_a_point_that_is_better_for_the_recipes_weights_is_said_beside_its_own(family):
    surface = replace(swept(make_recipe(family)), wanted=(0.4, 0.6))
    # 0.4 x 0.9 under the recipe's own point, 0.6 x 0.7 at (0, 1).
    assert "is b 1: mean accuracy 0.420 under" in surface.verdict[0]
    assert "where the recipe's own has 0.360 and the base model has 0.220" in surface.verdict[0]


@pytest.mark.parametrize("where", ["absolute", "relative"])
def test_the_recipe_of_a_point_runs_beside_the_recipe_and_gives_the_scores_of_the_point(
    family, tmp_path, where
):
    shutil.copytree(family, tmp_path / "work")
    folder = tmp_path / "work"
    path = folder / "recipe.yaml"
    output = {"path": str(folder / "out") if where == "absolute" else "./out/"}
    path.write_text(yaml.safe_dump(recipe_values_(output=output)))
    for words in (["run", str(path)], ["sweep", str(path)]):
        assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    page = measured_in((folder / "out" / "tradeoffs.html").read_text())
    outputs = [point["output"] for point in page["points"]]
    assert len({*outputs}) == 5 and all(name.startswith("out-") for name in outputs)
    assert not any((folder / name).exists() for name in outputs)
    text = written_by_the_page(page, 2)
    assert text.startswith("# One point of a sweep. Save it beside the recipe of the sweep")
    (folder / "pasted.yaml").write_text(text)
    done = CliRunner().invoke(main, ["run", str(folder / "pasted.yaml"), "--json"], catch_exceptions=False)
    scores = json.loads(done.stdout)["scores"]["scores"]
    merged = {score["task"]: score["value"] for score in scores if score["model"] == "merged"}
    assert [*merged.values()] == [score[0] for score in page["points"][2]["scores"]]
    assert (folder / outputs[2] / "model.safetensors").is_file()


def written_by_the_page(page, index):
    """Return what the page's script makes of a point."""
    point = page["points"][index]
    weights = ", ".join(
        f"{json.dumps(task)}: {weight:g}"
        for task, weight in zip(page["tasks"], point["weights"], strict=True)
    )
    head = f"{page['recipe']}preference:\n  weights: {{{weights}}}\n"
    return f"{head}output:\n  path: {json.dumps(point['output'])}\n{page['output']}"


def test_the_recipe_of_a_point_has_the_method_that_was_chosen_and_says_what_is_left_out(family):
    output = {"path": "out", "shard_size": "1GB", "push_to_hub": "me/mine"}
    recipe = make_recipe(family, method={"name": "average"}, output=output)
    facts = measured_in(render_explorer(recipe, swept(recipe)))
    assert facts["output"] == "  shard_size: 1000000000\n  push_to_hub: me/mine\n"
    assert yaml.safe_load(facts["recipe"])["method"] == {"name": "average"}
    assert "left out" not in facts["recipe"]
    compared = {"tune": {"dataset": "./cats.parquet"}}
    auto = make_recipe(family, method="auto", compare=compared, base_model="/elsewhere/base")
    facts = measured_in(render_explorer(auto, swept(recipe)))
    assert yaml.safe_load(facts["recipe"])["method"] == {"name": "average", "scaling": 1.0}
    assert "# Paths of the machine are left out of pages" in facts["recipe"]


@pytest.mark.parametrize(
    "preference",
    [
        {"labels": {"target": {"dataset": "./cats.parquet"}, "classes": {"a": [0], "b": [1]}}},
        {"coefficients": {"a": 1, "b": -0.5}},
    ],
)
def test_own_weights_that_are_no_known_shares_are_not_measured_and_a_line_says_so(family, preference):
    method = {"name": "task_arithmetic", "scaling": 1.0}
    recipe, said = make_recipe(family, preference=preference, method=method), []
    locked = lock(recipe if "coefficients" in preference else sweepable(recipe))
    surface = sweep(recipe, locked, report=said.append)
    assert surface.asked is None and "the recipe's own" in said[0]
    assert said[-1] == "preference 5 of 5: 1/0"


@pytest.mark.parametrize(("walk", "least"), [("adaptive", 21), ("grid", 20), ("schedule", 2)])
def test_validate_and_sweep_agree_on_the_budget_of_twenty_tasks(walk, least):
    tasks = [{"name": f"t{number}", "model": f"./t{number}"} for number in range(20)]
    values = recipe_values_(tasks=tasks, evaluation={"tasks": {"t0": {"dataset": "./cats.parquet"}}})
    recipe = parse_recipe(values | {"sweep": {"walk": walk, "budget": least}})
    assert sweepable(recipe).task_names == recipe.task_names
    if least > 2:
        with pytest.raises(
            RecipeError, match=rf"{least - 1} preferences .* 20 tasks apart; .* {least}, better"
        ):
            parse_recipe(values | {"sweep": {"walk": walk, "budget": least - 1}})


def test_a_sweep_of_more_tasks_than_the_default_budget_says_how_many_it_needs():
    tasks = [{"name": f"t{number}", "model": f"./t{number}"} for number in range(60)]
    values = recipe_values_(tasks=tasks, evaluation={"tasks": {"t0": {"dataset": "./cats.parquet"}}})
    with pytest.raises(RecipeError, match="Give it at least 61, better 1200"):
        sweepable(parse_recipe(values | {"sweep": None}))


def test_the_picture_of_the_front_shows_every_model_on_it():
    surface = make_surface()
    axes = front_figure(surface).axes[0]
    _, front = [line for line in axes.lines if line.get_marker() == "o"]
    assert front.get_ydata() == pytest.approx([100 * surface.values[index, 0] for index in surface.front])


def test_the_picture_of_the_front_rings_the_best_point_and_the_recipes_own():
    surface = replace(make_surface(), wanted=(1.0, 0.0, 0.0), asked=3)
    axes = front_figure(surface).axes[0]
    own, best = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert (own.get_marker(), own.get_xdata()[0]) == ("s", surface.points[3].weights[0])
    assert (best.get_marker(), best.get_xdata()[0]) == ("o", 1.0)


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
@pytest.mark.parametrize("letter", ["i", "W"])
def test_no_label_of_the_front_overlaps_another_or_leaves_the_picture(num_tasks, letter):
    surface = make_surface(num_tasks)
    surface = replace(surface, wanted=(1.0, *(0.0,) * (num_tasks - 1)), asked=1)
    names = tuple(f"{letter * 30}{number}" for number in range(num_tasks))
    figure = front_figure(replace(surface, tasks=names, evaluated=names))
    check_texts(figure, 2 * num_tasks + 4)


def test_on_digits_sixty_tries_found_the_front_of_a_five_times_denser_grid():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert {row["method"] for row in rows} == {method["name"] for method in METHODS}
    for row in rows:
        assert row["tries"]["adaptive"] <= 60 and row["tries"]["dense"] >= 300
        assert row["adaptive_above_base"] >= 0.99


@pytest.mark.slow
def test_on_digits_a_few_tries_find_the_front_of_a_denser_grid(quickstart_folder):
    """The same with 60 tries and 300 points takes minutes: `python -m benchmarks.sweeps` stores it."""
    recipe = load_recipe(quickstart_folder / "recipe.yaml")
    names = ("zero-one", "four-five", "eight-nine")
    values = recipe.to_dict() | {
        "preference": None,
        "tasks": [t for t in recipe.to_dict()["tasks"] if t["name"] in names],
    }
    values["evaluation"]["tasks"] = {name: values["evaluation"]["tasks"][name] for name in names}
    few, many = (
        swept(parse_recipe(values | {"sweep": spec}, folder=quickstart_folder))
        for spec in ({"budget": 16}, {"walk": "grid", "budget": 45})
    )
    # The lattice has no point with three equal weights, so the recipe's own is one more.
    assert (len(few.points), len(many.points)) == (16, 46)
    floor = [score.value for score in many.base_model]
    assert few.hypervolume == hypervolume(few.values, floor)
    assert few.hypervolume >= 0.9 * many.hypervolume > 0
    assert np.mean([(point > floor).all() for point in few.values[7:]]) > 0.5
