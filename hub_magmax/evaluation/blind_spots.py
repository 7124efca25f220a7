"""Blind spots of models: items that sampled chains never solve, and deterministic chains at equal compute.

Items that no sampled chain solves make up the stratum S0; there R_k is the share that one of the first k
deterministic chains solves. Items of S0 were chosen for having failed, so that any second attempt solves
some: as many fresh samples on the same stratum are the control, which the paper lacks.

Source: arXiv:2606.19636.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from hub_magmax.evaluation.chains import GREEDY, ChainProtocol
from hub_magmax.evaluation.intervals import Difference, paired_difference, wilson_interval
from hub_magmax.evaluation.scores import MERGED
from hub_magmax.evaluation.tables import Cell, Format, Measured, Table, Tabular
from hub_magmax.files import read_result

#: File of the results, beside the merged model or the recipe.
BLIND_SPOTS_NAME = "blind_spots.json"

#: How an item is reached: by a sample, by a deterministic chain alone (greedy too), or not.
SAMPLED, GRAFT_ONLY, UNREACHED = "sampled", "graft-only", "unreached"

#: A letter for each item: 1 where the chain solved it, 0 where it did not, and - where it was not run, since
#: nothing depends on it.
Solved = str

_BY_CHANCE = (
    "Items that samples of the model before reached, and that the merged model reaches by grafts alone (by a "
    "deterministic chain, greedy too, and no sample) or by nothing. By chance: how many samples of the model "
    "before would miss, and as many newly reach, if they were drawn again."
)


@dataclass(frozen=True)
class Reached:
    """Chains of one model on the items of one task.

    Attributes:
        model: `base_model`, `merged`, or the task, whose own checkpoint it is.
        task: Whose items.
        block: Whose output was overwritten, from 0.
        num_blocks: Of the model.
        deterministic: By name, greedy first. Grafts are run where the greedy chain fails.
        samples: On all items.
        fresh: As many samples with other draws, on the stratum.

    Raises:
        ValueError: If chains are not of the same items.
    """

    model: str
    task: str
    block: int
    num_blocks: int
    deterministic: Mapping[str, Solved]
    samples: tuple[Solved, ...]
    fresh: tuple[Solved, ...]

    def __post_init__(self) -> None:
        chains = (*self.deterministic.values(), *self.samples, *self.fresh)
        if {len(solved) for solved in chains} != {self.num_items} or not {*"".join(chains)} <= {*"01-"}:
            raise ValueError("chains are not of the same items")

    @property
    def num_items(self) -> int:
        return len(self.deterministic[GREEDY])

    @property
    def stratum(self) -> tuple[int, ...]:
        """S0: numbers of the items that no sample solves."""
        return tuple(item for item in range(self.num_items) if not _any(self.samples, item))

    def recovered(self, num_chains: int) -> int:
        """Return how many items of the stratum one of the first deterministic chains solves."""
        chains = [*self.deterministic.values()][:num_chains]
        return sum(_any(chains, item) for item in self.stratum)

    @property
    def resampled(self) -> int:
        """How many items of the stratum one of the fresh samples solves."""
        return sum(_any(self.fresh, item) for item in self.stratum)

    @property
    def difference(self) -> Difference | None:
        """Of deterministic chains and fresh samples, item by item of the stratum; None of an empty one."""
        if not self.stratum:
            return None
        chains = [*self.deterministic.values()]
        first, second = ([float(_any(own, item)) for item in self.stratum] for own in (chains, self.fresh))
        return paired_difference(first, second)

    def fixed(self, kind: str) -> frozenset[int]:
        """Return the fix set of a graft: items on which the greedy chain fails and the graft does not."""
        pairs = zip(self.deterministic[GREEDY], self.deterministic[kind], strict=True)
        return frozenset(item for item, pair in enumerate(pairs) if pair == ("0", "1"))

    @property
    def overlaps(self) -> dict[tuple[str, str], float | None]:
        """Jaccard similarity of every two fix sets; None where both are empty."""
        kinds = [kind for kind in self.deterministic if kind != GREEDY]
        return {(a, b): jaccard(self.fixed(a), self.fixed(b)) for a, b in combinations(kinds, 2)}

    def state(self, item: int) -> str:
        """Return how an item is reached."""
        if _any(self.samples, item):
            return SAMPLED
        return GRAFT_ONLY if _any([*self.deterministic.values()], item) else UNREACHED


def _any(chains: Sequence[Solved], item: int) -> bool:
    return any(chain[item] == "1" for chain in chains)


def jaccard(first: frozenset[int], second: frozenset[int]) -> float | None:
    """Return the share of the items of either set that are in both."""
    return len(first & second) / len(first | second) if first | second else None


def share(successes: int, trials: int) -> Measured | None:
    """Return a share with its 95 % interval (Wilson); None of nothing."""
    return Measured(successes / trials, *wilson_interval(successes, trials)) if trials else None


@dataclass(frozen=True)
class Moves:
    """Items that a merge moved, from one model to the merged one.

    Attributes:
        task: Whose items.
        before: Name of the model before.
        counts: Items by how they were reached and how they are.
        by_chance: How many items would leave, and enter, what is sampled, if the model before were sampled
            again: as many of its S0 as fresh samples solve. Both sets of samples are alike, so that as many
            are expected to be solved by the first alone as by the second alone.
    """

    task: str
    before: str
    counts: Mapping[tuple[str, str], int]
    by_chance: int

    def count(self, before: str, after: str) -> int:
        return self.counts.get((before, after), 0)

    @property
    def num_sampled(self) -> int:
        return sum(count for (before, _), count in self.counts.items() if before == SAMPLED)


def moves(before: Reached, after: Reached) -> Moves:
    """Compare how the same items are reached by two models."""
    pairs = ((before.state(item), after.state(item)) for item in range(before.num_items))
    return Moves(before.task, before.model, Counter(pairs), before.resampled)


@dataclass(frozen=True, repr=False)
class BlindSpots(Tabular):
    """Blind spots of base model, own checkpoints and merged model.

    Attributes:
        reached: A part for each model and task.
        protocol: How chains were made.
        evaluation: Digest of the recipe's evaluation.
    """

    reached: tuple[Reached, ...]
    protocol: ChainProtocol
    evaluation: str = ""

    @property
    def num_chains(self) -> int:
        """How many chains of each sort there are."""
        return len(self.protocol.deterministic)

    def get(self, model: str, task: str) -> Reached | None:
        return next((own for own in self.reached if (own.model, own.task) == (model, task)), None)

    @property
    def moves(self) -> tuple[Moves, ...]:
        """From base model, and from the task's own checkpoint, to the merged model, by task."""
        found = []
        for after in self.reached:
            if after.model == MERGED:
                pairs = (self.get(before, after.task) for before in ("base_model", after.task))
                found += [moves(before, after) for before in pairs if before is not None]
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self, form: Format = "text") -> str:
        """Return a row for each model and task, and what the merge moved; CSV has the first alone."""
        tables = [self.as_table()] if form == "csv" else [self.as_table(), self.moved()]
        return "\n\n".join(table.write(form) for table in tables if table.rows)

    def as_table(self) -> Table:
        k = self.num_chains
        head = ("model", "task", "items", "greedy", "S0", "R_1", f"R_{k}", f"fresh R_{k}", "p")
        rows = tuple(self._row(own) for own in self.reached)
        overlaps = tuple(line for own in self.reached for line in _overlap_lines(own))
        return Table(head, rows, (*overlaps, self.settings), measured=("greedy", *head[5:8]))

    def moved(self) -> Table:
        """Return items that the merge moved, of those that samples reached before or reach now."""
        head = (
            *("task", "from", "sampled", "now grafts alone", "now nothing", "by chance"),
            *("newly sampled from grafts alone", "from nothing"),
        )
        rows = tuple(
            (
                own.task,
                own.before,
                own.num_sampled,
                share(own.count(SAMPLED, GRAFT_ONLY), own.num_sampled),
                share(own.count(SAMPLED, UNREACHED), own.num_sampled),
                own.by_chance,
                own.count(GRAFT_ONLY, SAMPLED),
                own.count(UNREACHED, SAMPLED),
            )
            for own in self.moves
        )
        return Table(head, rows, (_BY_CHANCE,))

    def _row(self, own: Reached) -> tuple[Cell, ...]:
        num = len(own.stratum)
        greedy = own.deterministic[GREEDY].count("1")
        return (
            own.model,
            own.task,
            own.num_items,
            share(greedy, own.num_items),
            num,
            share(own.recovered(1), num),
            share(own.recovered(self.num_chains), num),
            share(own.resampled, num),
            own.difference.p_value if own.difference else None,
        )

    @property
    def settings(self) -> str:
        """How it was measured, in words."""
        p, k = self.protocol, self.num_chains
        blocks = dict.fromkeys(f"{own.block} of {own.num_blocks}" for own in self.reached)
        return (
            f"S0: items that none of {k} samples solves (temperature {p.temperature:g}, top-p {p.top_p:g}). "
            f"R_{k}: share of S0 that {k} deterministic chains solve: greedy, and grafts "
            f"{', '.join(p.grafts)} at position {p.position} after block {', '.join(blocks)} (from 0). "
            f"Fresh R_{k}: share that {k} other samples solve, the control; p is of no difference between "
            "both (McNemar). Intervals are 95 % (Wilson). Where grafts are not told, "
            "greedy solves what they do."
        )


def _overlap_lines(own: Reached) -> Iterator[str]:
    sizes = {kind: len(own.fixed(kind)) for kind in own.deterministic if kind != GREEDY}
    told = ", ".join(f"{kind} {size}" for kind, size in sizes.items())
    if not any(sizes.values()):
        return
    known = {pair: value for pair, value in own.overlaps.items() if value is not None}
    line = f"{own.model} on {own.task}: items that grafts solve and greedy does not: {told}"
    if known:
        pair = max(known, key=lambda pair: known[pair])
        line += f"; largest overlap (Jaccard) {known[pair]:.2f}, of {pair[0]} and {pair[1]}"
    yield line + "."


def read_blind_spots(path: Path) -> BlindSpots:
    """Return the blind spots stored in `path`.

    Raises:
        OutputError: If it holds something else.
    """
    return read_result(path, BlindSpots, "a list of blind spots", "Run `hub-magmax blindspots` again.")
