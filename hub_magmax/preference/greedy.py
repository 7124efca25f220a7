"""Preference by greedy choice: equal shares of the tasks that do not make the merged model worse."""

from __future__ import annotations

import numpy as np

from hub_magmax.preference.safeguards import rounded
from hub_magmax.preference.samples import Scorer
from hub_magmax.preference.search import Choice, Tried, ValuesOf, resolve_by_merging
from hub_magmax.recipe.lockfile import ResolvedPreference
from hub_magmax.recipe.schema import Recipe


def resolve_greedy(recipe: Recipe, *, scorer: Scorer | None) -> ResolvedPreference:
    """Choose tasks on the target sample and return equal weights of them, with the log of decisions.

    Raises:
        EvaluationError: If the data cannot be used, or there is no `scorer`.
    """
    tasks = recipe.task_names
    num_tried = 2 * len(tasks) - 1
    return resolve_by_merging(recipe, lambda values_of: choose(values_of, tasks), {}, num_tried, scorer)


def choose(values_of: ValuesOf, tasks: tuple[str, ...]) -> Choice:
    """Try every task alone, then add them to the best one, in order of merit, where that does no harm.

    2T − 1 models are merged and scored for T tasks. Equally good tasks keep their order. As in the paper a
    task that changes nothing is kept; merit is that of `normalised_margins`, where the paper has accuracy,
    which few examples tell coarsely.

    Returns:
        The last weights that were kept, which none that were tried surpass.

    Source: greedy soup, algorithm 1 of arXiv:2203.05482.
    """
    every = np.eye(len(tasks))
    tried = [Tried(alone, values_of(alone)) for alone in every]
    order = sorted(range(len(tasks)), key=lambda task: -tried[task].mean)
    kept, chosen = [order[0]], order[0]
    together = {tasks[order[0]]: tried[chosen].mean}
    for task in order[1:]:
        members = [*kept, task]
        weights = every[members].sum(axis=0) / len(members)
        tried.append(Tried(weights, values_of(weights)))
        together[tasks[task]] = tried[-1].mean
        if tried[-1].mean >= tried[chosen].mean:
            kept, chosen = members, len(tried) - 1
    alone = {tasks[task]: tried[task].mean for task in order}
    seen = {"alone": rounded(alone), "with_those_before": rounded(together)}
    return Choice(tried, chosen, seen | {"kept": [tasks[task] for task in kept]})
