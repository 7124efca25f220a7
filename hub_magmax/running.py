"""The whole recipe: lock, plan, merge, evaluate, card, push."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hub_magmax.cards import CARD_NAME, PICTURE_NAME, render_card
from hub_magmax.data import without_bars
from hub_magmax.distributed import Processes, find_processes
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation import (
    EVALUATORS,
    SCORES_NAME,
    ModelPlace,
    Scores,
    evaluate,
    load_evaluation_data,
    read_scores,
)
from hub_magmax.io.writer import PartialFolder, write_text
from hub_magmax.lockfile import Lock
from hub_magmax.locking import lock, plan
from hub_magmax.planning import Plan
from hub_magmax.preference.samples import Scorer
from hub_magmax.publishing import Published, prepare_repository, push
from hub_magmax.recipe import Data, Evaluation, Recipe
from hub_magmax.reports import MergeReport

if TYPE_CHECKING:
    from datasets import Dataset


ProgressBar = Callable[[int], AbstractContextManager[Callable[[int], None] | None]]


@dataclass(frozen=True)
class Run:
    """What running a recipe left behind."""

    plan: Plan
    report: MergeReport
    output: Path
    scores: Scores | None = None
    published: Published | None = None


def run(
    recipe: Recipe,
    *,
    locked: Lock | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: ProgressBar = lambda total: nullcontext(),
    processes: Processes | None = None,
) -> Run:
    """Carry out a recipe from its sources to the published model.

    Called again after an interruption it goes on where it stopped; what is finished is not
    done again. Under `accelerate launch` all processes merge, and the first one does the rest.

    Args:
        recipe: What to do.
        locked: Its lock; made now where it is not given.
        report: Called with a line of text at each step.
        progress: Called with the bytes to write; opens what is called with the bytes of each chunk.
        processes: Which of how many processes this is; found from the launcher by default.
    """
    processes = processes or find_processes()
    locked = locked or processes.first_decides(lambda: lock_with_holdout(recipe))
    planned = plan(recipe, locked)
    if processes.is_first and recipe.output.push_to_hub:
        prepare_repository(recipe.output.push_to_hub, private=recipe.output.private)
    if processes.is_first:
        load_evaluation_data(recipe)
    output = recipe.output_path
    from hub_magmax.merging import finished, merge  # loads torch

    if finished(PartialFolder(output, planned.digest)) is None:
        report(f"merging {len(planned.jobs)} tensors into {recipe.output.path}")
    with progress(planned.bytes_out) as advance:
        merged = merge(planned, output, progress=advance, processes=processes)
    if not processes.is_first:
        return Run(planned, merged, output)
    scores = _scores(recipe, locked, output, report) if recipe.evaluation else None
    write_card(recipe, locked, merged, scores, output)
    published = None
    if recipe.output.push_to_hub:
        report(f"pushing to {recipe.output.push_to_hub}")
        published = push(output, recipe.output.push_to_hub, private=recipe.output.private)
    return Run(planned, merged, output, scores, published)


def lock_with_holdout(recipe: Recipe) -> Lock:
    """Return the recipe's lock; where its preference asks for a hold-out, that is merged and scored."""
    return lock(recipe, scorer=holdout_scorer(recipe))


def holdout_scorer(recipe: Recipe) -> Scorer:
    """Return what merges `recipe` with any weights and scores the result on held-out examples.

    Every score is a merge into a temporary folder and an evaluation with the recipe's evaluator.
    """

    def on_examples(examples: Dataset, data: Data) -> Callable[[Mapping[str, float]], Sequence[float]]:
        spec = recipe.evaluation or Evaluation(tasks={})
        evaluator = EVALUATORS[spec.evaluator]

        def score(weights: Mapping[str, float]) -> Sequence[float]:
            from hub_magmax.merging import merge  # loads torch

            variant = recipe.updated(preference={"weights": dict(weights)})
            with TemporaryDirectory(prefix="hub_magmax_holdout_") as folder:
                merge(plan(variant, lock(variant)), Path(folder) / "model", processes=Processes())
                with without_bars():
                    model = evaluator.load(ModelPlace(str(Path(folder) / "model")))
                return evaluator.outcomes(model, examples, data, spec.batch_size)

        return score

    return on_examples


def _scores(recipe: Recipe, locked: Lock, output: Path, report: Callable[[str], None]) -> Scores:
    path = output / SCORES_NAME
    with suppress(EvaluationError):
        stored = read_scores(path)
        if recipe.evaluation and stored.evaluation_digest == recipe.evaluation.digest:
            return stored
    return evaluate(recipe, locked, output, report=report)


def write_card(
    recipe: Recipe, locked: Lock, merged: MergeReport, scores: Scores | None, output: Path
) -> Path:
    """Write the card into the output folder, and the scores with their picture where there are any."""
    picture = None
    if scores is not None:
        write_text(output / SCORES_NAME, scores.to_json())
        from hub_magmax.figures import draw_tradeoff

        draw_tradeoff(scores, locked.preference.weights, output / PICTURE_NAME)
        picture = PICTURE_NAME
    write_text(output / CARD_NAME, render_card(recipe, locked, merged, scores, picture=picture))
    return output / CARD_NAME
