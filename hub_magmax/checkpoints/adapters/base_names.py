"""Base models that adapters say they were trained on, compared with that of the merge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.text import shown

#: Ends of names under which quantised copies of a model are kept: they are the same base model.
_QUANTISED = re.compile(
    r"([-_.](unsloth|bnb|gptq|awq|gguf|exl2|hqq|fp8|fp4|fp16|bf16|fp32|f16|nf4|int[48]|q\d\w*|[48]-?bits?|w\d+a\d+|"
    r"dynamic|quantized|quantised|dequantized))+$",
    re.IGNORECASE,
)

#: Names of folders that say nothing of a model.
_UNTOLD = re.compile(
    r"|\.+|(base|best|final|last|init|hf|my|pretrained|sft|dpo|rl|full|the)?[-_ ]?"
    r"(base|models?|weights|checkpoints?|ckpt|outputs?|out|merged|final|last|tmp|temp|data|sft|dpo)[-_ ]?\d*|"
    r"tmp\w*|\d+|[0-9a-f]{12,}",
    re.IGNORECASE,
)

_CACHE = re.compile(r".*models--([^/\\]+)[/\\]snapshots[/\\].*")


def other_base(
    task: str, adapter_config: Mapping[str, Any], base: LockedSource, base_config: Mapping[str, Any]
) -> str | None:
    """Return a line if an adapter names another base model, or another commit of it, than the merge has.

    Models are compared by the last part of their names: the same one lies under other owners and in folders,
    and quantised. Where either side has no name that tells, there is nothing to compare.

    Args:
        task: The adapter's.
        adapter_config: Values of its configuration.
        base: The base model of the merge.
        base_config: Values of its config.json.
    """
    stated, commit = adapter_config.get("base_model_name_or_path"), adapter_config.get("revision")
    names = [base.repo_id] if base.repo_id else [base.reference, base_config.get("_name_or_path")]
    known = {name: model for name in names if (model := _model(name))}
    trained_on = _model(stated)
    if known and trained_on and trained_on not in known.values():
        return (
            f"{task} is an adapter that was trained on {shown(stated)}, and the base model is "
            f"{' or '.join(map(shown, known))}: it fits only if the weights of both are the same"
        )
    if base.commit and _is_commit(commit) and commit != base.commit:
        return (
            f"{task} is an adapter that was trained on {shown(stated)} at {commit[:7]}, and the base model "
            f"is at {base.commit[:7]}"
        )
    return None


def _is_commit(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and re.fullmatch(r"[0-9a-f]{40}", name) is not None


def _model(name: Any) -> str:
    """Return the part of a name that tells the model, in one spelling; empty where no part does."""
    if not isinstance(name, str):
        return ""
    if match := _CACHE.fullmatch(name):
        name = match[1].replace("--", "/")
    last = re.split(r"[/\\]", name.rstrip("/\\ "))[-1]
    if _UNTOLD.fullmatch(last):
        return ""
    return re.sub(r"[-_. ]", "", _QUANTISED.sub("", last).lower())
