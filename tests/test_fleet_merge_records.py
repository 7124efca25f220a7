"""Records of merges on the Hub are the history that their folders are, and no weights are read for it."""

import json
import shutil

import pytest

import hub_magmax as hm
from hub_magmax.analysis.merge_history import read_history
from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.errors import SourceError
from hub_magmax.fleet import merge_records
from hub_magmax.pipeline import run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.reporting.diagnosis import DIAGNOSIS_NAME
from hub_magmax.studies import find_history
from tests.classifiers import classifier_recipe, write_classifiers
from tests.test_cli import call


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A scored merge with metrics, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    write_classifiers(tmp_path, {"base": [0, 0, 1], "a": [5, 0, 0], "b": [0, 1, 0]})
    rows = {"dataset": "./rows.parquet"}
    evaluation = {"evaluator": "image-classification", "tasks": {"a": rows, "b": rows}}
    values = classifier_recipe(evaluation=evaluation, method="average", output={"path": "even"})
    (tmp_path / "even.yaml").write_text(json.dumps(values))
    run(load_recipe(tmp_path / "even.yaml"))
    assert call("diagnose", "even.yaml", "--metrics", "--rank", "2", "--examples", "2")[0] == 0
    return tmp_path


def test_the_merges_of_an_organisation_are_a_history(folder, hub):
    hub.add_repo("history-org/rows", repo_type="dataset")  # makes the organisation
    push(folder / "even", "history-org/even")
    hub.add_repo("history-org/other", files={"config.json": b"{}"})
    hub.reset_log()
    found = find_history("history-org")
    assert found == read_history(folder) and len(found.merges) == 1 and found.merges[0].metrics
    assert not [exchange for exchange in hub.log if exchange.path.endswith(".safetensors")]
    assert find_history("history-org/even") == found
    words = ("predict-merge", "even.yaml", "--history", "history-org", "--rank", "2", "--examples", "2")
    code, out, err = call(*words, "--json")
    assert code == 0 and json.loads(out)["predictions"][0]["measured"] == pytest.approx(1.5), err
    assert "reading the records of history-org/even (1 of 1)" in err


def test_a_history_that_is_not_there_is_told_before_the_recipe_is_locked(folder, hub):
    hub.add_repo("history-none/rows", repo_type="dataset")
    for name in ("history-none", "history-none/model"):
        code, _, err = call("predict-merge", "even.yaml", "--history", name)
        assert code == 1 and name in err and "Traceback" not in err
    with pytest.raises(hm.HubMagmaxError, match="no finished merge"):
        hm.predict_merge("even.yaml", folder / "a")
    hub.add_repo("history-none/other", files={"config.json": b"{}"})
    with pytest.raises(hm.HubMagmaxError, match=r"^history-none/other: no finished merge is there"):
        hm.predict_merge("even.yaml", "history-none/other")


def test_a_model_that_cannot_be_opened_is_left_out_and_named(folder, hub):
    models = folder / "models.json"
    models.write_text(json.dumps(["even", "history-gone/model"]))
    lines = []
    assert find_history(str(models), report=lines.append) == read_history(folder)
    assert [line for line in lines if line.startswith("history-gone/model is left out: ")]
    models.write_text(json.dumps(["history-gone/model"]))
    with pytest.raises(hm.HubMagmaxError, match="history-gone/model"):
        find_history(str(models))


def test_nothing_is_taken_of_a_model_one_of_whose_records_cannot_be_read(folder, monkeypatch):
    shutil.copytree(folder / "even", folder / "torn")
    models = folder / "models.json"
    models.write_text(json.dumps(["even", "torn"]))
    assert len(find_history(str(models)).merges) == 2

    def read(source, name):
        if source.label.endswith("torn") and name == DIAGNOSIS_NAME:
            raise SourceError("the connection was lost")
        return read_small_file(source, name)

    monkeypatch.setattr(merge_records, "read_small_file", read)
    assert find_history(str(models)) == read_history(folder / "even")
