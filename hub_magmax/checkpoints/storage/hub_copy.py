"""Models of the Hub copied into the local cache, whole, before a library loads them from there.

A library that loads from the Hub itself takes a file that it could not get as missing, or an older one from
the cache. From a folder it can do neither.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hub_magmax.checkpoints.index import ROUTER_NAME, ROUTER_WEIGHTS_NAME
from hub_magmax.checkpoints.listing import split_part
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.checkpoints.needed_files import needed_files
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.checkpoints.storage.hub import open_hub, resolve_commit
from hub_magmax.checkpoints.weight_files import weight_map
from hub_magmax.errors import SourceError
from hub_magmax.hub import hub_api, hub_errors, is_offline, is_passing, retry
from hub_magmax.recipe.lockfile import LOCK_NAME, LockedSource
from hub_magmax.recipe.schema import RECIPE_NAME
from hub_magmax.text import step

#: Files that no library loads: the card, for the licence of a merge offline, and for records of decisions
#: recipe, lock and router.
_TOLD_OF = ("README.md", RECIPE_NAME, LOCK_NAME, ROUTER_NAME, ROUTER_WEIGHTS_NAME)

#: Files that are downloaded side by side.
_PARALLEL_DOWNLOADS = 4


def bytes_to_copy(source: LockedSource) -> int:
    """Return the bytes of a pinned checkpoint's weights that a copy has to download."""
    from huggingface_hub import try_to_load_from_cache

    repo, commit = source.repo_id, source.commit
    if not repo or not commit:
        return 0
    return sum(
        file.size_bytes
        for file in source.files
        if not isinstance(try_to_load_from_cache(repo, file.path, revision=commit), str)
    )


def copied_from_hub(place: ModelPlace) -> ModelPlace:
    """Return where a model lies on this machine, after its files were downloaded where they are missing.

    Offline the place stays what it is: libraries then read the local cache.

    Raises:
        SourceError: If a file of the model cannot be downloaded.
    """
    if is_offline() or (place.revision is None and Path(place.name).is_dir()):
        return place
    commit = resolve_commit(place.name, place.revision)
    source = open_hub(place.name, commit, place.part)
    folder = split_part(place.part)[0]
    names = [f"{folder}/{path}" if folder else path for path in _loaded_files(source)]
    with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
        copies = list(pool.map(lambda name: _download(place.name, commit, name), names))
    return ModelPlace(str(copies[0].parents[names[0].count("/")]), part=place.part)


def _loaded_files(source: FileSource) -> list[str]:
    """Return the files that loading the model reads, its indexes, and what is told of it."""
    beside = [p for p in source.sizes if p in _TOLD_OF or p.endswith(".safetensors.index.json")]
    return [*dict.fromkeys([*needed_files(source), *beside, *weight_map(source.listing)])]


def _download(repo_id: str, commit: str, path: str) -> Path:
    """Return the file in the local cache; huggingface_hub repeats most requests itself."""
    where = f"{repo_id}@{commit[:7]}, {path}"
    with hub_errors(where), step(f"downloading {where}"):
        try:
            return Path(retry(lambda: hub_api().hf_hub_download(repo_id, path, revision=commit), _may_pass))
        except RuntimeError as error:  # of hf_xet
            raise SourceError(
                f"the download failed ({' '.join(str(error).split())[:200]})",
                where=where,
                hint="Check the connection and the room in HF_HOME, then run the same command again.",
            ) from error


def _may_pass(error: Exception) -> bool:
    return is_passing(error) or isinstance(error, RuntimeError)
