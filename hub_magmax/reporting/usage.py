"""Code blocks of the card: loading the model, rebuilding it, its recipe."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from hub_magmax.evaluation.scores import Scores
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.front_matter import hub_id, valid_repo_id
from hub_magmax.text import is_invisible, one_line, publishable_values

#: By the Hub's name for a kind of model: the class that loads it and the class of its inputs.
_LOADERS = {
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor"),
    "text-classification": ("AutoModelForSequenceClassification", "AutoTokenizer"),
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer"),
    "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification", "AutoProcessor"),
}


def rebuild_arguments(recipe: Recipe, lock: Lock) -> str:
    """Return the arguments of `hub-magmax verify` that rebuild the model, quoted for a shell."""
    target = recipe.output.push_to_hub or Path(recipe.output.path).name
    local = any(source.commit is None for source in lock.sources.values())
    return shlex.quote(one_line(target)) + " --rebuild" + (" --from FOLDER" if local else "")


def loading(recipe: Recipe, lock: Lock, scores: Scores | None) -> str:
    """Return Python code that loads the model, or the base model with the merged adapter."""
    name = valid_repo_id(recipe.output.push_to_hub) or one_line(recipe.output.path)
    model, inputs = _LOADERS.get(scores.pipeline_tag if scores else "", (_model_class(recipe, lock), None))
    lines = [f"from transformers import {', '.join(sorted(filter(None, (model, inputs))))}", ""]
    place = json.dumps(name)
    if recipe.output.is_adapter:
        place = _arguments(lock.base_model)
        lines.insert(0, "from peft import PeftModel")
        lines += [f"base = {model}.from_pretrained({place})"]
        lines += [f"model = PeftModel.from_pretrained(base, {json.dumps(name)})"]
    else:
        lines += [f"model = {model}.from_pretrained({place})"]
    variable = "tokenizer" if inputs == "AutoTokenizer" else "processor"
    lines += [f"{variable} = {inputs}.from_pretrained({place})"] if inputs else []
    return "\n".join(lines)


def _model_class(recipe: Recipe, lock: Lock) -> str:
    """Return the class to load with where no evaluator names it; an adapter needs that of its training."""
    stated = lock.base_model.architectures[:1] if recipe.output.is_adapter else ()
    return next((name for name in stated if name.isidentifier()), "AutoModel")


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
