"""Models as transformers loads them: safetensors only, no code from repositories, no progress bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.checkpoints.side_files import is_tokenizer_file
from hub_magmax.checkpoints.storage.hub_copy import copied_from_hub
from hub_magmax.errors import EvaluationError, HubMagmaxError
from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.text import listed, step


class MisnamedError(EvaluationError):
    """Weights of a checkpoint have other names than its model's, which would run on random ones."""


class MissingParametersError(EvaluationError):
    """Parameters of a model, such as its head, are not in its checkpoint, and would be drawn."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        network: Of transformers, in evaluation mode, on this process's device.
        processor: Its tokenizer or image processor.
        name: For messages.
        random: Parameters that its files lack, and whose values were therefore drawn.
        device_map: How it is spread over devices, as accelerate has it; None for one device.
    """

    network: Any
    processor: Any
    name: str
    random: tuple[str, ...] = ()
    device_map: str | None = None

    @property
    def device(self) -> Any:
        return self.network.device

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Tell errors of transformers meanwhile as errors about this model."""
        try:
            yield
        except (HubMagmaxError, MemoryError):
            raise
        except Exception as error:  # of any kind: models check their inputs where they meet them
            told = " ".join(str(error).split())[:300]
            raise EvaluationError(
                f"transformers cannot run it on these examples ({type(error).__name__}: {told})",
                where=self.name,
                hint="Check that its tokenizer or processor and config.json are those of its training, and "
                "that the evaluator fits it.",
            ) from error

    def output(self, **inputs: Any) -> Any:
        """Return what the network makes of inputs.

        Raises:
            EvaluationError: If it does not run on them.
        """
        with self.errors():
            return self.network(**inputs)

    def with_weights(self, weights: Mapping[str, Tensor]) -> LoadedModel:
        """Return the same model with other weights, named as in its safetensors files.

        Where they have more or fewer rows for tokens than the model, the new one has as many.

        Raises:
            EvaluationError: If they do not fit.
        """
        with without_bars():
            # By way of from_pretrained, since names in files and in modules can differ.
            try:
                network, found = type(self.network).from_pretrained(
                    None,
                    config=_fitted_config(self.network, weights),
                    state_dict=dict(weights),
                    dtype=self.network.dtype,
                    device_map=self.device_map,
                    output_loading_info=True,
                )
            except RuntimeError as error:
                raise EvaluationError(
                    f"the weights do not fit the configuration ({str(error).strip().splitlines()[-1][:300]})",
                    where=self.name,
                ) from error
        _refuse_misnamed(found, self.name)
        missing = tuple(sorted(found["missing_keys"]))
        return replace(self, network=_placed(network, self.device_map), random=missing)


def load_model(
    place: ModelPlace,
    model_class: str,
    processor_class: str,
    purpose: str,
    *,
    device_map: str | None = None,
    accepts_misnamed: bool = False,
    accepts_random: bool = False,
) -> LoadedModel:
    """Load a model and the processor of its inputs, in the dtype in which its weights are stored.

    Args:
        place: Where it is.
        model_class, processor_class: Classes of transformers.
        purpose: What it is loaded for, for the message.
        device_map: How to spread it over devices, as accelerate has it; None for this process's device.
        accepts_misnamed: The weights are replaced afterwards, so their names do not matter.
        accepts_random: Parameters that the files lack may be drawn, as a head that a base model has not.

    Raises:
        EvaluationError: If it cannot be loaded.
    """
    import transformers

    with _loading(place, purpose):
        here = copied_from_hub(place)
        with without_bars(), step(f"loading {place.name}"):
            network, found = getattr(transformers, model_class).from_pretrained(
                here.name,
                use_safetensors=True,
                variant=here.variant,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **here.options,
            )
            _need_tokenizer(here, processor_class)
            processor = getattr(transformers, processor_class).from_pretrained(here.name, **here.options)
    _refuse_other_shapes(found, place.name)
    if not accepts_misnamed:
        _refuse_misnamed(found, place.name)
        if not accepts_random:
            _refuse_missing(found, place.name, purpose)
    missing = tuple(sorted(found["missing_keys"]))
    return LoadedModel(_placed(network, device_map), processor, place.name, missing, device_map)


def load_reader(place: ModelPlace, processor_class: str, purpose: str) -> LoadedModel:
    """Load what reads the inputs of a model on this machine: processor and configuration, no weights.

    Raises:
        EvaluationError: If it cannot be loaded.
    """
    import transformers

    with _loading(place, purpose):
        config = transformers.AutoConfig.from_pretrained(place.name, **place.options)
        _need_tokenizer(place, processor_class)
        processor = getattr(transformers, processor_class).from_pretrained(place.name, **place.options)
    return LoadedModel(SimpleNamespace(config=config), processor, place.name)


@contextmanager
def _loading(place: ModelPlace, purpose: str) -> Iterator[None]:
    """Tell errors of transformers meanwhile as errors of a model that cannot be loaded."""
    try:
        yield
    except (HubMagmaxError, MemoryError):
        raise
    except Exception as error:  # what is wrong with a configuration, classes meet anywhere
        reason = str(error).strip().split("\n")[0][:300]
        raise EvaluationError(
            f"the model cannot be loaded for {purpose} ({reason})",
            where=place.name,
            hint="Check the evaluator, and that config and processor files are there.",
        ) from error


def _need_tokenizer(place: ModelPlace, processor_class: str) -> None:
    """Raise EvaluationError for a folder without a tokenizer: transformers would make one of no words."""
    folder = Path(place.name, *place.part.split("/")) if place.part else Path(place.name)
    if processor_class != "AutoTokenizer" or not folder.is_dir():
        return
    if not any(is_tokenizer_file(path.name) for path in folder.iterdir()):
        raise EvaluationError(
            "there is no tokenizer beside the model",
            where=place.name,
            expected="files such as tokenizer.json and tokenizer_config.json",
            hint="Copy those of the model that it was trained from into its folder.",
        )


def _refuse_other_shapes(found: Mapping[str, Any], name: str) -> None:
    """Raise EvaluationError where files and configuration say different shapes."""
    if others := sorted(found.get("mismatched_keys") or ()):
        tensor, stored, wanted = others[0]
        raise EvaluationError(
            f"{tensor} is {[*stored]} in its files, and {[*wanted]} by its config.json"
            + (f"; and {len(others) - 1:,} more are so" if len(others) > 1 else ""),
            where=name,
            hint="Mend config.json, such as num_labels, vocab_size or id2label in it.",
        )


def _placed(network: Any, device_map: str | None) -> Any:
    """Return the network in evaluation mode, on this process's device unless it is spread over several."""
    if device_map is not None:
        return network.eval()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return network.eval().to(device)


def _refuse_misnamed(found: Mapping[str, Any], name: str) -> None:
    """Raise MisnamedError where parts of the model are not in its files, and are there by another name."""
    unexpected = {*found["unexpected_keys"]}
    tails = {tail for key in unexpected for tail in _tails(key)}
    lost = sorted(
        key for key in found["missing_keys"] if key in tails or not unexpected.isdisjoint(_tails(key))
    )
    if lost:
        raise MisnamedError(
            f"its weights have other names than the model, which would run on random ones: {lost[0]!r}"
            + (f" and {len(lost) - 1:,} more are there with another prefix" if len(lost) > 1 else ""),
            where=name,
            hint="Save the model again from transformers, without a wrapper around it.",
        )


def _refuse_missing(found: Mapping[str, Any], name: str, purpose: str) -> None:
    """Raise MissingParametersError where parameters are not in the files, and would be drawn."""
    if missing := sorted(found["missing_keys"]):
        raise MissingParametersError(
            f"{listed(missing, 2)} {'are' if len(missing) > 1 else 'is'} not in its files, so that {purpose} "
            "would run on random ones",
            where=name,
            hint="Choose an evaluator that fits the model.",
        )


def _tails(key: str) -> list[str]:
    """Return a name without its first segments, one by one; whole names are no tails, nor last segments."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts) - 1)]


def _fitted_config(network: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return the network's configuration with as many tokens as the weights have rows for."""
    try:
        own = network.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):
        return network.config
    text = network.config.get_text_config()
    if getattr(text, "vocab_size", None) != own.shape[0]:
        return network.config
    name = next(name for name, parameter in network.named_parameters() if parameter is own)
    last = name.split(".")[-2:]
    rows = {
        weight.shape[0]
        for key, weight in weights.items()
        if key.split(".")[-2:] == last and weight.shape[1:] == own.shape[1:]
    }
    if len(rows) != 1 or rows == {own.shape[0]}:
        return network.config
    config = deepcopy(network.config)
    config.get_text_config().vocab_size = rows.pop()
    return config


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
