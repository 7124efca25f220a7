"""Selections: files that say which task each element is taken from, in place of the weights."""
