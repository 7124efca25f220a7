"""Where the chance in a rule comes from: the streams of the tensor's generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from hub_magmax.kernels.randomness import CounterGenerator

# Streams, one for each use and task: the stream of a use is this number plus the task.
# Samples and orders need no task. DARE adds the number of a pair of tasks, which share a key, and comes last:
# it takes any number of them.
DROP, ALIGN, FILL, SHARE, SAMPLE, ORDER, DARE = range(0, 7 * 256, 256)
#: From positions in a tensor or a market to the keys of these elements.
Keys = Callable[[Int64[np.ndarray, " count"]], Int64[np.ndarray, " count"]]


def keys_of(generator: CounterGenerator, stream: int) -> Keys:
    """Return a function that draws the keys of one stream."""
    return lambda positions: generator.keys(positions, stream)
