"""Hidden states of blocks that no task changed, at the start of a network: computed once for a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel


class FrozenStart:
    """Keeps what the first blocks of a network make of every batch, as long as their weights are the same.

    A network's blocks are its longest list of modules. Those at the start count for which every weight, and
    every embedding, is among the unchanged ones. What is kept of a batch goes with its tensor of tokens.

    Args:
        network: Blocks of a network that reads tokens, through one stack of them and all at once, are changed
            in place: they may be skipped. All others run as they are.
        slots: Its tensors, by their names in files.
        unchanged: Values of some of them that are the same in nearly all models.

    Attributes:
        num_blocks: How many blocks are skipped; 0 where nothing can be kept.
    """

    # Complex by its comprehensions.
    def __init__(
        self, network: nn.Module, slots: Mapping[str, Tensor], unchanged: Mapping[str, Tensor]
    ) -> None:
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(lists, key=len, default=nn.ModuleList())
        embeddings = [value for name, value in network.named_parameters() if "embed" in name]
        same = {slots[name].data_ptr() for name in unchanged}
        self.num_blocks = _num_frozen(embeddings, blocks, same) if _reads_tokens_at_once(network) else 0
        frozen = [*embeddings, *blocks[: self.num_blocks].parameters()]
        places = {value.data_ptr() for value in frozen}
        #: Values under which hidden states are kept.
        self._values = {name: value for name, value in unchanged.items() if slots[name].data_ptr() in places}
        self._kept = WeakTensorKeyDictionary()
        self._batch: Tensor | None = None
        self._is_valid = False
        if self.num_blocks:
            network.register_forward_pre_hook(self._begin, with_kwargs=True)
            network.register_forward_hook(self._end)
            for block in blocks[: self.num_blocks - 1]:
                block.forward = partial(self._skipped, block.forward)
            last = blocks[self.num_blocks - 1]
            last.forward = partial(self._last, last.forward)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Look whether the weights of the next model are those under which hidden states were kept."""
        self._is_valid = all(torch.equal(value, weights[name]) for name, value in self._values.items())

    def _begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._batch = kwargs.get("input_ids") if kwargs.get("past_key_values") is None else None

    def _end(self, *unused: Any) -> None:
        self._batch = None

    @property
    def _has_kept(self) -> bool:
        return self._is_valid and self._batch is not None and self._batch in self._kept

    def _skipped(self, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden if self._has_kept else forward(hidden, *args, **kwargs)

    def _last(self, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._has_kept:
            return self._kept[self._batch]
        found = forward(hidden, *args, **kwargs)
        if self._is_valid and self._batch is not None and isinstance(found, Tensor):
            self._kept[self._batch] = found
        return found


def _reads_tokens_at_once(network: nn.Module) -> bool:
    """Say whether a network reads tokens, through one stack of blocks, by its `forward` alone."""
    if not isinstance(network, PreTrainedModel) or network.main_input_name != "input_ids":
        return False
    is_double = getattr(network.config, "is_encoder_decoder", False)
    return not is_double and not network.can_generate()


def _num_frozen(embeddings: Sequence[Tensor], blocks: nn.ModuleList, same: Set[int]) -> int:
    """Return how many blocks come before the first weight that is not among those in the same places."""
    if not embeddings or any(value.data_ptr() not in same for value in embeddings):
        return 0
    changed = [any(value.data_ptr() not in same for value in block.parameters()) for block in blocks]
    return [*changed, True].index(True)
