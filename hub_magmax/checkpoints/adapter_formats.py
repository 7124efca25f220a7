"""Adapters that are not PEFT's own files, recognised by the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterable

from hub_magmax.checkpoints.foreign_files import FileFormat
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, ADAPTER_NAME

#: Names that are looked at to tell an adapter, in which nearly all are marked.
_MAX_SAMPLED = 100

_BY_ITS_PROGRAM = "Merge it into its base model with the program that trained it, and name the whole model."

_BY_DIFFUSERS = (
    'Merge it with diffusers: python -c "from diffusers import DiffusionPipeline as P; '
    "p = P.from_pretrained('BASE'); p.load_lora_weights('IN'); p.fuse_lora(); p.unload_lora_weights(); "
    "p.save_pretrained('OUT')\"; then merge the part that it changed, such as OUT/unet with the base model "
    "BASE/unet."
)

_BY_LYCORIS = (
    "Merge it into its base model with LyCORIS: create_lycoris_from_weights(1.0, 'IN', model)[0]"
    ".merge_to(1.0). Save the model, and name it."
)

_BY_MLX = "Merge it with MLX, and name OUT: mlx_lm.fuse --model BASE --adapter-path IN --save-path OUT"

_AS_PEFT = (
    f"Call the file {ADAPTER_NAME} and put its {ADAPTER_CONFIG_NAME} beside it (rank and alpha are there); "
    "where that is lost, merge it into its base model with the program that trained it."
)

_KOHYA = FileFormat("a LoRA as kohya's scripts save it", _BY_DIFFUSERS)
_DIFFUSERS = FileFormat("a LoRA as diffusers saves it", _BY_DIFFUSERS)
_PEFT = FileFormat("a LoRA with PEFT's names of tensors", _AS_PEFT)
_MLX = FileFormat("a LoRA as MLX saves it", _BY_MLX)

#: Beginnings of names with PEFT's endings that name the parts of an image model.
_PARTS_OF_PIPELINES = ("unet.", "transformer.", "text_encoder", "diffusion_model.")

#: Parts of names that only adapters have, most special first.
_MARKS: tuple[tuple[str, FileFormat], ...] = (
    (".hada_", FileFormat("a LoHa", _BY_LYCORIS)),
    (".lokr_", FileFormat("a LoKr", _BY_LYCORIS)),
    (".oft_", FileFormat("an OFT adapter", _BY_ITS_PROGRAM)),
    (".boft_", FileFormat("a BOFT adapter", _BY_ITS_PROGRAM)),
    (".on_input", FileFormat("an IA3 adapter", _BY_LYCORIS)),
    (".diff_b", FileFormat("a file of differences", _BY_LYCORIS)),
    ("lora_controlnet", FileFormat("a Control-LoRA", _BY_ITS_PROGRAM)),
    (".lora_down.", _KOHYA),
    (".lora_up.", _KOHYA),
    (".lora.down.", _DIFFUSERS),
    (".lora.up.", _DIFFUSERS),
    ("_lora.down.", _DIFFUSERS),
    ("_lora.up.", _DIFFUSERS),
    (".lora_linear_layer.", _DIFFUSERS),
    (".lora_A", _PEFT),
    (".lora_B", _PEFT),
    (".lora_embedding_", _PEFT),
    (".lora_magnitude_vector", _PEFT),
    (".lora_a", _MLX),
    (".lora_b", _MLX),
    (".ia3_l", FileFormat("an IA3 adapter", _AS_PEFT)),
    ("prompt_embeddings", FileFormat("a trained prompt", _AS_PEFT)),
    (".vera_lambda_", FileFormat("a VeRA adapter", _AS_PEFT)),
    (".hra_u", FileFormat("an HRA adapter", _AS_PEFT)),
    (".fourierft_", FileFormat("a FourierFT adapter", _AS_PEFT)),
    (".vblora_", FileFormat("a VB-LoRA adapter", _AS_PEFT)),
    (".adaption_", FileFormat("an adapter of prompts", _AS_PEFT)),
    (".adapters.", FileFormat("an adapter of layers", _BY_ITS_PROGRAM)),
)

#: Ends of names that occur in adapters and say nothing of the kind.
_BESIDE = (".alpha", ".dora_scale", ".diff", ".rescale", ".scalar")

#: Names of the only tensors of a textual inversion, beside those in angle brackets.
_INVERSIONS = ("emb_params", "clip_l", "clip_g")


def find_adapter(names: Iterable[str]) -> FileFormat | None:
    """Return the kind of adapter whose tensors have these names; None if most are of a model."""
    ordered = sorted(names)
    if ordered and all(name in _INVERSIONS or name.startswith("<") for name in ordered):
        return FileFormat("a textual inversion, which is an input and no weights", "Leave it out.")
    sample = ordered[:: max(-(-len(ordered) // _MAX_SAMPLED), 1)]
    found = [kind for name in sample if (kind := _kind(name)) is not None]
    beside = sum(name.endswith(_BESIDE) for name in sample)
    return found[0] if found and 2 * (len(found) + beside) >= len(sample) else None


def _kind(name: str) -> FileFormat | None:
    kind = next((kind for mark, kind in _MARKS if mark in name), None)
    return _DIFFUSERS if kind is _PEFT and name.startswith(_PARTS_OF_PIPELINES) else kind
