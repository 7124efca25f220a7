"""Kinds of models that configurations name: types, classes and their heads, compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from hub_magmax.errors import MismatchError
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.tensor_rules import TensorRule, takes_any

#: What some wrappers of models put before the name of a class.
_PREFIX = re.compile(r"(FSDP|FullyShardedDataParallel|DDP|DistributedDataParallel|Unsloth)(?=[A-Z])")

#: Classes of wrappers that do not tell what is inside them.
_WRAPPER = re.compile(
    r"PeftModel(For\w+)?|(PreTrained|Auto)Model(For\w+)?|\w*(Optimized|Scripted)Module|(Lightning)?Module|"
    r"(Distributed|FullySharded)?DataParallel|DeepSpeedEngine|Sequential"
)

#: Heads that generate text have several names.
_GENERATING = ("causallm", "conditionalgeneration", "seq2seqlm", "imagetexttotext")


def check_types(sources: Mapping[str, LockedSource]) -> None:
    """Raise MismatchError where two configurations name different types of model.

    Models of different types can have tensors of the same names and shapes (llama and mistral, say).
    """
    values = {name: (source.model_type or "",) for name, source in sources.items()}
    _check("model_type", sources, values, _type, "Check that it was fine-tuned from this base model")


def check_heads(sources: Mapping[str, LockedSource], rules: Sequence[TensorRule]) -> None:
    """Raise MismatchError where tensors agree, and two configurations name classes with different heads.

    Such classes may be meant where the recipe has rules for tensors, which say which head is kept. Other
    differences between names of classes do not count, such as those of wrappers
    (`FSDPLlamaForCausalLM`): if the tensors agree, it is the same model.
    """
    if not takes_any(rules):
        values = {name: source.architectures for name, source in sources.items()}
        advice = "If the models differ in their heads only, say under `tensors` which head to keep"
        _check("architectures", sources, values, _heads, advice)


def classes_of(source: LockedSource) -> str:
    """Return the names of a checkpoint's classes without those of wrappers; mostly it is one."""
    plain = [_PREFIX.sub("", name) for name in source.architectures]
    return ", ".join(name for name in plain if not _WRAPPER.fullmatch(name))


def _type(stated: tuple[str, ...]) -> str:
    """Return a `model_type` in one spelling; that of a model's text part is the whole model's."""
    return re.sub(r"[-_ .]", "", stated[0].lower().removesuffix("_text"))


def _heads(stated: tuple[str, ...]) -> str:
    """Return the tasks of classes' heads, empty where none is named."""
    found = {match[1].lower() for name in stated if (match := re.search(r"For([A-Z]\w*)$", name))}
    return ", ".join(sorted({_GENERATING[0] if head in _GENERATING else head for head in found}))


def _check(
    key: str,
    sources: Mapping[str, LockedSource],
    values: Mapping[str, tuple[str, ...]],
    kind_of: Callable[[tuple[str, ...]], str],
    advice: str,
) -> None:
    kinds = {name: kind for name, value in values.items() if (kind := kind_of(value))}
    for name, kind in kinds.items():
        first = next(iter(kinds))
        if kind != kinds[first]:
            theirs = f"{', '.join(values[first])} in {sources[first].label}"
            raise MismatchError(
                f"`{key}` is {', '.join(values[name])}, and {theirs}",
                where=f"{sources[name].label}, config.json",
                expected="checkpoints of one architecture",
                hint=f"{advice}; if only the name is wrong, correct `{key}` in the config.json "
                "that is wrong.",
            )
