"""Publishing: checks before a merge, pushes, commits."""
