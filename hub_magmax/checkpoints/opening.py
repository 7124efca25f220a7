"""Open and pin what a recipe names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.adapter import config_of, parse_config, with_adapters
from hub_magmax.checkpoints.config import refuse_quantised, stated_architecture
from hub_magmax.checkpoints.hub import HubSource, open_hub, resolve_commit
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, is_adapter
from hub_magmax.checkpoints.local import LocalSource
from hub_magmax.checkpoints.side_files import content_hashes, is_side_file, same_content
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.vocabulary import TOKENIZER_NAME, read_vocabulary, with_token_rows
from hub_magmax.errors import CheckpointError, LockError
from hub_magmax.files import digest
from hub_magmax.recipe.lockfile import Lock, LockedFile, LockedSource
from hub_magmax.recipe.references import HubModel
from hub_magmax.recipe.schema import Recipe

CONFIG_NAME = "config.json"

#: Languages or data sets that are kept of a card.
_MAX_LISTED = 50

#: Checkpoints that are looked at side by side.
PARALLEL_SOURCES = 8

#: Bytes of a file that are hashed at a time.
_BLOCK_BYTES = 2**24

#: A file beside the weights; the largest known tokenizers are some 50 MB.
MAX_SMALL_FILE_BYTES = 500_000_000

#: What is looked at in a configuration; the largest known are some hundred kilobytes.
_MAX_CONFIG_BYTES = 10_000_000


class HubSources:
    """The repositories that one command reads: each is listed, and its headers are read, once.

    What is opened here can be closed and read again. Folders are opened anew each time, so that a change
    since is seen.
    """

    def __init__(self) -> None:
        self._opened: dict[tuple[str, str, str], TensorSource] = {}

    def open(self, repo_id: str, commit: str, part: str | None = None) -> TensorSource:
        """Return a repository at a commit, or a part of it."""
        key = repo_id, commit, part or ""
        if key not in self._opened:
            self._opened[key] = open_hub(*key)
        return self._opened[key]

    def look_at(self, sources: Iterable[LockedSource]) -> None:
        """Read the headers of pinned repositories, several at a time: most of it is waiting."""
        places = dict.fromkeys((s.repo_id, s.commit, s.part) for s in sources if s.repo_id and s.commit)
        with ThreadPoolExecutor(PARALLEL_SOURCES) as pool:
            for _ in pool.map(lambda place: self.open(str(place[0]), str(place[1]), place[2]).index, places):
                pass


def open_source(recipe: Recipe, locked: LockedSource, hub: HubSources | None = None) -> TensorSource:
    """Open a pinned checkpoint and check that it still is what was locked.

    Args:
        recipe: Says where relative paths start.
        locked: What to open.
        hub: Repositories that are open already, and where new ones are kept.

    Raises:
        LockError: If a weight file changed since.
    """
    source = _open(recipe, locked, hub or HubSources())
    try:
        _check_pinned(source, locked)
    except BaseException:
        source.close()
        raise
    return source


@contextmanager
def open_checkpoints(
    recipe: Recipe, lock: Lock, hub: HubSources | None = None
) -> Iterator[dict[str, TensorSource]]:
    """Open what a lock pins, by name, as `as_checkpoints` gives them."""
    with _opened(recipe, lock, hub) as opened:
        yield as_checkpoints(recipe, lock, opened)


@contextmanager
def open_inputs(
    recipe: Recipe, lock: Lock, hub: HubSources | None = None
) -> Iterator[dict[str, TensorSource]]:
    """Open what the output is made from: checkpoints, or for an adapter the adapters as they are stored."""
    with _opened(recipe, lock, hub) as opened:
        yield opened if recipe.output.is_adapter else as_checkpoints(recipe, lock, opened)


@contextmanager
def _opened(recipe: Recipe, lock: Lock, hub: HubSources | None) -> Iterator[dict[str, TensorSource]]:
    hub = hub or HubSources()
    hub.look_at(lock.sources.values())
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(closing(open_source(recipe, locked, hub)))
            for name, locked in lock.sources.items()
        }


def open_model(model: str, revision: str | None) -> TensorSource:
    """Open a merged folder, or a repository at a revision (None: the default branch)."""
    if Path(model).is_dir():
        return LocalSource(Path(model), model)
    return open_hub(model, resolve_commit(model, revision))


def as_checkpoints(recipe: Recipe, lock: Lock, opened: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Return adapters as the checkpoints that they stand for, and all with the rows of one vocabulary."""
    whole = with_adapters(opened, in_sequence=lock.adapters == "sequence")
    if not lock.token_rows:
        return whole
    vocabularies = {
        name: read_vocabulary(
            read_side_file(source, TOKENIZER_NAME, lock.sources[name]), f"{source.label}, {TOKENIZER_NAME}"
        )
        if TOKENIZER_NAME in source.sizes
        else None
        for name, source in opened.items()
    }
    return with_token_rows(whole, vocabularies, recipe.output.files_from, lock.token_rows)


def _check_pinned(source: TensorSource, locked: LockedSource) -> None:
    found = {shard.file: (shard.size_bytes, shard.header_sha256) for shard in source.index.shards}
    pinned = {file.path: (file.size_bytes, file.header_sha256) for file in locked.files}
    if found != pinned:
        changed = sorted(path for path in found.keys() | pinned.keys() if found.get(path) != pinned.get(path))
        raise _changed(source.label, changed)
    if locked.adapter_config and not same_content(locked.adapter_config, content_hashes(config_of(source))):
        raise _changed(source.label, [ADAPTER_CONFIG_NAME])


def check_side_files(source: TensorSource, locked: LockedSource) -> None:
    """Raise LockError if the files beside the weights are no longer those that were locked.

    A commit on the Hub pins them, so only a folder is looked at. A lock of an earlier version names none.
    """
    if locked.repo_id or not locked.side_files:
        return
    found = {path: _side_hashes(source, path) for path in source.sizes if is_side_file(path)}
    paths = found.keys() | locked.side_files.keys()
    changed = sorted(path for path in paths if found.get(path) != locked.side_files.get(path))
    if changed:
        raise _changed(source.label, changed)


def read_small_file(source: TensorSource, path: str) -> bytes:
    """Return the content of a file that is held in memory whole, and may not be of any size.

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
    """Return the content of a file beside the weights, which is what was locked.

    Raises:
        LockError: If it is not.
    """
    content = read_small_file(source, path)
    pinned = locked.side_files.get(path)
    if pinned is not None and same_content(pinned, content_hashes(content)) is False:
        raise _changed(source.label, [path])
    return content


def check_hashes(recipe: Recipe, lock: Lock) -> None:
    """Read the weight files of folders whose sha256 is locked, and compare; others cost nothing.

    Raises:
        LockError: If one differs: the weights changed under an unchanged header.
    """
    for locked in lock.sources.values():
        hashed = {file.path: file.sha256 for file in locked.files if file.sha256 and not locked.repo_id}
        if not hashed:
            continue
        with closing(open_source(recipe, locked)) as source:
            changed = [path for path, sha256 in hashed.items() if file_sha256(source, path) != sha256]
        if changed:
            raise _changed(source.label, changed)


def versions_of(recipe: Recipe, lock: Lock) -> str:
    """Return a digest of how the weight files of folders are now: device, inode, size, time of change.

    A lock does not see weights that changed under the same header; what is half made from them must not be
    completed from others.
    """
    found = {}
    for name, locked in lock.sources.items():
        if not locked.repo_id:
            with closing(open_source(recipe, locked)) as source:
                assert isinstance(source, LocalSource), "it has no repository"
                found[name] = {file.path: source.version(file.path) for file in locked.files}
    return digest(found)


def _changed(label: str, paths: list[str]) -> LockError:
    return LockError(
        f"{', '.join(paths)} changed since the lock was written",
        where=label,
        hint="Run `hub-magmax lock` again if the change is meant.",
    )


def file_sha256(source: TensorSource, path: str) -> str:
    """Return the sha256 of a file: as the Hub states it for large ones, else from its content."""
    if isinstance(source, HubSource) and (stated := source.sha256(path)):
        return stated
    digest, size = hashlib.sha256(), source.sizes[path]
    for start in range(0, size, _BLOCK_BYTES):
        digest.update(source.read_bytes(path, start, min(start + _BLOCK_BYTES, size)))
    return digest.hexdigest()


def _open(recipe: Recipe, locked: LockedSource, hub: HubSources) -> TensorSource:
    if locked.repo_id and locked.commit:
        return hub.open(locked.repo_id, locked.commit, locked.part)
    reference = recipe.reference(locked.reference)
    assert not isinstance(reference, HubModel)
    return LocalSource(reference.path, locked.reference, reference.part)


def lock_source(
    recipe: Recipe, written: str, *, hash_files: bool = False, hub: HubSources | None = None
) -> LockedSource:
    """Pin the checkpoint that the recipe calls `written`, from its headers alone.

    Args:
        recipe: Says where relative paths start.
        written: A folder, or a name on the Hub.
        hash_files: Read a folder's weight files whole for their sha256; the Hub states it.
        hub: Repositories that are open already, and where new ones are kept.

    Raises:
        CheckpointError: If it is malformed, or quantised.
    """
    reference = recipe.reference(written)
    if isinstance(reference, HubModel):
        commit, hub = resolve_commit(reference.repo_id, reference.revision), hub or HubSources()
        with closing(hub.open(reference.repo_id, commit, reference.part)) as source:
            found = _describe(written, source, (reference.repo_id, commit), hash_files)
        if reference.part:  # the card of a repository lies at its top
            found = replace(found, **_card_facts(hub.open(reference.repo_id, commit)))
    else:
        with closing(LocalSource(reference.path, written, reference.part)) as source:
            found = _describe(written, source, (None, None), hash_files)
    return replace(found, part=reference.part or None)


def _describe(
    written: str, source: TensorSource, place: tuple[str | None, str | None], hash_files: bool
) -> LockedSource:
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
            _pinned_sha256(source, shard.file, hash_files),
        )
        for shard in source.index.shards
    )
    model_type, architectures = stated_architecture(config, source.label)
    return LockedSource(
        reference=written,
        kind="hub" if place[0] else "local",
        repo_id=place[0],
        commit=place[1],
        files=files,
        **_card_facts(source),
        model_type=model_type,
        architectures=architectures,
        side_files={path: _side_hashes(source, path) for path in source.sizes if is_side_file(path)},
        adapter_config=content_hashes(adapter_config) if adapter_config is not None else None,
    )


def _pinned_sha256(source: TensorSource, path: str, hash_files: bool) -> str | None:
    if isinstance(source, HubSource):
        return source.sha256(path)
    return file_sha256(source, path) if hash_files else None


def _side_hashes(source: TensorSource, path: str) -> str:
    """Return hashes of a small file: those the Hub states, or its content's."""
    if isinstance(source, HubSource):
        return source.content_hashes(path)
    return content_hashes(read_small_file(source, path))


def _card_facts(source: TensorSource) -> dict[str, Any]:
    """Return what the source's own card states, by name; None where it does not."""
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
