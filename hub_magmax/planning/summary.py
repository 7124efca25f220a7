"""The summary of a plan, for people and for programs."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hub_magmax import methods
from hub_magmax.checkpoints.leftovers import leftover_notices
from hub_magmax.checkpoints.side_files import tokenizer_notices, unmerged_notices
from hub_magmax.evaluation.column_look import column_rows, look_at_columns
from hub_magmax.evaluation.needs import Needs, evaluation_needs, evaluation_rows
from hub_magmax.files import from_here
from hub_magmax.planning.budget import peak_memory_bytes
from hub_magmax.planning.findings.finding import Finding, faults_left
from hub_magmax.planning.fitting.architectures import classes_of
from hub_magmax.planning.fitting.renamings import renaming_notices
from hub_magmax.planning.layers import described_layers, layer_notices, layer_rows
from hub_magmax.planning.memory_rows import compiling_bytes, memory_rows, run_memory
from hub_magmax.planning.norms import described_norms, norm_notices, norm_rows
from hub_magmax.planning.output_config.model_config import config_notices
from hub_magmax.planning.plan import SMALL_BYTES, Plan, SolvedJob, TensorJob
from hub_magmax.planning.rule_summary import described_rules, rule_rows
from hub_magmax.planning.selections import written_bytes
from hub_magmax.planning.statistics import unweighted_notices
from hub_magmax.planning.tied import tie_notices
from hub_magmax.planning.tokenizers.chat import OLD_NAME, TEMPLATE_NAME
from hub_magmax.planning.tokens import token_notices
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.tokenizer import UNION
from hub_magmax.text import format_bytes, number_of, shown

#: A label and a text.
Row = tuple[str, str]


# Complex, and flat: a list of notices.
def notices(plan: Plan) -> tuple[str, ...]:
    """Return warnings: files, classes or values that differ, bytes that depend on the processor."""
    sources = plan.lock.sources
    known = {name: text for name, source in sources.items() if (text := classes_of(source))}
    heads = ", ".join(f"{name} {text}" for name, text in known.items())
    side_files = {name: source.side_files for name, source in sources.items()}
    name = plan.lock.method["name"]
    why = name if not methods.get_method(name).is_portable else _decomposition(plan)
    portable = plan.lock.is_portable and methods.get_method(name).is_portable
    return (
        *(() if portable else (f"the last bits that {why} gives depend on processor, device and torch",)),
        *(
            (f"the model classes differ: {heads}",)
            if len({text.lower() for text in known.values()}) > 1
            else ()
        ),
        *layer_notices(plan.lock),
        *renaming_notices(plan.lock, (job.name for job in plan.jobs)),
        *tokenizer_notices(_compared(side_files, plan), plan.tokenizer_source, are_united=_is_united(plan)),
        *plan.tokenizer.notes,
        *token_notices(plan.tokens, plan.recipe),
        *unmerged_notices(side_files, plan.recipe.output.files_from),
        *(finding.text + _accepted(finding, plan) for finding in plan.findings),
        *unweighted_notices(plan),
        *norm_notices(plan.lock),
        *correction_notices(plan.lock),
        *_metadata_notices(plan),
        *leftover_notices(plan.left_behind, plan.recipe.output.files_from),
        *tie_notices(plan),
        *_added_rows_notices(plan),
        *config_notices(plan),
    )


def _decomposition(plan: Plan) -> str:
    return "a decomposition" if plan.recipe.output.rank else "the correction"


def _compared(side_files: Mapping[str, Mapping[str, str]], plan: Plan) -> dict[str, dict[str, str]]:
    """Return the hashes of side files, without chat templates where the recipe says whose the output has."""
    is_said = plan.lock.tokenizer is not None and plan.lock.tokenizer.chat_template is not None
    left_out = {TEMPLATE_NAME, OLD_NAME} if is_said else set()
    return {
        name: {path: text for path, text in files.items() if path not in left_out}
        for name, files in side_files.items()
    }


def _is_united(plan: Plan) -> bool:
    return plan.lock.tokenizer is not None and plan.lock.tokenizer.source == UNION


def _added_rows_notices(plan: Plan) -> Iterator[str]:
    for name, source in plan.lock.tasks.items():
        for tensor, rows in list((source.added_rows or {}).items())[:1]:
            yield (
                f"{name} was trained with added tokens: {shown(tensor)} has {rows:,} rows in it, and the "
                f"merged model has them; its tokenizer is that of {plan.recipe.output.files_from}"
            )


def _metadata_notices(plan: Plan) -> tuple[str, ...]:
    if not plan.lost_metadata:
        return ()
    return (
        f"left out of the header, since they describe the file of {plan.recipe.output.files_from}: "
        f"{', '.join(map(shown, plan.lost_metadata[:5]))}",
    )


def _accepted(finding: Finding, plan: Plan) -> str:
    return f" (accepted as {finding.name})" if finding.is_fault and finding.name in plan.in_spite_of else ""


def coefficients(plan: Plan) -> dict[str, float] | None:
    """Return what each task vector is multiplied by in the end, by task; None if no number does it."""
    found = plan.lock.values.coefficients()
    return None if found is None else dict(zip(plan.lock.tasks, found, strict=True))


def describe(plan: Plan) -> dict[str, Any]:
    """Return the summary that `plan --json` prints."""
    needs = evaluation_needs(plan.recipe, plan.lock, plan.bytes_out, plan.config)
    merged = [job for job in plan.jobs if job.merged]
    copied = [job for job in plan.jobs if not job.merged]
    return {
        "digest": plan.digest,
        "method": dict(plan.lock.method),
        "preference": dict(plan.lock.preference.weights),
        "coefficients": coefficients(plan),
        "norms": described_norms(plan.lock),
        "correction": described_correction(plan.lock),
        "rules": described_rules(plan),
        "tensors_merged": len(merged),
        "tensors_copied": len(copied),
        "tensors_by_statistics": len(plan.by_statistics),
        "tensors_left_out": list(plan.left_out),
        "tasks_not_read": list(plan.unread),
        "ranks": plan.ranks,
        "elements_merged": plan.merged_elements,
        "layers": described_layers(plan.lock),
        "copied": [_copied(job) for job in copied],
        "bytes_in": plan.bytes_in,
        "bytes_out": written_bytes(plan),
        **_sources_and_output(plan),
        "shards": [{"file": s.file, "tensors": len(s.jobs), "data_bytes": s.data_bytes} for s in plan.shards],
        "peak_memory_bytes": peak_memory_bytes(plan),
        "peak_resident_bytes": peak_memory_bytes(plan, with_files=True),
        "device": plan.recipe.output.device,
        "compiling_bytes": compiling_bytes(plan),
        "evaluation": _evaluation(plan, needs) if needs else None,
        "notices": list(notices(plan)),
        "findings": [asdict(finding) | {"name": finding.name} for finding in plan.findings],
        "in_spite_of": list(plan.in_spite_of),
        "tasks_not_looked_at": list(plan.unseen),
    }


def _evaluation(plan: Plan, needs: Needs) -> dict[str, Any]:
    """Return the needs of the evaluation, and the memory of the merge in `run`."""
    merge, resident = run_memory(plan)
    run = {"peak_memory_bytes": merge, "peak_resident_bytes": resident}
    memory = {"memory_bytes": needs.memory_bytes, "resident_bytes": needs.resident_bytes, "run": run}
    columns = [
        {"task": look.task, "columns": list(look.columns), "error": str(look.error) if look.error else None}
        for look in look_at_columns(plan.recipe)
    ]
    return asdict(needs) | memory | {"columns": columns}


def lacks_columns(described: Mapping[str, Any]) -> bool:
    """Say whether what `describe` returned has an evaluation whose examples cannot be scored."""
    found = (described["evaluation"] or {}).get("columns", ())
    return any(row["error"] for row in found)


def _copied(job: TensorJob) -> dict[str, Any]:
    factor = {} if job.factor == 1 else {"factor": job.factor}
    return {"tensor": job.name, "from": job.source, "reason": job.reason} | factor


def _sources_and_output(plan: Plan) -> dict[str, Any]:
    return {
        "output": from_here(plan.recipe.output_path) if plan.recipe.output.keep else None,
        "needed_bytes": _needed_bytes(plan),
        "free_bytes": _free_bytes(plan.recipe.output_path),
        "dtypes": {name: list(found) for name, found in plan.dtypes.items()},
        "adapters": [name for name, source in plan.lock.tasks.items() if source.adapter_config],
        "tokens": [asdict(change) for change in plan.tokens],
    }


@checked
def explain(plan: Plan) -> str:
    """Return the plan in words, for a person to read before it is carried out."""
    needs = evaluation_needs(plan.recipe, plan.lock, plan.bytes_out, plan.config)
    rows = [*_sources_and_method(plan), *_tensors(plan), *_notes(plan)]
    rows += [
        ("reads", _reads(plan)),
        ("writes", f"{_written(plan)} in {number_of(len(plan.shards), 'file')}"),
        *_output(plan),
        *memory_rows(plan, needs),
    ]
    rows += [("device", plan.recipe.output.device)] if plan.recipe.output.device else []
    rows += evaluation_rows(plan.recipe, needs)
    rows += column_rows(look_at_columns(plan.recipe)) if needs else []
    return "\n".join(f"{label:<12} {text}" for label, text in rows)


def _reads(plan: Plan) -> str:
    found = format_bytes(plan.bytes_in)
    if not plan.looked_at_bytes:
        return found
    return f"at least {found}: method.scope is model, so all task vectors are read before the first is merged"


def _written(plan: Plan) -> str:
    if not plan.recipe.output.is_selection:
        return format_bytes(plan.bytes_out)
    return f"at most about {format_bytes(written_bytes(plan))} for {format_bytes(plan.bytes_out)} of weights,"


def _output(plan: Plan) -> Iterator[Row]:
    """Yield where the output goes, and the room that it needs there."""
    output = plan.recipe.output
    if not output.keep:
        yield "output", f"{output.push_to_hub} on the Hub, no folder"
        return
    path, free = plan.recipe.output_path, _free_bytes(plan.recipe.output_path)
    yield "output", from_here(path) + (", which is there" if path.exists() else "")
    if needed := _needed_bytes(plan):
        yield "room", f"{format_bytes(needed)}" + ("" if free is None else f"; {format_bytes(free)} are free")


def _needed_bytes(plan: Plan) -> int:
    """Return the bytes that the output's folder takes and does not have yet."""
    is_there = not plan.recipe.output.keep or plan.recipe.output_path.exists()
    return 0 if is_there else written_bytes(plan) + plan.copied_bytes + SMALL_BYTES


def _free_bytes(path: Path) -> int | None:
    """Return the free bytes of the disk that will hold `path`; None where the system does not say."""
    with suppress(OSError, StopIteration):
        return shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
    return None


def _kind(plan: Plan, name: str) -> str:
    """Return the kind and the dtypes of a source in brackets."""
    adapter = ["adapter"] if plan.lock.sources[name].adapter_config else []
    facts = [*adapter, *plan.dtypes.get(name, ())]
    return f" ({', '.join(facts)})" if facts else ""


def _sources_and_method(plan: Plan) -> Iterator[Row]:
    lock = plan.lock
    yield "base model", lock.base_model.label + _kind(plan, "base_model")
    for number, (name, task) in enumerate(lock.tasks.items(), 1):
        own = f", relative to {lock.bases[name].label}" if name in lock.bases else ""
        yield f"task {number}", f"{name}: {task.label}{_kind(plan, name)}{own}"
    yield from (("" if number else "layers", text) for number, text in enumerate(layer_rows(lock)))
    yield from _method(plan)
    yield from (("" if number else "norms", text) for number, text in enumerate(norm_rows(lock)))
    if lock.correction:
        yield "corrected", f"by {correction_row(lock)}"
    yield from (("" if number else "rules", text) for number, text in enumerate(rule_rows(plan)))


def _method(plan: Plan) -> Iterator[Row]:
    lock = plan.lock
    options = [
        f"{key} {_told(value)}" for key, value in lock.method.items() if key not in ("name", "scaling")
    ]
    yield "method", ", ".join([f"{lock.method['name']}, scaling {lock.method['scaling']:g}", *options])
    if lock.plugin:
        package = f"{lock.plugin['package']} {lock.plugin['version']}".strip() or "of no package"
        yield "plug-in", f"{package}, code {lock.plugin['code'][:12]}"
    weights = ", ".join(f"{name} {weight:.4g}" for name, weight in lock.preference.weights.items())
    if lock.tasks:
        yield "preference", f"{weights} ({lock.preference.kind})"
    if lock.chosen:
        yield "chosen", f"by a comparison of {len(lock.chosen.get('tried', ()))} ways to merge"
    if found := coefficients(plan):
        numbers = ", ".join(f"{name} {number:.4g}" for name, number in found.items())
        yield "coefficients", f"{numbers} (what each task vector is multiplied by, scaling included)"


def _told(option: Any) -> str:
    """Return the value of an option in words, in brackets where each task has its own."""
    if not isinstance(option, Mapping):
        return str(option)
    return f"({', '.join(f'{task} {value}' for task, value in option.items())})"


def _tensors(plan: Plan) -> Iterator[Row]:
    merged = [job.num_elements for job in plan.jobs if job.merged]
    yield "merged", f"{number_of(len(merged), 'tensor')}, {number_of(sum(merged), 'element')}"
    yield from _statistics(plan, len(merged))
    yield "copied", number_of(len(plan.jobs) - len(merged), "tensor")
    reasons = Counter((job.reason, job.source, job.factor) for job in plan.jobs if not job.merged)
    for (why, source, factor), count in reasons.items():
        yield "", f"{count:,} from {source}{'' if factor == 1 else f', times {factor:g}'}: {why}"
    if plan.left_out:
        yield "left out", ", ".join(plan.left_out)
    if ranks := plan.ranks.values():
        least, most = min(ranks), max(ranks)
        rank = f"rank {most}" if least == most else f"ranks from {least} to {most}"
        yield "adapter", f"{number_of(len(ranks), 'layer')}, {rank}"
        yield "lost", _lost(plan)


def _lost(plan: Plan) -> str:
    """Return what is known of the merged task vectors that the adapter's ranks do not hold."""
    cut = {job.module for job in plan.jobs if isinstance(job, SolvedJob) and job.rank < job.most_rank}
    if not cut:
        return "nothing: the ranks hold all that is merged"
    layers = number_of(len(cut), "layer")
    return f"to be seen in {layers}, whose rank is bounded; the merge report and the card will say it"


def _statistics(plan: Plan, num_merged: int) -> Iterator[Row]:
    """Yield how many tensors are merged by statistics of the tasks' data, where the method needs these."""
    if kind := methods.get_method(plan.lock.method["name"]).statistics:
        count = len(plan.by_statistics)
        tensors = number_of(count, "tensor")
        files = [file.size_bytes for task in plan.lock.statistics[kind].values() for file in task.files]
        stored = f"{number_of(len(files), 'file')} of {format_bytes(sum(files))}"
        averaged = f"the other {num_merged - count:,} are averaged by preference"
        yield "statistics", f"{kind} of {tensors}, in {stored}; {averaged}"


def _notes(plan: Plan) -> Iterator[Row]:
    name = plan.lock.method["name"]
    if not methods.get_method(name).uses_preference:
        yield "note", f"{name} ignores the preference"
    if not plan.merged and plan.lock.layers:
        yield "note", "nothing is merged, so method and preference play no part"
    if plan.unread:
        yield "not read", f"{', '.join(plan.unread)}: no part of the result"
    if plan.unseen:
        yield "not seen", f"values of {', '.join(plan.unseen)}, for faults: that would take requests"
    refused = {fault.text: fault.option for fault in faults_left(plan.findings, plan.in_spite_of)}
    for notice in notices(plan):
        option = refused.get(notice)
        yield ("FAULT", f"{notice} (not merged without {option})") if option else ("note", notice)


def correction_row(lock: Lock) -> str:
    """Return in words what is corrected and how; empty without a correction."""
    found = lock.correction
    return f"{found['name']}, ridge {found['ridge']:g}, in {shown(found['tensor'])}" if found else ""


def described_correction(lock: Lock) -> dict[str, Any] | None:
    """Return name, options and tensor, for programs; None without a correction."""
    return dict(lock.correction) or None


def correction_notices(lock: Lock) -> Iterator[str]:
    """Yield that the head is no longer that of the merge."""
    if found := lock.correction:
        yield (
            f"{shown(found['tensor'])} is the merged one times a matrix that {found['name']} made for this "
            "merge and preference: it fits no other model's body"
        )
