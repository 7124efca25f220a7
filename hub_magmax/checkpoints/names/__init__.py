"""Tensors under other names than the base model's: the renaming found, and applied while reading."""
