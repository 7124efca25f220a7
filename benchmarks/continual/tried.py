"""Rules under a preference that were tried against `ties` and `agreement`, measured on seeds for choosing.

    python -m benchmarks.continual.tried --data digits --folder FOLDER --seeds 0 1
    python -m benchmarks.continual.tried --data definitions --folder FOLDER --encoder MINILM --source SOURCE
    python -m benchmarks.continual.tried --render      # docs/experiments_tried.md, from what is stored

`between` has `average`, `agreement` and `ties` as special cases, and what lies between them. A rule that is
measured already for a family is not measured again. Two targets per mixture; the same λ for all, up to 1.4,
since the best λ on sentiment is beyond 1.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from benchmarks.continual import measuring, results, rows
from benchmarks.continual.by_task import by_target
from benchmarks.continual.claims import Measure
from benchmarks.continual.formats import signed
from benchmarks.continual.measuring import Bench
from benchmarks.continual.packaged import PROTOCOL, packaged_family
from benchmarks.continual.sources import digits
from benchmarks.page_tables import table
from hub_magmax.files import write_text
from hub_magmax.methods.registry import merge_method, preferred
from hub_magmax.recipe.schema import Method

if TYPE_CHECKING:
    from benchmarks.continual.sources import Family

RESULTS = results.ROOT / "benchmarks" / "results" / "experiments" / "tried.json"
PAGE = results.ROOT / "docs" / "experiments_tried.md"

#: Scaling coefficients of every rule, and targets of every mixture.
SCALINGS, DRAWS = (0.5, 0.7, 1.0, 1.4), 2

#: Seeds for choosing, and the number of tasks.
SEEDS = {"definitions": (1, 2, 3), "sentiment": (10, 11, 12), "digits": (0, 1, 2)}
NUM_TASKS = {"definitions": 5, "sentiment": 4, "digits": 5}

#: Heads of the columns of the page.
MEASURES: Mapping[Measure, str] = {"mean": "", "worst": ", worst task"}
#: Data set and measure.
Column = tuple[str, Measure]

Share = Annotated[float, Field(ge=0, le=1)]

#: Options with which `between` is `ties` with its defaults.
TIES = {"flattening": 1.0, "density": 0.2, "opposing": 0.0, "lowering": 0.0, "restoring": 1.0}


@merge_method("tried_between", source="hub_magmax", scaling=0.8, uses=preferred)
def between(
    vectors: Tensor,
    *,
    preference: tuple[float, ...],
    flattening: Share = 0.25,
    density: Annotated[float, Field(gt=0, le=1)] = 1.0,
    opposing: Share = 1.0,
    lowering: Share = 1.0,
    restoring: Share = 0.0,
    lengths: Annotated[float, Field(ge=-1, le=1)] = 0.0,
) -> Tensor:
    """Merge one tensor by a rule with `average`, `agreement` and `ties` among its special cases.

    Weights are the preference to the power `flattening`, divided by their sum. What a task changed, trimmed
    to its largest `density` and brought to a common length (by the power `lengths`), is weighted; E and O are
    the sums of the magnitudes of the larger and of the opposing side of an element, and W the weight of the
    tasks of the larger one. The element is E - `opposing` · O, with the sign of the larger side, times
    ((E - O) / (E + O)) to the power `lowering`, divided by W to the power `restoring`.

    Args:
        vectors: Task vectors, of the shape (tasks, *shape of the tensor).
        preference: Non-negative, sums to 1.
        flattening: 1 for the preference itself, 0 for equal weights of the tasks that have some.
        density: Share of the elements of a task that count.
        opposing: 1 for the mean, 0 for the larger side alone.
        lowering: 1 as `agreement` does.
        restoring: 1 as `ties` does: what one task alone changes is not less for that.
        lengths: 1 for task vectors of the same length in each tensor.
    """
    flattened, used = vectors.reshape(len(vectors), -1), np.flatnonzero(preference)
    flat = torch.tensor([weight**flattening if weight else 0.0 for weight in preference])
    weights = flat / flat.sum()
    norms = flattened.norm(dim=1).clamp(min=1e-30)
    mean_norm = norms[used].mean()
    kept = _trimmed(flattened, density) * (weights * (mean_norm / norms) ** lengths)[:, None]
    positive, negative = kept.clamp(min=0).sum(0), (-kept).clamp(min=0).sum(0)
    larger, smaller = torch.maximum(positive, negative), torch.minimum(positive, negative)
    sign = torch.sign(positive - negative)
    elected = (weights[:, None] * (torch.sign(kept) == sign)).sum(0).clamp(min=1e-30)
    agreeing = (larger - smaller) / (larger + smaller).clamp(min=1e-30)
    merged = sign * (larger - opposing * smaller) * agreeing**lowering / elected**restoring
    return merged.reshape(vectors.shape[1:])


@merge_method("tried_half", source="hub_magmax", scaling=0.8, uses=preferred)
def half(vectors: Tensor, *, preference: tuple[float, ...]) -> Tensor:
    """Return the mean of what `agreement` and `ties` make of the task vectors, both with their defaults."""
    merged: Tensor = between(vectors, preference=preference) + between(vectors, preference=preference, **TIES)
    return merged / 2


def _trimmed(vectors: Tensor, density: float) -> Tensor:
    """Return task vectors with zeros for all but the largest magnitudes, and those that tie with them."""
    size = vectors.shape[1]
    dropped = size - max(1, math.ceil(round(density * size, 6)))
    if not dropped:
        return vectors
    least = vectors.abs().kthvalue(dropped + 1, dim=1, keepdim=True).values
    return torch.where(vectors.abs() >= least, vectors, 0.0)


@merge_method("tried_projections", source="hub_magmax", scaling=0.8, uses=preferred)
def projections(vectors: Tensor, *, preference: tuple[float, ...]) -> Tensor:
    """Return the shortest vector that goes as far as every task does in the task's own direction.

    It is Σ c_t τ_t with ⟨Σ c_s τ_s, τ_t⟩ = |τ_t|² for every task with a weight, which matters no further.
    """
    used = [task for task in preferred(preference) if vectors[task].any()]
    if not used:
        return torch.zeros_like(vectors[0])
    chosen = vectors[used].reshape(len(used), -1).double()
    products = chosen @ chosen.T
    factors = torch.linalg.lstsq(products, products.diag()[:, None]).solution
    merged: Tensor = (factors.T @ chosen).reshape(vectors.shape[1:]).float()
    return merged


def _between(**options: float) -> Method:
    return Method.model_validate({"name": "tried_between", **options})


#: What was tried, in words; the first ones are methods of the package.
RULES: Mapping[str, Method] = {
    "`ties`": Method(name="ties"),
    "`agreement`": measuring.AGREEMENT,
    "`tunable_magmax`, top-n": measuring.TOP_N,
    "`average` under w^.25": _between(lowering=0.0),
    "`agreement`, divided by the weight of the larger side, as `ties` does": _between(restoring=1.0),
    "half `agreement`, half `ties`": Method(name="tried_half"),
    "`agreement`, equal weights": _between(flattening=0.0),
    "`agreement`, trimmed to a fifth": _between(density=0.2),
    "`agreement`, trimmed to a fifth and divided by that weight": _between(density=0.2, restoring=1.0),
    "`ties` under w^.25": _between(**TIES | {"flattening": 0.25}),
    "`ties`, trimmed to a half": _between(**TIES | {"density": 0.5}),
    "`agreement`, task vectors of one length": _between(lengths=1.0),
    "`agreement`, lengths squared": _between(lengths=-1.0),
    "shortest vector with every task's projection": Method(name="tried_projections"),
}
#: Of these the others are compared with the better one.
RIVALS = ("`ties`", "`agreement`")


def measure(family: Family, data: str, words: Sequence[str]) -> None:
    """Measure rules on a family where they are not stored yet, and store each.

    Args:
        family: What is measured.
        data: Name of the data set.
        words: Rules to measure, of `RULES`.
    """
    protocol, kind = replace(PROTOCOL, draws=DRAWS, scalings=SCALINGS), family.kinds[0]
    with Bench(family, protocol) as bench:
        weights = [bench.estimator.weights(kind, target, target.meta) for target in bench.targets]
        ones = [1.0] * len(family.owners)
        facts = {
            "data": data,
            "seed": family.seed,
            "protocol": {"scalings": list(SCALINGS), "fixed": protocol.fixed},
            "targets": [{"held_out": len(target.held_out)} for target in bench.targets],
            "held_out_by_task": by_target(family.owners, bench.targets, ones),
        }
        for name in words:
            others = [one for one in read() if (one["data"], one["seed"]) != (data, family.seed)]
            known: list[Any] = next((one["rows"] for one in read() if one not in others), [])
            if all(row["method"] != name for row in known):
                row = results.condensed(bench, bench.row(RULES[name], kind, weights))
                known = [*known, row | {"method": name, "commit": results.commit()}]
                write([*others, facts | {"rows": known}])
                print(f"{data}, seed {family.seed}: {name}", flush=True)


def read() -> list[dict[str, Any]]:
    """Return what is stored, a family each."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    return found


def write(families: Sequence[Mapping[str, Any]]) -> None:
    """Store families, a line for each rule."""
    order = list(SEEDS)
    lines = []
    for one in sorted(families, key=lambda one: (order.index(one["data"]), one["seed"])):
        facts = json.dumps({key: value for key, value in one.items() if key != "rows"})[:-1]
        own = sorted(one["rows"], key=lambda row: [*RULES].index(row["method"]))
        lines.append(f'{facts}, "rows": [\n' + ",\n".join(map(json.dumps, own)) + "]}")
    write_text(RESULTS, "[" + ",\n".join(lines) + "]\n")


def family_of(options: argparse.Namespace, seed: int) -> Family:
    """Return a family for choosing, learned where it is not there yet."""
    if options.data == "digits":
        return digits(options.folder, NUM_TASKS["digits"], seed)
    folder = options.folder / options.data
    return packaged_family(
        options.data, options.source, options.encoder, folder, NUM_TASKS[options.data], seed, report=print
    )


@dataclass(frozen=True)
class Tried:
    """A rule beside `ties` and `agreement`, λ tuned, by data set and measure, over the seeds that it has.

    Attributes:
        name: In words.
        ahead: Points ahead of `ties`.
        lead: Points ahead of the better one of `RIVALS`.
        num_seeds: By data set.
        scaling: The best λ in hindsight, by data set.
    """

    name: str
    ahead: Mapping[Column, float]
    lead: Mapping[Column, float]
    num_seeds: Mapping[str, int]
    scaling: Mapping[str, float]

    @property
    def least(self) -> float:
        """The lead where it is least."""
        return min(self.lead.values())


def compared(families: Sequence[Mapping[str, Any]]) -> list[Tried]:
    """Return the rules that were measured, those on all data sets first, and the nearest to the rivals."""
    found = [tried for name in RULES if (tried := _tried(families, name)).num_seeds]
    return sorted(found, key=lambda one: (-len(one.num_seeds), -one.least))


def _tried(families: Sequence[Mapping[str, Any]], name: str) -> Tried:
    """Return what was measured of a rule, on every data set of which there is something."""
    parts = {data: own for data in SEEDS if (own := _with(families, data, name))}
    leads = {
        (data, measure): _leads(own, name, measure) for data, own in parts.items() for measure in MEASURES
    }
    return Tried(
        name,
        {column: both[0] for column, both in leads.items()},
        {column: both[1] for column, both in leads.items()},
        {data: len(own) for data, own in parts.items()},
        {data: SCALINGS[rows.hindsight(own, _key(own, name))] for data, own in parts.items()},
    )


def _with(families: Sequence[Mapping[str, Any]], data: str, name: str) -> list[Mapping[str, Any]]:
    """Return the families of a data set that have a rule and its rivals."""
    wanted = {name, *RIVALS}
    return [
        one for one in families if one["data"] == data and wanted <= {row["method"] for row in one["rows"]}
    ]


def _key(families: rows.Results, name: str) -> rows.Key:
    return name, next(kind for method, kind in rows.keys(families) if method == name)


def _leads(families: rows.Results, name: str, measure: Measure) -> tuple[float, float]:
    """Return how far a rule is ahead of `ties`, and of the better one of the rivals, on the same seeds."""
    own, *rivals = (
        rows.mean(rows.by_seed(families, _key(families, one), "tuned", measure)) for one in (name, *RIVALS)
    )
    return own - rivals[0], own - max(rivals)


def rules_table(found: Sequence[Tried]) -> str:
    """Return the table of the rules."""
    columns = [(data, measure) for data in SEEDS for measure in MEASURES]
    heads = [f"{data}{MEASURES[measure]}" for data, measure in columns]
    body = [
        [
            one.name,
            signed(one.least),
            *(signed(one.ahead[column]) if column in one.ahead else "" for column in columns),
            ", ".join(f"{one.scaling[data]:g}" if data in one.scaling else "?" for data in SEEDS),
            ", ".join(str(one.num_seeds.get(data, 0)) for data in SEEDS),
        ]
        for one in found
    ]
    return table(["rule", "least lead", *heads, "best λ", "seeds"], body)


def _seeds(families: Sequence[Mapping[str, Any]], data: str) -> str:
    return f"{data} {', '.join(str(one['seed']) for one in _with(families, data, RIVALS[0]))}"


def page(families: Sequence[Mapping[str, Any]]) -> str:
    """Return the page."""
    found = compared(families)
    others = [one for one in found if one.name not in RIVALS]
    full = [one for one in others if len(one.num_seeds) == len(SEEDS)]
    winners = [one.name for one in full if one.least > 0]
    return TEXT.format(
        seeds="; ".join(_seeds(families, data) for data in SEEDS),
        scalings=", ".join(f"{scaling:g}" for scaling in SCALINGS),
        num=len(others),
        num_full=len(full),
        winners=", ".join(winners) or "none",
        first=full[0].name,
        points=f"{-100 * full[0].least:.1f}",
        table=rules_table(found),
    )


TEXT = """# Experiments: rules that were tried

Written by `python -m benchmarks.continual.tried --render` from `benchmarks/results/experiments/tried.json`.
No registered rule under a preference wins on definitions, sentiment and digits alike
([experiments.md](experiments.md)). The rules below were tried besides, on seeds for choosing: {seeds};
ten targets each. Nothing here is confirmed; definitions and sentiment from seed 15, and digits from seed 5,
are still unseen, for claims that are frozen first. λ is {scalings} for all, and tuned on the meta sample as
`compare` would; the preference is from labels, on sentiment the known shares.

**{num} rules, {num_full} of them on all three data sets; ahead of both `ties` and `agreement` in every
column: {winners}.** The nearest to it, {first}, is up to {points} points behind the better of the two.

Columns of data have points ahead of `ties` on the same seeds. `least lead` is to the better one of `ties` and
`agreement`, in the column where it is least. `best λ` is the best one for all targets in hindsight, on
definitions, sentiment and digits; `seeds` says how many of each there are. So few do not tell rules apart
that are within a point or two. A cell is empty where nothing was measured.

{table}
w^.25 is the preference to the power 1/4, divided by the sum, as `agreement` has it. `ties` divides an element
by the weight of the tasks of the elected sign, so that what one task alone changes stays whole; `agreement`
leaves it lowered by the weight of that task. Half and half is the mean of the two merged task vectors.

`python -m benchmarks.continual.tried --data DATA --folder FOLDER` measures what is not stored. What is
stored of definitions and sentiment comes from a faster loop, which is not kept; one rule of each, measured by
both, has the same counts.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", choices=[*SEEDS])
    parser.add_argument("--folder", type=Path, help="checkpoints, as `benchmarks.continual` learns them")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="by default those of the page")
    parser.add_argument("--rules", nargs="+", choices=[*RULES], default=[*RULES])
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    for seed in (options.seeds or SEEDS[options.data]) if options.data else ():
        measure(family_of(options, seed), options.data, options.rules)
    if options.render:
        write_text(PAGE, page(read()))


if __name__ == "__main__":
    main()
