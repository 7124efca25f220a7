"""Memory of the process that merges, without tensors: packages, loops, and files beside the weights."""

from __future__ import annotations

import os

from hub_magmax import methods
from hub_magmax.checkpoints.locations import location_of
from hub_magmax.kernels.dispatch import compiles_first, is_fused
from hub_magmax.kernels.lazy_imports import is_imported
from hub_magmax.planning.plan import Plan
from hub_magmax.recipe.merge_values import MergeValues

#: Measured without tensors: the process with all that a merge imports, what torch adds, and what compiling
#: loops does, once in an environment. Each has memory of its own, and code that the system maps from files.
RUNTIME_BYTES, TORCH_BYTES, COMPILING_BYTES = 55_000_000, 125_000_000, 220_000_000
RUNTIME_FILES, TORCH_FILES, COMPILING_FILES = 73_000_000, 61_000_000, 40_000_000

#: Bytes for each of the files beside the weights, such as a tokenizer, that lie on this machine: they are
#: read before the merge, to find damaged ones. From 1.8 to 3.2 stay with the process, measured with 31 MB.
BESIDE = 2.5


def runtime_bytes(plan: Plan, *, with_files: bool = False) -> int:
    """Return what the process takes without tensors: fused merges do without torch."""
    has_torch = takes_torch(plan) or is_imported() or "WORLD_SIZE" in os.environ
    compiles = compiles_first(plan.merged_elements, plan.recipe.output.device)
    own = RUNTIME_BYTES + TORCH_BYTES * has_torch + COMPILING_BYTES * compiles
    files = RUNTIME_FILES + TORCH_FILES * has_torch + COMPILING_FILES * compiles
    return own + files * with_files


def beside_bytes(plan: Plan) -> int:
    """Return what stays of the files beside the weights, which are not read where they are on the Hub."""
    read_from = location_of(plan.lock.sources[plan.recipe.output.files_from], plan.recipe.folder)
    return 0 if read_from.is_remote else int(BESIDE * plan.copied_bytes)


def takes_torch(plan: Plan) -> bool:
    """Say whether torch computes or reads some of a merge."""
    method = methods.get_method(plan.lock.method["name"])
    fused = is_fused(plan.merged_elements, plan.recipe.output.device)
    is_own = not method.is_built_in or method.form in ("tensor", "matrix") or method.statistics is not None
    return plan.needs_torch or not fused or is_own or any(map(has_parts, plan.surveyed))


def has_parts(values: MergeValues) -> bool:
    """Say whether rows or columns of a tensor have weights of their own, by which torch merges."""
    return bool(values.method.get("each", "tensor") != "tensor")
