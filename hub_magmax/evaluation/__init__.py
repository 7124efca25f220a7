"""Scores of models on data, and the statistics beside them."""
