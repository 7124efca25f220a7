"""Code blocks of the card: loading the model, checking it, its recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.front_matter import hub_id, valid_repo_id
from hub_magmax.reporting.model_kind import ModelKind
from hub_magmax.text import is_invisible, one_line


def checks(recipe: Recipe, lock: Lock, *, is_scored: bool, is_signed: bool) -> str:
    """Return the commands that verify, rebuild and score the model again, quoted for a shell."""
    target = shlex.quote(one_line(recipe.output.push_to_hub or Path(recipe.output.path).name))
    sources = " --from FOLDER" if any(source.commit is None for source in lock.every_file.values()) else ""
    data = " --from FOLDER" if lock.local_data else ""
    lines = [(f"verify {target}", "every file is as merged")]
    lines += [(f"verify {target} --rebuild{sources}", "merge again, and compare every byte")]
    lines += (
        [(f"verify {target} --public-key KEY", "it is signed by the owner of this key")] if is_signed else []
    )
    lines += (
        [(f"canary {target}{data}", "score it again, and compare example by example")] if is_scored else []
    )
    return "\n".join(f"hub-magmax {command}  # {what}" for command, what in lines)


def loading(recipe: Recipe, lock: Lock, kind: ModelKind, files: Sequence[str]) -> str:
    """Return Python code that loads the model, or the base model with the merged adapter, and runs it.

    Models of other tasks than `_RUNNING` knows, and of their own code, are only loaded.

    Args:
        recipe: Names its repository or its folder.
        lock: Pins the base model of an adapter.
        kind: Of the model; for an adapter of its base model.
        files: Of weights.
    """
    name = valid_repo_id(recipe.output.push_to_hub)
    if recipe.output.is_selection:
        return _applying(name or one_line(recipe.output.path))
    if not kind.library:
        return _tensors(name, one_line(recipe.output.path), files)
    place = json.dumps(name or one_line(recipe.output.path))
    if recipe.output.is_adapter:
        return _adapter(lock, kind, place)
    if kind.library == "sentence-transformers":
        loaded = f"from sentence_transformers import {kind.loader}\n\nmodel = {kind.loader}({place})"
        return f"{loaded}\n{_ENCODING[kind.loader]}"
    arguments = f"{place}, trust_remote_code=True" if kind.runs_code else place
    note = ["# This runs Python code that lies beside the weights; read it first."] if kind.runs_code else []
    lines = [*_imports(kind), "", *note, f"model = {kind.loader}.from_pretrained({arguments})"]
    return "\n".join([*lines, *_prepared(kind, arguments), *_running(kind)])


def _imports(kind: ModelKind) -> list[str]:
    image = ["from PIL import Image"] if any("Image.open" in line for line in _running(kind)) else []
    names = ", ".join(sorted(filter(None, (kind.loader, kind.inputs))))
    return [*image, f"from {kind.library} import {names}"]


#: Lines that run a model of sentence-transformers, by its class.
_ENCODING = {
    "SentenceTransformer": 'print(model.encode(["A sentence.", "Another one."]).shape)',
    "SparseEncoder": 'print(model.encode(["A sentence.", "Another one."]).shape)',
    "CrossEncoder": 'print(model.predict([("A question?", "An answer.")]))',
}

#: Lines that run a model of transformers, by its task and the class that prepares the inputs.
_RUNNING = {
    ("text-generation", "AutoTokenizer"): (
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "tokens = model.generate(",
        "    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=20",
        ")",
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
    ),
    ("text-classification", "AutoTokenizer"): (
        'logits = model(**tokenizer("Some text.", return_tensors="pt")).logits',
        "print(model.config.id2label[logits.argmax().item()])",
    ),
    ("image-classification", "AutoImageProcessor"): (
        'logits = model(**processor(Image.open("photo.jpg"), return_tensors="pt")).logits',
        "print(model.config.id2label[logits.argmax().item()])",
    ),
    ("zero-shot-image-classification", "AutoProcessor"): (
        'texts, image = ["a photo of a cat", "a photo of a dog"], Image.open("photo.jpg")',
        'inputs = processor(text=texts, images=image, padding=True, return_tensors="pt")',
        "print(model(**inputs).logits_per_image.softmax(dim=1))",
    ),
    ("feature-extraction", "AutoTokenizer"): (
        'print(model(**tokenizer("Some text.", return_tensors="pt")).last_hidden_state.shape)',
    ),
}


#: The same for one that writes text, with the chat template of its tokenizer.
_CHATTING = (
    'messages = [{"role": "user", "content": "Tell me a story."}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
    ")",
    "tokens = model.generate(",
    "    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=20",
    ")",
    "print(tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))",
)


def _running(kind: ModelKind) -> tuple[str, ...]:
    if kind.runs_code:
        return ()
    if kind.has_chat and kind.loader == "AutoModelForCausalLM" and kind.inputs == "AutoTokenizer":
        return _CHATTING
    return _RUNNING.get((kind.task, kind.inputs), ())


def _prepared(kind: ModelKind, arguments: str) -> list[str]:
    variable = "tokenizer" if kind.inputs == "AutoTokenizer" else "processor"
    return [f"{variable} = {kind.inputs}.from_pretrained({arguments})"] if kind.inputs else []


def _applying(place: str) -> str:
    lines = [
        "import hub_magmax as hm",
        "",
        "# This folder holds no weights: they are made of the checkpoints that are named below.",
        f'hm.apply({json.dumps(place)}, "weights")',
    ]
    return "\n".join(lines)


def _adapter(lock: Lock, kind: ModelKind, place: str) -> str:
    base = _arguments(lock.base_model)
    lines = [
        "from peft import PeftModel",
        *_imports(kind),
        "",
        f"base = {kind.loader}.from_pretrained({base})",
    ]
    lines += [f"model = PeftModel.from_pretrained(base, {place})", *_prepared(kind, base), *_running(kind)]
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


#: Keys of a recipe that do not change the model.
_ABOUT_SCORES = ("evaluation", "compare", "sweep")


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe makes the model, without defaults."""
    short = {"schema": recipe.schema_version} | recipe.portable.to_dict(defaults=False)
    short["method"] = {"name": recipe.method.name} | short.get("method", {})
    return {key: short[key] for key in short if key not in _ABOUT_SCORES}


def recipe_text(values: dict[str, Any]) -> str:
    """Return values as YAML; invisible characters are escaped, which YAML reads back as they were."""
    import yaml

    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(is_invisible(character) and character != "\n" for character in text):
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=False)
    return text
