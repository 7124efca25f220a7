"""LoRA adapters by PEFT: put into a network in place of its weights, trained, and written as checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hub_magmax.checkpoints.adapters.config import config_of, parse_config
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from hub_magmax.checkpoints.opening import open_source
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.errors import MissingDependencyError, RecipeError
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.files import os_errors, write_json
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.training import Lora
from hub_magmax.text import nearest

#: PEFT's names of the tasks of models, by the class that loads them. Others have none, since PEFT would take
#: a whole head for a part of the adapter.
_TASK_TYPES = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}

#: What PEFT puts before names of layers in files, and the name of the adapter among several.
_PREFIX, _NAME = "base_model.model.", "default"

_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def peft_library() -> Any:
    """Return PEFT.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "the package peft, which trains LoRA adapters, is not installed",
            where="training.lora",
            hint='Install it with: pip install "hub-magmax[peft]"',
        ) from error
    return peft


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter inside of a network, all of whose other weights are frozen.

    Attributes:
        network: With PEFT's layers in place of its own.
        config: What `adapter_config.json` says, but for the base model.
    """

    network: nn.Module
    config: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The factors, by the names that PEFT stores them under."""
        trained = ((name, one) for name, one in self.network.named_parameters() if one.requires_grad)
        return {_stored_name(name): factor for name, factor in trained}

    def begin_at(self, recipe: Recipe, locked: LockedSource) -> None:
        """Take the factors of another adapter of the same base model.

        Raises:
            RecipeError: If it has other layers, another rank or another scale.
        """
        with closing(open_source(recipe, locked)) as source:
            found, scale = _factors(source), parse_config(config_of(source), source.label)
        own = self.weights
        scales = {scale.scale_of(_layer(name)) for name in found}
        wanted = self.config["lora_alpha"] / self.config["r"]
        if {name: value.shape for name, value in found.items()} != {n: v.shape for n, v in own.items()}:
            what = "other layers or another rank"
        elif scales != {wanted}:
            what = f"the scale {', '.join(f'{one:g}' for one in sorted(scales))} and not {wanted:g}"
        else:
            for name, value in found.items():
                own[name].data.copy_(value)
            return
        raise RecipeError(
            f"an adapter goes on from that of the task before it, and {locked.label} has {what}",
            key=("training", "lora"),
            hint="Give all tasks of the sequence the same lora, or write order: from_base.",
        )

    def write(self, folder: Path, base: LockedSource) -> None:
        """Write the adapter as PEFT does, in float32, with the name of its base model."""
        values = {"base_model_name_or_path": base.repo_id or base.reference, "revision": base.commit}
        with os_errors(folder):
            folder.mkdir(parents=True)
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in self.weights.items()},
                folder / ADAPTER_NAME,
                {"format": "pt"},
            )
        write_json(folder / ADAPTER_CONFIG_NAME, {**self.config, **values})


def add_adapter(model: LoadedModel, model_class: str, spec: Lora, seed: int) -> TrainedAdapter:
    """Put a new adapter into a network, in place; its product is zero, and it alone is trained.

    Args:
        model: In float32.
        model_class: Class of transformers that loads it.
        spec: Rank, scale and layers.
        seed: Of the first factors, which are drawn; the second ones are zero.

    Raises:
        MissingDependencyError: If PEFT is not installed.
        RecipeError: If a glob matches no layer.
    """
    peft = peft_library()
    layers = _layers(model, spec.targets)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES.get(model_class),
        "r": spec.rank,
        "lora_alpha": spec.scale_alpha,
        "target_modules": sorted(layers),
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
    }
    torch.manual_seed(seed)
    asked = peft.LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})
    others = {"bias": "none", "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
    config |= {**others, "modules_to_save": None, "init_lora_weights": True, "inference_mode": True}
    peft.inject_adapter_in_model(asked, model.network, _NAME)
    return TrainedAdapter(model.network, config)


def _layers(model: LoadedModel, globs: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers that globs match; without globs, all of the network's body."""
    linear = _linear(model.network)
    if not globs:
        body = {id(one) for one in model.network.base_model.modules()}
        body.discard(id(model.network.get_output_embeddings()))  # which T5 has in its body
        chosen = {name for name, one in linear.items() if id(one) in body}
    else:
        chosen = set().union(*(_matched(model, linear, index, glob) for index, glob in enumerate(globs)))
    found = {name: layer for name, layer in linear.items() if name in chosen}
    _check(model, found)
    return found


def _linear(network: nn.Module) -> dict[str, nn.Module]:
    return {name: one for name, one in network.named_modules() if isinstance(one, nn.Linear | Conv1D)}


def _matched(model: LoadedModel, linear: Mapping[str, nn.Module], index: int, glob: str) -> list[str]:
    """Return the linear layers that one glob matches."""
    if found := [name for name in linear if fnmatchcase(name, glob)]:
        return found
    raise RecipeError(
        f"no linear layer of {model.name} matches {glob!r}",
        key=("training", "lora", "targets", index),
        expected=f"a glob over names such as {next(iter(linear), 'none: it has no linear layers')}",
        hint=nearest(glob, list(linear)).capitalize(),
    )


def _check(model: LoadedModel, layers: Mapping[str, nn.Module]) -> None:
    """Raise RecipeError where no adapter is of such layers, or of such a model."""
    problem, hint = "", "Name some with training.lora.targets; or train without lora."
    if not layers:
        problem = "it has no linear layers"
    elif len({isinstance(layer, Conv1D) for layer in layers.values()}) > 1:
        problem = "it stores some of these layers transposed and others not"
    elif any(isinstance(one, _NORMALISATIONS) for one in model.network.modules()):
        problem, hint = "no adapter holds the statistics of its batch normalisation", "Leave lora out."
    if problem:
        text = f"{model.name} cannot have an adapter: {problem}"
        raise RecipeError(text, key=("training", "lora"), hint=hint)


def _stored_name(name: str) -> str:
    """Return the name under which PEFT stores a factor: without that of the adapter."""
    return _PREFIX + name.replace(f".{_NAME}.", ".")


def _layer(stored: str) -> str:
    """Return the name of the layer that a stored factor is of."""
    return stored.removeprefix(_PREFIX).split(".lora_")[0]


def _factors(source: FileSource) -> dict[str, Tensor]:
    return {
        name: source.read(name, 0, info.num_elements).view(info.shape).float()
        for name, info in source.index.tensors.items()
    }
