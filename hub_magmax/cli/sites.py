"""Runs and plans of all sites of a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hub_magmax.cli.options import DestinationOptions, RecipeOptions
from hub_magmax.cli.recipe_and_lock import read_asked
from hub_magmax.cli.terminal import ERROR, REGRESSED, Answer, progress, say
from hub_magmax.errors import HubMagmaxError, RecipeError, RegressedError
from hub_magmax.files import from_here
from hub_magmax.recipe.loading import parse_text
from hub_magmax.recipe.sites import shared_places
from hub_magmax.text import format_bytes, number_of

if TYPE_CHECKING:
    from hub_magmax.pipeline import Run
    from hub_magmax.planning.plan import Plan
    from hub_magmax.recipe.lockfile import Lock
    from hub_magmax.recipe.schema import Recipe


def sites_of(asked: RecipeOptions) -> dict[str, RecipeOptions]:
    """Return the options for each site of the recipe; none where it has none, or where one is named.

    Raises:
        RecipeError: If the recipe is not valid, or an option names one place for all sites.
    """
    recipe = parse_text(asked.text, asked.changes)
    for option, value in (("--output", asked.output), ("--lock", asked.lock_path)):
        if recipe.sites and value is not None:
            raise RecipeError(
                "this is one place for all sites",
                where=f"{option} {value}",
                hint="Name one of them with --site, or leave the option out.",
            )
    return {site: asked.of_site(site) for site in recipe.sites or ()}


def run_all(
    sites: Mapping[str, RecipeOptions],
    to: DestinationOptions,
    in_spite_of: tuple[str, ...],
    *,
    push_anyway: bool,
    dry_run: bool,
) -> Answer:
    """Carry out the recipe of every site, and tell what became of each; or show what that would do."""
    if dry_run:
        return plan_all(sites, in_spite_of, to=to)
    from hub_magmax.pipeline import destination_of
    from hub_magmax.processes import find_processes
    from hub_magmax.studies import run_together

    processes = find_processes(say)
    read = _read(sites, processes.first_decides)
    recipes = {site: found for site, (found, _) in read.items()}
    changes = to.given()
    done = run_together(
        recipes,
        {site: locked for site, (_, locked) in read.items() if locked},
        {site: destination_of(found, changes) for site, found in recipes.items()},
        say,
        progress,
        processes,
        push_anyway=push_anyway,
        in_spite_of=in_spite_of,
    )
    return answer_of(done) if processes.is_first else Answer({}, "")


def _read(
    sites: Mapping[str, RecipeOptions], decide: Callable[[Callable[[], Lock]], Lock] = lambda make: make()
) -> dict[str, tuple[Recipe, Lock | None]]:
    """Return the recipe of every site, and its lock where there is one.

    Raises:
        RecipeError: If values of the command line give two sites one place.
    """
    read = {site: read_asked(own, decide) for site, own in sites.items()}
    for site, key, other in shared_places({site: recipe for site, (recipe, _) in read.items()}):
        raise RecipeError(
            f"this is one place for the sites {other} and {site}",
            where=f"--set output.{key}",
            hint="Name one of them with --site, or write it into the recipe: the site's name is added there.",
        )
    return read


def answer_of(done: Mapping[str, Run | HubMagmaxError]) -> Answer:
    """Return what became of each site."""
    failed = [found for found in done.values() if isinstance(found, HubMagmaxError)]
    has_errors = any(not isinstance(found, RegressedError) for found in failed)
    exit_code = ERROR if has_errors else REGRESSED if failed else 0
    lines = [f"{site}: {_told(found)}" for site, found in done.items()]
    lines.append(f"{len(done) - len(failed)} of {len(done)} sites are done{_spent(done)}")
    values = {site: _values(found) for site, found in done.items()}
    return Answer({"sites": values}, "\n".join(lines), exit_code=exit_code)


def _spent(done: Mapping[str, Run | HubMagmaxError]) -> str:
    """Return time and memory of the merges that were made now, in words."""
    runs = [found for found in done.values() if not isinstance(found, HubMagmaxError)]
    made = [found.report for found in runs if not found.merged_before]
    if not made:
        return ""
    seconds, peak = max(one.seconds for one in made), max(one.peak_memory_bytes for one in made)
    return f"; merged in {seconds:.1f} s, peak memory {format_bytes(peak)}"


def _told(done: Run | HubMagmaxError) -> str:
    """Return in a line what became of one site."""
    from hub_magmax.publishing.addresses import pushed
    from hub_magmax.reporting.headline import result

    if isinstance(done, HubMagmaxError):
        return f"FAILED: {done}"
    parts = [f"{from_here(done.output)}{' was there' if done.merged_before else ''}"]
    if done.scores is not None:
        parts += [text.removesuffix(".") for text in result(done.scores, done.plan.lock) if text]
    if done.published is not None:
        parts.append(pushed(done.published))
    return "; ".join(parts)


def _values(done: Run | HubMagmaxError) -> dict[str, Any]:
    from hub_magmax.publishing.addresses import pushed_values

    if isinstance(done, HubMagmaxError):
        return {"error": done.to_dict()}
    found: dict[str, Any] = {
        "output": from_here(done.output),
        "merged_before": done.merged_before,
        "report": json.loads(done.report.to_json()),
    }
    if done.scores is not None:
        found["scores"] = json.loads(done.scores.to_json())
    if done.published is not None:
        found["published"] = pushed_values(done.published)
    return found


# Complex only by count: a line of each kind.
def plan_all(
    sites: Mapping[str, RecipeOptions], in_spite_of: tuple[str, ...], *, to: DestinationOptions | None = None
) -> Answer:
    """Show what the merges for all sites will read together, write and need.

    Args:
        to: Where models go, for a rehearsal: whatever could fail late is looked at.
    """
    from hub_magmax.planning.findings.finding import faults_left
    from hub_magmax.planning.memory_rows import sites_memory_bytes
    from hub_magmax.planning.summary import describe, lacks_columns

    plans = _plans(sites, in_spite_of)
    described = {site: describe(one) for site, one in plans.items()}
    refused = [site for site, one in plans.items() if faults_left(one.findings, one.in_spite_of)]
    missing = _missing(plans)
    lines = [f"{site}: {_line(one)}{'' if site in missing else ', there'}" for site, one in plans.items()]
    lines += [f"{site}: a merge would be refused: see `plan --site {site}`" for site in refused]
    unscored = [site for site, found in described.items() if lacks_columns(found)]
    lines += [f"{site}: its examples could not be scored: see `plan --site {site}`" for site in unscored]
    read = max((described[site]["bytes_in"] for site in missing), default=0)
    memory = sites_memory_bytes([*missing.values()])
    written = sum(described[site]["bytes_out"] for site in missing)
    lines.append(
        f"reads {format_bytes(read)}, once for {number_of(len(missing), 'site')}; "
        f"writes {format_bytes(written)}; memory about {format_bytes(memory)}"
    )
    failed = _rehearsed(missing, to) if to is not None else []
    lines += failed or ([] if to is None else ["all checks passed"])
    values = {"sites": described, "bytes_in": read, "bytes_out": written, "failed_checks": failed}
    values["peak_memory_bytes"] = memory
    return Answer(values, "\n".join(lines), exit_code=ERROR if refused or unscored or failed else 0)


def _missing(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """Return the plans that are not carried out yet."""
    from hub_magmax.merging.execution import is_finished

    return {site: one for site, one in plans.items() if not is_finished(one)}


def _rehearsed(plans: Mapping[str, Plan], to: DestinationOptions) -> list[str]:
    """Return the checks of each site that fail, in words."""
    from hub_magmax.merging.output.folder import advise_site
    from hub_magmax.pipeline import destination_of
    from hub_magmax.publishing.preflight import check_room_together, rehearse

    check_room_together([*plans.values()])
    failed = []
    for site, one in plans.items():
        for found in rehearse(one, destination_of(one.recipe, to.given())):
            if found.error:
                advise_site(found.error, site)
                failed.append(f"{site}: {found}")
    return failed


def _plans(sites: Mapping[str, RecipeOptions], in_spite_of: tuple[str, ...]) -> dict[str, Plan]:
    """Return the plan of each site; sites without a lock get the checkpoints that the first one pins."""
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.pipeline import lock, plan

    cache, first, plans = SourceCache(), None, {}
    for site, (found, stored) in _read(sites).items():
        locked = stored or lock(found, report=say, progress=progress, cache=cache, earlier=first)
        first = first or locked
        plans[site] = plan(found, locked, cache=cache, in_spite_of=in_spite_of)
    return plans


def _line(plan: Plan) -> str:
    """Return in a line what differs between sites: method, weights, place."""
    method, weights = plan.lock.method, plan.lock.preference.weights
    shares = ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())
    repository = plan.recipe.output.push_to_hub
    place = from_here(plan.recipe.output_path) + (f", {repository}" if repository else "")
    return f"{method['name']}, scaling {method['scaling']:g}; {shares}; {place}"
