"""Model Stock: the mean of the task vectors, shortened by the angles between them."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.methods.geometry import Each
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule, weighted_rule
from hub_magmax.options import AddedLater

if TYPE_CHECKING:
    from hub_magmax.methods.chunks import Chunks

_MODEL_STOCK = Paper(
    "2403.19522",
    "modelstock",
    "Jang, Dong-Hwan",
    2024,
    "Model Stock: All we need is just a few fine-tuned models",
)

#: Divisors below this share of the one at right angles are 0.
_NO_LIMIT = 1e-6


@merge_method("model_stock", source=_MODEL_STOCK, form="rule", uses=preferred)
def model_stock(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    shape: tuple[int, ...],
    each: Each = "tensor",
    backwards: Annotated[bool, AddedLater()] = False,
    floor: Annotated[float, Field(ge=0, allow_inf_nan=False), AddedLater()] = 0.0,
) -> Rule:
    """Average the task vectors by preference, and shorten the mean by how little they agree.

    The merged task vector is r Σ w_t τ_t. With uniform preference r = T·c / (1 + (T − 1)·c), where c is the
    mean cosine of the angles between two task vectors of the tensor (Jang et al. 2024, as in mergekit for any
    T): of vectors that are a common one and noise of their own, this is the multiple of their mean that is
    nearest to the common one. By the same reasoning r = c / (s + (1 − s)·c) under any preference, with s = Σ
    w_t² and cosines weighted by w_s·w_t. All preference for one task returns its vector: nothing tells its
    noise.

    A task vector of zeros has the cosine 0 with every other. Where c is not above 0, nothing is common and r
    is 0; with `backwards` it is below 0 there, up to where its divisor is 0. Products of two lengths count as
    `floor` at least, which pulls small tensors of small steps towards the base model. mergekit goes
    backwards, and its floor is 1e-6. `each: row` has an angle for each row (the paper's filter: one index of
    the first axis).
    """
    from hub_magmax.methods.geometry.gram import Gram

    active = preferred(preference)
    if len(active) == 1:
        return weighted_rule(tuple(float(weight > 0) for weight in preference))
    gram = Gram(chunks, shape, each)
    weights = np.array(preference)
    ratio = _ratio(gram.task_products(), weights, floor)
    ratio = ratio if backwards else np.maximum(ratio, 0.0)
    vectors = np.concatenate([np.zeros(1), weights])
    return gram.rule(ratio[..., None] * vectors)


def _ratio(products: "np.ndarray", weights: "np.ndarray", floor: float) -> "np.ndarray":
    """Return r from the inner products of the task vectors, "*each tasks tasks"; 0 where it has no limit."""
    from hub_magmax.methods.geometry.gram import added

    squares = np.diagonal(products, axis1=-2, axis2=-1)
    lengths = np.sqrt(squares[..., :, None]) * np.sqrt(squares[..., None, :])
    lengths = np.maximum(lengths, floor)
    cosines = np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1.0), 0.0)
    pairs = np.outer(weights, weights) * (1 - np.eye(len(weights)))
    common = added(added(cosines * pairs)) / added(added(pairs))
    alone = added(weights * weights)
    divisor = alone + (1 - alone) * common
    has_limit = np.abs(divisor) >= _NO_LIMIT * alone
    return np.where(has_limit, common / np.where(has_limit, divisor, 1.0), 0.0)
