"""Values as files have them: bits, and the name of the dtype that says what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from hub_magmax.checkpoints.index import ITEM_BYTES
from hub_magmax.kernels.lazy_imports import torch

#: The bits of an exponent, all of which are set in an infinity and in a NaN.
_EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}


@cache
def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a safetensors dtype such as "BF16"."""
    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
        "BOOL": torch.bool, "C64": torch.complex64,
    }[name]  # fmt: skip


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return what safetensors calls a dtype of torch."""
    return next(name for name in ITEM_BYTES if torch_dtype(name) == dtype)


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
