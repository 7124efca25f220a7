"""Rounds of tuning and merging: against gradient descent, FedAvg and formulas, resumed, rebuilt, refused."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hub_magmax as hm
from hub_magmax.cli import main
from hub_magmax.errors import OutputError, RecipeError
from hub_magmax.files import code_digest
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.training.order import ExampleOrder, seed_of
from hub_magmax.training.rounds import rounds_of
from tests.families import yaml_text
from tests.learners import CLASSES, TEXTS, training_recipe, write_learner

#: A step of plain gradient descent, once AdamW is SGD.
PLAIN = {"schedule": "constant", "warmup": 0, "clip_norm": None, "weight_decay": 0, "learning_rate": 0.5}

#: Three rounds of all that rounds can have.
ALL = {"epochs": 0.75, "steps": None, "batch_size": 2}
ROUNDS = {"rounds": 3, "step": 0.5, "momentum": 0.25}


@pytest.fixture
def descent(tmp_path, monkeypatch):
    """A folder whose model has no dropout, and training without AdamW's moments."""
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    return write_learner(tmp_path / "plain", dropout=0.0)


def recipe_of(folder, alternate, changes=None, **others):
    """Return a recipe without scores, whose tasks all begin at the same model."""
    values = training_recipe({"order": "from_base", "alternate": alternate} | (changes or {}), **others)
    values["training"]["evaluator"] = values.pop("evaluation")["evaluator"]
    return parse_recipe({key: value for key, value in values.items() if value is not None}, folder=folder)


def alternate(folder, alternate, changes=None, *, method="average", progress=None, **others):
    recipe = recipe_of(folder, alternate, changes, method=method, output={"path": "out"}, **others)
    return hm.alternate(recipe, **({} if progress is None else {"progress": progress}))


def weights(folder):
    return load_file(folder / "model.safetensors")


def difference(found, expected):
    assert found.keys() == expected.keys()
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


class Learner:
    """The oracle's model: weights in, gradient of a task's mean loss out."""

    def __init__(self, folder):
        self.words = AutoTokenizer.from_pretrained(folder / "base")
        self.model = AutoModelForSequenceClassification.from_pretrained(folder / "base").eval()

    @property
    def start(self):
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def gradient(self, values, rows):
        self.model.load_state_dict(values, strict=False)
        encoded = self.words([text for text, _ in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([CLASSES.index(label) for _, label in rows])
        named = dict(self.model.named_parameters())
        loss = cross_entropy(self.model(**encoded).logits, labels)
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def test_a_step_of_every_task_and_their_average_is_joint_gradient_descent(descent):
    alternate(descent, {"rounds": 3}, PLAIN | {"steps": 1, "batch_size": 4})
    oracle = Learner(descent)
    values = oracle.start
    for _ in range(3):
        gradients = [oracle.gradient(values, TEXTS[task]) for task in ("a", "b")]
        values = {name: value - 0.5 * (gradients[0][name] + gradients[1][name]) / 2 for name, value in
                  values.items()}  # fmt: skip
    found = weights(descent / "out")
    assert difference(found, values) < 1e-6
    assert difference(found, weights(descent / "base")) > 1e-2


def test_rounds_of_the_weighted_average_are_federated_averaging(descent):
    """Every client takes part, by its share of the examples (McMahan et al., arXiv:1602.05629)."""
    rows = {"a": TEXTS["a"] + [("good so good", "good"), ("odd film odd", "odd")] * 2, "b": TEXTS["b"]}
    for task, own in rows.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in own]
        (descent / f"{task}.jsonl").write_text("\n".join(lines))
    changes = PLAIN | {"steps": None, "epochs": 1, "batch_size": 4}
    shares = {"a": 2 / 3, "b": 1 / 3}
    given = {"preference": {"weights": shares}}
    alternate(descent, {"rounds": 2}, changes, **given)
    oracle, seeds = Learner(descent), [0, seed_of(0, "round 2")]
    values = oracle.start
    for seed in seeds:
        total = {name: torch.zeros_like(value) for name, value in values.items()}
        for task, own in rows.items():
            client, order = (
                dict(values),
                ExampleOrder(len(own), seed_of(seed_of(seed, f"task {task}"), "part 0")),
            )
            for step in range(len(own) // 4):
                gradient = oracle.gradient(
                    client, [own[place] for place in order.between(4 * step, 4 * step + 4)]
                )
                client = {name: value - 0.5 * gradient[name] for name, value in client.items()}
            total = {name: value + shares[task] * client[name] for name, value in total.items()}
        values = total
    assert difference(weights(descent / "out"), values) < 2e-6


@pytest.mark.parametrize("method", ["average", {"name": "dare_ties", "density": 0.5}])
def test_one_round_is_the_merge_of_tasks_trained_from_the_base(learner, folder, tmp_path, method):
    given = {"method": method, "preference": {"weights": {"a": 0.7, "b": 0.3}}, "seed": 3}
    alternate(folder, {"rounds": 1}, {"steps": 2}, **given)
    # Files say what they were made of, so that the checkpoints have the same names.
    other = shutil.copytree(learner, tmp_path / "other")
    tasks = [{"name": name, "model": f"./out.rounds/1/tasks/{name}"} for name in "ab"]
    recipe = recipe_of(other, None, {"steps": 2}, output={"path": "out"}, tasks=tasks, **given)
    hm.finetune(recipe)
    hm.run(recipe)
    assert digest(folder / "out") == digest(other / "out")


@pytest.fixture(scope="module")
def finished(learner, tmp_path_factory):
    """A folder in which all rounds are finished, and the calls that its progress got."""
    folder = shutil.copytree(learner, tmp_path_factory.mktemp("finished") / "all")
    counted = Counting()
    alternate(folder, ROUNDS, ALL, progress=counted)
    return folder, counted.calls


class Stopped(Exception):
    pass


class Counting:
    """Counts the calls of all bars; at one of them it may stop the program."""

    def __init__(self, last=None):
        self.calls, self.last = 0, last

    @contextmanager
    def __call__(self, total, doing, unit):
        yield self.advance

    def advance(self, count):
        self.calls += 1
        if self.calls == self.last:
            raise Stopped


def test_every_step_is_that_of_its_formula(finished):
    folder, _ = finished
    places = [folder / "base", *(folder / "out.rounds" / str(number) / "model" for number in (1, 2))]
    models = [weights(place) for place in (*places, folder / "out")]
    merged = [weights(folder / "out.rounds" / str(number) / "merged") for number in (1, 2, 3)]
    for name, start in models[0].items():
        expected = start + 0.5 * (merged[0][name] - start)  # there is no step before the first
        torch.testing.assert_close(models[1][name], expected, atol=1e-6, rtol=0)
        for number in (1, 2):
            now, before = models[number][name], models[number - 1][name]
            expected = now + 0.5 * (0.75 * (merged[number][name] - now) + 0.25 * (now - before))
            torch.testing.assert_close(models[number + 1][name], expected, atol=1e-6, rtol=0)
    assert difference(models[2], models[3]) > 1e-4


@pytest.mark.parametrize("part", [0.3, 0.55, 0.99])
def test_stopped_rounds_go_on_to_the_same_bytes(finished, folder, part):
    done, calls = finished
    keep = part == 0.55
    with pytest.raises(Stopped):
        alternate(folder, ROUNDS | {"keep": keep}, ALL, progress=Counting(max(1, int(part * calls))))
    assert not (folder / "out").exists()
    made = alternate(folder, ROUNDS | {"keep": keep}, ALL)
    assert digest(folder / "out") == digest(done / "out")
    assert [one.model.rpartition("here/")[2] for one in made.rounds] == [
        "out.rounds/1/model", "out.rounds/2/model", "out",
    ]  # fmt: skip
    left = sorted(path.relative_to(folder).as_posix() for path in folder.glob("out.rounds/*/*"))
    everything = [f"out.rounds/{number}/{name}" for number in (1, 2) for name in ("merged", "model", "tasks")]
    dropped = ["out.rounds/1/model", "out.rounds/2/model"]  # the last step needs both
    assert left == [*(everything if keep else dropped), "out.rounds/3/merged", "out.rounds/3/tasks"]


def digest(folder):
    return code_digest(folder.rglob("*.safetensors"), folder)


def test_finished_rounds_are_not_made_again_and_each_is_rebuilt_from_its_lock(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "here")
    remains = folder / "out.rounds" / "2" / "model.partial"  # of a process that was killed after its rename
    remains.mkdir()
    (remains / "lock").touch()
    made = alternate(folder, ROUNDS, ALL)
    assert not remains.exists()
    assert [one.is_new for one in made.rounds] == [False] * 3 and made.run.merged_before
    for number in (1, 2, 3):
        hm.rebuild(str(folder / "out.rounds" / str(number) / "merged"), folder=folder)
    for place in ("out.rounds/1/model", "out.rounds/2/model", "out"):
        hm.rebuild(str(folder / place), folder=folder)


def test_rounds_of_another_recipe_are_refused(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "here")
    shutil.rmtree(folder / "out")
    with pytest.raises(OutputError, match=r"round 2 was made by another recipe.*another output.path"):
        alternate(folder, ROUNDS, ALL | {"learning_rate": 0.1})
    with pytest.raises(OutputError, match="round 2 was made by another recipe"):
        alternate(folder, ROUNDS, ALL, method="magmax")


def test_a_round_keeps_the_null_that_clips_nothing(tmp_path):
    recipe = recipe_of(tmp_path, {"rounds": 2}, {"clip_norm": None})
    assert [one.merge.training.clip_norm for one in rounds_of(recipe)] == [None, None]
    assert parse_recipe(recipe.to_dict(), folder=tmp_path) == recipe


def test_later_rounds_draw_anew_and_the_first_one_as_the_recipe_says(folder):
    given = {"seed": 7, "method": {"name": "dare", "density": 0.5}, "output": {"path": "../out"}}
    recipe = recipe_of(folder, {"rounds": 4}, {"seed": 5}, **given)
    rounds = rounds_of(recipe)
    assert [one.number for one in rounds] == [1, 2, 3, 4] and not any(one.step for one in rounds)
    assert (rounds[0].merge.seed, rounds[0].merge.training.seed) == (7, 5)
    assert len({one.merge.seed for one in rounds} | {one.merge.training.seed for one in rounds}) == 8
    bases = ["./base", *(f"../out.rounds/{number}/model" for number in (1, 2, 3))]
    assert [one.merge.base_model for one in rounds] == bases
    assert [task.model for task in rounds[2].merge.tasks] == [f"../out.rounds/3/tasks/{t}" for t in "ab"]
    assert rounds[3].merge.output == recipe.output


def test_published_is_the_last_model_alone_and_statistics_are_of_each_round(folder):
    tasks = [{"name": name, "model": f"./{name}", "statistics": f"./{name}-statistics"} for name in "ab"]
    output = {"path": "out", "push_to_hub": "me/rounds", "keep": False, "dtype": "float32"}
    first, last = rounds_of(recipe_of(folder, {"rounds": 2, "step": 0.5}, tasks=tasks, output=output))
    for inner in (first.merge, first.step, last.merge):
        assert (inner.output.push_to_hub, inner.output.keep, inner.output.dtype) == (None, True, "float32")
    assert last.step.output.push_to_hub == "me/rounds" and not last.step.output.keep
    places = [task.statistics for one in (first, last) for task in one.merge.tasks]
    assert places == [f"./out.rounds/{number}/statistics/{task}" for number in (1, 2) for task in "ab"]
    assert replace(first, step=None).model.name == "merged"


REFUSED = {
    "order": ({"order": "sequential"}, {}, "every task begins at the same model.*order: from_base"),
    "data": ({"data": {"a": {"dataset": "./a.jsonl"}}}, {}, "no data to train b on in every round"),
    "base": (
        {},
        {"tasks": [{"name": "a", "model": "./a", "base": "./other"}, {"name": "b", "model": "./b"}]},
        "not at a base of its own",
    ),
    "name": (
        {"data": {"a": {"dataset": "./a.jsonl"}, "round-merge": {"dataset": "./b.jsonl"}}},
        {"tasks": [{"name": "a", "model": "./a"}, {"name": "round-merge", "model": "./b"}]},
        "'round-merge' is what a round's step calls a part of its own",
    ),
    "format": ({}, {"output": {"format": "selection"}, "method": "magmax"}, "begins at a whole model"),
    "sites": ({}, {"sites": {"north": {"output": {"path": "n"}}}}, "a round ends with one model"),
}


@pytest.mark.parametrize("changes, others, told", REFUSED.values(), ids=REFUSED)
def test_a_recipe_without_rounds_of_its_tasks_is_refused(tmp_path, changes, others, told):
    with pytest.raises(RecipeError, match=f"(?s){told}"):
        recipe_of(tmp_path, {"rounds": 2}, changes, **others)


def test_a_recipe_without_rounds_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no `training.alternate`.*rounds: 5"):
        hm.alternate(recipe_of(tmp_path, None))


def test_the_verb_scores_the_last_model_and_tells_every_round(folder, monkeypatch):
    monkeypatch.chdir(folder)
    training = {"order": "from_base", "steps": 1, "alternate": {"rounds": 3, "step": 0.5, "keep": False}}
    values = training_recipe(training, norms="clipped", output={"path": "out"})
    (folder / "recipe.yaml").write_text(yaml_text(values))
    done = CliRunner().invoke(main, ["alternate", "recipe.yaml", "--set", "training.alternate.rounds=2"])
    assert done.exit_code == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()[:2]] == [
        ["round", "1", "out.rounds/1/model", "made"],
        ["round", "2", "out", "made"],
    ]
    assert "accuracy" in done.stdout and (folder / "out" / "README.md").is_file()
    again = CliRunner().invoke(
        main, ["alternate", "recipe.yaml", "--set", "training.alternate.rounds=2", "--json"]
    )
    assert [one["is_new"] for one in json.loads(again.stdout)["rounds"]] == [False, False]
    written = [path.read_bytes() for path in folder.glob("out*/**/*.[jmy]*") if path.is_file()]
    assert written and not any(str(folder).encode() in content for content in written)
