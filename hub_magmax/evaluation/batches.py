"""Memory of a batch whose texts a causal language model gives likelihoods, from the model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Evaluators that ask for likelihoods of texts.
OF_LIKELIHOODS = ("log-likelihood", "multiple-choice")


def bytes_of_token(config: Mapping[str, Any], batch_size: int) -> int:
    """Return about how many bytes a batch takes for each token of its longest text; 0 where it is not known.

    Logits are float32, a layer at work holds its inputs about six times and what is between its products
    three times, and one text at a time has its logits in float64, twice. SmolLM2-135M: 1.03 of what 32 texts
    of 64 tokens took, measured.

    Args:
        config: Of the model.
        batch_size: Texts that run together.
    """
    text = config.get("text_config", config)
    vocabulary, width, between = (
        _size(text, key) for key in ("vocab_size", "hidden_size", "intermediate_size")
    )
    if not vocabulary:
        return 0
    return batch_size * (4 * vocabulary + 24 * width + 12 * between) + 16 * vocabulary


def _size(values: Any, key: str) -> int:
    found = values.get(key) if isinstance(values, Mapping) else None
    return found if isinstance(found, int) else 0
