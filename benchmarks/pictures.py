"""All pictures of made-up results, for 3, 10, 20 and 40 tasks with long names, to be looked at.

python -m benchmarks.pictures FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

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


def draw_all(folder: Path) -> list[Path]:
    """Write every picture for every number of tasks, and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for count in SIZES:
        tasks = long_names(count)
        place = {
            name: folder / f"{name}-{count}.png" for name in ("tradeoff", "comparison", "front", "diagnosis")
        }
        written += draw_tradeoff(draw_scores(tasks), draw_preference(tasks), place["tradeoff"])
        written += draw_comparison(
            draw_comparison_rows(count), Scale("accuracy", is_share=True), place["comparison"]
        )
        written += draw_front(draw_surface(tasks, num_points=count + 20), place["front"])
        written += draw_cosines(draw_diagnosis(tasks, num_layers=32), place["diagnosis"])
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    for path in draw_all(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
