"""Log-probabilities that a causal language model gives to parts of texts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators.texts import NO_LIMIT, check_tokens, text_config
from hub_magmax.kernels.lazy_imports import torch

if TYPE_CHECKING:
    from torch import Tensor

    from hub_magmax.evaluation.evaluators.loading import LoadedModel

#: Most tokens that are run together, and most logits of them: half a gigabyte in float32.
_MOST_TOKENS = 16_384
MOST_LOGITS = 2**27

#: Names of the longest context in configurations, as transformers' models call it.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class Row:
    """Tokens of one text; those from `first` on count, and each of them has one before it.

    Attributes:
        tokens: Of the whole text, or of what the context holds.
        first: The first token that counts, at least 1.
        is_cut: Tokens were left out.
    """

    tokens: list[int]
    first: int
    is_cut: bool = False

    @property
    def num_counted(self) -> int:
        return len(self.tokens) - self.first


def text_row(model: LoadedModel, text: str) -> Row:
    """Return all tokens of a text, cut off where the model's context ends; the first does not count."""
    tokens: list[int] = model.processor(text, verbose=False)["input_ids"]
    limit = context_of(model)
    if len(tokens) < 2:
        raise EvaluationError(
            f"the text {text!r:.100} has fewer than two tokens, so nothing in it can be scored",
            where="input column",
            hint="Leave such examples out, or give a prompt before the texts.",
        )
    check_tokens(model, tokens, text)
    return Row(tokens[:limit], 1, limit is not None and len(tokens) > limit)


def answer_row(model: LoadedModel, prompt: str, answer: str) -> Row:
    """Return the tokens of prompt and answer together, of which the answer's count.

    They are tokenised together, since a token may span the joint: the answer starts where the tokens
    first differ from those of the prompt alone, without the white space at its end, and at least one
    counts. Texts beyond the context lose their beginning. lm-eval does both alike.
    """
    start = prompt.rstrip()
    alone = prompt_tokens(model, start) if start else []
    tokens = prompt_tokens(model, prompt + answer)
    if not answer.strip():
        raise EvaluationError(
            "an answer is empty, so that it has no likelihood", where=f"after {prompt!r:.100}"
        )
    if not start:
        # Something has to come before the first token that counts.
        beginning = _beginning(model)
        tokens = tokens if tokens[:1] == [beginning] else [beginning, *tokens]
        alone = [beginning]
    first = next((i for i, (a, b) in enumerate(zip(alone, tokens, strict=False)) if a != b), len(alone))
    check_tokens(model, tokens, prompt + answer)
    limit = context_of(model)
    over = max(0, len(tokens) - limit - 1) if limit is not None else 0
    tokens, first = tokens[over:], first - over
    return Row(tokens, max(1, min(first, len(tokens) - 1)), over > 0)


def prompt_tokens(model: LoadedModel, text: str) -> list[int]:
    """Return the tokens of a text; the one that begins texts stands there once, also if it is written."""
    beginning = getattr(model.processor, "bos_token", None)
    special = not (beginning and text.startswith(beginning))
    found: list[int] = model.processor(text, add_special_tokens=special, verbose=False)["input_ids"]
    return found


def _beginning(model: LoadedModel) -> int:
    """Return the token that begins a text, or else the one that ends texts."""
    processor = model.processor
    known = (processor.bos_token_id, processor.eos_token_id, 0)
    return next(token for token in known if token is not None)


def context_of(model: LoadedModel) -> int | None:
    """Return the most tokens that the model takes, None where nothing says it."""
    text = text_config(model)
    found = [getattr(text, key, None) for key in _CONTEXT_KEYS]
    limit = getattr(model.processor, "model_max_length", None)
    stated = [value for value in (*found, limit) if isinstance(value, int) and 0 < value < NO_LIMIT]
    return stated[0] if stated else None


def log_likelihoods(model: LoadedModel, rows: Sequence[Row]) -> list[float]:
    """Return the summed log-probability of each row's tokens from its `first` one on.

    Rows of similar length run together, filled up at the end, where attention does not reach back from.
    Answers of one token to the same prompt, and rows whose input is the beginning of another one's, are read
    from one run.
    """
    found = [0.0] * len(rows)
    served = _served_together(rows)
    runs = [Row(rows[numbers[0]].tokens, min(rows[number].first for number in numbers)) for numbers in served]
    for group in _groups(runs, _vocabulary(model)):
        numbers = [served[index] for index in group]
        totals = _run(model, [runs[index] for index in group], [[rows[n] for n in some] for some in numbers])
        for number, total in zip(chain.from_iterable(numbers), totals, strict=True):
            found[number] = total
    return found


def _served_together(rows: Sequence[Row]) -> list[list[int]]:
    """Return the numbers of rows that one run serves: the inputs of all begin the input of the first.

    The input of a row is all its tokens but the last, which has nothing after it. Sorted, a beginning stands
    right before what it begins.
    """
    inputs = [row.tokens[:-1] for row in rows]
    served: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: inputs[number], reverse=True):
        carrier = inputs[served[-1][0]] if served else []
        if served and carrier[: len(inputs[number])] == inputs[number]:
            served[-1].append(number)
        else:
            served.append([number])
    return served


def _vocabulary(model: LoadedModel) -> int:
    return int(getattr(text_config(model), "vocab_size", 0) or 2**17)


def _groups(rows: Sequence[Row], vocabulary: int) -> Iterator[list[int]]:
    """Yield the numbers of rows that run together, the longest first: what does not fit fails at once."""
    group: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), i)):
        longest = len(rows[(group or [index])[0]].tokens)
        kept = longest - min(rows[i].first for i in (*group, index))
        size = len(group) + 1
        if group and (size * longest > _MOST_TOKENS or size * kept * vocabulary > MOST_LOGITS):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _run(model: LoadedModel, rows: Sequence[Row], served: Sequence[Sequence[Row]]) -> list[float]:
    """Run some rows together; return the sums of the rows that each serves, one after the other."""
    # The last token has nothing after it.
    length = max(len(row.tokens) for row in rows) - 1
    filled = [row.tokens[:-1] + [0] * (length + 1 - len(row.tokens)) for row in rows]
    seen = [[1] * (len(row.tokens) - 1) + [0] * (length + 1 - len(row.tokens)) for row in rows]
    ids, mask = (torch.tensor(values, device=model.device) for values in (filled, seen))
    kept = length + 1 - min(row.first for row in rows)
    with torch.inference_mode():
        logits = _last_logits(model, kept, input_ids=ids, attention_mask=mask)
        return [_total(logits[i], row, length - kept) for i, some in enumerate(served) for row in some]


def row_log_likelihood(model: LoadedModel, row: Row) -> Tensor:
    """Return the summed log-probability of a row's tokens from its `first` one on, to be differentiated."""
    ids = torch.tensor([row.tokens[:-1]], device=model.device)
    logits = _last_logits(model, len(row.tokens) - row.first, input_ids=ids)[0].float()
    wanted = torch.tensor(row.tokens[row.first :], device=logits.device)
    total: Tensor = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
    return total


def row_losses(model: LoadedModel, rows: Sequence[Row], smoothing: float) -> Tensor:
    """Return minus the mean log-probability of each row's tokens from its `first` one on, to be trained by.

    The rows run together, filled up at the end.

    Args:
        model: A causal language model.
        rows: Of one batch.
        smoothing: Share of each token's target that goes to all tokens.
    """
    from torch.nn.functional import cross_entropy

    length = max(len(row.tokens) for row in rows)
    shape = len(rows), length
    ids, seen, wanted = (torch.full(shape, value) for value in (0, 0, -100))
    for tokens, mask, counted, row in zip(ids, seen, wanted, rows, strict=True):
        tokens[: len(row.tokens)] = torch.tensor(row.tokens)
        mask[: len(row.tokens)] = 1
        counted[row.first : len(row.tokens)] = tokens[row.first : len(row.tokens)]
    device = model.device
    logits = model.output(
        input_ids=ids[:, :-1].to(device), attention_mask=seen[:, :-1].to(device), use_cache=False
    ).logits
    losses = cross_entropy(
        logits.float().transpose(1, 2), wanted[:, 1:].to(device), reduction="none", label_smoothing=smoothing
    )
    found: Tensor = losses.sum(1) / torch.tensor([row.num_counted for row in rows], device=device)
    return found


def _last_logits(model: LoadedModel, kept: int, **inputs: Any) -> Tensor:
    """Return the logits of the last `kept` places, which most models compute alone if told to."""
    told = {"logits_to_keep": kept} if "logits_to_keep" in _parameters(model.network) else {}
    logits: Tensor = model.output(**inputs, use_cache=False, **told).logits
    return logits[:, -kept:]


def _parameters(network: Any) -> frozenset[str]:
    return frozenset(inspect.signature(network.forward).parameters)


def _total(logits: Tensor, row: Row, skipped: int) -> float:
    """Return the sum over one row, in float64; the logits start at its place `skipped`."""
    wanted = torch.tensor(row.tokens[row.first :], device=logits.device)
    counted = logits[row.first - 1 - skipped : len(row.tokens) - 1 - skipped].double()
    return float(counted.log_softmax(-1).gather(-1, wanted[:, None]).sum())
