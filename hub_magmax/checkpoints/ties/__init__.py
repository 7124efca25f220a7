"""Tied weights: found among the tensors of checkpoints, and read as one parameter."""
