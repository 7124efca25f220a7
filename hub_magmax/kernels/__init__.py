"""Arithmetic on chunks of task vectors: one reference and faster backends that return the same bytes."""
