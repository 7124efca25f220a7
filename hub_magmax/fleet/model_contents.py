"""Digests of what a model in use is made of: its files, its values in memory, and the merge that made it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, ROUTER_NAME, ROUTER_WEIGHTS_NAME
from hub_magmax.checkpoints.needed_files import needed_files
from hub_magmax.checkpoints.pinning import file_sha256, stored_lock
from hub_magmax.checkpoints.side_files import is_tokenizer_file
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.software import software_used
from hub_magmax.files import digest
from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.recipe.lockfile import LOCK_NAME, LockedSource
from hub_magmax.recipe.matching import pinned_by_headers
from hub_magmax.recipe.schema import RECIPE_NAME
from hub_magmax.text import publishable, step

#: Beginning of a digest of headers, in place of `sha256:`.
HEADER = "header:"

#: Values of configurations that tell of no model: where it was, and who wrote them.
_ASIDE = ("_name_or_path", "transformers_version")


#: Variable that makes cuBLAS deterministic, by one of two values.
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@step("reading the model, for its sha256")
def contents_of(source: FileSource | None, model: LoadedModel, base: Based | None = None) -> dict[str, Any]:
    """Return digests of a model's parts; null where a part is not there, or not known.

    Args:
        source: Its files; None where these are not known. They tell the merge (`base`, `tasks`, `recipe`,
            `lock`) of a folder that hub_magmax wrote, and the sha256 of every file of `weights`,
            `configuration` and `tokenizer`, and of a `router` beside them.
        base: Of an adapter, the base model whose weights and configuration these are then; `adapter` has the
            sha256 of the adapter's own files.
        model: What was loaded. Looked at in memory are its tensors (`parameters`), its configuration
            (`network`), its settings of generation, its tokenizer or image processor (`processor`), its chat
            template and its quantisation.
    """
    if base is None or source is None:
        return {**_files(source), "adapter": None, **_merge(source), **_loaded(model)}
    files, merge = _files(base.source), _merge(source)
    own = _files(source)
    adapter = {**own["weights"], **own["configuration"], **own["tokenizer"]}
    adapter |= _hashes(source, [ADAPTER_CONFIG_NAME])
    pin = {"name": publishable(base.name), "commit": base.commit, "files": digest(files["weights"])}
    named = merge["base"] or pin
    return {**files, "router": own["router"], "adapter": adapter, **merge, "base": named, **_loaded(model)}


@dataclass(frozen=True)
class Based:
    """The base model of an adapter in use: its name, its commit on the Hub, and its files."""

    name: str
    commit: str | None
    source: FileSource


def _files(source: FileSource | None) -> dict[str, Any]:
    if source is None:
        return dict.fromkeys(("weights", "configuration", "tokenizer", "router"))
    beside = needed_files(source)
    routers = [path for path in (ROUTER_NAME, ROUTER_WEIGHTS_NAME) if path in source.sizes]
    return {
        "weights": _hashes(source, [shard.file for shard in source.index.shards]),
        "configuration": _hashes(
            source, [p for p in beside if p.endswith(".json") and not is_tokenizer_file(p)]
        ),
        "tokenizer": _hashes(source, filter(is_tokenizer_file, beside)),
        "router": _hashes(source, routers) or None,
    }


def _hashes(source: FileSource, paths: Iterable[str]) -> dict[str, str]:
    return {path: f"sha256:{file_sha256(source, path)}" for path in paths}


def _merge(source: FileSource | None) -> dict[str, Any]:
    """Return what lock and recipe beside the weights say of the merge."""
    found: dict[str, Any] = dict.fromkeys(("base", "tasks", "recipe", "lock"))
    if source is None:
        return found
    if RECIPE_NAME in source.sizes:
        found["recipe"] = f"sha256:{file_sha256(source, RECIPE_NAME)}"
    if LOCK_NAME in source.sizes:
        lock = stored_lock(source)
        found["lock"], found["base"] = lock.digest, _pin(lock.base_model)
        found["tasks"] = {name: _pin(task) for name, task in lock.tasks.items()}
    return found


def _pin(source: LockedSource) -> dict[str, Any]:
    """Return a source's name, its commit, and a digest of what its lock says of the files of weights.

    The digest begins with `header:` where the lock has no more than the headers: checkpoints with other
    values have the same one.
    """
    files = digest([[file.path, file.size_bytes, file.header_sha256, file.sha256] for file in source.files])
    if pinned_by_headers([source]):
        files = HEADER + files.removeprefix("sha256:")
    return {"name": publishable(source.reference), "commit": source.commit, "files": files}


def _loaded(model: LoadedModel) -> dict[str, Any]:
    network, processor = model.network, model.processor
    config = json.loads(network.config.to_json_string(use_diff=False))
    generation = getattr(network, "generation_config", None)
    template = getattr(processor, "chat_template", None)
    return {
        "parameters": {name: _tensor_digest(value) for name, value in network.state_dict().items()},
        "network": digest({"class": type(network).__name__, "config": _without(config)}),
        "generation": generation and digest(_without(json.loads(generation.to_json_string(use_diff=False)))),
        "processor": digest(_state(processor)),
        "chat_template": digest(template) if template else None,
        "quantisation": digest(config["quantization_config"]) if config.get("quantization_config") else None,
    }


def _state(processor: Any) -> dict[str, Any]:
    """Return what a tokenizer or an image processor does to its inputs, as plain values."""
    name = type(processor).__name__
    if not hasattr(processor, "get_vocab"):
        return {"class": name, "values": _without(json.loads(processor.to_json_string()))}
    backend = getattr(processor, "backend_tokenizer", None)
    values = json.loads(backend.to_str()) if backend is not None else {"vocabulary": processor.get_vocab()}
    for key in ("padding", "truncation"):  # of the last call
        values.pop(key, None)
    sides = {key: getattr(processor, key, None) for key in ("model_max_length", "truncation_side")}
    return {"class": name, "values": values, **sides}


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _ASIDE}


def _tensor_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's dtype, shape and bytes."""
    hasher = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    hasher.update(values.numpy().data)
    return f"sha256:{hasher.hexdigest()}"


def environment_of(model: LoadedModel) -> dict[str, Any]:
    """Return what an answer's last bits depend on besides the model: software, device, number of threads."""
    device = model.device.type
    return {
        "software": software_used(),
        "device": device,
        "threads": torch.get_num_threads(),
        "attention": getattr(model.network.config, "_attn_implementation", None),
        "cublas_workspace": os.environ.get(CUBLAS_WORKSPACE) if device == "cuda" else None,
    }
