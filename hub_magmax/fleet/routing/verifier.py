"""Verifier: the probability that each model is right on an input, from features of the merged model.

One logistic regression tells where the merged model is right, another of which kind an input is: of which
task, and of which class. So it tells which checkpoint knows the input, and whether the merged model's class
is the expected one. scikit-learn fits them, and numpy alone asks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from hub_magmax.errors import EvaluationError, MissingDependencyError
from hub_magmax.fleet.routing.observing import Observed

Features = Float64[np.ndarray, "examples features"]
Numbers = Int64[np.ndarray, " examples"]

#: Right and wrong answers, or examples of each kind, that a regression needs.
MIN_OF_EACH = 5

#: In place of a class: classes of a task with fewer examples, together.
OTHERS = -1

#: Least probability of the merged model's class, and its distance from 1.
_LEAST = 1e-3

#: Strengths of the ridge penalty that are compared by cross-validation, as scikit-learn's C.
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
FOLDS = 4

#: Arrays of a verifier, float64, with their dimensions.
ARRAYS: Mapping[str, tuple[str, ...]] = {
    "mean": ("features",),
    "scale": ("features",),
    "merged": ("features + 1",),
    "kinds": ("kinds", "features + 1"),
    "classes": ("kinds",),
    "rates": ("kinds", "experts"),
    "calibration": ("models", "four"),
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
        kinds: Coefficients and intercept of the logarithmic probability of each kind, up to a constant.
        classes: Number of the class that is right for each kind, or `OTHERS`.
        rates: Share of right answers of each checkpoint on each kind.
        calibration: For each model the slopes of its logit, of the logit that the merged model's class is the
            expected one, and of the merged model's confidence, which is the last feature; and an intercept.
    """

    mean: Float64[np.ndarray, " features"]
    scale: Float64[np.ndarray, " features"]
    merged: Float64[np.ndarray, " coefficients"]
    kinds: Float64[np.ndarray, "kinds coefficients"]
    classes: Float64[np.ndarray, " kinds"]
    rates: Float64[np.ndarray, "kinds experts"]
    calibration: Float64[np.ndarray, "models four"]

    def logits(self, features: Features) -> Float64[np.ndarray, "examples models"]:
        """Return the logits that each model is right, before calibration."""
        standard = (features - self.mean) / self.scale
        merged = standard @ self.merged[:-1] + self.merged[-1]
        experts = self.shares(features) @ self.rates
        return np.column_stack([merged, np.log(experts / (1 - experts))])

    def expected(self, features: Features, answers: Numbers) -> Float64[np.ndarray, " examples"]:
        """Return the logits that the merged model's answers are right, 0 for unknown classes."""
        is_same = self.classes == answers[:, None]
        shares = np.clip((self.shares(features) * is_same).sum(axis=1), _LEAST, 1 - _LEAST)
        return np.where(is_same.any(axis=1), np.log(shares / (1 - shares)), 0.0)

    def shares(self, features: Features) -> Float64[np.ndarray, "examples kinds"]:
        """Return the probability of each kind, as it is fitted."""
        found = (features - self.mean) / self.scale @ self.kinds[:, :-1].T + self.kinds[:, -1]
        shares = np.exp(found - found.max(axis=1, keepdims=True))
        normal: np.ndarray = shares / shares.sum(axis=1, keepdims=True)
        return normal

    def probabilities(self, features: Features, answers: Numbers) -> Float64[np.ndarray, "examples models"]:
        """Return the probability that each model's answer is right: the merged one, then the checkpoints.

        Args:
            features: Of the inputs.
            answers: Number of the class that the merged model chooses for each.
        """
        own, expected, confidence, intercept = self.calibration.T
        signals = self.expected(features, answers)[:, None] * expected + features[:, -1:] * confidence
        return sigmoid(self.logits(features) * own + signals + intercept)

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
            kinds, experts = arrays["rates"].shape
            sizes = {"features": len(arrays["mean"]), "kinds": kinds, "experts": experts, "four": 4}
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


def fit(seen: Observed) -> Verifier:
    """Fit both regressions to some examples, not calibrated yet.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    mean, scale = seen.features.mean(axis=0), seen.features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    standard = (seen.features - mean) / scale
    kind_of, classes = kinds_of(seen.tasks, seen.labels)
    experts = seen.right[:, 1:]
    rates = np.stack([_smoothed(experts[kind_of == kind]) for kind in range(len(classes))])
    regressed = _regression(standard[kind_of >= 0], kind_of[kind_of >= 0])
    identity = np.tile([1.0, 0.0, 0.0, 0.0], (seen.right.shape[1], 1))
    merged = _merged(standard, seen.right[:, 0])
    return Verifier(mean, scale, merged, regressed, classes, rates, identity)


def kinds_of(tasks: Numbers, labels: Numbers) -> tuple[Numbers, Float64[np.ndarray, " kinds"]]:
    """Return the kind of each example, and the class of each kind.

    A kind is the examples of a task that have one class, where these are at least `MIN_OF_EACH`, or its
    other examples together. Where they are fewer still, they are of no kind, which is -1, unless no kind is
    left.
    """
    pairs = np.stack([tasks, labels], axis=1)
    pairs[_counts(pairs) < MIN_OF_EACH, 1] = OTHERS
    enough = _counts(pairs) >= MIN_OF_EACH
    if not enough.any():
        return np.zeros(len(tasks), np.int64), np.array([float(OTHERS)])
    kinds, found = np.unique(pairs[enough], axis=0, return_inverse=True)
    kind_of = np.full(len(tasks), -1)
    kind_of[enough] = found.ravel()
    return kind_of, kinds[:, 1].astype(np.float64)


def _counts(pairs: Int64[np.ndarray, "examples two"]) -> Numbers:
    """Return how many examples have the same pair as each."""
    _, found, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    same: np.ndarray = counts[found.ravel()]
    return same


def calibrated(verifier: Verifier, seen: Observed) -> Verifier:
    """Return a verifier whose probabilities fit other examples: a sigmoid for each model.

    That of the merged model also reads whether its class is the expected one, and its own confidence.
    """
    logits, right = verifier.logits(seen.features), seen.right
    expected = verifier.expected(seen.features, seen.answers)
    merged = platt(np.column_stack([logits[:, 0], expected, seen.features[:, -1]]), right[:, 0])
    experts = [platt(logits[:, [model]], right[:, model]) for model in range(1, right.shape[1])]
    rows = [merged, *(np.array([slope, 0.0, 0.0, intercept]) for slope, intercept in experts)]
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
