"""The benchmarks of merges: that they run, keep what they stored, and write the page that is shipped."""

import shutil
import sys
import time
from argparse import Namespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from benchmarks import (
    in_memory,
    matrices,
    peers,
    performance,
    processes,
    run,
    selecting,
    selections,
    sites,
    timing,
    versus,
)
from benchmarks.families import SIZES, llama, make_family
from hub_magmax.cli import main
from tests.families import write_checkpoint


@pytest.fixture
def tiny(monkeypatch):
    model = llama(vocabulary=50, width=64, layers=1, inner=64, key_width=64)
    monkeypatch.setitem(SIZES, "30m", model)
    monkeypatch.setattr(timing, "start_seconds", lambda python, repeat: 0.5)
    monkeypatch.setattr(timing, "SLOW_SECONDS", 0)  # so that what may not compile runs once
    return Namespace(size="30m", repeat=1, methods=None)


@pytest.fixture
def in_process(monkeypatch):
    """Commands of the package without a process for each, which takes most of the time of tiny merges."""

    def run_here(command, environment=None, *, folder=None):
        started, used = time.perf_counter(), time.process_time()
        words = command[[*command].index("hub_magmax") + 1 :]
        done = CliRunner().invoke(main, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - used
        return timing.Finished(done.stdout, seconds, 1, processor_seconds)

    monkeypatch.setattr(timing, "run", run_here)


def test_the_page_is_that_of_the_stored_results():
    for path, text in performance.pages(performance.load()).items():
        assert path.read_text() == text, "write it again: python -m benchmarks.performance"


def test_a_result_replaces_only_the_one_of_its_part_and_size():
    stored = {"methods": {"1b": {"size": "1b"}, "30m": {"size": "30m"}}, "processes": {"1b": {"size": "1b"}}}
    new = {"size": "30m", "rows": []}
    found = performance.with_result(stored, "methods", new)
    assert found == stored | {"methods": {"1b": {"size": "1b"}, "30m": new}}
    assert list(performance.with_result(stored, "peers", new)) == ["methods", "peers", "processes"]


@pytest.mark.slow
def test_every_method_is_measured_beside_the_floor(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "METHODS", {"magmax": {"name": "magmax"}})
    result = run.measure(tmp_path, tiny)
    assert [(row["method"], row["runs"]) for row in result["rows"]] == [("magmax", 1)]
    page = performance.page({"methods": {"30m": result}})
    assert "| magmax | 1 |" in page and "in bfloat16\n" in page
    small = performance.page({"methods": {"30m-1e-4": result | {"deviation": 1e-4}}})
    assert "in bfloat16, task vectors of deviation 0.0001\n" in small


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_methods_of_whole_matrices_are_measured(tiny, in_process, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(matrices, "NUM_TASKS", 2)
    tiny.rank, tiny.only = rank, ["iso_c"]
    result = matrices.measure(tmp_path, tiny)
    page = performance.page({"matrices": {"30m": result}})
    assert "| iso_c |" in page and ("2 adapters of rank 2" if rank else "2 whole checkpoints") in page


@pytest.mark.slow
def test_many_sites_are_measured(tiny, in_process, tmp_path):
    tiny.sites, tiny.only = 2, ["average"]
    result = sites.measure(tmp_path, tiny)
    assert result["rows"][0]["ratio"] == result["rows"][0]["seconds"] / result["floor_seconds"]
    assert "2 sites. Floor: " in performance.page({"sites": {"30m": result}})


@pytest.mark.slow
def test_selections_are_measured_beside_whole_weights(tiny, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(selections, "NUM_TASKS", 2)
    tiny.only = ["magmax"]
    result = selections.measure(tmp_path, tiny)
    (row,) = result["rows"]
    assert row["same_weights"]
    assert row["bits"] < 2
    page = selections.page("# Selections\n\n## Size and time\n\nold\n", {"30m": result})
    assert page.startswith("# Selections\n\n## Size and time\n\nWritten by")
    assert "| magmax | uniform |" in page and "old" not in page


def test_the_page_of_selections_has_the_stored_results():
    if results := selections.load():
        assert selections.PAGE.read_text() == selections.page(selections.PAGE.read_text(), results)


@pytest.mark.slow
def test_one_and_two_processes_are_measured(tiny, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "CHOSEN", ("average",))
    monkeypatch.setattr(processes, "LAUNCH", run.MERGE)  # launching takes long, and has tests of its own
    result = processes.measure(tmp_path, tiny)
    assert result["rows"][0]["same_files"] > 3
    assert "| average |" in performance.page({"processes": {"30m": result}})


@pytest.mark.slow
def test_a_peer_is_measured_beside_ours(tiny, in_process, tmp_path, monkeypatch):
    """What stands for mergekit copies what was merged before."""
    monkeypatch.setattr(peers, "PAIRS", {name: peers.PAIRS[name] for name in ("average", "nuslerp")})
    monkeypatch.setattr(peers, "package_version", lambda python, package: "1")

    def copy(folder, python, config):
        count = 5 if config["merge_method"] == "linear" else 2
        assert [model["model"] for model in config["models"]] == [f"task-{n}" for n in range(1, count + 1)]
        assert python == sys.executable
        shutil.copytree(folder / "merged", folder / "peer", dirs_exist_ok=True)
        return timing.Finished("", 1.0, 1, 1.0)

    monkeypatch.setattr(peers, "merge_by_peer", copy)
    tiny.python = sys.executable
    result = peers.measure(tmp_path, tiny)
    assert result["average_and_linear"]["most_steps"] == 0
    assert sys.executable not in str(result)
    page = performance.page({"peers": {"30m": result}})
    assert "| average / linear |" in page
    assert "| nuslerp / nuslerp |" in page


def test_rows_of_methods_that_a_call_leaves_out_are_kept_and_marked():
    row = {"peer_method": "linear", "seconds": 1.0, "peer_seconds": 3.0, "peer_ratio": 3.0, "runs": 1}
    row |= {"peer_runs": 1, "peak_memory_bytes": 10**6, "peer_peak_memory_bytes": 10**9}
    facts = {
        "model": "Llama",
        "parameters": 10**9,
        "dtype": "bfloat16",
        "machine": "2 cores",
        "peer": "mergekit",
    }
    facts |= {"peer_command": "run", "average_and_linear": {"different_share": 0.0, "most_steps": 0.0}}
    before = facts | {"command": "first", "rows": [row | {"method": "sce"}, row | {"method": "average"}]}
    now = facts | {
        "command": "second",
        "average_and_linear": {},
        "rows": [row | {"method": "sce", "seconds": 2.0}],
    }
    found = peers.with_earlier(now, before)
    assert [(r["method"], r["seconds"], r.get("earlier")) for r in found["rows"]] == [
        ("average", 1.0, "first"),
        ("sce", 2.0, None),
    ]
    assert found["average_and_linear"] == before["average_and_linear"] and found["command"] == "second"
    page = performance.page({"peers": {"1b": found}})
    assert "| average / linear * |" in page and "earlier calls (`first`)" in page
    assert peers.with_earlier(before, now)["rows"] == before["rows"][::-1]
    assert peers.with_earlier(now, None) == now
    assert peers.with_earlier(now | {"machine": "4 cores"}, before)["rows"] == now["rows"]
    again = peers.with_earlier(facts | {"command": "third", "rows": []}, found)
    assert [row["earlier"] for row in again["rows"]] == ["first", "second"]


def test_rules_alone_are_measured(tiny):
    result = selecting.measure(1000, tiny)
    assert [(row["rule"], row["tasks"]) for row in result["rows"]] == [
        *(("algorithm-1", 5), ("top-n", 5), ("algorithm-1", 20), ("top-n", 20)),
    ]
    stored = performance.with_result({}, "selecting", result)
    assert "| top-n | 20 |" in performance.page(stored)
    assert all(sum(weights) == pytest.approx(1) for weights in selecting.preferences(20).values())


def test_merges_in_memory_are_measured_and_shown_beside_those_of_before(tiny, tmp_path):
    tiny.merges, tiny.label = 2, "before"
    before = in_memory.beside({}, "before", in_memory.measure(tmp_path, tiny), "30m")
    assert [row["method"] for row in before["before"]["rows"]] == list(in_memory.CHOSEN)
    assert all(row["measured"] == 2 and row["merges"] == 15 for row in before["before"]["rows"])
    assert all(row["processor_seconds"] > 0 for row in before["before"]["rows"])
    assert "after" not in performance.page({"in_memory": {"30m": before}}).partition("### ")[2]
    rows = [
        {**row, "seconds": 0.5, "processor_seconds": 1, "measured": 15} for row in before["before"]["rows"]
    ]
    both = in_memory.beside(before, "after", {**before["before"], "rows": rows}, "30m")
    assert both["before"] == before["before"]
    page = performance.page({"in_memory": {"30m": both}})
    assert "| 2 of 15 | 0.50 | 1.00 | 15 of 15 |" in page
    assert "| 8 of 60 | 30 | 60 | 60 of 60 |" in page


def test_a_merge_in_memory_is_that_of_the_files(tiny, in_process, tmp_path):
    make_family(tmp_path, "30m", num_tasks=run.NUM_TASKS)
    run.merge(tmp_path, run.METHODS["magmax"])
    with in_memory.open_merger(tmp_path) as merge:
        found = merge(run.METHODS["magmax"], in_memory.preferences(run.NUM_TASKS)[0])
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_preferences_of_merges_in_memory_differ_and_sum_to_one():
    found = in_memory.preferences(5)
    assert len(set(found)) == 15
    assert all(sum(weights) == pytest.approx(1) and len(weights) == 5 for weights in found)
    assert found[5:7] == [
        pytest.approx((0.3606, 0.2525, 0.1767, 0.1237, 0.0866), abs=1e-4),
        (found[5][4], *found[5][:4]),
    ]


@pytest.fixture
def checkout(tmp_path):
    """A version of the package that merges to other bytes."""
    package = tmp_path / "checkout" / "hub_magmax"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import pathlib, sys; folder = pathlib.Path(sys.argv[2]).parent / 'merged'; folder.mkdir()\n"
        "(folder / 'model.safetensors').write_bytes(b'other')"
    )
    return package.parent


@pytest.mark.slow
def test_two_versions_are_timed_each_with_its_own_package(tiny, tmp_path, monkeypatch, checkout):
    monkeypatch.setattr(versus, "METHODS", {"magmax": {"name": "magmax"}})
    tiny.other = checkout
    different = versus.measure(tmp_path, tiny)  # this checkout comes second
    assert not different["rows"][0]["same_weights"]
    assert different["before"] == "no commit"
    assert different["rows"][0]["before_seconds"] < different["rows"][0]["after_seconds"]
    assert str(checkout) not in str(different)
    assert "Weights differ in: magmax." in performance.page({"versus": {"30m": different}})


def test_versions_that_write_the_same_weights_are_told(tmp_path, checkout):
    environments = [versus.package_of(checkout)] * 2
    row = versus.pairs(tmp_path, "magmax", environments, repeat=2)
    assert row["same_weights"]
    assert row["runs"] == 2
    assert 0 < row["after_processor_seconds"] < 2


def test_slower_is_told_in_per_cent():
    times = {"before_seconds": 2.0, "after_seconds": 2.1}
    times |= {"before_processor_seconds": 4.0, "after_processor_seconds": 3.0}
    row = {"method": "ties", "runs": 5, "same_weights": True, **times}
    facts = {"model": "Llama", "parameters": 1e9, "dtype": "bfloat16", "machine": "", "command": ""}
    page = performance.page({"versus": {"30m": {**facts, "before": "a", "after": "b", "rows": [row]}}})
    assert "| ties | 5 | 2.00 | 2.10 | +5.0% | 4.00 | 3.00 | -25.0% |" in page
    assert "Weights are the same" in page


def test_a_folder_without_the_package_is_no_checkout(tmp_path):
    with pytest.raises(SystemExit, match="holds no package"):
        versus.package_of(tmp_path)


def test_the_peers_weights_are_our_preference():
    config = peers.configuration(peers.PAIRS["ties"], "bfloat16")
    weights = [model["parameters"]["weight"] for model in config["models"]]
    assert sum(weights) == pytest.approx(1)
    assert weights[3] / weights[2] == pytest.approx(0.7)
    assert config["base_model"] == "base"
    assert config["models"][0]["parameters"]["density"] == 0.2


def test_models_are_compared_in_steps_of_their_dtype(tmp_path):
    ours = torch.tensor([1.0, 3.0, -0.5, 0.0], dtype=torch.bfloat16)
    theirs = ours.clone()
    theirs[1] += 2**-6  # the neighbour of 3
    write_checkpoint(tmp_path / "ours", {"w": ours})
    write_checkpoint(tmp_path / "theirs", {"w": theirs})
    found = peers.compare(tmp_path / "ours", tmp_path / "theirs")
    assert found == {"largest_difference": 2**-6, "most_steps": 1, "different_share": 0.25}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_that_of_the_command_and_its_children():
    held = bytearray(200_000_000)
    small = timing.run([sys.executable, "-c", "pass"])
    code = "import time; held = bytearray(100_000_000); print(len(held)); time.sleep(1)"
    large = timing.run([sys.executable, "-c", code])
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    of_child = timing.run([sys.executable, "-c", child])
    assert small.peak_memory_bytes < 50_000_000 < len(held)
    assert 100_000_000 < large.peak_memory_bytes < 150_000_000
    assert 100_000_000 < of_child.peak_memory_bytes < 170_000_000
    assert (small.output, large.output) == ("", "100000000\n")
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    assert (
        0.5 < timing.run([sys.executable, "-c", busy]).processor_seconds < 0.5 + small.processor_seconds + 1
    )
    assert large.processor_seconds < large.seconds, "a process that sleeps does not compute"


def test_a_command_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        timing.run([sys.executable, "-c", "1 / 0"])
