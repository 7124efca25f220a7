"""Made-up results, for tests of what is drawn from them: any number of tasks, with names of any length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hub_magmax.reporting.diagnosis import Diagnosis, Group, Overlap, make_group


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
