"""Judgement of a merge of four tasks on MiniLM, from the prediction before it to the page about it.

    python -m benchmarks.judgement FOLDER --encoder MODEL --nouns data.noun   # minutes on one core
    python -m benchmarks.judgement --render                                   # docs/judgement.md again

`benchmarks/wordnet.py` says what MODEL and data.noun are. Two more tasks are learned after the four. Other
sets of four of the six are merged and scored first: they are the history. Metrics of a pair of tasks depend
on no other task, so that all are measured once, together. What an earlier call finished in FOLDER is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations, compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hub_magmax as hm
from benchmarks import wordnet
from benchmarks.cards import reduced
from benchmarks.page_tables import replace_tables
from hub_magmax.analysis.diagnosing import write_diagnosis
from hub_magmax.analysis.judgement_answers import parts, sentence
from hub_magmax.analysis.judging import Judgement, judge
from hub_magmax.analysis.merge_history import read_history
from hub_magmax.analysis.predicting_merges import predict_merges
from hub_magmax.files import write_json, write_text
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, read_lock
from hub_magmax.recipe.result_files import ResultFiles, beside
from hub_magmax.reporting.card import JUDGEMENT_NAME
from hub_magmax.reporting.card_file import CARD_NAME
from hub_magmax.reporting.diagnosis import DIAGNOSIS_NAME, read_diagnosis
from hub_magmax.reporting.pair_metrics import PairMetrics
from tests.browser import Page, find_browser

RESULTS = Path(__file__).parent / "results" / "judgement.json"
PAGE = Path(__file__).parents[1] / "docs" / "judgement.md"
PICTURE = PAGE.parent / "pictures" / "judgement.png"

NUM_TASKS = 4
#: Other sets of as many tasks in the history, the first of the 14 that there are; each takes a minute or two.
NUM_OTHERS = 12
EVERY = {**wordnet.TASKS, **wordnet.SIXTH}

#: Pixels of a laptop's window, and of a phone's.
WIDTHS = {"laptop": 1100, "phone": 390}

#: Around a part of the page that is written here, by its name.
START, END = "<!-- {} -->\n", "<!-- /{} -->"


def measure(folder: Path, encoder: Path, nouns: Path) -> None:
    """Make the tasks and the history, predict the merge of the first four, carry it out and judge it."""
    values = wordnet.make_family(folder, encoder, nouns, 0, len(EVERY), print, EVERY)
    chosen = [*EVERY][:NUM_TASKS]
    others = [names for names in combinations(EVERY, NUM_TASKS) if [*names] != chosen]
    others = others[:NUM_OTHERS]
    write_text(folder / "every.yaml", json.dumps(_of_tasks(values, [*EVERY], "every"), indent=1))
    if not (folder / "every.diagnosis.json").is_file():
        _call(folder, "diagnose", "every.yaml", "--metrics")
    metrics = read_diagnosis(folder / "every.diagnosis.json").metrics
    assert metrics is not None
    for names in others:
        name = "-".join(names)
        _carry_out(folder, name, _of_tasks(values, names, f"history/{name}"), _of_pairs(metrics, names))
    whole, known = _of_tasks(values, chosen, "merged"), _of_pairs(metrics, chosen)
    write_text(folder / "recipe.yaml", json.dumps(whole, indent=1))
    if not (folder / "recipe.predictions.json").is_file():
        made = predict_merges(lock(folder / "recipe.yaml"), read_history(folder / "history"), known)
        write_json(folder / "recipe.predictions.json", made.to_dict())
    _carry_out(folder, "recipe", whole, known)
    _call(folder, "card", "recipe.yaml", "--judgement")
    recipe, locked = load_recipe(folder / "recipe.yaml"), read_lock(folder / "merged" / LOCK_NAME)
    found = judge(recipe, locked, beside(folder / "recipe.yaml"))
    told = {
        "sentence": sentence(found, locked),
        "parts": [asdict(part) for part in parts(found, locked)],
        "prediction": _compared(found, folder / "history"),
    }
    write_text(RESULTS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    photograph(folder / "merged" / JUDGEMENT_NAME, folder)


def _of_tasks(values: Mapping[str, Any], names: Sequence[str], output: str) -> dict[str, Any]:
    """Return the recipe of some tasks; each own checkpoint is scored on its own task alone."""
    examples = {name: values["evaluation"]["tasks"][name] for name in names}
    return {
        **values,
        "tasks": [task for task in values["tasks"] if task["name"] in names],
        "evaluation": {**values["evaluation"], "tasks": examples, "cells": "own"},
        "output": {"path": output},
    }


def _of_pairs(found: PairMetrics, names: Sequence[str]) -> PairMetrics:
    """Return the metrics of some tasks, of those of `EVERY`."""
    kept = [{*pair} <= {*names} for pair in combinations(EVERY, 2)]
    return replace(
        found, metrics=tuple(replace(one, values=tuple(compress(one.values, kept))) for one in found.metrics)
    )


def _carry_out(folder: Path, name: str, recipe: Mapping[str, Any], metrics: PairMetrics) -> None:
    path, place = folder / f"{name}.yaml", folder / recipe["output"]["path"]
    write_text(path, json.dumps(recipe, indent=1))
    if not (place / CARD_NAME).is_file():
        hm.run(path, report=print)
    if not (place / DIAGNOSIS_NAME).is_file():
        write_diagnosis(replace(hm.diagnose(path), metrics=metrics), ResultFiles(place))


def _call(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "hub_magmax", *words], cwd=folder, check=True)


def photograph(page: Path, folder: Path) -> None:
    """Write into a folder what a laptop and a phone show of the page, and the first for the documentation."""
    program = find_browser()
    assert program, "a browser is needed: install chromium"
    # The browser may still write while the folder is removed.
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Page(program, Path(profile))
        try:
            for name, width in WIDTHS.items():
                browser.open(page.resolve(), width=width, height=800)
                browser.screenshot(folder / f"{name}.png")
        finally:
            browser.close()
    PICTURE.write_bytes(reduced((folder / "laptop.png").read_bytes()))


def _compared(found: Judgement, history: Path) -> dict[str, Any]:
    """Return what the merge kept, what was predicted of it, and what the history's sets of four kept."""
    made = found.prediction
    assert made is not None and made.measured is None, "predicted before the merge, from other merges"
    others = [merge.kept for merge in read_history(history).merges if len(merge.tasks) == NUM_TASKS]
    told = {"by metrics": asdict(made.by_metrics), "by tasks": asdict(made.by_tasks)}
    return {"kept": found.kept, "predicted": told, "others": others}


def predicted(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was predicted, and how far off it was."""
    kept, others = found["kept"], found["others"]
    for how, one in found["predicted"].items():
        if one["kept"] is None:
            yield f"- **{how}**: refused, as {one['refusal']}"
        else:
            yield f"- **{how}**: {_share(one['kept'])}, {_off(one['kept'], kept)}"
    mean = statistics.fmean(others)
    yield (
        f"- **by nothing but the mean** of the {len(others)} other sets of four, which kept "
        f"{_share(min(others))} to {_share(max(others))}: {_share(mean)}, {_off(mean, kept)}"
    )
    yield f"- **measured** afterwards: {_share(kept)}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _off(value: float, kept: float) -> str:
    return f"{abs(100 * (value - kept)):.1f} points too {'high' if value > kept else 'low'}"


def section(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the measured part of the page."""
    yield from (f"> {found['sentence']}", "")
    for part in found["parts"]:
        yield from (f"**{part['question']}** {part['answer']}", "")
        if part["rows"]:
            yield _row(part["head"])
            yield "|---|" + "---:|" * (len(part["head"]) - 1)
            yield from (*map(_row, part["rows"]), "")
        yield from (f"- {fact}" for fact in part["facts"])
        yield from (f"- {why} `{command}`" for why, command in part["commands"])
        yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--nouns", type=Path)
    parser.add_argument("--render", action="store_true", help="write the page from what is stored alone")
    options = parser.parse_args()
    if options.folder:
        measure(options.folder, options.encoder, options.nouns)
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    _replace("predicted", predicted(found["prediction"]))
    _replace("measured", section(found))


def _replace(name: str, lines: Iterable[str]) -> None:
    """Write lines between the marks of a name on the page."""
    start, end = START.format(name), END.format(name)
    text = "\n".join(lines).rstrip("\n")
    replace_tables(PAGE, f"{start}[^\0]*{end}", f"{start}\n{text}\n\n{end}")


if __name__ == "__main__":
    main()
