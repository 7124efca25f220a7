"""Recipe and lock as the command line names them, and those of a merged model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hub_magmax.cli.options import RecipeOptions
from hub_magmax.cli.terminal import progress, say
from hub_magmax.errors import LockError, OutputError
from hub_magmax.files import check_files, from_here, write_text
from hub_magmax.recipe.loading import parse_text
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, read_lock
from hub_magmax.recipe.matching import SOURCES, changed_keys, check_lock, is_kept
from hub_magmax.recipe.result_files import ResultFiles, beside, changed_values
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.sites import check_site
from hub_magmax.text import listed

if TYPE_CHECKING:
    from hub_magmax.checkpoints.source_cache import SourceCache


def lock_beside(asked: RecipeOptions) -> Path | None:
    """Return the path of a recipe's lock: `mix.lock.json` for `mix.yaml`; a stream has none."""
    return None if asked.text.is_stream else beside(asked.named).path("lock.json")


def files_beside(asked: RecipeOptions, recipe: Recipe) -> ResultFiles:
    """Return where results of the recipe as it was asked for go, beside its file.

    Those of a stream go to the current folder, and hold a digest of the recipe: streams have no names.
    """
    written = parse_text(asked.text)
    named = f"stdin-{written.digest.removeprefix('sha256:')[:8]}.yaml"
    return beside(Path(named) if asked.text.is_stream else asked.named, written, recipe)


def lock_journal(asked: RecipeOptions, recipe: Recipe) -> Path:
    """Return where a lock that is being made keeps what it measures."""
    return files_beside(asked, recipe).path("lock.journal")


def checked_beside(asked: RecipeOptions, names: Iterable[str]) -> ResultFiles:
    """Return `files_beside`, and raise OutputError where files of these names have to go there and cannot.

    Where there is a merged model, `place_of_results` decides by the lock, and they may go into its folder.
    """
    recipe = read_recipe(asked)
    found = files_beside(asked, recipe)
    if not (recipe.output_path / LOCK_NAME).is_file():
        found.check(names)
    return found


def check_lock_path(path: Path) -> None:
    """Raise OutputError where a lock could not be written there, before it is made."""
    check_files([path], "Say where to write it: hub-magmax lock RECIPE --out FILE.")


def write_lock(locked: Lock, path: Path) -> Path:
    """Write a lock, and return its path."""
    write_text(path, locked.to_json())
    return path


def read_recipe(asked: RecipeOptions) -> Recipe:
    """Return the recipe with the command line's replacements; of a recipe with sites, the one that is named.

    Raises:
        RecipeError: If it is not valid, or has sites and none is named.
    """
    recipe = parse_text(asked.text, asked.changes)
    check_site(recipe.sites, None)
    return recipe


def read_asked(
    asked: RecipeOptions,
    decide: Callable[[Callable[[], Lock]], Lock] = lambda make: make(),
    prepare: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> tuple[Recipe, Lock | None]:
    """Return the recipe with the command line's replacements, and its lock, None where there is none.

    Where the recipe has other values than the lock, its lock is made anew, with the checkpoints that the old
    one pins. A lock that the command line names has to be the recipe's, unless other values are given too.

    Args:
        asked: The recipe, and its lock if it is not the one beside it.
        decide: Returns what a call gives, the same in all processes.
        prepare: Returns the recipe whose lock a verb needs, where that is made anew.

    Raises:
        RecipeError: If the recipe is not valid.
        LockError: If the lock cannot be read, or the one that is named was made from another recipe.
    """
    recipe = read_recipe(asked)
    earlier = earlier_lock(asked)
    changed = changed_keys(recipe, earlier) if earlier else []
    if earlier is None or not changed:
        return recipe, earlier
    if asked.lock_path and not _is_other_merge(asked, recipe):
        raise LockError(
            f"the recipe is not the one that this lock was made from: {', '.join(changed)}",
            where=str(asked.lock_path),
            expected=f"a lock of {asked.text.name}",
            hint="Name the recipe's own lock, or write it with `hub-magmax lock`. To keep the checkpoints of "
            "this one, copy it beside the recipe, as recipe.lock.json beside recipe.yaml.",
        )
    journal = lock_journal(asked, recipe)
    return recipe, decide(lambda: renewed(prepare(recipe), earlier, journal))


def read_locked(
    asked: RecipeOptions,
    decide: Callable[[Callable[[], Lock]], Lock] = lambda make: make(),
    cache: SourceCache | None = None,
) -> tuple[Recipe, Lock]:
    """Return the recipe and its lock as `read_asked`; where there is none, it is made now."""
    from hub_magmax.pipeline import lock

    recipe, locked = read_asked(asked, decide)
    journal = lock_journal(asked, recipe)
    make = partial(lock, recipe, report=say, progress=progress, cache=cache, journal=journal)
    return recipe, locked or decide(make)


def _is_other_merge(asked: RecipeOptions, recipe: Recipe) -> bool:
    """Say whether the command line changed a value on which a lock depends."""
    return not changed_values(parse_text(asked.text), recipe).keys() <= {"evaluation", "sweep"}


def earlier_lock(asked: RecipeOptions) -> Lock | None:
    """Return the lock that is there, whether it fits the recipe or not."""
    path = asked.lock_path or lock_beside(asked)
    return read_lock(path) if path and (asked.lock_path or path.is_file()) else None


def renewed(recipe: Recipe, earlier: Lock, journal: Path) -> Lock:
    """Return a lock of the recipe with the checkpoints that an earlier lock pins, and say what changed."""
    from hub_magmax.pipeline import lock

    made = lock(recipe, report=say, progress=progress, earlier=earlier, journal=journal)
    fresh = [name for name, source in made.every_source.items() if not is_kept(source, earlier)]
    kept = f"the lock's checkpoints stay{f', but {listed(fresh)}, pinned now' if fresh else ''}"
    anew = [key for key in changed_keys(recipe, earlier) if key != SOURCES]
    say(f"{kept}; resolved anew: {listed(anew)}" if anew else kept)
    return made


def read_merged(asked: RecipeOptions) -> tuple[Recipe, Lock]:
    """Return the recipe, and the lock that its merged model was made from.

    Raises:
        OutputError: If there is no merged model.
        RecipeError: If the recipe is not valid.
        LockError: If the model was merged from another recipe.
    """
    recipe = read_recipe(asked)
    path = recipe.output_path / LOCK_NAME
    if not path.is_file():
        raise OutputError(
            "there is no merged model yet",
            where=str(recipe.output_path),
            hint="Run `hub-magmax merge` first.",
        )
    lock = read_lock(path)
    check_lock(recipe, lock, str(path))
    return recipe, lock


def say_outdated(asked: RecipeOptions) -> None:
    """Say that scores beside a recipe are of before, once the model's own were measured again."""
    from hub_magmax.evaluation.scores import SCORES_NAME

    earlier = files_beside(asked, read_recipe(asked)).path(SCORES_NAME)
    if earlier.is_file():
        say(f"{from_here(earlier)} is of an earlier evaluation: the model's own scores are in its folder")


def linked_card(asked: RecipeOptions, place: ResultFiles) -> list[Path]:
    """Write the card beside results again, with its picture, where there is one, and return its path.

    A card that somebody edited stays.
    """
    from hub_magmax.reporting.card_file import CARD_NAME, write_stored_card

    if place.prefix or not place.path(CARD_NAME).is_file():
        return []
    return [write_stored_card(*read_merged(asked), keep_edited=True)]
