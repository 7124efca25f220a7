"""Random numbers that depend on where they are used, not on when.

Element `index` of stream `stream` of the tensor `name` has one 64-bit key, whatever was drawn before,
by which process, in chunks of which size. The key is a bijective mix of the index, so the keys of one
stream are all different: "the k elements with the smallest keys" is always exactly k elements, and a
uniformly random subset of that size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from hub_magmax.kernels.lazy_imports import torch

#: The increment and the multipliers of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
MULTIPLIERS = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


@dataclass(frozen=True)
class CounterGenerator:
    """Give every element of one tensor its own random bits, by index.

    Args:
        seed: The recipe's seed, any integer.
        name: The tensor's name.

    A stream is one purpose ("drop from task 3"); different streams are independent. Streams, seeds and
    names enter through two 64-bit keys from BLAKE2b: one is added before the mix and one in the middle,
    so that two streams are not shifted copies of each other. Not for cryptography.
    """

    seed: int
    name: str

    def bits(self, start: int, count: int, stream: int) -> Int64[torch.Tensor, " count"]:
        """Return the keys of elements `start` to `start + count - 1`: int64, uniform, all different."""
        return torch.from_numpy(self.keys(np.arange(start, start + count), stream))

    def keys(self, indices: Int64[np.ndarray, " count"], stream: int) -> Int64[np.ndarray, " count"]:
        """Return the keys of the elements at `indices`. Equal indices, equal keys."""
        return keys_of(indices, *self.constants(stream))

    def uniform(self, start: int, count: int, stream: int) -> Float64[torch.Tensor, " count"]:
        """Return numbers in [0, 1) for elements `start` to `start + count - 1`: 53 bits of each key."""
        return torch.from_numpy(fractions(self.keys(np.arange(start, start + count), stream)))

    def constants(self, stream: int, first: int = 0) -> tuple[np.uint64, np.uint64]:
        """Return what makes a stream different: what is added before the mix, and mixed in in its middle.

        Indices are counted from `first` on.
        """
        label = ascii((self.seed, self.name, stream)).encode("ascii")
        digest = hashlib.blake2b(label, digest_size=16).digest()
        before = int.from_bytes(digest[:8], "little") + first * int(MULTIPLIERS[0])
        return (
            np.uint64(before % 2**64),
            np.uint64(int.from_bytes(digest[8:], "little")),
        )


@dataclass(frozen=True)
class JoinedGenerator(CounterGenerator):
    """The generators of several tensors, whose elements are numbered one tensor after the other.

    It has the seed and the name of the first one. Backends draw by its keys, and not by constants.

    Attributes:
        generators: One for each tensor.
        sizes: Their elements.
    """

    generators: tuple[CounterGenerator, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, generators: Sequence[CounterGenerator], sizes: Sequence[int]) -> JoinedGenerator:
        return cls(generators[0].seed, generators[0].name, tuple(generators), tuple(sizes))

    @cached_property
    def _firsts(self) -> Int64[np.ndarray, " tensors"]:
        return np.cumsum([0, *self.sizes[:-1]])

    @cached_property
    def _tensors(self) -> Int64[np.ndarray, " elements"]:
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def keys(self, indices: Int64[np.ndarray, " count"], stream: int) -> Int64[np.ndarray, " count"]:
        """Return the keys that each tensor's own generator gives its elements."""
        constants = np.array([generator.constants(stream) for generator in self.generators], np.uint64)
        of_each = self._tensors[indices]
        before, middle = constants[of_each].T
        return keys_of(indices - self._firsts[of_each], before, middle)

    def constants(self, stream: int, first: int = 0) -> tuple[np.uint64, np.uint64]:
        raise AssertionError("each tensor has its own")


def keys_of(
    indices: Int64[np.ndarray, "*elements"],
    before: np.uint64 | UInt64[np.ndarray, "*_"],
    middle: np.uint64 | UInt64[np.ndarray, "*_"],
) -> Int64[np.ndarray, "*elements"]:
    """Return the keys of elements in a stream with these constants, or each in one of its own."""
    increment, first, second = MULTIPLIERS
    # numpy takes 4.5 ns per key, torch 16 ns. Products and sums wrap modulo 2**64, which keeps
    # each step a bijection.
    mixed = indices.view(np.uint64) * increment
    mixed += before
    mixed ^= mixed >> np.uint64(30)
    mixed *= first
    mixed ^= middle
    mixed ^= mixed >> np.uint64(27)
    mixed *= second
    mixed ^= mixed >> np.uint64(31)
    keys: Int64[np.ndarray, "*elements"] = mixed.view(np.int64)
    return keys


def fractions(keys: Int64[np.ndarray, " count"]) -> Float64[np.ndarray, " count"]:
    """Turn keys into numbers in [0, 1), from 53 bits of each."""
    return (keys.view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
