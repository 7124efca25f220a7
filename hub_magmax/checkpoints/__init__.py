"""Checkpoints: their files and tensors, wherever the bytes are."""
