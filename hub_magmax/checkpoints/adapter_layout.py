"""Tensors of a LoRA adapter, matched with those of its base model; names and shapes are PEFT's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from hub_magmax.checkpoints.adapter_config import AdapterConfig, materialise
from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, CheckpointIndex, TensorInfo
from hub_magmax.errors import CheckpointError, MismatchError
from hub_magmax.text import shown

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")


@dataclass(frozen=True)
class Product:
    """Product of one layer's factors, and how it is added to the base model's tensor.

    Attributes:
        first, second: Names of A and B in the adapter's file.
        scale: Factor of B @ A.
        transposed: Whether the base model's tensor is the transpose.
        module: Name of the layer in the adapter.
        is_embedding: Whether the layer is an embedding, whose factors have names of their own.
    """

    first: str
    second: str
    scale: float
    transposed: bool
    module: str
    is_embedding: bool

    @property
    def names(self) -> tuple[str, str]:
        """Names of A and B in files that PEFT saves."""
        end = "lora_embedding_{}" if self.is_embedding else "lora_{}.weight"
        first, second = (f"{_PREFIX}{self.module}.{end.format(side)}" for side in "AB")
        return first, second


@dataclass(frozen=True)
class AdapterLayout:
    """Tensors that an adapter changes, by the base model's name.

    Attributes:
        products: Products that are added.
        whole: Tensors of the adapter's file that replace the base model's, by their names there.
        index: All tensors of the base model with the adapter; those that it replaces lie in its file.
    """

    products: Mapping[str, Product]
    whole: Mapping[str, str]
    index: CheckpointIndex


def adapter_layout(base: CheckpointIndex, adapter: CheckpointIndex, config: AdapterConfig) -> AdapterLayout:
    """Return how an adapter changes a base model.

    Raises:
        CheckpointError: If the adapter is malformed.
        MismatchError: If it does not fit the base model.
    """
    factors, stored = _sorted(adapter)
    rename = _renaming(base, adapter, [module for module, _ in factors])
    whole = {rename(name): path for name, path in stored.items()}
    own = {name: replace(adapter.tensors[path], name=name) for name, path in whole.items()}
    index = CheckpointIndex(adapter.label, adapter.shards, {**base.tensors, **own})
    products = {}
    for (module, is_embedding), found in factors.items():
        name = f"{rename(module)}.weight"
        product = (module, found, is_embedding)
        products[name] = _product(index.tensors[name], base.label, adapter, config, *product)
    return AdapterLayout(products, whole, index)


def damaged(adapter: CheckpointIndex, what: str) -> CheckpointError:
    """Return the error of an adapter's file that PEFT would not write."""
    return CheckpointError(
        what,
        where=f"{adapter.label}, {adapter.shards[0].file}",
        hint=materialise("Save the adapter again with PEFT, or merge it into its base model first"),
    )


def _sorted(adapter: CheckpointIndex) -> tuple[dict[tuple[str, bool], dict[str, str]], dict[str, str]]:
    """Return names in the adapter's file: A and B by layer, and whole tensors by their plain name."""
    sides: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    for stored in adapter.tensors:
        name = stored.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(name):
            sides.setdefault((match["module"], bool(match["kind"])), {})[match["side"]] = stored
        elif ".lora_" in name:
            raise damaged(adapter, f"it holds {shown(stored)}, which is no factor of a product")
        else:
            plain = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            whole[plain.replace(".base_layer.", ".")] = stored
    if unpaired := [module for (module, _), found in sides.items() if len(found) != 2]:
        raise damaged(adapter, f"it holds one of two factors of {shown(unpaired[0])}")
    return sides, whole


def _renaming(base: CheckpointIndex, adapter: CheckpointIndex, modules: list[str]) -> Callable[[str], str]:
    """Return the function from the adapter's names to the base model's.

    An adapter has the names of the class it was trained with, which can have a prefix more or less than the
    base model's files.
    """
    names = base.tensors
    for more, less in _prefixes(names, modules[0] if modules else ""):
        if all(f"{more}{module.removeprefix(less)}.weight" in names for module in modules):
            return lambda name: f"{more}{name.removeprefix(less)}"
    missing = next(module for module in modules if f"{module}.weight" not in names)
    raise MismatchError(
        f"the adapter changes {shown(missing)}, and there is no tensor {shown(missing + '.weight')}",
        where=adapter.label,
        expected=f"layers of {base.label}, such as {shown(next(iter(names)))}",
        hint="Check that it was trained on this base model. Where the model class renames its layers: "
        + materialise("merge it into its base model first"),
    )


def _prefixes(names: Iterable[str], module: str) -> list[tuple[str, str]]:
    """Return prefixes to add and to remove, in the order of trying, given one of the layers."""
    ends = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    added = dict.fromkeys(end.removesuffix(module) for end in ends if end.endswith(f".{module}"))
    first, dot, _ = module.partition(".")
    return [("", ""), *((prefix, "") for prefix in added), *([("", first + dot)] if dot else [])]


def _product(
    base: TensorInfo,
    base_label: str,
    adapter: CheckpointIndex,
    config: AdapterConfig,
    module: str,
    found: Mapping[str, str],
    is_embedding: bool,
) -> Product:
    first, second = adapter.tensors[found["A"]], adapter.tensors[found["B"]]
    rank = config.rank_of(module)
    if first.shape[:1] != (rank,) or second.shape[1:2] != (rank,):
        raise damaged(
            adapter,
            f"the factors of {shown(module)} have shapes {list(first.shape)} and {list(second.shape)}, "
            f"and the configuration says rank {rank}",
        )
    floating = {base.dtype, first.dtype, second.dtype} <= set(MERGEABLE_DTYPES)
    straight = (second.shape[0], *first.shape[1:])
    transposed = is_embedding or (config.transposed and len(straight) == 2)
    fits = set(second.shape[2:]) <= {1} and base.shape == (straight[::-1] if transposed else straight)
    if not floating or not fits:
        raise MismatchError(
            f"the product of {shown(module)} has shape {list(straight)}{' transposed' * transposed}",
            where=adapter.label,
            expected=f"{list(base.shape)} of floating point, as {shown(base.name)} of {base_label}",
            hint="Check that it was trained on this base model. Grouped convolutions cannot be added.",
        )
    scale = config.scale_of(module)
    return Product(first.name, second.name, scale, transposed, module, is_embedding)
