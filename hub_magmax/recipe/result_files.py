"""Names of the files that are written for a recipe, beside it or beside its merged model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hub_magmax.errors import LockError, RecipeError
from hub_magmax.files import check_files, digest
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, read_lock
from hub_magmax.recipe.matching import check_lock
from hub_magmax.recipe.schema import RECIPE_NAME, Recipe

#: Ending of a recipe that the names of its files leave out. Any other one stays in them, so that no two
#: recipes of a folder share a name.
_ENDING = ".yaml"

#: Keys that say where and how a merge is written, and nothing about results.
_ASIDE = ("output",)

#: What to do where a folder of results cannot be written.
_ELSEWHERE = (
    "Check its permissions, or copy the recipe into a folder of yours: results go beside it, and relative "
    "paths in it start there, so mend these."
)

#: Hexadecimal digits that tell one set of changed values from another.
_NUM_DIGITS = 8


@dataclass(frozen=True)
class ResultFiles:
    """Place of results: a folder, and the beginning of every name in it.

    Beside a recipe names begin with the recipe's name; in the folder of a merged model, which has one
    recipe, with nothing.
    """

    folder: Path
    prefix: str = ""

    def path(self, name: str) -> Path:
        """Return the path of one file, such as `mix.tradeoffs.csv` for `tradeoffs.csv`."""
        return self.folder / (self.prefix + name)

    def check(self, names: Iterable[str]) -> None:
        """Raise OutputError where files of these names could not be written; pictures are two files each.

        Called before the work whose results they get.
        """
        paths = (self.path(name) for name in names)
        every = [
            file for path in paths for file in (picture_paths(path) if path.suffix == ".png" else [path])
        ]
        check_files(every, _ELSEWHERE)


def picture_paths(path: Path) -> tuple[Path, Path]:
    """Return the files of a picture: the PNG at `path`, and an SVG beside it."""
    return path, path.with_suffix(".svg")


def beside(path: Path, written: Recipe | None = None, asked: Recipe | None = None) -> ResultFiles:
    """Return where the results of the recipe in `path` go: `mix.tradeoffs.csv` for `mix.yaml`.

    Results of a recipe with other values than its file has must not replace those of the file: their names
    also hold a digest of these values, such as `mix.set-1f0c93ab.tradeoffs.csv`.

    Args:
        path: The recipe's file.
        written: The recipe as the file has it.
        asked: The recipe with the values to use instead.
    """
    name = path.name.removesuffix(_ENDING) if path.suffix else f"{path.name}."
    changed = changed_values(written, asked) if written and asked else {}
    if changed:
        name += f".set-{digest(changed).removeprefix('sha256:')[:_NUM_DIGITS]}"
    return ResultFiles(path.parent, f"{name}.")


def place_of_results(recipe: Recipe, locked: Lock, beside: ResultFiles) -> ResultFiles:
    """Return where to write what was found out about a recipe: with its merged model, or else beside it.

    A merged model has the results of its own recipe and its own checkpoints only: those of another recipe
    with the same output, such as one with another evaluation, or of checkpoints that were pinned again, go
    to `beside`.
    """
    with suppress(LockError, RecipeError):
        kept = read_lock(recipe.output_path / LOCK_NAME)
        check_lock(recipe, kept, LOCK_NAME)
        if kept.sources == locked.sources and is_stored(recipe):
            return ResultFiles(recipe.output_path)
    return beside


def is_stored(recipe: Recipe) -> bool:
    """Say whether the recipe is that of the merged model in its output folder, but for the output.

    Raises:
        RecipeError: If the stored one cannot be read.
    """
    return not changed_values(stored_recipe(recipe), recipe.portable)


def stored_recipe(recipe: Recipe) -> Recipe:
    """Return the own recipe of the merged model in the output folder; relative paths start as in `recipe`.

    Raises:
        RecipeError: If it cannot be read.
    """
    return load_recipe(recipe.output_path / RECIPE_NAME, folder=recipe.folder)


def place_of_scores(recipe: Recipe, beside: ResultFiles) -> ResultFiles:
    """Return where to write scores of a merged model: into its folder, or beside the recipe.

    A model has the scores of the evaluation that its own recipe names, by the same evaluator on the same
    examples; those of another one go to `beside`.

    Raises:
        RecipeError: If the model's own recipe cannot be read.
    """
    own, asked = stored_recipe(recipe).evaluation, recipe.evaluation
    is_other = own is not None and asked is not None and _measured(own) != _measured(asked)
    return beside if is_other else ResultFiles(recipe.output_path)


def _measured(evaluation: Evaluation) -> tuple[object, ...]:
    """Return what is measured: not how fast, nor on which models."""
    return evaluation.evaluator, evaluation.tasks, evaluation.guard


def changed_values(written: Recipe, asked: Recipe) -> dict[str, object]:
    """Return the values of `asked` that are others in `written`, by top-level key, but for the output."""
    before, after = written.to_dict(), asked.to_dict()
    keys = sorted({*before, *after} - {*_ASIDE})
    return {key: after.get(key) for key in keys if before.get(key) != after.get(key)}
