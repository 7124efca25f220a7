"""Open and pin what a recipe names."""

from __future__ import annotations

from contextlib import closing

from hub_magmax.checkpoint import refuse_quantised, stated_architecture
from hub_magmax.errors import LockError
from hub_magmax.io.remote import HubSource, open_hub, resolve_commit
from hub_magmax.io.source import LocalSource, TensorSource
from hub_magmax.lockfile import LockedFile, LockedSource
from hub_magmax.recipe import Recipe
from hub_magmax.references import HubModel
from hub_magmax.sidefiles import content_hashes, is_side_file

CONFIG_NAME = "config.json"

#: What is looked at in a configuration; the largest known are some hundred kilobytes.
_MAX_CONFIG_BYTES = 10_000_000


def open_source(recipe: Recipe, locked: LockedSource) -> TensorSource:
    """Open a pinned checkpoint and check that it still is what was locked.

    Raises:
        LockError: If a weight file changed since.
    """
    source = _open(recipe, locked)
    try:
        _check_pinned(source, locked)
    except BaseException:
        source.close()
        raise
    return source


def _check_pinned(source: TensorSource, locked: LockedSource) -> None:
    found = {shard.file: (shard.size_bytes, shard.header_sha256) for shard in source.index.shards}
    pinned = {file.path: (file.size_bytes, file.header_sha256) for file in locked.files}
    if found != pinned:
        changed = sorted(path for path in found.keys() | pinned.keys() if found.get(path) != pinned.get(path))
        raise LockError(
            f"{', '.join(changed)} changed since the lock was written",
            where=source.label,
            hint="Run `hub-magmax lock` again if the change is meant.",
        )


def _open(recipe: Recipe, locked: LockedSource) -> TensorSource:
    if locked.repo_id and locked.commit:
        return open_hub(locked.repo_id, locked.commit)
    reference = recipe.reference(locked.reference)
    assert not isinstance(reference, HubModel)
    return LocalSource(reference.path, locked.reference)


def lock_source(recipe: Recipe, written: str) -> LockedSource:
    """Pin the checkpoint that the recipe calls `written`, from its headers alone.

    Raises:
        CheckpointError: If it is malformed, or quantised.
    """
    reference = recipe.reference(written)
    if isinstance(reference, HubModel):
        commit = resolve_commit(reference.repo_id, reference.revision)
        with closing(open_hub(reference.repo_id, commit)) as source:
            return _describe(written, source, reference.repo_id, commit)
    with closing(LocalSource(reference.path, written)) as source:
        return _describe(written, source, None, None)


def _describe(written: str, source: TensorSource, repo_id: str | None, commit: str | None) -> LockedSource:
    config_bytes = min(source.sizes.get(CONFIG_NAME, 0), _MAX_CONFIG_BYTES)
    config = source.read_bytes(CONFIG_NAME, 0, config_bytes) if config_bytes else None
    refuse_quantised(source.index, config)
    files = tuple(
        LockedFile(
            shard.file,
            shard.size_bytes,
            shard.header_sha256,
            source.sha256(shard.file) if isinstance(source, HubSource) else None,
        )
        for shard in source.index.shards
    )
    model_type, architectures = stated_architecture(config, source.label)
    return LockedSource(
        reference=written,
        kind="hub" if repo_id else "local",
        repo_id=repo_id,
        commit=commit,
        files=files,
        license=_card_license(source),
        model_type=model_type,
        architectures=architectures,
        side_files={path: _side_hashes(source, path) for path in source.sizes if is_side_file(path)},
    )


def _side_hashes(source: TensorSource, path: str) -> str:
    """Return hashes of a small file: those the Hub states, or its content's."""
    if isinstance(source, HubSource):
        return source.content_hashes(path)
    return content_hashes(source.read_bytes(path, 0, source.sizes[path]))


def _card_license(source: TensorSource) -> str | None:
    """Return the licence id in the source's own card; None where there is none to read."""
    import yaml

    if "README.md" not in source.sizes:
        return None
    text = source.read_bytes("README.md", 0, min(source.sizes["README.md"], 100_000)).decode(errors="replace")
    if not text.startswith("---"):
        return None
    try:
        # Texts only, no tags and no merge keys: a few lines of those can cost hours, or raise anything.
        front = yaml.load(text[3:].split("\n---", 1)[0], Loader=yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    license_id = front.get("license") if isinstance(front, dict) else None
    return license_id if isinstance(license_id, str) and license_id not in ("", "~", "null") else None
