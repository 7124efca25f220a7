"""Reuse of scores: a checkpoint is scored once, and again after any change that could matter."""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.errors import LockError
from hub_magmax.evaluation import score_cache, scoring
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.needs import evaluation_needs
from hub_magmax.evaluation.score_cache import KeptScores, Reuse
from hub_magmax.evaluation.scoring import counted, evaluate, size_of_batches
from hub_magmax.evaluation.software import software_used
from hub_magmax.pipeline import lock
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import parse_recipe, updated
from hub_magmax.reporting.card import best_single
from tests.classifiers import classifier_recipe, write_classifiers, write_rows


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    biases = {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)}
    write_classifiers(tmp_path, {**biases, "merged": (0.5, 0.4, 0.1)})
    write_rows(tmp_path / "others.parquet", [0] * 5 + [2] * 3)
    return tmp_path


def make_recipe(folder, **changes):
    data = {"a": {"dataset": "./rows.parquet"}, "b": {"dataset": "./others.parquet"}}
    return parse_recipe(classifier_recipe(evaluation={"tasks": data} | changes), folder=folder)


def scored(recipe, merged="merged", **options):
    lines: list[str] = []
    scores = evaluate(recipe, lock(recipe), recipe.folder / merged, report=lines.append, **options)
    return scores, lines


def written(scores):
    return scores.to_json(), scores.outcomes_json()


def test_another_merge_of_the_same_checkpoints_scores_the_merged_model_only(folder):
    recipe = make_recipe(folder)
    assert len(scored(recipe)[1]) == 4
    other, lines = scored(recipe, "a")
    assert lines == [
        "scores of 3 checkpoints are reused: 6 of 8 scores are there",
        "scoring the model merged (1 of 1)",
    ]
    anew, lines = scored(recipe, "a", again=True)
    assert len(lines) == 4 and written(other) == written(anew)


def test_the_merged_model_is_measured_each_time(folder):
    recipe = make_recipe(folder)
    scored(recipe)
    assert scored(recipe)[1][-1] == "scoring the model merged (1 of 1)"


def test_own_cells_count_the_models_that_are_scored_and_no_other(folder):
    data = {"a": {"dataset": "./rows.parquet"}}
    recipe = make_recipe(folder, tasks=data, cells="own")
    assert scored(recipe)[1] == [
        f"scoring the model {n} ({i} of 3)" for i, n in enumerate(("base_model", "a", "merged"), 1)
    ]
    needs = evaluation_needs(recipe, lock(recipe), 0)
    assert str(needs).startswith("3 models;")
    assert evaluation_needs(make_recipe(folder, tasks=data), lock(recipe), 0).num_models == 4


@pytest.mark.parametrize(
    ("examples", "most", "size"),
    [(0, 64, 1), (1, 64, 1), (40, 64, 5), (41, 64, 6), (10_000, 64, 64), (40, 2, 2)],
)
def test_few_examples_are_run_in_small_batches_so_that_it_is_seen_how_far_a_model_is(examples, most, size):
    assert size_of_batches(examples, most) == size


def test_examples_of_each_model_are_counted_while_it_is_scored(folder, monkeypatch):
    monkeypatch.setattr(scoring, "NUM_STEPS", 1)
    recipe = make_recipe(folder, batch_size=4)
    seen, whole = [], scored(recipe)[0]

    @contextmanager
    def progress(total, doing, unit):
        seen.append([total, doing, unit])
        yield seen[-1].append

    found = scored(recipe, progress=progress, again=True)[0]
    # Ten and eight examples in batches of four.
    names = ("base_model", "a", "b", "merged")
    assert seen == [[18, f"scoring the model {name}", "examples", 4, 4, 2, 4, 4] for name in names]
    assert written(found) == written(whole)
    seen.clear()
    scored(recipe, progress=progress)
    assert [doing for _, doing, *_ in seen] == ["scoring the model merged"]


def test_each_of_two_processes_counts_the_examples_of_both():
    seen = []
    assert [*counted("abc", 10, 4, seen.append)] == ["a", "b", "c"]
    assert seen == [4, 4, 2]
    assert [*counted("abc", 10, 4, None)] == ["a", "b", "c"]


def change_a_weight(folder):
    """One value in the weights; header, size and time of change stay what they were."""
    file = folder / "a" / "model.safetensors"
    times = file.stat()
    weights = load_file(file)
    weights["classifier.bias"] = torch.tensor([0.0, 1.0, 0.1])
    save_file(weights, file, {"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_the_processor(folder):
    file = folder / "a" / "preprocessor_config.json"
    values = json.loads(file.read_text()) | {"do_normalize": False}
    file.write_text(json.dumps(values))


def change_a_row(folder):
    write_rows(folder / "others.parquet", [0] * 4 + [2] * 4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_a_weight, ["a"]),
        (change_the_processor, ["a"]),
        (change_a_row, ["base_model", "a", "b"]),
        (lambda folder: {"batch_size": 2}, ["base_model", "a", "b"]),
        (lambda folder: {"margin": 0.5}, []),
        (lambda folder: None, []),
    ],
)
def test_what_changed_is_measured_again(folder, change, expected):
    scored(make_recipe(folder))
    recipe = make_recipe(folder, **(change(folder) or {}))
    found, lines = scored(recipe)
    assert [line.split()[3] for line in lines if line.startswith("scoring")] == [*expected, "merged"]
    assert written(found) == written(scored(recipe, again=True)[0])


def test_other_software_is_other_scores(folder, monkeypatch):
    recipe = make_recipe(folder)
    scored(recipe)
    other = software_used() | {"transformers": "99"}
    monkeypatch.setattr(score_cache, "software_used", lambda: other)
    assert len(scored(recipe)[1]) == 4


def test_one_thread_reuses_what_several_measured_as_torchrun_gives_each_process_one(folder, monkeypatch):
    recipe = make_recipe(folder)
    scored(recipe)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert scored(recipe)[1][-1] == "scoring the model merged (1 of 1)"


def test_an_interrupted_evaluation_goes_on_with_the_merged_model_too(folder, monkeypatch):
    recipe = make_recipe(folder)
    whole = scored(recipe, again=True)[0]
    keep = Reuse.keep

    def keep_and_end(self, model, task, outcomes):
        found = keep(self, model, task, outcomes)
        if (model, task) == ("merged", "a"):
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Reuse, "keep", keep_and_end)
    with pytest.raises(KeyboardInterrupt):
        scored(recipe)
    monkeypatch.setattr(Reuse, "keep", keep)
    found, lines = scored(recipe)
    assert lines == [
        "scores of 3 checkpoints are reused: 7 of 8 scores are there",
        "scoring the model merged (1 of 1)",
    ]
    assert written(found) == written(whole)


def test_a_damaged_file_is_a_miss(folder, monkeypatch):
    monkeypatch.setenv("HUB_MAGMAX_SCORES", str(folder / "kept"))
    recipe = make_recipe(folder)
    scored(recipe)
    files = sorted((folder / "kept").iterdir())
    assert len(files) == 6
    files[1].write_text(files[1].read_text().replace("[[", "[[1", 1))
    files[2].write_text("{")
    found, lines = scored(recipe)
    assert "4 of 8 scores are there" in lines[0]
    assert written(found) == written(scored(recipe, again=True)[0])


@pytest.mark.parametrize("place", ["", "/proc/none"])
def test_without_a_folder_everything_is_measured(folder, monkeypatch, place):
    monkeypatch.setenv("HUB_MAGMAX_SCORES", place)
    recipe = make_recipe(folder)
    assert [len(scored(recipe)[1]) for _ in range(2)] == [4, 4]


def test_own_cells_are_the_diagonal_and_what_the_card_needs(folder):
    recipe = make_recipe(folder, cells="own")
    scores, _ = scored(recipe)
    assert [(s.model, s.task) for s in scores.scores] == [
        ("base_model", "a"), ("base_model", "b"), ("a", "a"), ("b", "b"), ("merged", "a"), ("merged", "b"),
    ]  # fmt: skip
    everything = scored(make_recipe(folder, cells="all"))[0]
    assert all(everything.get(s.model, s.task) == s for s in scores.scores)
    assert best_single(scores, {"a": 0.5, "b": 0.5}) is None
    assert scores.evaluation_digest != everything.evaluation_digest
    assert make_recipe(folder).evaluation.digest == everything.evaluation_digest


def test_an_adapter_depends_on_what_it_is_added_to(folder):
    recipe = make_recipe(folder)
    locked = lock(recipe)
    adapter = replace(locked.tasks["b"], adapter_config="sha256:1")
    for mode, others in (("each", ["base"]), ("sequence", ["base", "a"])):
        as_lock = replace(locked, adapters=mode, tasks={**locked.tasks, "b": adapter})
        before = key_of(recipe, as_lock)
        assert before == key_of(recipe, as_lock)
        for other in ("base", "a", "b"):
            kept = shutil.copytree(folder / other, folder / "kept")
            (folder / other / "config.json").write_text((kept / "config.json").read_text() + " ")
            assert (key_of(recipe, as_lock) != before) == (other in [*others, "b"])
            shutil.rmtree(folder / other)
            kept.rename(folder / other)


def reuse_of(recipe, locked):
    described = {"b": {"fingerprint": "sha256:2"}}
    return Reuse(recipe, locked, Path("none"), described, Processes(), is_on=True)


def key_of(recipe, locked):
    return reuse_of(recipe, locked)._keys.key("b", "b")


def put_a_template(folder, text):
    templates = folder / "additional_chat_templates"
    templates.mkdir(exist_ok=True)
    (templates / "tools.jinja").write_text(text)


def put_a_module(folder, text):
    (folder / "modules.json").write_text('[{"path": "2_Dense", "type": "any"}]')
    (folder / "2_Dense").mkdir(exist_ok=True)
    (folder / "2_Dense" / "model.safetensors").write_text(text)


@pytest.mark.parametrize("put", [put_a_template, put_a_module])
def test_files_in_sub_folders_that_loaders_read_count(folder, put):
    put(folder / "b", "one")
    recipe = make_recipe(folder)
    locked = lock(recipe)
    before = key_of(recipe, locked)
    assert key_of(recipe, locked) == before
    put(folder / "b", "two")
    assert key_of(recipe, locked) != before


def test_weights_behind_a_link_into_a_content_store_count(folder):
    (folder / "store").mkdir()
    (folder / "b" / "model.safetensors").rename(folder / "store" / "b")
    (folder / "b" / "model.safetensors").symlink_to(folder / "store" / "b")
    recipe = updated(make_recipe(folder), {"trusted_links": ["./store"]})
    locked = lock(recipe)
    before = key_of(recipe, locked)
    assert before is not None
    shutil.copy(folder / "a" / "model.safetensors", folder / "store" / "b")
    assert key_of(recipe, locked) not in (before, None)


def test_files_that_no_loader_reads_do_not_count(folder):
    recipe = make_recipe(folder)
    locked = lock(recipe)
    before = key_of(recipe, locked)
    (folder / "b" / "README.md").write_text("x")
    (folder / "b" / "checkpoint-500").mkdir()
    (folder / "b" / "checkpoint-500" / "config.json").write_text("{}")
    assert key_of(recipe, locked) == before


@pytest.mark.parametrize("changed", ["base", "b", "a", None])
def test_answers_of_files_that_changed_since_they_were_hashed_are_not_kept(folder, changed):
    recipe = make_recipe(folder)
    locked = lock(recipe)
    first = reuse_of(recipe, locked)
    first.find({"b": [("b", "b")]}, lambda line: None)
    file = folder / (changed or "b") / "config.json"
    content = file.read_bytes()
    if changed:
        file.write_bytes(content + b" ")
    first.keep("b", "b", [Outcome(1.0)])
    file.write_bytes(content)
    second = reuse_of(recipe, locked)
    second.find({"b": [("b", "b")]}, lambda line: None)
    assert bool(second.known) == (changed in ("a", None))


def test_only_scores_are_forgotten(tmp_path):
    theirs = ["thesis.tex", "results.json", f"{'a' * 64}.json.bak", "tmp12345678", f"{'A' * 64}.json"]
    ours = [f"{'a' * 64}.json", f"{'0' * 64}.json", "hub_magmax-abc_1234"]
    for name in [*theirs, *ours]:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f"{'1' * 64}.json").write_text("x")  # used a moment ago
    KeptScores(tmp_path).forget([])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, f"{'1' * 64}.json"])


def test_local_data_that_changed_under_a_lock_is_still_refused(folder):
    recipe = make_recipe(folder)
    locked = lock(recipe)
    evaluate(recipe, locked, folder / "merged")
    change_a_row(folder)
    with pytest.raises(LockError, match="no longer what was locked"):
        evaluate(updated(recipe, {}), locked, folder / "merged")
