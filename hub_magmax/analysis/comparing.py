"""Comparison of methods: chosen on one sample of the target, reported on another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.analysis.candidates import Candidate, base_model, candidates
from hub_magmax.analysis.study_cost import announced, finals, ways
from hub_magmax.analysis.tried_preferences import RECIPE, UNIFORM, known_weights, preferences_to_try
from hub_magmax.analysis.tuning import CandidateScorer, Trial, best, best_by_group, examples_of
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import Evaluator, brings_data, unit_of
from hub_magmax.evaluation.intervals import Difference, paired_difference
from hub_magmax.evaluation.journal import Journal
from hub_magmax.evaluation.scores import Score, deviation, make_score, measured
from hub_magmax.evaluation.scoring import counted
from hub_magmax.evaluation.shared_examples import num_shared, read_digests
from hub_magmax.evaluation.tables import Cell, Measured, Shown, Table, Tabular
from hub_magmax.files import json_text, named_after, write_text
from hub_magmax.recipe.arguments import opened
from hub_magmax.recipe.loading import updated
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.merge_values import rules_under
from hub_magmax.recipe.result_files import ResultFiles
from hub_magmax.recipe.schema import Compare, Recipe
from hub_magmax.recipe.values import AUTO, Data
from hub_magmax.text import ProgressBar, Report, step, unseen

if TYPE_CHECKING:
    from hub_magmax.reporting.figures import Row

#: Files that a comparison writes.
REPORT_NAME, PICTURE_NAME, WINNER_NAME = "comparison.json", "comparison.png", "winner.yaml"
FILES = (REPORT_NAME, PICTURE_NAME, WINNER_NAME)


@dataclass(frozen=True)
class Compared:
    """One method at its best.

    Attributes:
        label: The method, with the options that tell it from others of its name.
        candidate: The scaling coefficient and the preference that did best on the tuning sample.
        tuned: Mean score on the tuning sample; too high by the choice that was made there.
        reported: On the other sample.
        to_winner: Difference to the winner there, example by example; None for the winner.
        by_seed: Mean score there of each seed's model, where the method draws and the comparison names seeds;
            everything else is then of the mean over the seeds.
    """

    label: str
    candidate: Candidate
    tuned: float
    reported: Score
    to_winner: Difference | None
    by_seed: Mapping[int, float] = field(default_factory=dict, hash=False)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the reported score over the seeds; None where there are fewer than two."""
        return deviation(self.by_seed)


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """Everything that was compared.

    Attributes:
        metric, is_share: Name of the scores, and whether they are shares.
        num_tuning, num_reporting: Examples in the two samples.
        base_model: The base model on the reporting sample.
        methods: Each method at its best, the highest reported score first.
        winner: Label of the method that did best on the tuning sample.
        tried: Label, scaling coefficient, options, preference and mean tuning score of everything tried, with
            the method that it was tuned with (`group`), and whether it is the recipe as it stands.
        unit: Of scores that are no shares.
        quantized: What the weights of all models were rounded to; empty for models as they are merged.
    """

    metric: str
    is_share: bool
    num_tuning: int
    num_reporting: int
    base_model: Score
    methods: tuple[Compared, ...]
    winner: str
    tried: tuple[Mapping[str, Any], ...]
    unit: str = ""
    quantized: str = ""

    def to_json(self) -> str:
        values = asdict(self)
        for score in (values["base_model"], *(method["reported"] for method in values["methods"])):
            del score["outcomes"]
        for method, found in zip(values["methods"], self.methods, strict=True):
            method["deviation"] = found.deviation
        return json_text(values)

    def as_table(self) -> Table:
        """Return a row for each method at its best, and one for the base model."""
        rows = [self._row(method) for method in self.methods]
        base = ("base model", None, None, None, measured(self.base_model), None, None)
        head = ("method", "scaling", "preference", "tuned", self.metric, "to the winner", "p")
        tried = ways(len(self.tried), has_recipe=any(trial["is_recipe"] for trial in self.tried))
        notes = (
            f"{tried}, chosen by {self.num_tuning} examples, reported on {self.num_reporting} others with "
            f"95 % intervals; the winner is {self.winner}",
            *([f"all models have weights rounded to {self.quantized}"] if self.quantized else []),
            *self.reason,
            *self.loss,
        )
        return Table(head, (*rows, base), notes, is_drawn=True, measured=("to the winner",))

    def _row(self, method: Compared) -> tuple[Cell, ...]:
        found, candidate = method.to_winner, method.candidate
        return (
            method.label,
            Shown(float(candidate.method["scaling"]), f"{candidate.method['scaling']:.3g}"),
            candidate.preference,
            method.tuned,
            measured(method.reported, method.deviation),
            Shown(None, "the winner") if found is None else _to_winner(found),
            None if found is None else Shown(found.p_value, f"{found.p_value:.2g}"),
        )

    @property
    def loss(self) -> tuple[str, ...]:
        """Say that the winner does worse than the base model, where it does."""
        won = next(method.reported for method in self.methods if method.label == self.winner)
        if won.value >= self.base_model.value:
            return ()
        return (f"the winner is below the base model: {won.value:.3f} against {self.base_model.value:.3f}",)

    @property
    def reason(self) -> tuple[str, ...]:
        """Say why the winner is not the first row, where it is not."""
        first = self.methods[0]
        if first.label == self.winner:
            return ()
        won = next(method.candidate for method in self.methods if method.label == self.winner)
        leader = max(self.tried, key=lambda trial: trial["merit"])["group"]
        how = (
            "did best on the examples that choose"
            if leader == won.group
            else f"is within one standard error of {leader} on the examples that choose, and stands before it"
        )
        return (
            f"{self.winner} {how}; {first.label} is above it on the others, which choose nothing, since "
            "choosing by them would flatter the winner",
        )


def comparable(recipe: Recipe) -> Recipe:
    """Return the recipe to lock for a comparison: `auto` needs no choice there, since a comparison makes it.

    Raises:
        EvaluationError: If a sample is missing.
    """
    if recipe.tuning_data is None or recipe.compare is None or recipe.compare.report is None:
        raise EvaluationError(
            "a comparison needs one labelled sample of the target to choose by, and another to report on",
            where="compare",
            expected="compare: {tune: {dataset: ...}, report: {dataset: ...}}",
        )
    if not recipe.method.is_auto:
        return recipe
    name = recipe.method.name
    return updated(recipe, {"method": "average" if name == AUTO else {"name": name, **recipe.method.options}})


def compare(
    recipe: Recipe,
    lock: Lock,
    *,
    journal: Journal | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Comparison:
    """Try methods, scaling coefficients and preferences, and say which did best on other examples.

    Merges in memory and writes nothing. Every method is tuned alike: its scaling coefficient and its
    preference are those that do best on the tuning sample. The reporting sample decides nothing.

    Args:
        recipe: Names what to try under `compare`, and the evaluator under `evaluation`.
        lock: Of `comparable(recipe)`; its preference is tried beside the others.
        journal: Keeps what was measured, and has what was measured earlier (`study_journal`).
        report: Called with a line of text at each step.
        progress: Called with the number of models, what is done and the unit; opens what is called for each.

    Raises:
        EvaluationError: If a sample is too small, or cannot be used.
    """
    spec = recipe.compare or Compare()
    assert recipe.tuning_data is not None and spec.report is not None, "checked by `comparable`"
    journal = Journal() if journal is None else journal
    weights = preferences_to_try(recipe, spec, lock, journal, report, progress)
    tried = candidates(spec, recipe.method, weights)
    with CandidateScorer(recipe, lock, journal, progress, report, spec.bits) as scorer:
        _check_apart(scorer, recipe.tuning_data, spec.report)
        batches = scorer.load(recipe.tuning_data, "compare.tune")
        other = scorer.load(spec.report, "compare.report")
        what = f"{announced(tried)}, each on {examples_of(batches)}"
        last = f"then {finals(tried)} on {examples_of(other)}"
        fewer = "compare.methods and compare.scaling"
        scorer.cost.announce(*scorer.num_models(tried, "tune"), f"{what}; {last}", fewer)
        with opened(progress, len(tried), "comparing", "ways") as advance:
            trials = list(counted(scorer.run(tried, batches, "tune"), len(tried), 1, advance))
        winner, finalists = best(trials), _finalists(trials)
        shown = [trial.candidate for trial in finalists.values()]
        shown.append(base_model(len(lock.tasks)))
        doing = _on_others(*scorer.num_models(shown, "report"))
        with step(doing, report), opened(progress, len(shown), doing, "ways") as advance:
            *found, base = counted(scorer.run(shown, other, "report"), len(shown), 1, advance)
            reported = dict(zip(finalists, found, strict=True))
    concluded = _conclude(scorer.evaluator, trials, finalists, reported, winner, base, recipe.seed)
    return replace(concluded, quantized=spec.quantized or "")


def _on_others(num_models: int, num_known: int) -> str:
    """Return in words what is done with the best of each method."""
    if num_known == num_models:
        return "reading what the best of each method did on other examples"
    return "scoring the best of each method on other examples"


def planned_models(recipe: Recipe, lock: Lock) -> tuple[int, str]:
    """Return how many models a comparison merges and scores to choose, and which they are in words.

    An estimated preference counts as different from all others.

    Raises:
        EvaluationError, RecipeError: As `compare` refuses the recipe.
    """
    comparable(recipe)
    spec = recipe.compare or Compare()
    tried = candidates(spec, recipe.method, known_weights(recipe, spec, lock))
    return sum(max(1, len(one.seeds)) for one in tried), f"{announced(tried)}, then {finals(tried)}"


def _finalists(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Return each method's trial to prefer, and the recipe as it stands, by label; the latter may be one."""
    found = (*best_by_group(trials).values(), *(trial for trial in trials if trial.candidate.is_recipe))
    return {trial.candidate.label: trial for trial in found}


def _check_apart(scorer: CandidateScorer, chosen_by: Data, reported: Data) -> None:
    """Raise EvaluationError where the examples that are reported are those that choose.

    Parts of one data set are compared row by row; a tenth may be the same, since real data repeats itself.
    """
    if (chosen_by.dataset, chosen_by.config) != (reported.dataset, reported.config):
        return
    if brings_data(scorer.evaluator):
        shared = num_examples = 1
    else:
        own, others = (
            read_digests(scorer.evaluator, data, scorer.examples(data)) for data in (reported, chosen_by)
        )
        num_examples, shared = len(own), num_shared(own, others)
    if 10 * shared > num_examples:
        raise EvaluationError(
            f"{shared} of {num_examples} examples are those of compare.tune, so the reported scores would be "
            "too high by the choice that was made there",
            where="compare.report",
            expected="other examples",
            hint='Split them, such as split: "train[:50%]" and "train[50%:]".',
        )


def _conclude(
    evaluator: Evaluator,
    trials: Sequence[Trial],
    finalists: Mapping[str, Trial],
    reported: Mapping[str, Trial],
    winner: Trial,
    base: Trial,
    seed: int,
) -> Comparison:
    won = winner.candidate.label
    rows = [
        Compared(
            label,
            trial.candidate,
            finalists[label].value,
            make_score(label, "report", trial.outcomes, is_share=evaluator.is_share),
            None if label == won else _difference(trial, reported[won], seed),
            trial.by_seed,
        )
        for label, trial in reported.items()
    ]
    return Comparison(
        evaluator.metric,
        evaluator.is_share,
        len(winner.outcomes),
        len(reported[won].outcomes),
        make_score("base_model", "report", base.outcomes, is_share=evaluator.is_share),
        tuple(sorted(rows, key=lambda row: -row.reported.value)),
        won,
        tuple(
            {
                "label": trial.candidate.label,
                "group": trial.candidate.group,
                "scaling": trial.candidate.method["scaling"],
                "options": trial.candidate.options,
                "preference": trial.candidate.preference,
                "value": trial.value,
                "merit": trial.margin,
                "is_recipe": trial.candidate.is_recipe,
            }
            for trial in trials
        ),
        unit_of(evaluator),
    )


def _difference(trial: Trial, winner: Trial, seed: int) -> Difference:
    """Return the difference to the winner; counts of examples would not add up to one of means over seeds."""
    found = paired_difference(*([o.score for o in one.outcomes] for one in (trial, winner)), seed=seed)
    is_mean = max(len(trial.draws), len(winner.draws)) > 1
    return replace(found, gained=None, lost=None) if is_mean and not found.is_identical else found


def _to_winner(found: Difference) -> Shown:
    text = "identical" if found.is_identical else f"{found.mean:+.3f}"
    return Shown(Measured(found.mean, found.low, found.high), text)


def winning_recipe(recipe: Recipe, comparison: Comparison) -> Recipe:
    """Return the recipe with the method, scaling coefficient and preference that won, for any machine.

    Its model goes into a folder of its own: that of the recipe may hold the recipe's model.
    """
    won = next(m.candidate for m in comparison.methods if m.label == comparison.winner)
    output = recipe.portable.to_dict()["output"] | {"path": named_after(recipe.output.path, "winner")}
    changes: dict[str, Any] = {"method": dict(won.method), "output": output}
    changes["tensors"] = rules_under(recipe.tensors, recipe.method.name, won.method)
    if won.preference == UNIFORM:
        changes["preference"] = None
    elif won.preference != RECIPE and recipe.compare is not None:
        changes["preference"] = recipe.compare.preferences[won.preference].model_dump(exclude_none=True)
    return updated(recipe, changes)


def write_comparison(recipe: Recipe, comparison: Comparison, place: ResultFiles) -> tuple[Path, ...]:
    """Write the report, its pictures, and the winning recipe, and return where."""
    from hub_magmax.reporting.figures import Scale, draw_comparison

    report, picture, winner = map(place.path, FILES)
    write_text(report, comparison.to_json())
    scale = Scale(comparison.metric, comparison.is_share, comparison.unit)
    pictures = draw_comparison(comparison_rows(comparison), scale, picture)
    write_text(winner, winning_recipe(recipe, comparison).to_yaml())
    return report, *pictures, winner


def comparison_rows(comparison: Comparison) -> list[Row]:
    """Return what the picture shows, from the top."""
    from hub_magmax.reporting.figures import Row

    rows = []
    for method in comparison.methods:
        scaling = f"λ {method.candidate.method['scaling']:.3g}"
        label = f"{method.label}, {scaling}, {method.candidate.preference}"
        rows.append(Row(label, method.reported, method.label == comparison.winner, method.deviation))
    return [*rows, Row("base model", comparison.base_model)]
