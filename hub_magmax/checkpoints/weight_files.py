"""Weight files of a checkpoint: which files count, and the index that their headers give."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hub_magmax.checkpoints.headers import (
    DAMAGED,
    HEADER_READERS,
    MAX_HEADER_BYTES,
    ReadBytes,
    parse_json,
    read_safetensors,
)
from hub_magmax.checkpoints.index import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointIndex,
    ShardInfo,
    TensorInfo,
)
from hub_magmax.errors import CheckpointError
from hub_magmax.text import shown

_SUFFIXES = tuple(f".{suffix}" for suffix in HEADER_READERS)


#: A file of weights, or the index of several, with its variant as transformers calls it.
_WEIGHTS = re.compile(
    r"[^/]*?(\.(?P<variant>[\w-]+?))?"
    rf"\.({'|'.join(HEADER_READERS)})(\.index(\.(?P<index_variant>[\w-]+))?\.json)?"
)


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint, from whose headers its index is read.

    Attributes:
        label: Name of the checkpoint in messages.
        sizes: Bytes of every file, by its path relative to the checkpoint.
        read_bytes: Returns the bytes `[start, stop)` of a file.
        weights: The file of weights, or the index, that counts if there are several.
        origin: Arguments of `from_pretrained` that load it, as Python writes them, for messages.
    """

    label: str
    sizes: Mapping[str, int]
    read_bytes: ReadBytes
    weights: str = ""
    origin: str = ""


def is_weights(name: str) -> bool:
    """Say whether a file of this name holds weights, or is an index of such files."""
    return _WEIGHTS.fullmatch(name) is not None


def split_part(part: str) -> tuple[str, str]:
    """Return the folder, and the file of weights in it, that a part of a repository names; empty for none."""
    folder, _, name = part.rpartition("/")
    return (folder, name) if is_weights(name) else (part, "")


def variant_of(name: str) -> str | None:
    """Return the variant of a file of weights as transformers calls it; None for the usual one."""
    match = _WEIGHTS.fullmatch(name)
    return match and (match["index_variant"] or match["variant"])


def read_index(listing: Listing) -> CheckpointIndex:
    """Return the index of a checkpoint, from its headers alone.

    Raises:
        CheckpointError: If there are no safetensors weights, or they are malformed.
    """
    shards: list[ShardInfo] = []
    tensors: dict[str, TensorInfo] = {}
    expected = weight_map(listing)
    for file in sorted(expected):
        read_header = HEADER_READERS.get(Path(file).suffix[1:], read_safetensors)
        shard, found = read_header(file, listing.sizes[file], listing.read_bytes, f"{listing.label}, {file}")
        names = expected[file]
        if names is not None and set(found) != set(names):
            raise _disagreement(listing.label, file, set(found), set(names))
        for name in found:
            if name in tensors:
                raise CheckpointError(
                    f"tensor {shown(name)} is stored twice, in {tensors[name].file} and {file}",
                    where=listing.label,
                    hint="Save the checkpoint again with `save_pretrained`.",
                )
        shards.append(shard)
        tensors.update(found)
    if not tensors:
        raise CheckpointError(
            "the checkpoint has no tensors", where=listing.label, hint="Save it again with `save_pretrained`."
        )
    return CheckpointIndex(listing.label, tuple(shards), tensors)


def weight_map(listing: Listing) -> dict[str, frozenset[str] | None]:
    """Return the weight files, each with the tensor names that its index lists (None: no index).

    Raises:
        CheckpointError: If there are none, or it is not clear which ones count.
    """
    label, sizes = listing.label, listing.sizes
    _refuse_odd_names(label, sizes)
    if listing.weights:
        return _named_weights(listing)
    indexes = _candidates(sizes, INDEX_NAME, ".safetensors.index.json")
    if len(indexes) == 1:
        return _parse_index(listing, indexes[0])
    singles = _candidates(sizes, SINGLE_NAME, _SUFFIXES)
    found = indexes or singles
    _refuse_adapter(label, sizes, [*indexes, *singles])
    if not found:
        raise _no_weights(listing)
    if len(found) > 1:
        raise CheckpointError(
            f"several weight files and no {INDEX_NAME}: {', '.join(found)}",
            where=label,
            expected=f"one {SINGLE_NAME}, or shards listed in one {INDEX_NAME}",
            hint="Keep one set of weights, or name the file that counts: hf://org/model@revision/FILE, or "
            f"./folder/FILE, such as {found[0]}.",
        )
    return {found[0]: None}


def _candidates(sizes: Mapping[str, int], usual: str, suffixes: str | tuple[str, ...]) -> list[str]:
    """Return the file with the usual name, or else all files at the top with one of these suffixes."""
    if usual in sizes:
        return [usual]
    return [path for path in sorted(sizes) if path.endswith(suffixes) and "/" not in path]


def _named_weights(listing: Listing) -> dict[str, frozenset[str] | None]:
    weights = listing.weights
    if weights not in listing.sizes:
        there = [path for path in listing.sizes if ".safetensors" in path]
        raise CheckpointError(
            f"there is no file {shown(weights)}",
            where=listing.label,
            expected=f"one of {', '.join(there[:10])}" if there else "a safetensors file",
            hint="Check the name.",
        )
    return _parse_index(listing, weights) if weights.endswith(".json") else {weights: None}


def _refuse_odd_names(label: str, sizes: Mapping[str, int]) -> None:
    for path in sizes:
        control = any(unicodedata.category(character) in ("Cc", "Cs") for character in path)
        if (control or "\\" in path) and path.endswith((*_SUFFIXES, ".index.json")):
            raise CheckpointError(
                f"the file name {shown(path)} holds {'control characters' if control else 'a backslash'}",
                where=label,
                hint="Rename the file.",
            )


def _refuse_adapter(label: str, sizes: Mapping[str, int], weights: list[str]) -> None:
    """Raise CheckpointError if the weights are those of an adapter that cannot be read."""
    files = weights or [path for path in sizes if path.endswith(".bin")]
    if not files or any(Path(path).stem != "adapter_model" for path in files):
        return
    if files != [ADAPTER_NAME]:
        raise CheckpointError(
            f"a PEFT adapter with pickled weights ({files[0]}), which are never loaded",
            where=label,
            expected=ADAPTER_NAME,
            hint='Convert it where you trust it: python -c "import torch; from safetensors.torch import '
            "save_file; save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors')\", in its folder.",
        )
    if ADAPTER_CONFIG_NAME not in sizes:
        raise CheckpointError(
            f"a PEFT adapter ({ADAPTER_NAME}) without {ADAPTER_CONFIG_NAME}",
            where=label,
            hint="Download or copy the adapter again, completely.",
        )


def _no_weights(listing: Listing) -> CheckpointError:
    label, sizes = listing.label, listing.sizes
    pickles = sorted(path for path in sizes if path.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        command = _conversion(listing.origin or repr(label), sizes, pickles)
        return CheckpointError(
            f"only pickled weights ({', '.join(pickles[:3])}), which are never loaded",
            where=label,
            expected="safetensors",
            hint=f"Convert them where you trust them: {command}",
        )
    return CheckpointError(
        "no safetensors file",
        where=label,
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        hint="Check the path; a checkpoint is a folder written by `save_pretrained`.",
    )


def _conversion(origin: str, sizes: Mapping[str, int], pickles: list[str]) -> str:
    """Return the command that writes pickled weights as safetensors."""
    if "config.json" in sizes and all(path.startswith("pytorch_model") for path in pickles):
        return (
            f'python -c "import transformers as t; c = t.AutoConfig.from_pretrained({origin}); '
            f"getattr(t, c.architectures[0]).from_pretrained({origin}).save_pretrained('OUT')\", and name "
            "./OUT in the recipe."
        )
    return (
        f'python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load({pickles[0]!r}, weights_only=True), 'model.safetensors')\", in its folder."
    )


def _parse_index(listing: Listing, path: str) -> dict[str, frozenset[str] | None]:
    sizes, where = listing.sizes, f"{listing.label}, {path}"
    if sizes[path] > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{sizes[path]:,} bytes long", where=where, expected=f"at most {MAX_HEADER_BYTES:,} bytes"
        )
    names: dict[str, set[str]] = {}
    for name, file in _index_entries(listing.read_bytes(path, 0, sizes[path]), where):
        if file not in sizes or "/" in file or "\\" in file:
            raise CheckpointError(
                f"tensor {shown(name)} is said to be in {shown(file)}, which is not there",
                where=where,
                expected="a file beside the index",
                hint="Download or copy the checkpoint again, completely.",
            )
        names.setdefault(file, set()).add(name)
    return {file: frozenset(found) for file, found in names.items()}


def _index_entries(content: bytes, where: str) -> Iterable[tuple[str, str]]:
    """Return the tensor names and file names that an index lists."""
    document = parse_json(content, where)
    entries = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()) or not entries:
        raise CheckpointError("no `weight_map` from tensor names to file names", where=where, hint=DAMAGED)
    return entries.items()


def _disagreement(label: str, file: str, found: set[str], promised: set[str]) -> CheckpointError:
    missing, extra = sorted(promised - found), sorted(found - promised)
    facts = [
        f"it lacks {shown(missing[0])}" if missing else "",
        f"it also holds {shown(extra[0])}" if extra else "",
    ]
    return CheckpointError(
        "the index and the file disagree: " + " and ".join(fact for fact in facts if fact),
        where=f"{label}, {file}",
        expected=f"exactly the {len(promised)} tensors that the index lists",
        hint="Remove stale shards, or save the checkpoint again with `save_pretrained`.",
    )
