"""Model card: measured facts as text.

Everything a card says comes from the recipe, its lock, the report of the merge and the scores;
what was not measured is shown as such. Text that other people wrote is shown as code (see
`text.Markdown`), and nothing that belongs to one machine alone appears.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hub_magmax import methods
from hub_magmax.evaluation.blind_spots import BlindSpots
from hub_magmax.evaluation.guards import check_guards
from hub_magmax.evaluation.intervals import NUM_RESAMPLES
from hub_magmax.evaluation.scores import MERGED, OUTCOMES_NAME, SCORES_NAME, Score, Scores, quantized_name
from hub_magmax.evaluation.tails import LEVELS, MIN_TAIL_EXAMPLES, ExampleLoss, example_loss
from hub_magmax.evaluation.tradeoff import Tradeoff, best_single, task_tradeoffs, weighted_mean
from hub_magmax.merging.output.provenance import PROVENANCE_NAME
from hub_magmax.merging.output.report import REPORT_NAME, MergeReport
from hub_magmax.planning.findings.faults import THRESHOLDS
from hub_magmax.planning.layers import layer_rows
from hub_magmax.planning.norms import norm_rows
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.loading import RecipeLike, as_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, LockLike, as_lock
from hub_magmax.recipe.schema import RECIPE_NAME, Recipe
from hub_magmax.registry import METHODS
from hub_magmax.reporting.card_rows import (
    MAX_FOLDED,
    MAX_OPEN,
    asked,
    by_preference,
    cut_texts,
    measured_on,
    telling,
    told_correction,
    told_rules,
)
from hub_magmax.reporting.card_template import TEMPLATE_NAME, environment
from hub_magmax.reporting.diagnosis import HEAT_MAP_NAME, Diagnosis, verdict
from hub_magmax.reporting.front_matter import front_matter, model_name
from hub_magmax.reporting.headline import made_line, model_line, result_line
from hub_magmax.reporting.licence import combined_license
from hub_magmax.reporting.model_kind import ModelFiles, ModelKind, kind_of, locked_files
from hub_magmax.reporting.router_report import RouterReport
from hub_magmax.reporting.score_formats import unit_of
from hub_magmax.reporting.tradeoff_surface import EXPLORER_NAME
from hub_magmax.reporting.usage import checks, loading, recipe_text, recipe_values
from hub_magmax.text import Markdown, code, publishable, publishable_values


@dataclass(frozen=True)
class Beside:
    """Files beside a card.

    Attributes:
        explorer: Whether there is a page to explore other preferences with.
        diagnosis: Of the checkpoints, together with its heat map.
        files: Of the model, by which its kind is known; by default those that the lock tells.
        signature: Whether there is a signature.
        router: What a router between the model and its tasks' checkpoints is worth.
        other_scores: Of other evaluations than the recipe's own, by the recipes that name them.
        blind_spots: Items that samples of the models never solve.
        judgement: Whether there is a page of the merge's success, by these scores.
    """

    explorer: bool = False
    diagnosis: Diagnosis | None = None
    files: ModelFiles | None = None
    signature: bool = False
    router: RouterReport | None = None
    other_scores: Mapping[str, Scores] = field(default_factory=dict, hash=False)
    blind_spots: BlindSpots | None = None
    judgement: bool = False


NOTHING = Beside()

#: Page beside the card, of a merge's success.
JUDGEMENT_NAME = "judgement.html"

#: Tasks of a recipe that a card shows; a longer one is only linked.
_MAX_TASKS = 40


@checked
def render_card(
    recipe: RecipeLike,
    lock: LockLike,
    report: MergeReport,
    scores: Scores | None = None,
    *,
    picture: str | None = None,
    beside: Beside = NOTHING,
    repo_id: str | None = None,
) -> str:
    """Return the whole README.md of a merged model.

    Args:
        recipe: What was asked for.
        lock: What it stood for.
        report: What the merge did.
        scores: What was measured; None says that nothing was.
        picture: Name of a picture beside the card, as `figures.draw_tradeoff` writes it.
        beside: What else lies in the folder and is linked or told.
        repo_id: Repository the card is for, where the recipe names none or another one.

    Raises:
        RecipeError: If the locked method is not installed here.
    """
    recipe, lock = as_recipe(recipe), as_lock(lock)
    method = methods.get_method(lock.method["name"])
    named = recipe
    if repo_id is not None:
        output = recipe.output.model_copy(update={"push_to_hub": repo_id})
        named = recipe.model_copy(update={"output": output})
    kind = _kind(recipe, lock, scores, beside)
    shares = lock.preference.shares
    unit = unit_of(scores)
    is_copied = bool(lock.layers) and not report.elements_merged
    facts = {
        "title": model_name(named),
        "model_line": model_line(kind, report, form=recipe.output.format),
        "made_line": made_line(lock, shares, ignored=not method.uses_preference, is_copied=is_copied),
        "result_line": result_line(scores, lock),
        "recipe": recipe,
        "lock": lock,
        "report": report,
        "method": method,
        "summary": Markdown(method.summary) if method.name in METHODS.built_in else method.summary,
        "options": {key: value for key, value in lock.method.items() if key not in ("name", "scaling")},
        "rules": told_rules(lock),
        "norms": norm_rows(lock),
        "correction": Markdown(told_correction(lock)),
        "paper": _arxiv_number(method.source),
        "bibtex": None if is_copied else method.paper and method.paper.bibtex,
        "layers": [*layer_rows(lock)],
        "is_copied": is_copied,
        "loading": loading(named, lock, kind, [shard.file for shard in report.shards]),
        "checks": checks(named, lock, is_scored=scores is not None, is_signed=beside.signature),
    }
    facts |= _published(named, recipe, lock, kind, scores, is_copied=is_copied)
    facts |= _measured(recipe, lock, scores, by_preference(task_tradeoffs(scores, shares)))
    facts |= _linked(beside, picture) | {"unit": unit, "max_open": MAX_OPEN, "max_folded": MAX_FOLDED}
    text: str = environment(unit).get_template(TEMPLATE_NAME).render(facts)
    return text.rstrip() + "\n"


def _kind(recipe: Recipe, lock: Lock, scores: Scores | None, beside: Beside) -> ModelKind:
    """Return the kind of the model: of an adapter its base model's, of a selection that of its weights."""
    evaluated = scores.pipeline_tag if scores else ""
    if recipe.output.is_adapter:
        return kind_of(locked_files(lock.base_model), evaluated)
    files = None if recipe.output.is_selection else beside.files  # beside which no model lies
    return kind_of(files or locked_files(lock.sources[recipe.output.files_from]), evaluated)


def _published(
    named: Recipe,
    recipe: Recipe,
    lock: Lock,
    kind: ModelKind,
    scores: Scores | None,
    *,
    is_copied: bool,
) -> dict[str, Any]:
    """Return front matter, licence, recipe and links to files, without tokens and paths of this machine."""
    license_ = combined_license(
        [source.license and publishable(source.license) for source in lock.every_source.values()],
        recipe.output.license and publishable(recipe.output.license),
    )
    values = recipe_values(recipe)
    return {
        "front_matter": Markdown(front_matter(named, lock, kind, scores, license_, is_copied=is_copied)),
        "license": license_,
        "shortened": publishable_values(values) != values,
        "recipe_text": recipe_text(publishable_values(values)) if len(recipe.tasks) <= _MAX_TASKS else None,
        "files": [Markdown(f"[{name}]({name})") for name in _files(scores)],
    }


def _files(scores: Scores | None) -> tuple[str, ...]:
    """Return the files beside a card that hold what it was made from."""
    measured = (SCORES_NAME, OUTCOMES_NAME) if scores else ()
    return (RECIPE_NAME, LOCK_NAME, REPORT_NAME, PROVENANCE_NAME, *measured)


def _measured(recipe: Recipe, lock: Lock, scores: Scores | None, rows: Sequence[Tradeoff]) -> dict[str, Any]:
    """Return scores, their differences, guards and per-example losses."""
    data = measured_on(scores, lock, [row.task for row in rows])
    return {
        "scores": scores,
        "rows": rows,
        "telling": telling(rows),
        "data": data,
        "asked": asked(data, lock),
        "cut": cut_texts(scores),
        "num_resamples": NUM_RESAMPLES,
        "paired": any(row.own_difference or row.base_difference for row in rows),
        "weighted": _weighted(rows, scores),
        "guards": check_guards(recipe.evaluation, scores),
        "levels": LEVELS,
        "min_tail": MIN_TAIL_EXAMPLES,
        "losses": _some(example_loss(row.own, row.merged) for row in rows),
        "rounded": _rounded(scores, rows),
        "quantized": _quantized(scores, rows),
        "unmeasured": {row.task: Markdown(_unmeasured(row)) for row in rows if _unmeasured(row)},
    }


def _linked(beside: Beside, picture: str | None) -> dict[str, Any]:
    """Return the links to files beside the card, the diagnosis of the checkpoints, and a router's worth."""
    return {
        "picture": Markdown(quote(Path(picture).name)) if picture else None,
        "explorer": Markdown(EXPLORER_NAME) if beside.explorer else None,
        "judgement": Markdown(JUDGEMENT_NAME) if beside.judgement else None,
        "other_scores": {
            name: Markdown(others.table("markdown")) for name, others in beside.other_scores.items()
        },
        "diagnosis": beside.diagnosis,
        "verdict": _verdict(beside.diagnosis),
        "pairs": _pairs(beside.diagnosis),
        "thresholds": THRESHOLDS,
        "heat_map": Markdown(HEAT_MAP_NAME),
        "router": beside.router,
        "blind_spots": beside.blind_spots and Markdown(beside.blind_spots.table("markdown")),
        "routes": beside.router and Markdown(beside.router.references().write("markdown")),
    }


def _verdict(found: Diagnosis | None) -> Markdown | None:
    """Return whether the checkpoints were fit to be merged, with the names of unfit ones."""
    if found is None:
        return None
    return Markdown(verdict([code(task) for task in found.suspects], notes=bool(found.findings)))


def _pairs(found: Diagnosis | None) -> Markdown | None:
    """Return the table of metrics of pairs, where they were measured."""
    if found is None or found.metrics is None:
        return None
    return Markdown(found.metrics.as_table(found.tasks).write("markdown"))


def _some(losses: Iterable[ExampleLoss | None]) -> list[ExampleLoss]:
    return [found for found in losses if found is not None]


def _rounded(scores: Scores | None, rows: Sequence[Tradeoff]) -> dict[str, list[ExampleLoss]]:
    """Return each task's losses by quantised weights, by bits."""
    found = {
        kind: _some(
            example_loss(row.merged, scores.get(quantized_name(kind), row.task)) for row in rows if scores
        )
        for kind in (scores.kinds if scores else ())
    }
    return {bits: losses for bits, losses in found.items() if losses}


def _quantized(scores: Scores | None, rows: Sequence[Tradeoff]) -> dict[str, Any]:
    """Return the scores of every model with whole and with rounded weights, where all were rounded."""
    if scores is None or not scores.rounds_all:
        return {}
    found = [
        (row.task, Markdown(title), _forms(scores, name or row.task, row.task))
        for row in rows
        for title, name in {"base model": "base_model", "merged": MERGED, "own checkpoint": None}.items()
    ]
    return {"kinds": scores.kinds, "rows": [row for row in found if any(row[2])]}


def _forms(scores: Scores, model: str, task: str) -> list[Score | None]:
    return [scores.get(name, task) for name in (model, *(quantized_name(k, model) for k in scores.kinds))]


def _weighted(rows: Sequence[Tradeoff], scores: Scores | None) -> dict[Markdown, float]:
    """Return means weighted by the preference, by model; empty if the merged model lacks one that counts."""
    columns = {"merged": "merged", "base model": "base", "each task by its own checkpoint": "own"}
    weights = [row.preference for row in rows]
    means = {
        name: weighted_mean([getattr(row, column) for row in rows], weights)
        for name, column in columns.items()
    }
    if scores is None or means["merged"] is None:
        return {}
    if best := best_single(scores, {row.task: row.preference for row in rows}):
        means[f"best single checkpoint, {code(best[0])}"] = best[1]
    return {Markdown(name): mean for name, mean in means.items() if mean is not None}


def _unmeasured(row: Tradeoff) -> str:
    """Return the models that were not scored on a task, in words; empty if none is missing."""
    models = {"the base model": row.base, "its own checkpoint": row.own, "the merged model": row.merged}
    absent = [name for name, score in models.items() if score is None]
    return "nothing was scored" if len(absent) == len(models) else ", ".join(absent)


def _arxiv_number(source: str) -> Markdown | None:
    match = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", source)
    return Markdown(match[1]) if match else None
