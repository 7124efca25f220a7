"""The command line: one function per verb of the main story, and a table of the other verbs' modules."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_magmax import __version__
from hub_magmax.terminal import (
    Answer,
    DestinationOptions,
    RecipeOptions,
    destination_options,
    device_option,
    faults_option,
    memory_option,
    progress,
    quiet,
    recipe_argument,
    recipe_options,
    say,
    verb,
    wrote,
)

if TYPE_CHECKING:
    from hub_magmax.merging.output.report import MergeReport
    from hub_magmax.publishing.commits import Destination
    from hub_magmax.recipe.lockfile import Lock
    from hub_magmax.recipe.schema import Recipe

#: Each verb and the module that holds its function, imported when the verb is used or listed.
VERBS = {
    "canary": "fleet.commands",
    "card": "cli",
    "compare": "cli",
    "diagnose": "cli",
    "evaluate": "cli",
    "lock": "cli",
    "merge": "cli",
    "methods": "methods.commands",
    "plan": "cli",
    "prefer": "cli",
    "push": "publishing.commands",
    "quickstart": "cli",
    "rollback": "fleet.commands",
    "run": "cli",
    "schema": "recipe.commands",
    "sign": "fleet.commands",
    "sweep": "cli",
    "validate": "recipe.commands",
    "verify": "fleet.commands",
}


class VerbGroup(click.Group):
    """The commands that `VERBS` names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(import_module(f"hub_magmax.{VERBS[cmd_name]}"), cmd_name)
        return command


@click.group(
    cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="hub-magmax")
def main() -> None:
    """Merge fine-tuned checkpoints into one model, under a preference.

    \b
    Start here:
      hub-magmax quickstart          the whole job on a small real example, in a minute or two
      hub-magmax validate RECIPE     find everything wrong in a recipe
      hub-magmax plan RECIPE         see what a merge will read, write and need
      hub-magmax run RECIPE          lock, merge, evaluate, write the card, push

    Exit codes: 0 success, 1 an error that says what to do (or a canary that regressed), 2 wrong usage.
    """


def _write_lock(locked: Lock, path: Path) -> Path:
    from hub_magmax.files import write_text

    write_text(path, locked.to_json())
    return path


@verb
@recipe_argument
@click.option("--out", type=Path, help="Where to write the lock.")
@click.option("--hash", "hash_files", is_flag=True, help="Read local checkpoints whole, and pin every byte.")
def lock(recipe: Path, out: Path | None, hash_files: bool) -> Answer:
    """Pin RECIPE: commits, sizes, hashes, and the preference as numbers."""
    from hub_magmax.pipeline import lock as make_lock
    from hub_magmax.recipe.loading import load_recipe
    from hub_magmax.recipe.stored import lock_beside

    locked = make_lock(load_recipe(recipe), hash_files=hash_files, report=say)
    path = _write_lock(locked, out or lock_beside(recipe))
    lines = [f"{name}: {source.label}" for name, source in locked.sources.items()]
    return Answer(json.loads(locked.to_json()), "\n".join([*lines, f"wrote {path}"]))


@verb
@recipe_argument
def prefer(recipe: Path) -> Answer:
    """Show the preference that RECIPE resolves to; an estimate is kept in the lock beside it."""
    from dataclasses import asdict

    from hub_magmax.pipeline import lock
    from hub_magmax.preference import resolve_preference
    from hub_magmax.recipe.loading import load_recipe
    from hub_magmax.recipe.stored import lock_beside

    asked = load_recipe(recipe)
    estimated = asked.preference is not None and asked.preference.is_estimated
    locked = lock(asked, report=say) if estimated else None
    found = locked.preference if locked else resolve_preference(asked)
    width = max(len(name) for name in found.weights)
    bars = [f"{n:<{width}}  {w:6.3f}  {'█' * round(40 * w)}" for n, w in found.weights.items()]
    notes = [f"{key.replace('_', ' ')}: {_plainly(value)}" for key, value in found.explanation.items()]
    if locked:
        notes.append(f"wrote {_write_lock(locked, lock_beside(recipe))}")
    return Answer(asdict(found), "\n".join([f"kind: {found.kind}", *bars, *notes]))


def _plainly(value: Any) -> str:
    """Return a number, or numbers by name, as a person would write them."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plainly(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(_plainly(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@verb
@recipe_argument
@device_option
def compare(recipe: Path, device: str | None) -> Answer:
    """Try methods, scalings and preferences in memory, and write the winner as a recipe."""
    from hub_magmax.analysis.comparing import comparable, write_comparison
    from hub_magmax.analysis.comparing import compare as do_compare
    from hub_magmax.pipeline import lock
    from hub_magmax.recipe.loading import load_recipe
    from hub_magmax.recipe.stored import read_recipe

    asked = read_recipe(RecipeOptions(recipe, device=device))
    locked = lock(comparable(asked), report=say)
    comparison = do_compare(asked, locked, report=say)
    files = write_comparison(load_recipe(recipe), comparison, recipe)
    return Answer(json.loads(comparison.to_json()), f"{comparison.table()}\n{wrote(files)}")


@verb
@recipe_options
@device_option
def sweep(asked: RecipeOptions) -> Answer:
    """Merge RECIPE in memory for many preferences, and show which trade-offs there are."""
    from hub_magmax.analysis.sweeping import sweep as do_sweep
    from hub_magmax.analysis.sweeping import sweepable, write_sweep
    from hub_magmax.pipeline import lock, result_folder
    from hub_magmax.recipe.stored import read_asked

    found, locked = read_asked(asked)
    locked = locked or lock(sweepable(found), report=say)
    surface = do_sweep(found, locked, report=say)
    files = [*write_sweep(found, surface, result_folder(found))]
    files += _linked_card(asked)
    return Answer(surface.to_dict(), f"{surface.table()}\n{wrote(files)}")


@verb
@recipe_options
def diagnose(asked: RecipeOptions) -> Answer:
    """Read RECIPE's checkpoints once, and say what is odd about them before they are merged."""
    from hub_magmax.analysis.diagnosing import diagnose as do_diagnose
    from hub_magmax.analysis.diagnosing import write_diagnosis
    from hub_magmax.pipeline import lock, result_folder
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.recipe.stored import read_asked

    found, locked = read_asked(asked)
    planned = make_plan(found, locked or lock(found, report=say))
    with progress(planned.bytes_out, "diagnosing") as advance:
        diagnosis = do_diagnose(planned, progress=advance)
    files = [*write_diagnosis(diagnosis, result_folder(found))]
    files += _linked_card(asked)
    return Answer(json.loads(diagnosis.to_json()), f"{diagnosis.table()}\n{wrote(files)}")


@verb
@recipe_options
@memory_option
@device_option
def plan(asked: RecipeOptions) -> Answer:
    """Show what merging RECIPE will read, write and need, from headers alone."""
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.planning.summary import describe, explain
    from hub_magmax.recipe.stored import read_asked

    found, locked = read_asked(asked)
    cache = SourceCache()
    planned = make_plan(found, locked or lock(found, cache=cache), cache=cache)
    return Answer(describe(planned), explain(planned))


@verb
@recipe_options
@memory_option
@device_option
@faults_option
def merge(asked: RecipeOptions, in_spite_of: tuple[str, ...]) -> Answer:
    """Merge RECIPE into its output folder, without evaluating or publishing."""
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.merging.execution import merge as do_merge
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.processes import find_processes
    from hub_magmax.recipe.stored import read_asked

    found, locked = read_asked(asked)
    processes, cache = find_processes(say), SourceCache()
    locked = locked or processes.first_decides(lambda: lock(found, cache=cache))
    planned = make_plan(found, locked, cache=cache, in_spite_of=in_spite_of)
    with progress(planned.progress_bytes if processes.is_first else 0) as advance:
        report = do_merge(planned, progress=advance, processes=processes, cache=cache)
    return Answer(json.loads(report.to_json()), _summary(found, report) if processes.is_first else "")


def _summary(recipe: Recipe, report: MergeReport) -> str:
    from hub_magmax.files import from_here
    from hub_magmax.text import format_bytes

    lines = [
        f"{format_bytes(report.bytes_out)} in {len(report.shards)} file(s), {report.seconds:.1f} s, "
        f"peak memory {format_bytes(report.peak_memory_bytes)}",
        f"wrote {from_here(recipe.output_path)}" if recipe.output.keep else "no folder was kept",
    ]
    if report.profile:
        spent = sorted(report.profile.items(), key=lambda item: -item[1])
        lines.insert(1, "threads    " + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent))
    if report.opened:
        lines.append("opened     " + ": ".join(filter(None, report.opened.values())))
    lines += [f"note: {notice}" for notice in report.notices]
    if report.shares:
        lines.insert(0, "elements   " + ", ".join(f"{n} {share:.3f}" for n, share in report.shares.items()))
    return "\n".join(lines)


@verb
@recipe_options
@click.option("--push-anyway", is_flag=True, help="Push also if the model regressed on a guard.")
@click.option("--dry-run", is_flag=True, help="Show the plan and check everything; write and send nothing.")
@memory_option
@device_option
@faults_option
@destination_options
def run(
    asked: RecipeOptions,
    to: DestinationOptions,
    push_anyway: bool,
    dry_run: bool,
    in_spite_of: tuple[str, ...],
) -> Answer:
    """Do all that RECIPE asks for: lock, plan, merge, evaluate, card, push."""
    from hub_magmax.files import from_here
    from hub_magmax.pipeline import destination_of
    from hub_magmax.pipeline import run as do_run
    from hub_magmax.processes import find_processes
    from hub_magmax.recipe.stored import read_asked

    found, locked = read_asked(asked)
    destination = destination_of(found, to.given())
    if dry_run:
        return _dry_run(found, locked, destination, in_spite_of)
    processes = find_processes(say)
    done = do_run(
        found,
        locked=locked,
        report=say if processes.is_first else quiet,
        progress=progress,
        processes=processes,
        push_anyway=push_anyway,
        destination=destination,
        in_spite_of=in_spite_of,
    )
    if not processes.is_first:
        return Answer({}, "")
    values = {"output": from_here(found.output_path), "report": json.loads(done.report.to_json())}
    text = _summary(found, done.report)
    if done.scores is not None:
        values["scores"] = json.loads(done.scores.to_json())
        guards = "".join(f"guard {guard.name}: {guard.verdict}\n" for guard in done.guards)
        text = f"{done.scores.table()}\n{guards}\n{text}"
    if done.published is not None:
        values["published"] = {"commit": done.published.commit, "url": done.published.url}
        text += f"\npublished {done.published.url}"
    return Answer(values, text)


def _dry_run(
    recipe: Recipe, locked: Lock | None, destination: Destination | None, in_spite_of: tuple[str, ...]
) -> Answer:
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.planning.summary import describe, explain
    from hub_magmax.publishing.preflight import rehearse

    cache = SourceCache()
    locked = locked or lock(recipe, report=say, cache=cache)
    planned = make_plan(recipe, locked, cache=cache, in_spite_of=in_spite_of)
    findings = rehearse(planned, destination)
    values = describe(planned) | {
        "checks": [
            {"subject": f.subject, "found": f.found, "error": str(f.error) if f.error else None}
            for f in findings
        ]
    }
    text = "\n".join([explain(planned), *map(str, findings)])
    return Answer(values, text, exit_code=int(any(finding.error for finding in findings)))


@verb
@recipe_options
def evaluate(asked: RecipeOptions) -> Answer:
    """Score the merged model of RECIPE, its base model and every task's own checkpoint."""
    from hub_magmax.evaluation.scores import write_scores
    from hub_magmax.evaluation.scoring import evaluate as do_evaluate
    from hub_magmax.processes import find_processes
    from hub_magmax.recipe.stored import read_merged

    found, locked = read_merged(asked)
    processes = find_processes(say)
    report = say if processes.is_first else quiet
    scores = do_evaluate(found, locked, found.output_path, processes=processes, report=report)
    if not processes.is_first:
        return Answer({}, "")
    write_scores(scores, found.output_path)
    return Answer(json.loads(scores.to_json()), scores.table())


@verb
@recipe_options
def card(asked: RecipeOptions) -> Answer:
    """Write the card of RECIPE's merged model from what was measured."""
    from hub_magmax.recipe.stored import read_merged
    from hub_magmax.reporting.card_file import write_stored_card

    path = write_stored_card(*read_merged(asked))
    return Answer({"card": str(path)}, wrote([path]))


def _linked_card(asked: RecipeOptions) -> list[Path]:
    """Write the card of the merged model again where there is one, since it links to the files beside it."""
    from hub_magmax.recipe.stored import read_asked, read_merged
    from hub_magmax.reporting.card_file import CARD_NAME, write_stored_card

    recipe, _ = read_asked(asked)
    if not (recipe.output_path / CARD_NAME).is_file():
        return []
    return [write_stored_card(*read_merged(asked), keep_edited=True)]


@verb
@click.argument("folder", type=Path, default=Path("quickstart"))
def quickstart(folder: Path) -> Answer:
    """Make five small checkpoints in FOLDER, merge them, and show what the preference does."""
    from hub_magmax.quickstart.demo import quickstart as do_quickstart

    return Answer(*do_quickstart(folder, report=say))
