"""GPTQ: by hand, by the definition, by its properties, and in a network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hub_magmax.evaluation.gptq import round_columns, rounded_by_gptq
from hub_magmax.evaluation.quantizing import round_rows, rounded


def drawn(seed, rows=6, inputs=9, examples=40):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator)
    seen = torch.randn(examples, inputs, generator=generator) @ mixed
    return torch.randn(rows, inputs, generator=generator), seen.T @ seen


def loss(change, moment):
    return torch.trace(change.double() @ moment.double() @ change.double().T).item()


def test_two_columns_by_hand():
    # Three bits: steps of 1. 0.4 becomes 0, and 3 moves by 0.4 b / c = 0.2 to 3.2, beyond the largest value.
    weight = torch.tensor([[0.4, 3.0], [1.4, 3.0], [-1.4, -3.0], [3.0, 0.4]])
    moment = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    expected = [[0.0, 3.0], [1.0, 3.0], [-1.0, -3.0], [3.0, 0.0]]
    assert round_columns(weight, moment, 3, damping=0.0).tolist() == expected
    # 1.4 becomes 1, and 0.4 moves by 0.4 * 3 / 4 = 0.3 to 0.7, and so to 1; rounding alone gives 0.
    moment = torch.tensor([[3.0, 3.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[1.4, 0.4, 3.0]])
    assert round_columns(weight, moment, 3, damping=0.0).tolist() == [[1.0, 1.0, 3.0]]
    assert round_rows(weight, 3).tolist() == [[1.0, 0.0, 3.0]]


def by_definition(weight, moment, bits):
    """Round column after column; the others minimise the objective under what is rounded, solved anew."""
    steps = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    most = 2 ** (bits - 1) - 1
    moment, now, change = moment.double(), weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for column in range(weight.shape[1]):
        chosen = (now[:, column] / steps).round().clamp(-most, most) * steps
        change[:, column] = chosen - weight[:, column]
        done, left = slice(0, column + 1), slice(column + 1, None)
        moves = -torch.linalg.solve(moment[left, left], moment[left, done] @ change[:, done].T).T
        now[:, left] = weight.double()[:, left] + moves
    return (weight.double() + change).float()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_columns_are_those_of_the_definition(bits):
    weight, moment = drawn(bits, inputs=12)
    found = round_columns(weight, moment, bits, damping=0.0)
    torch.testing.assert_close(found, by_definition(weight, moment, bits))


def test_columns_beyond_one_block_are_those_of_the_definition():
    weight, moment = drawn(0, rows=2, inputs=140, examples=300)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(140)
    torch.testing.assert_close(round_columns(weight, moment, 3), by_definition(weight, damped, 3))


@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_independent_inputs_leave_nothing_but_rounding(bits, seed, dtype):
    weight, moment = drawn(seed)
    weight = weight.to(dtype)
    for own in (moment.diagonal().diag(), torch.eye(9), torch.zeros(9, 9)):
        assert torch.equal(round_columns(weight, own, bits), round_rows(weight, bits))


@settings(max_examples=60)
@given(st.integers(2, 4), st.integers(0, 1000))
def test_outputs_change_less_than_by_rounding(bits, seed):
    weight, moment = drawn(seed, rows=24, inputs=16, examples=60)
    found = round_columns(weight, moment, bits)
    assert loss(found - weight, moment) < loss(round_rows(weight, bits) - weight, moment)
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 8), Conv1D(8, 8), nn.Linear(8, 8)

    def forward(self, values):
        return self.second(self.first(values).relu())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.patches = nn.Conv1d(1, 8, 4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, values):
        values = self.patches(values[:, None]).mT
        for block in self.blocks:
            values = block(values)
        return self.head(values.mean(1))


def test_a_network_is_rounded_block_after_block():
    torch.manual_seed(0)
    network, seen = Network(), torch.randn(64, 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found, plain = rounded_by_gptq(network, 3, lambda model: model(seen)), rounded(network, 3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    same = {n for n, value in found.state_dict().items() if torch.equal(value, plain.state_dict()[n])}
    assert {"patches.weight", "blocks.0.unused.weight", "head.bias"} <= same
    assert not same & {"head.weight", "blocks.0.first.weight", "blocks.1.second.weight"}
    with torch.no_grad():
        # The head comes last: its inputs are those behind all rounded blocks, for which it is rounded.
        inputs = found.patches(seen[:, None]).mT
        for block in found.blocks:
            inputs = block(inputs)
        inputs = inputs.mean(1)
        assert torch.equal(found.head.weight, round_columns(network.head.weight, inputs.T @ inputs, 3))
        values = found.blocks[0].first(found.patches(seen[:, None]).mT).relu().reshape(-1, 8)
        own = network.blocks[0].first(found.patches(seen[:, None]).mT).relu().reshape(-1, 8)
        second = round_columns(network.blocks[0].second.weight.T, own.T @ own, 3).T
        assert torch.equal(found.blocks[0].second.weight, second) and not torch.equal(values, own)
        errors = [(model(seen) - network(seen)).square().sum() for model in (found, plain)]
    assert errors[0] < errors[1]
