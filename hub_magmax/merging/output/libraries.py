"""Libraries that open models: a folder on torch's meta device, names and shapes without values.

No code of a checkpoint is run, no pickle is read, and nothing is fetched.
"""

from __future__ import annotations

import json
import logging
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.needed_files import MODULES_NAME
from hub_magmax.text import shown

CONFIG_NAME = "config.json"

#: Classes that all models of a library are derived from.
_PARENTS = {"diffusers": "ModelMixin", "transformers": "PreTrainedModel"}

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


def open_folder(folder: Path) -> Opened:
    """Open a folder as the library does that its configuration names.

    Raises:
        NotOpenedError: If there is none, or it does not know this kind of model.
        Exception: Whatever a library raises over a configuration or a file.
    """
    config = _config_of(folder)
    library, name = _class_of(config)
    has_code = "auto_map" in config
    with _quiet():
        found = _open_class(library, name, folder, has_code=has_code)
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


def _open_class(library: str, name: str, folder: Path, *, has_code: bool) -> Opened:
    """Open a folder as a class of a library."""
    module = _imported(library)
    model_class = getattr(module, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, getattr(module, _PARENTS[library]))):
        code = "; code of a checkpoint is not run" if has_code else ""
        raise NotOpenedError(f"{_named(library)} has no class {shown(name)}{code}")
    model, info = model_class.from_pretrained(  # type: ignore[attr-defined]
        str(folder),
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        local_files_only=True,
    )
    if info.get("error_msgs"):
        raise ValueError("; ".join(map(str, info["error_msgs"])))
    return Opened((_named(library),), frozenset(_problems(info)), len(model.state_dict()))


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
    library.SentenceTransformer(
        str(folder),
        device="meta",
        model_kwargs={"device_map": "meta", "use_safetensors": True},
        local_files_only=True,
        trust_remote_code=False,
    )
    return replace(found, libraries=(*found.libraries, _named("sentence_transformers")))


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


def write_hollow(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> None:
    """Write a safetensors file without values, which takes no room on a disk that keeps holes.

    Args:
        path: Of the file.
        tensors: Name, dtype, shape and bytes of each.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, num_bytes in tensors:
        offsets = [position, position + num_bytes]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += num_bytes
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
