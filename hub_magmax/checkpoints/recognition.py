"""Recognition of what a checkpoint is, from file names, headers and config.json, before it is compared.

`RECOGNISERS` has one line for each kind of thing that is no full checkpoint of a model, and
`WITHOUT_WEIGHTS` one for each kind without safetensors. Each function says by which evidence it is known and
which step leads to a checkpoint; none proposes a rule of a recipe, since a rule would drop what the thing
holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from hub_magmax.checkpoints.adapter_formats import find_adapter
from hub_magmax.checkpoints.config import config_values, read_config, stated_architecture
from hub_magmax.checkpoints.foreign_files import conversion, format_of, pickles_among, sharded_training
from hub_magmax.checkpoints.headers import ReadBytes
from hub_magmax.checkpoints.index import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    EXACT_DTYPES,
    INDEX_NAME,
    MERGEABLE_DTYPES,
    SELECTION_SUFFIX,
    SINGLE_NAME,
    CheckpointIndex,
    TensorInfo,
)
from hub_magmax.checkpoints.listing import Contents, Listing, is_weights
from hub_magmax.checkpoints.quantised import find_codes, in_full, stated_quantisation
from hub_magmax.errors import CheckpointError
from hub_magmax.text import listed, shown

#: First line of a git-lfs pointer, and the bytes of one: a hash and a size at least, 1024 as specified.
_POINTER_START = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = range(120, 1025)

#: Sub-folders that are looked into at most.
_MAX_FOLDERS = 100


class Refusal(NamedTuple):
    """A reason why something is no full checkpoint, what is expected in its place, and the step."""

    what: str
    expected: str
    step: str


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint before any value is read.

    Attributes:
        listing: Its files.
        files: Its files of weights.
        tensors: Its tensors by name.
        config: Values of config.json; empty where there is none.
    """

    listing: Listing
    files: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]


def refuse_parts(listing: Listing, index: CheckpointIndex, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the tensors are not the weights of a whole model, or a PEFT adapter's.

    Args:
        listing: Its files.
        index: Its tensors and files of weights.
        config: Values of config.json; empty where there is none.
    """
    facts = Facts(listing, tuple(shard.file for shard in index.shards), index.tensors, config)
    _refuse(listing.label, (recognise(facts) for recognise in RECOGNISERS))


def refuse_without_weights(listing: Listing) -> None:
    """Raise CheckpointError for a checkpoint without safetensors weights, saying what is there."""
    _refuse(listing.label, (recognise(listing) for recognise in WITHOUT_WEIGHTS))
    raise CheckpointError(
        "no safetensors file",
        where=listing.label,
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        hint="Check the path; a checkpoint is a folder written by `save_pretrained`.",
    )


def refuse_file(label: str, name: str) -> None:
    """Raise CheckpointError for a single file of weights in another format, by its name."""
    listing = Listing(label, {name: 0}, lambda path, start, stop: b"")
    _refuse(label, (recognise(listing) for recognise in WITHOUT_WEIGHTS))


def refuse_pointers(label: str, sizes: Mapping[str, int], read_bytes: ReadBytes) -> None:
    """Raise CheckpointError if some files, given with their sizes, are pointers of git-lfs."""
    small = [path for path, size in sizes.items() if size in _POINTER_BYTES]
    found = [path for path in small if read_bytes(path, 0, len(_POINTER_START)) == _POINTER_START]
    if found:
        raise CheckpointError(
            f"{listed(found, 3)} {'is a git-lfs pointer' if len(found) == 1 else 'are git-lfs pointers'}, "
            "without the content",
            where=label,
            expected="the files themselves",
            hint="Run `git lfs pull` in the clone (git lfs install, where it is missing), or download the "
            "model with `hf download`.",
        )


def _refuse(label: str, found: Iterable[Refusal | None]) -> None:
    if refusal := next(filter(None, found), None):
        raise CheckpointError(refusal.what, where=label, expected=refusal.expected, hint=refusal.step)


# Without weights that can be read: files and folders.


def _sharded_training(listing: Listing) -> Refusal | None:
    """Find training checkpoints of DeepSpeed and FSDP."""
    found = sharded_training(listing.sizes, listing.contents("")[1])
    if found is None:
        return None
    shards, seen = found
    return Refusal(f"{shards.what} ({seen})", SINGLE_NAME, shards.step)


def _folders(listing: Listing) -> Refusal | None:
    """Find models that lie in sub-folders: a trainer's checkpoints, a pipeline, an old sentence encoder."""
    found = _folders_with_weights(listing)
    if not found:
        return None
    names = listed(found, 10)
    if "model_index.json" in listing.sizes:
        what, step = (
            f"a pipeline of diffusers, whose models lie in its folders: {names}",
            "Merge one at a time",
        )
        example = next((name for name in found if name in ("unet", "transformer")), found[-1])
    elif "modules.json" in listing.sizes:
        return Refusal(
            f"a model of sentence-transformers, whose weights lie in {names}",
            "the weights at the top, as sentence-transformers saves them today",
            'Save it again, and name the copy: python -c "from sentence_transformers import '
            f"SentenceTransformer as S; S({listing.origin or repr(listing.label)}).save('OUT')\"",
        )
    elif all(re.fullmatch(r"checkpoint-\d+", name) for name in found):
        what, step = f"a trainer's folder with the checkpoints {names}", "Name one, such as the newest"
        example = found[-1]
    else:
        what, step = f"no safetensors file at the top, but weights in {names}", "Name one of these"
        example = found[-1]
    return Refusal(what, "the folder of one model", f"{step}: {listing.part(example)}")


def _folders_with_weights(listing: Listing) -> list[str]:
    """Return the sub-folders with files of weights, by number and name; those of the Hub's cache too."""
    found = []
    for folder in listing.contents("")[1][:_MAX_FOLDERS]:
        deeper = listing.contents(folder)[1] if folder == "snapshots" else ()
        found += [path for path in (folder, *deeper) if holds_weights(listing.contents(path))]
    return sorted(found, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(20), name))


def holds_weights(contents: Contents) -> bool:
    """Say whether a folder holds weights of a model, in any format that is known."""
    names = [path.rpartition("/")[2] for path in contents[0]]
    folders = [path.rpartition("/")[2] for path in contents[1]]
    known = any(is_weights(name) or format_of(name) for name in names)
    return known or bool(pickles_among(names)) or sharded_training(names, folders) is not None


def _selection(listing: Listing) -> Refusal | None:
    """Find selections of hub_magmax, of which weights can be made."""
    found = [path for path in listing.sizes if path.endswith(SELECTION_SUFFIX)]
    if not found:
        return None
    what = (
        f"a selection ({listed(found, 3)}), which says which task each element is from and holds no weights"
    )
    return Refusal(what, "safetensors", f"Make its weights: hub-magmax apply {listing.label}")


def _other_format(listing: Listing) -> Refusal | None:
    """Find files of other programs; also named in place of a folder."""
    for file in [*listing.sizes, *([] if listing.sizes else [listing.label])]:
        if found := format_of(file):
            return Refusal(f"{file.rpartition('/')[2]} is {found.what}", "safetensors", found.step)
    return None


def _pickled(listing: Listing) -> Refusal | None:
    pickles = pickles_among(listing.sizes)
    if not pickles:
        return None
    if all(PurePath(path).stem == "adapter_model" for path in pickles):
        return Refusal(
            f"a PEFT adapter with pickled weights ({pickles[0]}), which are never loaded",
            ADAPTER_NAME,
            'Convert it where you trust it: python -c "import torch; from safetensors.torch import '
            "save_file; save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors')\", in its folder.",
        )
    origin = listing.origin or repr(listing.label)
    return Refusal(
        f"only pickled weights ({', '.join(pickles[:3])}), which are never loaded",
        "safetensors",
        f"Convert them where you trust them: {conversion(origin, _names_class(listing), pickles)}",
    )


def _adapter_alone(listing: Listing) -> Refusal | None:
    if ADAPTER_CONFIG_NAME not in listing.sizes:
        return None
    what = f"a PEFT adapter ({ADAPTER_CONFIG_NAME}) without {ADAPTER_NAME}"
    return Refusal(what, "both", "Download or copy the adapter again, completely.")


def _names_class(listing: Listing) -> bool:
    """Say whether config.json names a class of transformers; those of 2019 did not."""
    model_type, classes = stated_architecture(config_values(read_config(listing), listing.label))
    return bool(model_type and classes)


WITHOUT_WEIGHTS: tuple[Callable[[Listing], Refusal | None], ...] = (
    _selection,
    _sharded_training,
    _folders,
    _other_format,
    _pickled,
    _adapter_alone,
)


# With headers: names, dtypes and shapes of tensors.


def _quantised(facts: Facts) -> Refusal | None:
    stated = stated_quantisation(facts.config)
    kind = stated and shown(stated[1]).strip("'")
    if found := find_codes(facts.tensors):
        return Refusal(
            f"the checkpoint is quantised ({kind or found.format}; it holds {shown(found.tensor)})",
            f"weights in full, as {', '.join(MERGEABLE_DTYPES)}",
            in_full(found.format),
        )
    if stated is not None:
        return Refusal(
            f"config.json says that the weights are quantised ({kind}), and they do not look like it",
            "a configuration that fits the weights, since the merged model gets a copy of it",
            f"If the weights are plain numbers, remove `{stated[0]}` from config.json.",
        )
    return None


def _other_weights(facts: Facts) -> Refusal | None:
    """Find a configuration that has transformers load another file than the one that was read."""
    listing, named = facts.listing, str(facts.config.get("transformers_weights"))
    if listing.weights or named not in listing.sizes or named in facts.files:
        return None
    if named.endswith(".index.json"):  # its shards, or those of another index beside it
        return None
    return Refusal(
        f"config.json says that the weights are in {named}, and loaders that do not know of this read "
        f"{facts.files[0]}",
        "one set of weights",
        f"Name the file that counts: {listing.part(named)} or {listing.part(facts.files[0])}",
    )


def _empty(facts: Facts) -> Refusal | None:
    """Find parameters without elements, as ZeRO-3 and FSDP leave them outside of the gathered model."""
    empty = [
        name
        for name, info in facts.tensors.items()
        if info.shape == (0,) and info.dtype not in EXACT_DTYPES and name.endswith((".weight", ".bias"))
    ]
    if not empty:
        return None
    return Refusal(
        f"{listed([shown(name) for name in empty], 3)} {'is' if len(empty) == 1 else 'are'} empty: the model "
        "was saved by DeepSpeed ZeRO-3 (or FSDP) without gathering its weights",
        "every parameter whole",
        "Join the training checkpoint's own files in its folder, python zero_to_fp32.py . OUT "
        "--safe_serialization; or save again with stage3_gather_16bit_weights_on_model_save (FSDP: with a "
        "full state dict).",
    )


def _training_state(facts: Facts) -> Refusal | None:
    """Find flattened parameters of FSDP, and states of optimisers."""
    for name in facts.tensors:
        if "flat_param" in name or name.endswith((".exp_avg", ".exp_avg_sq", ".momentum_buffer")):
            kind = "flattened parameters of FSDP" if "flat_param" in name else "the state of an optimiser"
            return Refusal(
                f"the file holds {kind} ({shown(name)})",
                "the model's own tensors",
                "Save the model with a full state dict (accelerate: fsdp_state_dict_type FULL_STATE_DICT), "
                "or join the shards: accelerate merge-weights FOLDER OUT.",
            )
    return None


def _unmerged(facts: Facts) -> Refusal | None:
    """Find a whole model that PEFT wraps, saved with the adapter's layers inside."""
    layer = next((name for name in facts.tensors if ".base_layer." in name), None)
    if layer is None or facts.files == (ADAPTER_NAME,) or not any(".lora_" in name for name in facts.tensors):
        return None
    if any("lora" in key for key in facts.config):  # a model that is made with its LoRAs, as Phi-4's
        return None
    return Refusal(
        f"the model was saved with an adapter in it that is not merged (it holds {shown(layer)})",
        "the model's own tensors, with the adapter merged",
        "Where it was trained, save model.merge_and_unload(), and name that; or save the adapter alone, by "
        "the PEFT model's own `save_pretrained`.",
    )


def _adapter(facts: Facts) -> Refusal | None:
    """Find adapters that are not PEFT's own files, and those that lack their configuration."""
    if facts.files == (ADAPTER_NAME,):
        if ADAPTER_CONFIG_NAME in facts.listing.sizes:
            return None
        return Refusal(
            f"a PEFT adapter ({ADAPTER_NAME}) without {ADAPTER_CONFIG_NAME}",
            "",
            "Download or copy the adapter again, completely.",
        )
    found = find_adapter(facts.tensors)
    return found and Refusal(
        f"{facts.files[0]} is {found.what}, and not a whole model",
        f"a whole model, or a LoRA as PEFT saves it ({ADAPTER_NAME} and {ADAPTER_CONFIG_NAME})",
        found.step,
    )


#: In this order, since a quantised adapter's file is an adapter first, and a quantised layer may be wrapped.
RECOGNISERS: tuple[Callable[[Facts], Refusal | None], ...] = (
    _other_weights,
    _adapter,
    _quantised,
    _empty,
    _training_state,
    _unmerged,
)
