"""Recipes of mergekit: what each key means here, and the same recipe where all of it has a counterpart.

Nothing is imported: the file is recognised, and its reader is told key by key. `_METHODS` says which of
mergekit's methods are here, and `_Reader` how their parameters are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hub_magmax.errors import KeyPath
from hub_magmax.recipe.mergekit_values import finite, keys_of, reference_of, short, task_model, task_names
from hub_magmax.text import listed, shown

#: Parameters that have a value per model, and those that have one for all.
_OF_MODELS = ("weight", "density", "gamma", "epsilon")
_OF_ALL = ("normalize", "lambda", "rescale", "int8_mask", "t")

#: What becomes of parameters, and which methods read those that not all do.
_MEANINGS: Mapping[str, str] = {
    "weight": "what the task counts in the preference",
    "density": "method: {{density: {value}}}; it may keep one element of a tensor more",
    "gamma": "method: {{outliers: {value}}}",
    "lambda": "method: {{scaling: {value}}}",
    "normalize": "decides between a mean and a sum, which are two methods",
    "rescale": "as the method here does",
    "int8_mask": "without effect, also in mergekit",
}
_READERS: Mapping[str, tuple[str, ...]] = {
    "density": ("ties", "dare_linear", "dare_ties", "breadcrumbs"),
    "gamma": ("breadcrumbs",),
    "lambda": ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"),
    "rescale": ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"),
    "epsilon": (),
    "t": (),
}

#: Methods that add task vectors to a base model: `normalize` and `rescale` where they are left out.
_DEFAULTS: Mapping[str, tuple[bool, bool]] = {
    "linear": (True, False),
    "task_arithmetic": (False, False),
    "ties": (True, False),
    "dare_linear": (False, True),
    "dare_ties": (False, True),
    "breadcrumbs": (False, False),
}
#: Ends of names of single files.
_FILES = (".safetensors", ".bin", ".pt", ".pth")

_DTYPES = ("float64", "float32", "float16", "bfloat16")

_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
)  # fmt: skip

#: Keys without a counterpart, and what to do.
_ELSEWHERE: Mapping[str, str] = {
    "slices": "layers are not put together here; sources that have all of them are models",
    "modules": "parts of a model are not merged one by one here",
    "tokenizer": "rows of single tokens are not chosen here; token_rows matches rows by their tokens",
    "chat_template": "set it in the tokenizer of the merged folder",
    "name": "stages of several merges are one recipe each here",
}


#: A method with its options, the number of each task, and the kind of preference that they are.
How = tuple[dict[str, Any], dict[int, float], str]


@dataclass(frozen=True)
class Line:
    """One key of a mergekit recipe, and its meaning here.

    Attributes:
        key: Its path.
        text: What it becomes, or why it has no counterpart.
        is_kept: False where it has none.
    """

    key: KeyPath
    text: str
    is_kept: bool = True


@dataclass
class Translation:
    """What a mergekit recipe becomes: its keys, and the recipe, None where a part has no counterpart."""

    lines: list[Line] = field(default_factory=list)
    recipe: dict[str, Any] | None = None


def translate(values: Mapping[str, Any]) -> Translation:
    """Return the meaning of every key of a mergekit recipe."""
    reader = _Reader(values)
    recipe = reader.read()
    is_whole = recipe is not None and all(line.is_kept for line in reader.lines)
    return Translation(reader.lines, recipe if is_whole else None)


class _Reader:
    """Reads a mergekit recipe once, and notes its keys.

    Args:
        values: Of the recipe.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.lines: list[Line] = []
        self._method = values.get("merge_method")
        listed_models = values.get("models")
        self._models = listed_models if isinstance(listed_models, list) else []
        top = values.get("parameters")
        self._top: Mapping[str, Any] = top if isinstance(top, dict) else {}

    def read(self) -> dict[str, Any] | None:
        """Return the recipe, None where something that decides the merge has no counterpart."""
        self._note_method()
        for key in self._values:
            if key not in _TOP:
                self._note((key,), "mergekit reads over this key, which it does not know")
            elif key in _ELSEWHERE:
                self._lose((key,), _ELSEWHERE[key])
        self._note_parameters()
        output = self._output()
        references = self._references() if self._method in _DEFAULTS and self._models else None
        made = self._made(references) if references else None
        return made and made | ({"output": {"path": "merged", **output}})

    def _references(self) -> list[str] | None:
        """Return the names of the models, None where they are not of one kind or not different."""
        entries = [entry.get("model") if isinstance(entry, dict) else None for entry in self._models]
        found = [name for name in map(reference_of, entries) if name]
        if len(set(found)) < len(self._models):
            self._lose(("models",), "not a list of different models, each with a name")
            return None
        if any(name.endswith(_FILES) for name in found):
            self._lose(("models",), "single files, which mergekit-pytorch merges; a model is a folder")
            return None
        return found

    def _note(self, key: KeyPath, text: str) -> None:
        self.lines = [line for line in self.lines if line.key != key]
        self.lines.append(Line(key, text))

    def _lose(self, key: KeyPath, text: str) -> None:
        self.lines = [line for line in self.lines if line.key != key or not line.is_kept]
        self.lines.append(Line(key, f"no counterpart: {text}", is_kept=False))

    def _note_method(self) -> None:
        if self._method in _DEFAULTS:
            self._note(("merge_method",), f"{self._method} is a method here too")
        elif self._method is not None:
            known = listed(sorted(_DEFAULTS))
            self._lose(
                ("merge_method",), f"{shown(self._method)} is no method here; of mergekit's there are {known}"
            )

    def _output(self) -> dict[str, str]:
        """Return the dtype of the output, and note where tokenizer and dtypes come from."""
        found = {}
        for key in ("dtype", "out_dtype"):
            written = self._values.get(key)
            dtype = str(written).removeprefix("torch.")
            if written is None:
                continue
            if dtype in _DTYPES:
                rest = "; sums are formed in float32 or wider" if key == "dtype" else ""
                self._note((key,), f"output: {{dtype: {dtype}}}{rest}")
                found["dtype"] = dtype
            else:
                self._lose((key,), f"output.dtype is one of {', '.join(_DTYPES)}")
        source = self._values.get("tokenizer_source")
        if source == "base":
            self._note(
                ("tokenizer_source",), "the base model's tokenizer is copied anyway; rows need token_rows"
            )
        elif source is not None:
            self._lose(
                ("tokenizer_source",),
                "output.files_from names whose tokenizer is copied, and token_rows "
                "matches rows by their tokens",
            )
        return found

    def _note_parameters(self) -> None:
        """Note what becomes of every parameter, and which ones mergekit does not read where they are."""
        for key in self._top:
            self._note_parameter(("parameters", key), self._top[key], key in (*_OF_MODELS, *_OF_ALL))
        for number, entry in enumerate(self._models):
            for path, value in keys_of(entry):
                is_known = len(path) == 2 and path[-1] in _OF_MODELS
                self._note_parameter(("models", number, *path), value, is_known)

    def _note_parameter(self, path: KeyPath, value: Any, is_known: bool) -> None:
        key = str(path[-1])
        if not is_known:
            self._note(path, "mergekit reads over this key here")
        elif self._method not in _DEFAULTS:
            self._lose(path, f"it belongs to {self._method}")
        elif self._method not in _READERS.get(key, (self._method,)):
            self._note(path, f"{self._method} does not read it, also in mergekit")
        else:
            self._note(path, _MEANINGS[key].format(value=shown(value, 40)))

    def _made(self, references: list[str]) -> dict[str, Any] | None:
        """Return base model, tasks, method and preference."""
        base_name, is_listed = self._base(references)
        tasks = self._tasks(references, base_name)
        found = {number: self._number("weight", number) for number in tasks}
        weights = {number: weight for number, weight in found.items() if weight is not None}
        is_counted = is_listed and self._method == "linear"
        own = self._number("weight", references.index(base_name)) if is_counted else 0.0
        if not tasks or own is None or len(weights) < len(tasks):
            return None
        how = self._method_of(weights, own)
        return how and self._recipe(base_name, tasks, how)

    def _tasks(self, references: list[str], base: str) -> dict[int, str]:
        """Return the tasks' models by number; none, noted, where an adapter stands on another base model."""
        found = {number: task_model(name, base) for number, name in enumerate(references) if name != base}
        if not found or None in found.values():
            self._lose(("models",), "no task, or an adapter on another model than the base model")
            return {}
        if base in references and self._method != "linear":
            for path, _ in keys_of(self._models[references.index(base)]):
                self._note(("models", references.index(base), *path), "not read of the base model")
        return {number: str(model) for number, model in found.items()}

    def _recipe(self, base: str, tasks: Mapping[int, str], how: How) -> dict[str, Any]:
        method, shares, kind = how
        names = dict(zip(tasks, task_names([*tasks.values()]), strict=True))
        self._note(("models",), f"tasks, and preference: {{{kind}: ...}}")
        return {
            "schema": 1,
            "base_model": base,
            "tasks": [{"name": names[number], "model": model} for number, model in tasks.items()],
            "method": method,
            "preference": {kind: {names[number]: short(shares[number]) for number in tasks}},
        }

    def _base(self, references: list[str]) -> tuple[str, bool]:
        """Return the base model, and whether it is one of the models; empty, noted, where there is none."""
        written = reference_of(self._values.get("base_model"))
        if written is not None:
            self._note(("base_model",), "base_model")
            if self._method == "linear" and written not in references:
                self._lose(("base_model",), "linear counts it as one more model without a weight")
            return written, written in references
        stems = {name.partition("+")[0] for name in references if "+" in name}
        if self._method != "linear":
            self._lose(("merge_method",), f"{self._method} needs a base_model, also in mergekit")
            return "", False
        if len(stems) == 1 and all("+" in name for name in references):
            return stems.pop(), False
        return references[0], True

    def _number(self, key: str, number: int) -> float | None:
        """Return a parameter of a model: its own, or else that of all; None, noted, where it is no number."""
        entry = self._models[number]
        own = entry.get("parameters") or {}
        path: KeyPath = ("models", number, "parameters", key) if key in own else ("parameters", key)
        value = own.get(key, self._top.get(key))
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value is None:
            self._lose(("models", number), f"it has no {key}, which {self._method} needs, also in mergekit")
            return None
        found = finite(value)
        if found is None:
            differs = isinstance(value, list | dict)
            self._lose(path, _differing(key) if differs else f"{shown(value)} is no number")
        return found

    def _shared(self, key: str, default: Any) -> Any:
        """Return a parameter of all models; None, noted, where it is no single value."""
        value = self._top.get(key, default)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, list | dict):
            self._lose(("parameters", key), _differing(key))
            return None
        return value

    def _method_of(self, weights: Mapping[int, float], own: float) -> How | None:
        """Return the method with its options, the numbers of the tasks, and their kind of preference."""
        normalizes, rescales = _DEFAULTS[str(self._method)]
        normalize = self._shared("normalize", normalizes)
        rescale = self._shared("rescale", rescales)
        scaling = finite(self._shared("lambda", 1.0))
        if normalize is None or rescale is None or scaling is None:
            return None
        if bool(rescale) is not rescales:
            self._lose(("parameters", "rescale"), f"{self._method} always does, or never does")
            return None
        make: Callable[..., How | None]
        make = self._linear if self._method == "linear" else self._summed
        if self._method in ("ties", "dare_ties"):
            make = self._elected
        return make(weights, own, bool(normalize), scaling)

    def _linear(
        self, weights: Mapping[int, float], own: float, normalize: bool, scaling: float
    ) -> How | None:
        """Return a weighted mean: of base + Σ w τ / W, with the base model's own weight in W."""
        total = math.fsum([*weights.values(), own])
        if not normalize and abs(total - 1) > 1e-9:
            self._lose(("parameters", "normalize"), "weights that do not sum to 1 scale the base model too")
            return None
        return self._mean(weights, total, 1.0)

    def _mean(self, weights: Mapping[int, float], total: float, scaling: float) -> How | None:
        if abs(total) < 1e-8:
            self._lose(("models",), "weights that sum to 0")
            return None
        tasks = math.fsum(weights.values())
        if tasks > 0 and min(weights.values()) >= 0:
            shares = {number: weight / tasks for number, weight in weights.items()}
            return {"name": "average", "scaling": short(scaling * tasks / total)}, shares, "weights"
        numbers = {number: weight / total for number, weight in weights.items()}
        return {"name": "task_arithmetic", "scaling": short(scaling)}, numbers, "coefficients"

    def _summed(
        self, weights: Mapping[int, float], own: float, normalize: bool, scaling: float
    ) -> How | None:
        """Return a weighted sum of task vectors, whole or with a part of each."""
        total = math.fsum(weights.values())
        if normalize and self._method == "task_arithmetic":
            return self._mean(weights, total, scaling)
        divisor = total if normalize and abs(total) >= 1e-8 else 1.0
        numbers = {number: weight / divisor for number, weight in weights.items()}
        options = self._options(weights)
        if options is None:
            return None
        name = {"dare_linear": "dare"}.get(str(self._method), str(self._method))
        if options.get("density") == 1:  # then mergekit keeps all, outliers too
            name, options = "task_arithmetic", {}
        return {"name": name, **options, "scaling": short(scaling)}, numbers, "coefficients"

    def _elected(
        self, weights: Mapping[int, float], own: float, normalize: bool, scaling: float
    ) -> How | None:
        """Return the mean of the tasks that agree in sign."""
        total = math.fsum(weights.values())
        if not normalize:
            key = ("parameters", "normalize") if "normalize" in self._top else ("merge_method",)
            self._lose(
                key, f"{self._method} with normalize: false sums the tasks that agree; here it is their mean"
            )
            return None
        if total <= 0 or min(weights.values()) < 0:
            self._lose(("models",), "weights below 0, which are no shares of the tasks")
            return None
        options = self._options(weights)
        if options is None:
            return None
        shares = {number: weight / total for number, weight in weights.items()}
        return {"name": self._method, **options, "scaling": short(scaling)}, shares, "weights"

    def _options(self, numbers: Mapping[int, float]) -> dict[str, float] | None:
        """Return density and outliers, which are the same for all tasks here."""
        wanted = {"ties": ["density"], "dare_linear": ["density"], "dare_ties": ["density"],
                  "breadcrumbs": ["density", "gamma"]}.get(str(self._method), [])  # fmt: skip
        defaults = {"density": 1.0, "gamma": 0.01}
        found: dict[str, float] = {}
        for key in wanted:
            values = {
                self._number(key, number) if self._has(key, number) else defaults[key] for number in numbers
            }
            if None in values:
                return None
            if len(values) > 1:
                self._lose(("models",), f"a {key} of its own for each model")
                return None
            found[key] = float(values.pop() or 0.0)
        if not 0 < found.get("density", 1.0) <= 1:
            self._lose(("parameters", "density"), "a density that is not above 0 and at most 1")
            return None
        if "gamma" in found:
            found["outliers"] = short(min(found.pop("gamma"), 1 - found["density"]))
        return found

    def _has(self, key: str, number: int) -> bool:
        return key in (self._models[number].get("parameters") or {}) or key in self._top


def _differing(key: str) -> str:
    return f"a {key} that differs between layers or tensors"
