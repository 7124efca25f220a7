import json
import os
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from hub_magmax.cli import main
from hub_magmax.errors import DistributedError
from hub_magmax.evaluation.scores import read_scores
from hub_magmax.merging.execution import share
from hub_magmax.pipeline import run
from hub_magmax.planning.plan import Shard, TensorJob
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.loading import load_recipe
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.families import read_merged, recipe_values, write_family, write_recipe, yaml_text
from tests.learners import training_recipe, write_learner


def shards(sizes: list[int]) -> tuple[Shard, ...]:
    return tuple(
        Shard(f"{number:03d}", (TensorJob(str(number), (size,), "U8", size, "merge"),))
        for number, size in enumerate(sizes)
    )


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 8))
def test_every_shard_is_made_by_exactly_one_process(sizes, count):
    made = [shard.file for rank in range(count) for shard in share(shards(sizes), Processes(rank, count))]
    assert sorted(made) == [shard.file for shard in shards(sizes)]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 8))
def test_no_process_has_more_than_its_part_and_one_shard(sizes, count):
    loads = [sum(s.data_bytes for s in share(shards(sizes), Processes(rank, count))) for rank in range(count)]
    assert max(loads) <= sum(sizes) / count + max(sizes)


def test_without_a_launcher_there_is_one_process_and_no_accelerate(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_processes() == Processes(0, 1)
    code = "import sys, hub_magmax.processes as d; d.find_processes(); assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_launcher_and_accelerate_must_agree(monkeypatch):
    class Alone:
        num_processes = 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: Alone())
    with pytest.raises(DistributedError, match="started 2 processes, and accelerate sees 1"):
        find_processes()


def test_one_process_where_several_were_asked_for_is_told(monkeypatch):
    lines = []
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    find_processes(lines.append)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # as batch systems do by themselves
    find_processes(lines.append)
    assert lines == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert find_processes(lines.append) == Processes(0, 1)
    assert len(lines) == 1 and "torchrun --nproc-per-node N" in lines[0]


def test_accelerate_starts_one_process_without_a_gpu_and_the_merge_says_so(tmp_path):
    write_family(tmp_path, "ab")
    recipe = write_recipe(tmp_path, names=("a", "b"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "hub_magmax", "merge", str(recipe)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "started this one alone" in done.stderr


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_others_with_a_paragraph(killed):
    """Two processes started by hand; one is killed while the other waits for it."""
    code = """
import os, signal, sys
from hub_magmax.processes import find_processes
from hub_magmax.errors import DistributedError

processes = find_processes()
processes.wait()
if processes.rank == KILLED:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    processes.first_decides(lambda: 1)
    processes.wait()
except DistributedError as error:
    print(error)
    sys.exit(1)
""".replace("KILLED", str(killed))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    told, _ = running[1 - killed].communicate(timeout=120)
    running[killed].communicate(timeout=120)
    assert running[1 - killed].returncode == 1
    assert "another process of this run ended" in told


def test_the_group_of_processes_ends_before_the_interpreter_does():
    """Left to the interpreter's end, one process in fifty was killed by a thread of gloo."""
    code = """
import atexit
import accelerate, torch.distributed as dist
from hub_magmax.processes import find_processes

class State:
    num_processes, process_index = 2, 0
    destroy_process_group = staticmethod(dist.destroy_process_group)

accelerate.PartialState = lambda cpu: State()
atexit.register(lambda: print("left over" if dist.is_initialized() else "ended"))  # runs last
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
assert find_processes().count == 2 and dist.is_initialized()
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"WORLD_SIZE": "2"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("ended\n", 0), done.stderr


def launch(
    *arguments: str, num_processes: int = 2, program: tuple[str, ...] = ("-m", "hub_magmax")
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(num_processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", *program, *arguments]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)


#: Runs several recipes in the same processes, which take seconds to start.
RUN_ALL = """
import sys
from hub_magmax.cli import main
for recipe in sys.argv[1:]:
    main(["run", recipe], standalone_mode=False)
"""


@pytest.mark.parametrize(
    ("num_processes", "methods"),
    [
        (
            2,
            [
                {"name": "tunable_magmax"},
                {"name": "ties", "rescale": "norm"},
                {"name": "ties", "rescale": "norm", "scope": "model"},
            ],
        ),
        (4, [{"name": "tunable_magmax", "scope": "model"}]),
    ],
    ids=["two", "four"],
)
def test_processes_give_the_same_bytes_as_one(tmp_path, num_processes, methods):
    write_family(tmp_path, "abc", shapes={f"layer.{i}.weight": (40, 30) for i in range(6)})
    recipes = []
    for number, method in enumerate(methods):
        output = {"path": f"several-{number}", "shard_size": "10KB"}
        recipe = write_recipe(tmp_path, method=method, preference={"geometric": {"ratio": 2}}, output=output)
        recipes.append(str(recipe.rename(tmp_path / f"{number}.yaml")))
    program = tmp_path / "run_all.py"
    program.write_text(RUN_ALL)
    done = launch(*recipes, num_processes=num_processes, program=(str(program),))
    assert done.returncode == 0, done.stderr
    for number, recipe in enumerate(recipes):
        words = ["merge", recipe, "--output", str(tmp_path / f"one-{number}"), "--json"]
        one = CliRunner().invoke(main, words, catch_exceptions=False)
        assert one.exit_code == 0, one.stderr
        several = json.loads((tmp_path / f"several-{number}" / "merge_report.json").read_text())
        assert len(several["shards"]) == 3
        assert several["shards"] == json.loads(one.stdout)["shards"]
        assert (tmp_path / f"several-{number}" / "README.md").is_file()


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HUB_MAGMAX_SCORES", "")  # otherwise the second run reuses what the first measured
    write_classifiers(tmp_path, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    tasks = {"a": {"dataset": "./rows.parquet"}}
    # Batches of two: the eleven examples end in the middle of one.
    write_rows(tmp_path / "rows.parquet", [0] * 6 + [1] * 4 + [2])
    evaluation = {"evaluator": "image-classification", "tasks": tasks}
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            yaml_text(classifier_recipe(evaluation=evaluation, output={"path": name}))
        )
    done = launch("run", str(tmp_path / "two.yaml"))
    assert done.returncode == 0, done.stderr
    one = run(load_recipe(tmp_path / "one.yaml")).scores
    assert read_scores(tmp_path / "two") == one
    assert one.get("a", "a").outcomes == (1.0,) * 6 + (0.0,) * 5


def test_two_processes_learn_what_one_does_but_for_rounding(tmp_path):
    values, models = training_recipe({"batch_size": 5, "order": "from_base"}), {}
    for name in ("one", "two"):
        folder = write_learner(tmp_path / name, dropout=0.0)  # processes draw other dropout than one
        (folder / "recipe.yaml").write_text(yaml_text(values))
        words = ("finetune", str(folder / "recipe.yaml"))
        done = launch(*words) if name == "two" else CliRunner().invoke(main, words, catch_exceptions=False)
        assert (done.returncode if name == "two" else done.exit_code) == 0, done.stderr
        models[name] = [load((folder / task / "model.safetensors").read_bytes()) for task in "ab"]
    base = load((tmp_path / "one" / "base" / "model.safetensors").read_bytes())
    # Attention does not depend on biases of keys: their gradients are rounding, whose sign AdamW follows.
    names = [name for name in base if not name.endswith("key.bias")]
    for one, two in zip(models["one"], models["two"], strict=True):
        assert max((one[name] - base[name]).abs().max() for name in names) > 1e-2
        assert max((one[name] - two[name]).abs().max() for name in names) < 1e-5


def test_an_error_in_one_process_ends_all_of_them(tmp_path):
    write_family(tmp_path, "ab")
    recipe = write_recipe(tmp_path, names=("a", "b"), output={"path": "base"})
    done = launch("merge", str(recipe))
    assert done.returncode != 0
    assert "already holds a model" in done.stderr


def launch_machines(folders, *arguments):
    """Start one process on each of several machines, whose disks are the folders; return what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running = []
    for rank, folder in enumerate(folders):
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--mixed_precision",
            "no",
        ]
        command += [
            "--num_machines",
            str(len(folders)),
            "--machine_rank",
            str(rank),
            "--dynamo_backend",
            "no",
        ]
        command += ["--num_processes", str(len(folders)), "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", port, "-m", "hub_magmax", *arguments]
        environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return [(process.communicate(timeout=300), process.returncode) for process in running]


@pytest.mark.slow
def test_machines_without_a_disk_in_common_publish_one_model_in_one_commit(hub, tmp_path):
    write_family(tmp_path, "ab", shapes={f"layer.{i}.weight": (40, 30) for i in range(6)})
    for name in ("base", "a", "b"):
        hub.add_repo(f"me/machines-{name}", folder=tmp_path / name)
    tasks = [{"name": name, "model": f"me/machines-{name}"} for name in "ab"]
    output = {"path": "out", "shard_size": "10KB", "push_to_hub": "me/machines-merged", "keep": False}
    values = recipe_values(base_model="me/machines-base", tasks=tasks, method="average", output=output)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml_text(values))
    hub.reset_log()
    for (_, said), code in launch_machines(folders, "run", "recipe.yaml"):
        assert code == 0, said
    assert [sorted(path.name for path in folder.iterdir()) for folder in folders] == [["recipe.yaml"]] * 2
    assert hub.counts["POST commit"] == 1
    assert len([e for e in hub.log if e.method == "PUT"]) == 3
    local = run(load_recipe(write_recipe(tmp_path, names=("a", "b"), method="average"))).output
    found = {}
    for path in hub.files("me/machines-merged"):
        if path.endswith(".safetensors"):
            found |= load(hub.read("me/machines-merged", path))
    expected = read_merged(local)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
