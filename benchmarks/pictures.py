"""All pictures of made-up results, for 3, 10, 20 and 40 tasks with long names, to be looked at.

python -m benchmarks.pictures FOLDER
python -m benchmarks.pictures FOLDER --write     # and store those that docs/output.md shows
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.cards import reduced
from hub_magmax.reporting.figures import Scale, draw_comparison, draw_cosines, draw_front, draw_tradeoff
from tests.drawn import (
    draw_comparison_rows,
    draw_diagnosis,
    draw_preference,
    draw_scores,
    draw_surface,
    long_names,
)

SIZES = (3, 10, 20, 40)

#: Pictures that the documentation shows, and where these are.
STORED = ("tradeoff-40.png", "front-10.png", "diagnosis-20.png")
PLACE = Path(__file__).parents[1] / "docs" / "pictures"


def draw_all(folder: Path) -> list[Path]:
    """Write every picture for every number of tasks, and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for count in SIZES:
        tasks = long_names(count)
        scale = Scale("accuracy", is_share=True)
        written += draw_tradeoff(draw_scores(tasks), draw_preference(tasks), folder / f"tradeoff-{count}.png")
        written += draw_comparison(draw_comparison_rows(count), scale, folder / f"comparison-{count}.png")
        written += draw_front(draw_surface(tasks, num_points=count + 20), folder / f"front-{count}.png")
        written += draw_cosines(draw_diagnosis(tasks, num_layers=32), folder / f"diagnosis-{count}.png")
    return written


def store(folder: Path) -> None:
    """Copy the pictures that the documentation shows, with few colours."""
    PLACE.mkdir(exist_ok=True)
    for name in STORED:
        (PLACE / name).write_bytes(reduced((folder / name).read_bytes(), 256))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="store what the documentation shows")
    options = parser.parse_args()
    for path in draw_all(options.folder):
        print(path)
    if options.write:
        store(options.folder)


if __name__ == "__main__":
    main()
