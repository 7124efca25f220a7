"""The summary of a plan, for people and for programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hub_magmax import methods
from hub_magmax.checkpoints.side_files import tokenizer_notices
from hub_magmax.planning.budget import peak_memory_bytes
from hub_magmax.planning.plan import Plan
from hub_magmax.text import format_bytes


def notices(plan: Plan) -> tuple[str, ...]:
    """What a person should know and no rule forbids: tokenizers and heads that differ."""
    sources = plan.lock.sources
    classes = {name: ", ".join(source.architectures) for name, source in sources.items()}
    known = {name: text for name, text in classes.items() if text}
    heads = ", ".join(f"{name} {text}" for name, text in known.items())
    side_files = {name: source.side_files for name, source in sources.items()}
    name = plan.lock.method["name"]
    portable = methods.get_method(name).is_portable
    return (
        *(() if portable else (f"the bytes that {name} gives depend on the processor",)),
        *((f"the model classes differ: {heads}",) if len(set(known.values())) > 1 else ()),
        *tokenizer_notices(side_files, plan.recipe.output.files_from),
    )


def describe(plan: Plan) -> dict[str, Any]:
    """Return the summary that `plan --json` prints."""
    merged = [job for job in plan.jobs if job.merged]
    copied = [job for job in plan.jobs if not job.merged]
    return {
        "digest": plan.digest,
        "method": dict(plan.lock.method),
        "preference": dict(plan.lock.preference.weights),
        "tensors_merged": len(merged),
        "tensors_copied": len(copied),
        "tensors_left_out": list(plan.left_out),
        "tasks_not_read": list(plan.unread),
        "ranks": plan.ranks,
        "elements_merged": sum(job.num_elements for job in merged),
        "copied": [{"tensor": j.name, "from": j.source, "reason": j.reason} for j in copied],
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "shards": [{"file": s.file, "tensors": len(s.jobs), "data_bytes": s.data_bytes} for s in plan.shards],
        "peak_memory_bytes": peak_memory_bytes(plan),
        "notices": list(notices(plan)),
    }


def explain(plan: Plan) -> str:
    """Return the plan in words, for a person to read before it is carried out."""
    facts = describe(plan)
    method = plan.lock.method
    options = ", ".join(f"{k} {v}" for k, v in method.items() if k not in ("name", "scaling"))
    preference = ", ".join(f"{name} {weight:.4g}" for name, weight in plan.lock.preference.weights.items())
    lines = [
        f"base model   {plan.lock.base_model.label}",
        *(f"task {i:<7} {name}: {task.label}" for i, (name, task) in enumerate(plan.lock.tasks.items(), 1)),
        f"method       {method['name']}, scaling {method['scaling']:g}" + (f", {options}" if options else ""),
        f"preference   {preference} ({plan.lock.preference.kind})",
        f"merged       {facts['tensors_merged']:,} tensors, {facts['elements_merged']:,} elements",
        f"copied       {facts['tensors_copied']:,} tensors",
    ]
    reasons = Counter((job.reason, job.source) for job in plan.jobs if not job.merged)
    lines += [f"             {count:,} from {source}: {why}" for (why, source), count in reasons.items()]
    lines += [f"left out     {', '.join(plan.left_out)}"] if plan.left_out else []
    if ranks := plan.ranks.values():
        least, most = min(ranks), max(ranks)
        rank = f"rank {most}" if least == most else f"ranks from {least} to {most}"
        lines.append(f"adapter      {len(ranks):,} layers, {rank}")
    if not methods.get_method(method["name"]).uses_preference:
        lines.append(f"note         {method['name']} ignores the preference")
    if plan.unread:
        lines.append(f"not read     {', '.join(plan.unread)}: no part of the result")
    lines += [f"note         {notice}" for notice in notices(plan)]
    return "\n".join(
        [
            *lines,
            f"reads        {format_bytes(plan.bytes_in)}",
            f"writes       {format_bytes(plan.bytes_out)} in {len(plan.shards)} file(s)",
            f"memory       about {format_bytes(peak_memory_bytes(plan))} per process",
        ]
    )
