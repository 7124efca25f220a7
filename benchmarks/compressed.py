"""What merged models lose by rounded weights, and by a task vector of low rank.

    python -m benchmarks.compressed --data sentiment --folder FOLDER --encoder MINILM --source SOURCE --write
    python -m benchmarks.compressed --data digits --folder FOLDER --write
    python -m benchmarks.compressed --render        # the table of docs/quantisation.md, from what is stored

Checkpoints are those of `benchmarks.continual` in FOLDER, learned where they lack. Every method merges under
the uniform preference with its own λ, and is scored on all test examples: as it is; with the weights of its
linear layers rounded row by row; and with the merged task vector of every matrix cut to its largest singular
values, which is all that an adapter of that rank could hold. The unit of the intervals is the seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.continual.formats import difference, per_cent
from benchmarks.continual.measuring import recipe_of
from benchmarks.continual.packaged import packaged_family
from benchmarks.continual.significance import paired
from benchmarks.continual.sources import Family, digits
from benchmarks.page_tables import replace_tables, table
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators import columns_of, evaluator_of
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.evaluation.rounding import rounded_model
from hub_magmax.files import write_text
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.methods.spectra import low_rank
from hub_magmax.pipeline import lock
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Method

RESULTS = Path(__file__).parent / "results" / "compressed.json"
PAGE = Path(__file__).parents[1] / "docs" / "quantisation.md"

METHODS = ("average", "tunable_magmax", "ties", "agreement")
BITS = (8, 4, 3)
RANKS = (64, 16, 4)

#: Scores of a model by what was done to it; `whole` is nothing.
WHOLE = "whole"
FORMS = (WHOLE, *(f"int{bits}" for bits in BITS), *(f"rank {rank}" for rank in RANKS))

#: Tasks of each data set.
NUM_TASKS = {"digits": 5, "definitions": 5, "sentiment": 4, "languages": 6}

Weights = Mapping[str, Tensor]


def cut(base: Weights, merged: Weights, rank: int) -> dict[str, Tensor]:
    """Return merged weights whose matrices differ from the base model's by a matrix of a rank at most.

    Tensors of other dimensions stay as they are, as beside an adapter that holds them whole.
    """

    def tensor(name: str, value: Tensor) -> Tensor:
        if value.dim() != 2 or torch.equal(value, base[name]):
            return value
        found = low_rank(value.double() - base[name].double(), min(rank, *value.shape))
        return (base[name].double() + found.left @ found.right).to(value.dtype)

    return {name: tensor(name, value) for name, value in merged.items()}


def measured(family: Family) -> list[dict[str, Any]]:
    """Return a row for each method: its accuracy in every form, on all test examples."""
    recipe, name = recipe_of(family), family.evaluator["name"]
    locked, evaluator = lock(recipe), evaluator_of(recipe.evaluation or Evaluation(tasks={}))
    kinds = evaluator.model_class, evaluator.processor_class
    loaded = load_model(ModelPlace(str(family.base_model)), *kinds, name)
    batches = list(evaluator.encode(loaded, family.test, columns_of(family.columns), 256))

    def accuracy(model: LoadedModel) -> float:
        outcomes = evaluator.outcomes(model, batches)
        return sum(outcome.score for outcome in outcomes) / len(outcomes)

    with ExitStack() as stack:
        merger = stack.enter_context(InMemoryMerger(recipe, locked))
        uniform = (1 / len(family.tasks),) * len(family.tasks)
        base = merger.merge(locked_method(Method(name="average")), uniform).weights(0.0)
        return [
            {"family": family.name, "seed": family.seed, "method": name, "accuracy": found}
            for name in METHODS
            for found in [_forms(loaded, base, _merged(merger, name, uniform), accuracy)]
        ]


def _merged(merger: InMemoryMerger, name: str, weights: tuple[float, ...]) -> Weights:
    method = locked_method(Method(name=name))
    return merger.merge(method, weights).weights(method["scaling"])


def _forms(
    loaded: LoadedModel, base: Weights, merged: Weights, accuracy: Callable[[LoadedModel], float]
) -> dict[str, float]:
    """Return the accuracy of merged weights in each of the `FORMS`."""
    whole = loaded.with_weights(merged)
    found = {WHOLE: accuracy(whole)}
    found |= {f"int{bits}": accuracy(rounded_model(whole, bits)) for bits in BITS}
    return found | {f"rank {rank}": accuracy(loaded.with_weights(cut(base, merged, rank))) for rank in RANKS}


def losses(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by method and form the points lost to the whole merged model, tested over seeds."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row["accuracy"] for row in rows if row["method"] == name]
        found[name] = {
            form: paired([one[WHOLE] - one[form] for one in own]).to_dict() for form in FORMS if form != WHOLE
        }
    return found


def tables(stored: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the table of the page: accuracy of each merged model, and the points that each form loses."""
    body = []
    for data, rows in stored.items():
        for name, forms in losses(rows).items():
            own = [row["accuracy"][WHOLE] for row in rows if row["method"] == name]
            cells = [difference(forms[form]) for form in FORMS if form != WHOLE]
            body.append([f"{data}, {len(own)} seeds", f"`{name}`", per_cent(sum(own) / len(own)), *cells])
    return table(["data", "method", "accuracy", *FORMS[1:]], body, left=2)


def render() -> None:
    """Write the table into the page, in place of the one that is there."""
    found = tables(json.loads(RESULTS.read_text(encoding="utf-8")))
    replace_tables(PAGE, r"\| data \| method \| accuracy \|.*\n(\|.*\n)+", found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=NUM_TASKS)
    parser.add_argument("--folder", type=Path, default=Path("experiments"), help="checkpoints")
    parser.add_argument("--encoder", type=Path, help="packaged texts: all-MiniLM-L6-v2")
    parser.add_argument("--source", type=Path, help="packaged texts: as benchmarks.continual takes it")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="store the numbers, and write the table")
    parser.add_argument("--render", action="store_true", help="write the table from the stored numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.data:
        rows = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            rows += measured(family_of(options, seed))
            print(json.dumps(rows[-len(METHODS) :]), flush=True)
        if options.write:
            stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
            write_text(RESULTS, json.dumps(stored | {options.data: rows}, indent=1) + "\n")
    if options.write or options.render:
        render()


def family_of(options: argparse.Namespace, seed: int) -> Family:
    """Return a family of checkpoints as `benchmarks.continual` makes it."""
    num_tasks = NUM_TASKS[options.data]
    if options.data == "digits":
        return digits(options.folder, num_tasks, seed)
    folder = options.folder / options.data
    return packaged_family(options.data, options.source, options.encoder, folder, num_tasks, seed)


if __name__ == "__main__":
    main()
