"""Grafts: the residual stream overwritten at one block and one position of a prompt.

Nothing is trained or scaled: one state is replaced while the prompt is read, and all that follows is the
model's own greedy answer.

Source: arXiv:2606.19636. Draws of the authors' code depend on the order of the items; here they depend on
seed, item and kind alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from hub_magmax.errors import ArgumentError, EvaluationError
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.randomness import CounterGenerator

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from hub_magmax.evaluation.evaluators.loading import LoadedModel

#: Standard deviation of the numbers that the authors' code draws for `gaussian`.
GAUSSIAN_DEVIATION = 1.9


class Site(NamedTuple):
    """What a graft is made of: one position of a prompt at one block.

    Attributes:
        states: The block's output at every token of the prompt, "tokens width".
        place: The token whose state is replaced.
        entering: The state that enters the block there, which is the output of the block before.
        draws: Of this item.
    """

    states: Tensor
    place: int
    entering: Tensor
    draws: CounterGenerator

    @property
    def own(self) -> Float[torch.Tensor, " width"]:
        return self.states[self.place]


def _normal(site: Site, stream: int) -> Float[torch.Tensor, " width"]:
    """Return independent standard normal numbers (Box and Muller), float64."""
    first, second = (site.draws.uniform(0, len(site.own), 2 * stream + half) for half in (0, 1))
    found = torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)
    return found.to(site.own.device)


def _random(site: Site) -> Float[torch.Tensor, " width"]:
    drawn = _normal(site, 0)
    found: Tensor = drawn * (site.own.double().norm() / drawn.norm())
    return found


def _shuffled(site: Site) -> Float[torch.Tensor, " width"]:
    order = torch.argsort(site.draws.bits(0, len(site.own), 4))
    return site.own[order.to(site.own.device)]


def _mean(site: Site) -> Float[torch.Tensor, " width"]:
    others = [place for place in range(len(site.states)) if place != site.place]
    return site.states[others].double().mean(0) if others else site.own


#: What takes the place of a state, by kind. A prompt of one token has no others: its state stays for `mean`.
GRAFTS: Mapping[str, Callable[[Site], Tensor]] = {
    "zero": lambda site: torch.zeros_like(site.own),
    "random": _random,
    "shuffled": _shuffled,
    "first": lambda site: site.states[0],
    "mean": _mean,
    "previous": lambda site: site.entering,
    "gaussian": lambda site: GAUSSIAN_DEVIATION * _normal(site, 1),
}

#: Kinds that are tried by default: all but the one whose size does not depend on the model.
DEFAULT_GRAFTS = ("zero", "random", "shuffled", "first", "mean", "previous")


def block_number(layer: float, num_blocks: int) -> int:
    """Return the block that a whole number names, from 0 or from the end, or a share of the depth.

    Raises:
        ArgumentError: If there is none.
    """
    if isinstance(layer, int):
        number = layer + num_blocks if layer < 0 else layer
    else:
        # 0.65 of 40 blocks is block 26, whatever the product is rounded to.
        number = min(math.floor(layer * num_blocks + 1e-9), num_blocks - 1) if 0 <= layer <= 1 else -1
    if not 0 <= number < num_blocks:
        raise ArgumentError(
            f"there is no layer {layer}",
            expected=f"a number from {-num_blocks} to {num_blocks - 1}, or a share of the depth, 0.0 to 1.0",
        )
    return number


def find_blocks(model: LoadedModel, tokens: Sequence[int]) -> list[Module]:
    """Return the blocks of a decoder, in order: the longest list of modules that hand a state to the next.

    The model reads some tokens, and every list of modules in it is watched. No architecture is known by name.

    Args:
        model: A causal language model.
        tokens: That it reads.

    Raises:
        EvaluationError: If no list does that.
    """
    lists = [[*m] for m in model.network.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    seen = _watched(model, tokens, {id(block): block for blocks in lists for block in blocks})
    chains = [blocks for blocks in lists if _is_chain([seen.get(id(block)) for block in blocks])]
    if not chains:
        raise EvaluationError(
            "no list of blocks was found in it, of which each gets the state that the one before returns",
            where=model.name,
            expected="a decoder of transformers with one residual stream",
        )
    return max(chains, key=len)  # the first of equally long ones, which holds the others


def _watched(
    model: LoadedModel, tokens: Sequence[int], modules: Mapping[int, Module]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the states that enter and leave modules while a model reads tokens, where they are states."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(block: Module, args: Any, kwargs: Any, output: Any) -> None:
        entering, leaving = _entering(args, kwargs), _leaving(output)
        if entering is not None and leaving is not None and entering.shape == leaving.shape:
            seen[id(block)] = entering, leaving.clone()

    ids = torch.tensor([[*tokens]], device=model.device)
    with ExitStack() as stack, torch.inference_mode():
        for block in modules.values():
            stack.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        model.output(input_ids=ids, use_cache=False)
    return seen


def _is_chain(seen: Sequence[tuple[Tensor, Tensor] | None]) -> bool:
    states = [pair for pair in seen if pair is not None]
    pairs = pairwise(states)
    return len(states) == len(seen) and all(
        leaving.shape == entering.shape and torch.equal(leaving.to(entering.device), entering)
        for (_, leaving), (entering, _) in pairs
    )


def _entering(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the state that enters a block: its first argument with tokens and width."""
    return next((value for value in (*args, *kwargs.values()) if _is_state(value)), None)


def _leaving(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if _is_state(first) else None


def _is_state(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


@contextmanager
def grafted(
    block: Module, kinds: Sequence[str | None], places: Sequence[int], draws: Sequence[CounterGenerator]
) -> Iterator[None]:
    """Overwrite states of a batch in the output of a block while the prompts are read.

    With a cache that is the first pass; a later one has one token. Without it every pass reads the prompts
    again, with a token more each time, and gets the same states.

    Args:
        block: Of the decoder.
        kinds: Graft of each row of the batch, None for none. Prompts are of the same length: no token is
            filled in, so that answers do not depend on what else is in a batch.
        places: Token of each row whose state is replaced, from 0.
        draws: Of each row.
    """
    rows = [row for row, kind in enumerate(kinds) if kind is not None]
    entered: list[Tensor] = []
    lengths: list[int] = []

    def enter(block: Module, args: Any, kwargs: Any) -> None:
        state = _entering(args, kwargs)
        assert state is not None, "find_blocks saw one"
        entered[:] = [state.clone()]  # before the block, which may add to it in place

    def overwrite(block: Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = _leaving(output)
        assert states is not None, "find_blocks saw one"
        lengths.append(states.shape[1])
        if states.shape[1] != lengths[0] + len(lengths) - 1:
            return None
        changed = states.clone()
        for row in rows:
            kind, place = kinds[row], places[row]
            assert kind is not None
            site = Site(states[row, : lengths[0]], place, entered[0][row, place], draws[row])
            changed[row, place] = GRAFTS[kind](site).to(states.dtype)
        return type(output)([changed, *output[1:]]) if isinstance(output, tuple | list) else changed

    with ExitStack() as stack:
        if rows:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(overwrite, with_kwargs=True).remove)
        yield


def uniforms(draws: CounterGenerator, sample: int, count: int) -> np.ndarray:
    """Return the numbers in [0, 1) by which the tokens of a sampled chain are drawn, one for each."""
    return np.asarray(draws.uniform(0, count, 8 + sample))
