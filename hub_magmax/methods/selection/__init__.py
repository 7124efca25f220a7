"""Selection of a task for each element of a tensor.

A tensor's task vectors arrive as chunks that can be read several times, so that a tensor of any size
needs a few bytes per element. Tasks are numbered from zero here, in the order they were learned.
Every decision rests on exact comparisons of correctly rounded numbers and on keys drawn by element
index, so chunk sizes and thread counts cannot change it.

`quotas` says how many elements each task gets. `algorithm_1` and `top_n` meet the quotas.

Source: Tunable MAGMAX (arXiv:2605.20803).
"""

from hub_magmax.methods.selection.algorithm_one import algorithm_1
from hub_magmax.methods.selection.assignment import top_n
from hub_magmax.methods.selection.quotas import quotas

__all__ = [
    "algorithm_1",
    "quotas",
    "top_n",
]
