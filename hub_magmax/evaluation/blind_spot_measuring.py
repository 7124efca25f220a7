"""Measurement of blind spots: base model, own checkpoints and merged model answer in many chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.blind_spots import BlindSpots, Reached, Solved
from hub_magmax.evaluation.chains import GREEDY, Chain, ChainProtocol, ChainRunner, Item
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import Evaluator, columns_of, evaluator_of
from hub_magmax.evaluation.evaluators.causal import Question, Text
from hub_magmax.evaluation.evaluators.likelihoods import prompt_tokens
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.scores import MERGED
from hub_magmax.evaluation.scoring import Examples, load_evaluation_data
from hub_magmax.processes import refuse_several
from hub_magmax.recipe.arguments import checked, opened
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.loading import RecipeLike, as_recipe
from hub_magmax.recipe.lockfile import Lock, LockLike, as_lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import ProgressBar, Report, step, unseen

if TYPE_CHECKING:
    from torch.nn import Module

Advance = Callable[[int], None] | None

#: Evaluators of causal language models, whose examples have prompts and right answers.
_EVALUATORS = ("log-likelihood", "multiple-choice")


@checked
def blindspots(
    recipe: RecipeLike,
    lock: LockLike,
    merged: Path | str,
    *,
    protocol: ChainProtocol | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> BlindSpots:
    """Find items that samples never solve, and those that deterministic chains solve at equal compute.

    Base model and merged model answer the prompts of all tasks, and each task's own checkpoint those of its
    task. Grafts are run where the greedy chain fails, and fresh samples where all samples do.

    Args:
        recipe: Its `evaluation` names an evaluator of causal language models, and data with prompts.
        lock: Pins the checkpoints and the data.
        merged: Folder (or repository id) of the merged model.
        protocol: How chains are made; by default with the recipe's seed.
        report: Called with a line before each model.
        progress: Called with the number of chains, what is done and the unit; opens what is called with the
            chains that were run, or need not be.

    Raises:
        EvaluationError: If the recipe names no such evaluator or data, or a model has no blocks.
        ArgumentError: If the protocol names a layer that a model lacks.
        DistributedError: If a launcher started several processes.
    """
    refuse_several("a measurement of blind spots")
    recipe, lock = as_recipe(recipe), as_lock(lock)
    spec, evaluator = _evaluation(recipe)
    protocol = protocol or ChainProtocol(seed=recipe.seed, batch_size=spec.batch_size)
    examples = load_evaluation_data(recipe, lock)
    loading = Loading(recipe, lock, evaluator, report=report, purpose="blind spots")
    cells = _cells(spec, lock)
    places = {**model_places(recipe, lock), MERGED: ModelPlace(str(merged))}
    k = len(protocol.deterministic)
    total = 3 * k * sum(len(examples[task]) for tasks in cells.values() for task in tasks)
    found: list[Reached] = []
    with opened(progress, total, "running chains", "chains") as advance:
        for name, tasks in cells.items():
            report(f"asking {name}")
            with step(f"loading {name}"):
                runner = ChainRunner(loading.load(name, places[name]), protocol)
            for number, task in enumerate(tasks):
                with about_data(recipe, spec.data[task]):
                    items = [*items_of(evaluator, runner.model, task, examples[task], spec.data[task])]
                    if number == 0:
                        _check_batches(runner, items[0], report)
                    found.append(measure(runner, name, items, advance))
            del runner  # before the next model is loaded
    return BlindSpots(tuple(found), protocol, spec.digest)


def _cells(spec: Evaluation, lock: Lock) -> dict[str, list[str]]:
    """Return the tasks on which each model is asked: all, or its own."""
    own = {task: [task] for task in lock.tasks if task in spec.tasks}
    return {"base_model": [*spec.tasks], **own, MERGED: [*spec.tasks]}


def _evaluation(recipe: Recipe) -> tuple[Evaluation, Evaluator]:
    """Return the recipe's evaluation and its evaluator, if that is one of causal language models."""
    spec = recipe.evaluation
    name = spec.evaluator.name if spec else None
    if spec is None or name not in _EVALUATORS:
        raise EvaluationError(
            f"its evaluator is {name}" if name else "it has no `evaluation`",
            where="recipe",
            expected=f"{' or '.join(_EVALUATORS)}, of which examples have prompts and right answers",
            hint="Write one, with data of prompts, in a copy of the recipe.",
        )
    return spec, evaluator_of(spec)


def items_of(
    evaluator: Evaluator, model: LoadedModel, task: str, examples: Examples, data: Data
) -> Iterator[Item]:
    """Yield the questions of a task, as a model reads them.

    Raises:
        EvaluationError: If one has no prompt.
    """
    index = 0
    for batch in evaluator.encode(model, examples, columns_of(data), 64):
        for example in batch:
            assert isinstance(example, Text | Question)
            answer = example.answer if isinstance(example, Text) else example.answers[example.right]
            if not example.prompt.strip():
                raise EvaluationError(
                    "there is no prompt, which chains would go on from",
                    where=f"{task}, example {index}",
                    hint="Name the column of prompts with prompt_column, or write a template.",
                )
            yield Item(task, index, prompt_tokens(model, example.prompt.rstrip(" ")), answer.strip())
            index += 1


def measure(runner: ChainRunner, name: str, items: Sequence[Item], advance: Advance = None) -> Reached:
    """Run all chains of a model on the items of a task.

    Args:
        runner: Of the model.
        name: Of the model, in the results.
        items: At least one.
        advance: Called with the number of chains that are done.
    """
    blocks, number = runner.blocks(items[0])
    k = len(runner.protocol.deterministic)

    def solved(chains: Sequence[Chain], chosen: Sequence[int]) -> list[Solved]:
        found = _run(runner, blocks[number], items, chains, chosen, advance)
        if advance is not None and (left := len(chains) * (len(items) - len(chosen))):
            advance(left)
        return found

    every = range(len(items))
    greedy, *samples = solved([GREEDY, *range(k)], every)
    wrong = [item for item in every if greedy[item] == "0"]
    grafts = solved(runner.protocol.grafts, wrong)
    stratum = [item for item in every if all(sample[item] == "0" for sample in samples)]
    fresh = solved(range(k, 2 * k), stratum)
    deterministic = dict(zip(runner.protocol.deterministic, [greedy, *grafts], strict=True))
    return Reached(name, items[0].task, number, len(blocks), deterministic, tuple(samples), tuple(fresh))


def _check_batches(runner: ChainRunner, item: Item, report: Report) -> None:
    """Say so where a model's greedy answer depends on what else is in its batch.

    Rounding can do that where tokens are nearly as likely, and so does an error of a model's cache.
    """
    blocks, number = runner.blocks(item)
    chains: list[Chain] = [GREEDY, *range(min(runner.protocol.batch_size, 4) - 1)]
    together = runner.texts(blocks[number], [(item, chain) for chain in chains])
    if together[0] != runner.texts(blocks[number], [(item, GREEDY)])[0]:
        report(
            f"{runner.model.name} answers otherwise in a batch than alone: with evaluation.batch_size 1 each "
            "chain is run alone"
        )


def _run(
    runner: ChainRunner,
    block: Module,
    items: Sequence[Item],
    chains: Sequence[Chain],
    chosen: Sequence[int],
    advance: Advance,
) -> list[Solved]:
    """Return for each chain whether it solves the chosen items."""
    rows: list[tuple[Item, Chain]] = [(items[item], chain) for item in chosen for chain in chains]
    found = iter(runner.answers(block, rows, advance))
    letters = [["-"] * len(items) for _ in chains]
    for item in chosen:
        for own in letters:
            own[item] = str(int(next(found)))
    return ["".join(own) for own in letters]
