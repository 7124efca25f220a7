"""Targets of the experiments: mixtures of a few tasks in known parts, drawn from the test examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Shares of the tasks in a target, in whole parts, so that counts are exact: (4, 1) is (.8, .2).
MIXTURES = ((1, 1), (4, 1), (1, 1, 1), (2, 2, 1), (3, 1, 1))


@dataclass(frozen=True)
class Protocol:
    """The measurements that every family gets.

    Attributes:
        mixtures: In whole parts.
        draws: Targets per mixture.
        largest: Examples that a target has at most.
        scalings: Tried for every method alike.
        ratios: Of the geometric schedules.
        sizes: Target examples per task in the sample-size ablation, ascending.
        size_draws: Targets per mixture in it.
        subsets: Choices of tasks for each number of tasks in the target.
        fixed: The scaling coefficient of everything that is not tuned.
    """

    mixtures: tuple[tuple[int, ...], ...] = MIXTURES
    draws: int = 5
    largest: int = 150
    scalings: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
    ratios: tuple[float, ...] = (0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
    sizes: tuple[int, ...] = (1, 5, 10, 20)
    size_draws: int = 1
    subsets: int = 3
    fixed: float = 0.5


@dataclass(frozen=True)
class Target:
    """Test examples of a few tasks.

    Attributes:
        mixture: Parts of the tasks.
        tasks: Their numbers, from zero, in the order of the parts.
        rows: Test examples in random order; the first `num_meta` are the meta sample.
        num_meta: A tenth of them.
    """

    mixture: tuple[int, ...]
    tasks: tuple[int, ...]
    rows: tuple[int, ...]
    num_meta: int

    @property
    def meta(self) -> tuple[int, ...]:
        """Return the examples that estimate the preference and choose."""
        return self.rows[: self.num_meta]

    @property
    def held_out(self) -> tuple[int, ...]:
        """Return the examples that are scored."""
        return self.rows[self.num_meta :]

    def shares(self, num_tasks: int) -> tuple[float, ...]:
        """Return the share of every task."""
        found = [0.0] * num_tasks
        for task, part in zip(self.tasks, self.mixture, strict=True):
            found[task] = part / sum(self.mixture)
        return tuple(found)


def draw_targets(owners: np.ndarray, protocol: Protocol, seed: int) -> list[Target]:
    """Draw targets, each as large as its mixture, the test examples and `protocol.largest` allow.

    Mixtures of more tasks than there are give no target.

    Args:
        owners: Number of the task of every test example.
        protocol: Mixtures and draws.
        seed: Of all draws.
    """
    rng = np.random.default_rng(seed)
    num_tasks = int(owners.max()) + 1
    fitting = [mixture for mixture in protocol.mixtures if len(mixture) <= num_tasks]
    return [
        _draw(owners, mixture, protocol.largest, rng) for mixture in fitting for _ in range(protocol.draws)
    ]


def _draw(owners: np.ndarray, mixture: tuple[int, ...], largest: int, rng: np.random.Generator) -> Target:
    tasks = rng.choice(int(owners.max()) + 1, len(mixture), replace=False)
    pools = [rng.permutation(np.flatnonzero(owners == task)) for task in tasks]
    unit = min(
        largest // sum(mixture), *(len(pool) // part for pool, part in zip(pools, mixture, strict=True))
    )
    rows = np.concatenate([pool[: part * unit] for pool, part in zip(pools, mixture, strict=True)])
    return Target(
        mixture,
        tuple(tasks.tolist()),
        tuple(rng.permutation(rows).tolist()),
        max(1, round(len(rows) / 10)),
    )


def draw_subsets(num_tasks: int, protocol: Protocol, seed: int) -> list[tuple[int, ...]]:
    """Return sets of 1, 2, … tasks: all sets of a size, or `protocol.subsets` of them at random."""
    rng = np.random.default_rng([seed, 1])
    found: list[tuple[int, ...]] = []
    for size in range(1, num_tasks + 1):
        drawn: dict[tuple[int, ...], None] = {}
        for _ in range(20 * protocol.subsets):
            chosen = sorted(rng.choice(num_tasks, size, replace=False).tolist())
            drawn.setdefault(tuple(chosen))
        found += list(drawn)[: protocol.subsets]
    return found
