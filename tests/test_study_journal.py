"""Journals of comparisons and sweeps: what was measured is not measured again, and gives the same bytes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from datasets import Dataset

from hub_magmax.analysis.study_journal import study_journal
from hub_magmax.analysis.tuning import CandidateScorer
from hub_magmax.cli import main
from hub_magmax.errors import DistributedError, OutputError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.evaluators.classification import ImageClassification
from hub_magmax.evaluation.journal import open_journal, restored, stored
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import load_recipe
from tests.classifiers import classifier_recipe, write_classifiers, write_rows

OUTCOMES = {"a": (Outcome(1.0, 0.1 + 0.2, None), Outcome(0.0, 1 / 3, -2.5, True))}

#: Ends with SIGKILL when the fourth model was scored.
KILLED = """
import os, signal, sys
from hub_magmax.evaluation.journal import Journal
add = Journal.add
def add_and_die(self, key, outcomes):
    add(self, key, outcomes)
    if len(self) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = add_and_die
from hub_magmax.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    write_classifiers(tmp_path, {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)})
    write_rows(tmp_path / "others.parquet", [0] * 5 + [2] * 3)
    values = classifier_recipe(
        method={"name": "average", "scaling": 1.0},
        evaluation={"tasks": {"a": {"dataset": "./rows.parquet"}, "b": {"dataset": "./others.parquet"}}},
        sweep={"walk": "adaptive", "budget": 7},
        compare={
            "tune": {"dataset": "./rows.parquet"},
            "report": {"dataset": "./others.parquet"},
            "methods": ["average", "random_mix"],
            "scaling": [0.5, 1.0],
            "seeds": [3, 4],
        },
    )
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("mix.*") if path.suffix != ".journal"}


def call(*words):
    return CliRunner().invoke(main, words, catch_exceptions=False)


@pytest.mark.parametrize(
    "how",
    [
        {"preference": {"search": {"target": {"dataset": "./rows.parquet"}, "budget": 6}}},
        {"method": "auto"},
    ],
    ids=["search", "auto"],
)
def test_a_killed_lock_goes_on_and_is_the_same(folder, tmp_path, monkeypatch, how):
    values = yaml.safe_load((folder / "mix.yaml").read_text()) | how
    values["compare"] |= {"methods": ["average", "magmax", "task_arithmetic"]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(values))
    whole = shutil.copytree(folder, tmp_path / "whole", ignore=shutil.ignore_patterns("whole"))
    assert call("lock", str(whole / "mix.yaml")).exit_code == 0
    killed = subprocess.run([sys.executable, "-c", KILLED, "lock", str(folder / "mix.yaml")], check=False)
    assert killed.returncode == -9 and (folder / "mix.lock.journal").is_file()
    scored, outcomes = [], ImageClassification.outcomes

    def counted(*args):
        scored.append(args)
        return outcomes(*args)

    monkeypatch.setattr(ImageClassification, "outcomes", counted)
    done = call("lock", str(folder / "mix.yaml"))
    assert done.exit_code == 0 and "4 models were measured before" in done.stderr
    # The first line says what the journal is of.
    assert len(scored) == len((whole / "mix.lock.journal").read_text().splitlines()) - 1 - 4
    assert (folder / "mix.lock.json").read_bytes() == (whole / "mix.lock.json").read_bytes()


def test_a_killed_comparison_goes_on_with_the_estimates_of_its_preferences(folder, tmp_path):
    """Estimates on the same examples with other labels are others."""
    rows = Dataset.from_parquet(str(folder / "rows.parquet"))
    rows = rows.add_column("other", [2] * len(rows)).cast_column("other", rows.features["label"])
    rows.to_parquet(str(folder / "rows.parquet"))
    searches = {
        name: {"search": {"target": {"dataset": "./rows.parquet", "label_column": column}, "budget": 4}}
        for name, column in (("own", "label"), ("others", "other"))
    }
    values = yaml.safe_load((folder / "mix.yaml").read_text())
    values["compare"] |= {"preferences": searches}
    (folder / "mix.yaml").write_text(yaml.safe_dump(values))
    whole = shutil.copytree(folder, tmp_path / "whole", ignore=shutil.ignore_patterns("whole"))
    assert call("compare", str(whole / "mix.yaml")).exit_code == 0
    killed = subprocess.run([sys.executable, "-c", KILLED, "compare", str(folder / "mix.yaml")], check=False)
    assert killed.returncode == -9
    done = call("compare", str(folder / "mix.yaml"))
    assert done.exit_code == 0 and "4 models were measured before" in done.stderr
    assert written(folder) == written(whole)
    journals = [(place / "mix.compare.journal").read_text().splitlines()[1:] for place in (folder, whole)]
    assert sorted(journals[0]) == sorted(journals[1])
    samples = {name for line in journals[0] for name in json.loads(line)[1]}
    assert len(samples) == 4  # of two estimates, and the two of the comparison


@pytest.mark.parametrize(("verb", "total"), [("sweep", 10), ("compare", 6)])
def test_a_killed_command_goes_on_and_writes_the_same_bytes(folder, tmp_path, verb, total):
    whole = shutil.copytree(folder, tmp_path / "whole", ignore=shutil.ignore_patterns("whole"))
    assert call(verb, str(whole / "mix.yaml")).exit_code == 0
    killed = subprocess.run([sys.executable, "-c", KILLED, verb, str(folder / "mix.yaml")], check=False)
    assert killed.returncode == -9
    journal = folder / f"mix.{verb}.journal"
    journal.write_bytes(journal.read_bytes() + b'["half of a li')
    done = call(verb, str(folder / "mix.yaml"))
    assert done.exit_code == 0 and f"{total} models to try, 4 measured before: " in done.stderr
    assert written(folder) == written(whole)


@pytest.mark.parametrize("verb", ["sweep", "compare"])
def test_the_same_study_in_another_format_runs_no_model(folder, monkeypatch, verb):
    first = call(verb, str(folder / "mix.yaml"), "--format", "csv")
    files = written(folder)
    monkeypatch.setattr("hub_magmax.merging.in_memory.InMemoryMerger.merge", None)
    monkeypatch.setattr("hub_magmax.analysis.tuning.answers", None)
    assert call(verb, str(folder / "mix.yaml"), "--format", "csv").stdout == first.stdout
    assert call(verb, str(folder / "mix.yaml"), "--format", "markdown").exit_code == 0
    assert written(folder) == files and (folder / f"mix.{verb}.journal").is_file()


def test_what_is_there_is_not_measured_again(folder, monkeypatch):
    recipe = load_recipe(folder / "mix.yaml")
    locked, path = lock(recipe), folder / "mix.sweep.journal"
    from hub_magmax.analysis.sweeping import sweep

    with study_journal(path, recipe, locked) as journal:
        found = sweep(recipe, locked, journal=journal)
    monkeypatch.setattr(CandidateScorer, "__exit__", lambda self, *error: None)
    lines: list[str] = []
    with study_journal(path, recipe, locked, lines.append) as journal:
        monkeypatch.setattr("hub_magmax.merging.in_memory.InMemoryMerger.merge", None)
        assert sweep(recipe, locked, journal=journal, report=lines.append) == found
    assert lines[0].startswith("10 models to try, 10 measured before: ")


@pytest.mark.parametrize("change", ["recipe", "lock", "weights", "config", "template", "same"])
def test_results_of_other_inputs_do_not_count(folder, change):
    template = folder / "a" / "additional_chat_templates" / "tools.jinja"
    template.parent.mkdir()
    template.write_text("one")
    recipe = load_recipe(folder / "mix.yaml")
    locked, path = lock(recipe), folder / "mix.sweep.journal"
    with pytest.raises(KeyboardInterrupt), study_journal(path, recipe, locked) as journal:
        journal.add("key", OUTCOMES)
        raise KeyboardInterrupt
    if change == "recipe":
        recipe = recipe.model_copy(update={"seed": 5})
    elif change == "lock":
        locked = replace(locked, local_data={"./rows.parquet": "sha256:other"})
    elif change in ("weights", "config"):
        file = folder / "a" / ("model.safetensors" if change == "weights" else "config.json")
        file.write_bytes(file.read_bytes())
    elif change == "template":
        template.write_text("two")
    lines: list[str] = []
    with study_journal(path, recipe, locked, lines.append) as journal:
        assert journal.get("key") == (OUTCOMES if change == "same" else None)
    assert len(lines) == (change != "same")


def test_outcomes_come_back_to_the_last_bit():
    assert restored(json.loads(json.dumps(stored(OUTCOMES["a"])))) == OUTCOMES["a"]


def test_two_processes_do_not_write_one_journal(tmp_path):
    twice = pytest.raises(OutputError, match="another process measures the same")
    with open_journal(tmp_path / "j", "sha256:1"), twice, open_journal(tmp_path / "j", "sha256:1"):
        pass
    assert not (tmp_path / "j").exists()


def test_without_a_place_for_the_journal_the_work_is_done_all_the_same(tmp_path):
    lines: list[str] = []
    with open_journal(tmp_path / "none" / "j", "sha256:1", lines.append) as journal:
        journal.add("key", OUTCOMES)
        assert journal.get("key") is None
    assert "no journal can be kept" in lines[0]


def test_an_error_says_what_is_kept(tmp_path):
    lines: list[str] = []
    with pytest.raises(ValueError), open_journal(tmp_path / "j", "sha256:1", lines.append) as journal:
        journal.add("key", OUTCOMES)
        raise ValueError
    assert lines[0].startswith("1 result is kept in")
    with pytest.raises(ValueError), open_journal(tmp_path / "k", "sha256:1", lines.append) as journal:
        raise ValueError
    assert len(lines) == 1 and not (tmp_path / "k").exists()


def test_an_error_of_the_work_has_no_other_cause(tmp_path):
    with pytest.raises(ValueError) as found, open_journal(tmp_path / "none" / "j", "sha256:1"):
        raise ValueError
    assert found.value.__context__ is None


def test_a_journal_that_another_process_removes_meanwhile_is_made_anew(tmp_path, monkeypatch):
    import fcntl

    path, flock = tmp_path / "j", fcntl.flock
    ends = iter([True])

    def other_one_ends_first(file, how):
        if next(ends, False):
            path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", other_one_ends_first)
    with open_journal(path, "sha256:1") as journal:
        journal.add("key", OUTCOMES)
        assert len(path.read_text().splitlines()) == 2
        with pytest.raises(OutputError, match="another process"), open_journal(path, "sha256:1"):
            pass


def test_several_processes_are_told_that_a_study_runs_in_one(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = load_recipe(folder / "mix.yaml")
    refused = pytest.raises(DistributedError, match="runs in one process")
    with refused as found, study_journal(folder / "j", recipe, lock(recipe)):
        pass
    assert "without torchrun" in str(found.value) and not (folder / "j").exists()
