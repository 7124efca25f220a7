"""Weight files of a checkpoint: which files count, and the index that their headers give."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from hub_magmax.checkpoints.headers import (
    DAMAGED,
    HEADER_READERS,
    MAX_HEADER_BYTES,
    parse_json,
    read_safetensors,
)
from hub_magmax.checkpoints.index import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    INDEX_NAME,
    ROUTER_WEIGHTS_NAME,
    SINGLE_NAME,
    CheckpointIndex,
    ShardInfo,
    TensorInfo,
)
from hub_magmax.checkpoints.listing import SUFFIXES, Listing, variant_of
from hub_magmax.checkpoints.recognition import refuse_pointers, refuse_without_weights
from hub_magmax.errors import CheckpointError
from hub_magmax.text import listed, shown

#: One of several files of weights, as `save_pretrained` numbers them.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


#: What diffusers looks for, in place of `model.safetensors`.
_DIFFUSERS_NAME = "diffusion_pytorch_model.safetensors"


def read_index(listing: Listing) -> CheckpointIndex:
    """Return the index of a checkpoint, from its headers alone.

    Raises:
        CheckpointError: If there are no safetensors weights, or they are malformed.
    """
    shards: list[ShardInfo] = []
    tensors: dict[str, TensorInfo] = {}
    expected = weight_map(listing)
    refuse_pointers(
        listing.label, {file: listing.sizes[file] for file in sorted(expected)}, listing.read_bytes
    )
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
    singles = _candidates(sizes, SINGLE_NAME, SUFFIXES)
    _refuse_two_libraries(listing)
    if SINGLE_NAME in sizes and indexes != [INDEX_NAME]:
        indexes = []  # loaders read an index of another name only where it is asked for
    if len(indexes) == 1:
        expected = _parse_index(listing, indexes[0])
        _refuse_two_sets(listing, indexes[0].removesuffix(".index.json"), indexes[0], expected)
        return expected
    found = indexes or singles
    if not found:
        refuse_without_weights(listing)
    if len(found) > 1 or _is_one_of_several(found[0]):
        raise _several(listing, found)
    _refuse_two_sets(listing, found[0], "", _shards_of(found[0], sizes))
    return {found[0]: None}


def _refuse_two_sets(listing: Listing, single: str, index: str, shards: Iterable[str]) -> None:
    """Raise CheckpointError if there is a second set of weights, from which some loaders would read.

    Args:
        listing: The files.
        single: The one file of weights, there or not.
        index: The index; empty if there is none.
        shards: Files of weights that the index lists, or that are numbered like shards of `single`.
    """
    sizes, others = listing.sizes, sorted(set(shards) - {single})
    if single in sizes and others:
        _refuse_sets(
            listing,
            [single, index] if index else [single],
            f"{single}, and {index or 'shards without an index'} ({listed(others, 2)})",
            "transformers reads the single file, and other loaders the index, or all files",
        )
    if single != ADAPTER_NAME and {ADAPTER_NAME, ADAPTER_CONFIG_NAME} <= sizes.keys():
        whole = index or single
        _refuse_sets(
            listing,
            [whole, ADAPTER_NAME],
            f"{whole}, and a PEFT adapter ({ADAPTER_NAME})",
            f"transformers reads the adapter, and the base model that {ADAPTER_CONFIG_NAME} names",
        )


def _refuse_two_libraries(listing: Listing) -> None:
    """Raise CheckpointError if there are weights for diffusers, and others for every other loader."""
    stems = [SINGLE_NAME, _DIFFUSERS_NAME]
    ways = [[way for way in (stem, f"{stem}.index.json") if way in listing.sizes] for stem in stems]
    if all(ways):
        found = [way[0] for way in ways]
        why = f"diffusers reads {found[1]}, and other loaders {found[0]}"
        _refuse_sets(listing, found, " and ".join(found), why)


def _refuse_sets(listing: Listing, ways: list[str], sets: str, why: str) -> NoReturn:
    raise CheckpointError(
        f"two sets of weights: {sets}",
        where=listing.label,
        expected=f"one, since {why}",
        hint=f"Remove what is out of date, or name the file that counts: "
        f"{' or '.join(listing.part(way) for way in ways)}",
    )


def _shards_of(single: str, sizes: Mapping[str, int]) -> list[str]:
    """Return the files that are numbered like shards of a file of weights."""
    stem = single.removesuffix(".safetensors")
    return [path for path in sizes if (match := _SHARD.fullmatch(path)) and match["stem"] == stem]


def _several(listing: Listing, found: list[str]) -> CheckpointError:
    """Return the error of several files of weights, none of which is the usual one."""
    shards = [match for name in found if (match := _SHARD.fullmatch(name))]
    if len(shards) == len(found) and len({(shard["stem"], shard["count"]) for shard in shards}) == 1:
        return _shards_without_index(listing.label, found, shards[0]["stem"], int(shards[0]["count"]))
    return CheckpointError(
        f"several weight files and no {INDEX_NAME}: {', '.join(found)}",
        where=listing.label,
        expected=f"one {SINGLE_NAME}, or shards listed in one {INDEX_NAME}",
        hint="Keep one set of weights, or name the file that counts: hf://org/model@revision/FILE, or "
        f"./folder/FILE, such as {found[0]}.",
    )


def _shards_without_index(label: str, found: list[str], stem: str, count: int) -> CheckpointError:
    index = f"{stem}.safetensors.index.json"
    if len(found) < count:
        return CheckpointError(
            f"{len(found)} of {count} shards and no {index}: {listed(found, 3)}",
            where=label,
            expected="all files of one save",
            hint="Download or copy the checkpoint again, completely.",
        )
    return CheckpointError(
        f"{count} shards and no {index}: {listed(found, 3)}",
        where=label,
        expected="an index beside them",
        hint='Download it too, or write it: python -c "import glob, json; from safetensors import safe_open '
        "as o; json.dump({'weight_map': {k: f for f in sorted(glob.glob('*.safetensors')) for k in "
        f"o(f, 'np').keys()}}}}, open('{index}', 'w'))\", in its folder.",
    )


def _candidates(sizes: Mapping[str, int], usual: str, suffixes: str | tuple[str, ...]) -> list[str]:
    """Return the file with the usual name, or else all files at the top with one of these suffixes.

    Loaders take a variant, `x.fp16.safetensors` beside `x.safetensors`, only where it is asked for.
    """
    if usual in sizes:
        return [usual]
    found = [path for path in sorted(sizes) if path.endswith(suffixes) and "/" not in path]
    models = [path for path in found if path != ROUTER_WEIGHTS_NAME]
    return [path for path in models if not _is_variant_beside_the_usual(path, sizes)]


def _is_variant_beside_the_usual(path: str, sizes: Mapping[str, int]) -> bool:
    variant = variant_of(path)
    usual = path.replace(f".{variant}.", ".", 1)
    return variant is not None and (usual in sizes or usual.removesuffix(".index.json") in sizes)


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
    if _is_one_of_several(weights):
        raise CheckpointError(
            f"{weights} is one of several files of a model",
            where=listing.label,
            expected="all of them",
            hint=f"Name the folder, {listing.address}, or the index that lists them.",
        )
    return _parse_index(listing, weights) if weights.endswith(".json") else {weights: None}


def _is_one_of_several(file: str) -> bool:
    match = _SHARD.fullmatch(file)
    return match is not None and int(match["count"]) > 1


def _refuse_odd_names(label: str, sizes: Mapping[str, int]) -> None:
    for path in sizes:
        control = any(unicodedata.category(character) in ("Cc", "Cs") for character in path)
        if (control or "\\" in path) and path.endswith((*SUFFIXES, ".index.json")):
            raise CheckpointError(
                f"the file name {shown(path)} holds {'control characters' if control else 'a backslash'}",
                where=label,
                hint="Rename the file.",
            )


def _parse_index(listing: Listing, path: str) -> dict[str, frozenset[str] | None]:
    sizes, where = listing.sizes, f"{listing.label}, {path}"
    if sizes[path] > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{sizes[path]:,} bytes long", where=where, expected=f"at most {MAX_HEADER_BYTES:,} bytes"
        )
    refuse_pointers(listing.label, {path: sizes[path]}, listing.read_bytes)
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
    document = parse_json(content, where, unique_names=True)
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
