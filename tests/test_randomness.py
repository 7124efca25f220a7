import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hub_magmax.kernels.randomness import CounterGenerator
from tests import oracles

# A change of these changes every merge that draws: it would need a new version of the lock.
KNOWN_KEYS = [2841765290642210658, 5125014045844543431, -4557537762330520621]
SETTINGS = settings(derandomize=True, deadline=None)
GENERATOR = CounterGenerator(seed=17, name="model.layers.0.weight")


@SETTINGS
@given(st.integers(), st.text(max_size=20), st.integers(0, 5000), st.integers(0, 2**62))
def test_keys_are_the_documented_mix_of_seed_name_stream_and_index(seed, name, stream, index):
    key = CounterGenerator(seed, name).keys(np.array([index]), stream)

    assert key.tolist() == [oracles.random_key(seed, name, stream, index)]


def test_keys_are_known_forever():
    keys = CounterGenerator(0, "weight").bits(0, 3, stream=1)

    assert keys.tolist() == KNOWN_KEYS


def test_a_range_gives_the_same_keys_in_any_chunks():
    whole = GENERATOR.bits(5, 1000, stream=3)

    for size in (1, 7, 512):
        parts = [GENERATOR.bits(start, min(size, 1005 - start), 3) for start in range(5, 1005, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert GENERATOR.keys(np.arange(5, 1005), stream=3).tolist() == whole.tolist()


def test_keys_of_a_stream_are_all_different():
    assert GENERATOR.bits(0, 1 << 18, stream=0).unique().numel() == 1 << 18


def test_no_draws_are_an_empty_tensor():
    assert GENERATOR.bits(3, 0, stream=0).shape == (0,)


def test_indices_are_left_as_they_were():
    indices = np.arange(10)

    GENERATOR.keys(indices, stream=0)

    assert indices.tolist() == list(range(10))


@pytest.mark.parametrize(
    "other",
    [
        CounterGenerator(18, GENERATOR.name).bits(0, 1 << 14, stream=0),
        CounterGenerator(17, "model.layers.1.weight").bits(0, 1 << 14, stream=0),
        GENERATOR.bits(0, 1 << 14, stream=1),
        GENERATOR.bits(1, 1 << 14, stream=0),
    ],
    ids=["seed", "name", "stream", "next element"],
)
def test_keys_of_another_use_agree_in_half_of_their_bits(other):
    differing = (GENERATOR.bits(0, 1 << 14, stream=0) ^ other).numpy().view(np.uint64)
    flips = np.unpackbits(differing.view(np.uint8)).reshape(-1, 64).sum(axis=0)

    assert stats.binomtest(int(flips.sum()), 64 << 14).pvalue > 1e-3
    # Each of the 64 bits alone, too.
    assert stats.binom.cdf(flips.min(), 1 << 14, 0.5) > 1e-5
    assert stats.binom.sf(flips.max(), 1 << 14, 0.5) > 1e-5


@pytest.mark.parametrize("stream", range(4))
@pytest.mark.parametrize("shift", [0, 8, 56])
def test_every_byte_of_the_keys_is_uniform(stream, shift):
    byte = (GENERATOR.bits(0, 1 << 16, stream) >> shift) & 255

    assert stats.chisquare(torch.bincount(byte, minlength=256)).pvalue > 1e-4


def test_uniform_numbers_fill_the_unit_interval_evenly():
    numbers = GENERATOR.uniform(0, 1 << 16, stream=0)

    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3


def test_uniform_numbers_of_neighbours_are_not_related():
    numbers = GENERATOR.uniform(0, 1 << 16, stream=0)
    cells = (numbers[::2] * 16).long() * 16 + (numbers[1::2] * 16).long()

    assert stats.chisquare(torch.bincount(cells, minlength=256)).pvalue > 1e-3


def test_uniform_numbers_are_the_high_bits_of_the_keys():
    keys = GENERATOR.bits(0, 100, stream=2).numpy().view(np.uint64)

    assert (GENERATOR.uniform(0, 100, stream=2).numpy() == (keys >> 11) / 2.0**53).all()
