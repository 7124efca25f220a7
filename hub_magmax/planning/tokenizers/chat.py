"""Chat templates: of a source, by name, or of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hub_magmax.errors import RecipeError

#: The file of a template, and an older one of processors.
TEMPLATE_NAME, OLD_NAME = "chat_template.jinja", "chat_template.json"

#: Messages between `<|im_start|>` with the role, and `<|im_end|>`.
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Templates by name, with the tokens that they write.
NAMED: Mapping[str, tuple[str, tuple[str, ...]]] = {"chatml": (_CHATML, ("<|im_start|>", "<|im_end|>"))}


def template_of(files: Mapping[str, bytes], source: str) -> str:
    """Return the chat template of a source.

    Args:
        files: Its tokenizer's files by path.
        source: Its name.

    Raises:
        RecipeError: If it has none.
    """
    if TEMPLATE_NAME in files:
        return files[TEMPLATE_NAME].decode("utf-8", "replace")
    for path in (OLD_NAME, "tokenizer_config.json"):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            if (found := _stated(json.loads(files[path])["chat_template"])) is not None:
                return found
    raise RecipeError(
        f"{source} has no chat template",
        key=("tokenizer", "chat_template"),
        expected=f"{TEMPLATE_NAME}, or chat_template in tokenizer_config.json",
        hint="Name another source, a file, or chatml.",
    )


def _stated(value: Any) -> str | None:
    """Return a template, or of several by name the default one."""
    if isinstance(value, str):
        return value
    named = {entry["name"]: entry["template"] for entry in value}
    return str(named["default"]) if "default" in named else None
