"""Errors about repositories whose names were meant for folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hub_magmax.errors import EvaluationError, HubSettingError, PublishError, SourceError
from hub_magmax.files import from_here
from hub_magmax.recipe.model_names import expanded, is_folder, is_there, missing_folder, relative_path


@contextmanager
def taken_for_repository(written: str, folder: Path | None = None) -> Iterator[None]:
    """Add to errors about the Hub meanwhile which folder of that name there is, or where none was found.

    Args:
        written: Name of a model or of a data set that was taken for one on the Hub.
        folder: Where a folder was looked for, as relative paths start there; None where only a repository
            can be meant.
    """
    try:
        yield
    except HubSettingError:  # of all that is on the Hub
        raise
    except (SourceError, PublishError, EvaluationError) as error:
        if "://" in written or (folder is not None and is_there(folder / expanded(written))):
            raise
        is_known = type(error.__cause__).__name__ in ("GatedRepoError", "RevisionNotFoundError")
        is_elsewhere = is_folder(Path(written).absolute())
        if folder and not is_known and not is_elsewhere and (meant := missing_folder(written, folder)):
            what = f"there is no such folder; as a repository: {error.what}"
            hint = f"{meant} {error.hint}".strip()
            raise type(error)(what, where=written, hint=hint) from error.__cause__
        error.add_hint(_folder_of_name(written, folder, is_known=is_known))
        raise


def _folder_of_name(written: str, folder: Path | None, *, is_known: bool) -> str:
    """Return a sentence about a folder of a repository's name; empty where there is no more to say.

    Args:
        written, folder: As above.
        is_known: There is a repository of this name.
    """
    here = Path(written).absolute()
    if is_folder(here):
        if folder is None:
            return f"{written} is a folder here, but only repositories on the Hub are read."
        start, meant = folder.absolute(), relative_path(str(here), folder)
        return f"There is a folder {here}, but relative paths start at {start}: write {meant} for it."
    if folder is None or is_known or "@" in written:
        return ""
    return f"There is no folder {from_here(folder / written)} either."
