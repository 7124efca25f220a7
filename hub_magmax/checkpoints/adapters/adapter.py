"""LoRA adapters as checkpoints: base weights plus the adapter's product, computed for the elements asked for.

The names and the arithmetic are PEFT's: W + (B @ A) · scale, with scale = alpha / r, or alpha / √r with
rslora. Everything is in float32 and nothing is rounded to the base model's dtype.

Source: arXiv:2106.09685; rslora is arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from hub_magmax.checkpoints.adapters.config import config_of, parse_config
from hub_magmax.checkpoints.adapters.layout import Product, adapter_layout, damaged
from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo, is_adapter
from hub_magmax.checkpoints.source import DerivedSource, TensorFile, TensorSource
from hub_magmax.kernels.lazy_imports import Tensor, np, torch
from hub_magmax.kernels.stored import Stored
from hub_magmax.methods.factors import Factors
from hub_magmax.recipe.lockfile import own_base_name
from hub_magmax.text import shown

#: Elements of a product that are in memory at a time.
BLOCK_ELEMENTS = 2**21

#: Rows of a product are computed in multiples of this, and never fewer: matrix libraries round products of a
#: few rows differently.
_ROWS = 64


class AdapterSource(DerivedSource):
    """A checkpoint that is a base model with a LoRA adapter added; a `TensorSource`.

    Tensors that the adapter changes are read as float32; whole tensors that it holds (`modules_to_save`,
    biases, an embedding that it adapts) replace the base model's. The two sources stay open when this one
    is closed.

    Args:
        base: The model that the adapter was trained on, or the checkpoint of the task before.
        adapter: Its folder or repository.
        places: Where its layers are in the base model's files, as `find_places` returns it, or None.
        block_elements: Elements of a product that are in memory at a time, about.

    Attributes:
        config: Sizes of the products, from the adapter's configuration.
        products, whole, index: Of the `AdapterLayout`.

    Raises:
        CheckpointError: If the adapter is malformed, or of a kind that cannot be added.
        MismatchError: If it does not fit the base model.
    """

    def __init__(
        self,
        base: TensorSource,
        adapter: TensorSource,
        places: Mapping[str, str] | None = None,
        *,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        super().__init__(adapter)
        self.base, self.adapter = base, adapter
        self.config = parse_config(config_of(adapter), adapter.label)
        layout = adapter_layout(base.index, adapter.index, self.config, places)
        self.products, self.whole = layout.products, layout.whole
        self._index = layout.index
        self._blocks = _ProductBlocks(adapter, block_elements)

    @property
    def index(self) -> CheckpointIndex:
        return self._index

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat; in float32 where the adapter adds to it."""
        if name in self.products and stop > start:
            return self._sum(name, start, stop)
        source, below = self._below(name)
        return source.read(below, start, stop)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the same elements in their stored form."""
        if name in self.products and stop > start:
            return Stored.of(self.read(name, start, stop))
        source, below = self._below(name)
        return source.read_stored(below, start, stop, out)

    def stored(self, name: str) -> Iterator[tuple[TensorSource, TensorInfo]]:
        source, below = self._below(name)
        yield from source.stored(below)
        for product in self.products.get(name, ()):
            yield from self.adapter.stored(product.second)
            yield from self.adapter.stored(product.first)

    def factors(self, name: str, base: TensorSource) -> Factors | None:
        """Return what this adapter, and those below it, add to a tensor of `base`, as one product."""
        if name in self.whole or not (self.base is base or isinstance(self.base, AdapterSource)):
            return None
        rows, *others = self.index.tensors[name].shape
        parts = [self._blocks.factors(product, rows) for product in self.products.get(name, ())]
        if self.base is not base:
            if (below := self.base.factors(name, base)) is None:
                return None
            parts.insert(0, below)
        return Factors.total([*parts, Factors.nothing(rows, math.prod(others))])

    def _below(self, name: str) -> tuple[TensorSource, str]:
        """Return the source and name of the tensor to which a product is added.

        PEFT saves embeddings that it adapts, too.
        """
        return (self.adapter, self.whole[name]) if name in self.whole else (self.base, name)

    def _sum(self, name: str, start: int, stop: int) -> Tensor:
        source, below = self._below(name)
        found = source.read(below, start, stop).to(torch.float32, copy=True)
        info = self.index.tensors[name]
        width = info.num_elements // info.shape[0]
        for product in self.products[name]:
            place = product.place
            begin = place.start_row * width
            end = info.num_elements if place.num_rows is None else begin + place.num_rows * width
            position, last = max(start, begin), min(stop, end)
            while position < last:
                first, block = self._blocks.around(product, position - begin)
                piece = block[position - begin - first : last - begin - first]
                found[position - start : position - start + len(piece)] += piece
                position += len(piece)
        return found

    def keeps(self, name: str) -> bool:
        """Say whether neither this adapter nor one below it has anything for a tensor."""
        below = self.base.keeps(name) or not isinstance(self.base, AdapterSource)
        return below and name not in self.products and name not in self.whole

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        stored: list[str] = []
        for name in names:
            for product in self.products.get(name, ()):
                stored += [product.second, product.first]
            if name in self.whole:
                stored.append(self.whole[name])
        self.adapter.expect(stored, budget_bytes)  # products are made of whole factors

    def release(self, name: str, stop: int) -> None:
        if name in self.whole:
            self.adapter.release(self.whole[name], stop)

    def tensor_file(self, name: str) -> TensorFile | None:
        source, below = self._below(name)
        return None if name in self.products else source.tensor_file(below)

    def close(self) -> None:
        self._blocks.forget()


class _ProductBlocks:
    """Scaled products of an adapter, by blocks of rows; the last block and its factors are kept."""

    def __init__(self, adapter: TensorSource, block_elements: int) -> None:
        self._adapter, self._block_elements = adapter, block_elements
        self.forget()

    def forget(self) -> None:
        """Free the last block and its factors."""
        self._held: tuple[Any, ...] = (None, None, None)
        self._block: tuple[Any, int, Any] = (None, 0, None)

    def around(self, product: Product, element: int) -> tuple[int, Tensor]:
        """Return the scaled product around an element, flat, and the index of its first element.

        Blocks lie on a grid that depends on the tensor alone, so no element depends on what else was read.
        """
        held, first, block = self._block
        if held == product and first <= element < first + len(block):
            return first, block
        left, right = self._factors(product)
        num_rows, width = len(left), right.shape[1]
        rows = max(self._block_elements // width // _ROWS, 1) * _ROWS
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
        self._block = (product, *made)
        return made

    def factors(self, product: Product, num_rows: int) -> Factors:
        """Return a scaled product of a tensor of so many rows; those that it has nothing for are zero."""
        left, right = self._factors(product)
        first = product.place.start_row
        padding = (0, 0, first, num_rows - first - len(left))
        return Factors(torch.nn.functional.pad(left * product.scale, padding), right)

    def _factors(self, product: Product) -> tuple[Tensor, Tensor]:
        """Return the factors of the tensor's rows and columns: B and A, or Aᵀ and Bᵀ."""
        held, *factors = self._held
        if held == product:
            return factors[0], factors[1]
        loaded = []
        for stored in (product.second, product.first):
            info = self._adapter.index.tensors[stored]
            flat = self._adapter.read(stored, 0, info.num_elements).to(torch.float32)
            if not torch.isfinite(flat).all():
                raise damaged(self._adapter.index, f"the factor {shown(stored)} holds a NaN or an infinity")
            loaded.append(flat.reshape(info.shape[0], -1))
            self._adapter.release(stored, info.num_elements)
        second, first = loaded
        if product.place.rows is not None:
            second = second[slice(*product.place.rows)]
        made = (first.T, second.T) if product.transposed else (second, first)
        self._held = (product, *made)
        return made


def with_adapters(
    sources: Mapping[str, TensorSource],
    places: Mapping[str, Mapping[str, str] | None] = MappingProxyType({}),
    *,
    in_sequence: bool = False,
) -> dict[str, TensorSource]:
    """Return the sources with each adapter as the checkpoint that it stands for.

    One of a task with a base model of its own is added to that.

    Args:
        sources: `base_model`, then the tasks in order, then tasks' own base models.
        places: By task, where an adapter's layers are in the base model's files, as `find_places` returns it.
        in_sequence: Add each adapter to the checkpoint of the task before it, and not to the base model.
    """
    found: dict[str, TensorSource] = {}
    below = sources["base_model"]
    for name, source in sources.items():
        base = sources.get(own_base_name(name), below)
        found[name] = AdapterSource(base, source, places.get(name)) if is_adapter(source.index) else source
        if in_sequence:
            below = found[name]
    return found
