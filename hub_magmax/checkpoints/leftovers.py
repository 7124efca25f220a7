"""Files of a checkpoint that are no part of a merged model, by kinds that people know."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TRAINING = "state of a training"
_OTHER_WEIGHTS = "weights in other formats"
_CARD_KIND, _OTHERS = "card", "others"

#: Kinds by pattern of a file's name, or of a folder's with a slash at its end; the first that fits counts.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        (
            _TRAINING,
            r"optimizer.*|scheduler\.(pt|pth|bin)|scaler\.(pt|pth|bin)|rng_state.*|random_states.*|"
            r"trainer_state\.json|training_args\..*|zero_to_fp32\.py|latest|events\.out\.tfevents.*|"
            r".*\.distcp|(checkpoint|global_step|epoch|step)[_-]?\d+/|(runs|logs|wandb|mlruns)/|"
            r"(lightning_logs|pytorch_model_fsdp.*)/",
        ),
        (
            _OTHER_WEIGHTS,
            r"(?!vocab\.bin$).*\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|ot|gguf|ggml|onnx|onnx_data|tflite|pb|"
            r"mlmodel|nemo|engine)|.*\.(bin|h5|msgpack)\.index\.json|"
            r"(onnx|openvino|coreml|gguf|tflite|mlx|original|metal)/",
        ),
        (
            "parts of a diffusers pipeline",
            r"model_index\.json|(text_encoder|tokenizer|image_encoder)(_\d)?/|"
            r"(unet|vae|transformer|scheduler|safety_checker|feature_extractor)/",
        ),
        ("weights that are not merged", r".*\.safetensors(\.index\.json)?"),
        (
            "pictures",
            r".*\.(png|jpe?g|gif|svg|webp|bmp|ico|mp4|mov|webm|pdf)|(images?|assets|figures?|imgs?)/",
        ),
        ("code that no configuration names", r".*\.(py|ipynb|sh|cu|cuh|cpp|cc|h|c)"),
    )
)

_ORDER = (*(kind for kind, _ in _KINDS), _OTHERS)

#: Files of nearly every repository, and files that merges write about themselves: nobody misses them.
_USUAL = re.compile(
    r"\..*|__pycache__/|model\.sig|recipe\.yaml|recipe\.lock\.json|merge_report\.json|provenance\.json|"
    r"(.+\.)?(scores|outcomes)\.json|diagnosis\.json|mergekit_config\.ya?ml",
    re.IGNORECASE,
)
_CARD = re.compile(r"readme(\.\w+)?", re.IGNORECASE)

_SHOWN = 3


def kind_of_leftover(path: str) -> str:
    """Return the kind of a file, or of a folder with a slash at its end, that no loader needs; else empty."""
    name = _name(path)
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(name)), "")


def is_never_copied(path: str) -> bool:
    """Say whether a file is left behind even where something points to it.

    Pickles are: they can run code when they are opened, and their numbers cannot be read without that.
    """
    return _name(path).startswith((".", "__pycache__")) or kind_of_leftover(path) in (
        _TRAINING,
        _OTHER_WEIGHTS,
    )


def leftover_notices(left: Sequence[str], source: str) -> tuple[str, ...]:
    """Return lines that name what a merge leaves behind; none where nobody would miss it.

    Args:
        left: Paths of files, and of folders with a slash at their end, sorted.
        source: Name of the source whose other files are copied.
    """
    missed = [path for path in left if not _USUAL.fullmatch(_name(path))]
    kinds = _by_kind(missed)
    cards = kinds.pop(_CARD_KIND, [])
    told = [f"{kind} ({_examples(kinds[kind])})" for kind in _ORDER if kind in kinds]
    if not told:
        return ()  # a card alone is usual, and the merge writes its own
    told += [f"{card} (the merged model gets its own)" for card in cards[:1]]
    return (*_nested_pickles(missed, source), f"left behind from {source}: {'; '.join(told)}")


def _by_kind(paths: Sequence[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kind = _CARD_KIND if _CARD.fullmatch(path) else kind_of_leftover(path) or _OTHERS
        kinds.setdefault(kind, []).append(path)
    return kinds


def _nested_pickles(left: Sequence[str], source: str) -> tuple[str, ...]:
    """Return a line about weights of modules in sub-folders that are there as pickles only."""
    pickles = [path for path in left if "/" in path and path.endswith("/pytorch_model.bin")]
    if not pickles:
        return ()
    folder = pickles[0].rpartition("/")[0]
    return (
        f"{_examples(pickles)} of {source} is a pickle, which is not copied unread, and the merged model "
        "does not load without it. Where you trust it, write it as safetensors and merge again: "
        'python -c "import torch; from safetensors.torch import save_file; '
        "save_file(torch.load('pytorch_model.bin', weights_only=True), 'model.safetensors')\", "
        f"in {folder}",
    )


def _examples(paths: list[str]) -> str:
    more = len(paths) - _SHOWN
    return ", ".join(map(_shown, paths[:_SHOWN])) + (f" and {more:,} more" if more > 0 else "")


def _shown(path: str) -> str:
    return path if path.isprintable() and len(path) <= 100 else repr(path)[:100]


def _name(path: str) -> str:
    """Return the last part of a path, a folder's with its slash."""
    return path.removesuffix("/").rpartition("/")[2] + ("/" if path.endswith("/") else "")
