"""Stored measurements of merges, and docs/performance.md and peers.md, which are written from them alone.

    python -m benchmarks.performance   # write the pages again

`python -m benchmarks.run`, `.matrices`, `.sites`, `.peers`, `.processes`, `.selecting`, `.in_memory` and
`.versus` measure. With `--write` each stores its own part for its own size, and the others stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.families import SIZES

Result = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "performance.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PEERS_PAGE = PAGE.with_name("peers.md")


def show(part: str, result: Result, *, write: bool) -> None:
    """Print what was measured; store it and write the pages if asked to."""
    print(_PARTS[part][1](result))
    if write:
        results = load()
        RESULTS.write_text(json.dumps(with_result(results, part, result), indent=2) + "\n")
        write_pages()


def write_pages() -> None:
    for path, text in pages(load()).items():
        path.write_text(text)


def load() -> dict[str, dict[str, Any]]:
    """Return what is stored: results by part and size."""
    stored: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    return stored


def with_result(results: Mapping[str, Result], part: str, result: Result) -> dict[str, Any]:
    """Return results with one more, instead of an earlier one of the same part and size."""
    sizes = {**results.get(part, {}), result["size"]: result}
    parts = {
        **results,
        part: {size: sizes[size] for size in dict.fromkeys([*SIZES, *sizes]) if size in sizes},
    }
    return {name: parts[name] for name in _PARTS if name in parts}


def pages(results: Mapping[str, Result]) -> dict[Path, str]:
    """Return the text of each page: another tool's times have one of their own."""
    ours = {part: sizes for part, sizes in results.items() if part != "peers"}
    return {PAGE: page(ours), PEERS_PAGE: page({"peers": results["peers"]}, _PEERS_TITLE)}


def page(results: Mapping[str, Result], title: str | None = None) -> str:
    """Return a page of these results, with docs/performance.md's title if none is given."""
    written = [title or _TITLE]
    for part, (preface, section) in _PARTS.items():
        if part in results:
            written += [preface, *map(section, results[part].values())]
    return "\n".join(written)


def _methods(result: Result) -> str:
    rows = [
        [
            row["method"],
            row["runs"],
            f"{row['seconds']:.1f}",
            f"{row['aim_seconds']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['cold_seconds']:.1f}",
            f"{row['cold_aim_seconds']:.1f}",
            f"{row['cold_ratio']:.1f}",
            _megabytes(row["peak_memory_bytes"]),
        ]
        for row in result["rows"]
    ]
    return section(
        result,
        f"500 MB shards: {result['bytes_in'] / 1e9:.1f} GB in, {result['bytes_out'] / 1e9:.2f} GB out. "
        f"`import torch`: {result['import_torch_seconds']:.1f} s. Floor: "
        f"{result['floor_seconds']:.1f} s warm ({result['fastest_floor_seconds']:.1f} at the fastest), "
        f"{result['cold_floor_seconds']:.1f} s cold.",
        [
            *("method", "runs", "warm: s", "aim: s", "times the floor"),
            *("cold: s", "aim: s", "times the floor", "peak memory, MB"),
        ],
        rows,
    )


def _matrices(result: Result) -> str:
    rows = [
        [
            row["method"],
            f"{row['seconds']:.1f}",
            f"{row['processor_seconds']:.1f}",
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["stated_memory_bytes"]),
        ]
        for row in result["rows"]
    ]
    kind = (
        f"adapters of rank {result['rank']}, merged to an adapter" if result["rank"] else "whole checkpoints"
    )
    titles = ["method", "s", "processor: s", "peak memory, MB", "stated by `plan`, MB"]
    return section(result, f"{result['tasks']} {kind}.", titles, rows)


def _sites(result: Result) -> str:
    rows = [
        [
            row["method"],
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['alone_seconds']:.1f}",
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["alone_peak_memory_bytes"]),
        ]
        for row in result["rows"]
    ]
    titles = ["method", "together: s", "times the floor", "alone: s", "together: MB", "alone: MB"]
    facts = f"{result['sites']} sites. Floor: {result['floor_seconds']:.1f} s."
    return section(result, facts, titles, rows)


def _peers(result: Result) -> str:
    rows = [
        [
            f"{row['method']} / {row['peer_method']}",
            f"{row['seconds']:.1f}",
            f"{row['peer_seconds']:.1f}",
            f"{row['peer_ratio']:.1f}",
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["peer_peak_memory_bytes"]),
            f"{row['runs']} / {row['peer_runs']}",
        ]
        for row in result["rows"]
    ]
    found = result["average_and_linear"]
    return section(
        result,
        f"{result['peer']}, `{result['peer_command']}`. `average` and `linear` differ in "
        f"{100 * found['different_share']:.2g}% of the elements, by {found['most_steps']:.1f} steps of "
        f"{result['dtype']} at most.",
        ["ours / mergekit's", "ours: s", "mergekit: s", "times as long", "ours: MB", "mergekit: MB", "runs"],
        rows,
    )


def _processes(result: Result) -> str:
    rows = [
        [
            row["method"],
            f"{row['seconds']:.1f}",
            f"{row['two_seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['merging_seconds']:.1f}",
            f"{row['two_merging_seconds']:.1f}",
            f"{row['two_merging_seconds'] / row['merging_seconds']:.2f}",
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["two_peak_memory_bytes"]),
            row["same_files"],
        ]
        for row in result["rows"]
    ]
    return section(
        result,
        f"{result['shard_size'].removesuffix('MB')} MB shards.",
        [
            *("method", "one: s", "two: s", "two / one", "one, merging: s", "two, merging: s", "two / one"),
            *("one: MB", "two: MB", "same files"),
        ],
        rows,
    )


def _selecting(result: Result) -> str:
    titles = ["rule", "tasks", "flat: ns", "one-sided: ns", "one-hot: ns", "aim: ns"]
    rows = [
        [
            row["rule"],
            row["tasks"],
            *(f"{row[preference]:.1f}" for preference in ("flat", "one-sided", "one-hot")),
            row["aim_nanoseconds"],
        ]
        for row in result["rows"]
    ]
    facts = f"{result['size']}. {result['machine']}. `{result['command']}`"
    return "\n".join([f"{facts}\n", *_table(titles, rows)]) + "\n"


# Complex only by count: a comprehension for each axis of the table.
def _in_memory(result: Result) -> str:
    columns = [(label, result[label]) for label in ("before", "after") if label in result]
    titles = [f"{label}: {unit}" for label, _ in columns for unit in ("s a merge", "processor", "measured")]
    rows = [
        [same[0]["method"], *(cell for row in same for cell in _in_memory_cells(row))]
        for same in zip(*(column["rows"] for _, column in columns), strict=True)
    ]
    rows.append(["all", *(cell for _, column in columns for cell in _in_memory_total(column["rows"]))])
    *others, (label, latest) = columns
    said = [f"Before: {_busy(one)} {one['machine']}. `{one['command']}`\n\n" for _, one in others]
    facts = "".join([*said, f"{label.title()}: {_busy(latest)}"])
    return section({**result, **latest}, facts, ["method", *titles], rows)


def _busy(column: Result) -> str:
    """Return the version that was measured, and how many threads wanted a processor meanwhile."""
    return f"{column['version']}, at a load of {column['load']:.1f}."


def _in_memory_cells(row: Result) -> list[str]:
    measured = f"{row['measured']} of {row['merges']}"
    return [f"{row['seconds']:.2f}", f"{row['processor_seconds']:.2f}", measured]


def _in_memory_total(rows: list[Result]) -> list[str]:
    totals = [sum(row["merges"] * row[key] for row in rows) for key in ("seconds", "processor_seconds")]
    measured = f"{sum(row['measured'] for row in rows)} of {sum(row['merges'] for row in rows)}"
    return [*(f"{total:.0f}" for total in totals), measured]


def _versus(result: Result) -> str:
    rows = [
        [
            row["method"],
            row["runs"],
            *(f"{row[key]:.2f}" for key in ("before_seconds", "after_seconds")),
            _percent(row["after_seconds"], row["before_seconds"]),
            *(f"{row[key]:.2f}" for key in ("before_processor_seconds", "after_processor_seconds")),
            _percent(row["after_processor_seconds"], row["before_processor_seconds"]),
        ]
        for row in result["rows"]
    ]
    titles = ["method", "runs", "before: s", "after: s", "slower", "before: processor", "after", "slower"]
    other = ", ".join(row["method"] for row in result["rows"] if not row["same_weights"])
    weights = f"Weights differ in: {other}." if other else "Weights are the same, by sha256."
    facts = f"Before: {result['before']}; after: {result['after']}. {weights}"
    return section(result, facts, titles, rows)


def _percent(after: float, before: float) -> str:
    return f"{100 * (after / before - 1):+.1f}%"


def section(result: Result, facts: str, titles: list[str], rows: list[list[Any]]) -> str:
    """Return a heading, what was measured, and a table."""
    model = f"{result['model']}, {result['parameters'] / 1e9:.2f}B parameters in {result['dtype']}"
    if result.get("deviation"):
        model += f", task vectors of deviation {result['deviation']:g}"
    lines = [
        f"### {model}\n",
        f"{facts} {result['machine']}. `{result['command']}`\n",
        *_table(titles, rows),
    ]
    return "\n".join(lines) + "\n"


def _table(titles: list[str], rows: list[list[Any]]) -> list[str]:
    return [_line(titles), "|---|" + "---:|" * (len(titles) - 1), *map(_line, rows)]


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f}"


_TITLE = """# Performance

Written by `python -m benchmarks.performance` from `benchmarks/results/performance.json`, which the commands
named below fill. Measured on six checkpoints, a base model and five tasks, with random weights and with the
names and shapes of real models, under the preference `{geometric: {ratio: 0.7}}`. Weights are normal, of
deviation .02. Task vectors have deviation .002, and half of their elements are zero in bfloat16. Where
another deviation is named they are dense and as small as those of real fine-tunes, which bfloat16 rounds:
with 1e-4, 32 % of the elements are zero and 23 % have the commonest other magnitude, with 2e-5 78 and 8 %.
Seconds are of whole processes, and medians of the runs stated, after one that may compile; what takes longer
than a minute is measured once. Warm means that files are in the page cache, where they are if nothing else is
said. Memory is what the processes of a command hold together of their own, with Python in it, looked at every
hundredth of a second; files that they map are not in it, because the system can take them back.
"""

_PEERS_TITLE = """# Beside mergekit

Written by `python -m benchmarks.performance` from `benchmarks/results/performance.json`, which the command
named below fills. The checkpoints and the preference are those of [performance.md](performance.md): a base
model and five tasks.
"""

_METHODS_PREFACE = """## Every method

The floor is reading every byte of the inputs, and writing as many as the output has, plainly. The aim is to
stay near it for every method: with a warm page cache at most 1.5 times for those that read the files once,
2.5 for quotas and thresholds, 3.5 for quotas in the scope `model`; cold 1.15, 1.3 and 2.2; and besides, what
`import torch` takes. A merge by compiled loops does not import torch and has this time for its work, so the
times of the floor, which are of whole processes, may be more than these numbers. The floor is strict: its
reads go into a buffer of 1 MB that stays in the nearest cache, begins at a page, and is thrown away, so it
moves 15 to 20 GB/s, where any use of the values starts with fetching them from memory. It is the median of as
many times before and after the methods as they have runs, and it varies: half of it is the disk's, and what
its output takes of new memory, which costs 2 s of a processor per GB where a hypervisor takes back what is
free. A merge notices that, and lets go of what it stored. Cold numbers are of one run each, and the disk is
not as fast in each: below 1 means no more than that.

Methods of one pass, such as `average` and `magmax`, take as long as two cores need to read, convert, add and
round; the rest of their time, some .5 s whatever the size, is Python's: modules, headers, plan. Those that
trim, such as `ties`, and `top-n` look at a tensor and merge it meanwhile: a sample decides most elements
before, and the few per cent that stay open are merged when the tensor is known. `algorithm-1` and the scope
`model` read their files twice. The prices of `top-n` cost most on tensors of a few million elements, where
samples are a large part. The scope `model` keeps a byte or more per element in files. While a tensor is
looked at the system reads the next ones from the disk, so methods that compute longer wait less. The first
large merge of an environment compiles for 6 to 15 seconds, which is not in the tables. Every merge report
says how long threads read, computed, wrote and hashed (`profile`).
"""

_MATRICES_PREFACE = """## Whole matrices

Methods that hold one matrix of every task and decompose or solve it, run once, by torch on all cores. On
adapters they compute with the factors. Their time grows with the cube of a matrix's smaller side and, on
adapters, of the sum of the ranks; what reads and writes is little beside it.
"""

_SITES_PREFACE = """## Many sites

`hub-magmax run` of a recipe with so many sites, beside as many runs of one site each (the time of one, times
the sites). The floor is reading every input byte once and writing the outputs of all sites, plainly. The aim
is 1.15 times the floor, out of reach of files that are hashed: on two cores it leaves .64 s of processor for
500 MB, of which writing takes .22, sha256 .39, reading back .11, and merging an average .4 more: 2 times at
best. What sites share is chunks, samples and openings ([sites.md](sites.md)).
"""

_PEERS_PREFACE = """## The same merges

The same files, weights, densities and size of shards, for methods that both have; for both the whole process,
and as many threads as there are cores. mergekit computes in the checkpoints' dtype, which is its fastest way,
and we in float32; its `linear` adds up in float32 (since 0.1.5) and does not read the base model. We force
files to the disk, read them back and compare their sha256; it leaves writing to the system. Of the families
here mergekit 0.1.5 merges the Llamas; it asks for a pooler that `BertForMaskedLM` does not have, and does not
load `CLIPModel`. The rows of `della` (half the time now) and `arcee_fusion` (less memory) are of before that.
"""

_PROCESSES_PREFACE = """## Two processes

One process with one thread beside two of one thread each (`ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu
--num_processes 2 -m hub_magmax merge ...`). Seconds are of whole commands, and then of the merge alone, as
its report has them. Launching costs some three seconds: accelerate, and torch, which is imported by the
launcher and then by the processes, while one process alone needs neither. Every file is the same by sha256,
besides the merge report, which tells times. One process uses up to eight cores without a launcher.
"""

_SELECTING_PREFACE = """## The rules alone

Nanoseconds per element that the rules of `tunable_magmax` take on one thread, from task vectors in memory to
the winner of each element. Task vectors are random, normal and float32, so few elements tie. Preferences are
flat; one-sided, each task seven tenths of the one before; and one-hot, all but one task a thousandth each.
"""

_IN_MEMORY_PREFACE = """## In memory, before and after

`compare`, `sweep` and the search for a preference merge in memory, many times from the same checkpoints, and
write nothing. Seconds are the mean of one merge: one method under one preference, to a whole model in memory,
without evaluation. Processor seconds count all threads. The load is the mean number of threads of the whole
machine that could run, those of other work included; where it is above the number of cores, seconds are too
many and processor seconds say more. The last row is the time of 60 merges, 15 of each method, for which the
aim is 60 s on two cores; of a method of which fewer were measured it has 15 times their mean. Before: the
eager operations of torch, on one thread.
"""

_VERSUS_PREFACE = """## Before and after

Every method in two versions of the package, named by the last commits that changed it (`+`: with changes
after that), on the same files in the page cache. Runs alternate between the two, so that whatever else slows
the machine slows both. Medians of seconds and of processor seconds (user and system, all processes); the
first run of each version may compile and does not count.
"""

#: By part: what is said of it, and how a result of it is shown.
_PARTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "methods": (_METHODS_PREFACE, _methods),
    "matrices": (_MATRICES_PREFACE, _matrices),
    "sites": (_SITES_PREFACE, _sites),
    "peers": (_PEERS_PREFACE, _peers),
    "processes": (_PROCESSES_PREFACE, _processes),
    "selecting": (_SELECTING_PREFACE, _selecting),
    "in_memory": (_IN_MEMORY_PREFACE, _in_memory),
    "versus": (_VERSUS_PREFACE, _versus),
}


if __name__ == "__main__":
    write_pages()
