"""The page to explore trade-offs with, in a real browser where there is one."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from hub_magmax.evaluation.scores import Score
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.reporting.explorer import render_explorer
from hub_magmax.reporting.figures import draw_tradeoff
from hub_magmax.reporting.tradeoff_surface import Point, Surface
from tests.browser import Page, find_browser
from tests.drawn import draw_preference, draw_scores, draw_surface, long_names
from tests.families import recipe_values

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&lt;\u202e`${alert(3)}`"


def make_surface(num_tasks=3, metric="accuracy", is_share=True):
    """A surface whose scores are the weights' square roots, on a coarse lattice."""
    from hub_magmax.analysis.simplex import lattice

    tasks = tuple(f"task-{number}" for number in range(num_tasks))

    def scores(values):
        return tuple(
            Score("merged", task, float(v), float(v) - 0.05, float(v) + 0.05, 100 + n)
            for n, (task, v) in enumerate(zip(tasks, values, strict=True))
        )

    points = tuple(
        Point(tuple(float(w) for w in weights), scores(np.sqrt(weights))) for weights in lattice(num_tasks, 4)
    )
    ones = (1.0,) * num_tasks
    method = {"name": "average", "scaling": 1.0}
    return Surface(
        metric, is_share, method, "grid", tasks, tasks, points, scores((0.1,) * num_tasks), scores(ones)
    )


def make_recipe(num_tasks=3, **changes):
    return parse_recipe(recipe_values([f"task-{number}" for number in range(num_tasks)], **changes))


def measured_in(page_text):
    return json.loads(re.search(r'<script id="measured"[^>]*>(.*?)</script>', page_text, re.S)[1])


def test_the_page_holds_every_measured_number():
    surface = make_surface()
    facts = measured_in(render_explorer(make_recipe(), surface))
    for point, shown in zip(surface.points, facts["points"], strict=True):
        assert tuple(shown["weights"]) == point.weights
        assert [tuple(s) for s in shown["scores"]] == [(s.value, s.low, s.high, None) for s in point.scores]
    assert facts["front"] == list(surface.front)
    assert facts["examples"] == [100, 101, 102]


def test_the_page_asks_for_nothing_from_elsewhere():
    page = render_explorer(make_recipe(), make_surface())
    assert set(re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']*)""", page)) == {"data:,"}
    # The name of SVG's elements, which nobody fetches, and the meta element that forbids fetching.
    assert re.findall(r"http.{12}", page) == ['http-equiv="Cont', "http://www.w3.or"]
    assert "default-src 'none'" in page


def test_hostile_text_stays_in_its_place():
    recipe = make_recipe(base_model=f"./{HOSTILE}")
    page = render_explorer(recipe, make_surface(metric=HOSTILE))
    assert page.count("</script>") == 2
    assert yaml.safe_load(measured_in(page)["recipe"])["base_model"] == f"./{HOSTILE}"
    assert "\u202e" not in page and "\u2028" not in page


def test_no_path_of_this_machine_is_in_the_page(tmp_path):
    places = {"base_model": str(tmp_path / "base"), "output": {"path": str(tmp_path / "out")}}
    recipe = parse_recipe(recipe_values(["a", "b", "c"], **places), folder=tmp_path)
    assert str(tmp_path.parent) not in render_explorer(recipe, make_surface())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no browser: install chromium to test the page that people open")
    page = Page(program, tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def page(browser, tmp_path):
    """Open what is rendered, and check at the end that nobody complained and nothing was asked for."""

    def show(surface=None, recipe=None, **options):
        surface = surface or make_surface()
        path = tmp_path / "tradeoffs.html"
        recipe = recipe or make_recipe(len(surface.tasks))
        path.write_text(render_explorer(recipe, surface), encoding="utf-8")
        browser.complaints.clear()
        browser.requests.clear()
        browser.open(path, **options)
        return browser

    yield show
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("dark", [False, True])
def test_an_svg_follows_the_scheme_of_its_reader(browser, tmp_path, dark):
    tasks = long_names(3)
    _, svg = draw_tradeoff(draw_scores(tasks), draw_preference(tasks), tmp_path / "picture.png")
    browser.complaints.clear()
    browser.open(svg, dark=dark)
    read = "[...document.querySelectorAll('path, text')].map((node) => getComputedStyle(node).fill)"
    fills = browser.evaluate(read)
    page, text = (
        ("rgb(20, 22, 26)", "rgb(240, 241, 243)") if dark else ("rgb(255, 255, 255)", "rgb(26, 26, 26)")
    )
    assert fills[0] == page and text in fills
    assert browser.complaints == []


def shares(page):
    return [
        float(text)
        for text in page.evaluate("[...document.querySelectorAll('output')].map(o => o.textContent)")
    ]


def expected_scores(page):
    found = page.evaluate("[...document.querySelectorAll('.task .number')].map(o => o.textContent)")
    return [float(text.removesuffix("\u00a0%")) for text in found]


def box(page, selector):
    found = page.evaluate(
        f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    return dict(zip(("left", "top", "width", "height"), found, strict=True))


def corner(page, task):
    """Return where a task's corner of the triangle is on the screen."""
    place = box(page, "#triangle")
    x, y = [(150, 26), (12, 264), (288, 264)][task]
    return place["left"] + x * place["width"] / 300, place["top"] + y * place["width"] / 300


def test_it_starts_with_the_same_for_all_and_shows_the_nearest_recipe(page):
    shown = page(recipe=make_recipe(output={"private": True}))
    assert shares(shown) == [0.333] * 3
    text = shown.evaluate("document.getElementById('recipe').textContent")
    recipe = yaml.safe_load(text)
    assert text.startswith("# One point of a sweep. Save it beside")
    assert recipe["output"]["path"].startswith("merged-") and recipe["output"]["private"] is True
    weights = recipe["preference"]["weights"]
    assert sorted(weights.values()) == [0.25, 0.25, 0.5]
    assert parse_recipe(recipe).task_names == ("task-0", "task-1", "task-2")
    assert shown.evaluate("document.querySelectorAll('#near button').length") == 3


def test_the_nearest_points_are_shown_with_preferences_scores_and_intervals(page):
    shown = page()
    shown.drag(corner(shown, 1))
    rows = shown.evaluate(
        "[...document.querySelectorAll('#near tbody tr')].map((row) => row.cells[1].innerText)"
    )
    # The corner is measured: the score of task n is √weight, its interval a twentieth to both sides.
    assert rows == [
        "0\n0.0 [−5.0,\u00a05.0]",
        "1\n100.0 [95.0,\u00a0105.0]",
        "0\n0.0 [−5.0,\u00a05.0]",
        "0.000",
        "yes",
    ]


def test_the_scale_of_the_scores_has_a_unit_and_every_row_its_number_of_examples(page):
    shown = page()
    scale = shown.evaluate("document.querySelector('.scale').innerText").split()
    assert scale == ["0", "25", "50", "75", "100"]
    measure = shown.evaluate("document.getElementById('measure').innerText")
    assert measure == "Scores: accuracy (%), higher is better; thin lines: 95 % interval."
    sizes = shown.evaluate("[...document.querySelectorAll('.task .quiet')].map((row) => row.innerText)")
    assert [text.split("n\u00a0=\u00a0")[1] for text in sizes] == ["100", "101", "102"]


def test_intervals_are_drawn_where_they_were_measured(page):
    shown = page()
    ends = shown.evaluate(
        "[...document.querySelectorAll('.interval')].map((line) => ['x1', 'x2'].map("
        "(end) => line[end].baseVal.valueInSpecifiedUnits))"
    )
    # In per cent: the base model's is 5 to 15, the own checkpoint's 95 to 105.
    assert len(ends) == 6
    assert ends[0] == pytest.approx([5, 15], abs=0.01)
    assert ends[1] == pytest.approx([95, 105], abs=0.01)


def test_dragging_in_the_triangle_moves_the_preference(page):
    shown = page()
    shown.drag(corner(shown, 0), corner(shown, 1))
    assert shares(shown) == pytest.approx([0, 1, 0], abs=0.02)
    # At a measured point the page shows what was measured there.
    assert expected_scores(shown) == pytest.approx([0, 100, 0], abs=2)
    shown.drag(corner(shown, 2))
    assert shares(shown) == pytest.approx([0, 0, 1], abs=0.02)


def test_arrow_keys_move_the_preference(page):
    shown = page()
    shown.evaluate("document.getElementById('triangle').focus()")
    shown.press("ArrowUp", times=5)
    up = shares(shown)
    assert up[0] > 0.4 and up[1] == pytest.approx(up[2], abs=0.02)
    shown.press("ArrowLeft", times=5)
    assert shares(shown)[1] > up[1] > shares(shown)[2]


def test_sliders_work_by_keyboard_and_mouse(page):
    shown = page()
    shown.evaluate("document.getElementById('mass-0').focus()")
    shown.press("ArrowRight", times=20)
    first = shares(shown)
    assert first[0] > 0.334 and sum(first) == pytest.approx(1, abs=0.002)
    place = box(shown, "#mass-2")
    middle = place["top"] + place["height"] / 2
    shown.drag((place["left"] + place["width"] / 2, middle), (place["left"] + place["width"] - 2, middle))
    assert shares(shown)[2] > first[2]


def test_every_control_is_reached_with_the_tab_key(page):
    shown = page()
    seen = []
    for _ in range(13):
        shown.press("Tab")
        seen.append(shown.evaluate("document.activeElement.id || document.activeElement.textContent"))
    for control in ("triangle", "mass-0", "mass-1", "mass-2", "even", "snap", "Go there", "copy", "recipe"):
        assert control in seen, seen


def test_a_measured_point_can_be_gone_to(page):
    shown = page()
    shown.evaluate("document.getElementById('snap').focus()")
    shown.press("Enter")
    assert sorted(shares(shown)) == [0.25, 0.25, 0.5]
    assert sorted(expected_scores(shown)) == pytest.approx([50, 50, 70.7])
    shown.evaluate("document.getElementById('even').click()")
    assert shares(shown) == [0.333] * 3


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_other_numbers_of_tasks_have_sliders_alone(page, num_tasks):
    shown = page(make_surface(num_tasks))
    assert box(shown, "#triangle")["height"] == 0
    shown.press("Tab", times=3)  # past the two buttons
    assert shown.evaluate("document.activeElement.id") == "mass-0"
    shown.evaluate("document.getElementById('mass-1').focus()")
    shown.press("ArrowRight", times=30)
    assert shares(shown)[1] > 1 / num_tasks
    assert len(expected_scores(shown)) == num_tasks


def test_interpolated_scores_lie_between_the_measured_ones(page):
    shown = page()
    shown.drag(corner(shown, 0))
    shown.evaluate("document.getElementById('mass-1').focus()")
    shown.press("ArrowRight", times=7)
    assert all(0 <= score <= 100 for score in expected_scores(shown))
    assert 0 < shares(shown)[1] < 0.1


def test_scores_that_are_no_shares_have_no_per_cent(page):
    shown = page(make_surface(metric="log-likelihood", is_share=False))
    texts = shown.evaluate("document.body.innerText")
    assert "%" not in texts.replace("95 %", "")


@pytest.mark.parametrize("num_tasks", [3, 6])
def test_the_nearest_points_can_be_read_without_scrolling_on_a_phone(page, num_tasks):
    shown = page(make_surface(num_tasks), width=400)
    scrolled = shown.evaluate(
        "(() => { const s = document.querySelector('.scroll'); return s.scrollWidth - s.clientWidth; })()"
    )
    assert scrolled == 0


def test_hostile_text_does_nothing(page):
    shown = page(make_surface(metric=HOSTILE), make_recipe(base_model=f"./{HOSTILE}"))
    assert shown.evaluate("document.querySelectorAll('img, script').length") == 2
    assert "alert(1)" in shown.evaluate("document.getElementById('summary').textContent")


#: Every visible text with the contrast to what is painted behind it (WCAG 2), smallest first.
CONTRASTS = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => { const [r, g, b] = rgb.slice(0, 3).map((c) => { c /= 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (node) => { for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour; } return [255, 255, 255]; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE"].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const text = light(parse(node instanceof SVGElement ? style.fill : style.color));
    const ground = light(behind(node));
    const contrast = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    found.push([contrast, walker.currentNode.textContent]);
  }
  return found.sort((one, other) => one[0] - other[0]);
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_is_legible(page, dark):
    shown = page(dark=dark)
    contrasts = shown.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert contrasts[0][0] >= 4.5, contrasts[0]
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall("[0-9]+", ground))) < 200) == dark


#: Texts whose boxes overlap, of those that are not inside each other.
OVERLAPS = """(() => {
  const found = [], boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.textContent.trim() || ["SCRIPT", "STYLE", "PRE"].includes(node.parentElement.tagName)) continue;
    const range = document.createRange(); range.selectNodeContents(node);
    for (const box of range.getClientRects()) boxes.push([box, node.textContent]);
  }
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [one, first] = boxes[i], [other, second] = boxes[j];
    if (Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1 &&
        Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 3) found.push([first, second]);
  }
  return found;
})()"""


#: What is drawn of a task: the boxes of its name, slider, weight, picture and score.
ROWS = """[...document.querySelectorAll('.task')].map((row) => [...row.children].slice(0, 5).map((part) => {
  const box = part.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; }))"""

WIDTHS = (380, 800, 1400)


def open_drawn(page, num_tasks, width, **options):
    names = long_names(num_tasks)
    surface = draw_surface(names, num_points=num_tasks + 8)
    return page(surface, parse_recipe(recipe_values(names)), width=width, **options), surface


@pytest.mark.parametrize("num_tasks", [3, 10, 20, 40])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_or_leaves_the_screen(page, width, num_tasks):
    shown, _ = open_drawn(page, num_tasks, width)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_slider_and_score_of_a_task_are_in_one_row(page, width):
    shown, _ = open_drawn(page, 40, width)
    rows = shown.evaluate(ROWS)
    assert len(rows) == 40
    for (_, above, _, _), slider, weight, bar, score in rows:
        middle = [(top + bottom) / 2 for _, top, _, bottom in (slider, weight, bar)]
        assert max(middle) - min(middle) < 4
        if width > 700:
            assert abs((score[1] + score[3]) / 2 - middle[0]) < 4
        else:  # above the slider, beside the name
            assert abs(score[1] - above) < 4 and 0 < slider[1] - score[3] < 36
        assert score[3] - score[1] < 30  # one line: "50.0 %" does not wrap
    tops, ends = [row[0][1] for row in rows], [max(box[3] for box in row) for row in rows]
    assert all(end <= top + 1 for end, top in zip(ends, tops[1:], strict=False))


def test_long_names_are_cut_in_the_middle_where_there_are_many_and_told_in_full(page):
    read = "[...document.querySelectorAll('.task label')].map((label) => [label.textContent, label.title])"
    shown, surface = open_drawn(page, 40, 1400)
    found = shown.evaluate(read)
    assert [title for _, title in found] == list(surface.tasks)
    assert len({text for text, _ in found}) == 40 and max(len(text) for text, _ in found) <= 24
    shown, surface = open_drawn(page, 3, 1400)
    assert [text for text, _ in shown.evaluate(read)] == list(surface.tasks)


def test_the_best_preference_for_the_recipes_weights_is_said_first_and_one_click_away(page):
    shown, surface = open_drawn(page, 5, 1000)
    best = surface.points[surface.best]
    mean = sum(w * s.value for w, s in zip(surface.wanted, best.scores, strict=True))
    heading = shown.evaluate("document.querySelector('section:not([hidden]) h2').textContent")
    assert heading == "Best for the recipe's own weights"
    assert f"score at best {100 * mean:.1f}\u00a0% on average" in shown.evaluate(
        "document.getElementById('best-text').textContent"
    )
    shown.press("Tab")
    assert shown.evaluate("document.activeElement.id") == "best"
    shown.press("Enter")
    assert shares(shown) == pytest.approx(best.weights, abs=0.001)
    recipe = yaml.safe_load(shown.evaluate("document.getElementById('recipe').textContent"))
    assert list(recipe["preference"]["weights"].values()) == pytest.approx(best.weights)
    shown.evaluate("document.getElementById('wanted').click()")
    assert shares(shown) == pytest.approx(surface.wanted, abs=0.001)


def test_the_recipes_own_point_is_marked_in_triangle_table_and_text(page):
    surface = replace(make_surface(), wanted=(0.25, 0.25, 0.5), asked=10)
    assert surface.points[surface.asked].weights == (0.5, 0.25, 0.25) != surface.points[surface.best].weights
    shown = page(surface)
    text = shown.evaluate("document.getElementById('best-text').textContent")
    assert "The recipe's own preference, point 10 of the table, scores 55.2\u00a0%." in text
    table = shown.evaluate("[...document.querySelectorAll('#near tbody tr')].at(-1).innerText").split("\t")
    assert table[0] == "the recipe's own" and sorted(table[1:]) == ["no", "no", "yes"]
    place = shown.evaluate("['x', 'y'].map((n) => document.getElementById('asked').getAttribute(n))")
    assert [float(n) + 6 for n in place] == pytest.approx([150, 145])


def test_without_weights_of_the_recipe_nothing_is_called_best(page):
    shown = page(replace(make_surface(), wanted=()))
    assert box(shown, "#best-section")["height"] == 0


def test_the_mean_under_the_shown_preference_is_that_of_the_scores(page):
    shown = page()
    shown.drag(corner(shown, 1))
    text = shown.evaluate("document.getElementById('mean').textContent")
    assert text == "Mean of these scores, weighted by this preference: 100.0\u00a0%."


def test_the_recipe_is_copied_or_selected(page):
    shown = page()
    shown.evaluate("document.getElementById('copy').focus()")
    shown.press("Enter")
    recipe = shown.evaluate("document.getElementById('recipe').textContent")
    assert shown.evaluate("getSelection().toString()").strip() == recipe.strip()
    assert shown.evaluate("document.getElementById('copied').textContent").split(":")[0] in (
        "Copied.",
        "Selected",
    )


def test_a_task_without_examples_keeps_its_slider_and_says_so(page):
    surface = make_surface(4)
    fewer = [Point(point.weights, point.scores[:3]) for point in surface.points]
    shown = page(
        replace(
            surface,
            evaluated=surface.tasks[:3],
            points=tuple(fewer),
            base_model=surface.base_model[:3],
            own=surface.own[:3],
        )
    )
    assert shown.evaluate("document.querySelectorAll('.task')[3].innerText").split("\n")[-1] == "not measured"
    assert len(shares(shown)) == 4


def test_deviations_over_seeds_stand_in_the_table(page):
    surface = make_surface()
    seeds = {task: {0: 0.5, 1: 0.6} for task in surface.tasks}
    points = tuple(replace(point, by_seed=seeds) for point in surface.points)
    text = page(replace(surface, points=points)).evaluate("document.getElementById('near').innerText")
    assert text.count("\u00a0±\u00a07.1 [") == 9


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_is_legible_at_forty_tasks_too(page, dark):
    shown, _ = open_drawn(page, 40, 1400, dark=dark)
    assert shown.evaluate(CONTRASTS)[0][0] >= 4.5
