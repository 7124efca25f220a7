"""The command line: one verb per public function, loaded when it is called."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_magmax import __version__
from hub_magmax.errors import HubMagmaxError, OutputError, RecipeError, explained
from hub_magmax.text import holds_control, printable, spelled_out, without_secrets

if TYPE_CHECKING:
    from hub_magmax.recipe.lockfile import Lock
    from hub_magmax.recipe.schema import Recipe

Answer = tuple[Any, str]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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


class RegressionError(Exception):
    """An answer like any other, (values, text), that ends with exit code 1."""


def verb(function: Callable[..., Answer]) -> Any:
    """Turn a function that returns (values for machines, text for people) into a subcommand."""

    @wraps(function)
    def call(*, as_json: bool, debug: bool, **arguments: Any) -> None:
        failed = False
        try:
            _refuse_unprintable(arguments)
            values, text = function(**arguments)
        except RegressionError as regression:
            (values, text), failed = regression.args, True
        except BrokenPipeError:
            sys.exit(1)
        except Exception as error:
            told = explained(error)
            if debug or told is None:
                _say(traceback.format_exc())
            else:
                _print_error(told, as_json)
            sys.exit(1)
        shown = json.dumps(values, indent=2, ensure_ascii=False) if as_json else printable(text)
        click.echo(without_secrets(shown))
        if failed:
            sys.exit(1)

    call = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(call)
    call = click.option("--json", "as_json", is_flag=True, help="Print one JSON value for programs.")(call)
    return main.command()(call)


#: Arguments that are texts, not names.
_TEXTS = ("commit_message",)


def _refuse_unprintable(arguments: Mapping[str, Any]) -> None:
    """Raise where a name or a path holds what no terminal shows and no recipe can store.

    Paths are no `click.Path`, which looks for the file before this can be told.
    """
    for name, value in arguments.items():
        if isinstance(value, str | Path) and name not in _TEXTS and holds_control(str(value)):
            raise RecipeError(
                "this holds control characters, or bytes that are not text",
                where=f"{name.replace('_', '-')} {spelled_out(str(value))}",
                expected="characters that can be shown",
                hint="Check how the shell quotes it, or rename the file or folder.",
            )


def _print_error(error: HubMagmaxError, as_json: bool) -> None:
    if as_json:
        facts = {"kind": type(error).__name__, "what": error.what, "where": error.where}
        facts |= {"expected": error.expected, "hint": error.hint}
        click.echo(json.dumps({"error": facts}, indent=2, ensure_ascii=False))
    else:
        click.echo(f"Error: {printable(str(error))}", err=True)


recipe_argument = click.argument("recipe", type=Path)


def recipe_verb(function: Callable[..., Answer]) -> Any:
    """Turn a function of a recipe, its lock and its output into a subcommand."""
    function = click.option("--output", type=Path, help="Folder to create, instead of the recipe's.")(
        function
    )
    function = click.option(
        "--lock",
        "lock_path",
        type=Path,
        help="Lock to follow; by default the one beside the recipe, if it is there.",
    )(function)
    return verb(recipe_argument(function))


memory_option = click.option("--memory", help="Most memory of each process, such as 1GB.")
device_option = click.option("--device", help="Have torch compute there: cpu, cuda or mps.")


def _read(
    path: Path,
    lock_path: Path | None = None,
    output: Path | None = None,
    memory: str | None = None,
    device: str | None = None,
) -> tuple[Recipe, Lock | None]:
    """Return the recipe, with what the command line says instead, and its lock, if there is one."""
    from hub_magmax.recipe.loading import load_recipe, updated
    from hub_magmax.recipe.lockfile import read_lock
    from hub_magmax.recipe.matching import check_lock

    recipe = load_recipe(path)
    instead = {"path": output and str(output.absolute()), "memory": memory, "device": device}
    if said := {key: value for key, value in instead.items() if value is not None}:
        recipe = updated(recipe, {"output": recipe.to_dict()["output"] | said})
    beside = lock_beside(path)
    if lock_path is None and not beside.is_file():
        return recipe, None
    lock = read_lock(lock_path or beside)
    check_lock(recipe, lock, str(lock_path or beside))
    return recipe, lock


def lock_beside(recipe: Path) -> Path:
    """Return where a recipe's lock lies: `recipe.yaml` goes with `recipe.lock.json`."""
    return recipe.with_name(recipe.stem + ".lock.json")


def _write_lock(locked: Lock, path: Path) -> Path:
    from hub_magmax.files import write_text

    write_text(path, locked.to_json())
    return path


@contextmanager
def _progress(total: int, doing: str = "merging") -> Iterator[Callable[[int], None] | None]:
    """Show bytes written and time left, on a terminal, unless Hub progress bars are switched off."""
    from huggingface_hub.utils import tqdm

    make_bar: Any = tqdm
    bar = make_bar(total=total, unit="B", unit_scale=True, desc=doing, disable=None)
    with bar:
        yield bar.update


def _say(line: str) -> None:
    click.echo(without_secrets(printable(line)), err=True)


def _quiet(line: str) -> None:
    pass


@verb
@recipe_argument
def validate(recipe: Path) -> Answer:
    """Check RECIPE without looking at any checkpoint."""
    from hub_magmax.recipe.loading import load_recipe

    found = load_recipe(recipe)
    facts = {"recipe": str(recipe), "digest": found.digest, "tasks": list(found.task_names)}
    return facts, f"{recipe}: valid, {len(found.tasks)} tasks, {found.method.name}"


@verb
@recipe_argument
@click.option("--out", type=Path, help="Where to write the lock.")
@click.option("--hash", "hash_files", is_flag=True, help="Read local checkpoints whole, and pin every byte.")
def lock(recipe: Path, out: Path | None, hash_files: bool) -> Answer:
    """Pin RECIPE: commits, sizes, hashes, and the preference as numbers."""
    from hub_magmax.pipeline import lock as make_lock
    from hub_magmax.recipe.loading import load_recipe

    locked = make_lock(load_recipe(recipe), hash_files=hash_files, report=_say)
    path = _write_lock(locked, out or lock_beside(recipe))
    lines = [f"{name}: {source.label}" for name, source in locked.sources.items()]
    return json.loads(locked.to_json()), "\n".join([*lines, f"wrote {path}"])


@verb
@recipe_argument
def prefer(recipe: Path) -> Answer:
    """Show the preference that RECIPE resolves to; an estimate is kept in the lock beside it."""
    from dataclasses import asdict

    from hub_magmax.pipeline import lock
    from hub_magmax.preference import resolve_preference
    from hub_magmax.recipe.loading import load_recipe

    asked = load_recipe(recipe)
    estimated = asked.preference is not None and asked.preference.is_estimated
    locked = lock(asked, report=_say) if estimated else None
    found = locked.preference if locked else resolve_preference(asked)
    width = max(len(name) for name in found.weights)
    bars = [f"{n:<{width}}  {w:6.3f}  {'█' * round(40 * w)}" for n, w in found.weights.items()]
    notes = [f"{key.replace('_', ' ')}: {_plainly(value)}" for key, value in found.explanation.items()]
    if locked:
        notes.append(f"wrote {_write_lock(locked, lock_beside(recipe))}")
    return asdict(found), "\n".join([f"kind: {found.kind}", *bars, *notes])


def _plainly(value: Any) -> str:
    """Return a number, or numbers by name, as a person would write them."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plainly(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(_plainly(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@verb
@recipe_argument
def compare(recipe: Path) -> Answer:
    """Try methods, scalings and preferences in memory, and write the winner as a recipe."""
    from hub_magmax.analysis.comparing import comparable, write_comparison
    from hub_magmax.analysis.comparing import compare as do_compare
    from hub_magmax.pipeline import lock
    from hub_magmax.recipe.loading import load_recipe

    asked = load_recipe(recipe)
    locked = lock(comparable(asked), report=_say)
    comparison = do_compare(asked, locked, report=_say)
    files = write_comparison(asked, comparison, recipe)
    wrote = "\n".join(f"wrote {path}" for path in files)
    return json.loads(comparison.to_json()), f"{comparison.table()}\n{wrote}"


@recipe_verb
def sweep(recipe: Path, lock_path: Path | None, output: Path | None) -> Answer:
    """Merge RECIPE in memory for many preferences, and show which trade-offs there are."""
    from hub_magmax.analysis.sweeping import sweep as do_sweep
    from hub_magmax.analysis.sweeping import sweepable, write_sweep
    from hub_magmax.pipeline import lock, result_folder

    found, locked = _read(recipe, lock_path, output)
    asked = sweepable(found)
    surface = do_sweep(found, locked or lock(asked, report=_say), report=_say)
    files = [*write_sweep(found, surface, result_folder(found))]
    files += _linked_card(recipe, lock_path, output)
    wrote = "\n".join(f"wrote {path}" for path in files)
    return surface.to_dict(), f"{surface.table()}\n{wrote}"


@recipe_verb
def diagnose(recipe: Path, lock_path: Path | None, output: Path | None) -> Answer:
    """Read RECIPE's checkpoints once, and say what is odd about them before they are merged."""
    from hub_magmax.analysis.diagnosing import diagnose as do_diagnose
    from hub_magmax.analysis.diagnosing import write_diagnosis
    from hub_magmax.pipeline import lock, result_folder
    from hub_magmax.pipeline import plan as make_plan

    found, locked = _read(recipe, lock_path, output)
    planned = make_plan(found, locked or lock(found, report=_say))
    with _progress(planned.bytes_out, "diagnosing") as progress:
        diagnosis = do_diagnose(planned, progress=progress)
    files = [*write_diagnosis(diagnosis, result_folder(found))]
    files += _linked_card(recipe, lock_path, output)
    wrote = "\n".join(f"wrote {path}" for path in files)
    return json.loads(diagnosis.to_json()), f"{diagnosis.table()}\n{wrote}"


@recipe_verb
@memory_option
def plan(recipe: Path, lock_path: Path | None, output: Path | None, memory: str | None) -> Answer:
    """Show what merging RECIPE will read, write and need, from headers alone."""
    from hub_magmax.checkpoints.opening import HubSources
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan

    found, locked = _read(recipe, lock_path, output, memory)
    hub = HubSources()
    planned = make_plan(found, locked or lock(found, hub=hub), hub=hub)
    return planned.to_dict(), planned.explain()


@recipe_verb
@memory_option
@device_option
def merge(
    recipe: Path, lock_path: Path | None, output: Path | None, memory: str | None, device: str | None
) -> Answer:
    """Merge RECIPE into its output folder, without evaluating or publishing."""
    from hub_magmax.checkpoints.opening import HubSources
    from hub_magmax.merging.execution import merge as do_merge
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.processes import find_processes

    found, locked = _read(recipe, lock_path, output, memory, device)
    processes, hub = find_processes(), HubSources()
    locked = locked or processes.first_decides(lambda: lock(found, hub=hub))
    planned = make_plan(found, locked, hub=hub)
    with _progress(planned.progress_bytes if processes.is_first else 0) as progress:
        report = do_merge(planned, progress=progress, processes=processes, hub=hub)
    return json.loads(report.to_json()), _summary(found, report) if processes.is_first else ""


def _summary(recipe: Recipe, report: Any) -> str:
    from hub_magmax.text import format_bytes

    lines = [
        f"{format_bytes(report.bytes_out)} in {len(report.shards)} file(s), {report.seconds:.1f} s, "
        f"peak memory {format_bytes(report.peak_memory_bytes)}",
        f"wrote {recipe.output.path}" if recipe.output.keep else "no folder was kept",
    ]
    if report.profile:
        spent = sorted(report.profile.items(), key=lambda item: -item[1])
        lines.insert(1, "threads    " + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent))
    lines += [f"note: {notice}" for notice in report.notices]
    if report.shares:
        lines.insert(0, "elements   " + ", ".join(f"{n} {share:.3f}" for n, share in report.shares.items()))
    return "\n".join(lines)


def destination_options(function: Callable[..., Answer]) -> Any:
    """Add what says how a model is committed to its repository."""
    for option in (
        click.option("--commit-message", help="Title of the commit; `Add merged model`."),
        click.option("--create-pr", is_flag=True, default=None, help="Open a pull request instead."),
        click.option("--revision", help="Branch to commit to."),
        click.option("--private", is_flag=True, default=None, help="Make a new repository private."),
    ):
        function = option(function)
    return function


@recipe_verb
@click.option("--push-anyway", is_flag=True, help="Push also if the model regressed on a guard.")
@click.option("--dry-run", is_flag=True, help="Show the plan and check everything; write and send nothing.")
@memory_option
@device_option
@destination_options
def run(
    recipe: Path,
    lock_path: Path | None,
    output: Path | None,
    *,
    memory: str | None,
    device: str | None,
    push_anyway: bool,
    dry_run: bool,
    **how: Any,
) -> Answer:
    """Do all that RECIPE asks for: lock, plan, merge, evaluate, card, push."""
    from hub_magmax.pipeline import destination_of
    from hub_magmax.pipeline import run as do_run
    from hub_magmax.processes import find_processes

    found, locked = _read(recipe, lock_path, output, memory, device)
    destination = destination_of(found, how)
    if dry_run:
        return _dry_run(found, locked, destination)
    processes = find_processes()
    say = _say if processes.is_first else _quiet
    done = do_run(
        found,
        locked=locked,
        report=say,
        progress=_progress,
        processes=processes,
        push_anyway=push_anyway,
        destination=destination,
    )
    if not processes.is_first:
        return {}, ""
    values = {"output": found.output.path, "report": json.loads(done.report.to_json())}
    text = _summary(found, done.report)
    if done.scores is not None:
        values["scores"] = json.loads(done.scores.to_json())
        guards = "".join(f"guard {guard.name}: {guard.verdict}\n" for guard in done.guards)
        text = f"{done.scores.table()}\n{guards}\n{text}"
    if done.published is not None:
        values["published"] = {"commit": done.published.commit, "url": done.published.url}
        text += f"\npublished {done.published.url}"
    return values, text


def _dry_run(recipe: Recipe, locked: Lock | None, destination: Any) -> Answer:
    from hub_magmax.checkpoints.opening import HubSources
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.publishing.preflight import rehearse

    hub = HubSources()
    planned = make_plan(recipe, locked or lock(recipe, report=_say, hub=hub), hub=hub)
    findings = rehearse(planned, destination)
    values = planned.to_dict() | {
        "checks": [
            {"subject": f.subject, "found": f.found, "error": str(f.error) if f.error else None}
            for f in findings
        ]
    }
    answer = values, "\n".join([planned.explain(), *map(str, findings)])
    if any(finding.error for finding in findings):
        raise RegressionError(*answer)
    return answer


@recipe_verb
def evaluate(recipe: Path, lock_path: Path | None, output: Path | None) -> Answer:
    """Score the merged model of RECIPE, its base model and every task's own checkpoint."""
    from hub_magmax.evaluation.scores import write_scores
    from hub_magmax.evaluation.scoring import evaluate as do_evaluate
    from hub_magmax.processes import find_processes

    found, locked = _merged(recipe, lock_path, output)
    processes = find_processes()
    say = _say if processes.is_first else _quiet
    scores = do_evaluate(found, locked, found.output_path, processes=processes, report=say)
    if not processes.is_first:
        return {}, ""
    write_scores(scores, found.output_path)
    return json.loads(scores.to_json()), scores.table()


@recipe_verb
def card(recipe: Path, lock_path: Path | None, output: Path | None) -> Answer:
    """Write the card of RECIPE's merged model from what was measured."""
    path = _write_card(*_merged(recipe, lock_path, output))
    return {"card": str(path)}, f"wrote {path}"


def _linked_card(recipe: Path, lock_path: Path | None, output: Path | None) -> list[Path]:
    """Write the card of the merged model again where there is one, since it links to what lies beside it."""
    from hub_magmax.reporting.card import CARD_NAME

    found, _ = _read(recipe, lock_path, output)
    if not (found.output_path / CARD_NAME).is_file():
        return []
    return [_write_card(*_merged(recipe, lock_path, output))]


def _write_card(recipe: Recipe, locked: Lock) -> Path:
    from hub_magmax.evaluation.scores import SCORES_NAME, read_scores
    from hub_magmax.merging.output.report import REPORT_NAME, read_report
    from hub_magmax.reporting.card import write_card

    folder = recipe.output_path
    scores = read_scores(folder) if (folder / SCORES_NAME).is_file() else None
    return write_card(recipe, locked, read_report(folder / REPORT_NAME), scores, folder)


def _merged(recipe: Path, lock_path: Path | None, output: Path | None) -> tuple[Recipe, Lock]:
    """Return the recipe and the lock that its merged model was made from."""
    from hub_magmax.recipe.lockfile import LOCK_NAME, read_lock
    from hub_magmax.recipe.matching import check_lock

    found, _ = _read(recipe, lock_path, output)
    if not (found.output_path / LOCK_NAME).is_file():
        raise OutputError(
            "there is no merged model yet", where=str(found.output_path), hint="Run `hub-magmax merge` first."
        )
    locked = read_lock(found.output_path / LOCK_NAME)
    check_lock(found, locked, str(found.output_path / LOCK_NAME))
    return found, locked


@verb
@click.argument("folder", type=Path)
@click.argument("repo_id")
@destination_options
def push(folder: Path, repo_id: str, **how: Any) -> Answer:
    """Publish a merged FOLDER as REPO_ID, in one commit."""
    from hub_magmax.publishing.commits import Destination
    from hub_magmax.publishing.pushing import push_to

    said = {key: value for key, value in how.items() if value is not None}
    published = push_to(Destination(repo_id, **said), folder)
    return {"commit": published.commit, "url": published.url}, f"published {published.url}"


@verb
@click.argument("model")
@click.option("--revision", help="Revision of a model on the Hub.")
@click.option("--rebuild", is_flag=True, help="Also merge it again from its sources, and compare every byte.")
@click.option(
    "--from",
    "folder",
    type=Path,
    help="With --rebuild: where relative paths of local checkpoints start; the current folder.",
)
@click.option("--public-key", type=Path, help="Also check a folder's signature.")
def verify(
    model: str, revision: str | None, rebuild: bool, folder: Path | None, public_key: Path | None
) -> Answer:
    """Check a merged MODEL, a folder or a Hub id, against its own merge report."""
    from hub_magmax.fleet.verifying import verify as do_verify

    hashes = do_verify(model, revision=revision)
    lines = [f"{sha256}  {path}" for path, sha256 in hashes.items()]
    lines.append(f"{model}: {len(hashes)} file(s), all as merged")
    if public_key is not None:
        from hub_magmax.fleet.signing import check_signature

        check_signature(model, public_key)
        lines.append(f"{model}: signed by the owner of {public_key}")
    values: dict[str, Any] = {
        "sha256": hashes,
        "rebuilt": rebuild,
        "signature_checked": public_key is not None,
    }
    if rebuild:
        from hub_magmax.fleet.rebuilding import changed_data
        from hub_magmax.fleet.rebuilding import rebuild as do_rebuild

        do_rebuild(model, revision=revision, folder=folder)
        lines.append(f"{model}: merged again from its sources, every byte the same")
        values["data_changed"] = changed = changed_data(model, revision=revision, folder=folder)
        lines += [f"{name}: no longer the data that was locked, so scores may differ" for name in changed]
    return values, "\n".join(lines)


@verb
@click.argument("folder", type=Path)
@click.option("--private-key", required=True, type=Path, help="PEM file of the key.")
def sign(folder: Path, private_key: Path) -> Answer:
    """Sign a merged FOLDER with a key file, by OpenSSF model-signing."""
    from hub_magmax.fleet.signing import sign as do_sign

    path = do_sign(folder, private_key)
    return {"signature": str(path)}, f"wrote {path}"


@verb
@click.argument("repo_id", metavar="REPO")
@click.option("--branch", help="Branch to move; the default branch.")
@click.option("--to", metavar="REVISION", help="What to restore; the last other model that passes `verify`.")
def rollback(repo_id: str, branch: str | None, to: str | None) -> Answer:
    """Move REPO back to an earlier model that passes `verify`, in one commit."""
    from hub_magmax.fleet.rollback import rollback as do_rollback

    published = do_rollback(repo_id, branch=branch, to=to)
    return {"commit": published.commit, "url": published.url}, f"restored {published.url}"


@verb
@click.argument("model")
@click.option("--revision", help="Revision of a model on the Hub.")
@click.option("--against", metavar="REVISION", help="Whose stored scores are pinned; by default MODEL's own.")
@click.option("--margin", type=click.FloatRange(min=0), default=0.01, show_default=True, help="Allowed loss.")
@click.option(
    "--from",
    "folder",
    type=Path,
    help="Where relative paths of local data start; the current folder.",
)
def canary(model: str, folder: Path | None, **options: Any) -> Answer:
    """Score a merged MODEL again; exit 1 if a task is worse than pinned results by more than the margin."""
    from hub_magmax.fleet.canaries import canary as do_canary

    found = do_canary(model, folder=folder, report=_say, **options)
    if found.regressed:
        raise RegressionError(found.to_dict(), found.table())
    return found.to_dict(), found.table()


@verb
def methods() -> Answer:
    """List the merge methods, their options and how they use the preference."""
    from hub_magmax.methods import get_method, method_names

    found = [get_method(name) for name in method_names()]
    values = [
        {
            "name": method.name,
            "summary": method.summary,
            "scaling": method.scaling,
            "source": method.source,
            "uses_preference": method.uses_preference,
            "options": {name: str(default) for name, (_, default) in method.options.items()},
        }
        for method in found
    ]
    width = max(len(method.name) for method in found)
    lines = []
    for method in found:
        lines.append(f"{method.name:<{width}}  {method.summary}")
        options = ", ".join(f"{name}: {default}" for name, (_, default) in method.options.items())
        lines.append(f"{'':<{width}}  scaling: {method.scaling:g}" + (f", {options}" if options else ""))
    return values, "\n".join(lines)


@verb
def schema() -> Answer:
    """Print the JSON schema of recipes, for editors."""
    from hub_magmax.recipe.loading import json_schema

    found = json_schema()
    return found, json.dumps(found, indent=2)


@verb
@click.argument("folder", type=Path, default=Path("quickstart"))
def quickstart(folder: Path) -> Answer:
    """Make five small checkpoints in FOLDER, merge them, and show what the preference does."""
    from hub_magmax.quickstart.demo import quickstart as do_quickstart

    return do_quickstart(folder, report=_say)
