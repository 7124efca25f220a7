"""Rows of tensors that stand for tokens or labels, brought into one order."""
