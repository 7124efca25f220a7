"""The target sample in two parts: examples for the estimate, and held-out examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hub_magmax.evaluation.data import load_examples
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.preference.safeguards import NUM_CHECKED, ScoreOf, check_sample_size, draw
from hub_magmax.recipe.preferences import Estimate
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset

#: Given examples, how they were named and how many weights are tried at most, returns what merges and scores.
Scorer = Callable[["Dataset", Data, int], ScoreOf]


@dataclass(frozen=True)
class Target:
    """The target sample in two parts.

    Attributes:
        drawn: All examples that are used, in the order of the data.
        estimation: Those that estimate the preference.
        holdout: Those that check it, or None.
    """

    drawn: Dataset
    estimation: Dataset
    holdout: Dataset | None

    def score(self, scorer: Scorer | None, data: Data) -> ScoreOf | None:
        """Return what scores weights on the held-out part, where there is one and a way to do it."""
        return scorer(self.holdout, data, NUM_CHECKED) if scorer and self.holdout is not None else None


def split_target(
    spec: Estimate, recipe: Recipe, where: str, *, labelled: bool = False, limit: int | None = None
) -> Target:
    """Load the target sample, draw at most `limit` examples, and hold back the share that `spec` says.

    Both draws depend on the recipe's seed and the number of examples alone.

    Raises:
        EvaluationError: If the data cannot be loaded, or a part is too small to say anything.
    """
    with about_data(recipe, spec.target):
        examples = load_examples(spec.target, recipe.folder, labelled=labelled or spec.holdout is not None)
    drawn = examples.select(draw(len(examples), limit or len(examples), recipe.seed, "target"))
    if spec.holdout is None:
        check_sample_size(len(drawn), f"{where}.target")
        return Target(drawn, drawn, None)
    chosen = set(draw(len(drawn), round(spec.holdout.share * len(drawn)), recipe.seed, "holdout"))
    rest = [index for index in range(len(drawn)) if index not in chosen]
    check_sample_size(len(chosen), f"{where}.holdout")
    check_sample_size(len(rest), f"{where}.target, without what is held out")
    return Target(drawn, drawn.select(rest), drawn.select(sorted(chosen)))
