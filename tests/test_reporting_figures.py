"""The picture of the card: what is on it, and that it can be read."""

import itertools
import subprocess
import sys

import pytest
from matplotlib.colors import to_rgb

from hub_magmax.errors import OutputError
from hub_magmax.evaluation.scores import Score, Scores
from hub_magmax.reporting.figures import draw_tradeoff, tradeoff_figure

PIXELS = 800


def measured(tasks, num_examples=90):
    values = {"base_model": (0.3, 0.2, 0.4), "own": (0.99, 0.9, 1.0), "merged": (0.7, 0.55, 0.85)}
    return Scores(
        "accuracy",
        "image-classification",
        tuple(
            Score(task if model == "own" else model, task, *numbers, num_examples)
            for task in tasks
            for model, numbers in values.items()
        ),
        {},
    )


def uniform(tasks):
    return {task: 1 / len(tasks) for task in tasks}


def texts(figure):
    """Return every text that is drawn, with its place in pixels."""
    found = [*figure.texts, *itertools.chain.from_iterable(legend.get_texts() for legend in figure.legends)]
    for axes in figure.axes:
        found += axes.texts
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            found.append(axis.label)
            for tick in axis.get_major_ticks():
                if min(low, high) <= tick.get_loc() <= max(low, high):
                    found += [label for label in (tick.label1, tick.label2) if label.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in found if text.get_text()]


def check_texts(figure, least):
    """Check that there are so many texts at least, all in the picture, and none over another."""
    figure.canvas.draw()
    placed = texts(figure)
    assert len(placed) >= least
    for text, box in placed:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (first, box), (second, other) in itertools.combinations(placed, 2):
        assert not box.overlaps(other), (first, second)


def marks(figure):
    """Return the place of every mark, in pixels, by its row and series."""
    axes = figure.axes[0]
    lines = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    return [axes.transData.transform((line.get_xdata()[0], line.get_ydata()[0])) for line in lines]


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 20, 30])
@pytest.mark.parametrize("letter", ["i", "e_", "W"])
def test_no_label_overlaps_another_or_leaves_the_picture(num_tasks, letter):
    tasks = [f"{number:02d}{letter * 30}"[:30] for number in range(num_tasks)]
    figure = tradeoff_figure(measured(tasks, 12_345), uniform(tasks))
    check_texts(figure, 2 * num_tasks)


def test_marks_stay_clear_of_names():
    tasks = ["a" * 30, "b" * 30]
    figure = tradeoff_figure(measured(tasks), uniform(tasks))
    figure.canvas.draw()
    radius = 7
    for (_, box), (x, y) in itertools.product(texts(figure), marks(figure)):
        outside = x + radius < box.x0 or x - radius > box.x1 or y + radius < box.y0 or y - radius > box.y1
        assert outside


def test_names_and_sizes_and_weights_are_written_out():
    figure = tradeoff_figure(measured(["cats", "dogs"], 1234), {"cats": 0.75, "dogs": 0.25})
    written = [text for text, _ in texts(figure)]
    for text in ("cats", "dogs", "n = 1,234", "0.75", "0.25", "base model", "own checkpoint", "merged"):
        assert text in written
    assert "accuracy (%), higher is better" in written and "lines: 95 % intervals" in written


def test_marks_and_intervals_are_where_the_scores_are():
    axes = tradeoff_figure(measured(["a"]), {"a": 1.0}).axes[0]
    lines = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    assert [line.get_xdata()[0] for line in lines] == pytest.approx([30, 99, 70])
    bars = [segment[:, 0] for bar in axes.collections for segment in bar.get_segments()]
    assert [tuple(bar) for bar in bars] == [
        pytest.approx((20, 40)),
        pytest.approx((90, 100)),
        pytest.approx((55, 85)),
    ]


def test_scores_that_are_no_shares_keep_their_unit():
    scores = measured(["a"])
    odd = Scores("log-likelihood", scores.pipeline_tag, scores.scores, {}, is_share=False)
    figure = tradeoff_figure(odd, {"a": 1.0})
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert [line.get_xdata()[0] for line in lines] == pytest.approx([0.3, 0.99, 0.7])
    low, high = figure.axes[0].get_xlim()
    assert low < 0.2 and high > 1.0
    assert "log-likelihood, higher is better" in [text for text, _ in texts(figure)]


def test_the_axis_holds_every_interval():
    low, high = tradeoff_figure(measured(["a"]), {"a": 1.0}).axes[0].get_xlim()
    assert low < 20 and high > 100


def test_bars_are_as_long_as_the_preference():
    axes = tradeoff_figure(measured(["a", "b"]), {"a": 0.8, "b": 0.2}).axes[1]
    assert [bar.get_width() for bar in axes.patches if bar.get_height() < 0.5] == [0.8, 0.2]


def test_kinds_of_model_differ_in_shape_and_in_lightness():
    axes = tradeoff_figure(measured(["a"]), {"a": 1.0}).axes[0]
    lines = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    assert len({line.get_marker() for line in lines}) == 3
    lightness = [
        sum(w * c for w, c in zip((0.21, 0.72, 0.07), to_rgb(line.get_color()), strict=True))
        for line in lines
    ]
    assert len({round(value, 2) for value in lightness}) == 3


def test_a_task_without_scores_keeps_its_row():
    written = [text for text, _ in texts(tradeoff_figure(measured(["a"]), {"a": 0.5, "b": 0.5}))]
    assert "b" in written and "not measured" in written


def test_a_picture_without_any_score_can_be_drawn(tmp_path):
    draw_tradeoff(Scores("accuracy", "image-classification", (), {}), {"a": 1.0}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_a_dollar_in_the_metric_is_not_mathematics():
    scores = measured(["a"])
    odd = Scores("$\\frac", scores.pipeline_tag, scores.scores, {})
    tradeoff_figure(odd, {"a": 1.0}).canvas.draw()


@pytest.mark.parametrize("num_tasks", [2, 12])
def test_the_file_is_a_png_wide_enough_for_twice_its_smallest_size(tmp_path, num_tasks):
    tasks = [f"task-{number}" for number in range(num_tasks)]
    draw_tradeoff(measured(tasks), uniform(tasks), tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    assert width == PIXELS
    assert 80 * num_tasks < height < 110 * num_tasks + 300
    assert len(content) < 500_000


def test_the_same_values_give_the_same_bytes(tmp_path):
    for name in ("first.png", "second.png"):
        draw_tradeoff(measured(["a", "b"]), uniform(["a", "b"]), tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"nowhere.*cannot be written"):
        draw_tradeoff(measured(["a"]), {"a": 1.0}, tmp_path / "nowhere" / "picture.png")


def test_pyplot_is_never_imported(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from hub_magmax.evaluation.scoring import Scores\n"
        "from hub_magmax.reporting.figures import draw_tradeoff\n"
        "assert 'matplotlib' not in sys.modules\n"
        "draw_tradeoff(Scores('accuracy', '', (), {}), {'a': 1.0}, pathlib.Path(sys.argv[1]))\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "picture.png")], check=True)
