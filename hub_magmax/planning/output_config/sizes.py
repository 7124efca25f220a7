"""Keys of a config.json that state sizes, and the tensors that have them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hub_magmax.checkpoints.config import Path, is_count, levels
from hub_magmax.checkpoints.rows.vocabulary import ROWS_BY_WORD
from hub_magmax.planning.layout import OUTPUT_DTYPES

#: Words in the names of tensors that belong to a nested configuration.
_WORDS = {"vision_config": ("vision", "visual"), "text_config": ("text", "language")}

#: Keys of config.json that state the rows of tensors: the end of the tensors' names, and the rows that there
#: are beyond the key's value.
ROWS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("vocab_size", ROWS_BY_WORD, (0,)),
    ("type_vocab_size", r"token_type_embeddings\.weight", (0,)),
    ("max_source_positions", r"encoder\.embed_positions\.weight", (0, 2)),
    ("max_target_positions", r"decoder\.embed_positions\.weight", (0, 2)),
    ("max_position_embeddings", r"(position_embeddings?|embed_positions)\.weight", (0, 2)),
    ("n_positions", r"(wpe|positions_embed)\.weight", (0,)),
    ("n_ctx", r"(wpe|positions_embed)\.weight", (0,)),
)

#: Keys that a model type's class has a default for, where a configuration lacks them.
OFTEN_LEFT_OUT = ("vocab_size", "type_vocab_size")

POSITIONS = re.compile(r"(.*\.)?(position_embeddings?(\.weight)?|pos_embed|positional_embedding)")

CLASSIFIER = re.compile(
    r"(.*\.)?(classifier|score|cls_classifier|distillation_classifier|(classifier|classification_head)\."
    r"out_proj|class_labels_classifier|logits_proj)\.(weight|bias)"
)

LAYER = re.compile(r"(.*?(?:^|\.)(?:layers?|h|blocks?|resblocks)\.)(\d+)\..*")
NUM_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_encoder_layers",
    "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip

#: Keys whose values are sizes of tensors.
_SIZE = re.compile(r".*(size|_dim|positions|position_embeddings|n_embd|n_ctx|d_model|d_ff|channels)")

DTYPES = {stored: name for name, stored in OUTPUT_DTYPES.items()}
#: Model types that scale what goes into the head where it is tied, by the key that says so.
SCALED_BY_TIE = ("t5", "mt5", "umt5", "longt5", "pop2piano", "udop", "switch_transformers")


def sizes_stated(config: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
    """Yield the sizes of tensors that a configuration states."""
    for path, level in levels(config):
        for key, value in level.items():
            if is_count(value) and value > 1 and _SIZE.fullmatch(key):
                yield (*path, key), value


def most_common(dtypes: Iterable[tuple[str, int]]) -> str | None:
    """Return the dtype of most elements of floating point, as config.json writes it."""
    counts: Counter[str] = Counter()
    for dtype, num_elements in dtypes:
        if dtype in DTYPES:
            counts[dtype] += num_elements
    return DTYPES[counts.most_common(1)[0][0]] if counts else None


def of_level(names: Iterable[str], path: Path) -> list[str]:
    """Return the names in the part that a nested configuration describes; all where no name tells."""
    found = [*names]
    for key in path:
        own = _WORDS.get(key, (key.removesuffix("_config"),))
        others = tuple(word for other, words in _WORDS.items() if other != key for word in words)
        found = _with_word(found, own) or found
        found = [name for name in found if not _with_word([name], others)] or found
    return found


def _with_word(names: Sequence[str], words: Sequence[str]) -> list[str]:
    return [name for name in names if any(word in name for word in words)]


def of_side(stacks: Sequence[str], key: str) -> list[str]:
    """Return the stacks of layers that a key counts: the decoder's, or the encoder's where both are."""
    sides = {side: [stack for stack in stacks if side in stack] for side in ("encoder", "decoder")}
    return sides["decoder" if "decoder" in key else "encoder"] if all(sides.values()) else [*stacks]


def side_of(value: Any) -> int | None:
    """Return the side of a square, given as a number or as two equal ones."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return value if is_count(value) and value > 0 else None


def stacks(names: Mapping[str, Any]) -> dict[str, set[int]]:
    """Return the layers of each stack of layers, by the beginning of their names."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            found.setdefault(match[1], set()).add(int(match[2]))
    return found
