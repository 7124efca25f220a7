"""Slow and obvious versions of the methods, written from their descriptions and not from the package.

Plain Python and numpy, one element at a time. Tasks are numbered from zero.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import ot

Choose = Callable[[list[int], int], list[int]]

_WORD = 2**64


def random_key(seed: int, name: str, stream: int, index: int) -> int:
    """The documented mix in unbounded integers: splitmix64 with a second key in the middle."""
    digest = hashlib.blake2b(ascii((seed, name, stream)).encode(), digest_size=16).digest()
    before, middle = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
    mixed = (index * 0x9E3779B97F4A7C15 + before) % _WORD
    mixed ^= mixed >> 30
    mixed = mixed * 0xBF58476D1CE4E5B9 % _WORD
    mixed ^= middle
    mixed ^= mixed >> 27
    mixed = mixed * 0x94D049BB133111EB % _WORD
    mixed ^= mixed >> 31
    return mixed - _WORD if mixed >= _WORD // 2 else mixed


def quotas(weights: Sequence[str | Fraction], num_elements: int) -> tuple[int, ...]:
    """Floors of n·w for exact weights; what is left goes one each to the first wanted tasks."""
    exact = [Fraction(weight) for weight in weights]
    counts = [math.floor(num_elements * weight) for weight in exact]
    left = num_elements - sum(counts)
    for task, weight in enumerate(exact):
        if weight > 0 and left > 0:
            counts[task] += 1
            left -= 1
    assert left == 0
    return tuple(counts)


def largest(magnitudes: np.ndarray, element: int, tasks: Sequence[int]) -> int:
    """The task of largest magnitude at one element, the later one where they are equal."""
    winner = tasks[0]
    for task in tasks[1:]:
        if magnitudes[task, element] >= magnitudes[winner, element]:
            winner = task
    return winner


def magmax(task_vectors: np.ndarray) -> list[int]:
    magnitudes = np.abs(task_vectors)
    return [largest(magnitudes, i, range(len(magnitudes))) for i in range(magnitudes.shape[1])]


def _wanted_magnitudes(task_vectors: np.ndarray, quotas: Sequence[int]) -> np.ndarray:
    """Step 1: a task with quota zero has its vector treated as zero."""
    return np.abs(task_vectors) * (np.array(quotas) > 0)[:, None]


def algorithm_1(
    task_vectors: np.ndarray, quotas: Sequence[int], choose: Choose
) -> tuple[list[int], list[int]]:
    """The paper's rule, step by step; `choose(items, k)` makes every draw.

    Elements that are largest in several tasks wait until wins are dropped, zeros until all else is settled.
    Returns winners and the number of unaligned elements per task.
    """
    magnitudes = _wanted_magnitudes(task_vectors, quotas)
    num_tasks, num_elements = magnitudes.shape
    tied = _tied(magnitudes)
    # Step 2.
    winner = [
        largest(magnitudes, i, range(num_tasks)) if len(tied[i]) == 1 else -1 for i in range(num_elements)
    ]
    # Step 3.
    for task in range(num_tasks - 1, 0, -1):
        for i in _surplus(winner, task, quotas, choose):
            winner[i] = largest(magnitudes, i, range(task))
    # Step 4.
    free = _surplus(winner, 0, quotas, choose)
    for i in free:
        winner[i] = -1
    free_ties = _settle_ties(magnitudes, winner, quotas, choose)
    for task in range(num_tasks - 1, 0, -1):
        short = quotas[task] - winner.count(task)
        aligned = [i for i in free if winner[i] < 0 and largest(magnitudes, i, range(1, num_tasks)) == task]
        for i in choose(aligned, short) if len(aligned) > short else aligned:
            winner[i] = task
    left = sorted(i for i in [*free, *free_ties] if winner[i] < 0)
    return winner, _fill(winner, left, quotas, choose)


def _settle_ties(
    magnitudes: np.ndarray, winner: list[int], quotas: Sequence[int], choose: Choose
) -> list[int]:
    """Give ties to tasks that share them, the last first; each takes those first that no earlier task shares.

    Returns the ties that are left.
    """
    tied, exhausted = _tied(magnitudes), list[int]()
    waiting = [i for i, tasks in enumerate(tied) if len(tasks) > 1 and magnitudes[tasks[0], i] > 0]
    for task in range(len(quotas) - 1, -1, -1):
        room = quotas[task] - winner.count(task)
        alone = [i for i in waiting if tied[i][0] == task]
        shared = [i for i in waiting if task in tied[i] and tied[i][0] < task]
        dropped = choose(alone, len(alone) - room) if len(alone) > room else []
        passed = len(shared) - max(room - len(alone), 0)
        gone = choose(shared, passed) if passed > 0 else []
        for i in (i for i in [*alone, *shared] if i not in dropped and i not in gone):
            winner[i] = task
        exhausted += dropped
        waiting = [i for i in waiting if winner[i] < 0 and i not in dropped]
    return exhausted


def _fill(winner: list[int], left: list[int], quotas: Sequence[int], choose: Choose) -> list[int]:
    """Fill short tasks at random, then with zeros in order; return the number of random ones per task."""
    unaligned = [0] * len(quotas)
    for task, quota in enumerate(quotas):
        unaligned[task] = min(quota - winner.count(task), len(left))
        for i in choose(left, unaligned[task]):
            winner[i] = task
        left = [i for i in left if winner[i] < 0]
    for task, quota in enumerate(quotas):
        for i in [i for i, owner in enumerate(winner) if owner < 0][: quota - winner.count(task)]:
            winner[i] = task
    return unaligned


def _tied(magnitudes: np.ndarray) -> list[list[int]]:
    """Per element, the tasks on which it is largest."""
    return [[int(t) for t in np.flatnonzero(column == column.max())] for column in magnitudes.T]


def _surplus(winner: list[int], task: int, quotas: Sequence[int], choose: Choose) -> list[int]:
    """The wins that a task drops."""
    wins = [i for i, owner in enumerate(winner) if owner == task]
    return sorted(choose(wins, len(wins) - quotas[task])) if len(wins) > quotas[task] else []


def algorithm_1_outcomes(task_vectors: np.ndarray, quotas: Sequence[int]) -> dict[tuple[int, ...], Fraction]:
    """Every possible result with its exact probability, by trying each draw in turn."""
    outcomes: dict[tuple[int, ...], Fraction] = {}
    pending: list[list[tuple[int, ...]]] = [[]]
    while pending:
        script = _Script(pending.pop(), pending)
        winners, _ = algorithm_1(task_vectors, quotas, script.choose)
        outcomes[tuple(winners)] = outcomes.get(tuple(winners), Fraction(0)) + script.probability
    return outcomes


class _Script:
    """Draws what is written; at its end draws the first option, and leaves the others for later."""

    def __init__(self, draws: list[tuple[int, ...]], pending: list[list[tuple[int, ...]]]) -> None:
        self.draws, self.pending = draws, pending
        self.step, self.probability = 0, Fraction(1)

    def choose(self, items: list[int], count: int) -> list[int]:
        options = list(itertools.combinations(items, count))
        self.probability /= len(options)
        if self.step == len(self.draws):
            self.pending.extend([*self.draws, option] for option in options[1:])
            self.draws.append(options[0])
        self.step += 1
        return list(self.draws[self.step - 1])


def algorithm_1_unaligned(
    task_vectors: np.ndarray, quotas: Sequence[int], winners: Sequence[int]
) -> list[int]:
    """Check that winners are a possible result of `algorithm_1`, and return their unaligned counts.

    A task that dropped elements has exactly its quota and gets none back in a later step. So where
    an element ended tells at which stage it stayed, and all stages can be replayed.
    """
    magnitudes = _wanted_magnitudes(task_vectors, quotas)
    num_tasks, num_elements = magnitudes.shape
    tied = _tied(magnitudes)
    is_zero = [magnitudes[:, i].max() == 0 for i in range(num_elements)]
    holder = [
        largest(magnitudes, i, range(num_tasks)) if len(tied[i]) == 1 and not is_zero[i] else -1
        for i in range(num_elements)
    ]
    for task in range(num_tasks - 1, 0, -1):
        held = [i for i in range(num_elements) if holder[i] == task]
        stay = [i for i in held if winners[i] == task]
        assert len(stay) == min(len(held), quotas[task]), f"task {task} dropped a wrong number"
        for i in set(held) - set(stay):
            holder[i] = largest(magnitudes, i, range(task))
    held = [i for i in range(num_elements) if holder[i] == 0]
    free = [i for i in held if winners[i] != 0]
    assert len(held) - len(free) == min(len(held), quotas[0]), "the first task dropped a wrong number"
    for i in free:
        holder[i] = -1
    exhausted = _replay_ties(tied, is_zero, holder, quotas, winners)
    for task in range(num_tasks - 1, 0, -1):
        short = quotas[task] - holder.count(task)
        candidates = {i for i in free if largest(magnitudes, i, range(1, num_tasks)) == task}
        taken = {i for i in candidates if winners[i] == task}
        assert len(taken) == min(short, len(candidates)), f"task {task} ignored candidates"
        for i in taken:
            holder[i] = task
    zeros = [winners[i] for i in range(num_elements) if is_zero[i]]
    assert zeros == sorted(zeros)
    return _replay_fill([i for i in [*free, *exhausted] if holder[i] < 0], holder, quotas, winners)


def _replay_fill(
    left: list[int], holder: list[int], quotas: Sequence[int], winners: Sequence[int]
) -> list[int]:
    """Check that short tasks, first ones first, got what was left; return how much each got."""
    unaligned = [sum(winners[i] == task for i in left) for task in range(len(quotas))]
    rest = len(left)
    for task, quota in enumerate(quotas):
        assert unaligned[task] == min(quota - holder.count(task), rest), f"task {task} was filled wrongly"
        assert list(winners).count(task) == quota
        rest -= unaligned[task]
    return unaligned


def _replay_ties(
    tied: list[list[int]],
    is_zero: list[bool],
    holder: list[int],
    quotas: Sequence[int],
    winners: Sequence[int],
) -> list[int]:
    """Check where ties ended, and return those that none of their tasks took."""
    waiting = [i for i, tasks in enumerate(tied) if len(tasks) > 1 and not is_zero[i]]
    exhausted: list[int] = []
    for task in range(len(quotas) - 1, -1, -1):
        room = quotas[task] - holder.count(task)
        pool = [i for i in waiting if task in tied[i]]
        alone = [i for i in pool if tied[i][0] == task]
        stay = [i for i in pool if winners[i] == task]
        assert len(stay) == min(room, len(pool)), f"task {task} settled a wrong number of ties"
        assert len(set(stay) & set(alone)) == min(room, len(alone)), f"task {task} took shared ties first"
        exhausted += [i for i in alone if i not in stay]
        for i in stay:
            holder[i] = task
        waiting = [i for i in waiting if i not in stay and i not in alone]
    assert not waiting
    return exhausted


def best_kept_magnitude(task_vectors: np.ndarray, quotas: Sequence[int]) -> float:
    """The optimum of the transportation problem, by an exact solver (POT's network simplex)."""
    magnitudes = np.abs(task_vectors.astype(np.float64))
    unit = magnitudes.max(initial=0.0)
    wanted = [task for task, quota in enumerate(quotas) if quota]
    if unit == 0:
        return 0.0
    cost = -(magnitudes[wanted] / unit).T
    demand = np.array([float(quotas[task]) for task in wanted])
    transport = ot.emd(np.ones(cost.shape[0]), demand, cost, numItermax=1_000_000)
    return float(-(transport * cost).sum() * unit)


def kept_magnitude(task_vectors: np.ndarray, winners: Sequence[int]) -> float:
    return math.fsum(abs(float(task_vectors[task, i])) for i, task in enumerate(winners))


def nearest(value: Fraction, mantissa_bits: int, smallest_exponent: int) -> Fraction:
    """Round to the nearest float of a format, ties to even; overflow is left to the caller.

    `mantissa_bits` counts the leading one; `smallest_exponent` is that of the smallest normal number.
    """
    if value == 0:
        return Fraction(0)
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    while Fraction(2) ** exponent > abs(value):
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest_exponent) - mantissa_bits + 1)
    # round() of a Fraction goes to even.
    return round(value / unit) * unit


def threshold(vector: np.ndarray, keep: int) -> float:
    """The `keep`-th largest magnitude."""
    return sorted((abs(float(value)) for value in vector), reverse=True)[keep - 1]


def weighted_sum(task_vectors: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Σ w_t τ_t in float32, task by task, every product and sum rounded."""
    result = np.zeros(task_vectors.shape[1], dtype=np.float32)
    for i in range(len(result)):
        for vector, weight in zip(task_vectors, weights, strict=True):
            result[i] = result[i] + np.float32(vector[i] * np.float32(weight))
    return result


def ties_merge(
    task_vectors: np.ndarray, thresholds: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """Trim, elect the sign by weighted mass, weighted mean of those that agree; in exact arithmetic."""
    merged = []
    for column in task_vectors.T:
        trimmed = [
            Fraction(float(value)) if abs(value) >= least else Fraction(0)
            for value, least in zip(column, thresholds, strict=True)
        ]
        exact = [Fraction(weight) for weight in weights]
        mass = sum(weight * value for weight, value in zip(exact, trimmed, strict=True))
        agree = [t for t, value in enumerate(trimmed) if value * mass > 0]
        total = sum(exact[t] for t in agree)
        merged.append(float(sum(exact[t] * trimmed[t] for t in agree) / total) if total else 0.0)
    return merged


def ties_sum(
    task_vectors: np.ndarray, thresholds: Sequence[float], multipliers: Sequence[float]
) -> list[float]:
    """Trim and multiply; what has the sign of the sum is added."""
    merged = []
    for column in task_vectors.T:
        products = [
            Fraction(float(value)) * Fraction(multiplier) if abs(value) >= least else Fraction(0)
            for value, least, multiplier in zip(column, thresholds, multipliers, strict=True)
        ]
        merged.append(float(sum(product for product in products if product * sum(products) > 0)))
    return merged


def is_kept(density: float, seed: int, name: str, task: int, index: int) -> bool:
    """DARE: a half of the key of stream 6 · 256 + ⌊task / 2⌋ lies below; the lower half for even tasks."""
    key = random_key(seed, name, 6 * 256 + task // 2, index) % _WORD
    half = key >> 32 if task % 2 else key % 2**32
    return Fraction(half, 2**32) < Fraction(density)


def dropped(task_vectors: np.ndarray, density: float, seed: int, name: str) -> np.ndarray:
    """DARE: every element is divided by the density or zero."""
    return np.array([
        [value / density if is_kept(density, seed, name, task, i) else 0.0 for i, value in enumerate(vector)]
        for task, vector in enumerate(task_vectors.astype(np.float64))
    ])  # fmt: skip


def breadcrumbs(vector: np.ndarray, density: str, outliers: str) -> list[float]:
    """Without the outliers, and of the rest those from the largest to the last that is wanted."""
    magnitudes = sorted((abs(float(value)) for value in vector), reverse=True)
    removed = math.floor(Fraction(outliers) * len(vector))
    band = magnitudes[removed:][: math.ceil(Fraction(density) * len(vector))]
    return [float(value) if band[-1] <= abs(value) <= band[0] else 0.0 for value in vector]


def random_mix(draws: Sequence[float], weights: Sequence[float]) -> Iterator[int]:
    """The task whose share of [0, 1) holds each draw."""
    for draw in draws:
        task, reached = 0, Fraction(weights[0])
        while reached <= Fraction(draw) and any(weights[task + 1 :]):
            task += 1
            reached += Fraction(weights[task])
        yield task
