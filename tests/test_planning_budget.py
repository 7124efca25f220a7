"""Memory that plans state: by hand, under a limit, and measured."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.statistics_writing import write_statistics
from hub_magmax.kernels import dispatch
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.report import REPORT_NAME, read_report
from hub_magmax.methods import merge_method
from hub_magmax.pipeline import plan
from hub_magmax.planning import budget, process_memory
from hub_magmax.planning.budget import (
    CHUNK_ELEMENTS,
    Budget,
    budget_of,
    memory_bytes,
    peak_memory_bytes,
    threads_of,
)
from hub_magmax.planning.memory_rows import memory_rows, merge_memory
from hub_magmax.planning.process_memory import (
    BESIDE,
    COMPILING_BYTES,
    RUNTIME_BYTES,
    RUNTIME_FILES,
    TORCH_BYTES,
    runtime_bytes,
)
from hub_magmax.planning.summary import describe
from hub_magmax.recipe.loading import load_recipe, site_recipe, updated
from hub_magmax.registry import METHODS
from tests.families import accepted, recipe_values, write_checkpoint, write_recipe
from tests.test_checkpoints_adapter import write_adapter
from tests.test_planning_layout import BASE, planned
from tests.tiny_llama import write_llama


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Loops that were compiled earlier, in whatever environment."""
    monkeypatch.setattr(dispatch.Compiled, "is_kept", lambda: True)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """A machine on which a merge has one thread."""
    monkeypatch.setattr(budget, "num_threads", lambda: 1)


def large(**output):
    """A plan of two tensors of 2^20 elements, whose memory can be computed by hand."""
    made = planned({"a": BASE, "b": BASE})
    job = next(job for job in made.jobs if job.merged)
    jobs = tuple(replace(job, name=name, shape=(2**20,), num_elements=2**20) for name in ("one", "two"))
    recipe = updated(made.recipe, {"output": made.recipe.to_dict()["output"] | output})
    shards = (replace(made.shards[0], jobs=jobs),)
    return replace(made, recipe=recipe, shards=shards, stored_item_bytes=4, needs_torch=False)


def test_memory_is_that_of_chunks_and_of_what_is_kept_of_the_largest_tensors():
    made = large()
    # A chunk as stored, of the base model and two tasks, and merged; an owner and a code of each element.
    one = (4 * 3 + 4) * CHUNK_ELEMENTS + 2 * 2**20
    runtime = runtime_bytes(made)
    assert memory_bytes(made, budget_of(made, 1)) == peak_memory_bytes(made) == runtime + one
    assert memory_bytes(made, budget_of(made, 2)) == runtime + 2 * one
    assert memory_bytes(made, budget_of(made, 3)) == runtime + 2 * one  # there are two tensors


def test_memory_is_that_of_as_many_threads_as_merge(monkeypatch):
    monkeypatch.setattr(budget, "num_threads", lambda: 2)
    made = large()
    assert peak_memory_bytes(made) == memory_bytes(made, budget_of(made, 2))
    assert dict(memory_rows(made, None))["memory"].endswith("in 2 threads")
    monkeypatch.setattr("hub_magmax.planning.plan.Plan.num_remote", 1)
    assert threads_of(large()) == 1  # what comes from the Hub is read in order


def test_memory_counts_what_reading_a_tokenizer_leaves():
    made = large()
    with_tokenizer = replace(made, copied_bytes=10**7)
    assert peak_memory_bytes(with_tokenizer) == peak_memory_bytes(made) + BESIDE * 10**7


def test_checkpoints_in_several_dtypes_are_held_as_stored_and_in_float32(family):
    stored = load_file(family / "base" / WEIGHTS)
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in stored.items()
    }
    assert plan(load_recipe(write_recipe(family))).stored_item_bytes == 4
    write_checkpoint(family / "base", tensors)
    assert plan(load_recipe(write_recipe(family))).stored_item_bytes == 8


def test_bfloat16_takes_half_of_a_chunk_and_float64_twice_as_much():
    def of_chunks(stored):
        made = replace(large(), stored_item_bytes=stored)
        return peak_memory_bytes(made) - runtime_bytes(made) - 2 * 2**20

    assert of_chunks(2) * 2 == of_chunks(4) == of_chunks(8) // 2


def test_merge_without_torch_is_stated_without_it(monkeypatch):
    monkeypatch.setattr(process_memory, "is_imported", lambda: False)
    made = large()
    assert runtime_bytes(made) == RUNTIME_BYTES
    assert runtime_bytes(made, with_files=True) == RUNTIME_BYTES + RUNTIME_FILES
    assert runtime_bytes(replace(made, needs_torch=True)) == RUNTIME_BYTES + TORCH_BYTES
    assert runtime_bytes(large(device="cpu")) == RUNTIME_BYTES + TORCH_BYTES
    monkeypatch.setattr(process_memory, "compiles_first", lambda num_elements, device: True)
    assert runtime_bytes(made) == RUNTIME_BYTES + COMPILING_BYTES
    monkeypatch.setattr(dispatch.Compiled, "is_kept", lambda: False)
    monkeypatch.setattr(process_memory, "compiles_first", dispatch.compiles_first)
    assert runtime_bytes(made) == RUNTIME_BYTES + TORCH_BYTES


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"output": {"path": "merged", "dtype": "bfloat16"}}, True),
        ({"output": {"path": "merged", "dtype": "float32"}}, False),
    ],
)
def test_casts_take_torch(family, changes, needed):
    assert plan(load_recipe(write_recipe(family, **changes))).needs_torch is needed


def test_memory_of_a_whole_tensor_counts_what_its_method_keeps(monkeypatch):
    def planned_with(held_bytes):
        @merge_method("spectral", source="test", held_bytes=held_bytes)
        def spectral(task_vectors: Tensor) -> Tensor:
            """Take the sum."""
            return task_vectors.sum(0)

        point = SimpleNamespace(load=lambda: spectral)
        monkeypatch.setitem(vars(METHODS), "plugins", {"spectral": point})
        made = large()
        return replace(made, lock=replace(made.lock, method={"name": "spectral", "scaling": 1.0}))

    assert peak_memory_bytes(planned_with(20)) == peak_memory_bytes(planned_with(0)) + 20 * 2**20


def test_what_lies_in_files_is_resident_and_needs_no_memory():
    made = large()
    of_a_billion = replace(made.jobs[0], num_elements=10**9)
    made = replace(made, shards=(replace(made.shards[0], jobs=(of_a_billion,)),))
    assert peak_memory_bytes(made, with_files=True) > 2e9
    assert peak_memory_bytes(made) < 0.5e9
    average = replace(made, lock=replace(made.lock, method={"name": "average", "scaling": 1.0}))
    assert peak_memory_bytes(average, with_files=True) < 0.4e9


def test_scope_model_keeps_what_one_tensor_of_all_elements_would():
    made = large()
    method = {**made.lock.method, "scope": "model"}
    found = replace(made, lock=replace(made.lock, method=method))
    assert peak_memory_bytes(found) - peak_memory_bytes(made) == 2 * 2**20


def test_a_limit_makes_chunks_smaller_first_and_then_threads_fewer():
    whole = memory_bytes(large(), budget_of(large(), 2))
    assert budget_of(large(memory=whole), 2) == budget_of(large(), 2)
    assert budget_of(large(memory=whole - 1), 2) == Budget(2, CHUNK_ELEMENTS // 2)
    runtime = runtime_bytes(large())
    less = runtime + 2 * 2 * 2**20  # what two threads keep of their tensors, and no room for chunks
    assert budget_of(large(memory=less), 2).num_threads == 1
    for limit in range(whole, runtime + 2 * 2**20 + 10**6, -(10**6)):
        made = large(memory=limit)
        assert memory_bytes(made, budget_of(made, 2)) <= limit


def refusal(family, memory, **changes):
    output = {"path": "merged", "memory": memory, **changes.pop("output", {})}
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(write_recipe(family, output=output, **changes)))
    return caught.value


def test_a_limit_that_cannot_be_kept_is_refused_when_planning(family):
    error = refusal(family, "100MB")
    assert re.fullmatch(r"this merge needs about 1\d\d\.\d MB of memory in each process", error.what)
    assert error.where == "recipe, output.memory"
    assert re.fullmatch(r"at least 1\d\dMB; found 100\.0 MB", error.expected)


def test_the_least_value_that_is_advised_works_and_less_does_not(family):
    (least,) = re.findall(r"Raise it to (\d+)MB", refusal(family, "100MB").hint)
    refusal(family, f"{int(least) - 1}MB")
    output = {"path": "merged", "memory": f"{least}MB"}
    plan(load_recipe(write_recipe(family, output=output)))


def test_methods_are_advised_only_where_they_keep_the_limit(family):
    # Torch takes the most of tiny tensors, whatever the method.
    for name in ("tunable_magmax", "average", "magmax", "dare", "last_task"):
        assert re.fullmatch(r"Raise it to \d+MB\.", refusal(family, "100MB", method={"name": name}).hint)


def test_change_that_is_advised_keeps_the_limit(monkeypatch):
    monkeypatch.setattr(process_memory, "is_imported", lambda: False)
    made = large()
    whole = replace(made, lock=replace(made.lock, method={**made.lock.method, "scope": "model"}))
    limit = runtime_bytes(made) + 2 * 2**20  # the codes of one tensor and no chunk
    with pytest.raises(RecipeError) as caught:
        budget_of(large(memory=limit), 1)
    assert caught.value.hint.endswith("or choose a method that keeps nothing of tensors: average, magmax.")
    for name in ("average", "magmax"):
        lock = replace(made.lock, method={"name": name, "scaling": 1.0})
        budget_of(replace(large(memory=limit), lock=lock), 1)
    with pytest.raises(RecipeError, match=r"or choose method\.scope: tensor, or choose a method"):
        budget_of(replace(large(memory=limit + 10**6), lock=whole.lock), 1)
    budget_of(large(memory=limit + 10**6), 1)
    with pytest.raises(
        RecipeError, match=r"Raise it to \d+MB, or leave out output\.device, which takes torch"
    ):
        budget_of(large(memory=limit + 10**6, device="cpu"), 1)


def test_a_number_without_a_unit_is_taken_for_bytes_and_asked_about(family):
    assert refusal(family, 200).what == "200 bytes are less than any program needs"
    assert refusal(family, "200").hint == "Write the unit: did you mean 200MB?"
    assert refusal(family, 2).hint == "Write the unit: did you mean 2GB?"
    for written in ("1KB", "64KiB", 2_000_000):
        assert re.fullmatch(r"Raise it to 1\d\dMB\.", refusal(family, written).hint)


def test_what_compiling_takes_is_told_apart(monkeypatch):
    made = large()
    rows = dict(memory_rows(made, None))
    assert rows[""] == "up to 220.0 MB more where loops are yet to be compiled, once on this machine"
    assert describe(made)["compiling_bytes"] == COMPILING_BYTES
    monkeypatch.setattr(dispatch.Compiled, "is_kept", lambda: False)
    monkeypatch.setattr(dispatch, "COMPILE_ABOVE_ELEMENTS", 1)
    assert dict(memory_rows(made, None)) == rows
    assert peak_memory_bytes(made) == merge_memory(made)[0] + COMPILING_BYTES
    by_torch = large(device="cpu")
    assert [*dict(memory_rows(by_torch, None))] == ["memory"] and describe(by_torch)["compiling_bytes"] == 0


WEIGHTS = "model.safetensors"


#: States and takes memory in a process of its own, as a command does.
MEASURE = """
import json, sys
from hub_magmax import load_recipe, lock, merge, plan
from hub_magmax.planning.budget import peak_memory_bytes

from dataclasses import replace
recipe = load_recipe(sys.argv[1])
made = plan(recipe, lock(recipe))
made = replace(made, in_spite_of=tuple(finding.name for finding in made.findings))
stated = [peak_memory_bytes(made, with_files=files) for files in (False, True)]
report = merge(made)
print(json.dumps([stated, [report.peak_memory_bytes, report.peak_resident_bytes]]))
"""

CASES = {
    "average": ("large", {"name": "average"}),
    "algorithm-1": ("large", {"name": "tunable_magmax"}),
    "top-n": ("large", {"name": "tunable_magmax", "selection": "top-n"}),
    "ties": ("large", {"name": "ties"}),
    "bfloat16, dare": ("bfloat16", {"name": "dare"}),
    "by torch": ("tiny", {"name": "tunable_magmax"}),
    "several dtypes": ("mixed", {"name": "average"}),
    "a tokenizer": ("tokenizer", {"name": "average"}),
    "della, long rows": ("large", {"name": "della"}),
    "della_linear, norm": ("rows", {"name": "della_linear", "rescale": "norm"}),
    "sce": ("large", {"name": "sce", "density": 0.5}),
    "pcb": ("large", {"name": "pcb"}),
    "ram_plus": ("large", {"name": "ram_plus"}),
    "della by torch": ("square", {"name": "della", "rescale": "norm"}),
    "pcb by torch": ("square", {"name": "pcb"}),
    **{
        name: ("square", {"name": name})
        for name in ("tsv", "iso_c", "iso_cts", "cart", "wudi", "actmat", "opcm")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_states_what_its_merge_takes_within_a_quarter(case, families, tmp_path):
    name, method = CASES[case]
    values = {"tasks": [{"name": n, "model": str(families / name / n)} for n in "abc"], "method": method}
    values |= {"schema": 1, "base_model": str(families / name / "base"), "output": {"path": "merged"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    if name not in ("tiny", "square"):  # what is compiled once is not the merge's
        made = accepted(plan(load_recipe(tmp_path / "recipe.yaml")))
        merge(made, tmp_path / "first", backend=Compiled())
    for stated, taken in measured(MEASURE, tmp_path / "recipe.yaml"):
        assert 0.8 <= stated / taken <= 1.25, f"{stated / 1e6:.0f} MB stated, {taken / 1e6:.0f} taken"


#: The same for twelve sites.
OF_SITES = """
import json, sys
from dataclasses import replace
from hub_magmax import load_recipe, lock, plan
from hub_magmax.merging.sites import merge_sites
from hub_magmax.planning.memory_rows import sites_memory_bytes
from hub_magmax.recipe.loading import site_recipes

plans = {}
for site, recipe in site_recipes(load_recipe(sys.argv[1])).items():
    made = plan(recipe, lock(recipe))
    plans[site] = replace(made, in_spite_of=tuple(finding.name for finding in made.findings))
stated = sites_memory_bytes([*plans.values()])
taken = [report.peak_memory_bytes for report in merge_sites(plans).values()]
print(json.dumps([[stated], [max(taken)]]))
"""


@pytest.mark.parametrize("case", ["average", "top-n"])
def test_plans_of_sites_state_what_their_merges_take_within_a_quarter(case, families, tmp_path):
    name, method = CASES[case]
    values = {"tasks": [{"name": n, "model": str(families / name / n)} for n in "abc"], "method": method}
    sites = {f"s{n}": {"preference": {"geometric": {"ratio": 0.5 + n / 20}}} for n in range(12)}
    values |= {"base_model": str(families / name / "base"), "output": {"path": "merged"}, "sites": sites}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    first = site_recipe(load_recipe(tmp_path / "recipe.yaml"), "s0")
    merge(accepted(plan(first)), tmp_path / "first", backend=Compiled())  # what is compiled once
    ((stated, taken),) = measured(OF_SITES, tmp_path / "recipe.yaml")
    assert 0.8 <= stated / taken <= 1.25, f"{stated / 1e6:.0f} MB stated, {taken / 1e6:.0f} taken"


def test_a_large_tensor_that_no_adapter_changes_takes_no_survey(tmp_path):
    base = {"embed.weight": torch.randn(8192, 2048), "layer.q_proj.weight": torch.randn(512, 512)}
    write_checkpoint(tmp_path / "base", base)
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, base, ("q_proj",), seed)
    method = {"name": "tunable_magmax", "selection": "top-n"}
    values = recipe_values(("a", "b"), method=method, output={"path": "merged"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    merge(accepted(plan(load_recipe(tmp_path / "recipe.yaml"))), tmp_path / "first", backend=Compiled())
    for stated, taken in measured(MEASURE, tmp_path / "recipe.yaml"):
        assert 0.8 <= stated / taken <= 1.25, f"{stated / 1e6:.0f} MB stated, {taken / 1e6:.0f} taken"
    report = read_report(tmp_path / "merged" / REPORT_NAME)
    assert sum(shard.num_unchanged for shard in report.shards) == base["embed.weight"].numel()
    assert load_file(tmp_path / "merged" / WEIGHTS)["embed.weight"].equal(base["embed.weight"])


def test_a_plan_states_what_a_merge_by_statistics_takes_within_a_quarter(tmp_path):
    shape, tasks = (600, 1800), []
    for number, name in enumerate(("base", "a", "b")):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        write_checkpoint(tmp_path / name, {"layer.weight": value})
        inputs = torch.randn((2000, shape[1]), generator=torch.Generator().manual_seed(number))
        gram = {"layer.weight": inputs.T @ inputs / len(inputs)}
        write_statistics(tmp_path / "of" / name / "gram.safetensors", gram, {"statistics": "gram"})
        tasks.append({"name": name, "model": f"./{name}", "statistics": f"./of/{name}"})
    values = {"schema": 1, "base_model": "./base", "tasks": tasks[1:], "method": "regmean"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"output": {"path": "merged"}}))
    for stated, taken in measured(MEASURE, tmp_path / "recipe.yaml"):
        assert 0.8 <= stated / taken <= 1.25, f"{stated / 1e6:.0f} MB stated, {taken / 1e6:.0f} taken"


#: The same of a whole run, with an evaluation.
RUN = """
import json, sys
from hub_magmax import load_recipe, lock, plan
from hub_magmax.merging.output.report import REPORT_NAME, read_report
from hub_magmax.merging.profile import MemoryWatch, peak_resident_bytes
from hub_magmax.pipeline import run
from hub_magmax.planning.summary import describe

recipe = load_recipe(sys.argv[1])
made = plan(recipe, lock(recipe))
needs = describe(made)["evaluation"]
stated = [*needs["run"].values(), needs["memory_bytes"], needs["resident_bytes"]]
with MemoryWatch() as watch:
    run(recipe)
report = read_report(recipe.output_path / REPORT_NAME)
of_merge = [report.peak_memory_bytes, report.peak_resident_bytes]
whole = [watch.peak_bytes, peak_resident_bytes()]
print(json.dumps([stated, of_merge + whole]))
"""


def test_a_plan_states_what_a_run_with_adapters_and_an_evaluation_takes_within_a_quarter(tmp_path):
    write_llama(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, base, ("q_proj", "v_proj"), seed, config={"task_type": "CAUSAL_LM"})
    rows = [{"text": "a good film"}, {"text": "an odd one"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {name: {"dataset": "./rows.jsonl", "split": "train"} for name in "ab"}
    evaluation = {"evaluator": "log-likelihood", "tasks": data}
    values = recipe_values(("a", "b"), evaluation=evaluation, output={"path": "merged"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for stated, taken in measured(RUN, tmp_path / "recipe.yaml"):
        assert 0.8 <= stated / taken <= 1.25, f"{stated / 1e6:.0f} MB stated, {taken / 1e6:.0f} taken"


def measured(program, recipe):
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)


FAMILIES = {
    "large": ((8, 2**20), torch.float32),
    "bfloat16": ((4, 2**20), torch.bfloat16),
    "rows": ((4096, 2048), torch.float32),
    "tiny": ((64, 64), torch.float32),
    "square": ((1200, 1200), torch.float32),
    "mixed": ((8, 2**20), torch.float32),
    "tokenizer": ((4, 2**20), torch.float32),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    for family, (shape, dtype) in FAMILIES.items():
        base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for number, name in enumerate(("base", "a", "b", "c")):
            moved = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(number))
            stored = torch.bfloat16 if (family, name) == ("mixed", "base") else dtype
            write_checkpoint(folder / family / name, {"weight": (base + moved * (number > 0)).to(stored)})
    vocabulary = {f"token {number:,}": number for number in range(500_000)}
    (folder / "tokenizer" / "base" / "tokenizer.json").write_text(json.dumps({"vocab": vocabulary}))
    return folder
