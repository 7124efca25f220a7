"""Tensors that are not the values of the base model's tensors of these names, whatever a rule says."""

from __future__ import annotations

from collections.abc import Sequence

from hub_magmax.checkpoints.index import FLOAT8_DTYPES, MERGEABLE_DTYPES, TensorInfo
from hub_magmax.checkpoints.quantised import BEFORE_QUANTISATION
from hub_magmax.checkpoints.recognition import Refusal
from hub_magmax.text import shown

#: Writes a copy of a folder with float8 as bfloat16, which holds every value of it.
_CAST = (
    'python -c "import glob, shutil; from safetensors import safe_open as o; from safetensors.torch import '
    "load_file as l, save_file as s; shutil.copytree('IN', 'OUT'); [s({k: v.bfloat16() if 'float8' in "
    "str(v.dtype) else v for k, v in l('IN/' + f).items()}, 'OUT/' + f, o('IN/' + f, 'pt').metadata()) for f "
    "in glob.glob('*.safetensors', root_dir='IN')]\""
)


def unlike(tensor: TensorInfo, base: TensorInfo) -> Refusal | None:
    """Return why a tensor is not the values of the base model's, whatever a rule says; None if it can be."""
    numbers = ", ".join(MERGEABLE_DTYPES)
    if tensor.dtype in FLOAT8_DTYPES:
        step = f"Cast each checkpoint that is stored so, without loss, and name the copy: {_CAST}"
        return Refusal(f"dtype {tensor.dtype} is not merged", f"one of {numbers}", step)
    if not tensor.num_elements and base.num_elements:
        step = "Save it again whole: sharded training leaves tensors empty that it did not gather."
        return Refusal("the tensor is empty", f"{list(base.shape)} as in the base model", step)
    if len(tensor.shape) == 1 < len(base.shape) and tensor.dtype in MERGEABLE_DTYPES:
        step = "Save it again whole: sharded training (FSDP, ZeRO) keeps parameters flat and in parts."
        return Refusal(
            f"the tensor is flat, {list(tensor.shape)}", f"{list(base.shape)} as in the base model", step
        )
    is_weight = base.dtype in MERGEABLE_DTYPES and base.name.endswith("weight")
    if is_weight and tensor.dtype not in MERGEABLE_DTYPES:
        return Refusal(f"dtype {tensor.dtype} looks quantised", f"one of {numbers}", BEFORE_QUANTISATION)
    return None


def part_of_one(pairs: Sequence[tuple[TensorInfo, TensorInfo]], num_tensors: int) -> Refusal | None:
    """Return that a checkpoint is the part of one process, given its tensors of other shapes and the base's.

    Args:
        pairs: Tensors whose shapes differ: the checkpoint's, and the base model's.
        num_tensors: In the base model. Of the half at least, one dimension is a fraction, the same in all.
    """
    counts = {_fraction(own.shape, base.shape) for own, base in pairs}
    if 2 * len(pairs) < num_tensors or len(counts) != 1 or None in counts:
        return None
    what = f"its tensors are one of {counts.pop()} parts of the base model's ({shown(pairs[0][0].name)} is "
    step = (
        "Save it again whole: distributed training (FSDP, tensor parallelism) wrote the part of one process."
    )
    return Refusal(
        f"{what}{list(pairs[0][0].shape)}, not {list(pairs[0][1].shape)})", "all parts, joined", step
    )


def _fraction(own: tuple[int, ...], base: tuple[int, ...]) -> int | None:
    """Return by which number one dimension is divided, None unless it is one alone."""
    if len(own) != len(base):
        return None
    changed = [(part, whole) for part, whole in zip(own, base, strict=True) if part != whole]
    if len(changed) != 1 or not changed[0][0] or changed[0][1] % changed[0][0]:
        return None
    return changed[0][1] // changed[0][0]
