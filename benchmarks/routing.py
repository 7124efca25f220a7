"""Measure routers on digits, and on dictionary definitions, over several families of checkpoints.

    python -m benchmarks.routing digits --folder families      # five seeds, made where they are not there
    python -m benchmarks.routing definitions --folder families --encoder MODEL --nouns data.noun
    python -m benchmarks.routing --render                      # the section of docs/routing.md again

Each family is merged uniformly by tunable_magmax; `benchmarks/wordnet.py` says what MODEL and data.noun are.
What was measured is stored in benchmarks/results/routing.json, and the section and its picture are written
from that alone.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from benchmarks.cards import reduced
from benchmarks.page_tables import table
from hub_magmax.evaluation.scores import MERGED
from hub_magmax.evaluation.scoring import prepare
from hub_magmax.fleet.predicting import deterministic
from hub_magmax.fleet.routing.measuring import Aim, measure
from hub_magmax.fleet.routing.observing import Observed, observe
from hub_magmax.fleet.routing.splitting import Parts, divided, divided_beside
from hub_magmax.fleet.routing.verifier import Verifier, calibrated, fit
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.quickstart import make_family
from hub_magmax.quickstart.demo import shipped_recipe
from hub_magmax.recipe.loading import load_recipe, updated
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.figures.routing import draw_routing
from hub_magmax.reporting.router_report import RouterReport
from hub_magmax.text import unseen

RESULTS = Path(__file__).parent / "results" / "routing.json"
PAGE = Path(__file__).parents[1] / "docs" / "routing.md"
PICTURE = PAGE.parent / "pictures" / "routing.png"

#: Share of escalated examples at which methods are compared.
SHARE = 0.3

#: Shuffled copies of each family's answers.
NUM_SHUFFLES = 2

_UNIFORM: Mapping[str, Any] = {"geometric": {"ratio": 1.0}}
_SECTION = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.DOTALL)


def digits(folder: Path, seed: int, *, with_training: bool = False) -> Recipe:
    """Return a recipe of a family of digits, which is made if it is not there.

    With the training images, a router is fitted to these, and all test images measure it.
    """
    place = folder / f"digits-{seed}"
    make_family(place, seed=seed, report=print)
    (place / "recipe.yaml").write_text(shipped_recipe())
    recipe = load_recipe(place / "recipe.yaml")
    images = {name: {"dataset": f"./data/{name}", "split": "train"} for name in recipe.task_names}
    more = {"routing": {"tasks": images}} if with_training else {}
    return updated(recipe, {"preference": _UNIFORM, **more})


def definitions(folder: Path, seed: int, encoder: Path, nouns: Path, num_tasks: int) -> Recipe:
    """Return a recipe of a family of classifiers of definitions, which is made if it is not there."""
    from benchmarks import wordnet

    place = folder / f"definitions-{seed}"
    values = wordnet.make_family(place, encoder, nouns, seed, num_tasks, print)
    (place / "recipe.yaml").write_text(json.dumps({**values, "preference": _UNIFORM}))
    return load_recipe(place / "recipe.yaml")


def measured(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return the report on a router, and how many of shuffled answers were not called worthless."""
    models, rng = (MERGED, *recipe.task_names), np.random.default_rng(seed)
    observed, parts = _observed(recipe, seed)
    verifier = _verifier(observed, parts)
    report = measure(observed, parts, verifier, models, Aim(SHARE))
    held_out = observed.at(parts.held_out)
    expected = verifier.classes[verifier.shares(held_out.features).argmax(axis=1)]
    passed = 0
    for _ in range(NUM_SHUFFLES):
        order = rng.permutation(len(observed.tasks))
        names = "tasks", "labels", "answers", "right"
        shuffled = replace(observed, **{name: getattr(observed, name)[order] for name in names})
        found = measure(shuffled, parts, _verifier(shuffled, parts), models, Aim(SHARE))
        passed += found.is_useful
    return {
        "seed": seed,
        "shuffles": NUM_SHUFFLES,
        "shuffled_useful": passed,
        "expected_class_is_right": float((expected == held_out.labels).mean()),
        "report": report.to_dict(),
    }


def _observed(recipe: Recipe, seed: int) -> tuple[Observed, Parts]:
    """Return what the models of a family say of its examples, and the parts of these."""
    measuring = _seen(recipe, "observed.npz")
    if recipe.routing is None:
        return measuring, divided(measuring.contents, seed)
    assert recipe.evaluation is not None
    evaluation = recipe.evaluation.model_copy(update={"tasks": recipe.routing.tasks})
    fitting = _seen(recipe.model_copy(update={"evaluation": evaluation}), "fitting.npz")
    return fitting.joined(measuring), divided_beside(fitting.contents, measuring.contents, seed)


def _seen(recipe: Recipe, name: str) -> Observed:
    """Return what the models say of the evaluation's examples; observed once."""
    path = recipe.folder / name
    if not path.is_file():
        locked = lock(recipe)
        if not recipe.output_path.is_dir():
            merge(plan(recipe, locked), recipe.output_path)
        with deterministic():
            seen = observe(prepare(recipe, locked, recipe.output_path), print, unseen)
        np.savez(path, **vars(seen))
    with np.load(path) as found:
        arrays = {name: found[name] for name in found.files}
    return Observed(**arrays | {"contents": tuple(arrays["contents"].tolist())})


def _verifier(observed: Observed, parts: Parts) -> Verifier:
    return calibrated(fit(observed.at(parts.fit)), observed.at(parts.calibrate))


def section(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the part of the page that is written from results."""
    rows: list[list[str]] = []
    words = []
    for name, found in results.items():
        rows += [_measured(f"{name}, {one['seed']}", one["report"]) for one in found]
        words += _told(name, found)
    every = [one for found in results.values() for one in found]
    passed, drawn = sum(one["shuffled_useful"] for one in every), sum(one["shuffles"] for one in every)
    words.append(f"Of {drawn} routers that were fitted and measured on shuffled answers {passed} passed.")
    return "\n".join([table(_HEAD, rows), *words, ""])


def _measured(name: str, report: Mapping[str, Any]) -> list[str]:
    """Return the row of one family."""
    gain = report["operation"]["over_never"]
    shown = f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
    values = [f"{100 * value:.1f}" for value in _values(report)]
    return [name, *values, shown, f"{gain['p_value']:.1g}"]


def _told(name: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is said of the families of one kind of data."""
    reports = [one["report"] for one in found]
    half, all_ = (_kept(reports, share) for share in (0.5, 1.0))
    expected = np.mean([one["expected_class_is_right"] for one in found])
    return [
        _tested(name, np.array([_values(report) for report in reports])),
        f"With half of the calls it keeps {half:.2f}, with all of them {all_:.2f}.",
        f"The class that the verifier itself expects is right for {100 * expected:.1f} %.",
    ]


#: Columns of the table; those of models are where `SHARE` is escalated, the gain at the router's threshold.
_HEAD = (
    *("data, seed", "merged", "router", "by confidence", "at random", "oracle", "own task"),
    *("gain at the threshold", "p"),
)


def _at(report: Mapping[str, Any], share: float) -> Mapping[str, Any]:
    """Return the point of the curve where this share is escalated."""
    found: Mapping[str, Any] = next(point for point in report["costs"] if point["share"] == share)
    return found


def _kept(reports: Sequence[Mapping[str, Any]], share: float) -> float:
    """Return the mean share of the distance that is kept where this share is escalated."""
    kept = []
    for report in reports:
        never, own = report["never"]["value"], report["by_task"]["value"]
        kept.append((_at(report, share)["router"]["value"] - never) / (own - never))
    return float(np.mean(kept))


def _values(report: Mapping[str, Any]) -> list[float]:
    point = _at(report, SHARE)
    at = [point["router"]["value"], point["confidence"], point["random"], point["oracle"]]
    return [report["never"]["value"], *at, report["by_task"]["value"]]


def _tested(name: str, values: np.ndarray) -> str:
    """Return the share of the distance that is kept, and paired t-tests over three families or more."""
    from scipy.stats import ttest_1samp

    never, router, confidence, random, oracle, own = values.T
    kept, most = (router - never) / (own - never), (oracle - never) / (own - never)
    words = (
        f"{name.capitalize()}: the router keeps {kept.mean():.2f} of the distance from merged to own task, "
    )
    words += f"the oracle at the same cost {most.mean():.2f}."
    if len(values) < 3:
        return words
    told = []
    for label, other in (("merged", never), ("random", random), ("confidence", confidence)):
        gained, p_value = 100 * (router - other).mean(), ttest_1samp(router - other, 0).pvalue
        told.append(f"{gained:+.1f} points over {label} (p = {p_value:.2g})")
    return f"{words} Paired over {len(values)} families: {', '.join(told)}."


def render() -> None:
    """Write the section of the page, and the picture of the first family, from what is stored."""
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(_SECTION.sub(lambda _: section(results), PAGE.read_text()))
    first = TypeAdapter(RouterReport).validate_python(next(iter(results.values()))[0]["report"])
    with TemporaryDirectory() as folder:
        drawn, _ = draw_routing(first, Path(folder) / "routing.png")
        PICTURE.write_bytes(reduced(drawn.read_bytes(), 256))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("data", nargs="?", choices=("digits", "definitions"))
    parser.add_argument("--folder", type=Path, default=Path("families"), help="families of checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--encoder", type=Path, help="of definitions")
    parser.add_argument("--nouns", type=Path, help="of definitions")
    parser.add_argument("--tasks", type=int, default=5, help="of definitions, the first of them")
    parser.add_argument("--render", action="store_true", help="write the page from the stored results alone")
    options = parser.parse_args()
    for seed in [] if options.render else options.seeds:
        if options.data == "digits":
            recipes = {
                "digits": digits(options.folder, seed),
                "digits with routing": digits(options.folder, seed, with_training=True),
            }
        else:
            more = (options.encoder, options.nouns, options.tasks)
            recipes = {"definitions": definitions(options.folder, seed, *more)}
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        for name, recipe in recipes.items():
            others = [one for one in results.get(name, []) if one["seed"] != seed]
            found = [*others, measured(recipe, seed)]
            results[name] = sorted(found, key=lambda one: one["seed"])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{options.data} {seed}: stored", flush=True)
    render()


if __name__ == "__main__":
    main()
