"""Rounds of fine-tuning and merging, one after the other; those that are finished stay."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import RecipeError
from hub_magmax.files import from_here, os_errors
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.pipeline import Run, lock, run
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.arguments import checked, opened
from hub_magmax.recipe.loading import RecipeLike, as_recipe
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import ProgressBar, Report, unseen
from hub_magmax.training.finetuning import finetune
from hub_magmax.training.rounds import Round, rounds_of


@dataclass(frozen=True)
class RoundModel:
    """Model of one round after `alternate`.

    Attributes:
        number: Of the round, from 1.
        model: Its folder, from the current one.
        is_new: Whether it was made just now.
    """

    number: int
    model: str
    is_new: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return {"round": self.number, "model": self.model, "is_new": self.is_new}


@dataclass(frozen=True)
class Alternation:
    """What `alternate` made: the rounds' models, in order, and the run of the last one."""

    rounds: tuple[RoundModel, ...]
    run: Run


@checked
def alternate(
    recipe: RecipeLike,
    *,
    processes: Processes | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
    in_spite_of: Iterable[str] = (),
) -> Alternation:
    """Train every task from the current model, merge them, and begin again from there, round after round.

    A round is a recipe: `finetune` trains its tasks, and its merge is the recipe's own, by any method, under
    its preference. The last round's model is scored and published as the recipe says. An interrupted call
    goes on, and on a CPU ends with the same bytes.

    Args:
        recipe: `training.alternate` says how many rounds; `training` how a round trains.
        processes: Which of how many processes this is; found from the launcher by default.
        report: Called with a line before each step of the work.
        progress: Called as by `finetune` and `run`.
        in_spite_of: Names of faults of the checkpoints that are accepted, in every round.

    Raises:
        RecipeError: If the recipe has no `training.alternate`.
        OutputError: If rounds of another recipe are there.
        HubMagmaxError: As `finetune` and `run`.

    Source: ATM, alternating tuning and merging (arXiv:2411.03055).
    """
    found = as_recipe(recipe)
    if found.training is None or found.training.alternate is None:
        raise RecipeError(
            "the recipe has no `training.alternate`, so there are no rounds",
            key=("training", "alternate"),
            hint="Write training: {order: from_base, alternate: {rounds: 5}, ...}.",
        )
    rounds = rounds_of(found)
    work = _Work(processes or find_processes(report), report, progress, tuple(in_spite_of))
    num_finished = work.processes.first_decides(lambda: _num_finished(rounds))
    num_kept = found.training.alternate.num_kept
    for one in rounds[num_finished:]:
        work.drop(rounds[: one.number - 1], num_kept)
        report(f"round {one.number} of {len(rounds)}, from {one.merge.base_model}")
        work.make(one, is_last=one is rounds[-1])
    last = rounds[-1].recipe
    done = run(last, processes=work.processes, report=report, progress=progress, in_spite_of=work.in_spite_of)
    is_new = [num_finished < one.number for one in rounds[:-1]] + [not done.merged_before]
    made = zip(rounds, is_new, strict=True)
    return Alternation(tuple(RoundModel(one.number, from_here(one.model), new) for one, new in made), done)


def _num_finished(rounds: Sequence[Round]) -> int:
    """Return how many rounds before the last one are finished, by the latest whose model is there.

    What a process left beside that model is removed if it was killed between the model's rename and its end.
    """
    latest = max((one.number for one in rounds[:-1] if one.is_finished), default=0)
    if latest:
        rounds[latest - 1].check_same()
        PartialFolder(rounds[latest - 1].model, "").clean_up()
    return latest


@dataclass(frozen=True)
class _Work:
    """Merges of rounds, and what goes after them."""

    processes: Processes
    report: Report
    progress: ProgressBar
    in_spite_of: tuple[str, ...]

    def make(self, one: Round, *, is_last: bool) -> None:
        """Train the tasks of a round, and merge them; the model of the last one is left to `run`."""
        finetune(one.merge, processes=self.processes, report=self.report, progress=self.progress)
        recipes = [one.merge] if one.step is None else [one.merge, one.step]
        for recipe in recipes[:-1] if is_last else recipes:
            self.merge(recipe)

    def merge(self, recipe: Recipe) -> None:
        """Merge into the recipe's folder, unless that is done; nothing is scored."""
        from hub_magmax.merging.execution import (
            merge,  # loads torch
            plan_unfinished,
        )

        cache = SourceCache()
        locked = self.processes.first_decides(
            lambda: lock(recipe, report=self.report, progress=self.progress, cache=cache)
        )
        planned, _ = plan_unfinished(recipe, locked, cache, self.processes, self.in_spite_of)
        with opened(self.progress, planned.progress_bytes, "merging", "bytes") as advance:
            merge(planned, progress=advance, processes=self.processes, cache=cache)

    def drop(self, finished: Sequence[Round], num_kept: int | None) -> None:
        """Remove checkpoints of finished rounds, and models but the last `num_kept`; None keeps all."""
        if self.processes.is_first and num_kept is not None:
            for one in finished:
                is_needed = one.number > len(finished) - num_kept
                for path in one.folder.glob("*") if is_needed else [one.folder]:
                    if path.is_dir() and path != one.model:
                        with os_errors(path):
                            shutil.rmtree(path)
        self.processes.wait()
