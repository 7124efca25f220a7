"""Streams of random numbers of a tensor's generator, one for each use."""

from __future__ import annotations

# Streams, one for each use and task: the stream of a use is this number plus the task.
# DARE adds the number of a pair of tasks, which share a key, and comes last: it takes any number of them.
DROP, ALIGN, FILL, SHARE, TIE, PASSED, DARE = range(0, 7 * 256, 256)
