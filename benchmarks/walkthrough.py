"""From a sentence encoder to a merged, evaluated model with a card: the walk-through of the documentation.

    python -m benchmarks.walkthrough FOLDER --encoder MODEL --nouns data.noun            # what it begins at
    python -m benchmarks.walkthrough FOLDER --encoder MODEL --nouns data.noun --measure  # and its commands
    python -m benchmarks.walkthrough --render                                            # the page again

`benchmarks/wordnet.py` says what MODEL and data.noun are. FOLDER gets the base model with its head, the
definitions of each task, and `recipe.yaml`, which is benchmarks/walkthrough.yaml. What `--measure` stores in
benchmarks/results/walkthrough.json is written into the page by `--render`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import timing, wordnet
from benchmarks.cards import reduced
from benchmarks.page_tables import table
from hub_magmax.reporting.figures import Scale
from hub_magmax.reporting.figures.forgetting import draw_forgetting

RECIPE = Path(__file__).with_name("walkthrough.yaml")
RESULTS = Path(__file__).parent / "results" / "walkthrough.json"
PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"
PICTURE = PAGE.parent / "pictures" / "forgetting.png"

#: The verbs in order, each with the recipe that it takes.
COMMANDS = (("finetune", "recipe.yaml"), ("compare", "recipe.yaml"), ("run", "recipe.winner.yaml"))

#: Files that the commands write, by what is stored of them.
FILES = {
    "forgetting": "recipe.forgetting.json",
    "comparison": "recipe.comparison.json",
    "scores": "merged-winner/scores.json",
}

#: Of each command: more only wait for each other where other work has the processors.
NUM_THREADS = 1

#: Of the definitions of each class that test, those by which `compare` chooses.
NUM_TUNE = 20

_SECTION = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.DOTALL)


def prepare(folder: Path, encoder: Path, nouns: Path, seed: int = 0) -> None:
    """Write the base model with its head, the tasks' definitions and the recipe."""
    wordnet.make_family(folder, encoder, nouns, seed, 0)
    texts = wordnet.read(nouns, seed)
    rows: dict[str, list[dict[str, str]]] = {"tune": [], "report": []}
    for task, classes in wordnet.TASKS.items():
        parts = {
            "train": {name: texts.train[name] for name in classes},
            "test": {name: texts.test[name][NUM_TUNE:] for name in classes},
            "tune": {name: texts.test[name][:NUM_TUNE] for name in classes},
        }
        found = {part: _rows(own) for part, own in parts.items()}
        rows |= {f"{task}-{part}": found[part] for part in ("train", "test")}
        rows["tune"] += found["tune"]
        rows["report"] += found["test"]
    (folder / "data").mkdir(exist_ok=True)
    for name, own in rows.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    shutil.copyfile(RECIPE, folder / "recipe.yaml")


def _rows(texts: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [{"text": text, "label": name} for name, own in texts.items() for text in own]


def measure(folder: Path) -> dict[str, Any]:
    """Run the commands, and return how long each took and what came out."""
    times = {}
    for verb, recipe in COMMANDS:
        command = [sys.executable, "-m", "hub_magmax", verb, str(folder / recipe)]
        done = timing.run(command, {"OMP_NUM_THREADS": str(NUM_THREADS)})
        times[verb] = {"seconds": done.seconds, "processor_seconds": done.processor_seconds}
        print(f"{verb}: {done.seconds:.0f} s, {done.processor_seconds:.0f} s of processor time", flush=True)
    machine = {"processors": len(os.sched_getaffinity(0)), "load": os.getloadavg()[1], "threads": NUM_THREADS}
    return {"commands": times, **machine, **collected(folder)}


def collected(folder: Path) -> dict[str, Any]:
    """Return what the commands wrote: forgetting, the comparison and the scores."""
    found = {name: json.loads((folder / path).read_text()) for name, path in FILES.items()}
    methods = [
        {
            "label": one["label"],
            "scaling": one["candidate"]["method"]["scaling"],
            "value": one["reported"]["value"],
        }
        for one in found["comparison"]["methods"]
    ]
    scores: dict[str, dict[str, float]] = {}
    for one in found["scores"]["scores"]:
        scores.setdefault(one["model"], {})[one["task"]] = one["value"]
    counts = {name: found["comparison"][name] for name in ("winner", "num_tuning", "num_reporting")}
    return {"forgetting": found["forgetting"], "comparison": {**counts, "methods": methods}, "scores": scores}


def render(found: Mapping[str, Any]) -> None:
    """Write the measured section of the page, and the picture of forgetting."""
    PAGE.write_text(_SECTION.sub(lambda _: section(found), PAGE.read_text()))
    forgetting = found["forgetting"]
    scale = Scale(forgetting["metric"], forgetting["is_share"], forgetting["unit"])
    with TemporaryDirectory() as folder:
        drawn, _ = draw_forgetting(forgetting["scores"], scale, Path(folder) / PICTURE.name)
        PICTURE.write_bytes(reduced(drawn.read_bytes()))


def section(found: Mapping[str, Any]) -> str:
    """Return the measured section of the page."""
    lines = [*_times(found), *_forgetting(found["forgetting"]), *_compared(found["comparison"])]
    return "\n".join([*lines, *_scores(found["scores"])])


def _times(found: Mapping[str, Any]) -> Iterator[str]:
    threads, processors, load = (found[name] for name in ("threads", "processors", "load"))
    yield f"Minutes of each command with OMP_NUM_THREADS={threads}, on {processors} processors (load"
    yield f"average {load:.1f} at the end, this and all else), and the processor time that each took:"
    rows = {
        f"`{verb}`": (one["seconds"], one["processor_seconds"]) for verb, one in found["commands"].items()
    }
    rows["together"] = (sum(wall for wall, _ in rows.values()), sum(own for _, own in rows.values()))
    cells = ([verb, f"{wall / 60:.1f}", f"{own / 60:.1f}"] for verb, (wall, own) in rows.items())
    yield f"\n{table(('command', 'minutes', 'minutes of processor time'), cells)}"


def _forgetting(found: Mapping[str, Any]) -> Iterator[str]:
    tasks = [*found["scores"]]
    yield "Accuracy in per cent of each task after each task, as `finetune` prints it:"
    rows = ([after, *(_percent(row.get(task)) for task in tasks)] for after, row in found["scores"].items())
    yield f"\n{table(('after', *tasks), rows)}"
    average, transfer = 100 * found["average"], 100 * found["backward_transfer"]
    yield f"The average after the last task is {average:.1f}, the backward transfer {transfer:+.1f}.\n"


def _compared(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"`compare` chose `{found['winner']}` by {found['num_tuning']} definitions, and reports on"
    yield f"{found['num_reporting']} others:"
    rows = ([f"`{one['label']}`", f"{one['scaling']:g}", _percent(one["value"])] for one in found["methods"])
    yield f"\n{table(('method', 'λ', 'accuracy'), rows)}"


def _scores(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    tasks = [*next(iter(found.values()))]
    yield "Scores of all models, as `run` writes them into the card:"
    rows = []
    for model, row in found.items():
        values = [row[task] for task in tasks]
        shares = (*values, sum(values) / len(values))
        rows.append([model.replace("_", " "), *map(_percent, shares)])
    yield f"\n{table(('model', *tasks, 'mean'), rows)}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("wordnet"))
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--nouns", type=Path)
    parser.add_argument("--measure", action="store_true", help="run the commands, and store what comes out")
    parser.add_argument("--render", action="store_true", help="write the page from the stored results alone")
    options = parser.parse_args()
    if not options.render:
        if not options.encoder or not options.nouns:
            parser.error("--encoder and --nouns say what to begin at")
        prepare(options.folder, options.encoder, options.nouns)
    if options.measure:
        RESULTS.write_text(json.dumps(measure(options.folder), indent=2) + "\n")
    if options.measure or options.render:
        render(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
