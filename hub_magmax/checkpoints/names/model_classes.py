"""Ties and values that transformers' classes give configurations; nothing is imported before it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hub_magmax.checkpoints.config import levels, with_special_floats
from hub_magmax.kernels.lazy_imports import torch

#: Says in config.json whether a model's embeddings and heads are one parameter.
TIE_KEY = "tie_word_embeddings"


def declares_ties(config: Mapping[str, Any]) -> bool | None:
    """Say whether a model's configuration ties its embeddings; None where nothing tells.

    Where the key is absent, or false, which some model types do not heed, the installed transformers' class
    of its `model_type` is asked.
    """
    said = _stated(config)
    if True in said:
        return True
    found = _config_of(config)
    if found is not None:
        return bool(getattr(found, TIE_KEY, False))
    return False if said else None


def is_said_tied(config: Mapping[str, Any]) -> bool:
    """Say whether a configuration itself names the key, and says true somewhere."""
    return any(_stated(config))


def is_said_untied(config: Mapping[str, Any]) -> bool:
    """Say whether a configuration itself names the key, and says false wherever it does."""
    said = _stated(config)
    return bool(said) and not any(said)


def tied_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the tensors that a model's class ties, each with the one it is tied to; empty where unknown.

    The model is built without memory, from classes of transformers alone: no code of a checkpoint is run.
    """
    found = _config_of(config)
    names = config.get("architectures")
    if found is None or not isinstance(names, list) or not names:
        return {}
    with suppress(Exception):  # whatever a class says to a configuration that it does not know
        import transformers

        setattr(found, TIE_KEY, True)
        with torch.device("meta"):
            model = getattr(transformers, names[0])(found)
        return dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    return {}


def tied_head(config: Mapping[str, Any], auto_class: str) -> tuple[str, str] | None:
    """Return the weight of a model's head for tokens, and what it is tied to; None where it is not.

    Args:
        config: Values of the checkpoint's config.json; the model is built without memory.
        auto_class: Class of transformers that loads the model, such as `AutoModelForCausalLM`.
    """
    with suppress(Exception):  # whatever a class says to a configuration that it does not know
        import transformers

        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(_config_of(config))
        head, ties = model.get_output_embeddings(), model.get_expanded_tied_weights_keys(all_submodels=True)
        weight = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
        pairs = [pair for tied, of in ties.items() for pair in ((tied, of), (of, tied))]
        return next((pair for pair in pairs if pair[0] == weight), None)
    return None


def tensors_of_class(config: Mapping[str, Any], model_class: str) -> tuple[str, frozenset[str]]:
    """Return the class's name and its tensors' names for a configuration; empty where nothing tells.

    Args:
        config: Values of a checkpoint's config.json; the model is built without memory.
        model_class: Name of a class of transformers, also of one such as `AutoModelForCausalLM`.
    """
    with suppress(Exception):  # whatever a class says to a configuration that it does not know
        import transformers

        named = getattr(transformers, model_class)
        with torch.device("meta"):
            model = getattr(named, "from_config", named)(_config_of(config))
        return type(model).__name__, frozenset(model.state_dict())
    return "", frozenset()


def as_loaded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all values of a configuration as transformers takes them; empty where it does not know it."""
    with suppress(Exception):  # whatever a class says to values that it does not expect
        found = _config_of(config)
        return {} if found is None else dict(found.to_dict())
    return {}


def _stated(config: Mapping[str, Any]) -> list[bool]:
    said = (level.get(TIE_KEY) for _, level in levels(config))
    return [value for value in said if isinstance(value, bool)]


def _config_of(config: Mapping[str, Any]) -> Any | None:
    """Return a configuration as transformers reads it, None where it is not installed or does not know it."""
    with suppress(Exception):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        # Where `auto_map` is there, Auto classes ask at the terminal whether to run a checkpoint's code.
        stated = {key: value for key, value in config.items() if key != "auto_map"}
        return CONFIG_MAPPING[config["model_type"]].from_dict(with_special_floats(stated))
    return None
