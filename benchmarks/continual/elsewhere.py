"""Answers to questions about merging from what other benchmarks stored, and where their tables are."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compressed, groups, llm_lora_tables, pair_history
from benchmarks.continual.formats import difference
from benchmarks.continual.significance import paired

#: Stored by `benchmarks.llm_lora`.
LLM_RESULTS = Path(__file__).parents[1] / "results" / "llm_lora.json"


def _stored(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def of_format() -> str:
    """Return what merges of adapters leave of a strict format, and what a preference buys back."""
    told = llm_lora_tables.answer(llm_lora_tables.complete(_stored(LLM_RESULTS)))
    return (
        f"{told} See [language_models.md](language_models.md#a-format-among-merged-adapters), by "
        "`python -m benchmarks.llm_lora`."
    )


def of_blocks() -> str:
    """Return how far weights by groups of blocks are ahead of one set, and where numbers by block stand."""
    rows, found = _stored(groups.RESULTS), []
    for method, scaling, _ in groups.RUNS:
        by_search = {
            search: [
                statistics.fmean(row["accuracy"]) / 100
                for row in sorted(rows, key=lambda row: row["seed"])
                if (row["method"], row["scaling"], row["search"]) == (method, scaling, search)
            ]
            for search in (groups.ONE, groups.BY_GROUP)
        }
        sides = zip(by_search[groups.BY_GROUP], by_search[groups.ONE], strict=True)
        test = paired([one - other for one, other in sides]).to_dict()
        found.append(f"{difference(test)} points with `{method}`")
    return (
        "Searched weights by group of blocks, ahead of one set of weights with as many tries, on digits: "
        f"{'; '.join(found)}. See [tensors.md](tensors.md#weights-by-groups-of-blocks-searched), by "
        "`python -m benchmarks.groups`."
    )


def of_compression() -> str:
    """Return what rounding and a low rank cost merged models, by method from the least to the most."""
    stored = _stored(compressed.RESULTS)
    told = []
    for data, rows in stored.items():
        found = compressed.losses(rows)
        forms = [form for form in compressed.FORMS if form != compressed.WHOLE]
        ranges = [
            f"{form} {_ends([100 * own[form]['difference'] for own in found.values()], 1)}" for form in forms
        ]
        told.append(f"{data}: {', '.join(ranges)}")
    return (
        "Points lost to the whole merged model by weights of so many bits, and by a task vector of so low a "
        f"rank; of {len(compressed.METHODS)} methods the least and the most: {'; '.join(told)}. See "
        "[quantisation.md](quantisation.md#what-merged-models-lose), by `python -m benchmarks.compressed`."
    )


def of_diagnosis() -> str:
    """Return how well metrics of checkpoints and effects of tasks predict what pairs keep."""
    found = [pair_history.choices(family) for family in _stored(pair_history.RESULTS)]
    by_tasks, by_metrics, _ = (_ends(values) for values in zip(*(own["r"] for own in found), strict=True))
    _, others, _, metrics = (
        _ends(values, 1) for values in zip(*(own["method"] for own in found), strict=True)
    )
    return (
        f"Over {len(found)} families, r between predicted and measured for a task left out: "
        f"by effects of the tasks {by_tasks}, by metrics of the checkpoints {by_metrics}. A method chosen by "
        f"metrics loses {metrics} points to the best of six, the one that is best on other pairs {others}. "
        "See [mergeability.md](mergeability.md#a-history-of-our-own), by `python -m benchmarks.pair_history`."
    )


def _ends(values: Sequence[float], digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


#: By the name of the question.
ELSEWHERE: Mapping[str, Callable[[], str]] = {
    "format": of_format,
    "blocks": of_blocks,
    "compressed": of_compression,
    "diagnosis": of_diagnosis,
}
