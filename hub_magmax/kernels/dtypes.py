"""Names and sizes of the dtypes of safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from hub_magmax.kernels.lazy_imports import torch

#: Bytes per element.
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

#: Quantised formats of safetensors whose elements share bytes.
PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")


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


def rounded_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast to the nearest number, of two the even one.

    torch casts float64 to narrower dtypes than float32 by way of float32, and so rounds twice.
    """
    is_twice = values.dtype == torch.float64 and dtype.is_floating_point and dtype.itemsize < 4
    return (_odd_float32(values) if is_twice else values).to(dtype)


def _odd_float32(values: torch.Tensor) -> torch.Tensor:
    """Cast float64 so that a second rounding to fewer bits is right: of two neighbours take the odd one."""
    near = values.to(torch.float32)
    too_far = (near.double().abs() > values.abs()).int()
    inexact = (near.double() != values).int()
    # Bits of floats of one sign sort like their magnitudes: one less is the next towards zero.
    return ((near.view(torch.int32) - too_far) | inexact).view(torch.float32)
