"""Hidden states of blocks that no task changed, at the start of a network: computed once for a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class FrozenStart:
    """Keeps what the first blocks of a network make of every batch, as long as their weights are the same.

    A network's blocks are its longest list of modules. Those at the start count for which every weight, and
    every embedding, is among the unchanged ones. The batches must live as long as this does.

    Args:
        network: A text model with one stack of blocks. They are changed in place: they may be skipped.
        slots: Its tensors, by their names in files.
        unchanged: Values of some of them that are the same in nearly all models.

    Attributes:
        num_blocks: How many blocks are skipped; 0 where nothing can be kept.
    """

    def __init__(
        self, network: nn.Module, slots: Mapping[str, Tensor], unchanged: Mapping[str, Tensor]
    ) -> None:
        places = {slots[name].data_ptr() for name in unchanged}
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(lists, key=len, default=nn.ModuleList())
        embeddings = [value for name, value in network.named_parameters() if "embedding" in name]
        whole = bool(embeddings) and all(value.data_ptr() in places for value in embeddings)
        changed = [any(p.data_ptr() not in places for p in block.parameters()) for block in blocks]
        self.num_blocks = [*changed, True].index(True) if whole else 0
        frozen = {p.data_ptr() for block in blocks[: self.num_blocks] for p in block.parameters()}
        frozen |= {value.data_ptr() for value in embeddings}
        #: Values under which hidden states are kept.
        self._values = {name: value for name, value in unchanged.items() if slots[name].data_ptr() in frozen}
        self._kept: dict[int, tuple[Any, Tensor]] = {}
        self._batch: Any = None
        self._is_valid = False
        if self.num_blocks:
            network.register_forward_pre_hook(self._begin, with_kwargs=True)
            for block in blocks[: self.num_blocks - 1]:
                block.forward = partial(self._skipped, block.forward)
            last = blocks[self.num_blocks - 1]
            last.forward = partial(self._last, last.forward)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Look whether the weights of the next model are those under which hidden states were kept."""
        self._is_valid = all(torch.equal(value, weights[name]) for name, value in self._values.items())

    def _begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._batch = kwargs["input_ids"]

    @property
    def _has_kept(self) -> bool:
        return self._is_valid and id(self._batch) in self._kept

    def _skipped(self, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden if self._has_kept else forward(hidden, *args, **kwargs)

    def _last(self, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._has_kept:
            return self._kept[id(self._batch)][1]
        found = forward(hidden, *args, **kwargs)
        assert isinstance(found, Tensor), "a block of this network returns more than hidden states"
        if self._is_valid:
            self._kept[id(self._batch)] = (
                self._batch,
                found,
            )  # the batch is kept, so that its id stays its own
        return found
