"""Values as files have them: bits, and the name of the dtype that says what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hub_magmax.kernels.dtypes import ITEM_BYTES, dtype_name, torch_dtype
from hub_magmax.kernels.lazy_imports import torch

#: The bits of an exponent, all of which are set in an infinity and in a NaN.
_EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}


def bits_dtype(name: str) -> np.dtype[np.unsignedinteger]:
    """Return the unsigned integers that hold the bits of a safetensors dtype."""
    return np.dtype(f"u{ITEM_BYTES[name]}")


@dataclass(frozen=True)
class Stored:
    """Values as a file has them.

    Attributes:
        bits: Unsigned integers, as long as the values are; of any shape.
        dtype: As safetensors calls it.
    """

    bits: np.ndarray
    dtype: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Stored:
        """Return a tensor's values, in its own memory where they lie side by side."""
        dtype = dtype_name(tensor.dtype)
        # By way of bytes, because numpy has no names for some dtypes.
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy().view(bits_dtype(dtype))
        return cls(flat.reshape(tensor.shape), dtype)

    @property
    def tensor(self) -> torch.Tensor:
        """The values as torch's, in the same memory."""
        flat = torch.from_numpy(self.bits.reshape(-1).view(np.uint8))
        return flat.view(torch_dtype(self.dtype)).view(self.bits.shape)

    @property
    def content(self) -> memoryview:
        """The bytes as a file has them."""
        return self.bits.reshape(-1).view(np.uint8).data

    def is_finite(self) -> bool:
        """Say whether no value is a NaN or an infinity."""
        if (exponent := _EXPONENTS.get(self.dtype)) is not None:
            return int((self.bits & self.bits.dtype.type(exponent)).max(initial=0)) < exponent
        # Eight bits are for storage only, and float64 holds any sum of them.
        return not self.dtype.startswith("F8") or math.isfinite(float(self.tensor.double().sum()))
