"""Names of the output's weight files, and metadata in their headers, after those of the copied model.

Loaders find weights by their names (diffusers looks for `diffusion_pytorch_model.safetensors` alone), and
some read the headers (LTX-Video's configuration is there).
"""

from __future__ import annotations

import re

from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.side_files import is_safe
from hub_magmax.recipe.lockfile import LockedSource

#: Names that libraries look for, without suffix. transformers knows the first only.
_KNOWN = ("model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model", "consolidated")

_NUMBERS = re.compile(r"[-_.]?\d{2,}-of-\d{2,}")
_VARIANT = re.compile(r"\.(fp64|fp32|fp16|bf16|fp8|float\d+|bfloat16|ema|non_ema)$", re.IGNORECASE)

#: Keys of hashes over the file's own bytes, such as `modelspec.hash_sha256` and `sshs_model_hash`. kohya's
#: `ss_…_hash` are of what was trained on.
_OWN_HASH = re.compile(
    r"(modelspec\.|sshs_)?((model|legacy|file|weights?|tensors?|content)_)?"
    r"(hash|sha256|sha1|md5|checksum|crc32)(_\w+)?",
    re.IGNORECASE,
)

#: Bytes of one text; the largest known, pictures of a model, are below one million.
_MAX_TEXT_BYTES = 10_000_000

#: Layouts of weights; safetensors' own writers leave them out.
_FORMATS = ("pt", "tf", "flax", "mlx")
_OWN_KEYS = ("format", "hub_magmax")


def file_stem(index: CheckpointIndex, locked: LockedSource) -> str:
    """Return the name of the output's weight files, without numbers and suffix: the source's, no variant.

    With a configuration of transformers a name that no library looks for becomes `model`, so that the output
    loads.
    """
    stems = {_stem(shard.file) for shard in index.shards}
    stem = stems.pop() if len(stems) == 1 else "model"
    is_transformers = locked.model_type is not None or bool(locked.architectures)
    return stem if stem in _KNOWN or (is_safe(stem) and not is_transformers) else "model"


def _stem(file: str) -> str:
    name = _NUMBERS.sub("", file.rpartition(".")[0])
    start = name.partition(".")[0]
    return start if start in _KNOWN else _VARIANT.sub("", name)


def kept_metadata(index: CheckpointIndex) -> dict[str, str]:
    """Return the metadata of a source's headers that stay true of the output; of equal keys the first file's.

    Ours are not in it, nor what follows from the bytes of the weights.
    """
    found = {key: text for shard in reversed(index.shards) for key, text in shard.metadata.items()}
    kept = {key: text for key, text in sorted(found.items()) if key not in _OWN_KEYS and _is_kept(key, text)}
    layout = found.get("format")
    return ({"format": layout} if layout in _FORMATS and layout != "pt" else {}) | kept


def lost_metadata(index: CheckpointIndex) -> tuple[str, ...]:
    """Return the keys of a source's headers that are left out: hashes of its weights, and what is no text."""
    items = ((key, text) for shard in index.shards for key, text in shard.metadata.items())
    return tuple(sorted({key for key, text in items if key not in _OWN_KEYS and not _is_kept(key, text)}))


def _is_kept(key: str, text: str) -> bool:
    try:
        size = len(key.encode()) + len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot store
        return False
    return size <= _MAX_TEXT_BYTES and _OWN_HASH.fullmatch(key) is None
