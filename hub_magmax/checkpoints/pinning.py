"""Checkpoints pinned to their bytes: sources of a lock, and whether their files are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.adapters.config import config_of, parse_config
from hub_magmax.checkpoints.config import config_values, read_config, stated_architecture
from hub_magmax.checkpoints.error_keys import about_source
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, is_adapter
from hub_magmax.checkpoints.locations import Location, locate
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.needed_files import module_folders, needed_files
from hub_magmax.checkpoints.recognition import refuse_parts, refuse_pointers
from hub_magmax.checkpoints.side_files import ContentHashes, content_hashes, is_side_file, same_content
from hub_magmax.checkpoints.source import FileSource, TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import CheckpointError, LockError, SourceError
from hub_magmax.files import os_errors
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, LockedFile, LockedSource, parse_lock
from hub_magmax.recipe.model_names import expanded, is_there
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.training_checks import is_made_by_training
from hub_magmax.text import step

#: Languages or data sets that are kept of a card.
_MAX_LISTED = 50

_INDEX_SUFFIX = ".safetensors.index.json"

#: Bytes of a file that are hashed at a time.
_BLOCK_BYTES = 2**24

#: A file beside the weights; the largest known tokenizers are some 50 MB.
MAX_SMALL_FILE_BYTES = 500_000_000


def check_pinned(source: TensorSource, locked: LockedSource) -> None:
    """Raise LockError if headers, or an adapter's configuration, are no longer those that were locked."""
    found = {shard.file: (shard.size_bytes, shard.header_sha256) for shard in source.index.shards}
    pinned = {file.path: (file.size_bytes, file.header_sha256) for file in locked.files}
    if found != pinned:
        changed = sorted(path for path in found.keys() | pinned.keys() if found.get(path) != pinned.get(path))
        raise changed_error(source.label, changed)
    if locked.adapter_config and not same_content(locked.adapter_config, content_hashes(config_of(source))):
        raise changed_error(source.label, [ADAPTER_CONFIG_NAME])


def check_side_files(source: TensorSource, locked: LockedSource) -> None:
    """Raise LockError if the files beside the weights are no longer those that were locked.

    A commit pins them; without one they are compared. A lock of an earlier version names fewer, or none.
    """
    if locked.commit or not locked.side_files:
        return
    found = {path for path in source.sizes if is_side_file(path)} | {*locked.side_files}
    changed = sorted(path for path in found if _present_hashes(source, path) != locked.side_files.get(path))
    if changed:
        raise changed_error(source.label, changed)


def _present_hashes(source: TensorSource, path: str) -> str | None:
    return None if source.size_of(path) is None else _side_hashes(source, path)


def copied_files(source: TensorSource, locked: LockedSource) -> tuple[str, ...]:
    """Return the files beside the weights that are copied from a source: as its lock says.

    A lock of an early version names none, and then they are looked for. So they are in a source that stands
    for the locked one and has none of its files, as tensors in memory have none.
    """
    pinned = tuple(locked.side_files)
    return pinned if any(source.size_of(path) is not None for path in pinned) else needed_files(source)


def left_behind(source: TensorSource, locked: LockedSource) -> tuple[str, ...]:
    """Return the files of a source that are neither merged nor copied, sorted; folders end with a slash.

    Of a folder that files are copied from, only the files that a loader may miss are listed.
    """
    taken = {*copied_files(source, locked), *(shard.file for shard in source.index.shards)}
    top = source.contents("")
    entered = {path.partition("/")[0] for path in taken if "/" in path}
    files = [*top.sizes, *(f"{folder}/" for folder in top.folders if folder not in entered)]
    for folder in module_folders(source):
        files += _missed_in(source.contents(folder).sizes)
    return tuple(sorted(path for path in files if path not in taken and not path.endswith(_INDEX_SUFFIX)))


def _missed_in(module: Iterable[str]) -> list[str]:
    """Return the files of a module's folder; pickled weights only where there are no others."""
    paths = [*module]
    is_whole = any(path.endswith(".safetensors") for path in paths)
    return [path for path in paths if not (is_whole and path.endswith(".bin"))]


def read_small_file(source: TensorSource, path: str) -> bytes:
    """Return the content of a file that is held in memory whole, and whose size is limited.

    Raises:
        CheckpointError: If it is larger than any such file.
    """
    return source.read_bytes(path, 0, _checked_size(source, path))


def stored_lock(source: TensorSource) -> Lock:
    """Return the lock that is stored with a merged model.

    Raises:
        LockError: If it cannot be read, or was changed.
    """
    hint = "It belongs to the model: get or make the model again."
    return parse_lock(read_small_file(source, LOCK_NAME), f"{source.label}, {LOCK_NAME}", hint)


def _checked_size(source: TensorSource, path: str) -> int:
    """Return the bytes of a file beside the weights; those of weights in a sub-folder have no limit."""
    size = source.size_of(path)
    if size is None:
        raise changed_error(source.label, [path])
    if size > MAX_SMALL_FILE_BYTES and not path.endswith(".safetensors"):
        raise CheckpointError(
            f"{size:,} bytes long",
            where=f"{source.label}, {path}",
            expected=f"at most {MAX_SMALL_FILE_BYTES:,} bytes beside the weights",
            hint="Move it out of the checkpoint, if it is no part of the model.",
        )
    return size


def copy_side_file(source: TensorSource, path: str, locked: LockedSource, folder: Path) -> None:
    """Copy a file beside the weights, block by block, to its path in `folder`; compare it with the lock.

    Raises:
        LockError: If it changed.
        OutputError: If it cannot be written.
    """
    hashes, target = ContentHashes(_checked_size(source, path)), folder / path
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for block in _blocks(source, path, hashes.size):
                hashes.update(block)
                file.write(block)
    pinned = locked.side_files.get(path)
    if pinned is not None and same_content(pinned, str(hashes)) is False:
        raise changed_error(source.label, [path])


def _blocks(source: TensorSource, path: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, _BLOCK_BYTES):
        yield source.read_bytes(path, start, min(start + _BLOCK_BYTES, size))


def read_side_file(source: TensorSource, path: str, locked: LockedSource) -> bytes:
    """Return the content of a file beside the weights, compared with the lock.

    Raises:
        LockError: If it changed.
    """
    content = read_small_file(source, path)
    pinned = locked.side_files.get(path)
    if pinned is not None and same_content(pinned, content_hashes(content)) is False:
        raise changed_error(source.label, [path])
    return content


def changed_error(label: str, paths: list[str]) -> LockError:
    """Return the error of files that are no longer those that were locked."""
    return LockError(
        f"{', '.join(paths)} changed since the lock was written",
        where=label,
        hint="Run `hub-magmax lock` again if the change is meant.",
    )


def file_sha256(source: TensorSource, path: str) -> str:
    """Return the sha256 of a file: as its place states it, or else from its content."""
    if stated := _stated_sha256(source, path):
        return stated
    size = source.size_of(path)
    if size is None:
        raise changed_error(source.label, [path])
    digest = hashlib.sha256()
    with step(f"reading {path} of {source.label}, for its sha256"):
        for block in _blocks(source, path, size):
            digest.update(block)
    return digest.hexdigest()


def _stated_sha256(source: TensorSource, path: str) -> str | None:
    hashes = dict(part.split(":", 1) for part in (source.stated_hashes(path) or "").split())
    return hashes.get("sha256")


def _side_hashes(source: TensorSource, path: str) -> str:
    """Return hashes of a file beside the weights: those that its place states, or its content's."""
    if stated := source.stated_hashes(path):
        return stated
    hashes = ContentHashes(_checked_size(source, path))
    for block in _blocks(source, path, hashes.size):
        hashes.update(block)
    return str(hashes)


def lock_source(
    recipe: Recipe, written: str, *, hash_files: bool = False, cache: SourceCache | None = None
) -> LockedSource:
    """Pin the checkpoint that the recipe calls `written`, from its headers alone.

    Args:
        recipe: Says where relative paths start.
        written: A folder, or another name of a model.
        hash_files: Read weight files whole for their sha256 if their place does not state it.
        cache: Checkpoints that are open already; a new one is added.

    Raises:
        CheckpointError: If it is malformed, or no full checkpoint of a model; see `recognition`.
    """
    cache = cache or SourceCache()
    with about_source(recipe, written), _untrained(recipe, written):
        named = locate(written, recipe.folder)
        with taken_for_repository(written, recipe.folder):
            location = named.pinned().trusting(recipe.trusted_roots)
        with closing(cache.open(location)) as source:
            found = _describe(written, location, source, hash_files)
        if location.whole != location:
            found = replace(found, **card_facts(cache.open(location.whole)))
    return found


@contextmanager
def _untrained(recipe: Recipe, written: str) -> Iterator[None]:
    """Say in an error about a checkpoint that is not there yet how it is made, in place of other advice."""
    try:
        yield
    except SourceError as error:
        if is_made_by_training(recipe, written) and not is_there(recipe.folder / expanded(written)):
            error.take_from_hints(error.hint)
            error.add_hint("The recipe has a `training` for it: hub-magmax finetune RECIPE makes it.")
        raise


def _describe(written: str, location: Location, source: FileSource, hash_files: bool) -> LockedSource:
    side_files = _files_themselves(source)
    config = config_values(read_config(source), source.label)
    refuse_parts(source.listing, source.index, config)
    adapter_config = config_of(source) if is_adapter(source.index) else None
    if adapter_config is not None:
        parse_config(adapter_config, source.label)
    model_type, architectures = stated_architecture(config)
    return LockedSource(
        reference=written,
        kind=location.name,
        files=pinned_files(source, hash_files=hash_files),
        **location.pin._asdict(),
        **card_facts(source),
        model_type=model_type,
        architectures=architectures,
        side_files={path: _side_hashes(source, path) for path in side_files},
        adapter_config=content_hashes(adapter_config) if adapter_config is not None else None,
    )


def pinned_files(source: FileSource, *, hash_files: bool) -> tuple[LockedFile, ...]:
    """Return the weight files of a source with their hashes; of a folder's files read whole only if asked."""
    return tuple(
        LockedFile(
            shard.file,
            shard.size_bytes,
            shard.header_sha256,
            _stated_sha256(source, shard.file) or (file_sha256(source, shard.file) if hash_files else None),
        )
        for shard in source.index.shards
    )


def _files_themselves(source: TensorSource) -> tuple[str, ...]:
    """Return the files beside the weights that belong to a model; pointers of git-lfs are refused."""
    paths = needed_files(source)
    # The Hub states what it stores, and has the files themselves.
    unstated = {path: source.size_of(path) or 0 for path in paths if not source.stated_hashes(path)}
    refuse_pointers(source.label, unstated, source.read_bytes)
    return paths


def card_facts(source: TensorSource) -> dict[str, Any]:
    """Return licence, languages and data sets from the source's own card; None for those not stated."""
    front = _front_matter(source)
    license_id = front.get("license")
    stated = isinstance(license_id, str) and license_id not in ("", "~", "null")
    return {
        "license": license_id if stated else None,
        "languages": _texts(front.get("language")),
        "datasets": _texts(front.get("datasets")),
    }


def _texts(value: Any) -> tuple[str, ...] | None:
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(text for text in found if isinstance(text, str))[:_MAX_LISTED] or None


def _front_matter(source: TensorSource) -> dict[str, Any]:
    """Return the metadata of a source's card as texts and lists; empty where there is none to read."""
    import yaml

    if "README.md" not in source.sizes:
        return {}
    text = source.read_bytes("README.md", 0, min(source.sizes["README.md"], 100_000)).decode(errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        # Texts only, no tags and no merge keys: a few lines of those can cost hours, or raise anything.
        front = yaml.load(text[3:].split("\n---", 1)[0], Loader=yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return front if isinstance(front, dict) else {}
