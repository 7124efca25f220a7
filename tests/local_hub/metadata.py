"""The YAML at the top of a card: what the Hub reads from it and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

_FRONT_MATTER = re.compile(
    r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)
_MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_KNOWN_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
_LICENSES = tuple(_KNOWN_LICENSES.split())


@dataclass(frozen=True)
class Findings:
    """What the Hub says about a card; errors stop a commit, warnings do not."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def body(self) -> dict[str, Any]:
        """Return the form in which the Hub answers."""
        body: dict[str, Any] = {
            "errors": [{"message": message} for message in self.errors],
            "warnings": [{"message": message} for message in self.warnings],
        }
        return body | ({"error": "Invalid metadata in README.md"} if self.errors else {})


def validate(content: str) -> Findings:
    """Check the front matter of a card as the Hub does before it accepts a commit.

    Covered: that it is a mapping; `license`; `base_model` and its relation; lists of names; `model-index`.
    """
    match = _FRONT_MATTER.match(content)
    if match is None:
        return Findings(warnings=("empty or missing yaml metadata in repo card",))
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return Findings(errors=(str(error),))
    if data is None:
        return Findings(warnings=("empty or missing yaml metadata in repo card",))
    if not isinstance(data, dict):
        return Findings(errors=("metadata must be of type object",))
    return Findings(errors=tuple(_faults(data)))


def card_data(content: str) -> dict[str, Any]:
    """Return the front matter of a card; nothing when there is none or it is not valid."""
    match = _FRONT_MATTER.match(content)
    if match is None or validate(content).errors:
        return {}
    return yaml.safe_load(match.group(1)) or {}


def tags(card: Mapping[str, Any]) -> list[str]:
    """Return the tags by which the Hub would list a repository."""
    found = [str(card[key]) for key in ("library_name", "pipeline_tag") if key in card]
    found += [str(tag) for tag in _listed(card.get("tags"))]
    found += [f"license:{name}" for name in _listed(card.get("license"))]
    found += [f"dataset:{name}" for name in _listed(card.get("datasets"))]
    bases = [str(name) for name in _listed(card.get("base_model"))]
    found += [f"base_model:{name}" for name in bases]
    if "base_model_relation" in card:
        found += [f"base_model:{card['base_model_relation']}:{name}" for name in bases]
    return [*dict.fromkeys(found), "region:us"]


def _faults(data: Mapping[str, Any]) -> Iterator[str]:
    if any(name not in _LICENSES for name in _listed(data.get("license"))):
        yield f'"license" must be one of [{", ".join(_LICENSES)}]'
    for name in _listed(data.get("base_model")):
        if not _MODEL_ID.fullmatch(str(name)):
            yield f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
    if data.get("base_model_relation", "merge") not in _RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]'
    yield from _list_faults(data)
    if "model-index" in data:
        yield from _model_index_faults(data["model-index"])


def _list_faults(data: Mapping[str, Any]) -> Iterator[str]:
    for key in ("tags", "datasets", "metrics"):
        value = data.get(key, [])
        if not isinstance(value, list):
            yield f'"{key}" must be an array'
        elif any(not isinstance(item, str) for item in value):
            yield f'"{key}" must contain strings'


def _model_index_faults(index: object) -> Iterator[str]:
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for position, model in enumerate(index):
        where = f"model-index[{position}]"
        yield from _missing(where, model, ("name", "results"))
        for number, result in enumerate(_items(model, "results")):
            here = f"{where}.results[{number}]"
            yield from _missing(here, result, ("task", "metrics"))
            yield from _missing(f"{here}.task", _item(result, "task"), ("type",))
            if _item(result, "dataset") is not None:
                yield from _missing(f"{here}.dataset", _item(result, "dataset"), ("type", "name"))
            for place, metric in enumerate(_items(result, "metrics")):
                yield from _missing(f"{here}.metrics[{place}]", metric, ("type", "value"))


def _missing(where: str, value: object, keys: tuple[str, ...]) -> Iterator[str]:
    """Report the keys that a mapping lacks; a missing mapping is reported by its parent."""
    if value is None:
        return
    if not isinstance(value, dict):
        yield f'"{where}" must be of type object'
        return
    for key in keys:
        if value.get(key) is None:
            yield f'"{where}.{key}" is required'
        elif key in ("results", "metrics") and not isinstance(value[key], list):
            yield f'"{where}.{key}" must be an array'


def _item(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _items(value: object, key: str) -> list[Any]:
    items = _item(value, key)
    return items if isinstance(items, list) else []


def _listed(value: object) -> list[Any]:
    """Return a list, whether one thing was written or several."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
