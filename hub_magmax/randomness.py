"""Random numbers that depend on where they are used, not on when.

Element `index` of stream `stream` of the tensor `name` has one 64-bit key, whatever was drawn before,
by which process, in chunks of which size. The key is a bijective mix of the index, so the keys of one
stream are all different: "the k elements with the smallest keys" is always exactly k elements, and a
uniformly random subset of that size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# The increment and multipliers of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_SECOND = 0x94D049BB133111EB - 2**64


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

    def bits(self, start: int, count: int, stream: int) -> Int64[Tensor, " count"]:
        """Return the keys of elements `start` to `start + count - 1`: int64, uniform, all different."""
        return self.bits_at(torch.arange(start, start + count, dtype=torch.int64), stream)

    def bits_at(self, indices: Int64[Tensor, " count"], stream: int) -> Int64[Tensor, " count"]:
        """Return the keys of the elements at `indices`, on their device. Equal indices, equal keys."""
        before, middle = self._keys(stream)
        # int64 products and sums wrap modulo 2**64, which keeps each step a bijection.
        mixed = indices * _INCREMENT
        mixed += before
        mixed ^= _logical_shift(mixed, 30)
        mixed *= _MULTIPLY_FIRST
        mixed ^= middle
        mixed ^= _logical_shift(mixed, 27)
        mixed *= _MULTIPLY_SECOND
        mixed ^= _logical_shift(mixed, 31)
        return mixed

    def uniform(self, start: int, count: int, stream: int) -> Float64[Tensor, " count"]:
        """Return numbers in [0, 1) for elements `start` to `start + count - 1`: 53 bits of each key."""
        return _logical_shift(self.bits(start, count, stream), 11).to(torch.float64) * 2.0**-53

    def _keys(self, stream: int) -> tuple[int, int]:
        """Derive the two keys of a stream, as signed 64-bit integers."""
        label = ascii((self.seed, self.name, stream)).encode("ascii")
        digest = hashlib.blake2b(label, digest_size=16).digest()
        return (
            int.from_bytes(digest[:8], "little", signed=True),
            int.from_bytes(digest[8:], "little", signed=True),
        )


def _logical_shift(values: Int64[Tensor, " count"], places: int) -> Int64[Tensor, " count"]:
    """Shift right and fill with zeros; `>>` alone would copy the sign bit."""
    return (values >> places) & ((1 << (64 - places)) - 1)
