"""The first change of docs/contributing.md, as written there; tests/test_locations.py makes the second."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from hub_magmax.merging.execution import merge
from hub_magmax.methods.matrices import matrices_in
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.registry import METHODS
from tests.families import read_merged, write_family, write_recipe

PAGE = Path(__file__).parents[1] / "docs" / "contributing.md"
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture
def low_rank(tmp_path, monkeypatch):
    """The module of the page, announced by one line."""
    section = PAGE.read_text(encoding="utf-8").split("## A merge method")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "spectral_of_the_page.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("low_rank", "spectral_of_the_page:low_rank", METHODS.group)
    monkeypatch.setitem(vars(METHODS), "plugins", {"low_rank": point})


def test_a_method_of_whole_matrices_is_one_module_and_one_line(tmp_path, low_rank):
    family = write_family(tmp_path, list(WEIGHTS))
    method = {"name": "low_rank", "rank": 2, "scaling": 0.5}
    recipe = load_recipe(write_recipe(tmp_path, method=method, preference={"weights": WEIGHTS}))
    report = merge(plan(recipe, lock(recipe)), tmp_path / "merged")
    assert report.elements_merged
    merged = read_merged(tmp_path / "merged")
    for name, base in family["base"].items():
        if not base.is_floating_point():
            assert merged[name].equal(base)
            continue
        mean = sum(w * (family[task][name].double() - base.double()).numpy() for task, w in WEIGHTS.items())
        if matrices_in(name, mean.shape):
            left, strengths, right = np.linalg.svd(mean, full_matrices=False)
            mean = (left[:, :2] * strengths[:2]) @ right[:2]
            assert np.linalg.matrix_rank((merged[name] - base).numpy(), tol=1e-4) == 2
        np.testing.assert_allclose(merged[name].numpy(), base.numpy() + 0.5 * mean, atol=1e-5)
