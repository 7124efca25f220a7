"""Run every recipe of `recipes/` on the digits and store its card, and the values behind it, in `cards/`.

What the Hub recipes name is served by a local Hub. The stored cards link to the real one all the same:
they are rendered again from the values stored beside them.

    python -m benchmarks.cards              make the checkpoints, run everything
    python -m benchmarks.cards quickstart   use the checkpoints that `hub-magmax quickstart` made
    python -m benchmarks.cards --only ties  run one recipe, or several
    python -m benchmarks.cards --render     write the cards again from the stored values
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from hub_magmax.evaluation.scores import OUTCOMES_NAME, SCORES_NAME, read_scores
from hub_magmax.files import write_text
from hub_magmax.merging.output.report import REPORT_NAME, read_report
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, read_lock
from hub_magmax.reporting.card import render_card
from hub_magmax.reporting.card_file import CARD_NAME, PICTURE_NAME
from tests.local_hub.hub import LocalHub

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
CARDS = ROOT / "cards"

#: Files stored of a run, besides its card and its picture.
VALUES = (REPORT_NAME, SCORES_NAME, OUTCOMES_NAME, LOCK_NAME, "recipe.yaml")

#: The colours of the picture: enough that nobody sees the difference, at a third of the bytes.
NUM_COLOURS = 64

#: Variables that would lead a run away from the local Hub.
_MISLEADING = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "WORLD_SIZE", "RANK")


def recipe_names() -> tuple[str, ...]:
    """Return the names of the shipped recipes, sorted."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def lay_out(workspace: Path, family: Path) -> dict[str, Path]:
    """Copy recipes and checkpoints to where the recipes look for them; return each recipe's path."""
    made = shutil.ignore_patterns("merged", "*.partial")
    shutil.copytree(family, workspace / "quickstart", ignore=made, dirs_exist_ok=True)
    shutil.copytree(RECIPES, workspace / "recipes")
    # The quickstart puts its recipe beside the checkpoints.
    shutil.copy(RECIPES / "quickstart.yaml", workspace / "quickstart" / "recipe.yaml")
    paths = {name: workspace / "recipes" / f"{name}.yaml" for name in recipe_names()}
    return paths | {"quickstart": workspace / "quickstart" / "recipe.yaml"}


def add_family(hub: LocalHub, family: Path) -> None:
    """Put checkpoints and data on the local Hub, under the names that the Hub recipes use."""
    checkpoints = family / "checkpoints"
    for checkpoint in sorted(checkpoints.iterdir()):
        hub.add_repo(f"me/digits-{checkpoint.name}", folder=checkpoint)
    hub.add_repo("me/digits-sequence", folder=checkpoints / "base")
    for number, task in enumerate(load_recipe(RECIPES / "quickstart.yaml").task_names, 1):
        hub.add_repo("me/digits-sequence", folder=checkpoints / task, revision=f"task-{number}")
    hub.add_repo("me/digits", folder=family / "data", repo_type="dataset")


def make_cards(family: Path | None, only: Sequence[str]) -> None:
    """Run every recipe, or some of them, and store what they measured."""
    with TemporaryDirectory(prefix="hub_magmax_") as folder:
        workspace = Path(folder)
        if family is None:
            from hub_magmax.quickstart import make_family

            family = make_family(workspace / "quickstart", report=_say).folder
            recipes = lay_out(workspace / "work", family)
        else:
            recipes = lay_out(workspace / "work", family)
        # A clock that stands still gives commits that are the same on every run.
        with LocalHub(clock=lambda: 1_767_225_600.0) as hub:
            add_family(hub, family)
            environment = {key: value for key, value in os.environ.items() if key not in _MISLEADING}
            environment |= hub.environment | {"HF_HOME": str(workspace / "home")}
            recipes = {name: path for name, path in recipes.items() if not only or name in only}
            for name, path in recipes.items():
                _say(f"running {name}")
                _run(path, environment)
        # Not before all of them ran: the stored cards belong together.
        for name, path in recipes.items():
            store(load_recipe(path).output_path, CARDS / name)


def _run(recipe: Path, environment: dict[str, str]) -> None:
    """Run one recipe in a process of its own: huggingface_hub reads its variables when it is imported."""
    command = [sys.executable, "-m", "hub_magmax", "run", str(recipe)]
    done = subprocess.run(command, env=environment, check=False, timeout=600, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)


def store(output: Path, folder: Path) -> None:
    """Copy the values of a run from its output to `folder`, and render its card there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in VALUES:
        shutil.copy(output / name, folder / name)
    draw(folder)
    write_text(folder / CARD_NAME, render(folder))


def draw(folder: Path) -> None:
    """Draw the picture of the values stored in `folder`, with few colours."""
    from hub_magmax.reporting.figures import draw_tradeoff

    with TemporaryDirectory() as place:
        shares = read_lock(folder / LOCK_NAME).preference.shares
        picture, _ = draw_tradeoff(read_scores(folder), shares, Path(place) / PICTURE_NAME)
        (folder / PICTURE_NAME).write_bytes(reduced(picture.read_bytes()))


def render(folder: Path) -> str:
    """Return the card of the values stored in `folder`, with links to the real Hub."""
    from huggingface_hub import constants

    recipe, locked = load_recipe(folder / "recipe.yaml"), read_lock(folder / LOCK_NAME)
    report, scores = read_report(folder / REPORT_NAME), read_scores(folder)
    with patch.object(constants, "ENDPOINT", "https://huggingface.co"):
        return render_card(recipe, locked, report, scores, picture=PICTURE_NAME)


def reduced(png: bytes, num_colours: int = NUM_COLOURS) -> bytes:
    """Return a PNG with few colours."""
    from PIL import Image

    stream = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(num_colours, dither=Image.Dither.NONE)
    picture.save(stream, format="png", optimize=True)
    return stream.getvalue()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards", description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="?", type=Path, help="folder that `hub-magmax quickstart` made")
    parser.add_argument("--only", nargs="+", default=[], choices=recipe_names(), help="recipes to run")
    parser.add_argument("--render", action="store_true", help="write the cards again from the stored values")
    options = parser.parse_args(arguments)
    if not options.render:
        make_cards(options.family, options.only)
        return
    for name in recipe_names():
        write_text(CARDS / name / CARD_NAME, render(CARDS / name))
        draw(CARDS / name)


if __name__ == "__main__":
    main()
