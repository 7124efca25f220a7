"""Models in use: asked and replayed, verified, rebuilt, signed, watched, rolled back."""

#: Allowed loss of a task's score, in units of the metric: a hundredth is one point of accuracy.
MARGIN = 0.01
