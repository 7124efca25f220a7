"""Data sets on the Hub: the commits they stand for, and examples at exactly these.

Where the Hub fails, `datasets` takes the newest copy that it has prepared, of whichever commit. Here that is
an error, and what can pass is asked for again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import EvaluationError
from hub_magmax.hub import TIMEOUT_SECONDS, hub_api, hub_errors, is_offline, is_passing, retry
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset

#: Files that say how a data set is read, which `datasets` takes as missing while the Hub fails.
_ABOUT_DATA = ("README.md", ".huggingface.yaml", "dataset_infos.json")


#: One thread at a time changes `datasets`, and each finds it as it was.
_CHANGING = RLock()


def commit_of(spec: Data) -> str:
    """Return the commit that a data set on the Hub stands for now.

    Raises:
        EvaluationError: If the Hub has no such data set, or does not show it.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import httpx

    try:
        return str(_info(spec).sha)
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise EvaluationError(
            f"the data set cannot be reached ({type(error).__name__}: {reason})",
            where=f"{spec.dataset}, revision {spec.revision or 'main'}",
            expected="a folder or file beside the recipe, or a data set on the Hub",
            hint="Check the name and, for a private or gated data set, your login: hf auth whoami",
        ) from error


def _info(spec: Data) -> Any:
    api = hub_api()
    return retry(lambda: api.dataset_info(spec.dataset, revision=spec.revision, timeout=TIMEOUT_SECONDS))


def load_from_hub(spec: Data) -> Dataset:
    """Return the examples of a data set on the Hub, at the commit of its revision.

    Offline these are examples that `datasets` has prepared.

    Raises:
        SourceError: If the Hub does not answer.
        EvaluationError: If offline there are examples of another commit only.
    """
    from datasets import load_dataset

    if is_offline():
        return _prepared(spec)
    with hub_errors(f"{spec.dataset}, revision {spec.revision or 'main'}"):
        info = _info(spec)
        there = {file.rfilename for file in info.siblings or []}
        for path in there.intersection(_ABOUT_DATA):
            _download(spec.dataset, path, info.sha)
    with without_prepared_copies():
        return retry(
            lambda: load_dataset(spec.dataset, spec.config, split=spec.split, revision=info.sha), _may_pass
        )


def _download(name: str, path: str, commit: str) -> None:
    retry(lambda: hub_api().hf_hub_download(name, path, revision=commit, repo_type="dataset"))


def _may_pass(error: Exception) -> bool:
    return is_passing(error) or isinstance(error, ConnectionError)


def _prepared(spec: Data) -> Dataset:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(spec.dataset, spec.config)
    wanted = spec.revision or ""
    if len(wanted) == 40 and builder.hash != wanted:
        raise EvaluationError(
            f"offline, and the newest copy that `datasets` has prepared is of the commit {builder.hash}",
            where=f"{spec.dataset}, revision {wanted}",
            expected="a copy of the pinned commit",
            hint="Run the same command once with the Hub, without HF_HUB_OFFLINE.",
        )
    builder.download_and_prepare()
    return builder.as_dataset(split=spec.split)


@contextmanager
def without_prepared_copies() -> Iterator[None]:
    """Let `datasets.load_dataset` raise what went wrong, in place of taking what it has prepared before.

    It has no option for that. Offline everything stays as it is. Other threads wait here meanwhile.
    """
    from datasets import load

    def refuse(name: str, cache_dir: str | None = None) -> Any:
        raise FileNotFoundError(name)  # it then raises the error of the Hub

    with _CHANGING:
        usual = load.CachedDatasetModuleFactory
        load.CachedDatasetModuleFactory = usual if is_offline() else refuse
        try:
            yield
        finally:
            load.CachedDatasetModuleFactory = usual
