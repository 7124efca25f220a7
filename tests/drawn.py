"""Made-up results, for tests of what is drawn from them: any number of tasks, with names of any length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hub_magmax.evaluation.scores import Score, Scores
from hub_magmax.reporting.diagnosis import Diagnosis
from hub_magmax.reporting.diagnosis_groups import Group, Overlap, make_group
from hub_magmax.reporting.figures import Row
from hub_magmax.reporting.tradeoff_surface import Point, Surface


def long_names(count: int) -> tuple[str, ...]:
    """Return names that differ in the middle or at the end, as those of real checkpoints do."""
    kinds = ("sentiment-of-product-reviews", "natural-language-inference", "summaries-of-news-articles")
    return tuple(f"{kinds[n % 3]}-{n:02d}-learning-rate-3e-5-seed-{n % 4}" for n in range(count))


def draw_group(tasks: Sequence[str], name: str, seed: int = 0, *, num_elements: int = 10**6) -> Group:
    """Return sums as random task vectors, half of which share a direction, have them."""
    rng = np.random.default_rng(seed)
    count = len(tasks)
    vectors = rng.standard_normal((count + 1, 4 * count + 40))
    vectors[1 : 1 + count // 2] += rng.standard_normal(4 * count + 40)
    vectors[0] *= 30
    signs = np.sign(vectors[1:])
    shared = np.full((count, count), num_elements / 2)
    agreeing = shared * (1 + signs @ signs.T / vectors.shape[1]) / 2
    wins = rng.multinomial(num_elements, rng.dirichlet(np.ones(count))).astype(float)
    lacking = np.maximum(num_elements / count - wins, 0)
    changed = np.full(count, num_elements / 2)
    products = vectors @ vectors.T
    return make_group(name, num_elements, num_elements, products, agreeing, shared, changed, wins, lacking)


def draw_diagnosis(tasks: Sequence[str], *, num_layers: int = 6, method: str = "average") -> Diagnosis:
    """Return the diagnosis of random task vectors."""
    names = [f"model.encoder.layers.{number}" for number in range(num_layers)]
    layers = tuple(draw_group(tasks, name, seed) for seed, name in enumerate(names))
    overlap = Overlap("model.embed.weight", tuple(map(tuple, np.eye(len(tasks)).tolist())), 0.1)
    unchanged = (0,) * len(tasks)
    return Diagnosis(tuple(tasks), layers, layers[0], unchanged, 9, (overlap,), (), 0.5, method)


def draw_score(model: str, task: str, value: float, num_examples: int = 200) -> Score:
    """Return a score with an interval of about the width it would have."""
    half = 1.96 * np.sqrt(max(value * (1 - value), 0.01) / num_examples)
    return Score(model, task, value, max(value - half, 0.0), min(value + half, 1.0), num_examples)


def draw_scores(tasks: Sequence[str], *, seed: int = 0) -> Scores:
    """Return accuracies of all models; the first task's own checkpoint is always right."""
    rng = np.random.default_rng(seed)
    found = []
    for number, task in enumerate(tasks):
        base, own = rng.uniform(0.1, 0.5), 1.0 if number == 0 else rng.uniform(0.7, 1.0)
        merged = base + (own - base) * rng.uniform(0.1, 1.0)
        size = int(rng.integers(100, 2000))
        for model, value in (("base_model", base), (task, own), ("merged", merged)):
            found.append(draw_score(model, task, float(value), size))
    return Scores("accuracy", "image-classification", tuple(found), {})


def draw_preference(tasks: Sequence[str], *, seed: int = 0) -> dict[str, float]:
    """Return weights that sum to 1."""
    weights = np.random.default_rng(seed).dirichlet(np.full(len(tasks), 0.7))
    return dict(zip(tasks, weights.tolist(), strict=True))


def draw_surface(tasks: Sequence[str], *, num_points: int = 24, seed: int = 0) -> Surface:
    """Return models whose scores grow with the weights, the recipe's own preference among them."""
    rng = np.random.default_rng(seed)
    count = len(tasks)
    even = np.full((1, count), 1 / count)
    corners = np.eye(count)
    drawn = rng.dirichlet(np.full(count, 0.5), max(num_points - count - 1, 1))
    wanted = tuple(draw_preference(tasks, seed=seed).values())
    base = rng.uniform(0.1, 0.5, count)
    own = rng.uniform(0.7, 1.0, count)
    own[0] = 1.0
    points = []
    for weights in np.concatenate([even, corners, drawn]):
        values = base + (own - base) * (0.9 * weights + 0.1) ** 0.4 * rng.uniform(0.9, 1.0, count)
        scores = tuple(draw_score("merged", task, float(v)) for task, v in zip(tasks, values, strict=True))
        points.append(Point(tuple(weights.tolist()), scores))
    return Surface(
        "accuracy",
        True,
        {"name": "average", "scaling": 1.0},
        "grid",
        tuple(tasks),
        tuple(tasks),
        tuple(points),
        tuple(draw_score("base_model", task, float(v)) for task, v in zip(tasks, base, strict=True)),
        tuple(draw_score(task, task, float(v)) for task, v in zip(tasks, own, strict=True)),
        wanted=wanted,
    )


def draw_comparison_rows(count: int, *, seed: int = 0) -> list[Row]:
    """Return ways to merge from the best on, the first the winner, and the base model."""
    rng = np.random.default_rng(seed)
    methods = ("tunable_magmax selection=top-n", "agreement", "dare_ties", "task_arithmetic")
    values = sorted(rng.uniform(0.5, 0.95, count - 1).tolist(), reverse=True)
    rows = [
        Row(
            f"{methods[n % 4]}, λ {0.1 * (n + 1):.3g}, {('recipe', 'uniform')[n % 2]}",
            draw_score("m", "all", value),
            n == 0,
            0.008 if n % 4 == 2 else None,
        )
        for n, value in enumerate(values)
    ]
    return [*rows, Row("base model", draw_score("base_model", "all", 0.41))]
