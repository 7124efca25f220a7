"""Keys of configurations that change what a model computes and differ between checkpoints.

Configurations of one model differ in many keys that change nothing: names, versions, dtypes, what is for
training alone, and defaults that one version of transformers writes and another does not. So no key of
`_NO_FUNCTION` counts, and one that only one side states counts only where stating it switches something on
(`_OFF_IF_ABSENT`), or where transformers takes another value for the other side. Keys that were renamed are
compared under one name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hub_magmax.checkpoints.config import CONFIG_NAME, with_special_floats
from hub_magmax.checkpoints.names.model_classes import as_loaded
from hub_magmax.planning.findings.finding import Finding
from hub_magmax.text import number_of, shown, shown_apart

GENERATION = "generation_config.json"

#: Files whose keys are compared; those of tokenizers are compared whole (`side_files.tokenizer_notices`).
_COMPARED = re.compile(
    r"(.*/)?(config|generation_config|(\w+_)?(pre)?processor_config|scheduler_config|model_index|modules|"
    r"sentence_\w+_config|config_sentence_transformers|open_clip_config|params)\.json"
)

#: Keys that change nothing that the merged model computes, or that are decided elsewhere: types and classes
#: (`fitting.architectures`), labels (`checkpoints.rows.labels`), ties and sizes (by the tensors).
_NO_FUNCTION = re.compile(
    r"_(?!class_name).*|name_or_path|.*version.*|.*dtype|.*cache.*|architectures|model_type|auto_map|license|"
    r"id2label|label2id|num_labels|vocab_size|tie_(word|encoder)_\w+|(tokenizer|processor)_class|"
    r"(image_processor|feature_extractor|video_processor)_type|quantization_config|trust_remote_code|"
    r".*attn_impl\w*|use_(flash|bfloat16|memory)\w*|unsloth\w*|output_\w+|return_\w+|torchscript|"
    r"chunk_size_feed_forward|pretraining_tp|keys_to_ignore_at_inference|gradient_checkpointing\w*|"
    r"\w*dropout\w*|\w*(pdrop|layerdrop|drop_rate|drop_path\w*)|initializer_\w+|\w*_init(_\w+|ializer\w*)?|"
    r"\w*loss\w*|\w*_coef|label_smoothing|problem_type|finetuning_task|task_specific_params|"
    r"apply_spec_augment|mask_(time|feature)_\w+|pad_token_id"
)

#: Keys whose absence means off: they count even where only one of two configurations states them.
_OFF_IF_ABSENT = re.compile(
    r".*rope.*|.*scaling.*|.*window.*|.*softcap.*|.*multiplier|.*logit_scale.*|.*alibi.*"
)

#: Values of such keys that say the same as not stating them.
_OFF: tuple[Any, ...] = (None, False, 0, 1, "", "default", [])

#: Divisions of a tensor's rows that its shape does not tell: under another one its values mean nothing.
_HEADS = re.compile(r"(num_|n_)?(\w+_)?(attention_|key_value_|kv_)?heads?|num_query_groups|head_dim")

#: Keys that became parts of `rope_parameters`, and their names there.
_IN_ROPE = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "rope_local_base_freq": "sliding_attention.rope_theta",
}

#: Kinds of rotary embeddings that belong to a class of models, and that other versions leave to it.
_OWN_ROPE = ("mrope", "axial")

_ROPE_KEYS = ("rope_scaling", "rope_parameters", *_IN_ROPE)

#: What configurations mean that do not state these.
_ROPE_DEFAULTS = {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 1}
_GENERATION_DEFAULTS = {"max_length": 20, "top_k": 50}

#: Differences that a line lists.
_MOST_LISTED = 6

#: A key and those that it lies under, and values by them.
_Key = tuple[str, ...]
_Flat = Mapping[_Key, Any]


def is_compared(path: str) -> bool:
    """Say whether the keys of a file beside the weights are compared."""
    return _COMPARED.fullmatch(path) is not None


def config_findings(contents: Mapping[str, Mapping[str, bytes]], files_from: str) -> tuple[Finding, ...]:
    """Return a finding for each file, and group of checkpoints that differ in the same way in it.

    Args:
        contents: By source, its compared files by name. Those that are no JSON count as absent.
        files_from: The source whose files the merged model gets.
    """
    parsed: dict[str, dict[str, Any]] = {}  # by file, then by source
    for source, files in contents.items():
        for path, content in sorted(files.items()):
            if (values := _parsed(content)) is not None:
                parsed.setdefault(path, {})[source] = values
    configs = parsed.get(CONFIG_NAME, {})
    return tuple(
        finding for path, found in parsed.items() for finding in _in_file(path, found, configs, files_from)
    )


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        found = with_special_floats(json.loads(content))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else {"": found}


def _in_file(
    path: str, found: Mapping[str, dict[str, Any]], configs: Mapping[str, dict[str, Any]], files_from: str
) -> Iterator[Finding]:
    if path == GENERATION:  # it is made of the model's configuration where there is none
        found = {files_from: {}, **found}
        found = {source: _stops(configs.get(source, {})) | values for source, values in found.items()}
    if files_from not in found:
        text = f"{path} is in {', '.join(found)} and not in {files_from}, whose files the merged model gets"
        yield Finding("config", next(iter(found)), text, False)
        return
    flat = _flattened(found)
    groups: dict[tuple[str, ...], list[str]] = {}
    taken = _Taken(found if path == CONFIG_NAME else {})
    for source, values in flat.items():
        heads, others = _differences(
            path,
            taken.beside(source, values, flat[files_from]),
            taken.beside(files_from, flat[files_from], values),
        )
        if heads:
            yield Finding("heads", source, _heads_text(path, source, files_from, heads), True)
        if others:
            groups.setdefault(others, []).append(source)
    for group, sources in groups.items():
        yield Finding("config", sources[0], _group_text(path, sources, files_from, group), False)


class _Taken:
    """Values that transformers takes where configurations do not state them.

    Args:
        configs: By source, its config.json.
    """

    def __init__(self, configs: Mapping[str, dict[str, Any]]) -> None:
        self._configs = configs
        self._read: dict[str, Mapping[str, Any]] = {}

    def beside(self, source: str, values: _Flat, other: _Flat) -> _Flat:
        """Return a source's values with those that it takes where only the other one states one.

        Numbers of things are left out: shapes tell them, and a short configuration does not.
        """
        if source not in self._configs:
            return values
        asked = [key for key in other if key not in values and _is_taken(key, other[key])]
        if asked and source not in self._read:
            self._read[source] = as_loaded(self._configs[source])
        taken = {key: _at(key, self._read[source]) for key in asked}
        return {**values, **{key: value for key, value in taken.items() if value is not None}}


def _is_taken(key: _Key, stated: Any) -> bool:
    is_known = _is_ignored(key) or any(_OFF_IF_ABSENT.fullmatch(part) for part in key)
    return isinstance(stated, (bool, float, str)) and not is_known


def _at(key: _Key, values: Mapping[str, Any]) -> Any:
    """Return the value that a key leads to, at the top or in the part for text."""
    for root in (values, values.get("text_config")):
        found: Any = root
        for part in key:
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return found
    return None


def _heads_text(path: str, source: str, files_from: str, told: Sequence[str]) -> str:
    return (
        f"{path} of {source} divides the same tensors into other heads than that of {files_from}: "
        f"{', '.join(told)}"
    )


def _group_text(path: str, sources: list[str], files_from: str, told: Sequence[str]) -> str:
    more = f" and {number_of(len(told) - _MOST_LISTED, 'more key')}" if len(told) > _MOST_LISTED else ""
    return (
        f"{path} of {', '.join(sources)} differs from that of {files_from}, which the merged model gets: "
        f"{', '.join(told[:_MOST_LISTED])}{more}"
    )


def _told(key: _Key, values: _Flat, kept: _Flat) -> str:
    if key in values and key in kept:
        own, other = shown_apart(values[key], kept[key], 60)
    else:
        own, other = (shown(found[key], 60) if key in found else "not stated" for found in (values, kept))
    return f"{'.'.join(key) or 'its content'} is {own}, there {other}"


def _stops(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what generation takes from the model's configuration where its own does not state it."""
    return {key: value for key, value in config.items() if key.endswith("token_id") and value is not None}


def _differences(path: str, values: _Flat, kept: _Flat) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what is told of differing keys: of those that divide tensors into heads, and of all others."""
    keys = dict.fromkeys([*kept, *values])
    found = [key for key in keys if not _is_ignored(key) and not _is_same(path, key, values, kept)]
    told = {key: _told(key, values, kept) for key in found}
    heads = tuple(text for key, text in told.items() if _divides(key, values) and _divides(key, kept))
    return heads, tuple(text for text in told.values() if text not in heads)


def _divides(key: _Key, values: _Flat) -> bool:
    return isinstance(values.get(key), int) and _HEADS.fullmatch(key[-1]) is not None


def _is_ignored(key: _Key) -> bool:
    return any(_NO_FUNCTION.fullmatch(part) for part in key)


def _is_same(path: str, key: _Key, values: _Flat, kept: _Flat) -> bool:
    one, other = _plain(values.get(key)), _plain(kept.get(key))
    if one is not None and other is not None:
        return bool(one == other)
    stated = other if one is None else one
    is_off = stated is not True and stated in _OFF
    if path == GENERATION:
        return is_off or stated == _GENERATION_DEFAULTS.get(key[-1])
    return is_off or not any(_OFF_IF_ABSENT.fullmatch(part) for part in key)


def _plain(value: Any) -> Any:
    """Return the only item of a list, or texts in one text as some configurations have them, for the list."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "|".join(value)
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _flattened(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[_Key, Any]]:
    """Return all values by the keys that lead to them, with keys that mean the same under one name."""
    canonical = {source: _canonical(values) for source, values in found.items()}
    if not all("text_config" in values for values in canonical.values()):  # old ones have it at the top
        for source, values in canonical.items():
            canonical[source] = values.pop("text_config", {}) | values
    return {source: dict(_leaves(values)) for source, values in canonical.items()}


def _leaves(values: Mapping[str, Any], above: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, and those in it, as transformers 5 writes them, without what is not used."""
    found = {
        key: _canonical(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in values.items()
        if key not in _ROPE_KEYS
    }
    for key in ("size", "crop_size"):  # of images: a number, or by side
        if isinstance(found.get(key), dict) and len(sides := {*found[key].values()}) == 1:
            found[key] = sides.pop()
    found |= _as_read(found)
    rope = _rope(values)
    return found | ({"rope_parameters": rope} if rope else {})


def _as_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers takes instead of values that are stated."""
    found: dict[str, Any] = {}
    if values.get("use_sliding_window") is False:
        found |= {"sliding_window": None, "max_window_layers": None}
    if str(values.get("model_type")).startswith("gemma") and values.get("hidden_act") == "gelu":
        found["hidden_act"] = "gelu_pytorch_tanh"
    return found


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of rotary embeddings, stated in several places, without defaults."""
    found: dict[str, Any] = {new: values[old] for old, new in _IN_ROPE.items() if old in values}
    for part in (values.get("rope_scaling"), values.get("rope_parameters")):
        found |= dict(_by_layer(part)) if isinstance(part, dict) else {}
    kind = found.get("rope_type", found.pop("type", None))
    found["rope_type"] = "default" if kind in _OWN_ROPE else kind
    return {key: value for key, value in found.items() if value not in (None, _rope_default(key))}


def _by_layer(rope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield parameters that are stated by kind of layer; old configurations know one kind."""
    for key, value in rope.items():
        if isinstance(value, dict):
            yield from (
                (name if key == "full_attention" else f"{key}.{name}", v) for name, v in value.items()
            )
        else:
            yield key, value


def _rope_default(key: str) -> Any:
    return _ROPE_DEFAULTS.get(key.rsplit(".", maxsplit=1)[-1])
