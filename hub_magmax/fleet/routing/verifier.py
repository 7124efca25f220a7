"""Verifier: the probability that each model is right on an input, from features of the merged model.

One logistic regression tells where the merged model is right, another which task an input is of, and so which
checkpoint knows it. scikit-learn fits them, and numpy alone asks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from hub_magmax.errors import EvaluationError, MissingDependencyError

Features = Float64[np.ndarray, "examples features"]
Rights = Bool[np.ndarray, "examples models"]
Tasks = Int64[np.ndarray, " examples"]

#: Examples of either kind, or of each task, that a regression needs.
MIN_OF_EACH = 5

#: Strengths of the ridge penalty that are compared by cross-validation, as scikit-learn's C.
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
FOLDS = 4

#: Arrays of a verifier, float64, with their dimensions.
ARRAYS: Mapping[str, tuple[str, ...]] = {
    "mean": ("features",),
    "scale": ("features",),
    "merged": ("features + 1",),
    "tasks": ("tasks", "features + 1"),
    "rates": ("tasks", "experts"),
    "calibration": ("models", "three"),
}


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits."""
    found: np.ndarray = 0.5 * (1 + np.tanh(0.5 * logits))
    return found


@dataclass(frozen=True)
class Verifier:
    """Two regressions on standardised features, and a calibration for each model.

    Attributes:
        mean, scale: Of the features in the fitted part.
        merged: Coefficients and intercept of the logit that the merged model is right.
        tasks: Coefficients and intercept of the logarithmic probability of each task, up to a constant.
        rates: Share of right answers of each checkpoint on each task.
        calibration: For each model the slopes of its logit and of the merged model's confidence, which is
            the last feature, and an intercept.
    """

    mean: Float64[np.ndarray, " features"]
    scale: Float64[np.ndarray, " features"]
    merged: Float64[np.ndarray, " coefficients"]
    tasks: Float64[np.ndarray, "tasks coefficients"]
    rates: Float64[np.ndarray, "tasks experts"]
    calibration: Float64[np.ndarray, "models three"]

    def logits(self, features: Features) -> Float64[np.ndarray, "examples models"]:
        """Return the logits that each model is right, before calibration."""
        standard = (features - self.mean) / self.scale
        merged = standard @ self.merged[:-1] + self.merged[-1]
        found = standard @ self.tasks[:, :-1].T + self.tasks[:, -1]
        shares = np.exp(found - found.max(axis=1, keepdims=True))
        experts = shares / shares.sum(axis=1, keepdims=True) @ self.rates
        return np.column_stack([merged, np.log(experts / (1 - experts))])

    def probabilities(self, features: Features) -> Float64[np.ndarray, "examples models"]:
        """Return the probability that each model's answer is right: the merged one, then the checkpoints."""
        own, confidence, intercept = self.calibration.T
        return sigmoid(self.logits(features) * own + features[:, -1:] * confidence + intercept)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a file holds them."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], where: str) -> Verifier:
        """Return a verifier of the arrays of a file.

        Raises:
            EvaluationError: If they are not those of a verifier.
        """
        dimensions = {name: getattr(value, "ndim", -1) for name, value in arrays.items()}
        fits = dimensions == {name: len(axes) for name, axes in ARRAYS.items()} and all(
            value.dtype == np.float64 and np.isfinite(value).all() for value in arrays.values()
        )
        if fits:
            tasks, experts = arrays["rates"].shape
            sizes = {"features": len(arrays["mean"]), "tasks": tasks, "experts": experts, "three": 3}
            sizes |= {"features + 1": sizes["features"] + 1, "models": experts + 1}
            fits = all(arrays[name].shape == tuple(map(sizes.get, axes)) for name, axes in ARRAYS.items())
        if not fits:
            raise EvaluationError(
                "these are not the arrays of a verifier",
                where=where,
                expected=f"finite float64 arrays {', '.join(ARRAYS)} that fit together",
                hint="Fit the router again: hub-magmax route RECIPE.",
            )
        return cls(**arrays)


def fit(features: Features, tasks: Tasks, right: Rights) -> Verifier:
    """Fit both regressions, not calibrated yet.

    Args:
        features: Of the examples to fit to; finite.
        tasks: Number of the task that each is of.
        right: Whether each model is right on them: the merged one, then the tasks' own checkpoints.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    standard = (features - mean) / scale
    named = [task for task in np.unique(tasks) if (tasks == task).sum() >= MIN_OF_EACH]
    rates = np.stack([_smoothed(right[tasks == task, 1:]) for task in named] or [_smoothed(right[:, 1:])])
    known = np.isin(tasks, named)
    regressed = _regression(standard[known], tasks[known])
    identity = np.tile([1.0, 0.0, 0.0], (right.shape[1], 1))
    return Verifier(mean, scale, _merged(standard, right[:, 0]), regressed, rates, identity)


def calibrated(verifier: Verifier, features: Features, right: Rights) -> Verifier:
    """Return a verifier whose probabilities fit other examples: a sigmoid for each model.

    That of the merged model also reads its own confidence.
    """
    logits = verifier.logits(features)
    merged = platt(np.column_stack([logits[:, 0], features[:, -1]]), right[:, 0])
    experts = [platt(logits[:, [model]], right[:, model]) for model in range(1, right.shape[1])]
    rows = [merged, *(np.array([slope, 0.0, intercept]) for slope, intercept in experts)]
    return replace(verifier, calibration=np.stack(rows))


def platt(signals: Features, right: Bool[np.ndarray, " examples"]) -> Float64[np.ndarray, " coefficients"]:
    """Return slopes and intercept of the sigmoid that maps signals to probabilities of being right.

    No slope is below zero: the most negative one is left out, until none is. Without any signal all inputs
    get the smoothed share of right answers.

    Source: Platt, Probabilistic Outputs for Support Vector Machines, 1999; with scikit-learn's ridge penalty.
    """
    used = [column for column in range(signals.shape[1]) if np.ptp(signals[:, column]) > 0]
    found = np.zeros(signals.shape[1] + 1)
    while used and _can_fit(right):
        fitted = _sklearn().LogisticRegression(C=1.0).fit(signals[:, used], right)
        slopes = fitted.coef_[0]
        if (slopes > 0).all():
            found[used], found[-1] = slopes, fitted.intercept_[0]
            return found
        del used[int(slopes.argmin())]
    found[-1] = _smoothed_logit(right)
    return found


def _merged(standard: Features, right: Bool[np.ndarray, " examples"]) -> Float64[np.ndarray, " coefficients"]:
    """Return coefficients and intercept of the logit that the merged model is right."""
    if _can_fit(right):
        without, found = _regression(standard, right)
        logit: np.ndarray = found - without
        return logit
    constant = np.zeros(standard.shape[1] + 1)
    constant[-1] = _smoothed_logit(right)
    return constant


def _regression(standard: Features, classes: np.ndarray) -> Float64[np.ndarray, "classes coefficients"]:
    """Return coefficients and an intercept for each class that there is; one alone needs none.

    The strength of the penalty is that with the largest likelihood on folds that are left out in turn.
    """
    names = np.unique(classes)
    if len(names) < 2:
        return np.zeros((1, standard.shape[1] + 1))
    linear = _sklearn()

    def regression(strength: float) -> Any:
        return linear.LogisticRegression(C=strength, max_iter=1000, tol=1e-3)

    strength = max(STRENGTHS, key=lambda strength: _likelihood(regression(strength), standard, classes))
    fitted = regression(strength).fit(standard, classes)
    rows = np.column_stack([fitted.coef_, fitted.intercept_]).astype(np.float64)
    return rows if len(names) > 2 else np.concatenate([np.zeros_like(rows), rows])


def _likelihood(regression: Any, standard: Features, classes: np.ndarray) -> float:
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = StratifiedKFold(FOLDS)
    return float(cross_val_score(regression, standard, classes, cv=folds, scoring="neg_log_loss").mean())


def _can_fit(right: Bool[np.ndarray, " examples"]) -> bool:
    return min(int(right.sum()), int((~right).sum())) >= MIN_OF_EACH


def _smoothed(right: Bool[np.ndarray, "examples models"]) -> Float64[np.ndarray, " models"]:
    """Return the share of right answers of each model, with one right and one wrong added."""
    found: np.ndarray = (right.sum(axis=0) + 1.0) / (len(right) + 2.0)
    return found


def _smoothed_logit(right: Bool[np.ndarray, " examples"]) -> float:
    return float(np.log((right.sum() + 1) / ((~right).sum() + 1)))


def _sklearn() -> Any:
    try:
        from sklearn import linear_model
    except ImportError as error:
        raise MissingDependencyError(
            "scikit-learn, which fits the verifier, is not installed",
            hint='Install it with: pip install "hub-magmax[quickstart]"',
        ) from error
    return linear_model
