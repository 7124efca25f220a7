"""A merged model opened as its library opens it, before it is published.

What is missing, not used, or of another shape, and is not so in the base model too, is an error. The base
model is opened in the same way, from its configuration and headers, where there is anything to compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hub_magmax.checkpoints.config import CONFIG_NAME
from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.checkpoints.pinning import copied_files, copy_side_file
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import OutputError
from hub_magmax.files import digest, killed_writes, sha256_of, write_text
from hub_magmax.merging.output.libraries import (
    NotOpenedError,
    Opened,
    Problem,
    Tensors,
    open_folder,
)
from hub_magmax.merging.output.provenance import PROVENANCE_NAME
from hub_magmax.merging.output.report import REPORT_NAME, MergeReport
from hub_magmax.planning.fitting.globs import grouped
from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.processes import Processes
from hub_magmax.recipe.lockfile import LOCK_NAME
from hub_magmax.recipe.schema import RECIPE_NAME
from hub_magmax.text import listed, number_of, shown, step

#: Patterns of names that are shown of one kind of problem.
_MOST_SHOWN = 5

#: Files about the merge, at which no library looks.
_OWN_FILES = {RECIPE_NAME, LOCK_NAME, PROVENANCE_NAME, REPORT_NAME, "README.md"}


def report_opening(
    plan: Plan, merged: MergeReport, processes: Processes, cache: SourceCache | None = None
) -> MergeReport:
    """Open the output as its library does, unless the report tells of it, and return the report that does.

    What a killed command left of our own files in the folder is removed.

    Raises:
        OutputError: If tensors do not fit its configuration, in every process.
    """

    def look() -> MergeReport | OutputError:
        for path in killed_writes(plan.recipe.output_path):
            if path.stem in _OWN_FILES:
                path.unlink(missing_ok=True)
        return merged if merged.opened else opened()

    @step("opening the merged model as its library does")
    def opened() -> MergeReport | OutputError:
        try:
            done = replace(merged, opened=open_output(plan, plan.recipe.output_path, cache))
        except OutputError as error:
            return error
        write_text(plan.recipe.output_path / REPORT_NAME, done.to_json())
        return done

    found = processes.first_decides(look)
    if isinstance(found, OutputError):
        raise found
    return found


def open_output(plan: Plan, folder: Path, cache: SourceCache | None = None) -> dict[str, str]:
    """Open a merged folder as its library opens it, and return how that came out.

    Args:
        plan: What it was merged by.
        folder: Its files; the weights need not be there.
        cache: Checkpoints that are open already.

    Returns:
        `library` with its version, and `result`: that all fits, or why it was not tried.

    Raises:
        OutputError: If the library cannot open it, or tensors do not fit the configuration beside them,
            and the base model's fit its own.
    """
    if plan.recipe.output.is_adapter:
        return _not_tried("an adapter is opened with its base model")
    if plan.recipe.output.is_selection:
        return _not_tried("a selection holds no weights")
    try:
        written, single_name = _written(plan, folder), _single_name(plan)
        asked = ("opened", single_name, digest([written, _files_beside(folder)]))
        found = (cache or SourceCache()).recall(asked, lambda: open_folder(folder, written, single_name))
    except NotOpenedError as reason:
        return _not_tried(str(reason))
    except Exception as error:  # whatever a library raises
        return _explained(plan, folder, error, cache)
    if not found.problems:
        return _result(found, _shared(found.num_tensors, len(written)))
    base = _opened_base(plan, cache)
    if new := sorted(found.problems - (base.problems if base else frozenset())):
        raise _unfit(plan, folder, found, new)
    return _result(found, f", but for what the base model's do not either: {_told(sorted(found.problems))}")


def _files_beside(folder: Path) -> dict[str, str]:
    """Return the sha256 of files that a library may look at, by name: sites have the same, and open alike."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    beside = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: sha256_of(path)
        for name, path in beside.items()
        if name not in _OWN_FILES and path.suffix != ".safetensors"
    }


def _not_tried(reason: str) -> dict[str, str]:
    return {"library": "", "result": f"not tried: {reason}"}


def _shared(num_tensors: int, num_written: int) -> str:
    """Return why a model has more tensors than its files, where it does."""
    more = num_tensors - num_written
    return f": {num_written:,} of the files, and {more:,} tied to these or not saved" if more > 0 else ""


def _result(found: Opened, but: str) -> dict[str, str]:
    untried = f"; {found.untried}" if found.untried else ""
    verb = "fits" if found.num_tensors == 1 else "fit"
    result = f"{number_of(found.num_tensors, 'tensor')} {verb}{but}{untried}"
    return {"library": ", ".join(found.libraries), "result": result}


def _explained(plan: Plan, folder: Path, error: Exception, cache: SourceCache | None) -> dict[str, str]:
    """Raise what keeps the output from being opened; return that nothing was tried where no library can."""
    told = _reason(error)
    try:
        base = _open_base(plan, cache)
    except NotOpenedError as reason:
        return _not_tried(f"{reason} (the merged model: {told})")
    except Exception as of_base:  # whatever a library raises
        raise _neither_opens(plan, folder, told, _reason(of_base)) from error
    raise OutputError(
        f"{', '.join(base.libraries)} opens the base model and not this ({told})",
        where=str(folder),
        hint=f"{_state(plan)} {CONFIG_NAME} and other files are those of {plan.recipe.output.files_from}. "
        "Name the source whose files fit as output.files_from, and merge into another folder.",
    ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _neither_opens(plan: Plan, folder: Path, told: str, of_base: str) -> OutputError:
    differs = "" if of_base == told else f"; the base model: {of_base}"
    return OutputError(
        f"neither this nor the base model can be opened ({told}{differs})",
        where=str(folder),
        expected="files that the library named in them opens",
        hint=f"{_state(plan)} Save or download the base model again, or install the version of the library "
        f"that its {CONFIG_NAME} states, and merge into another folder. `hub-magmax merge` writes a model "
        "without opening it.",
    )


def _unfit(plan: Plan, folder: Path, found: Opened, problems: list[Problem]) -> OutputError:
    files_from = plan.recipe.output.files_from
    names = [name for _, name in problems]
    # Names in a library may have a prefix that names in files lack, or the other way round.
    owners = {
        job.source
        for job in plan.jobs
        if not job.merged and any(name.endswith(job.name) or job.name.endswith(name) for name in names)
    }
    fitting = sorted(owners - {files_from})
    step = (
        f"They were taken from {fitting[0]}: add to the recipe output: {{files_from: {fitting[0]}}}"
        if len(fitting) == 1
        else "Name the source whose configuration fits them as output.files_from"
    )
    return OutputError(
        f"as {', '.join(found.libraries)} opens it, {_told(problems)}",
        where=str(folder),
        expected=f"tensors that fit {CONFIG_NAME}, which is that of {files_from}",
        hint=f"{_state(plan)} {step}, and merge into another folder.",
    )


def _state(plan: Plan) -> str:
    kept = "The folder stays as it is, and nothing" if plan.recipe.needs_folder else "Nothing"
    return f"{kept} is published."


def _told(problems: list[Problem]) -> str:
    kinds: dict[str, list[str]] = {}
    for kind, name in problems:
        kinds.setdefault(kind, []).append(name)
    return "; ".join(
        f"{len(names):,} {kind} ({listed([*map(shown, grouped(names))], _MOST_SHOWN)})"
        for kind, names in kinds.items()
    )


def _opened_base(plan: Plan, cache: SourceCache | None) -> Opened | None:
    """Return how the base model fits its own files; None if it cannot be opened."""
    try:
        return _open_base(plan, cache)
    except Exception:  # whatever a library raises, or why it was not opened
        return None


def _open_base(plan: Plan, cache: SourceCache | None) -> Opened:
    """Open the base model from its own files, without what the recipe leaves out."""
    with (
        open_inputs(plan.recipe, plan.lock, cache) as sources,
        TemporaryDirectory(prefix="hub_magmax_base_") as folder,
    ):
        base, locked = sources["base_model"], plan.lock.base_model
        for path in copied_files(base, locked):
            copy_side_file(base, path, locked, Path(folder))
        kept = _described(info for name, info in base.index.tensors.items() if name not in plan.left_out)
        return open_folder(Path(folder), kept, _single_name(plan))


def _written(plan: Plan, folder: Path) -> Tensors:
    """Return the output's tensors, as its headers have them, or the plan where they were sent elsewhere."""
    if all((folder / shard.file).exists() for shard in plan.shards):
        with closing(LocalSource(folder)) as source:
            return _described(source.index.tensors.values())
    return _described(plan.jobs)


def _described(tensors: Iterable[TensorInfo | TensorJob]) -> Tensors:
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def _single_name(plan: Plan) -> str:
    """Return the name of the weights in one file."""
    return plan.index_name.removesuffix(".index.json")
