"""Verbs that train the checkpoints of a recipe's tasks, once or in rounds: finetune, alternate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hub_magmax.cli.options import RecipeOptions, changed_recipe, faults_option, from_cache_option
from hub_magmax.cli.terminal import Answer, progress, say, verb, wrote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hub_magmax.training.finetuning import Trained


@verb
@changed_recipe
@from_cache_option
def finetune(asked: RecipeOptions) -> Answer:
    """Train the checkpoints of RECIPE's tasks that are missing.

    `training` of RECIPE names each task's examples and says how it is trained. A checkpoint that is there
    stays as it is, and an interrupted training goes on after its last stored step. With `evaluation`, what a
    sequence forgets is measured, and drawn beside RECIPE.

    \b
    Examples:
      hub-magmax finetune recipe.yaml
      hub-magmax finetune recipe.yaml --set training.epochs=2
    """
    from hub_magmax.cli.recipe_and_lock import files_beside, read_recipe
    from hub_magmax.processes import find_processes
    from hub_magmax.training.finetuning import finetune as do_finetune
    from hub_magmax.training.forgetting import FILES, write_forgetting

    found, processes = read_recipe(asked), find_processes(say)
    place = files_beside(asked, found)
    processes.first_decides(lambda: place.check(FILES))
    made = do_finetune(found, processes=processes, report=say, progress=progress)
    if not processes.is_first:
        return Answer({}, "")
    text = _table(made.tasks)
    if made.forgetting is not None:
        files = write_forgetting(made.forgetting, place)
        text += f"\n\n{made.forgetting.table()}\n{wrote(files)}"
    return Answer(made.to_dict(), text)


def _table(trained: Sequence[Trained]) -> str:
    """Return a line for each task: its checkpoint, whether it is new, and how its losses went."""
    from hub_magmax.text import aligned

    rows = [(one.task, one.model, "trained" if one.is_new else "was there", _losses(one)) for one in trained]
    return "\n".join(aligned(rows, [True] * 4))


def _losses(one: Trained) -> str:
    if not one.loss:
        return ""
    told = f"loss {one.loss[0]:.4g} in the first steps, {one.loss[-1]:.4g} in the last"
    if not one.held_out:
        return told
    best = one.held_out["best_step"]
    return f"{told}; {dict(one.held_out['loss'])[best]:.4g} held out, after step {best:,}"


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
