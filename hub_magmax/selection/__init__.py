"""Which task each element of a tensor is taken from.

A tensor's task vectors arrive as chunks that can be read several times, so that a tensor of any size
needs a few bytes per element. Tasks are numbered from zero here, in the order they were learned.
Every decision rests on exact comparisons of correctly rounded numbers and on keys drawn by element
index, so chunk sizes and thread counts cannot change it.

`quotas` says how many elements each task gets. `algorithm_1` and `top_n` meet the quotas;
`largest_magnitude` needs none.

Source: MAGMAX (arXiv:2407.06322), Tunable MAGMAX (arXiv:2605.20803).
"""

from hub_magmax.selection.algorithm_one import algorithm_1
from hub_magmax.selection.apportionment import quotas
from hub_magmax.selection.assignment import top_n
from hub_magmax.selection.chunks import ArrayChunks, Bits, Chunks, EarlyChunk, Rows, Selection
from hub_magmax.selection.magmax import largest_magnitude

__all__ = [
    "ArrayChunks",
    "Bits",
    "Chunks",
    "EarlyChunk",
    "Rows",
    "Selection",
    "algorithm_1",
    "largest_magnitude",
    "quotas",
    "top_n",
]
