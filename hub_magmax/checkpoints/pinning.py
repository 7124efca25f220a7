"""Checkpoints pinned to their bytes: sources of a lock, and whether their files are still the same."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import replace
from typing import Any

from hub_magmax.checkpoints.adapter_config import config_of, parse_config
from hub_magmax.checkpoints.config import refuse_quantised, stated_architecture
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, is_adapter
from hub_magmax.checkpoints.locations import Location, locate
from hub_magmax.checkpoints.side_files import content_hashes, is_side_file, same_content
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import CheckpointError, LockError
from hub_magmax.recipe.lockfile import LockedFile, LockedSource
from hub_magmax.recipe.schema import Recipe

CONFIG_NAME = "config.json"

#: Languages or data sets that are kept of a card.
_MAX_LISTED = 50

#: Bytes of a file that are hashed at a time.
_BLOCK_BYTES = 2**24

#: A file beside the weights; the largest known tokenizers are some 50 MB.
MAX_SMALL_FILE_BYTES = 500_000_000

#: Bytes that are read of a configuration; the largest known are some hundred kilobytes.
_MAX_CONFIG_BYTES = 10_000_000


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

    A commit pins them; without one they are compared. A lock of an earlier version names none.
    """
    if locked.commit or not locked.side_files:
        return
    found = {path: _side_hashes(source, path) for path in source.sizes if is_side_file(path)}
    paths = found.keys() | locked.side_files.keys()
    changed = sorted(path for path in paths if found.get(path) != locked.side_files.get(path))
    if changed:
        raise changed_error(source.label, changed)


def read_small_file(source: TensorSource, path: str) -> bytes:
    """Return the content of a file that is held in memory whole, and whose size is limited.

    Raises:
        CheckpointError: If it is larger than any such file.
    """
    if source.sizes[path] > MAX_SMALL_FILE_BYTES:
        raise CheckpointError(
            f"{source.sizes[path]:,} bytes long",
            where=f"{source.label}, {path}",
            expected=f"at most {MAX_SMALL_FILE_BYTES:,} bytes beside the weights",
            hint="Move it out of the checkpoint, if it is no part of the model.",
        )
    return source.read_bytes(path, 0, source.sizes[path])


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
    digest, size = hashlib.sha256(), source.sizes[path]
    for start in range(0, size, _BLOCK_BYTES):
        digest.update(source.read_bytes(path, start, min(start + _BLOCK_BYTES, size)))
    return digest.hexdigest()


def _stated_sha256(source: TensorSource, path: str) -> str | None:
    hashes = dict(part.split(":", 1) for part in (source.stated_hashes(path) or "").split())
    return hashes.get("sha256")


def _side_hashes(source: TensorSource, path: str) -> str:
    """Return hashes of a small file: those that its place states, or its content's."""
    return source.stated_hashes(path) or content_hashes(read_small_file(source, path))


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
        CheckpointError: If it is malformed, or quantised.
    """
    location, cache = locate(written, recipe.folder).pinned(), cache or SourceCache()
    with closing(cache.open(location)) as source:
        found = _describe(written, location, source, hash_files)
    if location.whole != location:
        found = replace(found, **card_facts(cache.open(location.whole)))
    return found


def _describe(written: str, location: Location, source: TensorSource, hash_files: bool) -> LockedSource:
    config_bytes = min(source.sizes.get(CONFIG_NAME, 0), _MAX_CONFIG_BYTES)
    config = source.read_bytes(CONFIG_NAME, 0, config_bytes) if config_bytes else None
    refuse_quantised(source.index, config)
    adapter_config = config_of(source) if is_adapter(source.index) else None
    if adapter_config is not None:
        parse_config(adapter_config, source.label)
    files = tuple(
        LockedFile(
            shard.file,
            shard.size_bytes,
            shard.header_sha256,
            _stated_sha256(source, shard.file) or (file_sha256(source, shard.file) if hash_files else None),
        )
        for shard in source.index.shards
    )
    model_type, architectures = stated_architecture(config, source.label)
    return LockedSource(
        reference=written,
        kind=location.name,
        files=files,
        **location.pin._asdict(),
        **card_facts(source),
        model_type=model_type,
        architectures=architectures,
        side_files={path: _side_hashes(source, path) for path in source.sizes if is_side_file(path)},
        adapter_config=content_hashes(adapter_config) if adapter_config is not None else None,
    )


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
