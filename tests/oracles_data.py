"""Slow and obvious versions of the methods that use data, written from the papers."""

from collections.abc import Sequence

import numpy as np

Weights = Sequence[float]


def regmean(
    models: np.ndarray, moments: np.ndarray, weights: Weights, off_diagonal: float, ridge: float
) -> np.ndarray:
    """RegMean: the closed form for Wᵀ, (Σ G)⁻¹ Σ G Wᵀ, of whole models and not of task vectors.

    Args:
        models: "tasks rows columns", the weights of the layer.
        moments: "tasks columns columns".
        weights: Of the tasks.
        off_diagonal: What elements of G beside the diagonal are multiplied by.
        ridge: Of the mean of the diagonal of Σ G, added to the diagonal of each G.
    """
    shrunk = [m * (off_diagonal + (1 - off_diagonal) * np.eye(len(m))) for m in moments]
    added = ridge * np.mean(
        [sum(w * m[i, i] for w, m in zip(weights, shrunk, strict=True)) for i in range(len(shrunk[0]))]
    )
    shrunk = [m + added * np.eye(len(m)) for m in shrunk]
    total = sum(w * m for w, m in zip(weights, shrunk, strict=True))
    products = sum(w * m @ model.T for w, m, model in zip(weights, shrunk, models, strict=True))
    return (np.linalg.inv(total) @ products).T


def fisher(models: np.ndarray, information: np.ndarray, weights: Weights, floor: float) -> np.ndarray:
    """Fisher merging, element by element, of whole models.

    Args:
        models: "tasks elements".
        information: "tasks elements", divided by its root mean square over the whole model.
        weights: Of the tasks.
        floor: Least information.
    """
    merged = []
    for values, own in zip(models.T, information.T, strict=True):
        mass = [w * max(f, floor) for w, f in zip(weights, own, strict=True)]
        merged.append(sum(m * v for m, v in zip(mass, values, strict=True)) / sum(mass))
    return np.array(merged)


def react(
    own: Sequence[np.ndarray], merged: Sequence[np.ndarray], weights: Weights, beta: float
) -> np.ndarray:
    """ReACT: the maps Ŵ of the tasks one by one, then their mean weighted by p C.

    Args:
        own: By task, representations of its own model, "dimensions examples"; as many as span all dimensions.
        merged: By task, those of the merged model.
        weights: Of the tasks.
        beta: Of the ridge and of the rotation.
    """
    numerator = denominator = 0.0
    for z_ind, z_mtl, weight in zip(own, merged, weights, strict=True):
        u, _, vt = np.linalg.svd(z_ind @ z_mtl.T)
        c = z_mtl @ z_mtl.T + beta * np.eye(len(z_mtl))
        w = (z_ind @ z_mtl.T + beta * (u @ vt)) @ np.linalg.inv(c)
        numerator, denominator = numerator + weight * (w @ c), denominator + weight * c
    return numerator @ np.linalg.inv(denominator)
