"""Formats of quantised weights, recognised by the names, dtypes and shapes of tensors."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, TensorInfo

#: Names of tensors of codes, after the layer's name; for some only beside one of these companions.
_CODES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "qweight": ("GPTQ or AWQ", ()),
    "weight_packed": ("compressed-tensors", ()),
    "W_q": ("HQQ", ()),
    "Qidxs": ("QuIP#", ()),
    "q_weight": ("EXL2", ()),
    "trellis": ("EXL3", ()),
    "_data": ("quanto", ("_scale",)),
    "codes": ("AQLM", ("codebooks",)),
    "indices": ("VPTQ", ("centroids", "centroids.weight")),
    "dense_weights": ("SpQR", ("first_order_stats",)),
    "B": ("Marlin", ("s",)),
    "scaled_fp8": ("float8 with ComfyUI's scales", ()),
}

#: The same by the end of a name, with the end of the companion's.
_CODE_ENDINGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "_blocks": ("MXFP4", ("_scales",)),
    "_qdata": ("torchao", ("_scale", "_scale_and_zero")),
}

#: Names of scales beside a tensor of codes, after the layer's name, most special first.
_SCALES: Mapping[str, str] = {
    "SCB": "bitsandbytes",
    "weight.absmax": "bitsandbytes",
    "weight.nested_absmax": "bitsandbytes",
    "weight_scale_2": "NVFP4",
    "weight_global_scale": "NVFP4",
    "scale_weight": "float8 with ComfyUI's scales",
    "comfy_quant": "ComfyUI",
    "weight_scale_inv": "8-bit with scales",
    "weight_scale": "8-bit with scales",
    "weight_scales": "8-bit with scales",
    "scales": "codes with scales",
    "wscales": "codes with scales",
    "scale": "codes with scales",
    "_scale": "codes with scales",
    "weight_scaler": "codes with scales",
    "qzeros": "codes with scales",
    "zeros": "codes with scales",
    "codebooks": "codes with a codebook",
    "centroids": "codes with a codebook",
}

#: Ends of the name of a tensor's own scales, as fused experts have them.
_OWN_SCALES = ("_scale", "_scale_inv", "_scales", ".absmax", "._scale")

#: Dtypes of counts and positions; codes have at most 32 bits.
_NEVER_CODES = ("BOOL", "I64", "U64", "C64")

#: Dtype of scales that are powers of two, which no model has as weights.
_SCALES_ONLY = "F8_E8M0"


BEFORE_QUANTISATION = "Merge the checkpoints from before quantisation, and quantise the merged model."

#: Steps for formats of which transformers' `dequantize` is not the way.
_IN_FULL: Mapping[str, str] = {
    "MLX": "write it out in full with MLX: mlx_lm.convert --hf-path IN --mlx-path OUT --dequantize",
    "float8 with ComfyUI's scales": "write it out in full: "
    "python -c \"from safetensors.torch import load_file as l, save_file as s; t = l('IN.safetensors'); "
    "s({k: (v.float() * t.get(k[:-6] + 'scale_weight', 1)).bfloat16() if 'float8' in str(v.dtype) else v for "
    "k, v in t.items() if 'scale_' not in k and k[-10:] != 'scaled_fp8'}, 'OUT.safetensors')\"",
}
_BY_TRANSFORMERS = (
    "transformers can write some formats out in full: "
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('IN').dequantize().save_pretrained('OUT')\", with the task's model class"
)


class Quantisation(NamedTuple):
    """A format of quantised weights, and the tensor that shows it."""

    format: str
    tensor: str


def find_codes(tensors: Mapping[str, TensorInfo]) -> Quantisation | None:
    """Return the format of the first tensor that holds codes in place of weights; None for plain numbers.

    A name alone is no proof, since models have parameters called `scales`; numbers that can be merged
    are codes only if bitsandbytes' `absmax` belongs to them, which stores 4-bit codes as any dtype.
    """
    for name, info in tensors.items():
        if name.endswith(".absmax") and name.removesuffix(".absmax") in tensors:
            return Quantisation("bitsandbytes", name)
        if info.dtype not in MERGEABLE_DTYPES and (found := _codes(name, info, tensors)):
            return found
    return _beside_any_scale(tensors)


def _beside_any_scale(tensors: Mapping[str, TensorInfo]) -> Quantisation | None:
    """Return the first `weight` of few bits in a layer with a scale of any name."""
    numbers = (*MERGEABLE_DTYPES, *_NEVER_CODES)
    few_bits = [name for name, info in tensors.items() if info.dtype not in numbers]
    places = (name.rpartition(".") for name in tensors if few_bits and "scale" in name)
    layers = [layer for layer, _, leaf in places if "scale" in leaf]
    found = _first((f"{layer}.weight" for layer in layers), frozenset(few_bits))
    return Quantisation("codes with scales", found) if found else None


def _codes(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Quantisation | None:
    layer, dot, leaf = name.rpartition(".")
    layer += dot
    if found := _by_name(name, layer, leaf, tensors):
        return found
    if info.dtype == _SCALES_ONLY:
        return Quantisation("with scales that are powers of two", name)
    return None if info.dtype in _NEVER_CODES or leaf in _SCALES else _by_scales(name, layer, leaf, tensors)


def _by_name(name: str, layer: str, leaf: str, tensors: Mapping[str, TensorInfo]) -> Quantisation | None:
    """Return the format whose name for codes this is, if what belongs to them is there."""
    if leaf in _CODES:
        kind, companions = _CODES[leaf]
        if not companions or _first((layer + companion for companion in companions), tensors):
            return Quantisation(kind, name)
    for ending, (kind, companions) in _CODE_ENDINGS.items():
        if leaf.endswith(ending) and _first((name.removesuffix(ending) + end for end in companions), tensors):
            return Quantisation(kind, name)
    return None


def _by_scales(name: str, layer: str, leaf: str, tensors: Mapping[str, TensorInfo]) -> Quantisation | None:
    """Return the format of a tensor of few bits beside scales: those of its layer, or its own."""
    scale = _first((layer + end for end in _SCALES), tensors)
    own = _first((name + end for end in _OWN_SCALES), tensors)
    info = tensors[name]
    if leaf == "weight" and scale:
        kind = "MLX" if info.dtype == "U32" else _SCALES[scale[len(layer) :]]
        return Quantisation(kind, scale)
    if own:
        return Quantisation("8-bit with scales", own)
    # Other integers of a layer can be a mask or positions, beside a scale that is one number.
    if scale and len(info.shape) > 1 and 1 < tensors[scale].num_elements < info.num_elements:
        return Quantisation("codes with scales", scale)
    return None


def _first(names: Iterable[str], known: Container[str]) -> str | None:
    return next((name for name in names if name in known), None)


def in_full(format_name: str) -> str:
    """Return what to do about weights in a format of `Quantisation`."""
    way = _IN_FULL.get(format_name, _BY_TRANSFORMERS)
    return f"{BEFORE_QUANTISATION} Where only this one is left, {way}."


def stated_quantisation(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the key of a configuration that says that weights are quantised, and the format; or None."""
    for key in ("quantization_config", "quantization", "compression_config"):
        stated = config.get(key)
        if not stated or (key == "quantization" and not _is_of_mlx(stated)):
            continue
        kind = stated.get("quant_method") if isinstance(stated, dict) else None
        of_mlx = "MLX" if key == "quantization" else "of a kind it does not name"
        return key, kind if isinstance(kind, str) else of_mlx
    return None


def _is_of_mlx(stated: Any) -> bool:
    return isinstance(stated, dict) and "bits" in stated
