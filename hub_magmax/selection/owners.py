"""Who holds each element of a tensor while a rule decides."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from hub_magmax.selection.chunks import BLOCK_ELEMENTS
from hub_magmax.selection.draws import Keys

# A byte below this is a task; and the codes of algorithm 1 have a bit for every task.
MAX_TASKS = 64
# What `Owners` holds besides the tasks 0 to 63: marks from 64, and two with one meaning for all.
FIRST_MARK = 64
NOBODY = 254
PICKED = 255


class Owners:
    """Who holds each element of one tensor: one byte each, changed in place, a block at a time.

    A byte is a task, or a mark of 64 and above that its user gives a meaning.
    """

    def __init__(self, num_elements: int) -> None:
        self.owner = np.zeros(num_elements, dtype=np.uint8)

    def blocks(self) -> Iterator[tuple[int, UInt8[np.ndarray, " block"]]]:
        for start in range(0, len(self.owner), BLOCK_ELEMENTS):
            yield start, self.owner[start : start + BLOCK_ELEMENTS]

    def replace(self, old: int, new: int) -> None:
        for _, block in self.blocks():
            block[np.flatnonzero(block == old)] = new

    def rename(self, names: UInt8[np.ndarray, " values"]) -> None:
        """Turn every byte into its entry of `names`."""
        for _, block in self.blocks():
            np.take(names, block, out=block, mode="clip")

    def count(self, num_tasks: int) -> list[int]:
        counts = [0] * num_tasks
        for _, block in self.blocks():
            # Cheaper than a histogram of bytes, as long as there are not hundreds of tasks.
            counts = [have + int(np.count_nonzero(block == t)) for t, have in enumerate(counts)]
        return counts

    def pick(self, value: int, count: int, total: int, keys: Keys) -> None:
        """Turn `value` into `PICKED` for the `count` elements of smallest key among its `total`.

        Keys are uniform, so the largest key to pick is known within a few standard deviations: one
        pass picks everything below that window and collects the window, which is then sorted.
        """
        if count == total:
            self.replace(value, PICKED)
            return
        margin = 6 * math.sqrt(count * (total - count) / total) + 16
        low, high = (_key_at((count + sign * margin) / total) for sign in (-1, 1))
        if not self._pick_within(value, count, keys, low, high):
            self.replace(PICKED, value)
            self._pick_within(value, count, keys, _key_at(0.0), _key_at(1.0))

    def _pick_within(self, value: int, count: int, keys: Keys, low: int, high: int) -> bool:
        """Pick if the largest key to pick lies from `low` to `high`; say whether it did."""
        window_positions, window_keys = [], []
        for start, block in self.blocks():
            local = np.flatnonzero(block == value)
            key = keys(local + start)
            below = key < low
            block[local[np.flatnonzero(below)]] = PICKED
            count -= int(np.count_nonzero(below))
            inside = np.flatnonzero((key >= low) & (key <= high))
            window_positions.append(local[inside] + start)
            window_keys.append(key[inside])
        order = np.concatenate(window_keys).argsort()
        if not 0 <= count <= len(order):
            return False
        self.owner[np.concatenate(window_positions)[order[:count]]] = PICKED
        return True


def _key_at(fraction: float) -> int:
    """Return the key below which `fraction` of all keys lie, the smallest or largest at the ends."""
    if fraction >= 1:
        return 2**63 - 1
    return int(max(fraction, 0.0) * 2**64) - 2**63
