"""The device backend and how a recipe names a device; its bytes are compared in test_backends, on the CPU."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hub_magmax.errors import RecipeError
from hub_magmax.kernels import backend as seam
from hub_magmax.kernels import ops
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.device import Device, available_devices
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.dtypes import dtype_name
from hub_magmax.kernels.ops import Inputs, Op, task_vectors
from hub_magmax.kernels.reference import Reference, merge_piece
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.output.report import REPORT_NAME
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe
from tests.test_backends import DTYPES, OPS, assert_same, chunk_of, inputs_of
from tests.test_cli import call
from tests.test_in_memory import same
from tests.test_merging import METHODS, PREFERENCE, merged

#: A device that no machine has.
MISSING = "cuda:9999"


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_device_changes_no_byte_of_any_file(family, method):
    digests, folders = [], []
    for device in (None, "cpu"):
        report = merged(family, method=method, seed=7, chunk_elements=50, output={"device": device})
        digests.append(report.plan_digest)
        written = [path for path in (family / "merged").iterdir() if path.name != REPORT_NAME]
        folders.append({path.name: path.read_bytes() for path in written})
        (family / "merged").rename(family / f"merged on {device}")
    assert digests[0] == digests[1]
    assert folders[0] == folders[1] and {"model.safetensors", "recipe.yaml", "provenance.json"} <= {
        *folders[0]
    }


class Counted(Reference):
    """A backend of the test's own, for the device `mine`: `backend_on` below, and a line in `DEVICES`."""

    num_merged = 0

    def merge(self, op, chunk, inputs, dtype, scaling):
        Counted.num_merged += chunk.num_elements
        return super().merge(op, chunk, inputs, dtype, scaling)


def backend_on(name):
    assert name == "mine:3"
    return Counted()


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setitem(seam.DEVICES, "mine", __name__)
    monkeypatch.setattr(Counted, "num_merged", 0)
    return "mine:3"


def test_a_device_of_one_s_own_takes_a_file_and_a_line(family, mine):
    recipe = load_recipe(write_recipe(family, preference=PREFERENCE, output={"device": mine}))
    locked = lock(recipe)
    planned = plan(recipe, locked)
    num_elements = sum(job.num_elements for job in planned.jobs if job.merged)
    merge(planned)
    assert Counted.num_merged == num_elements and isinstance(Counted(), Backend)
    with InMemoryMerger(recipe, locked) as merger:
        found = merger.merge(locked.method, locked.weights).weights(0.5)
    assert Counted.num_merged == 2 * num_elements
    assert same(found, load_file(recipe.output_path / "model.safetensors"))


@pytest.mark.parametrize("verb", ["merge", "run"])
def test_the_command_line_names_a_device(family, mine, verb):
    recipe = write_recipe(family, preference=PREFERENCE, output={"device": "cpu", "memory": "4GB"})
    assert call(verb, recipe, "--device", mine)[0] == 0
    assert Counted.num_merged > 0


@pytest.mark.parametrize("verb", ["plan", "merge", "run", "compare", "sweep"])
def test_every_verb_that_merges_takes_a_device(family, verb):
    code, _, told = call(verb, write_recipe(family), "--device", "tpu")
    assert code == 1 and "output.device: 'tpu' should be one of cpu, cuda, mps" in told


def test_plans_show_the_device(family):
    recipe = write_recipe(family)
    assert json.loads(call("plan", recipe, "--json")[1])["device"] is None
    assert "device " not in call("plan", recipe)[1]
    assert "device       cuda:1\n" in call("plan", recipe, "--device", "cuda:1")[1]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0\n", "", "CPU"])
def test_names_of_devices_are_checked(family, name):
    with pytest.raises(
        RecipeError, match=r"output\.device: .* should be one of cpu, cuda, mps, or a numbered"
    ):
        load_recipe(write_recipe(family, output={"device": name}))


def test_a_missing_device_is_told_in_a_paragraph_and_nothing_is_left(family):
    recipe = write_recipe(family)
    code, _, told = call("merge", recipe, "--device", MISSING)
    assert code == 1 and told.count("Error: ") == 1 and "Traceback" not in told
    for fact in (
        "output.device: torch finds no device 'cuda:9999'",
        *available_devices(),
        "--device",
    ):
        assert fact in told
    assert not [*family.glob("merged*")]
    assert call("merge", recipe, "--device", "cpu")[0] == 0


def test_devices_have_their_number():
    """Threads have a current device each, so a name without a number would mean several."""
    for name in available_devices():
        assert choose_backend(1, name).device == torch.device(name)
        assert str(choose_backend(1, name.split(":")[0]).device) in available_devices()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_no_step_of_an_operation_lies_on_another_device(op, dtype):
    """Tensors without values: no test of bytes, but mixing devices is an error as on any machine."""
    chunk, inputs = chunk_of(100, dtype), inputs_of(OPS[op], 100)
    groups = [
        [(tensor.shape, tensor.dtype) for tensor in map(torch.as_tensor, arrays)]
        for arrays in (chunk.values, inputs.per_element, inputs.per_task)
    ]
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device("meta"):
        rows, *numbers = [tuple(torch.empty(size, dtype=dtype) for size, dtype in group) for group in groups]
        found = merge_piece(OPS[op], rows, Inputs(*numbers), torch.bfloat16, 0.3)
        vectors = task_vectors(rows[0], rows[1:])
    assert {str(tensor.device) for tensor in (*found, vectors)} == {"meta"}


def test_an_operation_of_a_plug_in_stays_with_the_reference():
    made, chunk = [], chunk_of(9, torch.float32)

    def merges(rows):
        made.append(rows[0].device.type)
        return rows[0] / 3

    found = Device(device=torch.device("meta")).merge(Op(merges), chunk, Inputs(), "F32", 1.0)
    assert made == ["cpu"]
    assert_same(found, Reference().merge(Op(merges), chunk, Inputs(), "F32", 1.0))


@pytest.mark.parametrize(("dtype", "out"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_the_reference_does_what_takes_float64_where_a_device_lacks_it(dtype, out):
    """Nothing is put on the device, which this machine may lack."""
    device, chunk = Device(device=torch.device("mps")), chunk_of(1000, dtype)
    call_ = ops.WEIGHTED_SUM, chunk, inputs_of(ops.WEIGHTED_SUM, 1000), dtype_name(out), 0.3
    assert_same(device.merge(*call_), Reference().merge(*call_))
    narrow = chunk_of(10, torch.float32)
    wide = Inputs((), (np.array([0.1, 0.2, 0.3]),))
    call_ = ops.WEIGHTED_SUM, narrow, wide, "F32", 0.3
    assert_same(device.merge(*call_), Reference().merge(*call_))
    if dtype == torch.float64:
        found = device.task_vectors(chunk, lambda: np.empty((3, 1000), np.float32))
        assert found.tobytes() == task_vectors(chunk.base, chunk.checkpoints).numpy().tobytes()


def test_threads_share_a_device():
    device, chunks = (
        choose_backend(1, "cpu"),
        [chunk_of(length, torch.bfloat16) for length in range(900, 908)],
    )

    def merge_one(chunk, backend=device):
        return backend.merge(ops.LARGEST, chunk, Inputs(), "BF16", 0.3)

    with ThreadPoolExecutor(4) as threads:
        for found, chunk in zip(threads.map(merge_one, chunks), chunks, strict=True):
            assert_same(found, merge_one(chunk, Reference()))
