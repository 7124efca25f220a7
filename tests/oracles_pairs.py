"""Slow metrics of pairs of checkpoints, written from arXiv:2601.22285: whole arrays and decompositions."""

from collections.abc import Mapping

import numpy as np

Tensors = Mapping[str, np.ndarray]


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name in sorted(tensors)])


def of_vectors(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Return the five of two vectors, and the five of the matrix that they are the rows of."""
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    cosine = float(a @ b / (lengths[0] * lengths[1]))
    first, second = np.linalg.svd(np.stack([a, b]), compute_uv=False)
    rank = rank_of(a, b)
    return {
        "task_vector_cosine_similarity": cosine,
        "task_vector_l2_distance": float(np.linalg.norm(a - b)),
        "task_vector_dot_product": float(a @ b),
        "weight_space_angle": float(np.degrees(np.arccos(cosine))),
        "task_vector_magnitude_ratio": float(min(lengths) / max(lengths)),
        "effective_rank": rank,
        "effective_rank_mergeability_score": min(max(2 - rank, 0), 1),
        "stable_rank": float((first + second) ** 2 / (first**2 + second**2)),
        "spectral_gap": float((first - second) / first),
        "singular_value_ratio": float(second / first),
    }


def rank_of(a: np.ndarray, b: np.ndarray) -> float:
    strengths = np.linalg.svd(np.stack([a, b]), compute_uv=False)
    shares = strengths / strengths.sum()
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum()))


def layerwise(a: Tensors, b: Tensors) -> float:
    """Return the mean of the tensors' effective ranks, weighted by the sum of both lengths."""
    pairs = [(a[name].ravel(), b[name].ravel()) for name in a if a[name].any() and b[name].any()]
    weights = [np.linalg.norm(one) + np.linalg.norm(other) for one, other in pairs]
    return float(np.average([rank_of(*pair) for pair in pairs], weights=weights))


def of_matrices(a: Tensors, b: Tensors, k: int) -> dict[str, float]:
    """Return the six of subspaces, and the published form of one: means over the matrices."""
    rows = [_of_matrix(a[name], b[name], k) for name in sorted(a) if a[name].ndim == 2]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _of_matrix(a: np.ndarray, b: np.ndarray, k: int) -> dict[str, float]:
    (left, s, right), (left_b, t, right_b) = (np.linalg.svd(m, full_matrices=False) for m in (a, b))
    k = min(k, len(s))
    shares, shares_b = s[:100] / s.sum(), t[:100] / t.sum()
    top, bottom = right[:k] @ right_b[:k].T, right[-k:] @ right_b[-k:].T
    products = np.linalg.norm(left[:, :k].T @ left_b[:, :k])
    norms = np.linalg.norm(shares) * np.linalg.norm(shares_b)
    return {
        "singular_value_overlap": shares @ shares_b / norms,
        "subspace_overlap": products / np.sqrt(k),
        "subspace_overlap_as_published": products / k,
        "right_subspace_overlap_top_k": np.linalg.norm(top) / np.sqrt(k),
        "right_subspace_overlap_bottom_k": np.linalg.norm(bottom) / np.sqrt(k),
        "interaction_matrix_overlap_top_k": np.mean(np.linalg.svd(top, compute_uv=False) ** 2),
        "interaction_matrix_overlap_bottom_k": np.mean(np.linalg.svd(bottom, compute_uv=False) ** 2),
    }
