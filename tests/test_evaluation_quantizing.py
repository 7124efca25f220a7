"""Rounded weights: by hand, by their properties, and in real layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hub_magmax.evaluation.quantizing import round_rows, rounded


def test_rows_are_rounded_by_hand():
    weight = torch.tensor([[3.0, -1.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.7, 0.1, 0.2, 0.35]])
    # Three bits: seven values, the largest magnitude of the row is the third step.
    expected = torch.tensor([[3.0, -1.0, 1.0, 0.0], [0.0] * 4, [-0.7, 0.0, 0.7 / 3, 2 * 0.7 / 3]])
    torch.testing.assert_close(round_rows(weight, 3), expected)


@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_weight_moves_by_more_than_half_a_step(bits, seed, dtype):
    weight = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = round_rows(weight, bits)
    largest = weight.float().abs().amax((1, 2), keepdim=True)
    step = largest / (2 ** (bits - 1) - 1)
    slack = 0.01 * largest if dtype == torch.bfloat16 else 1e-6
    assert ((found.float() - weight.float()).abs() <= step / 2 + slack).all()
    assert found.dtype == dtype
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)


@given(st.integers(2, 8))
def test_rounding_twice_changes_nothing_more(bits):
    once = round_rows(torch.randn(4, 6, generator=torch.Generator().manual_seed(bits)), bits)
    torch.testing.assert_close(round_rows(once, bits), once)


def test_layers_are_rounded_and_the_rest_and_the_original_stay():
    network = nn.Sequential(
        nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Conv2d(1, 2, 2), Conv1D(3, 4)
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = rounded(network, 2).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed == {"1.weight", "3.weight", "4.weight"}
    assert torch.equal(found["1.weight"], round_rows(before["1.weight"], 2))
    assert torch.equal(found["4.weight"], round_rows(before["4.weight"].T, 2).T)


def test_a_shared_weight_stays_shared():
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    network[1].weight = network[0].weight
    found = rounded(network, 3)
    assert found[1].weight is found[0].weight
    assert torch.equal(found[0].weight, round_rows(network[0].weight, 3))


@pytest.mark.parametrize("bits", [2, 8])
def test_more_bits_lose_less(bits):
    weight = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    errors = [(round_rows(weight, b) - weight).norm() for b in (bits, bits + 1)]
    assert errors[1] < errors[0]
