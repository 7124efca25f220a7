"""Files of weights in other formats than safetensors, recognised by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import NamedTuple


class FileFormat(NamedTuple):
    """A format of weights or adapters, and how to come from it to a whole checkpoint."""

    what: str
    step: str


_BEFORE_EXPORT = "Merge the PyTorch checkpoints from before the export, and export the merged model."


def _by_transformers_4(option: str) -> str:
    return (
        "Convert it with transformers 4, which still reads it: pip install 'transformers<5', then python -c "
        f"\"from transformers import AutoModel as M; M.from_pretrained('IN', {option}=True)"
        ".save_pretrained('OUT')\", with the task's model class."
    )


_GGUF = FileFormat(
    "a GGUF file, as llama.cpp reads it, nearly always quantised",
    "Merge the checkpoints from before quantisation, and convert the merged model: llama.cpp's "
    "convert_hf_to_gguf.py.",
)
_TENSORFLOW = FileFormat("weights of TensorFlow or Keras", _by_transformers_4("from_tf"))
_EXPORTED = FileFormat("an exported graph", _BEFORE_EXPORT)
_ARCHIVE = FileFormat("an archive", "Unpack it, and name the folder that holds model.safetensors.")
_NUMPY = FileFormat(
    "arrays of NumPy or MLX",
    'Convert them: python -c "import numpy; from safetensors.numpy import save_file; '
    "save_file(dict(numpy.load('IN.npz')), 'model.safetensors')\", in its folder.",
)
_PAGE = FileFormat("a page of the web", "Download the file itself: hf download REPOSITORY FILE.")
_SHARDS = FileFormat(
    "shards of a distributed training checkpoint (torch.distributed, FSDP)",
    "Join them: accelerate merge-weights FOLDER OUT, with the folder that holds the .distcp files, and copy "
    "config.json and the tokenizer into OUT.",
)

#: By suffix; pickles are no line here, since `recognition` says how to convert each kind.
_FORMATS: Mapping[str, FileFormat] = {
    ".distcp": _SHARDS,
    ".gguf": _GGUF,
    ".ggml": _GGUF,
    ".llamafile": _GGUF,
    ".onnx": _EXPORTED,
    ".pb": _EXPORTED,
    ".tflite": _EXPORTED,
    ".mlmodel": _EXPORTED,
    ".engine": _EXPORTED,
    ".pte": _EXPORTED,
    ".xml": _EXPORTED,
    ".h5": _TENSORFLOW,
    ".index": _TENSORFLOW,
    ".keras": _TENSORFLOW,
    ".msgpack": FileFormat("weights of Flax", _by_transformers_4("from_flax")),
    ".npz": _NUMPY,
    ".npy": _NUMPY,
    ".nemo": FileFormat(
        "an archive of NeMo",
        "Convert it with NeMo's script for its architecture (convert_*_nemo_to_hf.py), and name the folder.",
    ),
    ".zip": _ARCHIVE,
    ".tar": _ARCHIVE,
    ".gz": _ARCHIVE,
    ".tgz": _ARCHIVE,
    ".zst": _ARCHIVE,
    ".7z": _ARCHIVE,
}

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

#: Pickles of a trainer that hold no weights.
_TRAINING = re.compile(r"(optimizer|scheduler|rng_state|training_args|scaler|random_states)(?![a-z]).*")

#: First bytes of files that are called safetensors and are not, in lower case.
_MAGICS: tuple[tuple[bytes, FileFormat], ...] = (
    (b"gguf", _GGUF),
    (
        b"pk\x03\x04",
        FileFormat(
            "a pickle that torch.save wrote (or another archive)",
            "Rename it to model.pt, and the next message says how to convert it where you trust it.",
        ),
    ),
    (b"\x89hdf", _TENSORFLOW),
    (b"<!doc", _PAGE),
    (b"<html", _PAGE),
)

#: Folders of a training checkpoint whose files are parts of one model.
_ZERO = re.compile(r"global_step\d+")
_FSDP = re.compile(r"pytorch_model_fsdp_\d+")

_DEEPSPEED = FileFormat(
    "a training checkpoint of DeepSpeed, whose weights are spread over files of many processes",
    "Join them in its folder: python zero_to_fp32.py . OUT --safe_serialization, and copy config.json and "
    "the tokenizer into OUT.",
)


def format_of(name: str) -> FileFormat | None:
    """Return the format of a file of this name, None if it has no known one (or is a pickle)."""
    return _GGUF if name.startswith("ggml") else _FORMATS.get(PurePath(name).suffix.lower())


def format_of_content(start: bytes) -> FileFormat | None:
    """Return the format of a file that begins with these bytes, whatever it is called; None if unknown."""
    return next((found for magic, found in _MAGICS if start.lstrip().lower().startswith(magic)), None)


def sharded_training(files: Iterable[str], folders: Iterable[str]) -> tuple[FileFormat, str] | None:
    """Return the format of a training checkpoint of many processes, and the file or folder that shows it."""
    for folder in folders:
        if _ZERO.fullmatch(folder):
            return _DEEPSPEED, f"{folder}/"
        if _FSDP.fullmatch(folder):
            return _SHARDS, f"{folder}/"
    for file in files:
        if file.endswith(("_optim_states.pt", "_model_states.pt")):
            return _DEEPSPEED, file
        if file.endswith(".distcp"):
            return _SHARDS, file
    return None


def pickles_among(files: Iterable[str]) -> list[str]:
    """Return the files that may hold pickled weights, sorted."""
    return sorted(file for file in files if file.endswith(PICKLES) and not _TRAINING.fullmatch(file))


def conversion(origin: str, has_class: bool, pickles: list[str]) -> str:
    """Return the command that writes pickled weights as safetensors.

    Args:
        origin: Arguments of `from_pretrained` that load the checkpoint.
        has_class: Whether config.json names the model's class, by which transformers loads it.
        pickles: Those that hold weights.
    """
    if has_class and all(path.startswith("pytorch_model") for path in pickles):
        return (
            f'python -c "import transformers as t; c = t.AutoConfig.from_pretrained({origin}); '
            f"getattr(t, c.architectures[0]).from_pretrained({origin}).save_pretrained('OUT')\", and name "
            "./OUT in the recipe."
        )
    if len(pickles) > 1 and all(path.startswith("consolidated.") for path in pickles):
        return "transformers' convert_llama_weights_to_hf.py joins the parts of Meta's checkpoints."
    # Trainers put the tensors below a name, and tensors that share memory cannot be saved.
    return (
        'python -c "import torch; from safetensors.torch import save_file; t = {}; '
        f"[t.update(p.get('state_dict') or p.get('model') or p) for f in {pickles!r} for p in "
        "[torch.load(f, weights_only=True)]]; save_file({k: v.clone().contiguous() for k, v in t.items()}, "
        "'model.safetensors')\", in its folder (downloaded, if it is on the Hub)."
    )
