"""The model card: facts that were measured, turned into text.

Everything a card says comes from the recipe, its lock, the report of the merge and the scores;
what was not measured is shown as such. Text that other people wrote is shown as code (see
`markdown`), and nothing that belongs to one machine alone appears.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from hub_magmax import methods
from hub_magmax.evaluation.guards import check_guards
from hub_magmax.evaluation.intervals import NUM_RESAMPLES, Difference
from hub_magmax.evaluation.scores import MERGED, Score, Scores, quantized_name
from hub_magmax.evaluation.tails import LEVELS, MIN_TAIL_EXAMPLES, Damage, damage
from hub_magmax.evaluation.tradeoff import Tradeoff, best_single, task_tradeoffs, weighted_mean
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import DatasetId, Language
from hub_magmax.registry import METHODS
from hub_magmax.reporting.diagnosis import (
    HEAT_MAP_NAME,
    THRESHOLDS,
    Diagnosis,
    verdict,
)
from hub_magmax.reporting.licence import License, combined_license
from hub_magmax.reporting.tradeoff_surface import EXPLORER_NAME
from hub_magmax.reporting.units import Unit
from hub_magmax.text import (
    Markdown,
    code,
    fenced,
    format_bytes,
    is_invisible,
    listed,
    one_line,
    publishable,
    publishable_values,
    visible_json,
)

TEMPLATE_NAME = "model_card.md.jinja"


#: By the Hub's name for a kind of model: the class that loads it and the class of its inputs.
_LOADERS = {
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor"),
    "text-classification": ("AutoModelForSequenceClassification", "AutoTokenizer"),
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer"),
    "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification", "AutoProcessor"),
}

#: Tasks named in the first sentence; the table names all of them.
_MAX_NAMED = 6


@dataclass(frozen=True)
class Beside:
    """What lies beside a card.

    Attributes:
        explorer: Whether there is a page to explore other preferences with.
        diagnosis: Of the checkpoints, together with its heat map.
    """

    explorer: bool = False
    diagnosis: Diagnosis | None = None


NOTHING = Beside()


def render_card(
    recipe: Recipe,
    lock: Lock,
    report: MergeReport,
    scores: Scores | None = None,
    *,
    picture: str | None = None,
    beside: Beside = NOTHING,
    repo_id: str | None = None,
) -> str:
    """Return the whole README.md of a merged model.

    Args:
        recipe: What was asked for.
        lock: What it stood for.
        report: What the merge did.
        scores: What was measured; None says that nothing was.
        picture: Name of a picture beside the card, as `figures.draw_tradeoff` writes it.
        beside: What else lies in the folder and is linked or told.
        repo_id: Repository the card is for, where the recipe names none or another one.

    Raises:
        RecipeError: If the locked method is not installed here.
    """
    method = methods.get_method(lock.method["name"])
    named = recipe
    if repo_id is not None:
        named = recipe.model_copy(
            update={"output": recipe.output.model_copy(update={"push_to_hub": repo_id})}
        )
    license_ = combined_license(
        [source.license and publishable(source.license) for source in lock.sources.values()],
        recipe.output.license and publishable(recipe.output.license),
    )
    lock_values = json.loads(lock.to_json())
    rows = task_tradeoffs(scores, {task: lock.preference.weights[task] for task in lock.tasks})
    unit = Unit(scores.is_share if scores else True)
    facts = {
        "front_matter": Markdown(_front_matter(named, lock, scores, license_)),
        "title": _model_name(named),
        "headline": _headline(lock, rows, scores, unit, ignored=not method.uses_preference),
        "picture": Markdown(quote(Path(picture).name)) if picture else None,
        "explorer": Markdown(EXPLORER_NAME) if beside.explorer else None,
        "diagnosis": beside.diagnosis,
        "verdict": _verdict(beside.diagnosis),
        "thresholds": THRESHOLDS,
        "heat_map": Markdown(HEAT_MAP_NAME),
        "rows": rows,
        "unit": unit,
        "num_resamples": NUM_RESAMPLES,
        "paired": any(row.own_difference or row.base_difference for row in rows),
        "weighted": _weighted(rows, scores),
        "guards": check_guards(recipe.evaluation, scores),
        "levels": LEVELS,
        "min_tail": MIN_TAIL_EXAMPLES,
        "damages": _some(damage(row.own, row.merged) for row in rows),
        "rounded": _rounded(scores, rows),
        "unmeasured": {row.task: Markdown(_unmeasured(row)) for row in rows if _unmeasured(row)},
        "lock": lock,
        "report": report,
        "scores": scores,
        "recipe": recipe,
        "method": method,
        "summary": Markdown(method.summary) if method.name in METHODS.built_in else method.summary,
        "options": {key: value for key, value in lock.method.items() if key not in ("name", "scaling")},
        "license": license_,
        "shortened": any(publishable_values(values) != values for values in (recipe.to_dict(), lock_values)),
        "paper": _arxiv_number(method.source),
        "bibtex": method.paper and method.paper.bibtex,
        "loading": _loading(named, lock, scores),
        "rebuild_arguments": Markdown(_rebuild_arguments(named, lock)),
        "recipe_text": _recipe_text(recipe),
        "lock_text": visible_json(publishable_values(lock_values)),
    }
    text: str = _environment(unit).get_template(TEMPLATE_NAME).render(facts)
    return text.rstrip() + "\n"


def _environment(unit: Unit) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Not HTML: in place of autoescaping, `_shown` makes every value inert that is not `Markdown`.
    environment = Environment(  # noqa: S701
        loader=PackageLoader("hub_magmax.reporting", ""),
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": lambda count: Markdown(format_bytes(count)),
        "count": lambda number: Markdown(f"{number:,}"),
        "fenced": fenced,
        "markdown": Markdown,
        "number": _number,
        "pairs": _pairs,
        "plain": _plain,
        "words": lambda name: code(str(name).replace("_", " ")),
        "mean": lambda value: Markdown(unit.value(value)),
        "difference": partial(_difference, unit),
        "score": partial(_score, unit),
        "source": _source,
        "level": lambda level: Markdown(f"{level:.2f}".removeprefix("0")),
        "tail": partial(_tail, unit),
        "flips": _flips,
        "worst": _worst,
    }
    return environment


def _shown(value: Any) -> str:
    """Return what the template writes for `value`: foreign text as code, a missing value as a dash."""
    if isinstance(value, Markdown):
        return value
    if value is None:
        return "—"
    return str(value) if isinstance(value, int) else code(str(value))


def _number(value: float | None) -> Markdown | None:
    return None if value is None else Markdown(f"{value:.4g}")


def _plain(value: Any) -> Markdown:
    """Return a number, an interval, or either of them by name."""
    if isinstance(value, Mapping):
        return Markdown(", ".join(f"{code(str(name))} {_plain(item)}" for name, item in value.items()))
    if isinstance(value, list | tuple):
        return Markdown(" to ".join(_plain(item) for item in value))
    if type(value) in (int, float):
        return Markdown(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    return Markdown(_shown(value))


def _rebuild_arguments(recipe: Recipe, lock: Lock) -> str:
    """Return what follows `hub-magmax verify`, quoted for a shell."""
    target = recipe.output.push_to_hub or Path(recipe.output.path).name
    local = any(source.commit is None for source in lock.sources.values())
    return shlex.quote(one_line(target)) + " --rebuild" + (" --from FOLDER" if local else "")


def _pairs(values: Mapping[str, Any]) -> Markdown:
    """Return "name value, name value": counts with separators, everything else as `_shown` has it."""
    shown = ((name, f"{v:,}" if type(v) is int else _shown(v)) for name, v in values.items())
    return Markdown(", ".join(f"{code(name)} {value}" for name, value in shown))


def _difference(unit: Unit, mean: float | None, found: Difference | None) -> Markdown | None:
    """Return a difference of two scores, with its interval where there is one."""
    if mean is None:
        return None
    interval = f" [{unit.change(found.low)}, {unit.change(found.high)}]" if found else ""
    return Markdown(unit.change(mean) + interval)


def _score(unit: Unit, score: Score | None) -> Markdown | None:
    """Return a score and its interval."""
    if score is None:
        return None
    return Markdown(f"{unit.value(score.value)} [{unit.value(score.low)}, {unit.value(score.high)}]")


def _verdict(found: Diagnosis | None) -> Markdown | None:
    """Return whether the checkpoints were fit to be merged, with the names of those that were not."""
    if found is None:
        return None
    return Markdown(verdict([code(task) for task in found.suspects], notes=bool(found.findings)))


def _some(damages: Iterable[Damage | None]) -> list[Damage]:
    return [found for found in damages if found is not None]


def _rounded(scores: Scores | None, rows: Sequence[Tradeoff]) -> dict[str, list[Damage]]:
    """Return what rounding the merged model's weights did to each task, by bits."""
    prefix = quantized_name("")
    models = dict.fromkeys(score.model for score in scores.scores) if scores else {}
    found = {
        model.removeprefix(prefix): _some(
            damage(row.merged, scores.get(model, row.task)) for row in rows if scores
        )
        for model in models
        if model.startswith(prefix)
    }
    return {bits: damages for bits, damages in found.items() if damages}


def _tail(unit: Unit, found: Damage, level: float) -> Markdown | None:
    """Return the CVaR of a damage with its interval."""
    tail = found.tail(level)
    if tail is None:
        return None
    shown = Unit(is_share=True) if found.in_probability else unit
    return Markdown(f"{shown.value(tail.value)} [{shown.value(tail.low)}, {shown.value(tail.high)}]")


def _flips(found: Damage) -> Markdown | None:
    """Return how many right answers became wrong, of how many, and their share with its interval."""
    if found.flip_rate is None or found.flip_interval is None:
        return None
    rate, low, high = (f"{100 * share:.1f}" for share in (found.flip_rate, *found.flip_interval))
    return Markdown(f"{found.flipped:,} of {found.right_before:,}: {rate} % [{low}, {high}]")


def _worst(found: Damage) -> Markdown | None:
    """Return the worst examples by their number in the data, with what each model made of them."""
    named = (f"{one.index} ({one.before:.3g} → {one.after:.3g})" for one in found.worst)
    return Markdown(", ".join(named)) or None


def _source(source: LockedSource) -> Markdown:
    """Return a source's commit, linked where it is on the Hub."""
    from huggingface_hub import constants

    if not source.commit:
        return Markdown("—")
    if not _hub_id(source) or not re.fullmatch(r"[0-9a-f]{40}", source.commit):
        return code(source.commit)
    link = f"{constants.ENDPOINT}/{source.repo_id}/tree/{source.commit}"
    return Markdown(f"[`{source.commit[:12]}`]({link})")


def _headline(
    lock: Lock, rows: Sequence[Tradeoff], scores: Scores | None, unit: Unit, *, ignored: bool
) -> Markdown:
    """Return what was merged, for which preference, and what it cost, as one sentence."""
    checkpoints = f"{len(rows)} checkpoints" if len(rows) > 1 else "One checkpoint"
    asked = _asked(rows) + (", which the method ignores" if ignored else "")
    cost = _cost(rows, scores.metric, unit) if scores else "what it cost was not evaluated"
    base = code(lock.base_model.label)
    return Markdown(
        f"{checkpoints} fine-tuned from {base}, merged by {code(lock.method['name'])} for {asked}; {cost}."
    )


def _asked(rows: Sequence[Tradeoff]) -> str:
    if len({row.preference for row in rows}) == 1 and len(rows) > 1:
        return f"the same preference for each of {listed([code(row.task) for row in rows], _MAX_NAMED)}"
    first = sorted(rows, key=lambda row: -row.preference) if len(rows) > _MAX_NAMED else rows
    return f"the preference {listed([f'{code(row.task)} {row.preference:.4g}' for row in first], _MAX_NAMED)}"


def _cost(rows: Sequence[Tradeoff], metric: str, unit: Unit) -> str:
    for attribute, reference in (("to_own", "each task's own checkpoint"), ("to_base", "the base model")):
        changes = [(row, getattr(row, attribute)) for row in rows if getattr(row, attribute) is not None]
        if changes:
            return _change(changes, f"compared with {reference}", metric, unit)
    values = [row.merged.value for row in rows if row.merged]
    if not values:
        return "the merged model was not evaluated"
    mean = unit.value(sum(values) / len(values)) + unit.sign
    return f"{code(metric)} over {_tasks(len(values))} {mean} on average"


def _change(changes: Sequence[tuple[Tradeoff, float]], compared: str, metric: str, unit: Unit) -> str:
    mean = sum(change for _, change in changes) / len(changes)
    row, most = max(changes, key=lambda pair: abs(pair[1]))
    assert row.merged is not None
    before, after = (unit.value(value) + unit.sign for value in (row.merged.value - most, row.merged.value))
    return (
        f"{compared}, {code(metric)} changes by {unit.change(mean)}{unit.difference_name} on average over "
        f"{_tasks(len(changes))}, most on {code(row.task)} ({before} → {after})"
    )


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"


def _weighted(rows: Sequence[Tradeoff], scores: Scores | None) -> dict[Markdown, float]:
    """Return means weighted by the preference, by model; empty if the merged model lacks one that counts."""
    weights = [row.preference for row in rows]
    means = {
        "merged": weighted_mean([row.merged for row in rows], weights),
        "base model": weighted_mean([row.base for row in rows], weights),
        "each task by its own checkpoint": weighted_mean([row.own for row in rows], weights),
    }
    if scores is None or means["merged"] is None:
        return {}
    if best := best_single(scores, {row.task: row.preference for row in rows}):
        means[f"best single checkpoint, {code(best[0])}"] = best[1]
    return {Markdown(name): mean for name, mean in means.items() if mean is not None}


def _unmeasured(row: Tradeoff) -> str:
    """Return what was not scored on a task, in words; empty if nothing is missing."""
    models = {"the base model": row.base, "its own checkpoint": row.own, "the merged model": row.merged}
    absent = [name for name, score in models.items() if score is None]
    return "nothing was scored" if len(absent) == len(models) else ", ".join(absent)


def _model_name(recipe: Recipe) -> str:
    return _repo_id(recipe.output.push_to_hub) or one_line(Path(recipe.output.path).name) or "merged"


def _repo_id(text: str | None) -> str | None:
    """Return `text` if it can be a repository on the Hub, else None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text or "")
    except HFValidationError:
        return None
    return text


def _hub_id(source: LockedSource) -> str | None:
    return _repo_id(source.repo_id)


def _front_matter(recipe: Recipe, lock: Lock, scores: Scores | None, license_: License) -> str:
    from huggingface_hub import ModelCardData, constants

    sources = [lock.base_model] if recipe.output.is_adapter else [*lock.sources.values()]
    base_models = list(dict.fromkeys(filter(None, map(_hub_id, sources))))
    repo_id = _repo_id(recipe.output.push_to_hub)
    results = _eval_results(scores) if scores else []
    pipeline_tag = scores.pipeline_tag if scores else ""
    return ModelCardData(
        base_model=base_models or None,
        base_model_relation=("adapter" if recipe.output.is_adapter else "merge") if base_models else None,
        language=_said(recipe.output.language, [s.languages for s in lock.sources.values()], Language),
        datasets=_said(recipe.output.datasets, [s.datasets for s in lock.sources.values()], DatasetId),
        library_name="peft" if recipe.output.is_adapter else "transformers",
        pipeline_tag=pipeline_tag if re.fullmatch(r"[a-z0-9-]{1,64}", pipeline_tag) else None,
        license=license_.id,
        license_name=license_.name,
        license_link=f"{constants.ENDPOINT}/{repo_id}#licence" if license_.name and repo_id else None,
        tags=["merge", "hub_magmax", one_line(lock.method["name"])],
        eval_results=results or None,
        model_name=_model_name(recipe) if results else None,
    ).to_yaml()


def _said(own: Sequence[str] | None, stated: Sequence[Sequence[str] | None], kind: Any) -> list[str] | None:
    """Return what the recipe says, or else all that the sources' cards do and that is of this kind."""
    if own is not None:
        return list(own) or None
    adapter, found = TypeAdapter(kind), []
    for text in dict.fromkeys(text for texts in stated for text in texts or ()):
        with suppress(ValidationError):
            found.append(adapter.validate_python(text))
    return found or None


def _eval_results(scores: Scores) -> list[Any]:
    """Return the merged model's scores, each tied to the data it was measured on."""
    from huggingface_hub import EvalResult

    def described(task: str, key: str) -> str | None:
        value = scores.data.get(task, {}).get(key)
        return None if value is None else one_line(str(value))

    return [
        EvalResult(
            task_type=one_line(scores.pipeline_tag),
            dataset_type=described(score.task, "dataset") or "unknown",
            dataset_name=described(score.task, "dataset") or "unknown",
            dataset_config=described(score.task, "config"),
            dataset_split=described(score.task, "split"),
            dataset_revision=described(score.task, "revision"),
            metric_type=one_line(scores.metric),
            # Tasks can share a data set and a split: only this name tells their results apart.
            metric_name=f"{one_line(scores.metric)} on {score.task}",
            metric_value=score.value,
        )
        for score in scores.scores
        if score.model == MERGED
    ]


def _arxiv_number(source: str) -> Markdown | None:
    match = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", source)
    return Markdown(match[1]) if match else None


def _loading(recipe: Recipe, lock: Lock, scores: Scores | None) -> str:
    """Return the Python that loads the model, or what was merged into an adapter."""
    name = _repo_id(recipe.output.push_to_hub) or one_line(recipe.output.path)
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
    """Return what `from_pretrained` takes to load a source."""
    if _hub_id(base):
        return f"{json.dumps(base.repo_id)}, revision={json.dumps(base.commit)}"
    return json.dumps(one_line(base.reference))


def _recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML; invisible characters are escaped, which YAML reads back as they were."""
    import yaml

    values = publishable_values(recipe.to_dict())
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(is_invisible(character) and character != "\n" for character in text):
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=False)
    return text
