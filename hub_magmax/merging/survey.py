"""One survey of all merged tensors, for methods whose scope is the model.

The task vectors of all tensors, in the plan's order, are to such a method one long tensor: its quotas or
thresholds are found once, over all elements, and every tensor is then merged by its part of the rule.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from xxhash import xxh3_128

from hub_magmax.errors import RecipeError
from hub_magmax.files import os_errors, write_text
from hub_magmax.kernels.ops import (
    BALANCED,
    BAND,
    BAND_TIES,
    BAND_TIES_SUM,
    CHOSEN,
    OPS,
    PRECOMPUTED,
    RESCALED_TIES,
    STITCHED,
    TIES,
    TIES_SUM,
)
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.merging.tensors import tensor_rule
from hub_magmax.methods import Rule, surveys_model
from hub_magmax.methods.chunks import Chunks
from hub_magmax.planning.plan import TensorJob
from hub_magmax.recipe.merge_values import MergeValues

#: Name of the draws of a whole model; those of a tensor have the tensor's name.
_GENERATOR_NAME = "the whole model"
_PIECE_ELEMENTS = 2**20
#: Operations of rules that can be stored.
_STORED = (
    PRECOMPUTED, CHOSEN, TIES, TIES_SUM, BAND, BAND_TIES, BAND_TIES_SUM, RESCALED_TIES, STITCHED, BALANCED,
)  # fmt: skip


@dataclass(frozen=True)
class ModelRule:
    """The rule of every tensor of a model.

    Attributes:
        rule: Of all elements.
        starts: Index of each tensor's first element among them, by name.
    """

    rule: Rule
    starts: Mapping[str, int]

    def part(self, name: str) -> Rule:
        """Return one tensor's rule. Facts about the whole model are in the first tensor's."""
        first, rule = self.starts[name], self.rule
        found = replace(rule, per_element=lambda start, count: rule.per_element(first + start, count))
        return replace(found, num_unaligned=(), duality_gap=None) if first else found


@dataclass(frozen=True)
class ModelRules:
    """The rules of a model: one for each set of numbers by which some of its tensors are merged.

    A tensor is merged by its part of the rule that the whole model would have by its numbers.

    Attributes:
        found: By `MergeValues.surveyed`.
    """

    found: Mapping[str, ModelRule]

    def part(self, name: str, values: MergeValues) -> Rule | None:
        """Return one tensor's rule; None where its method does not look at the whole model."""
        return self.found[values.surveyed].part(name) if surveys_model(values.method) else None


def survey_all(
    sets: Iterable[MergeValues],
    jobs: Sequence[TensorJob],
    chunks_of: Callable[[MergeValues], Chunks],
    seed: int,
    folder: Path | None = None,
) -> ModelRules:
    """Find the rules of all merged tensors, for each set of numbers whose method looks at the whole model.

    Args:
        sets: Of numbers, `Plan.surveyed`.
        jobs: The merged tensors, in order.
        chunks_of: Returns the task vectors of all of them, by what counts under these numbers.
        seed: Of the recipe.
        folder: As `survey` has it; each set of numbers has a folder in it.
    """
    return ModelRules(
        {
            values.surveyed: survey(
                jobs,
                chunks_of(values),
                values.method,
                values.weights,
                seed,
                folder and folder / values.surveyed.removeprefix("sha256:")[:16],
            )
            for values in sets
            if surveys_model(values.method)
        }
    )


def survey(
    jobs: Iterable[TensorJob],
    chunks: Chunks,
    method: Mapping[str, Any],
    weights: tuple[float, ...],
    seed: int,
    folder: Path | None = None,
) -> ModelRule:
    """Find the rule of all merged tensors.

    Args:
        jobs: The merged tensors, in order.
        chunks: The task vectors of all of them.
        method: As a lock describes it.
        weights: One per task.
        seed: Of the recipe.
        folder: Keeps the rule for whoever asks again: the other processes, or the same merge after an
            interruption. Of several that ask at a time, one works and the others wait.

    Raises:
        OutputError: If `folder` cannot be written.
    """
    merged = list(jobs)
    ends = [0, *accumulate(job.num_elements for job in merged)]
    starts = {job.name: start for job, start in zip(merged, ends, strict=False)}
    assert ends[-1] == chunks.num_elements

    def find() -> Rule:
        shape = (chunks.num_elements,)
        return tensor_rule(chunks, shape, method, weights, CounterGenerator(seed, _GENERATOR_NAME))

    if folder is None:
        return ModelRule(find(), starts)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if (known := _kept(folder)) is None:
                _keep(folder, find(), chunks.num_elements)
                known = _kept(folder)
    assert known is not None
    return ModelRule(known, starts)


def _keep(folder: Path, rule: Rule, num_elements: int) -> None:
    """Store a rule: what it gives for each element in files, the rest as text, last."""
    if rule.op not in _STORED:
        raise RecipeError(
            "this method cannot look at the whole model", where="method.scope", expected="scope: tensor"
        )
    arrays = []
    for number, first in enumerate(rule.per_element(0, 0)):
        with (folder / str(number)).open("wb") as file:
            digest = xxh3_128()
            for start in range(0, num_elements, _PIECE_ELEMENTS):
                count = min(_PIECE_ELEMENTS, num_elements - start)
                content = np.asarray(rule.per_element(start, count)[number]).tobytes()
                digest.update(content)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        arrays.append({"dtype": str(first.dtype), "digest": digest.hexdigest()})
    facts = {
        "op": rule.op.name,
        "arrays": arrays,
        "per_task": [values.tolist() for values in rule.per_task],
        "num_unaligned": rule.num_unaligned,
        "duality_gap": rule.duality_gap,
    }
    text = json.dumps(facts)
    write_text(folder / "rule.json", f"{_digest(text)}\n{text}")


def _digest(text: str) -> str:
    return xxh3_128(text.encode()).hexdigest()


def _kept(folder: Path) -> Rule | None:
    """Return the rule that was stored, if it is there, whole and as it was."""
    try:
        digest, text = (folder / "rule.json").read_text(encoding="utf-8").split("\n")
        _check(_digest(text), digest)
        facts = json.loads(text)
        op = OPS[facts["op"]]
        arrays = [_opened(folder / str(number), **array) for number, array in enumerate(facts["arrays"])]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Rule(
        op,
        lambda start, count: tuple(array[start : start + count] for array in arrays),
        tuple(np.array(values, np.float32) for values in facts["per_task"]),
        tuple(facts["num_unaligned"]),
        facts["duality_gap"],
    )


def _check(found: str, expected: str) -> None:
    if found != expected:
        raise ValueError("this is not what was stored")


def _opened(path: Path, dtype: str, digest: str) -> np.ndarray:
    """Return a file as an array that is read when it is used; raise ValueError if it was changed."""
    array = np.memmap(path, dtype, mode="c")  # as nobody writes to it, no copy is ever made
    found = xxh3_128()
    for start in range(0, len(array), _PIECE_ELEMENTS):
        found.update(array[start : start + _PIECE_ELEMENTS].data)
    _check(found.hexdigest(), digest)
    return np.asarray(array)
