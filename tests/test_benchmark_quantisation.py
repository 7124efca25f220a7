"""Benchmark of quantisation vectors: a reduced run, and its tables by hand."""

import json

import pytest
import torch

from benchmarks import quantisation, quantisation_tables
from tests.learners import TEXTS, write_learner


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = write_learner(tmp_path_factory.mktemp("quantisation"))
    for task, rows in TEXTS.items():
        for part in ("train", "tune", "test"):
            path = folder / "data" / task / f"{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows))
    training = {"steps": 8, "batch_size": 4, "learning_rate": 0.01, "frozen": ["classifier.*"]}
    study = quantisation.Study(folder, ("a", "b"), "text-classification", "jsonl", training, 0)
    return study, quantisation.measured(study)


def test_a_run_has_every_receiver_and_every_pair(measured):
    _, found = measured
    assert [(row["task"], row["bits"]) for row in found["alone"]] == [(t, b) for t in "ab" for b in (4, 3, 2)]
    pairs = [(row["donor"], row["task"], row["bits"]) for row in found["pairs"]]
    assert pairs == [(d, t, b) for d, t in ("ba", "ab") for b in (4, 3, 2)]
    for row in found["pairs"]:
        # What chooses is what is scored here, so that no other λ is ahead of the chosen one.
        assert row["tuned"] >= max(row["one"], row["minus"]) and -1 <= row["cosine"] <= 1
        assert row["scaling"] in quantisation.SCALINGS


def test_its_own_vector_makes_a_receiver_its_own_training(measured):
    study, _ = measured
    vectors = {("a", bits): quantisation.vector(study, "a", bits) for bits in (3,)}
    receiver = quantisation.Receiver(study, "a", vectors)
    patched, own = receiver.patched(vectors["a", 3], 1).state_dict(), study.model("a", 3).network.state_dict()
    assert max((patched[name] - own[name]).abs().max() for name in own) < 1e-6
    assert not any("classifier" in name and value.any() for name, value in vectors["a", 3].items())
    assert receiver.measured_with("a", 3)["cosine"] == pytest.approx(1)


def test_the_cosine_is_over_all_tensors():
    one, other = (
        {"a": torch.tensor([3.0]), "b": torch.tensor([0.0])},
        {
            "a": torch.tensor([0.6]),
            "b": torch.tensor([0.8]),
        },
    )
    assert quantisation.cosine(one, other) == pytest.approx(0.6)


def test_gains_are_over_the_receiver_rounded_alone():
    alone = [
        {"task": t, "bits": 3, "whole": 1.0, "rounded": r, "gptq": 0.9, "own": 0.8}
        for t, r in (("a", 0.5), ("b", 0.7))
    ]
    pairs = [
        {"donor": "b", "task": "a", "bits": 3, "one": 0.6, "minus": 0.4, "tuned": 0.6, "gptq": 0.9,
         "scaling": 1.0, "cosine": 0.2},
        {"donor": "a", "task": "b", "bits": 3, "one": 0.95, "minus": 0.7, "tuned": 0.7, "gptq": 0.8,
         "scaling": 0.0, "cosine": 0.4},
    ]  # fmt: skip
    results = [{"seed": 0, "alone": alone, "pairs": pairs}]
    tables = quantisation_tables
    assert tables.gain_of(results, 3, "one", "pairs") == pytest.approx([10.0, 25.0])
    assert tables.gain_of(results, 3, "gptq", "pairs", "gptq") == pytest.approx([0.0, -10.0])
    assert tables.gain_of(results, 3, "own", "alone") == pytest.approx([30.0, 10.0])
    assert tables.counted([0.5, 0, -1, 2]) == "2, 1, 1"
    assert tables.correlation(results, 3) == ""  # two pairs say nothing
    more = [{**pairs[0], "cosine": 0.5, "one": 0.7}, {**pairs[0], "cosine": 0.1, "one": 0.8}]
    assert tables.correlation([{**results[0], "pairs": [*pairs, *more]}], 3) == "-0.40"
    assert tables.interval([1.0, 3.0]) == "+2.0 (-10.7 to +14.7)"  # t of one degree of freedom is 12.706


def test_the_tables_of_the_page_are_what_is_stored():
    stored = quantisation_tables.stored()
    page = quantisation_tables.PAGE.read_text(encoding="utf-8")
    assert {name: len(found) for name, found in stored.items()}
    for found in quantisation_tables.all_tables(stored).values():
        assert found in page
