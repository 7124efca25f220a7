"""A planted mixture of digits, with checkpoints that are trained here in a few seconds."""

import itertools

import numpy as np
import pytest

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.preference import resolve_preference
from hub_magmax.preference.comparison import compare_samples
from hub_magmax.preference.distance import uniform_shares
from hub_magmax.preference.features import features, load_feature_model
from hub_magmax.preference.mixture import Space
from hub_magmax.quickstart import Settings, Training, make_family
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.preferences import Transport

pytestmark = pytest.mark.slow

SETTINGS = Settings(
    hidden_size=32,
    num_layers=2,
    pretext=Training(epochs=1, learning_rate=1e-3, batch_size=64),
    supervised=Training(epochs=12, learning_rate=1e-3, batch_size=32),
    task=Training(epochs=1, learning_rate=8e-5, batch_size=32, label_smoothing=0.05),
)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("digits") / "family", settings=SETTINGS)


@pytest.fixture(scope="module")
def seen(family):
    """Features of every example under the base model, by split and task."""
    from hub_magmax.evaluation.data import load_examples
    from hub_magmax.recipe.values import Data

    model = load_feature_model(ModelPlace(str(family.base_model)), images=True)
    return {
        (split, task): features(
            model, load_examples(Data(dataset=str(family.data / task), split=split), family.folder), "image"
        )
        for split in ("train", "test")
        for task in family.tasks
    }


def test_transport_ranks_the_two_right_tasks_first_in_nine_of_ten_draws(family, seen):
    spec = Transport.model_validate({"target": {"dataset": "-"}, "train": {}, "features": "base_model"})
    rng = np.random.default_rng(0)
    tasks = list(family.tasks)
    pairs = list(itertools.permutations(range(len(tasks)), 2))
    right = []
    for pair in rng.permutation(pairs)[:10]:
        parts = []
        for task, num in zip(pair, (80, 20), strict=True):
            examples = seen["test", tasks[task]]
            parts.append(examples[rng.choice(len(examples), num, replace=False)])
        space = Space(tuple(seen["train", task][:100] for task in tasks), np.concatenate(parts))
        weights = compare_samples(spec, [space], uniform_shares(100)).draws[0]
        right.append(set(np.argsort(-weights)[:2].tolist()) == set(pair.tolist()))
    assert np.mean(right) >= 0.9


def test_labels_of_a_planted_mixture_of_digits_are_within_five_hundredths(family):
    from datasets import concatenate_datasets, load_dataset

    parts = [
        load_dataset(str(family.data / task), split=f"test[:{num}]")
        for task, num in (("two-three", 80), ("eight-nine", 20))
    ]
    concatenate_datasets(parts).to_parquet(str(family.folder / "target.parquet"))
    classes = {task: list(digits) for task, digits in family.classes.items()}
    recipe = parse_recipe(
        {
            "schema": 1,
            "base_model": "./checkpoints/base",
            "tasks": [{"name": task, "model": f"./checkpoints/{task}"} for task in family.tasks],
            "preference": {"labels": {"target": {"dataset": "target.parquet"}, "classes": classes}},
        },
        folder=family.folder,
    )
    found = resolve_preference(recipe).weights
    wanted = dict.fromkeys(family.tasks, 0.0) | {"two-three": 0.8, "eight-nine": 0.2}
    assert found == pytest.approx(wanted, abs=0.05)
