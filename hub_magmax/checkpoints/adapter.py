"""LoRA adapters as checkpoints: base weights plus the adapter's product, formed for the elements asked for.

The names and the arithmetic are PEFT's: W + (B @ A) · scale, with scale = alpha / r, or alpha / √r with
rslora. Everything is in float32 and nothing is rounded to the base model's dtype.

Source: arXiv:2106.09685; rslora is arXiv:2312.03732.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.index import (
    ADAPTER_CONFIG_NAME,
    MERGEABLE_DTYPES,
    CheckpointIndex,
    TensorInfo,
    is_adapter,
)
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import CheckpointError, MismatchError
from hub_magmax.kernels.stored import Stored
from hub_magmax.text import shown

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

#: Elements of a product that are in memory at a time.
_BLOCK_ELEMENTS = 2**21

#: Rows of a product are computed in multiples of this, and never fewer: matrix libraries treat a few rows
#: in another way, with other roundings.
_ROWS = 64

_MAX_CONFIG_BYTES = 1_000_000

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")

#: What a configuration may say that makes more of an adapter than a product of two matrices, and what it is.
_REFUSED = (
    ("use_dora", "DoRA, which rescales every row"),
    ("lora_bias", "a bias inside the adapter"),
    ("layer_replication", "replicated layers"),
    ("trainable_token_indices", "single trained tokens"),
    ("target_parameters", "parameters outside of layers"),
    ("use_qalora", "QA-LoRA"),
    ("alora_invocation_tokens", "an activated LoRA"),
    ("megatron_config", "Megatron's parallel layers"),
)

#: Ways to start training that change the base model's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says about the size of the products.

    Attributes:
        rank, alpha: For all layers that no pattern names.
        ranks, alphas: By pattern, for the layers whose names end in it.
        rslora: Whether the scale is alpha / √rank.
        transposed: Whether base weights are stored as (inputs, outputs).
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    transposed: bool

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a layer."""
        return self.ranks.get(_pattern(self.ranks, module), self.rank)

    def scale_of(self, module: str) -> float:
        """Return what a layer's product is multiplied by."""
        alpha, rank = self.alphas.get(_pattern(self.alphas, module), self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """Return the first pattern that the whole end of a layer's name matches."""
    return next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)), "")


def parse_config(content: bytes, label: str) -> AdapterConfig:
    """Return what a configuration says.

    Raises:
        CheckpointError: If it is malformed, or of an adapter that is more than a product of two matrices.
    """
    where = f"{label}, {ADAPTER_CONFIG_NAME}"
    try:
        values = json.loads(content)
        _refuse(values, where)
        found = AdapterConfig(
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            ranks={str(key): int(rank) for key, rank in (values.get("rank_pattern") or {}).items()},
            alphas={str(key): float(alpha) for key, alpha in (values.get("alpha_pattern") or {}).items()},
            rslora=bool(values.get("use_rslora")),
            transposed=bool(values.get("fan_in_fan_out")),
        )
        for pattern in (*found.ranks, *found.alphas):
            re.compile(pattern)
        valid = min(found.rank, *found.ranks.values(), 1) >= 1 and all(
            math.isfinite(alpha) for alpha in (found.alpha, *found.alphas.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise CheckpointError(
            f"not a LoRA configuration ({type(error).__name__}: {str(error)[:100]})",
            where=where,
            hint="Save the adapter again with PEFT's `save_pretrained`.",
        ) from error
    if not valid:
        raise CheckpointError("a rank below 1, or an alpha that is no finite number", where=where)
    return found


def _refuse(values: Mapping[str, Any], where: str) -> None:
    kind, start = values.get("peft_type", "LORA"), values.get("init_lora_weights")
    found = [what for key, what in _REFUSED if values.get(key)]
    if kind != "LORA":
        found.insert(0, f"an adapter of type {shown(str(kind))}")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        found.append(f"a start by {shown(start)}, which changes the base model's weights too")
    if found:
        raise CheckpointError(
            f"this adapter has {' and '.join(found)}",
            where=where,
            expected="LoRA, with or without rslora, patterns and modules_to_save",
            hint=materialise("Merge it into its base model first"),
        )


def materialise(what: str) -> str:
    """Return how to make a whole checkpoint of an adapter with PEFT."""
    return (
        f"{what}, with the task's model class: "
        'python -c "from transformers import AutoModelForCausalLM as M; from peft import PeftModel as P; '
        "P.from_pretrained(M.from_pretrained('BASE'), 'ADAPTER').merge_and_unload()"
        ".save_pretrained('OUT')\", and name OUT in the recipe."
    )


@dataclass(frozen=True)
class Product:
    """One layer's product: the names of its factors, and how it becomes the base model's tensor.

    Attributes:
        first, second: Names of A and B in the adapter's file.
        scale: What B @ A is multiplied by.
        transposed: Whether the base model's tensor is the transpose.
        module: What the adapter calls the layer.
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
        """What PEFT calls A and B where it saves them."""
        end = "lora_embedding_{}" if self.is_embedding else "lora_{}.weight"
        first, second = (f"{_PREFIX}{self.module}.{end.format(side)}" for side in "AB")
        return first, second


class AdapterSource:
    """A checkpoint that is a base model with a LoRA adapter added; a `TensorSource`.

    Tensors that the adapter changes are read as float32; whole tensors that it holds (`modules_to_save`,
    biases, an embedding that it adapts) take the place of the base model's. The two sources stay open when
    this one is closed.

    Args:
        base: What the adapter was trained on, or the checkpoint of the task before.
        adapter: Its folder or repository.

    Attributes:
        config: What its configuration says.
        products: By the base model's tensor, what is added to it.
        whole: By the base model's tensor, the name of what takes its place, in the adapter's file.

    Raises:
        CheckpointError: If the adapter is malformed, or of a kind that cannot be added.
        MismatchError: If it does not fit the base model.
    """

    def __init__(self, base: TensorSource, adapter: TensorSource) -> None:
        self.base, self.adapter, self.label = base, adapter, adapter.label
        self.config = parse_config(config_of(adapter), adapter.label)
        factors, whole = self._sorted()
        rename = self._renaming([module for module, _ in factors])
        self.whole = {rename(name): stored for name, stored in whole.items()}
        self.products = {
            f"{rename(module)}.weight": self._product(module, rename(module), found, is_embedding)
            for (module, is_embedding), found in factors.items()
        }
        self._factors: tuple[str, Any, Any] = ("", None, None)
        self._block: tuple[str, int, Any] = ("", 0, None)

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.adapter.sizes

    @cached_property
    def index(self) -> CheckpointIndex:
        whole = {name: self._own(name, stored) for name, stored in self.whole.items()}
        return CheckpointIndex(self.label, self.adapter.index.shards, {**self.base.index.tensors, **whole})

    def _own(self, name: str, stored: str) -> TensorInfo:
        info = self.adapter.index.tensors[stored]
        return TensorInfo(name, info.dtype, info.shape, info.file, info.start_byte, info.stop_byte)

    def _sorted(self) -> tuple[dict[tuple[str, bool], dict[str, str]], dict[str, str]]:
        """Return names in the adapter's file: A and B by layer, and whole tensors by their plain name."""
        sides: dict[tuple[str, bool], dict[str, str]] = {}
        whole: dict[str, str] = {}
        for stored in self.adapter.index.tensors:
            name = stored.removeprefix(_PREFIX)
            if match := _FACTOR.fullmatch(name):
                sides.setdefault((match["module"], bool(match["kind"])), {})[match["side"]] = stored
            elif ".lora_" in name:
                raise self._odd(f"it holds {shown(stored)}, which is no factor of a product")
            else:
                plain = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
                whole[plain.replace(".base_layer.", ".")] = stored
        if unpaired := [module for (module, _), found in sides.items() if len(found) != 2]:
            raise self._odd(f"it holds one of two factors of {shown(unpaired[0])}")
        return sides, whole

    def _renaming(self, modules: list[str]) -> Any:
        """Return what turns the adapter's names into the base model's.

        An adapter names layers as the class it was trained with does, which may have a prefix more or less
        than the base model's files.
        """
        names = self.base.index.tensors
        ends = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        first = modules[0] if modules else ""
        added = [end.removesuffix(first) for end in ends if end.endswith(f".{first}")]
        cut = [first.partition(".")[0] + "."] if "." in first else []
        tried = [("", ""), *((prefix, "") for prefix in dict.fromkeys(added)), *(("", part) for part in cut)]
        for more, less in tried:
            if all(f"{more}{module.removeprefix(less)}.weight" in names for module in modules):
                return lambda name: f"{more}{name.removeprefix(less)}"
        missing = next(module for module in modules if f"{module}.weight" not in names)
        raise MismatchError(
            f"the adapter changes {shown(missing)}, and there is no tensor {shown(missing + '.weight')}",
            where=self.label,
            expected=f"layers of {self.base.label}, such as {shown(next(iter(names)))}",
            hint="Check that it was trained on this base model. Where the model class renames its layers: "
            + materialise("merge it into its base model first"),
        )

    def _product(self, module: str, name: str, found: Mapping[str, str], is_embedding: bool) -> Product:
        base = self.index.tensors[f"{name}.weight"]
        first, second = (self.adapter.index.tensors[found[side]] for side in "AB")
        rank = self.config.rank_of(module)
        if first.shape[:1] != (rank,) or second.shape[1:2] != (rank,):
            raise self._odd(
                f"the factors of {shown(module)} have shapes {list(first.shape)} and {list(second.shape)}, "
                f"and the configuration says rank {rank}"
            )
        floating = all(info.dtype in MERGEABLE_DTYPES for info in (base, first, second))
        straight = (second.shape[0], *first.shape[1:])
        ones = all(size == 1 for size in second.shape[2:])
        transposed = is_embedding or (self.config.transposed and len(straight) == 2)
        if not floating or not ones or base.shape != (straight[::-1] if transposed else straight):
            raise MismatchError(
                f"the product of {shown(module)} has shape {list(straight)}{' transposed' * transposed}",
                where=self.label,
                expected=f"{list(base.shape)} of floating point, as {shown(base.name)} of {self.base.label}",
                hint="Check that it was trained on this base model. Grouped convolutions cannot be added.",
            )
        scale = self.config.scale_of(module)
        return Product(first.name, second.name, scale, transposed, module, is_embedding)

    def _odd(self, what: str) -> CheckpointError:
        return CheckpointError(
            what,
            where=f"{self.label}, {self.adapter.index.shards[0].file}",
            hint=materialise("Save the adapter again with PEFT, or merge it into its base model first"),
        )

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        return self.adapter.read_bytes(path, start, stop)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat; in float32 where the adapter adds to it."""
        product = self.products.get(name)
        if product is not None and stop > start:
            return self._sum(name, product, start, stop)
        source, below = self._below(name)
        return source.read(below, start, stop)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return what `read` does, as a file has it."""
        if name in self.products and stop > start:
            return Stored.of(self.read(name, start, stop))
        source, below = self._below(name)
        return source.read_stored(below, start, stop, out)

    def _below(self, name: str) -> tuple[TensorSource, str]:
        """Return where to find what a product is added to: PEFT saves embeddings that it adapts, too."""
        return (self.adapter, self.whole[name]) if name in self.whole else (self.base, name)

    def _sum(self, name: str, product: Product, start: int, stop: int) -> Tensor:
        import torch

        pieces = []
        position = start
        while position < stop:
            first, block = self._product_block(name, product, position)
            pieces.append(block[position - first : stop - first])
            position += len(pieces[-1])
        source, below = self._below(name)
        return source.read(below, start, stop).to(torch.float32) + torch.cat(pieces)

    def _product_block(self, name: str, product: Product, element: int) -> tuple[int, Tensor]:
        """Return the scaled product around an element, flat, and the index of its first element.

        Blocks lie on a grid that depends on the tensor alone, so no element depends on what else was read.
        """
        held, first, block = self._block
        if held == name and first <= element < first + len(block):
            return first, block
        left, right = self._read_factors(name, product)
        num_rows, width = len(left), right.shape[1]
        rows = max(_BLOCK_ELEMENTS // width // _ROWS, 1) * _ROWS
        start = element // width // rows * rows
        if num_rows - start < _ROWS:  # the few rows that would be left over belong to the block before
            start = max(0, start - rows)
        stop = start + rows if num_rows - start - rows >= _ROWS else num_rows
        if product.transposed:  # (B @ A)ᵀ, from the columns of B @ A
            block = (right.T @ left[start:stop].T).T.contiguous()
        else:
            block = left[start:stop] @ right
        # Kept for the next piece; threads that read other tensors may replace it at any time.
        made = start * width, (block * product.scale).reshape(-1)
        self._block = (name, *made)
        return made

    def _read_factors(self, name: str, product: Product) -> tuple[Tensor, Tensor]:
        """Return what the tensor's rows and columns come from: B and A, or Aᵀ and Bᵀ."""
        import torch

        held, *factors = self._factors
        if held == name:
            return factors[0], factors[1]
        loaded = []
        for stored in (product.second, product.first):
            info = self.adapter.index.tensors[stored]
            flat = self.adapter.read(stored, 0, info.num_elements).to(torch.float32)
            if not torch.isfinite(flat).all():
                raise self._odd(f"the factor {shown(stored)} holds a NaN or an infinity")
            loaded.append(flat.reshape(info.shape[0], -1))
            self.adapter.release(stored, info.num_elements)
        second, first = loaded
        made = (first.T, second.T) if product.transposed else (second, first)
        self._factors = (name, *made)
        return made

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        stored: list[str] = []
        for name in names:
            if product := self.products.get(name):
                stored += [product.second, product.first]
            if name in self.whole:
                stored.append(self.whole[name])
        self.adapter.expect(stored, budget_bytes)  # products are made of whole factors

    def release(self, name: str, stop: int) -> None:
        if name in self.whole:
            self.adapter.release(self.whole[name], stop)

    def close(self) -> None:
        self._factors, self._block = ("", None, None), ("", 0, None)


def config_of(adapter: TensorSource) -> bytes:
    """Return the content of an adapter's configuration.

    Raises:
        CheckpointError: If it has none, or one that is too large.
    """
    size = adapter.sizes.get(ADAPTER_CONFIG_NAME, 0)
    if not 0 < size <= _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"there is no {ADAPTER_CONFIG_NAME}" if not size else f"{size:,} bytes long",
            where=f"{adapter.label}, {ADAPTER_CONFIG_NAME}",
            expected="what PEFT's `save_pretrained` writes beside the adapter's weights",
        )
    return adapter.read_bytes(ADAPTER_CONFIG_NAME, 0, size)


def with_adapters(
    sources: Mapping[str, TensorSource], *, in_sequence: bool = False
) -> dict[str, TensorSource]:
    """Return the sources with each adapter as the checkpoint that it stands for.

    Args:
        sources: `base_model`, then the tasks in order.
        in_sequence: Add each adapter to the checkpoint of the task before it, and not to the base model.
    """
    found: dict[str, TensorSource] = {}
    below = sources["base_model"]
    for name, source in sources.items():
        found[name] = AdapterSource(below, source) if is_adapter(source.index) else source
        if in_sequence:
            below = found[name]
    return found
