"""Code blocks of the card: loading the model, rebuilding it, its recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.front_matter import hub_id, valid_repo_id
from hub_magmax.reporting.model_kind import ModelKind
from hub_magmax.text import is_invisible, one_line, publishable_values


def rebuild_arguments(recipe: Recipe, lock: Lock) -> str:
    """Return the arguments of `hub-magmax verify` that rebuild the model, quoted for a shell."""
    target = recipe.output.push_to_hub or Path(recipe.output.path).name
    local = any(source.commit is None for source in lock.sources.values())
    return shlex.quote(one_line(target)) + " --rebuild" + (" --from FOLDER" if local else "")


def loading(recipe: Recipe, lock: Lock, kind: ModelKind, files: Sequence[str]) -> str:
    """Return Python code that loads the model, or the base model with the merged adapter.

    Args:
        recipe: Names its repository or its folder.
        lock: Pins the base model of an adapter.
        kind: Of the model; for an adapter of its base model.
        files: Of weights.
    """
    name = valid_repo_id(recipe.output.push_to_hub)
    if not kind.library:
        return _tensors(name, one_line(recipe.output.path), files)
    place = json.dumps(name or one_line(recipe.output.path))
    if recipe.output.is_adapter:
        return _adapter(lock, kind, place)
    if kind.library == "sentence-transformers":
        return f"from sentence_transformers import {kind.loader}\n\nmodel = {kind.loader}({place})"
    arguments = f"{place}, trust_remote_code=True" if kind.runs_code else place
    note = ["# This runs Python code that lies beside the weights; read it first."] if kind.runs_code else []
    lines = [_import(kind), "", *note, f"model = {kind.loader}.from_pretrained({arguments})"]
    return "\n".join([*lines, *_prepared(kind, arguments)])


def _import(kind: ModelKind) -> str:
    return f"from {kind.library} import {', '.join(sorted(filter(None, (kind.loader, kind.inputs))))}"


def _prepared(kind: ModelKind, arguments: str) -> list[str]:
    variable = "tokenizer" if kind.inputs == "AutoTokenizer" else "processor"
    return [f"{variable} = {kind.inputs}.from_pretrained({arguments})"] if kind.inputs else []


def _adapter(lock: Lock, kind: ModelKind, place: str) -> str:
    base = _arguments(lock.base_model)
    lines = ["from peft import PeftModel", _import(kind), "", f"base = {kind.loader}.from_pretrained({base})"]
    lines += [f"model = PeftModel.from_pretrained(base, {place})", *_prepared(kind, base)]
    return "\n".join(lines)


def _tensors(repo_id: str | None, folder: str, files: Sequence[str]) -> str:
    """Return code that reads the tensors of a model whose class nothing names."""
    whole = f"snapshot_download({json.dumps(repo_id)})" if repo_id else json.dumps(folder)
    fetch = ["from huggingface_hub import snapshot_download"] if repo_id else []
    lines = ["from pathlib import Path", "", *fetch, "from safetensors.torch import load_file", ""]
    if len(files) == 1:
        return "\n".join([*lines, f"tensors = load_file(Path({whole}) / {json.dumps(one_line(files[0]))})"])
    lines += [
        "tensors = {}",
        f'for file in Path({whole}).glob("*.safetensors"):',
        "    tensors |= load_file(file)",
    ]
    return "\n".join(lines)


def _arguments(base: LockedSource) -> str:
    """Return the arguments of `from_pretrained` for a source."""
    if (repo_id := hub_id(base)) is not None:
        return f"{json.dumps(repo_id)}, revision={json.dumps(base.commit)}"
    return json.dumps(one_line(base.reference))


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML; invisible characters are escaped, which YAML reads back as they were."""
    import yaml

    values = publishable_values(recipe.portable.to_dict())
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(is_invisible(character) and character != "\n" for character in text):
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=False)
    return text
