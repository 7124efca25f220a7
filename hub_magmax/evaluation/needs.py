"""Needs of an evaluation, told before it starts: downloads, room for them, memory, a model that fits."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hub_magmax.checkpoints.locations import location_of
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import (
    brings_data,
    columns_of,
    described_inputs,
    evaluator_names,
    evaluator_of,
    get_evaluator,
)
from hub_magmax.evaluation.evaluators.likelihoods import MOST_LOGITS
from hub_magmax.evaluation.evaluators.loading import load_reader
from hub_magmax.evaluation.evaluators.plugins import PluginEvaluator
from hub_magmax.evaluation.scores import scores_for
from hub_magmax.files import existing_parent, os_errors
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import format_bytes, step

#: Measured with a Llama of a few parameters: a process's own memory, and what the system maps from files.
#: What a merge in `run` has besides, whose evaluation's data was loaded; and all that scoring takes.
LOADED_BYTES, LOADED_FILES = 160_000_000, 52_000_000
SCORING_BYTES, SCORING_FILES = 415_000_000, 227_000_000

#: Examples of each task that are read before a merge.
NUM_READ = 8


@dataclass(frozen=True)
class Needs:
    """Number, downloads and memory of the models that scoring a recipe runs.

    Attributes:
        num_models: Models that are scored, one after the other.
        download_bytes: Weights that have to be downloaded into the cache, and are not there.
        held_bytes: Weights of the largest model, as they are stored; in memory while it is scored.
        made_bytes: Weights that are made of a base model and an adapter, and so mapped from no file.
        token_bytes: About what a batch takes for each token of its longest text; 0 where it is not known.
        joint: What is put between prompt and answer, in words; empty where the evaluator has no prompts.
    """

    num_models: int
    download_bytes: int
    held_bytes: int
    token_bytes: int = 0
    joint: str = ""
    made_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """About what scoring takes of the process's own memory, besides a batch."""
        return SCORING_BYTES + self.made_bytes

    @property
    def resident_bytes(self) -> int:
        """The same with files that are mapped, which stored weights on a CPU are."""
        return self.memory_bytes + SCORING_FILES + self.held_bytes

    def __str__(self) -> str:
        loads = (
            f"downloads {format_bytes(self.download_bytes)} of checkpoints and "
            if self.download_bytes
            else ""
        )
        return f"{self.num_models} models; {loads}holds one of {format_bytes(self.held_bytes)} in memory"


@step("looking at what scoring takes")
def evaluation_needs(
    recipe: Recipe, lock: Lock, bytes_out: int, config: Mapping[str, Any] = MappingProxyType({})
) -> Needs | None:
    """Return what the recipe's evaluation will take; None where there is none, or where it is done.

    Args:
        recipe, lock: What will be merged and scored.
        bytes_out: Of the merged model.
        config: Values of its config.json, as far as they are known.
    """
    spec = recipe.evaluation
    if spec is None or scores_for(recipe) is not None:
        return None
    from hub_magmax.checkpoints.storage.hub_copy import bytes_to_copy

    own = {task: source for task, source in lock.tasks.items() if spec.own_cells(task)}
    run = replace(lock, tasks=own)
    joint = [described_inputs(evaluator_of(spec), data).get("joint", "") for data in spec.data.values()]
    return Needs(
        num_models=len(run.sources) + 1,
        download_bytes=sum(map(bytes_to_copy, run.sources.values())),
        held_bytes=_largest_bytes(run, bytes_out),
        token_bytes=_token_bytes(recipe, config),
        joint=joint[0] if joint else "",
        made_bytes=_made_bytes(recipe, run),
    )


def _token_bytes(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Return what a batch takes for each token of its longest text, where it is asked for likelihoods."""
    spec = recipe.evaluation
    is_known = spec is not None and spec.evaluator.name in OF_LIKELIHOODS
    return bytes_of_token(config, spec.batch_size) if spec is not None and is_known else 0


def _made_bytes(recipe: Recipe, lock: Lock) -> int:
    """Return the bytes of the largest model that is made of an adapter to be scored; 0 without one."""
    bases = [
        lock.bases.get(name, lock.base_model) for name, task in lock.tasks.items() if task.adapter_config
    ]
    bases += [lock.base_model] if recipe.output.is_adapter else []
    return max((sum(file.size_bytes for file in base.files) for base in bases), default=0)


def _largest_bytes(lock: Lock, bytes_out: int) -> int:
    """Return the bytes of the largest model; an adapter is scored with its base model."""
    base, *tasks = (sum(file.size_bytes for file in source.files) for source in lock.sources.values())
    adapted = (bool(task.adapter_config) for task in lock.tasks.values())
    sizes = (size + base * is_adapter for size, is_adapter in zip(tasks, adapted, strict=True))
    return max(base, bytes_out, *sizes)


def check_download_room(needs: Needs, output: Path, output_bytes: int) -> str:
    """Return in words that what is downloaded has room in the cache.

    Args:
        needs: Of the evaluation.
        output: Where the merged model goes, which may be on the same disk.
        output_bytes: What it still needs there.

    Raises:
        EvaluationError: If there is too little room.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    if not needs.download_bytes:
        return "nothing to download"
    with os_errors(cache):
        there, beside = existing_parent(cache), existing_parent(output)
        shared = output_bytes if there.stat().st_dev == beside.stat().st_dev else 0
        free = shutil.disk_usage(there).free
    if needs.download_bytes + shared > free:
        also = f", and the merged model {format_bytes(shared)}" if shared else ""
        raise EvaluationError(
            f"scoring downloads {format_bytes(needs.download_bytes)} of checkpoints{also}, and "
            f"{format_bytes(free)} are free",
            where=f"cache of the Hub, {cache}",
            hint="Free some space, set HF_HOME to a larger disk, or leave out `evaluation`.",
        )
    return f"{format_bytes(needs.download_bytes)} of checkpoints into {cache}, where there is room"


def check_fits(recipe: Recipe, lock: Lock) -> str:
    """Return in words that the evaluator runs models of the recipe's kind.

    Raises:
        EvaluationError: If transformers has no such class for them.
    """
    spec = recipe.evaluation
    kind = lock.sources[recipe.output.files_from].model_type
    if spec is None or kind is None:
        return "not known"
    name = spec.evaluator.name
    if _runs(get_evaluator(name).make, kind) is False:
        fitting = [other for other in evaluator_names() if _runs(get_evaluator(other).make, kind)]
        raise EvaluationError(
            f"the evaluator {name} does not run models of the type {kind!r}",
            where="evaluation.evaluator",
            expected=f"one of {', '.join(fitting)}" if fitting else "",
            hint="Choose an evaluator that fits the model." if fitting else "",
        )
    return f"{name} runs models of the type {kind}"


def check_inputs(recipe: Recipe, lock: Lock, examples: Mapping[str, Any]) -> None:
    """Read the first examples as a model on this machine does, without its weights.

    Args:
        recipe: Its evaluation says how.
        lock: Of its checkpoints.
        examples: By task.

    Raises:
        EvaluationError: If tokenizer, processor or configuration do not fit them.
    """
    spec = recipe.evaluation
    place = location_of(lock.sources[recipe.output.files_from], recipe.folder).model_place
    if spec is None or not Path(place.name).is_dir():
        return
    evaluator = evaluator_of(spec)
    if isinstance(evaluator, PluginEvaluator) or brings_data(evaluator):
        return
    reader = load_reader(place, evaluator.processor_class, spec.evaluator.name)
    for task, data in spec.data.items():
        first = examples[task].select(range(min(NUM_READ, len(examples[task]))))
        with about_data(recipe, data):
            deque(evaluator.encode(reader, first, columns_of(data), NUM_READ), maxlen=0)


def may_lack_head(model_class: str, locked: LockedSource) -> bool:
    """Say whether a checkpoint states another class than that by which transformers would load it.

    Args:
        model_class: Class of transformers, such as AutoModelForSequenceClassification.
        locked: A pinned checkpoint. One that states no class, or no type that is known, is trusted.
    """
    found = _classes(model_class, locked.model_type or "")
    return bool(found and locked.architectures) and not {*locked.architectures} & {
        one.__name__ for one in found or ()
    }


def _runs(make: Any, model_type: str) -> bool | None:
    """Say whether an evaluator's class of transformers has models of a type; None where it does not tell."""
    found = _classes(getattr(make, "model_class", ""), model_type)
    return None if found is None else bool(found)


def _classes(model_class: str, model_type: str) -> tuple[type, ...] | None:
    """Return the classes of a type of models behind an Auto class; None where it is unknown."""
    import transformers

    mapping = getattr(getattr(transformers, model_class, None), "_model_mapping", None)
    configs = transformers.CONFIG_MAPPING
    if mapping is None or model_type not in configs:
        return None
    found = mapping.get(configs[model_type], ())
    return found if isinstance(found, tuple) else (found,)


def evaluation_rows(recipe: Recipe, needs: Needs | None) -> Iterator[tuple[str, str]]:
    """Yield lines of a plan about the evaluation, each a label and a text."""
    if needs is not None and recipe.evaluation is not None:
        yield "scores", f"{recipe.evaluation.evaluator.name} on {', '.join(recipe.evaluation.data)}: {needs}"
        own, resident = format_bytes(needs.memory_bytes), format_bytes(needs.resident_bytes)
        batch = f"a batch of {recipe.evaluation.batch_size} examples at most"
        yield "", f"about {own} per process, {resident} with files that the system maps, besides {batch}"
        if needs.token_bytes:
            yield "", _told(needs.token_bytes, recipe.evaluation.evaluator.name)
        if needs.joint:
            yield "", needs.joint


def _told(token_bytes: int, evaluator: str) -> str:
    """Say what a batch takes, in words."""
    times = ", for each answer of an example" if evaluator == "multiple-choice" else ""
    return (
        f"the batch takes about {format_bytes(token_bytes)} for each token of its longest text{times}; "
        f"more than {format_bytes(4 * MOST_LOGITS)} of logits are not held at once"
    )


#: Evaluators that ask for likelihoods of texts.
OF_LIKELIHOODS = ("log-likelihood", "multiple-choice")


def bytes_of_token(config: Mapping[str, Any], batch_size: int) -> int:
    """Return about how many bytes a batch takes for each token of its longest text; 0 where it is not known.

    Logits are float32, a layer at work holds its inputs about six times and what is between its products
    three times, and one text at a time has its logits in float64, twice. SmolLM2-135M: 1.03 of what 32 texts
    of 64 tokens took, measured.

    Args:
        config: Of the model.
        batch_size: Texts that run together.
    """
    text = config.get("text_config", config)
    vocabulary, width, between = (
        _size(text, key) for key in ("vocab_size", "hidden_size", "intermediate_size")
    )
    if not vocabulary:
        return 0
    return batch_size * (4 * vocabulary + 24 * width + 12 * between) + 16 * vocabulary


def _size(values: Any, key: str) -> int:
    found = values.get(key) if isinstance(values, Mapping) else None
    return found if isinstance(found, int) else 0
