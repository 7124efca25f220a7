"""A plan from the headers of a recipe's locked checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from hub_magmax.checkpoints.adapters.config import materialise
from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.damaged_files import refuse_damaged
from hub_magmax.checkpoints.data_statistics import open_statistics
from hub_magmax.checkpoints.error_keys import about_sources
from hub_magmax.checkpoints.index import EXACT_DTYPES, CheckpointIndex
from hub_magmax.checkpoints.opening import open_inputs, open_pinned
from hub_magmax.checkpoints.pinning import check_side_files, copied_files, left_behind
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import CheckpointError, RecipeError
from hub_magmax.methods import get_method
from hub_magmax.methods.data_statistics import REPRESENTATION
from hub_magmax.planning.adapters import plan_adapter
from hub_magmax.planning.budget import budget_of
from hub_magmax.planning.fitting.data_statistics import check_correction, merged_by_statistics
from hub_magmax.planning.fitting.integers import check_integers
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.low_rank import plan_low_rank
from hub_magmax.planning.output_config.model_config import config_changes
from hub_magmax.planning.plan import Plan
from hub_magmax.planning.reads import bytes_of_statistics
from hub_magmax.planning.selections import plan_selection
from hub_magmax.planning.tokenizers.files import tokenizer_files
from hub_magmax.planning.tokens import token_changes
from hub_magmax.recipe.lockfile import Lock, LockedSource, own_base_name
from hub_magmax.recipe.matching import check_plugin
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import step

#: Names of dtypes in recipes, by those in files.
_PLAIN_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_adapters(recipe: Recipe, sources: Mapping[str, LockedSource]) -> None:
    """Raise where an adapter stands for what only a whole checkpoint can be."""
    adapters = [name for name, source in sources.items() if source.adapter_config]
    for base in ("base_model", *map(own_base_name, recipe.task_names)):
        if base in adapters:
            raise CheckpointError(
                f"the {base.replace('_', ' ')} is an adapter",
                where=sources[base].label,
                expected="the whole model that the adapters were trained on",
                hint=materialise("Name that, or merge this one into its own base model first"),
            )
    if (name := recipe.output.files_from) in adapters:
        raise RecipeError(
            f"{name} is an adapter, and the merged model needs the config of a whole model",
            key=("output", "files_from"),
            hint="Leave it out: the base model's files are copied.",
        )
    _check_asked(recipe, sources, adapters)


def _check_asked(recipe: Recipe, sources: Mapping[str, LockedSource], adapters: list[str]) -> None:
    """Raise where the recipe asks for adapters, and sources are none."""
    if recipe.adapters and not adapters:
        raise RecipeError(
            "none of the tasks is an adapter",
            key=("adapters",),
            hint="Leave it out, or check the tasks' models.",
        )
    whole = [name for name in recipe.task_names if name not in adapters]
    if recipe.output.is_adapter and recipe.output.rank is None and whole:
        raise RecipeError(
            f"{', '.join(whole)} {'is a whole checkpoint' if len(whole) == 1 else 'are whole checkpoints'}",
            key=("output", "format"),
            expected="LoRA adapters only, to write an adapter of all that is merged",
            hint="Bound its rank, output.rank: 16, or write whole weights: output.format: weights.",
        )


@step("planning from the headers")
def plan_from_headers(recipe: Recipe, locked: Lock, *, cache: SourceCache | None = None) -> Plan:
    """Return everything that merging `recipe` will do, from its checkpoints' headers.

    Args:
        recipe: What to merge.
        locked: Its lock.
        cache: Checkpoints that are open already, and stay open for later calls.

    Raises:
        CheckpointError: If a file that is copied is damaged.
        MismatchError: If the checkpoints do not fit each other.
        RecipeError: If an adapter is asked for, and the tasks cannot become one, or the merge takes more than
            `output.memory`.
        LockError: If a source, or a plug-in, is no longer what was locked.
        MissingDependencyError: If the plug-in that the lock merges by is not installed.
    """
    check_plugin(locked)
    with about_sources(recipe, locked.sources):
        check_adapters(recipe, locked.every_source)
    cache = cache or SourceCache()
    with open_pinned(recipe, locked.every_source, cache) as stored:
        dtypes = {name: stored_dtypes(source.index) for name, source in stored.items()}
        tokens = token_changes(recipe, locked, stored)
        tokenizer = tokenizer_files(recipe, locked, stored)
    with open_inputs(recipe, locked, cache) as opened:
        files_from = recipe.output.files_from
        check_side_files(opened[files_from], locked.sources[files_from])
        if recipe.output.is_adapter:
            planned = plan_adapter if locked.merges_factors else plan_low_rank
            made = planned(recipe, locked, opened)
        else:
            made = make_plan(recipe, locked, opened)
            check_integers(made, opened)
            made = _with_statistics(made, cache)
            made = replace(made, tokenizer=tokenizer)
            made = replace(made, config_changes=config_changes(made, opened))
        copied, source = locked.sources[files_from], opened[files_from]
        paths = copied_files(source, copied)
        refuse_damaged(source, paths)
        is_whole = recipe.output.format in (None, "weights")  # else no model, whose files others keep
        left = left_behind(source, copied) if is_whole else ()
        copied_bytes = sum(source.size_of(path) or 0 for path in paths)
        if recipe.output.is_selection:
            made, copied_bytes = plan_selection(made, opened), 0
        made = replace(made, config=stated_config(source))
    made = replace(made, left_behind=left, copied_bytes=copied_bytes, dtypes=dtypes, tokens=tokens)
    budget_of(made, 1)  # raises where more is needed than there is
    return made


def _with_statistics(plan: Plan, cache: SourceCache) -> Plan:
    """Return a plan that names the tensors merged by statistics, where its method needs these.

    Raises:
        MismatchError: If statistics do not fit the tensors, of its method or of its correction.
    """
    if plan.lock.correction:
        with open_statistics(plan.recipe, plan.lock, REPRESENTATION, cache) as statistics:
            assert statistics is not None
            check_correction(plan, statistics)
        plan = replace(plan, needs_torch=True)
    kind = get_method(plan.lock.method["name"]).statistics
    with open_statistics(plan.recipe, plan.lock, kind, cache) as statistics:
        if statistics is None:
            return plan
        plan = replace(plan, by_statistics=merged_by_statistics(plan, statistics))
        return replace(plan, bytes_in=plan.bytes_in + bytes_of_statistics(plan, statistics))


def stored_dtypes(index: CheckpointIndex) -> tuple[str, ...]:
    """Return the dtypes of a checkpoint as people call them, the most frequent one first; floats if any."""
    counts = Counter[str]()
    for info in index.tensors.values():
        counts[info.dtype] += info.num_elements
    found = [dtype for dtype, _ in counts.most_common()]
    floats = [dtype for dtype in found if dtype not in EXACT_DTYPES]
    return tuple(_PLAIN_DTYPES.get(dtype, dtype) for dtype in floats or found)
