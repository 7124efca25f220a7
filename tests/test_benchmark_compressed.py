"""What merged models lose by few bits and low rank: cases by hand, and the stored table."""

import json

import numpy as np
import pytest
import torch

from benchmarks import compressed


def test_a_change_is_cut_to_its_largest_singular_values():
    rng = np.random.default_rng(0)
    base = {"a": torch.tensor(rng.normal(size=(6, 4))).float(), "bias": torch.zeros(3), "b": torch.ones(2, 2)}
    change = rng.normal(size=(6, 4))
    merged = {"a": base["a"] + torch.tensor(change).float(), "bias": torch.ones(3), "b": torch.ones(2, 2)}
    found = compressed.cut(base, merged, 2)
    left, sizes, right = np.linalg.svd((merged["a"] - base["a"]).double().numpy(), full_matrices=False)
    expected = (left[:, :2] * sizes[:2]) @ right[:2]
    assert np.allclose((found["a"].double() - base["a"].double()).numpy(), expected, atol=1e-6)
    assert torch.equal(found["bias"], merged["bias"]) and found["b"] is merged["b"]
    whole = compressed.cut(base, merged, 9)
    assert torch.allclose(whole["a"], merged["a"], atol=1e-6)


def test_losses_are_differences_to_the_whole_model_over_seeds():
    forms = dict.fromkeys(compressed.FORMS, 0.5)
    rows = [
        {"method": "ties", "accuracy": forms | {"int3": 0.3}},
        {"method": "ties", "accuracy": forms | {"int3": 0.1}},
    ]
    found = compressed.losses(rows)["ties"]
    assert found["int3"]["difference"] == pytest.approx(0.3) and found["int8"]["difference"] == 0
    line = compressed.tables({"digits": rows}).splitlines()[2]
    assert line.startswith("| digits, 2 seeds | `ties` | 50.0 | +0.0 [0.0, 0.0] |") and "+30.0 [" in line


def test_the_page_has_what_is_stored():
    stored = json.loads(compressed.RESULTS.read_text(encoding="utf-8"))
    assert compressed.tables(stored) in compressed.PAGE.read_text(encoding="utf-8")
    for rows in stored.values():
        seeds = {row["seed"] for row in rows}
        assert [(row["seed"], row["method"]) for row in rows] == [
            (seed, method) for seed in sorted(seeds) for method in compressed.METHODS
        ]
        assert all([*row["accuracy"]] == [*compressed.FORMS] for row in rows)
