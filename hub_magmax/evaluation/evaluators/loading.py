"""Models as transformers loads them: safetensors only, no code from repositories, no progress bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.checkpoints.storage.hub_copy import copied_from_hub
from hub_magmax.errors import EvaluationError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        network: Of transformers, in evaluation mode, on this process's device.
        processor: Its tokenizer or image processor.
        name: For messages.
    """

    network: Any
    processor: Any
    name: str

    @property
    def device(self) -> Any:
        return self.network.device

    def with_weights(self, weights: Mapping[str, Tensor]) -> LoadedModel:
        """Return the same model with other weights, named as in its safetensors files."""
        with without_bars():
            # By way of from_pretrained, since names in files and in modules can differ.
            network = type(self.network).from_pretrained(
                None, config=self.network.config, state_dict=dict(weights), dtype=self.network.dtype
            )
        return replace(self, network=network.eval().to(self.device))


def load_model(place: ModelPlace, model_class: str, processor_class: str, purpose: str) -> LoadedModel:
    """Load a model and the processor of its inputs.

    Args:
        place: Where it is.
        model_class, processor_class: Classes of transformers.
        purpose: What it is loaded for, for the message.

    Raises:
        EvaluationError: If it cannot be loaded.
    """
    import torch
    import transformers

    try:
        here = copied_from_hub(place)
        with without_bars():
            network = getattr(transformers, model_class).from_pretrained(
                here.name, use_safetensors=True, variant=here.variant, **here.options
            )
            processor = getattr(transformers, processor_class).from_pretrained(here.name, **here.options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise EvaluationError(
            f"the model cannot be loaded for {purpose} ({reason})",
            where=place.name,
            hint="Check the evaluator, and that config and processor files are there.",
        ) from error
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return LoadedModel(network.eval().to(device), processor, place.name)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the progress bars of datasets and transformers off: one line per step says enough."""
    import datasets
    from transformers.utils import logging

    bars = [
        (
            datasets.are_progress_bars_disabled(),
            datasets.disable_progress_bars,
            datasets.enable_progress_bars,
        ),
        (not logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar),
    ]
    for was_off, disable, _ in bars:
        if not was_off:
            disable()
    try:
        yield
    finally:
        for was_off, _, enable in bars:
            if not was_off:
                enable()
