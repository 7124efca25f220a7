import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from hub_magmax.preference.mixture import (
    Space,
    excess_by_mmd,
    excess_by_transport,
    mixture_by_mmd,
    mixture_by_transport,
)

FITS = {"transport": mixture_by_transport, "mmd": mixture_by_mmd}
both = pytest.mark.parametrize("kind", FITS)


def blobs(mixture, num=60, seed=0, spread=0.3):
    """Return one cluster per task and a target drawn from them in the given shares."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(len(mixture), 4))
    train = tuple(centre + spread * rng.normal(size=(40, 4)) for centre in centres)
    counts = [round(share * num) for share in mixture]
    parts = [c + spread * rng.normal(size=(k, 4)) for c, k in zip(centres, counts, strict=True)]
    return Space(train, np.concatenate(parts))


@both
@pytest.mark.parametrize("mixture", [(0.8, 0.2, 0.0), (0.0, 0.5, 0.5), (0.0, 0.0, 1.0), (0.2, 0.2, 0.6)])
def test_a_planted_mixture_of_separate_clusters_is_recovered(kind, mixture):
    (found,) = FITS[kind]([blobs(mixture)])
    assert found == pytest.approx(mixture, abs=0.02)


@both
def test_spaces_of_different_unit_are_combined(kind):
    space = blobs((0.8, 0.2))
    larger = Space(tuple(1e8 * sample for sample in space.train), 1e8 * space.target)
    assert FITS[kind]([space, larger]) == pytest.approx(FITS[kind]([space]), abs=1e-3)


def divergence(space, share, regularisation):
    """The Sinkhorn divergence by definition, in the log domain, up to the target's own term."""
    points = np.concatenate(space.train)
    mass = np.repeat([share, 1 - share], [len(sample) for sample in space.train]) / len(space.train[0])
    own = ((points[:, None] - points[None]) ** 2).sum(-1)
    cost = ((points[:, None] - space.target[None]) ** 2).sum(-1)
    largest = max(own.max(), cost.max())

    def entropic(a, b, matrix):
        f, g = np.zeros(len(a)), np.zeros(len(b))
        for _ in range(300):
            f = -regularisation * logsumexp(np.log(b) + (g - matrix) / regularisation, axis=1)
            g = -regularisation * logsumexp(
                np.log(a)[:, None] + (f[:, None] - matrix) / regularisation, axis=0
            )
        return a @ f + b @ g

    uniform = np.full(len(space.target), 1 / len(space.target))
    return entropic(mass, uniform, cost / largest) - entropic(mass, mass, own / largest) / 2


def test_the_mixture_by_transport_has_the_least_divergence_of_a_grid():
    space = blobs((0.7, 0.3), num=20, spread=3.0)
    (found,) = mixture_by_transport([space], regularisation=0.1)
    grid = [0.1, 0.5, float(found[0]) - 0.05, float(found[0]) + 0.05]
    best = divergence(space, float(found[0]), 0.1)
    assert all(best < divergence(space, share, 0.1) for share in grid)
    alone = [divergence(space, share, 0.1) - best for share in (1 - 1e-5, 1e-5)]
    assert excess_by_transport([space], found, regularisation=0.1) == pytest.approx(alone, rel=1e-3)


def test_the_mixture_by_mmd_has_the_least_discrepancy_of_a_grid():
    space = blobs((0.7, 0.3), num=20, spread=3.0)
    ((found, _),) = mixture_by_mmd([space])
    points = np.concatenate([*space.train, space.target])
    squared = ((points[:, None] - points[None]) ** 2).sum(-1)
    train = squared[:80]
    kernel = np.exp(-squared / (2 * np.median(train[train > 0])))
    np.fill_diagonal(kernel, 0)
    owner = np.repeat([0, 1, 2], [40, 40, 20])
    means = np.array(
        [[kernel[np.ix_(owner == a, owner == b)].sum() / (40 * (39 if a == b else 40)) for b in (0, 1)]
         for a in (0, 1)]
    )  # fmt: skip
    cross = np.array([kernel[np.ix_(owner == a, owner == 2)].mean() for a in (0, 1)])

    def discrepancy(share):
        weights = np.array([share, 1 - share])
        return weights @ means @ weights - 2 * weights @ cross

    grid = np.linspace(0, 1, 1001)
    assert found == pytest.approx(grid[np.argmin([discrepancy(share) for share in grid])], abs=2e-3)
    alone = [discrepancy(share) - discrepancy(found) for share in (1, 0)]
    assert excess_by_mmd([space], np.array([found, 1 - found])) == pytest.approx(alone, rel=1e-6)


def test_resamples_are_fitted_exactly_by_mmd():
    space = blobs((0.6, 0.4), num=20, spread=2.0)
    counts = np.random.default_rng(1).multinomial(20, np.full(20, 0.05))
    shares = np.stack([np.full(20, 0.05), counts / 20])
    drawn = mixture_by_mmd([space], shares)[1]
    copied = Space(space.train, np.repeat(space.target, counts, axis=0))
    # Copies move the median distance a little, and with it the kernel.
    assert drawn == pytest.approx(mixture_by_mmd([copied])[0], abs=0.02)


def test_resamples_are_fitted_to_first_order_by_transport():
    space = blobs((0.6, 0.3, 0.1), num=40, spread=1.5)
    rng = np.random.default_rng(2)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=8)
    first_order = mixture_by_transport([space], np.vstack([np.full((1, 40), 1 / 40), counts / 40]))
    refitted = [
        mixture_by_transport([Space(space.train, np.repeat(space.target, row, axis=0))])[0] for row in counts
    ]
    assert np.abs(first_order[1:] - refitted).max() < 0.05
    assert np.abs(first_order[1:] - first_order[0]).max() > 0.05  # the resamples do differ


@both
def test_tasks_with_the_same_data_share_their_weight(kind):
    space = blobs((0.5, 0.5))
    doubled = Space((space.train[0], space.train[0], space.train[1]), space.target)
    (found,) = FITS[kind]([doubled])
    assert found[:2] == pytest.approx([0.25, 0.25], abs=0.03)


@both
@given(
    st.lists(st.sampled_from([0.0, 1.0, 1e-300, 1e300, -1e300]), min_size=1, max_size=4),
    st.sampled_from([0.0, 1.0, 1e300]),
    st.floats(0, 1),
)
@settings(max_examples=12, deadline=None)
def test_weights_are_a_preference_for_identical_and_very_distant_samples(kind, centres, target, spread):
    rng = np.random.default_rng(0)
    train = tuple(centre + spread * rng.normal(size=(3, 2)) for centre in centres)
    shares = np.stack([np.full(5, 0.2), np.eye(5)[0]])
    found = FITS[kind]([Space(train, target + spread * rng.normal(size=(5, 2)))], shares)
    assert (found >= 0).all()
    assert found.sum(axis=1) == pytest.approx([1, 1])
