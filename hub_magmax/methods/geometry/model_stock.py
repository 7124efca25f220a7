"""Model Stock: the mean of the task vectors, shortened by the angles between them."""

from typing import TYPE_CHECKING

from hub_magmax.methods.geometry import Each
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule, weighted_rule

if TYPE_CHECKING:
    import numpy as np

    from hub_magmax.methods.chunks import Chunks

_MODEL_STOCK = Paper(
    "2403.19522",
    "modelstock",
    "Jang, Dong-Hwan",
    2024,
    "Model Stock: All we need is just a few fine-tuned models",
)


@merge_method("model_stock", source=_MODEL_STOCK, form="rule", uses=preferred)
def model_stock(
    chunks: "Chunks", *, preference: tuple[float, ...], shape: tuple[int, ...], each: Each = "tensor"
) -> Rule:
    """Average the task vectors by preference, and shorten the mean by how little they agree.

    The merged task vector is r Σ w_t τ_t. With uniform preference r = T·c / (1 + (T − 1)·c), where c is the
    mean cosine of the angles between two task vectors of the tensor (Jang et al. 2024, as in mergekit for any
    T): of vectors that are a common one and noise of their own, this is the multiple of their mean that is
    nearest to the common one. By the same reasoning r = c / (s + (1 − s)·c) under any preference, with s = Σ
    w_t² and cosines weighted by w_s·w_t. All preference for one task returns its vector: nothing tells its
    noise.

    A task vector of zeros has the cosine 0 with every other. Where c is not above 0, nothing is common and r
    is 0; mergekit goes backwards there. It also counts products of two lengths as 1e-6 at least, so that
    small tensors of small steps shrink towards the base model; here lengths do not matter. `each: row` has an
    angle for each row (the paper's filter: one index of the first axis).
    """
    import numpy as np

    from hub_magmax.methods.geometry.gram import Gram

    active = preferred(preference)
    if len(active) == 1:
        return weighted_rule(tuple(float(weight > 0) for weight in preference))
    gram = Gram(chunks, shape, each)
    weights = np.array(preference)
    ratio = _ratio(gram.products()[..., 1:, 1:], weights)
    vectors = np.concatenate([np.zeros(1), weights])
    return gram.rule(ratio[..., None] * vectors)


def _ratio(products: "np.ndarray", weights: "np.ndarray") -> "np.ndarray":
    """Return r from the inner products of the task vectors, "*each tasks tasks"."""
    import numpy as np

    from hub_magmax.methods.geometry.gram import added

    squares = np.diagonal(products, axis1=-2, axis2=-1)
    lengths = np.sqrt(squares[..., :, None]) * np.sqrt(squares[..., None, :])
    cosines = np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1.0), 0.0)
    pairs = np.outer(weights, weights) * (1 - np.eye(len(weights)))
    common = added(added(cosines * pairs)) / added(added(pairs))
    alone = added(weights * weights)
    return np.where(common > 0, common / (alone + (1 - alone) * common), 0.0)
