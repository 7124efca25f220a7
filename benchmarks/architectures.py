"""Merge tiny models of many architectures, load the result with transformers, and compare what it computes.

    python -m benchmarks.architectures                 # all of them, and write docs/architectures.md
    python -m benchmarks.architectures llama mixtral   # print the rows of some

Each model is made from a config, with random weights. The base model is saved as transformers 5 saves by
default (under the names of transformers 4, where these differ) and the tasks under the names of today, and
then the other way round. The merged folder is loaded with `from_pretrained`; its outputs are compared with
those of the same merge done on the state dicts of the loaded models, in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.tiny_models import ARCHITECTURES, Architecture

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"

#: The scaling coefficient of the merges: the base model counts, and so does every task.
SCALING = 0.3


@dataclass(frozen=True)
class Row:
    """Result of merging one architecture, saved in one of two ways.

    Attributes:
        architecture, kind, model: As in `ARCHITECTURES`.
        saved: `old` if the base model has the names of transformers 4 and the tasks those of today, or `new`.
        names_differ: Whether the two have different names.
        difference: Largest difference of an output from the same merge in memory; None if it failed.
        error: Why it failed, or empty.
    """

    architecture: str
    kind: str
    model: str
    saved: str
    names_differ: bool
    difference: float | None
    error: str = ""


def check(name: str, saved: str, folder: Path) -> Row:
    """Merge two tiny fine-tunes of an architecture in `folder`, and compare what comes out."""
    architecture = ARCHITECTURES[name]
    base = architecture.build(0)
    models = {"base": base, "one": _fine_tuned(base, 1), "two": _fine_tuned(base, 2)}
    for place, model in models.items():
        model.save_pretrained(folder / place, save_original_format=(place == "base") == (saved == "old"))
    names_differ = _names(folder / "base") != _names(folder / "one")
    row = {"architecture": name, "kind": architecture.kind, "model": architecture.model, "saved": saved}
    try:
        _merge(folder)
        merged, expected = _loaded(architecture, folder / "out"), _expected(architecture, folder)
        difference = _difference(architecture, merged, expected)
    except Exception as error:  # whatever it is, it is the result
        return Row(
            **row, names_differ=names_differ, difference=None, error=f"{type(error).__name__}: {error}"
        )
    return Row(**row, names_differ=names_differ, difference=difference)


def _fine_tuned(base: Any, seed: int) -> Any:
    """Return a copy of a model whose weights and statistics moved a little."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.add_(torch.rand(buffer.shape, generator=generator))
            elif name.endswith("num_batches_tracked"):
                buffer.add_(seed)
    return model


def _names(folder: Path) -> set[str]:
    from hub_magmax.checkpoints.storage.local import LocalSource

    with contextlib.closing(LocalSource(folder)) as source:
        return set(source.index.tensors)


def _merge(folder: Path) -> None:
    from hub_magmax.pipeline import run
    from hub_magmax.recipe.loading import load_recipe

    recipe = {
        "schema": 1,
        "base_model": "./base",
        "tasks": [{"name": name, "model": f"./{name}"} for name in ("one", "two")],
        "method": {"name": "task_arithmetic", "scaling": SCALING},
        "output": {"path": "out"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run(load_recipe(folder / "recipe.yaml"))


def _loaded(architecture: Architecture, folder: Path) -> Any:
    """Load a model, and see to it that nothing was made up and nothing left over."""
    model, told = getattr(transformers, architecture.model).from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in told.items() if names}
    if wrong:
        raise ValueError(f"loading {folder.name}: {wrong}")
    return model.eval()


def _expected(architecture: Architecture, folder: Path) -> Any:
    """Return the merge of the loaded models' state dicts."""
    base, one, two = (_loaded(architecture, folder / name) for name in ("base", "one", "two"))
    values, ones, twos = (model.state_dict() for model in (base, one, two))
    merged = {
        name: _merged_value(name, value, ones[name], twos[name])
        for name, value in values.items()
        if value.is_floating_point()
    }
    base.load_state_dict(merged, strict=False)
    return base


def _merged_value(name: str, base: Tensor, one: Tensor, two: Tensor) -> Tensor:
    if "running_" in name:  # statistics are averaged
        return (one + two) / 2
    return base + SCALING * ((one - base) + (two - base))


def _difference(architecture: Architecture, merged: Any, expected: Any) -> float:
    """Return the largest absolute difference of an output."""
    with torch.no_grad():
        found, wanted = (_outputs(model(**architecture.inputs())) for model in (merged, expected))
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def _outputs(output: Any) -> list[Tensor]:
    return [value for value in output.to_tuple() if isinstance(value, Tensor)]


def rows(names: list[str]) -> Iterator[Row]:
    """Yield the results of some architectures, saved in both ways."""
    for name in names:
        for saved in ("old", "new"):
            with tempfile.TemporaryDirectory() as folder:
                yield check(name, saved, Path(folder))


def main() -> None:
    """Check the architectures that are named, or all of them and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*ARCHITECTURES, []], metavar="NAME")
    asked = parser.parse_args().names
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = []
    for row in rows(asked or [*ARCHITECTURES]):
        found.append(row)
        said = row.error if row.difference is None else f"{row.difference:.1e}"
        print(f"{row.architecture:<12} {row.saved}  {said[:200]}", flush=True)
    if not asked:
        stored = {"transformers": transformers.__version__, "rows": [asdict(row) for row in found]}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        PAGE.write_text(page(stored))


def page(stored: Mapping[str, Any]) -> str:
    """Return the page of stored results."""
    by_name: dict[str, dict[str, Any]] = {}
    for row in stored["rows"]:
        by_name.setdefault(row["architecture"], {})[row["saved"]] = row
    lines = [
        f"| {row['old']['model']} | {row['old']['kind']} | "
        f"{'differ' if row['old']['names_differ'] else 'same'} | {_cell(row['old'])} | {_cell(row['new'])} |"
        for row in by_name.values()
    ]
    return _PAGE.format(version=stored["transformers"], count=len(by_name), lines="\n".join(lines))


def _cell(row: Mapping[str, Any]) -> str:
    return "fails" if row["difference"] is None else f"{row['difference']:.0e}"


_PAGE = """# Architectures

Any architecture merges, since only names, shapes and dtypes of tensors count. What can go wrong is what a
library makes of the files. {count} architectures were therefore tried with transformers {version}: tiny
models with random weights, two fine-tunes of each, merged by `task_arithmetic` with λ = 0.3.

transformers 5 has other names for the tensors of some models than it had before, and writes the old ones
unless told otherwise (`save_original_format=False`). In the column "old" the base model has the old names and
the tasks those of today; in the column "new" it is the other way round. A number is the largest difference
between an output of the merged folder, loaded by `from_pretrained` without a missing or unexpected tensor,
and one of the same merge done on the state dicts of the loaded models. Batch norm's statistics are averaged.

`python -m benchmarks.architectures` writes this page, in half a minute.

| class | kind | names | old | new |
|---|---|---|---:|---:|
{lines}
"""


if __name__ == "__main__":
    main()
