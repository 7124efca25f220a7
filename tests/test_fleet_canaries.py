import hashlib
import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file

from hub_magmax.errors import EvaluationError, LockError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.scores import MERGED, make_score, read_scores, write_scores
from hub_magmax.fleet.canaries import canary
from hub_magmax.fleet.history import Revision, StoredScores, as_table, history, last_good
from hub_magmax.merging.output.report import REPORT_NAME, read_report
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.publishing.preflight import rehearse
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import updated
from tests.test_cli import call
from tests.test_evaluation_scoring import image_recipe, images  # noqa: F401  (a fixture)

_numbers = itertools.count()


@pytest.fixture
def no_model_runs(monkeypatch):
    monkeypatch.setattr("hub_magmax.evaluation.scoring.run_evaluator", None)


@pytest.fixture(scope="module")
def scored(images, tmp_path_factory):  # noqa: F811
    """A merged folder that was scored: right on the first four of ten examples, on both tasks."""
    folder = tmp_path_factory.mktemp("scored") / "merged"
    run(updated(image_recipe(images), {"output": {"path": str(folder)}}))
    return folder


@pytest.fixture
def merged(scored, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(scored, tmp_path / "merged")


def say(folder, class_index):
    """Let the model of a folder always answer with one class, of which it has three."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"] = torch.nn.functional.one_hot(torch.tensor(class_index), 3).float()
    save_file(tensors, path, metadata={"format": "pt"})


def pin(folder, task, outcomes):
    """Store other outcomes of the merged model, as if they had been measured."""
    scores = read_scores(folder)
    other = make_score(MERGED, task, [Outcome(value) for value in outcomes], is_share=True)
    kept = tuple(other if (s.model, s.task) == (MERGED, task) else s for s in scores.scores)
    write_scores(replace(scores, scores=kept), folder)


def test_model_that_answers_as_before_passes(merged, images):  # noqa: F811
    found = canary(str(merged), folder=images)
    assert found.regressed == ()
    for change in found.tasks:
        assert (change.before, change.now) == (0.4, 0.4)
        assert (change.difference.gained, change.difference.lost, change.difference.p_value) == (0, 0, 1.0)
    assert "no task got worse by more than 0.01 (accuracy)" in found.table()


def test_answers_are_compared_one_by_one(merged, images):  # noqa: F811
    # Pinned: the last eight right. Now: the first four. So two gained, six lost of eight that changed.
    pin(merged, "a", [0.0] * 2 + [1.0] * 8)
    found = canary(str(merged), folder=images)
    (change, other) = found.tasks
    assert change.task == "a" and change.regressed and not other.regressed
    assert (change.difference.gained, change.difference.lost) == (2, 6)
    assert change.difference.mean == pytest.approx(-0.4)
    # McNemar by hand: twice the chance of at most 2 heads in 8 throws, 2 · (1 + 8 + 28) / 256.
    assert change.difference.p_value == pytest.approx(74 / 256)


@pytest.mark.parametrize(("margin", "passes"), [(0.0, False), (0.09, False), (0.1, True), (0.2, True)])
def test_a_loss_of_the_margin_itself_is_allowed(merged, images, margin, passes):  # noqa: F811
    pin(merged, "b", [1.0] * 5 + [0.0] * 5)
    found = canary(str(merged), folder=images, margin=margin)
    assert found.regressed == (() if passes else ("b",))


def test_command_ends_with_three_on_regression_and_prints_everything(merged, images):  # noqa: F811
    words = ("canary", merged, "--from", images)
    code, out, _ = call(*words, "--json")
    assert code == 0 and json.loads(out)["regressed"] == []
    say(merged, 1)
    code, out, _ = call(*words, "--json")
    values = json.loads(out)
    assert code == 3 and values["regressed"] == ["a", "b"]
    assert values["tasks"][0]["difference"]["lost"] == 4
    code, out, _ = call(*words)
    assert code == 3 and "a, b got worse by more than 0.01" in out
    assert f"stored with {merged}; --against FOLDER" in out
    assert "--against" not in call("canary", merged, "--margin", "1")[1]
    code, out, _ = call(*words, "--format", "markdown")
    assert code == 3 and out.startswith("| task | pinned | now |")
    assert call(*words, "--margin", "0.5")[0] == 0


def test_folder_is_compared_with_another_folder(merged, images, tmp_path):  # noqa: F811
    shutil.copytree(merged, tmp_path / "earlier")
    pin(tmp_path / "earlier", "a", [1.0] * 10)
    assert canary(str(merged), folder=images).regressed == ()
    found = canary(str(merged), against=str(tmp_path / "earlier"), folder=images)
    assert found.regressed == ("a",)


def test_repository_is_compared_with_an_earlier_revision(merged, images, hub):  # noqa: F811
    repo = f"me/canary{next(_numbers)}"
    push(merged, repo)
    first = hub.head(repo)
    say(merged, 1)
    hub.add_repo(repo, files={"model.safetensors": (merged / "model.safetensors").read_bytes()})
    assert canary(repo, revision=first, folder=images).regressed == ()
    found = canary(repo, against=first, folder=images)
    assert found.regressed == ("a", "b")
    assert found.against == f"{repo}@{first[:7]}"


def published_worse(folder, repo, hub):
    """Commit a model that is always wrong, with its report and scores, as a run of another recipe would."""
    say(folder, 1)
    for task in "ab":
        pin(folder, task, [0.0] * 10)
    report, weights = read_report(folder / REPORT_NAME), (folder / "model.safetensors").read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    shard = replace(report.shards[0], sha256=sha256, size_bytes=len(weights))
    (folder / REPORT_NAME).write_text(replace(report, shards=(shard,)).to_json())
    names = ("model.safetensors", "scores.json", "outcomes.json", REPORT_NAME)
    hub.add_repo(repo, files={name: (folder / name).read_bytes() for name in names})


def test_worse_model_is_compared_with_the_last_good_one_every_day(merged, images, hub):  # noqa: F811
    repo = f"me/canary{next(_numbers)}"
    push(merged, repo)
    good = hub.head(repo)
    assert canary(repo, folder=images).against == f"{repo}@{good[:7]}"
    published_worse(merged, repo, hub)
    hub.add_repo(repo, files={"README.md": b"my words"})
    code, out, said = call("canary", repo, "--from", images)
    assert code == 3 and f"against {repo}@{good[:7]}: a, b got worse" in out
    assert f"stored with {repo}@{good[:7]}; --against REVISION" in out
    assert f"(hub-magmax history {repo} lists them)" in out
    assert f"comparing with the last good model ({good[:12]}," in said
    # A third one that is as bad as the second is no better than the first.
    published_worse(merged, repo, hub)
    hub.add_repo(repo, files={"scores.json": (merged / "scores.json").read_bytes() + b"\n"})
    assert canary(f"{repo}@main", folder=images).regressed == ("a", "b")
    assert call("canary", repo, "--from", images, "--against", "main")[0] == 0, "its own scores"
    # Another first one, a loss of which the margin allows.
    assert canary(repo, folder=images, margin=0.4).against == f"{repo}@{hub.head(repo)[:7]}"


def test_scores_are_not_those_of_weights_that_were_changed_after_the_push(merged, images, hub):  # noqa: F811
    repo = f"me/canary{next(_numbers)}"
    push(merged, repo)
    pushed = hub.head(repo)
    hub.add_repo(repo, files={"README.md": b"my words"}, message="My words")
    assert all(found.scores and not found.changed for found in history(repo, limit=2)), "the card is no model"
    for name in ("model.safetensors", "config.json"):
        say(merged, 1)
        hub.add_repo(repo, files={name: (merged / name).read_bytes() + b"\n"}, message=f"My {name}")
        (now, before, *_) = history(repo)
        assert now.scores is None and now.changed and name in now.changed
    assert before.changed == ("model.safetensors",) and now.changed == ("model.safetensors", "config.json")
    assert last_good(history(repo), 0.01).title == "My words", "whose model is the one that was scored"
    code, out, _ = call("history", repo)
    theirs = next(line for line in out.splitlines() if "My model.safetensors" in line)
    assert code == 0 and theirs.endswith("(not as merged, so not as scored: model.safetensors)")
    assert "accuracy" not in theirs and "accuracy" in next(
        line for line in out.splitlines() if pushed[:12] in line
    )
    (files,) = {
        found["changed"][0] for found in json.loads(call("history", repo, "--json")[1]) if found["changed"]
    }
    assert files == "model.safetensors"
    hub.add_repo(repo, files={REPORT_NAME: b"{}"})
    assert history(repo, limit=1)[0].changed == (REPORT_NAME,)


def revision(number, rolled_back=False, metric="accuracy", data="x", **means):
    scores = StoredScores(metric, means, dict.fromkeys(means, data)) if means else None
    return Revision(f"{number:040x}", "", "", "", scores, rolled_back)


def test_last_good_revision_is_no_worse_than_the_one_before_it():
    def found(*revisions, margin=0.01):
        good = last_good(reversed(revisions), margin)
        return None if good is None else int(good.commit, 16)

    first = revision(1, a=0.8, b=0.5)
    assert found() is None
    assert found(revision(0), first) == 1
    assert found(first, revision(2, a=0.79, b=0.5)) == 2, "a loss of the margin itself"
    assert found(first, revision(2, a=0.9, b=0.4)) == 1, "one task is enough"
    assert found(first, revision(2, a=0.9, b=0.4), revision(3, a=0.9, b=0.4)) == 1
    assert found(first, revision(2, a=0.9, b=0.4), revision(3, a=0.8, b=0.5)) == 3
    assert found(first, revision(2, a=0.9, b=0.9, rolled_back=True), revision(3)) == 1
    assert found(first, revision(2, a=0.1, b=0.1, data="y")) == 2, "other examples begin anew"
    assert found(first, revision(2, a=0.1, b=0.1, metric="F1")) == 2


def test_history_is_a_table_with_mean_and_lowest_score():
    scored = StoredScores("accuracy", {"a": 0.5, "b": 0.25}, {"a": "x", "b": "x"})
    found = Revision("c" * 40, "2026-01-02T03:04:05", "push", "d" * 64, scored, rolled_back=True)
    bare = Revision("e" * 40, "2026-01-01T00:00:00", "first")
    assert as_table([found, bare]).write("csv").splitlines() == [
        "commit,created,model,metric,plain mean,lowest,of,title",
        f"{'c' * 40},2026-01-02T03:04:05,{'d' * 64},accuracy,0.375,0.25,b,push (rolled back)",
        f"{'e' * 40},2026-01-01T00:00:00,,,,,,first",
    ]
    assert (
        as_table([found, bare]).write().splitlines()[1].startswith("cccccccccccc  2026-01-02 03:04  dddddddd")
    )


def test_data_that_lies_elsewhere_is_named_with_the_way_to_it(merged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, said = call("canary", merged)
    assert code == 1 and "./rows.parquet" in said and "there is no such file or folder" in said
    assert "--from FOLDER" in said


def test_revision_is_named_with_the_repository_or_beside_it(merged, hub):
    repo = f"me/canary{next(_numbers)}"
    push(merged, repo)
    first = hub.head(repo)
    hub.add_repo(repo, files={"config.json": b"{}"})
    assert call("verify", repo)[0] == 1
    for words in ((f"{repo}@{first}",), (f"hf://{repo}@{first}",), (repo, "--revision", first)):
        code, out, _ = call("verify", *words)
        assert code == 0 and "all as merged" in out
    code, _, said = call("verify", f"{repo}@main", "--revision", first)
    assert code == 1 and f"two revisions are named, main and {first}" in said


def test_model_without_stored_scores_is_told_so(merged, images):  # noqa: F811
    (merged / "outcomes.json").unlink()
    with pytest.raises(EvaluationError, match=r"there is no outcomes\.json"):
        canary(str(merged), folder=images)


@pytest.mark.usefixtures("no_model_runs")
def test_other_examples_are_not_compared(merged, images):  # noqa: F811
    scores = read_scores(merged)
    described = {**scores.data, "a": {**scores.data["a"], "fingerprint": "sha256:other"}}
    write_scores(replace(scores, data=described), merged)
    with pytest.raises(EvaluationError, match="another evaluation: the examples of a differ"):
        canary(str(merged), folder=images)


def test_fewer_results_than_examples_are_not_compared(merged, images):  # noqa: F811
    pin(merged, "a", [1.0] * 5)
    with pytest.raises(EvaluationError, match="another evaluation: the examples of a differ"):
        canary(str(merged), folder=images)


def more_rows(folder):
    """Store one example more, as if the data had been extended."""
    path = folder / "rows.parquet"
    rows = Dataset.from_parquet(str(path))
    concatenate_datasets([rows, rows.select([0])]).to_parquet(str(path))


@pytest.fixture
def extended(images, tmp_path):  # noqa: F811
    """The checkpoints, and an evaluation set that is not what it was."""
    folder = shutil.copytree(images, tmp_path / "extended")
    more_rows(folder)
    return folder


def test_local_data_that_changed_is_not_compared(merged, images, extended):  # noqa: F811
    with pytest.raises(LockError, match=r"\./rows\.parquet: this data is no longer what was locked"):
        canary(str(merged), folder=extended)
    code, out, _ = call("verify", merged, "--rebuild", "--from", extended)
    assert code == 0 and "./rows.parquet: no longer the data that was locked, so scores may differ" in out
    code, out, _ = call("verify", merged, "--rebuild", "--from", images, "--json")
    assert code == 0 and json.loads(out)["data_changed"] == []


def test_scores_of_a_finished_merge_are_not_kept_for_other_data(images, tmp_path):  # noqa: F811
    folder = shutil.copytree(images, tmp_path / "family")
    recipe = image_recipe(folder)
    locked = lock(recipe)
    first = run(recipe)
    more_rows(folder)
    for given in (None, locked):
        with pytest.raises(LockError, match="merge into another folder"):
            run(recipe, locked=given)
    findings = rehearse(plan(recipe), None)
    assert isinstance(findings[-1].error, LockError)
    elsewhere = run(updated(recipe, {"output": {"path": "./new"}}))
    assert elsewhere.scores.get(MERGED, "a").num_examples == 11
    assert elsewhere.plan.lock.digest == first.plan.lock.digest, "the same weights"
    assert elsewhere.plan.lock.local_data != locked.local_data


@pytest.mark.usefixtures("no_model_runs")
def test_other_tasks_and_metrics_are_not_compared(merged, images):  # noqa: F811
    scores = read_scores(merged)
    write_scores(replace(scores, metric="F1", data={"a": scores.data["a"]}), merged)
    with pytest.raises(EvaluationError, match="another evaluation: the metric, the tasks differ"):
        canary(str(merged), folder=images)
