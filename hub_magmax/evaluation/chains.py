"""Chains of a causal language model: greedy answers, with a graft or without, and sampled ones.

Prompts of one length run together, so that no token is filled in, and every draw depends on seed, item and
chain alone: but for rounding, answers do not depend on the size of batches, on their order, or on a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from hub_magmax.errors import ArgumentError, EvaluationError
from hub_magmax.evaluation.answer_rules import ANSWER_RULES, is_right, is_told
from hub_magmax.evaluation.evaluators.likelihoods import context_of
from hub_magmax.evaluation.grafts import DEFAULT_GRAFTS, GRAFTS, block_number, find_blocks, grafted, uniforms
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.text import nearest, number_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from hub_magmax.evaluation.evaluators.loading import LoadedModel

#: Name of the chain that takes the likeliest tokens, without a graft.
GREEDY = "greedy"

#: Largest probabilities that are looked at first, for the tokens that are drawn from.
MOST_LIKELY = 256


class Item(NamedTuple):
    """A question: where it is, the tokens of its prompt, and the right answer."""

    task: str
    number: int
    tokens: list[int]
    answer: str

    @property
    def where(self) -> str:
        return f"{self.task}, example {self.number}"


#: A chain: `greedy`, the kind of a graft, or the number of a sampled one.
Chain = str | int


@dataclass(frozen=True)
class ChainProtocol:
    """How chains are made, and answers found.

    There are as many sampled chains as deterministic ones: greedy, and one for each kind of graft.

    Attributes:
        layer: Block whose output is overwritten: its number, or a share of the depth.
        position: Token of the prompt, from 0 or from the end.
        grafts: Kinds, in the order in which chains are counted.
        answer: Rule by which an answer is found: its first line, or the final answer.
        max_new_tokens: Where a chain ends.
        temperature, top_p: Of sampled chains.
        seed: Of all draws.
        batch_size: Chains that run together, at most.
    """

    layer: int | float = 0.75  # not float alone: a number that is read from a file would become a share
    position: int = -1
    grafts: Sequence[str] = DEFAULT_GRAFTS
    answer: str = "line"
    max_new_tokens: int = 32
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "grafts", tuple(self.grafts))
        for name, known in (*((kind, GRAFTS) for kind in self.grafts), (self.answer, ANSWER_RULES)):
            if name not in known:
                what = "graft" if known is GRAFTS else "rule for answers"
                hint = nearest(str(name), [*known]).capitalize()
                raise ArgumentError(
                    f"there is no {what} {name!r}", expected=f"one of {', '.join(known)}", hint=hint
                )
        rules = {
            "grafts": (0 < len(self.grafts) == len({*self.grafts}), "kinds, at least one, each once"),
            "max_new_tokens": (self.max_new_tokens >= 1, "a number from 1"),
            "temperature": (0 < self.temperature <= 100, "a number above 0, at most 100"),
            "top_p": (0 < self.top_p <= 1, "a number above 0, at most 1"),
            "batch_size": (self.batch_size >= 1, "a number from 1"),
        }
        for name, (is_fit, expected) in rules.items():
            if not is_fit:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}", expected=expected)

    @property
    def deterministic(self) -> tuple[str, ...]:
        """Names of the deterministic chains, in the order in which they are counted."""
        return (GREEDY, *self.grafts)


@dataclass(frozen=True)
class ChainRunner:
    """Runs chains of one model.

    Attributes:
        model: A causal language model.
        protocol: How.
        cache: Keep keys and values of earlier tokens, where the model can.
    """

    model: LoadedModel
    protocol: ChainProtocol
    cache: bool = True

    def blocks(self, item: Item) -> tuple[list[Module], int]:
        """Return the blocks, and the number of the one whose output is overwritten."""
        blocks = find_blocks(self.model, item.tokens)
        return blocks, block_number(self.protocol.layer, len(blocks))

    def answers(
        self,
        block: Module,
        rows: Sequence[tuple[Item, Chain]],
        advance: Callable[[int], None] | None = None,
    ) -> list[bool]:
        """Return whether each chain ends in the right answer.

        Args:
            block: Whose output grafts overwrite.
            rows: Items with their chains.
            advance: Called with the number of chains that were run since the last call.
        """
        found = [False] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: (len(rows[row][0].tokens), row))
        for _, group in groupby(order, key=lambda row: len(rows[row][0].tokens)):
            numbers = [*group]
            for start in range(0, len(numbers), self.protocol.batch_size):
                batch = numbers[start : start + self.protocol.batch_size]
                for number, text in zip(batch, self.texts(block, [rows[n] for n in batch]), strict=True):
                    found[number] = is_right(text, rows[number][0].answer, self.protocol.answer)
                if advance is not None:
                    advance(len(batch))
        return found

    def texts(self, block: Module, rows: Sequence[tuple[Item, Chain]]) -> list[str]:
        """Return what follows prompts of one length."""
        batch = _Batch(self.model, self.protocol, rows)
        ids = torch.tensor([item.tokens for item, _ in rows], device=self.model.device)
        kinds = [chain if isinstance(chain, str) and chain in GRAFTS else None for _, chain in rows]
        places = [self._place(item) for item, _ in rows]
        padding = self.model.processor.pad_token_id
        with (
            torch.inference_mode(),
            self.model.errors(),
            _without_preferences(self.model.network),
            grafted(block, kinds, places, [_draws(self.protocol, item) for item, _ in rows]),
        ):
            made = self.model.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.protocol.max_new_tokens,
                do_sample=False,
                use_cache=self.cache,
                logits_processor=[batch.draw],
                stopping_criteria=[batch.is_done],
                pad_token_id=padding if padding is not None else self.model.processor.eos_token_id or 0,
            )
        return batch.written(made)

    def _place(self, item: Item) -> int:
        """Return the token of an item whose state is replaced, and refuse prompts that do not fit."""
        length, position = len(item.tokens), self.protocol.position
        limit = context_of(self.model)
        if limit is not None and length + self.protocol.max_new_tokens > limit:
            raise EvaluationError(
                f"the prompt has {number_of(length, 'token')}, which with {self.protocol.max_new_tokens} new "
                "ones are more than the model's context",
                where=item.where,
                expected=f"at most {limit} together",
                hint="Shorten the prompt, or lower max_new_tokens.",
            )
        if not -length <= position < length:
            raise EvaluationError(
                f"there is no position {position} in a prompt of {number_of(length, 'token')}",
                where=item.where,
                hint="The last token is -1.",
            )
        return position % length


@contextmanager
def _without_preferences(network: Any) -> Iterator[None]:
    """Let a network generate by its probabilities alone meanwhile.

    A model's own generation_config may hold penalties, lengths and suppressed tokens, and fills whatever the
    caller leaves open. Of it the tokens that end and fill texts stay.
    """
    from transformers import GenerationConfig

    own = network.generation_config
    network.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    try:
        yield
    finally:
        network.generation_config = own


def _draws(protocol: ChainProtocol, item: Item) -> CounterGenerator:
    return CounterGenerator(protocol.seed, item.where)


@dataclass(frozen=True)
class _Batch:
    """Rows that are generated together."""

    model: LoadedModel
    protocol: ChainProtocol
    rows: Sequence[tuple[Item, Chain]]

    @cached_property
    def sampled(self) -> list[int]:
        return [row for row, (_, chain) in enumerate(self.rows) if isinstance(chain, int)]

    @cached_property
    def drawn(self) -> Tensor:
        """Numbers in [0, 1) by which tokens are drawn, "sampled tokens"."""
        pairs = [self.rows[row] for row in self.sampled]
        most = self.protocol.max_new_tokens
        found = [
            torch.from_numpy(uniforms(_draws(self.protocol, item), int(chain), most)) for item, chain in pairs
        ]
        return torch.stack(found)

    @property
    def length(self) -> int:
        """Tokens of each prompt."""
        return len(self.rows[0][0].tokens)

    def draw(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Leave sampled chains the token that is drawn alone, as the only one that is possible."""
        if not self.sampled:
            return scores
        numbers = self.drawn[:, ids.shape[1] - self.length].to(scores.device)
        chosen = draw_tokens(scores[self.sampled], numbers, self.protocol.temperature, self.protocol.top_p)
        found = scores.clone()
        found[self.sampled] = -torch.inf
        found[self.sampled, chosen] = 0.0
        return found

    def is_done(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Say of each chain whether its answer is told."""
        rule = self.protocol.answer
        told = [is_told(text, rule) for text in self.written(ids)]
        return torch.tensor(told, device=ids.device)

    def written(self, ids: Tensor) -> list[str]:
        found: list[str] = self.model.processor.batch_decode(ids[:, self.length :], skip_special_tokens=True)
        return found


def draw_tokens(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token of each row among the likeliest ones, whose probabilities sum to `top_p` at least.

    Equal probabilities are all kept or none, so that the order of equal logits does not matter.

    Args:
        logits: "rows tokens".
        numbers: In [0, 1), of each row: where the token lies in the cumulated probabilities, in the order of
            the vocabulary.
        temperature: Divides the logits.
        top_p: Above 0, at most 1.
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    width = min(MOST_LIKELY, probabilities.shape[-1])
    for largest in _largest(probabilities, width):
        reached = largest.double().cumsum(-1) < top_p
        if not bool(reached[:, -1].any()):
            break
    last = reached.sum(-1, keepdim=True).clamp(max=largest.shape[-1] - 1)
    kept = probabilities * (probabilities >= largest.gather(-1, last))
    cumulated = kept.double().cumsum(-1)
    places = numbers[:, None].double() * cumulated[:, -1:]
    found: Tensor = torch.searchsorted(cumulated, places, right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def _largest(probabilities: Tensor, width: int) -> Iterator[Tensor]:
    """Yield the largest probabilities of each row, more of them each time, and all at last."""
    while width < probabilities.shape[-1]:
        yield probabilities.topk(width).values
        width *= 8
    yield probabilities.sort(descending=True).values
