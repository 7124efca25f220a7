"""Verb that trains and merges in rounds."""

from __future__ import annotations

from hub_magmax.cli.options import RecipeOptions, changed_recipe, faults_option, from_cache_option
from hub_magmax.cli.terminal import Answer, progress, say, verb


@verb
@changed_recipe
@from_cache_option
@faults_option
def alternate(asked: RecipeOptions, in_spite_of: tuple[str, ...]) -> Answer:
    """Train RECIPE's tasks and merge them, round after round.

    `training.alternate` of RECIPE says how many rounds, and how far each goes. The model of the last one is
    scored and published as `run` does; an interrupted command goes on where it stopped. Exits with 3 if it
    regressed on a guard.

    \b
    Examples:
      hub-magmax alternate recipe.yaml
      hub-magmax alternate recipe.yaml --set training.alternate.rounds=2
    """
    from hub_magmax.cli.merging import answer_of_run
    from hub_magmax.cli.recipe_and_lock import read_recipe
    from hub_magmax.processes import find_processes
    from hub_magmax.training.alternating import alternate as do_alternate

    found, processes = read_recipe(asked), find_processes(say)
    made = do_alternate(found, processes=processes, report=say, progress=progress, in_spite_of=in_spite_of)
    if not processes.is_first:
        return Answer({}, "")
    answer = answer_of_run(made.run)
    width = max(len(one.model) for one in made.rounds)
    lines = [
        f"round {one.number}  {one.model:<{width}}  {'made' if one.is_new else 'was there'}"
        for one in made.rounds
    ]
    values = {"rounds": [one.to_dict() for one in made.rounds], **answer.values}
    return Answer(values, "\n".join([*lines, answer.text]), exit_code=answer.exit_code)
