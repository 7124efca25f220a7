"""Judgement of a merge of four tasks on MiniLM, from the prediction before it to the page about it.

    python -m benchmarks.judgement FOLDER --encoder MODEL --nouns data.noun   # minutes on one core
    python -m benchmarks.judgement --render                                   # docs/judgement.md again

`benchmarks/wordnet.py` says what MODEL and data.noun are. All pairs of the tasks are merged, scored and
diagnosed first: they are the history. What an earlier call finished in FOLDER is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import wordnet
from benchmarks.cards import reduced
from hub_magmax.analysis.judgement_answers import parts, sentence
from hub_magmax.analysis.judging import judge
from hub_magmax.files import write_text
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, read_lock
from hub_magmax.recipe.result_files import beside
from hub_magmax.reporting.card import JUDGEMENT_NAME
from hub_magmax.reporting.card_file import CARD_NAME
from tests.browser import Page, find_browser

RESULTS = Path(__file__).parent / "results" / "judgement.json"
PAGE = Path(__file__).parents[1] / "docs" / "judgement.md"
PICTURE = PAGE.parent / "pictures" / "judgement.png"

NUM_TASKS = 4

#: Pixels of a laptop's window, and of a phone's.
WIDTHS = {"laptop": 1100, "phone": 390}

#: Around the measured part of the page.
START, END = "<!-- measured -->\n", "<!-- /measured -->"


def measure(folder: Path, encoder: Path, nouns: Path) -> None:
    """Make the tasks, merge and diagnose their pairs, predict the merge of all, carry it out and judge it."""
    values = wordnet.make_family(folder, encoder, nouns, 0, NUM_TASKS, print)
    for pair in combinations(values["tasks"], 2):
        names = [task["name"] for task in pair]
        examples = {name: values["evaluation"]["tasks"][name] for name in names}
        evaluation = {**values["evaluation"], "tasks": examples}
        output = {"path": f"history/{'-'.join(names)}"}
        recipe = {**values, "tasks": [*pair], "evaluation": evaluation, "output": output}
        _carry_out(folder, "-".join(names), recipe, output["path"])
    whole = {**values, "output": {"path": "merged"}}
    write_text(folder / "recipe.yaml", json.dumps(whole, indent=1))
    if not (folder / "recipe.predictions.json").is_file():
        _call(folder, "predict-merge", "recipe.yaml", "--history", "history")
    _carry_out(folder, "recipe", whole, "merged")
    _call(folder, "card", "recipe.yaml", "--judgement")
    recipe, locked = load_recipe(folder / "recipe.yaml"), read_lock(folder / "merged" / LOCK_NAME)
    found = judge(recipe, locked, beside(folder / "recipe.yaml"))
    told = {"sentence": sentence(found, locked), "parts": [asdict(part) for part in parts(found, locked)]}
    write_text(RESULTS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    photograph(folder / "merged" / JUDGEMENT_NAME, folder)


def _carry_out(folder: Path, name: str, recipe: Mapping[str, Any], output: str) -> None:
    write_text(folder / f"{name}.yaml", json.dumps(recipe, indent=1))
    if not (folder / output / CARD_NAME).is_file():
        _call(folder, "run", f"{name}.yaml")
    if not (folder / output / "diagnosis.json").is_file():
        _call(folder, "diagnose", f"{name}.yaml", "--metrics")


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
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index(START) + len(START), text.index(END)
    found = "\n".join(section(json.loads(RESULTS.read_text(encoding="utf-8"))))
    write_text(PAGE, f"{text[:start]}\n{found}\n{text[end:]}")


if __name__ == "__main__":
    main()
