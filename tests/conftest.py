"""One local Hub for the whole run, and an empty Hugging Face home: no test reaches the real one."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from tests import typechecks  # noqa: F401  (pyproject.toml names it, and what it checks is imported later)

# How long an example takes says how busy the machine is.
settings.register_profile("any speed", settings(deadline=None))
settings.load_profile("any speed")

# huggingface_hub reads these once, when it is imported, so they come before any import of ours.
_home = tempfile.TemporaryDirectory(prefix="hub_magmax_tests_")
for _name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "WORLD_SIZE", "RANK"):
    os.environ.pop(_name, None)
os.environ.update(
    HF_HOME=_home.name,
    XDG_CACHE_HOME=_home.name,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers share the cores. Threads that wait for each other spin: recipes took up to 4 times the work.
    _threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _threads)))

# No test survives a power cut, and a merge has the disk hold 14 things, which takes it 1 to 20 ms each.
os.fsync = os.fstat

from tests.local_hub.hub import LocalHub  # noqa: E402

_hub = LocalHub().start()
os.environ.update(HF_ENDPOINT=_hub.endpoint, HF_TOKEN=_hub.token)


def pytest_unconfigure() -> None:
    _hub.close()
    _home.cleanup()


@pytest.fixture(scope="session")
def shared_hub() -> LocalHub:
    """The local Hub, for what is made once for many tests."""
    return _hub


@pytest.fixture
def hub():
    """The local Hub, with an empty request log and no faults."""
    _hub.reset_log()
    yield _hub
    _hub.faults.clear()
    _hub.clock = time.time


@pytest.fixture
def family(tmp_path: Path):
    """A base model and three checkpoints in folders `base`, `a`, `b`, `c` under `tmp_path`."""
    from tests.families import write_family

    write_family(tmp_path, ("a", "b", "c"))
    return tmp_path


@pytest.fixture(scope="session")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hub-magmax quickstart` leaves behind, made once in about 40 s; tests copy what they change."""
    from hub_magmax.quickstart.demo import quickstart

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the workers share
    table = root / "session" / "table.json"
    table.parent.mkdir(exist_ok=True)
    with FileLock(root / "session.lock"):
        if not table.exists():
            values, text = quickstart(table.parent / "quickstart")
            table.write_text(json.dumps({"values": values, "text": text}))
    return table.parent / "quickstart"


@pytest.fixture(scope="session")
def family_on_hub(quickstart_folder: Path) -> LocalHub:
    """The local Hub with the quickstart's checkpoints and data, under the names of the Hub recipes."""
    from benchmarks.cards import add_family

    add_family(_hub, quickstart_folder)
    return _hub


@pytest.fixture(scope="session")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text classifier `base` and examples of two tasks, for tests that copy what they change."""
    from tests.learners import write_learner

    return write_learner(tmp_path_factory.mktemp("learner"))


@pytest.fixture
def folder(learner: Path, tmp_path: Path) -> Path:
    """A copy of `learner`, to train in."""
    return shutil.copytree(learner, tmp_path / "here")


@pytest.fixture(autouse=True)
def own_scores(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Keep each test from the scores that others measured on the same tiny models, and from their checks."""
    own = f"{_home.name}/{{}}/{abs(hash(request.node.nodeid))}"
    monkeypatch.setenv("HUB_MAGMAX_SCORES", own.format("scores"))
    monkeypatch.setenv("HUB_MAGMAX_CHECKS", f"{own.format('checks')}.jsonl")
