"""Choice of a method or a preference: candidates merged in memory and scored on labelled examples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import count, groupby
from typing import TYPE_CHECKING, Any

from hub_magmax.analysis.candidates import Candidate
from hub_magmax.analysis.study_cost import StudyCost
from hub_magmax.checkpoints.locations import location_of
from hub_magmax.evaluation.columns import check_columns, examples_for
from hub_magmax.evaluation.data import check_local_data, fingerprint
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import Outcome, brings_data, columns_of, evaluator_of
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.evaluation.evaluators.plugins import about, answers
from hub_magmax.evaluation.journal import Journal, Outcomes, restored, stored
from hub_magmax.evaluation.margins import Margins, normalised_margins, within
from hub_magmax.evaluation.rounding import rounded_model
from hub_magmax.evaluation.scoring import counted, size_of_batches
from hub_magmax.files import digest
from hub_magmax.preference.safeguards import NUM_CHECKED, check_sample_size
from hub_magmax.preference.samples import Scorer
from hub_magmax.recipe.arguments import opened
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Compare, Recipe
from hub_magmax.recipe.values import AUTO, Data
from hub_magmax.text import ProgressBar, Report, number_of, step, unseen

if TYPE_CHECKING:
    from datasets import Dataset

    from hub_magmax.evaluation.evaluators.loading import LoadedModel
    from hub_magmax.merging.in_memory import MergedModel

    #: Models of one candidate by seed, surveyed and not yet scaled.
    _Merged = dict[int | None, MergedModel]

LOG = logging.getLogger(__name__)

#: Standard errors by which a method may be worse than the best and still be taken for an earlier place ...
METHOD_ERRORS = 1.0
#: ... and by which a scaling coefficient may be worse than the method's best, for being nearer to its own.
SCALING_ERRORS = 0.25


@dataclass(frozen=True)
class Trial:
    """A candidate and what its model did.

    Attributes:
        outcomes: One per example; their mean over the seeds where there are several.
        draws: What the model of each seed did, where the candidate names seeds.
    """

    candidate: Candidate
    outcomes: tuple[Outcome, ...]
    draws: tuple[tuple[Outcome, ...], ...] = ()

    @property
    def by_seed(self) -> dict[int, float]:
        """Mean score of each seed's model; empty where the candidate names no seeds."""
        means = (math.fsum(o.score for o in found) / len(found) for found in self.draws)
        return dict(zip(self.candidate.seeds, means, strict=True)) if self.draws else {}

    @property
    def value(self) -> float:
        """Mean score."""
        return math.fsum(outcome.score for outcome in self.outcomes) / len(self.outcomes)

    @cached_property
    def margins(self) -> Margins:
        """Normalised margins, one number per example; choices go by them."""
        return normalised_margins(self.outcomes)

    @property
    def margin(self) -> float:
        """Mean of the margins."""
        return float(self.margins.mean())


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial to prefer: among those that do about equally well, the one that was expected to.

    A method under one preference is as good as its best trial. The first of them, in the order in which they
    were tried, that is within one standard error of the best of all is taken; of its trials, the one whose
    scaling coefficient is nearest to the method's own (in ratio), among those within a quarter of one
    of its best. Margins decide, and the first of equal ones. The one-standard-error rule is Breiman's
    (Classification and Regression Trees, 1984).
    """
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.candidate.group, trial.candidate.preference), []).append(trial)
    tops = [max(group, key=lambda trial: trial.margin) for group in groups.values()]
    top = max(tops, key=lambda trial: trial.margin)
    chosen, group = next(
        (found, group)
        for found, group in zip(tops, groups.values(), strict=True)
        if within(top.margins, found.margins, METHOD_ERRORS)
    )
    equals = [trial for trial in group if within(chosen.margins, trial.margins, SCALING_ERRORS)]
    return min(equals, key=lambda trial: trial.candidate.distance_to_default)


class CandidateScorer:
    """A recipe's checkpoints and its evaluator, ready to merge in memory and score any number of times.

    Args:
        recipe: Its evaluation names the evaluator.
        lock: Pins checkpoints and data; its method and preference play no part.
        journal: Keeps what was measured, and has what was measured earlier.
        progress: Called with each model's examples, what is done and the unit; opens what is called with the
            examples of each batch.
        report: Called with a line before the first model, where it is announced, and after it.
        bits: Of the weights of the models that are scored; None for weights as they are merged.
    """

    def __init__(
        self,
        recipe: Recipe,
        lock: Lock,
        journal: Journal | None = None,
        progress: ProgressBar = unseen,
        report: Report = lambda line: None,
        bits: int | None = None,
    ) -> None:
        from hub_magmax.merging.in_memory import InMemoryMerger  # loads torch

        spec = recipe.evaluation or Evaluation(tasks={})
        self._journal = Journal() if journal is None else journal
        self._recipe, self._lock, self._batch_size = recipe, lock, spec.batch_size
        self._progress, self._bits = progress, bits
        self.evaluator = evaluator_of(spec)
        with ExitStack() as stack, step("preparing to merge in memory"):
            self._merger = stack.enter_context(InMemoryMerger(recipe, lock))
            place = location_of(lock.sources[recipe.output.files_from], recipe.folder).model_place
            kinds = self.evaluator.model_class, self.evaluator.processor_class
            self._model = load_model(place, *kinds, spec.evaluator.name)
            self._stack = stack.pop_all()
        self.cost = StudyCost(self._merger.plan, report)

    def __enter__(self) -> CandidateScorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def follows_preference(self) -> bool:
        """Whether the preference of candidates counts for any merged tensor; rules may name others."""
        own = (self._merger.plan.own_values.get(job.tensor) for job in self._merger.plan.merged)
        return any(found is None or found.weights is None for found in own)

    def load(self, data: Data, where: str) -> list[Any]:
        """Return the examples that `data` names as batches that `run` takes.

        Raises:
            EvaluationError: If they cannot be loaded, or are too few to say anything.
        """
        if brings_data(self.evaluator):
            with about(self.evaluator, where):
                return list(
                    self.evaluator.encode(self._model, data.dataset, columns_of(data), self._batch_size)
                )
        examples = self.examples(data)
        check_sample_size(len(examples), where)
        return self.encode(examples, data, where)

    def examples(self, data: Data) -> Dataset:
        """Return the examples that `data` names, as they are loaded."""
        check_local_data([data], self._recipe, self._lock.local_data)
        return examples_for(self.evaluator, data, self._recipe, self._lock.datasets)

    def encode(self, examples: Dataset, data: Data, where: str = "examples") -> list[Any]:
        """Return examples as batches that `run` takes; `where` names them in messages."""
        doing = step(f"preparing the examples of {where}")
        with about_data(self._recipe, data), about(self.evaluator, where), doing:
            step_size = size_of_batches(len(examples), self._batch_size)
            found = self.evaluator.encode(self._model, examples, columns_of(data), step_size)
            return Batches(found, len(examples), step_size)

    def run(
        self, candidates: Sequence[Candidate], batches: Sequence[Any], sample: str = ""
    ) -> Iterator[Trial]:
        """Yield what each candidate did, in order.

        Neighbours that differ in their scaling coefficient alone are merged once.

        Args:
            candidates: What to merge.
            batches: From `load` or `encode`.
            sample: Name of these examples in the journal.
        """

        def unscaled(candidate: Candidate) -> tuple[Any, ...]:
            method = {k: v for k, v in candidate.method.items() if k != "scaling"}
            return method, candidate.weights, candidate.seeds, candidate.by_rules

        numbers = count(1)
        for _, group in groupby(candidates, key=unscaled):
            merged: _Merged = {}
            for candidate in group:
                LOG.debug("way %d of %d: %s", next(numbers), len(candidates), candidate.label)
                yield self._tried(candidate, {sample: batches}, merged)[sample]

    def num_models(self, candidates: Sequence[Candidate], sample: str) -> tuple[int, int]:
        """Return how many models `run` merges and scores, and how many of them were measured before."""
        keys = [self._key(one, seed, [sample]) for one in candidates for seed in one.seeds or (None,)]
        return len(keys), sum(self._journal.get(key) is not None for key in keys)

    def score(self, candidate: Candidate, batches: Mapping[str, Sequence[Any]]) -> dict[str, Trial]:
        """Return what one candidate did on each of several data sets; it is merged once."""
        return self._tried(candidate, batches, {})

    def _tried(
        self, candidate: Candidate, batches: Mapping[str, Sequence[Any]], merged: _Merged
    ) -> dict[str, Trial]:
        """Return what one candidate did on each data set; `merged` has, and gets, its models by seed."""
        found = [self._outcomes(candidate, seed, batches, merged) for seed in candidate.seeds or (None,)]
        return {
            name: Trial(
                candidate,
                mean_outcomes([outcomes[name] for outcomes in found]),
                tuple(outcomes[name] for outcomes in found) if candidate.seeds else (),
            )
            for name in batches
        }

    def _key(self, candidate: Candidate, seed: int | None, samples: Iterable[str]) -> str:
        """Return the name of a model's outcomes on samples in the journal."""
        return digest(
            [
                dict(candidate.method),
                list(candidate.weights),
                seed,
                list(samples),
                *(["without rules"] if self._merger.plan.own_values and not candidate.by_rules else []),
            ]
        )

    def _outcomes(
        self, candidate: Candidate, seed: int | None, batches: Mapping[str, Sequence[Any]], merged: _Merged
    ) -> dict[str, Outcomes]:
        key = self._key(candidate, seed, batches)
        kept = self._journal.get(key)
        if kept is not None:
            return kept
        with self.cost.timed():
            with step(f"merging in memory by {candidate.label}"):
                if seed not in merged:
                    how = candidate.method, candidate.weights, seed
                    merged[seed] = self._merger.merge(*how, by_rules=candidate.by_rules)
                weights = merged[seed].weights(float(candidate.method["scaling"]))
                model = self._model.with_weights(weights)
                if self._bits is not None:
                    model = rounded_model(model, self._bits)
            measured = self._measured(model, batches, f"scoring {candidate.told}")
        self._journal.add(key, measured)
        return measured

    def _measured(
        self, model: LoadedModel, batches: Mapping[str, Sequence[Any]], doing: str
    ) -> dict[str, Outcomes]:
        """Return what a model answers on each data set, as the journal gives it back.

        So a resumed command writes the same bytes.
        """
        total = sum(found.num_examples for found in batches.values() if isinstance(found, Batches))
        shown = opened(self._progress, total, doing, "examples") if total else step(doing)
        measured = {}
        with shown as advance:
            for name, found in batches.items():
                count = found.num_examples if isinstance(found, Batches) else None
                seen = found.counted(advance) if isinstance(found, Batches) else found
                measured[name] = restored(stored(answers(self.evaluator, model, seen, name, count)))
        return measured


class Batches(list[Any]):
    """Encoded examples, how many they are, and how many a batch has; the last one may have fewer."""

    def __init__(self, batches: Iterable[Any], num_examples: int, step_size: int) -> None:
        super().__init__(batches)
        self.num_examples, self._step_size = num_examples, step_size

    def counted(self, advance: Callable[[int], None] | None) -> Iterator[Any]:
        """Yield them, and call `advance` with the examples of each."""
        return counted(self, self.num_examples, self._step_size, advance)


def examples_of(*samples: Sequence[Any]) -> str:
    """Return in words how many examples there are in the batches of samples, if that is known."""
    counts = [one.num_examples for one in samples if isinstance(one, Batches)]
    known = len(counts) == len(samples)
    return number_of(sum(counts), "example") if known else "the examples of the evaluator"


def mean_outcomes(draws: Sequence[Outcomes]) -> Outcomes:
    """Return the mean outcome of each example; the outcomes themselves where there is one draw."""
    if len(draws) == 1:
        return draws[0]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.fsum(known) / len(known) if len(known) == len(values) else None

    return tuple(
        Outcome(
            mean([o.score for o in each]) or 0.0,
            mean([o.probability for o in each]),
            mean([o.margin for o in each]),
            any(o.is_cut for o in each),
        )
        for each in zip(*draws, strict=True)
    )


def scorer_of(
    recipe: Recipe,
    lock: Lock,
    journal: Journal | None = None,
    progress: ProgressBar = unseen,
    report: Report = lambda line: None,
) -> Scorer:
    """Return a function of examples: it returns a scorer of weights, which merges with them in memory.

    Where the recipe's scaling is `auto`, the best of the comparison's coefficients counts.
    """
    written, spec = recipe.method, recipe.compare or Compare()
    scalings = spec.tried_scaling if written.scaling == AUTO else (written.scaling,)
    tried = [locked_method(written.model_copy(update={"scaling": scaling})) for scaling in scalings]

    def on_examples(
        examples: Dataset, data: Data, num_tried: int
    ) -> Callable[[Mapping[str, float]], Sequence[Outcome]]:
        scorer = CandidateScorer(recipe, lock, journal, progress, report, spec.bits)
        check_columns(examples, scorer.evaluator, data, recipe)
        batches = scorer.encode(examples, data, "preference")
        what = f"at most {number_of(num_tried, 'preference')}"
        what += f" with {number_of(len(tried), 'scaling coefficient')}" if len(tried) > 1 else ""
        is_search = recipe.preference is not None and recipe.preference.search is not None
        fewer = "preference.search.budget" if is_search and num_tried > NUM_CHECKED else ""
        scorer.cost.announce(num_tried * len(tried), None, f"{what}, each on {examples_of(batches)}", fewer)
        seen = [fingerprint(examples, examples.column_names), data.model_dump(mode="json")]
        sample = f"preference {digest(seen)}"

        def score(weights: Mapping[str, float]) -> Sequence[Outcome]:
            vector = tuple(weights[task] for task in lock.tasks)
            found = [Candidate(method, "estimate", vector) for method in tried]
            return max(scorer.run(found, batches, sample), key=lambda trial: trial.margin).outcomes

        return score

    return on_examples


def best_by_group(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Return each method's trial to prefer, in the order in which methods were tried."""
    groups = dict.fromkeys(trial.candidate.group for trial in trials)
    return {group: best([t for t in trials if t.candidate.group == group]) for group in groups}
