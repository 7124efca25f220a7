"""Tensors of a LoRA adapter, matched with those of its base model; names and shapes are PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from hub_magmax.checkpoints.adapters.config import AdapterConfig, materialise
from hub_magmax.checkpoints.adapters.places import Place, known_places
from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, CheckpointIndex
from hub_magmax.checkpoints.stored_otherwise import unlike
from hub_magmax.errors import CheckpointError, MismatchError
from hub_magmax.text import shown

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")


#: Name of a layer, and whether it is an embedding.
Layer = tuple[str, bool]

#: Names of A and B in an adapter's file, by these letters.
Factors = dict[str, str]


@dataclass(frozen=True)
class Product:
    """Product of one layer's factors, and how it is added to the base model's tensor.

    Attributes:
        first, second: Names of A and B in the adapter's file.
        scale: Factor of B @ A.
        transposed: Whether the base model's tensor is the transpose.
        module: Name of the layer in the adapter.
        is_embedding: Whether the layer is an embedding, whose factors have names of their own.
        place: The base model's tensor, and the rows that the product has in it.
    """

    first: str
    second: str
    scale: float
    transposed: bool
    module: str
    is_embedding: bool
    place: Place

    @property
    def is_first(self) -> bool:
        """Whether the layer begins in this tensor; of a layer that is several tensors, one says so."""
        return self.place.rows is None or self.place.rows[0] == 0

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
        products: Products that are added; several where a tensor holds several layers side by side.
        whole: Tensors of the adapter's file that replace the base model's, by their names there.
        index: All tensors of the base model with the adapter; those that it replaces lie in its file.
    """

    products: Mapping[str, tuple[Product, ...]]
    whole: Mapping[str, str]
    index: CheckpointIndex


def adapter_layout(
    base: CheckpointIndex,
    adapter: CheckpointIndex,
    config: AdapterConfig,
    places: Mapping[str, str] | None = None,
) -> AdapterLayout:
    """Return how an adapter changes a base model.

    Args:
        base, adapter: Tensors of both.
        config: Sizes of the products.
        places: Where the adapter's tensors are in the base model's files, as `find_places` returns it; None
            where they have the same names there, but for a prefix.

    Raises:
        CheckpointError: If the adapter is malformed.
        MismatchError: If it does not fit the base model.
    """
    factors, stored = sorted_names(adapter)
    if config.ensures_ties:  # what the base model's files lack is one of the others once more
        factors, stored = _stored_once(base, factors, stored)
    modules = [module for module, _ in factors]
    place = known_places(base, modules, places)
    if place is None:
        raise _misfit(base, adapter, config, modules)
    whole = {_only(place(plain), plain, adapter, config): path for plain, path in stored.items()}
    own = {name: replace(adapter.tensors[path], name=name) for name, path in whole.items()}
    below = CheckpointIndex(base.label, base.shards, {**base.tensors, **own})
    products: dict[str, tuple[Product, ...]] = {}
    for (module, is_embedding), found in factors.items():
        for where in place(f"{module}.weight"):
            if where.name not in below.tensors:
                raise _misfit(base, adapter, config, [module])
            product = Product(
                found["A"], found["B"], config.scale_of(module), False, module, is_embedding, where
            )
            product = _oriented(product, below, adapter, config)
            products[where.name] = (*products.get(where.name, ()), product)
    _refuse_ambiguous(chain.from_iterable(products.values()), below, adapter, config)
    return AdapterLayout(products, whole, replace(below, label=adapter.label, shards=adapter.shards))


def _stored_once(
    base: CheckpointIndex, factors: Mapping[Layer, Factors], stored: Mapping[str, str]
) -> tuple[dict[Layer, Factors], dict[str, str]]:
    """Return what an adapter holds without tied tensors that it repeats and the base model does not.

    Where all are missing, as if names differed by a prefix, nothing is left out.
    """
    left = {layer: found for layer, found in factors.items() if f"{layer[0]}.weight" in base.tensors}
    whole = {name: path for name, path in stored.items() if name in base.tensors}
    return left or dict(factors), whole or dict(stored)


def damaged(adapter: CheckpointIndex, what: str) -> CheckpointError:
    """Return the error of an adapter's file that PEFT would not write."""
    return CheckpointError(
        what,
        where=f"{adapter.label}, {adapter.shards[0].file}",
        hint=materialise("Save the adapter again with PEFT, or merge it into its base model first"),
    )


def sorted_names(adapter: CheckpointIndex) -> tuple[dict[Layer, Factors], dict[str, str]]:
    """Return names in the adapter's file: A and B by layer, and whole tensors by their plain name.

    Raises:
        CheckpointError: If a tensor is neither, or one of two factors is missing.
    """
    sides: dict[Layer, Factors] = {}
    whole: dict[str, str] = {}
    for stored in adapter.tensors:
        name = stored.removeprefix(_PREFIX)
        if ".original_module." in name:
            continue  # what a module was before it was trained whole; PEFT saves it where tokens were added
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


def _only(places: list[Place], plain: str, adapter: CheckpointIndex, config: AdapterConfig) -> str:
    """Return the one tensor that a whole tensor of the adapter replaces."""
    (first, *others) = places
    if others or first.num_rows is not None:
        raise MismatchError(
            f"{shown(plain)} is trained whole, and is several tensors, or a part of one, in the base model",
            where=adapter.label,
            hint=materialise("Merge it into its base model first", config.model_class),
        )
    return first.name


def _misfit(
    base: CheckpointIndex, adapter: CheckpointIndex, config: AdapterConfig, modules: list[str]
) -> MismatchError:
    missing = next(module for module in modules if f"{module}.weight" not in base.tensors)
    return MismatchError(
        f"the adapter changes {shown(missing)}, and there is no tensor {shown(missing + '.weight')}",
        where=adapter.label,
        expected=f"layers of {base.label}, such as {shown(next(iter(base.tensors)))}",
        hint="Check that it was trained on this base model. Where the model class renames its layers: "
        + materialise("merge it into its base model first", config.model_class),
    )


# Complex, and flat: two lists of layers.
def _refuse_ambiguous(
    products: Iterable[Product], below: CheckpointIndex, adapter: CheckpointIndex, config: AdapterConfig
) -> None:
    """Raise MismatchError for a square layer where others are stored otherwise than the adapter says."""
    plain = [product for product in products if not product.is_embedding]
    shapes = {product.module: below.tensors[product.place.name].shape for product in plain}
    turned = [p.module for p in plain if p.transposed and not config.transposed]
    square = [p.module for p in plain if len({*shapes[p.module]}) == 1 and len(shapes[p.module]) == 2]
    if turned and square:
        raise MismatchError(
            f"`fan_in_fan_out` is false, and {shown(turned[0])} is stored transposed; of {shown(square[0])}, "
            "which is square, nothing tells",
            where=adapter.label,
            hint=materialise("Merge it into its base model first", config.model_class),
        )


# Complex, and flat: a list of what has to fit.
def _oriented(
    product: Product, below: CheckpointIndex, adapter: CheckpointIndex, config: AdapterConfig
) -> Product:
    """Return a product as it is added, straight or transposed, once it fits the tensor below it."""
    first, second = adapter.tensors[product.first], adapter.tensors[product.second]
    rank = config.rank_of(product.module)
    if first.shape[:1] != (rank,) or second.shape[1:2] != (rank,):
        raise damaged(
            adapter,
            f"the factors of {shown(product.module)} have shapes {list(first.shape)} and "
            f"{list(second.shape)}, and the configuration says rank {rank}",
        )
    base, place = below.tensors[product.place.name], product.place
    expected = base.shape if place.num_rows is None else (place.num_rows, *base.shape[1:])
    start, stop = place.rows or (0, second.shape[0])
    straight = (stop - start, *first.shape[1:])
    is_plain = place.rows is None and place.num_rows is None
    said = product.is_embedding or config.transposed
    is_straight = not product.is_embedding and expected == straight
    turned = is_plain and (product.is_embedding or (len(straight) == 2 and (said or not is_straight)))
    floating = {base.dtype, first.dtype, second.dtype} <= set(MERGEABLE_DTYPES)
    if floating and set(second.shape[2:]) <= {1} and stop <= second.shape[0]:
        if turned and expected == straight[::-1]:
            return replace(product, transposed=True)
        # PEFT says `fan_in_fan_out` once, as for the last layer, and adds to each as it stores its weights.
        if is_straight:
            return product
    if found := unlike(base, base):
        where = f"{below.label}, tensor {base.name!r}"
        raise MismatchError(found.what, where=where, expected=found.expected, hint=found.step)
    raise MismatchError(
        f"the product of {shown(product.module)} has shape {list(straight)}"
        f"{' transposed' * (turned and said)}",
        where=adapter.label,
        expected=f"{list(expected)} of floating point, as {shown(base.name)} of {below.label}",
        hint="Check that it was trained on this base model. Grouped convolutions cannot be added.",
    )
