"""Libraries that open models on torch's meta device, from a folder's files and its tensors' names and shapes.

No value is read, no code of a checkpoint is run, no pickle is read, and nothing is fetched.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from hub_magmax.checkpoints.config import CONFIG_NAME, levels
from hub_magmax.checkpoints.side_files import MODULES_NAME
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.text import listed, shown

#: Dtype and shape of each tensor, by name.
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

#: Of a tensor that does not fit: what is wrong, and its name in the library.
Problem = tuple[str, str]


class NotOpenedError(Exception):
    """A folder is not opened; the text says why."""


@dataclass(frozen=True)
class Opened:
    """How the weights of a folder fit its configuration.

    Attributes:
        libraries: That opened it, with their versions.
        problems: Tensors that do not fit.
        num_tensors: That the model has.
        untried: What was not opened, and why; mostly empty.
    """

    libraries: tuple[str, ...]
    problems: frozenset[Problem]
    num_tensors: int
    untried: str = ""


def open_folder(folder: Path, tensors: Tensors, weights: str) -> Opened:
    """Open a model as the library does that its configuration names.

    Args:
        folder: Its files but for the weights, which may be there.
        tensors: Its weights.
        weights: Name of the weights in one file.

    Raises:
        NotOpenedError: If there is none, or it does not know the model or something that this needs.
        Exception: Whatever a library raises over a configuration or a file.
    """
    config = _config_of(folder)
    library, name = _class_of(config)
    opener = _OPENERS[library]
    is_named = library == "transformers" and "transformers_weights" in config  # and names these
    if weights != opener.weights and not is_named:
        raise NotOpenedError(f"{library} looks for {opener.weights}, and not {weights}")
    with _quiet():
        model_class = _model_class(library, name, opener.parent, has_code="auto_map" in config)
        try:
            found = opener.open(model_class, folder, tensors)
        except Exception as error:
            if reason := _no_fault(error, config, library):
                raise NotOpenedError(reason) from error
            raise
        return _with_modules(folder, found) if (folder / MODULES_NAME).is_file() else found


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        raise NotOpenedError(f"there is no {CONFIG_NAME}") from None
    if not isinstance(config, dict):
        raise NotOpenedError(f"{CONFIG_NAME} is no mapping")
    return config


def _class_of(config: dict[str, Any]) -> tuple[str, str]:
    """Return the library and the class that a configuration names; importing a library takes seconds."""
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    for library, name in (("diffusers", config.get("_class_name")), ("transformers", first)):
        if isinstance(name, str) and name.isidentifier():
            return library, name
    raise NotOpenedError(f"{CONFIG_NAME} names no class of a model")


def _no_fault(error: Exception, config: dict[str, Any], library: str) -> str:
    """Return why a model is not opened by no fault of its files; empty where there is none."""
    if isinstance(error, ImportError):
        return f"{_named(library)} lacks what the model needs ({_first_sentence(error)})"
    if isinstance(error, NotImplementedError | RuntimeError) and "meta" in str(error).lower():
        return f"{_named(library)} makes it with values only ({_first_sentence(error)})"
    if library == "transformers" and (unknown := _unknown_types(config, str(error))):
        return f"{_named(library)} does not know models of type {listed(unknown)}"
    return ""


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0][:200]


def _unknown_types(config: dict[str, Any], told: str) -> list[str]:
    """Return the types of models that a configuration states, nested ones too, and an error says are unknown.

    Many nested ones are in no list of the library, whose classes know them all the same.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stated = dict.fromkeys(str(level["model_type"]) for _, level in levels(config) if level.get("model_type"))
    return [shown(name) for name in stated if name not in CONFIG_MAPPING and name in told]


def _model_class(library: str, name: str, parent: str, *, has_code: bool) -> Any:
    """Return the class of a library that has this name, and is derived from its class `parent`."""
    module = _imported(library)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, getattr(module, parent))):
        code = "; code of a checkpoint is not run" if has_code else ""
        raise NotOpenedError(f"{_named(library)} has no class {shown(name)}{code}")
    return found


def _open_transformers(model_class: Any, folder: Path, tensors: Tensors) -> Opened:
    """Open by transformers itself, which converts names and stacks experts as it does with values."""
    config = model_class.config_class.from_pretrained(str(folder), local_files_only=True)
    weights = {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
        for name, (dtype, shape) in tensors.items()
    }
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if info.get("error_msgs"):
        raise ValueError("; ".join(map(str, info["error_msgs"])))
    return Opened((_named("transformers"),), frozenset(_problems(info)), len(model.state_dict()))


def _open_diffusers(model_class: Any, folder: Path, tensors: Tensors) -> Opened:
    """Make the model from its configuration, and compare: diffusers cannot load without values."""
    with torch.device("meta"):
        model = model_class.from_config(model_class.load_config(str(folder), local_files_only=True))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    both = [name for name in tensors if name in wanted]
    info = {
        "missing_keys": wanted.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - wanted.keys(),
        "mismatched_keys": [
            (name, tensors[name][1], wanted[name]) for name in both if tensors[name][1] != wanted[name]
        ],
    }
    return Opened((_named("diffusers"),), frozenset(_problems(info)), len(wanted))


class _Opener(NamedTuple):
    """How a library opens a model.

    Attributes:
        open: Opens it.
        parent: Class that all models of the library are derived from.
        weights: Name of the weights that the library looks for.
    """

    open: Callable[[Any, Path, Tensors], Opened]
    parent: str
    weights: str


_OPENERS = {
    "transformers": _Opener(_open_transformers, "PreTrainedModel", "model.safetensors"),
    "diffusers": _Opener(_open_diffusers, "ModelMixin", "diffusion_pytorch_model.safetensors"),
}


def _problems(info: dict[str, Any]) -> Iterator[Problem]:
    for key in info["missing_keys"]:
        yield "missing", str(key)
    for key in info["unexpected_keys"]:
        yield "not used", str(key)
    for key, stored, expected in info["mismatched_keys"]:
        yield f"of shape {list(stored)} and not {list(expected)}", str(key)


def _with_modules(folder: Path, found: Opened) -> Opened:
    """Open a sentence-transformers model with all its modules, where that library is there."""
    try:
        library = _imported("sentence_transformers")
    except NotOpenedError as reason:
        return replace(found, untried=f"its modules were not opened: {reason}")
    with _without_values(folder) as hollow:
        library.SentenceTransformer(
            str(hollow),
            device="meta",
            model_kwargs={"device_map": "meta", "use_safetensors": True, "ignore_mismatched_sizes": True},
            local_files_only=True,
            trust_remote_code=False,
        )
    return replace(found, libraries=(*found.libraries, _named("sentence_transformers")))


@contextmanager
def _without_values(folder: Path) -> Iterator[Path]:
    """Give the same folder with one unused tensor in place of its weights, which were looked at."""
    from safetensors.torch import save_file

    with TemporaryDirectory(prefix="hub_magmax_modules_") as temporary:
        for path in folder.rglob("*"):
            name = path.relative_to(folder)
            if path.is_file() and not (len(name.parts) == 1 and ".safetensors" in path.suffixes):
                target = Path(temporary) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path.resolve())
        save_file({"unused": torch.zeros(1)}, Path(temporary) / "model.safetensors", {"format": "pt"})
        yield Path(temporary)


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except ImportError as error:
        raise NotOpenedError(f"{library} is not installed") from error


def _named(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings, logs and progress bars of the libraries off, and the network too."""
    from huggingface_hub import constants
    from transformers.utils import logging as bars

    was_offline, had_bars = constants.HF_HUB_OFFLINE, bars.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    try:
        constants.HF_HUB_OFFLINE = True
        logging.disable(logging.ERROR)
        bars.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        logging.disable(disabled)
        if had_bars:
            bars.enable_progress_bar()
