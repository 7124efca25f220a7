"""Inner products of a tensor's vectors, and what follows from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hub_magmax.errors import RecipeError
from hub_magmax.kernels import products
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.methods.geometry.gram import Gram, Vectors, coordinates, rule_of, vectors_of

SHAPE = 37, 911


def chunks_of(num_tasks=3, shape=SHAPE, step=1.0, *, with_base=True):
    generator = torch.Generator().manual_seed(0)
    base, *vectors = torch.randn(1 + num_tasks, *shape, generator=generator)
    vectors = step * torch.stack(vectors)
    return ArrayChunks(vectors, base=base if with_base else None)


def exact(chunks, shape):
    """All vectors in float64."""
    base = np.zeros((1, *shape)) if chunks.base is None else chunks.base.numpy()[None]
    return np.concatenate([base, chunks.task_vectors.numpy()]).astype(np.float64)


@pytest.mark.parametrize("each", ["tensor", "row", "column"])
@pytest.mark.parametrize("backend", [Reference(), Reference(piece_elements=100), Compiled()])
def test_chunks_and_backends_change_no_bit(each, backend):
    whole = Gram(chunks_of(), SHAPE, each).products()
    for size in (1, 1000, products.BLOCK, 3 * products.BLOCK - 1):
        cut = replace(chunks_of(), chunk_elements=size, backend=backend)
        assert Gram(cut, SHAPE, each).products().tobytes() == whole.tobytes()


@pytest.mark.parametrize("shape", [(), (5,), (1, 7), (7, 1), (1, 1), (4, 6), (3, 4, 5), (40, 17)], ids=str)
@pytest.mark.parametrize(
    ("each", "subscripts"), [("tensor", "srt,urt->su"), ("row", "srt,urt->rsu"), ("column", "srt,urt->tsu")]
)
def test_products_are_those_of_numpy(shape, each, subscripts):
    chunks = chunks_of(shape=shape)
    flat = len(shape) < 2
    vectors = exact(chunks, shape).reshape(4, 1 if flat else shape[0], -1)
    expected = np.einsum("srt,urt->su" if flat else subscripts, vectors, vectors)
    np.testing.assert_allclose(Gram(chunks, shape, each).products(), expected, rtol=1e-12, atol=1e-12)


def test_without_a_base_model_its_products_are_zero_and_models_are_refused():
    gram = Gram(chunks_of(with_base=False), SHAPE)
    assert not gram.products()[0].any()
    with pytest.raises(RecipeError, match="need the base model's values"):
        vectors_of(gram, "models")


@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-7])
def test_coordinates_have_the_same_lengths_and_angles_also_of_small_steps(step):
    chunks = chunks_of(step=step)
    vectors = exact(chunks, SHAPE).reshape(4, -1)
    places = coordinates(Gram(chunks, SHAPE).products())
    for weights in ([0, 1, -1, 0], [0, 0.5, 0.5, -1], [1, 0, 0, 1]):
        expected = np.linalg.norm(weights @ vectors)
        assert np.linalg.norm(weights @ places) == pytest.approx(expected, rel=1e-10)


def test_vectors_that_depend_on_others_have_no_axis_of_their_own():
    vectors = np.array([[1.0, 2, 2], [2, 4, 4], [0, 0, 0], [0, 3, 4], [1, 5, 6]])
    places = coordinates(vectors @ vectors.T)
    assert not places[:, [1, 2, 4]].any()
    np.testing.assert_allclose(places @ places.T, vectors @ vectors.T, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 1.0, np.pi / 2, 3.0, np.pi - 1e-9])
def test_small_and_flat_angles_are_accurate(angle):
    one, other = ([1.0, 0.0], [np.cos(angle), np.sin(angle)])
    found = Vectors(np.array(one), np.zeros(2)).angle(Vectors(np.array(other), np.zeros(2)))
    assert found == pytest.approx(angle, rel=1e-14 if angle < 3 else 1e-9)


@pytest.mark.parametrize("each", ["tensor", "row", "column"])
def test_weighted_sum_of_a_rule_is_that_of_the_vectors(each):
    """Half of the sum of two models: a base model less, and half of both task vectors more."""
    shape = 6, 5
    chunks = replace(chunks_of(2, shape), chunk_elements=7)
    gram = Gram(chunks, shape, each)
    _, one, other = vectors_of(gram, "models")
    rule = rule_of(gram, (one + other).times(0.25), "models")
    base, flat = chunks.base.reshape(-1), chunks.task_vectors.reshape(2, -1)
    found = rule.op(flat, rule.inputs(0, 30), base)
    torch.testing.assert_close(found, -base / 2 + flat.sum(0) / 4)
    rule = rule_of(gram, (one - other).times(0.5) + other, "models")
    assert not rule.op(flat, rule.inputs(0, 30), base).sub(flat.sum(0) / 2).abs().gt(1e-6).any()
    weights = np.atleast_2d(
        rule.inputs(0, 1).per_task[0] if each == "tensor" else rule.inputs(0, 1).per_element[0]
    )
    assert weights[0, 0] == 0  # exactly: the base model's values stay as they are
