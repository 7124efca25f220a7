"""One year of a published model: twelve pushes, two of them worse, one by hand, and a base that moves."""

import json
from datetime import UTC, datetime

import pytest

from hub_magmax.fleet.history import history
from hub_magmax.pipeline import run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import parse_recipe
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.test_cli import call

REPO, BASE = "me/year-merged", "me/year-base"

#: Preference of each model for `a`; the worse one answers `emu` always, where the others answer `cat`.
SHARES = {"one": 0.86, "other": 0.9, "third": 0.95, "worse": 0.3, "of the new base": 0.9}

#: The model that is pushed in each month.
PUSHED = {1: "one", 2: "other", 3: "one", 4: "other", 5: "worse", 6: "one", 7: "of the new base", 9: "one"}
PUSHED |= {10: "other", 11: "worse", 12: "third"}


@pytest.fixture
def family(tmp_path, hub):
    """Checkpoints on the Hub that always give one answer, and examples of which 6 and 5 in 10 are cats."""
    write_classifiers(tmp_path, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    write_rows(tmp_path / "others.parquet", [0] * 5 + [1, 1, 2])
    for name in ("base", "a", "b"):
        hub.add_repo(f"me/year-{name}", folder=tmp_path / name)
    return tmp_path


class Year:
    """What its people do, and what the commands then say."""

    def __init__(self, folder, hub, monkeypatch):
        self.folder, self.hub, self._monkeypatch = folder, hub, monkeypatch
        self.pushed = {}

    def begin(self, month):
        self.month, self.date = month, f"2026-{month:02}-01"
        moment = datetime(2026, month, 1, tzinfo=UTC)
        self.hub.clock = moment.timestamp
        self._monkeypatch.setattr("hub_magmax.fleet.checks.now", moment.isoformat)

    def merge(self, name):
        """Merge and score a model, once."""
        folder = self.folder / name
        if not folder.exists():
            data = {"a": {"dataset": "./rows.parquet"}, "b": {"dataset": "./others.parquet"}}
            values = classifier_recipe(
                method={"name": "average", "scaling": 1.0},
                preference={"weights": {"a": SHARES[name], "b": 1 - SHARES[name]}},
                evaluation={"evaluator": "image-classification", "tasks": data},
                output={"path": name},
            )
            names = {"base_model": BASE, "tasks": [{"name": n, "model": f"me/year-{n}"} for n in "ab"]}
            run(parse_recipe(values | names, folder=self.folder))
        return folder

    def push(self):
        """Push this month's model."""
        self.pushed[self.month] = push(self.merge(PUSHED[self.month]), REPO).commit

    def canary(self):
        return call("canary", REPO, "--from", self.folder)

    def status(self):
        code, out, _ = call("fleet", REPO, "--json")
        (found,) = json.loads(out)["models"]
        return code, found

    def marks(self):
        """Return the commits that are marked in the history."""
        found = history(REPO)
        return (
            {revision.commit for revision in found if revision.rolled_back},
            [revision.commit for revision in found if revision.last_good],
        )


def first_months(year):
    """Four good models, each scored again after its push."""
    for month in (1, 2, 3, 4):
        year.begin(month)
        year.push()
        code, found = year.status()
        assert (code, found["commit"], found["updated"][:10]) == (0, year.pushed[month], year.date)
        assert found["tag"] == ("" if month == 1 else "earlier")
        assert found["preference"]["a"] == pytest.approx(SHARES[PUSHED[month]])
        assert (found["by_hand"], found["changed"], found["behind"]) == ([], [], [])
        code, _, said = year.canary()
        assert code == 0 and f"the tag last-good names {year.pushed[month][:12]} now" in said
        code, found = year.status()
        assert (code, found["tag"]) == (0, "head")
        assert (found["canary"]["commit"], found["canary"]["time"][:10]) == (year.pushed[month], year.date)


def a_worse_model(year, hub):
    """A worse model, which is rolled back, and a good one after it."""
    year.begin(5)
    year.push()
    good, worse = year.pushed[4], year.pushed[5]
    for _ in "on this day", "on the next one":
        code, out, said = year.canary()
        assert code == 3 and f"against {REPO}@{good[:7]}: a, b got worse" in out
        assert f"comparing with the last good model ({good[:12]}, 2026-04-01" in said
    code, found = year.status()
    assert (code, found["canary"]["result"], found["tag"]) == (3, "regressed", "earlier")
    code, out, _ = call("rollback", REPO)
    assert code == 0 and f"{good} was restored in place of {worse}: the tag last-good names it" in out
    assert year.canary()[0] == 0
    restored = hub.head(REPO)
    assert year.marks() == ({worse}, [restored])
    code, found = year.status()
    assert (code, found["commit"], found["tag"], found["by_hand"]) == (0, restored, "head", [])
    year.begin(6)
    year.push()
    assert year.canary()[0] == 0


def a_base_that_moves(year, hub):
    """A new commit of the base model, and a push that takes it."""
    year.begin(7)
    hub.add_repo(BASE, files={"README.md": b"a new base"})
    code, found = year.status()
    assert (code, found["behind"]) == (0, ["base_model"]), "told, and no fault"
    moved = found["origins"][0]
    assert (moved["head"], moved["num_behind"], moved["since"][:10]) == (hub.head(BASE), 1, year.date)
    assert "behind base_model since 2026-07-01" in call("fleet", REPO)[1]
    year.push()
    assert year.canary()[0] == 0
    code, found = year.status()
    assert (code, found["behind"]) == (0, [])


def a_push_by_hand(year, hub):
    """Files that somebody uploads, which is found, verified and rolled back."""
    year.begin(8)
    config = json.loads(hub.read(REPO, "config.json")) | {"hidden_act": "relu"}
    files = {"config.json": json.dumps(config).encode(), "extra.safetensors": b"theirs"}
    year.pushed[8] = hub.add_repo(REPO, files=files, message="Try relu")
    code, found = year.status()
    assert code == 3 and found["by_hand"] == ["Try relu"]
    assert found["changed"] == ["config.json", "extra.safetensors"]
    assert call("verify", REPO)[0] == 1
    assert year.status()[1]["verified"]["result"] == "failed"
    code, out, _ = call("rollback", REPO)
    restored = f"{year.pushed[7]} was restored in place of {year.pushed[8]}: the tag last-good"
    assert code == 0 and restored in out
    assert call("verify", REPO)[0] == 0 and year.canary()[0] == 0
    code, found = year.status()
    assert (code, found["by_hand"], found["changed"]) == (0, [], [])
    assert (found["verified"]["result"], found["verified"]["time"][:10]) == ("passed", year.date)


def last_months(year):
    """Good models, and a worse one that a better one replaces."""
    for month in (9, 10):
        year.begin(month)
        year.push()
        assert year.canary()[0] == 0
    year.begin(11)
    year.push()
    assert year.canary()[0] == 3
    year.begin(12)
    year.push()
    assert year.canary()[0] == 0
    assert year.marks() == ({year.pushed[5], year.pushed[8]}, [year.pushed[12]])
    code, found = year.status()
    assert (code, found["tag"], found["canary"]["time"][:10]) == (0, "head", year.date)


@pytest.mark.slow
def test_a_year_of_a_fleet(family, hub, monkeypatch):
    year = Year(family, hub, monkeypatch)
    first_months(year)
    a_worse_model(year, hub)
    a_base_that_moves(year, hub)
    a_push_by_hand(year, hub)
    last_months(year)
    code, out, _ = call("rollback", REPO)
    assert code == 0 and f"{year.pushed[10]} was restored" in out, "not the worse one between"
    assert "the last good one by its stored scores" in out
    planned = json.loads(call("rollback", REPO, "--dry-run", "--json")[1])
    assert planned["restored"] == year.pushed[9], "never back to what was left"
    assert len(hub.commits(REPO)) == 1 + 12 + 3
    assert hub.commits(REPO)[0].seconds == datetime(2026, 12, 1, tzinfo=UTC).timestamp()
