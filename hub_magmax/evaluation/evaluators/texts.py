"""Texts as inputs of a model: tokens that it knows, no more than it takes, padded where no answer changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import EvaluationError

if TYPE_CHECKING:
    from hub_magmax.evaluation.evaluators.loading import LoadedModel

#: Tokenizers without a limit say a number above this.
NO_LIMIT = 1_000_000


def text_in(row: Mapping[str, Any], column: str) -> str:
    """Return the text in a column of an example, numbers as text.

    Raises:
        EvaluationError: If there is nothing.
    """
    if row[column] is None:
        raise EvaluationError(
            f"an example has nothing in the column {column!r}",
            where="examples",
            hint="Leave such examples out of the data.",
        )
    return str(row[column])


def text_config(model: LoadedModel) -> Any:
    """Return the configuration of the part that reads texts, or of the whole model."""
    config = model.network.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_tokens(model: LoadedModel, tokens: Sequence[int], text: str) -> None:
    """Raise EvaluationError where a text has no tokens, or one that the model has no embedding of."""
    if not tokens:
        raise EvaluationError(
            f"the text {text!r:.100} has no tokens",
            where=model.name,
            hint="Leave such examples out of the data.",
        )
    known = getattr(text_config(model), "vocab_size", None)
    if isinstance(known, int) and max(tokens) >= known:
        written = str(model.processor.convert_ids_to_tokens(max(tokens)))
        raise EvaluationError(
            f"its tokenizer gives the token {max(tokens)} ({written!r}), and the model has embeddings of "
            f"{known:,} tokens",
            where=model.name,
            expected="the tokenizer that the model was trained with",
            hint="Put that one into its folder.",
        )


def most_tokens(model: LoadedModel) -> int | None:
    """Return the most tokens that fit tokenizer and model, None where neither says it.

    A model's own limit counts where it has an embedding for each place: what is longer does not run.
    """
    limits = [getattr(model.processor, "model_max_length", None), _places(model)]
    return min((limit for limit in limits if limit is not None and 0 < limit < NO_LIMIT), default=None)


def _places(model: LoadedModel) -> int | None:
    """Return how many embeddings of places a model has, less those that it never uses."""
    found: int | None = getattr(text_config(model), "max_position_embeddings", None)
    skipped = 0
    for name, module in getattr(model.network, "named_modules", tuple)():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and name.endswith("position_embeddings"):
            skipped = padding + 1  # RoBERTa counts places from there
    return None if found is None else found - skipped


def encode_texts(
    model: LoadedModel, texts: Sequence[Any], is_alike: Callable[[list[list[int]]], bool]
) -> tuple[list[Any], list[bool]]:
    """Return inputs for texts, together or one by one, and for each text whether its end was cut off.

    Args:
        model: Reads them.
        texts: Of one batch.
        is_alike: Given each text's tokens, says whether padding them to one length changes no answer.

    Raises:
        EvaluationError: If one is no text, or the model does not know its tokens.
    """
    tokens = _tokens_of(model, texts)
    limit = most_tokens(model)
    cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
    can_pad = model.processor.pad_token_id is not None and is_alike(tokens)
    groups = [[*texts]] if can_pad or len(texts) == 1 else [[text] for text in texts]
    encoded = [model.processor(group, padding=can_pad, return_tensors="pt", **cut) for group in groups]
    return encoded, [limit is not None and len(own) > limit for own in tokens]


def _tokens_of(model: LoadedModel, texts: Sequence[Any]) -> list[list[int]]:
    """Return all tokens of each text, if they are texts and the model knows their tokens."""
    for text in texts:
        if not isinstance(text, str):
            raise EvaluationError(
                f"{text!r:.100} is no text",
                where="input column",
                hint="Name the column of the texts with input_column, and leave examples without text out.",
            )
    found: list[list[int]] = model.processor([*texts], truncation=False, verbose=False)["input_ids"]
    for text, tokens in zip(texts, found, strict=True):
        check_tokens(model, tokens, text)
    return found
