"""Models of a recipe, loaded to be scored: base model, own checkpoints, adapters over their base, merge."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace

from hub_magmax.checkpoints.adapters.adapter import AdapterSource, with_adapters
from hub_magmax.checkpoints.locations import ModelPlace, location_of
from hub_magmax.checkpoints.names.renamed import with_base_names
from hub_magmax.checkpoints.opening import open_model, open_pinned, open_source
from hub_magmax.checkpoints.rows.labels import with_label_rows
from hub_magmax.checkpoints.source import FileSource, TensorSource
from hub_magmax.checkpoints.storage.hub_copy import copied_from_hub
from hub_magmax.checkpoints.ties.tied import TiedSource, with_ties
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import Evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel, MisnamedError, load_model
from hub_magmax.evaluation.scores import MERGED
from hub_magmax.kernels.lazy_imports import Tensor
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import Report, listed

#: Without this file a folder's tokenizer is not known to be of any class.
_TOKENIZER_CONFIG = "tokenizer_config.json"


def model_places(recipe: Recipe, lock: Lock) -> dict[str, ModelPlace]:
    """Return where the base model and every task's checkpoint can be loaded from."""
    return {name: location_of(source, recipe.folder).model_place for name, source in lock.sources.items()}


@dataclass(frozen=True)
class Loading:
    """Loads models for an evaluator.

    Attributes:
        recipe, lock: Whose models these are.
        evaluator: Says which classes load them.
        is_pinned: The names of tasks mean the lock's checkpoints.
        report: Called with a line about what is odd.
        purpose: What models are loaded for, in messages; by default the evaluator of the recipe's evaluation.
    """

    recipe: Recipe
    lock: Lock
    evaluator: Evaluator
    is_pinned: bool = True
    report: Report = lambda line: None
    purpose: str = ""

    def load(self, name: str, place: ModelPlace) -> LoadedModel:
        """Return one model, with its own rows and its own tokenizer.

        Raises:
            EvaluationError: If it cannot be loaded.
        """
        if name == MERGED and self.recipe.output.is_adapter:
            return self._merged_adapter(place)
        if self.is_pinned and name in self.lock.tasks and self.lock.tasks[name].adapter_config:
            return self._adapted(name, place)
        return self._whole(name, place)

    def _whole(self, name: str, place: ModelPlace) -> LoadedModel:
        """Return a checkpoint as it is, or by the base model's names where transformers knows not its own."""
        try:
            loaded = self._loaded(place, accepts_random=self.is_pinned and name == "base_model")
        except MisnamedError:
            if not self.is_pinned or name not in self.lock.sources:
                raise
            return self._loaded(place, accepts_misnamed=True).with_weights(self._weights(name))
        if loaded.random:
            self.report(f"{name} lacks {listed(loaded.random, 2)}: it is scored with random ones")
        return loaded

    def _loaded(
        self, place: ModelPlace, *, accepts_misnamed: bool = False, accepts_random: bool = False
    ) -> LoadedModel:
        spec = self.recipe.evaluation
        return load_model(
            place,
            self.evaluator.model_class,
            self.evaluator.processor_class,
            self.purpose or (spec.evaluator.name if spec else "evaluation"),
            device_map=spec.device_map if spec else None,
            accepts_misnamed=accepts_misnamed,
            accepts_random=accepts_random,
        )

    def _base(self, task: str = "") -> LoadedModel:
        """Return the base model, or a task's own one."""
        base = self.lock.bases.get(task, self.lock.base_model)
        return self._loaded(location_of(base, self.recipe.folder).model_place, accepts_misnamed=True)

    def _adapted(self, name: str, place: ModelPlace) -> LoadedModel:
        """Return the base model with the weights that a task's adapter makes of it."""
        model = self._base(name)  # before its weights are read: a download is then in the cache
        with closing(open_source(self.recipe, self.lock.tasks[name])) as adapter:
            is_text = self.evaluator.processor_class == "AutoTokenizer"
            tokenizer = _tokenizer_beside(adapter, place) if is_text else None
        model = model.with_weights(self._weights(name))
        return replace(model, name=place.name, processor=tokenizer or model.processor)

    def _weights(self, name: str) -> dict[str, Tensor]:
        """Return a source's tensors by the base model's names, with the rows that are its own."""
        sources = self.lock.every_source
        with open_pinned(self.recipe, sources) as opened:
            tied = with_ties(with_base_names(opened, sources), self.recipe, self.lock)
            places = {task: locked.places for task, locked in sources.items()}
            whole = with_adapters(tied, places, in_sequence=self.lock.adapters == "sequence")
            return _read(with_label_rows(whole, sources)[name])

    def _merged_adapter(self, place: ModelPlace) -> LoadedModel:
        """Return the base model with the weights that the merged adapter makes of it; PEFT is not needed."""
        model = self._base()
        with (
            closing(open_source(self.recipe, self.lock.base_model)) as stored,
            closing(open_model(place.name, place.revision)) as adapter,
        ):
            base = with_base_names({"base_model": stored}, {"base_model": self.lock.base_model})["base_model"]
            tied = TiedSource(base, self.lock.base_model.ties or {})
            return with_adapter(model, tied, adapter, place, _merged_places(self.lock))


def with_adapter(
    model: LoadedModel,
    base: TensorSource,
    adapter: FileSource,
    place: ModelPlace,
    places: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Return a base model with the weights that an adapter makes of it, and the tokenizer beside the adapter.

    Args:
        model: The base model.
        base: Its weights.
        adapter: To add.
        place: Of the adapter.
        places: Where the adapter's layers are in the base model's files, as `find_places` returns it.

    Raises:
        CheckpointError, MismatchError: If the adapter does not fit.
        EvaluationError: If the tokenizer cannot be loaded.
    """
    tokenizer = _tokenizer_beside(adapter, place) if hasattr(model.processor, "get_vocab") else None
    changed = model.with_weights(_read(AdapterSource(base, adapter, places)))
    return replace(changed, name=place.name, processor=tokenizer or model.processor)


def _tokenizer_beside(adapter: FileSource, place: ModelPlace) -> object | None:
    """Return the tokenizer that lies beside an adapter, which may know added tokens; None without one."""
    if _TOKENIZER_CONFIG not in adapter.sizes:
        return None
    from transformers import AutoTokenizer

    try:
        here = copied_from_hub(place)
        tokenizer: object = AutoTokenizer.from_pretrained(here.name, **here.options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise EvaluationError(
            f"the tokenizer beside the adapter cannot be loaded ({reason})",
            where=place.name,
            hint="Save the tokenizer again, or take its files out of the adapter's folder.",
        ) from error
    return tokenizer


def _read(source: TensorSource) -> dict[str, Tensor]:
    return {
        name: source.read(name, 0, info.num_elements).view(info.shape)
        for name, info in source.index.tensors.items()
    }


def _merged_places(lock: Lock) -> Mapping[str, str] | None:
    """Return where the layers of the merged adapter are: it has the names of the tasks' adapters."""
    places = [task.places for task in lock.tasks.values() if task.places is not None]
    return {name: where for found in places for name, where in found.items()} or None
