"""All pictures at all numbers of tasks: size, overlaps, both colour schemes, and names that were cut."""

import itertools
import re
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_rgb

from hub_magmax.reporting.figures import (
    Scale,
    comparison_figure,
    cosines_figure,
    draw_comparison,
    draw_cosines,
    draw_front,
    draw_tradeoff,
    front_figure,
    tradeoff_figure,
)
from hub_magmax.reporting.figures.style import BASE, DARK, MERGED, OWN, PAGE, QUIET, STRIPE, TEXT, WANTED
from hub_magmax.reporting.figures.writing import svg_text
from hub_magmax.text import cut_name, cut_names
from tests.drawn import (
    draw_comparison_rows,
    draw_diagnosis,
    draw_preference,
    draw_scores,
    draw_surface,
    long_names,
)
from tests.test_reporting_figures import texts

SIZES = (3, 10, 20, 40)
#: Inches of the tallest picture: at 200 dots per inch, two screens of a phone.
TALLEST = 9.6

FIGURES = {
    "tradeoff": lambda tasks: tradeoff_figure(draw_scores(tasks), draw_preference(tasks)),
    "comparison": lambda tasks: comparison_figure(draw_comparison_rows(len(tasks)), Scale("accuracy", True)),
    "front": lambda tasks: front_figure(draw_surface(tasks, num_points=len(tasks) + 10)),
    "diagnosis": lambda tasks: cosines_figure(draw_diagnosis(tasks, num_layers=3 * len(tasks))),
}

DRAWN = {
    "tradeoff": lambda tasks, path: draw_tradeoff(draw_scores(tasks), draw_preference(tasks), path),
    "comparison": lambda tasks, path: draw_comparison(
        draw_comparison_rows(len(tasks)), Scale("accuracy", True), path
    ),
    "front": lambda tasks, path: draw_front(draw_surface(tasks), path),
    "diagnosis": lambda tasks, path: draw_cosines(draw_diagnosis(tasks), path),
}


@pytest.mark.parametrize(
    ("name", "count"),
    [*itertools.product(FIGURES, SIZES), ("tradeoff", 60), ("diagnosis", 60), ("diagnosis", 1)],
)
def test_no_text_overlaps_another_or_leaves_the_picture(name, count):
    figure = FIGURES[name](long_names(count))
    assert figure.get_figheight() <= TALLEST
    figure.canvas.draw()
    placed = texts(figure)
    assert len(placed) >= min(count, 40)
    for text, box in placed:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 + 0.5, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (first, box), (second, other) in itertools.combinations(placed, 2):
        # Lines of text stand closer than their boxes, which hold room for every accent.
        apart = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(apart) <= 1, (first, second)


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_smaller_than_is_legible(name):
    figure = FIGURES[name](long_names(20))
    found = [*figure.texts, *itertools.chain.from_iterable(axes.texts for axes in figure.axes)]
    assert {round(text.get_fontsize(), 1) for text in found} <= {7.0, 7.5}


@pytest.mark.parametrize("count", SIZES)
def test_the_most_preferred_task_comes_first_and_every_task_keeps_a_name_of_its_own(count):
    tasks = long_names(count)
    preference = draw_preference(tasks)
    axes = tradeoff_figure(draw_scores(tasks), preference).axes[0]
    names = [text.get_text() for text in axes.texts if not text.get_text().startswith("n = ")]
    ordered = sorted(tasks, key=lambda task: -preference[task])
    assert len(set(names)) == count
    for name, task in zip(names, ordered, strict=True):
        start, *_, end = name.split("…")
        assert task.startswith(start) and task.endswith(end) and len(name) >= 12


def test_of_more_tasks_than_can_be_read_the_most_preferred_are_drawn():
    tasks = long_names(60)
    figure = tradeoff_figure(draw_scores(tasks), draw_preference(tasks))
    assert any("20 less preferred tasks left out" in text for text, _ in texts(figure))


def test_the_axis_is_repeated_above_a_dozen_rows():
    for count, is_repeated in ((12, False), (13, True)):
        tasks = long_names(count)
        axes = tradeoff_figure(draw_scores(tasks), draw_preference(tasks)).axes[0]
        assert axes.xaxis.get_tick_params()["labeltop"] == is_repeated


@pytest.mark.parametrize("count", [3, 40])
def test_marks_at_a_hundred_per_cent_are_whole(count):
    tasks = long_names(count)
    figure = tradeoff_figure(draw_scores(tasks), draw_preference(tasks))
    figure.canvas.draw()
    axes = figure.axes[0]
    marks = [line for line in axes.lines if line.get_marker() == "D" and line.get_xdata()[0] == 100]
    (mark,) = marks
    assert not mark.get_clip_on()
    x, _ = axes.transData.transform((100, 0))
    half = 0.75 * mark.get_markersize() * figure.dpi / 72  # of its diagonal
    assert x + half < figure.axes[1].get_window_extent().x0


def test_bars_of_the_preference_say_how_long_a_full_one_is():
    figure = tradeoff_figure(draw_scores(["a", "b"]), {"a": 0.8, "b": 0.2})
    written = [text for text, _ in texts(figure)]
    assert "full bar: 0.8" in written
    assert not any("sums to 1" in text for text in written)


@pytest.mark.parametrize("name", ["tradeoff", "comparison", "front"])
def test_pictures_of_scores_say_which_direction_is_better(name):
    assert any("accuracy (%), higher is better" in text for text, _ in texts(FIGURES[name](long_names(3))))


def test_scores_that_are_no_shares_have_their_unit_on_the_axis():
    assert Scale("log-likelihood", False, "nats per token").title(4) == (
        "log-likelihood (nats per token), higher is better"
    )
    assert Scale("a" * 200, True).title(2.8).endswith("… (%), higher is better".replace("…", "a" * 3))


def test_a_sweep_shows_every_model_by_weight_and_score_and_the_one_for_the_recipe():
    surface = draw_surface(["a", "b", "c"], num_points=30)
    figure = front_figure(surface)
    order = sorted(range(3), key=lambda task: -surface.wanted[task])
    for axes, task in zip(figure.axes, order, strict=True):
        lines = [line for line in axes.lines if line.get_marker() == "o"]
        drawn = {
            (round(x, 9), round(y, 9))
            for line in lines[:2]
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        }
        assert drawn == {
            (round(point.weights[task], 9), round(100 * point.scores[task].value, 9))
            for point in surface.points
        }
        best = surface.points[surface.best]
        ring = lines[-1].get_xdata()[0], lines[-1].get_ydata()[0]
        assert ring == pytest.approx((best.weights[task], 100 * best.scores[task].value))
    means = [sum(w * s.value for w, s in zip(surface.wanted, p.scores, strict=True)) for p in surface.points]
    assert surface.best == max(range(len(means)), key=means.__getitem__)


def test_deviations_over_seeds_are_shown_where_there_are_some():
    rows = draw_comparison_rows(5)
    written = [text for text, _ in texts(comparison_figure(rows, Scale("accuracy", True)))]
    assert f"{100 * rows[2].score.value:.1f} ± 0.8" in written
    assert any(text.endswith("±: sd of seeds") for text in written)


def test_the_matrix_has_cosines_above_its_diagonal_and_agreement_below():
    found = draw_diagnosis(["a", "b", "c"])
    axes = cosines_figure(found).axes[0]
    cells = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert cells[2, 0] == f"{found.whole.cosines[0, 2]:.2f}".replace("-", "\N{MINUS SIGN}")
    assert cells[0, 2] == f"{100 * found.whole.sign_agreement[0, 2]:.0f} %"
    assert (1, 1) not in cells


@pytest.mark.parametrize(("count", "words"), [(3, "a pair of tasks"), (20, "a task: its mean cosine")])
def test_what_a_column_of_the_layers_is_stands_on_the_picture(count, words):
    written = [text for text, _ in texts(cosines_figure(draw_diagnosis(long_names(count))))]
    assert any(text.startswith(f"layers; a column is {words}") for text in written)
    assert any(text.endswith("above the diagonal: cosine, below: agreement in sign") for text in written)


# Both schemes.


@pytest.mark.parametrize("name", DRAWN)
def test_a_png_and_an_svg_are_written_and_the_svg_is_only_a_picture(tmp_path, name):
    tasks = long_names(5)
    png, svg = DRAWN[name](tasks, tmp_path / "p.png")
    assert png.read_bytes().startswith(b"\x89PNG") and svg == tmp_path / "p.svg"
    tree = ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    kinds = {node.tag.removeprefix(space) for node in tree.iter()}
    allowed = {"svg", "title", "style", "defs", "g", "path", "text", "use", "clipPath", "rect", "image"}
    assert kinds <= allowed | {"tspan"}
    assert not any(key.lower().startswith("on") for node in tree.iter() for key in node.attrib)
    links = {value for node in tree.iter() for key, value in node.attrib.items() if key.endswith("href")}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert len(svg.read_bytes()) < 200_000
    assert tree.find(f"{space}title").text


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_values_give_the_same_svg_and_no_date(tmp_path, name):
    found = [DRAWN[name](long_names(3), tmp_path / f"{n}.png")[1].read_bytes() for n in range(2)]
    assert found[0] == found[1]
    assert not re.search(rb"\d{4}-\d{2}-\d{2}|atplotlib v", found[0])


def test_texts_of_the_svg_are_texts_and_hostile_ones_are_inert():
    hostile = "</text><script>alert(1)</script>&\"'--><!--]]>"
    rows = [row._replace(label=hostile) for row in draw_comparison_rows(3)]
    found = svg_text(comparison_figure(rows, Scale(hostile, True)), hostile)
    tree = ElementTree.fromstring(found)
    space = "{http://www.w3.org/2000/svg}"
    assert tree.find(f"{space}title").text == hostile
    assert sum(node.text == hostile for node in tree.iter(f"{space}text")) == 3
    assert not list(tree.iter(f"{space}script")) and "<script" not in found


@pytest.mark.parametrize("name", FIGURES)
def test_every_colour_of_an_svg_has_a_dark_one(name):
    found = svg_text(FIGURES[name](long_names(5)), "title")
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", re.sub(r"<style.*?</style>", "", found)))
    assert used and used <= set(DARK)
    assert "@media (prefers-color-scheme: dark)" in found
    # Black is the default and would stay black.
    assert not re.search(r"<text (?![^>]*fill: )", found)


def luminance(colour):
    channels = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [lambda colour: colour, DARK.__getitem__], ids=["light", "dark"])
def test_texts_and_marks_stand_out_in_both_schemes(scheme):
    grounds = [scheme(PAGE), scheme(STRIPE)]
    for text, ground in itertools.product((TEXT, QUIET), grounds):
        assert contrast(scheme(text), ground) >= 4.5
    for mark, ground in itertools.product((BASE, OWN, MERGED, WANTED), grounds):
        assert contrast(scheme(mark), ground) >= 3
    assert contrast(PAGE, DARK[PAGE]) > 10


@pytest.mark.parametrize("scheme", [lambda colour: colour, DARK.__getitem__], ids=["light", "dark"])
@pytest.mark.parametrize("colour", [OWN, MERGED])
def test_numbers_stand_out_on_the_strongest_colour_of_the_matrix(scheme, colour):
    # Cells are transparent, at most three quarters opaque, and not changed by the scheme.
    ground = to_rgb(scheme(PAGE))
    cell = tuple(0.75 * c + 0.25 * g for c, g in zip(to_rgb(colour), ground, strict=True))
    assert contrast(scheme(TEXT), cell) >= 4.5


# Names.


def short(length):
    return lambda text: len(text) <= length


def test_a_long_name_is_cut_in_the_middle_and_a_short_one_is_not():
    assert cut_name("abcdefghij", short(10)) == "abcdefghij"
    assert cut_name("abcdefghij", short(7)) == "abc…hij"
    assert cut_name("abcdefghij", short(6)) == "abc…ij"


def test_names_that_differ_in_the_middle_alone_keep_that_part():
    names = [f"sentiment-{number:02d}-learning-rate-3e-5" for number in range(12)]
    found = cut_names(names, short(16))
    assert len(set(found)) == 12 and max(map(len, found)) <= 16
    assert all(f"{number:02d}" in text for number, text in enumerate(found))


def test_names_that_no_cut_tells_apart_are_numbered():
    names = ["a" * 30 + letter + "b" * 20 + letter + "c" * 30 for letter in "xy"]
    assert len(set(cut_names(names, short(9)))) == 2
    names = [f"{'a' * 20}{'x' * 20}{n}{'b' * 30}{'y' * 20}" for n in range(2)] + ["a" * 5 + "y" * 5]
    found = cut_names(names, short(8))
    assert len(set(found)) == 3 and max(map(len, found)) <= 8


def test_equal_names_stay_equal():
    assert cut_names(["a" * 20, "a" * 20], short(5)) == ["aa…aa", "aa…aa"]
