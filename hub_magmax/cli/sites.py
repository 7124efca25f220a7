"""Runs and plans of all sites of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hub_magmax.cli.options import DestinationOptions, RecipeOptions
from hub_magmax.cli.recipe_and_lock import read_asked
from hub_magmax.cli.terminal import ERROR, REGRESSED, Answer, progress, say
from hub_magmax.errors import HubMagmaxError, RecipeError, RegressedError
from hub_magmax.files import from_here
from hub_magmax.recipe.loading import parse_text
from hub_magmax.text import format_bytes

if TYPE_CHECKING:
    from hub_magmax.pipeline import Run
    from hub_magmax.planning.plan import Plan


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
        return plan_all(sites, in_spite_of)
    from hub_magmax.pipeline import destination_of
    from hub_magmax.processes import find_processes
    from hub_magmax.studies import run_together

    processes = find_processes(say)
    read = {site: read_asked(own, processes.first_decides) for site, own in sites.items()}
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
    return _answer(done) if processes.is_first else Answer({}, "")


def _answer(done: Mapping[str, Run | HubMagmaxError]) -> Answer:
    failed = [found for found in done.values() if isinstance(found, HubMagmaxError)]
    has_errors = any(not isinstance(found, RegressedError) for found in failed)
    exit_code = ERROR if has_errors else REGRESSED if failed else 0
    ended = f"{len(done) - len(failed)} of {len(done)} sites are done"
    lines = [f"{site}: {_told(found)}" for site, found in done.items()]
    values = {site: _values(found) for site, found in done.items()}
    return Answer({"sites": values}, "\n".join([*lines, ended]), exit_code=exit_code)


def _told(done: Run | HubMagmaxError) -> str:
    """Return in a line what became of one site."""
    from hub_magmax.publishing.addresses import told
    from hub_magmax.reporting.headline import result

    if isinstance(done, HubMagmaxError):
        return f"FAILED: {done}"
    parts = [f"{from_here(done.output)}{' was there' if done.merged_before else ''}"]
    if done.scores is not None:
        parts += filter(None, result(done.scores, done.plan.lock))
    if done.published is not None:
        parts.append(f"published {told(done.published.url, None)}")
    return "; ".join(parts)


def _values(done: Run | HubMagmaxError) -> dict[str, Any]:
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
        found["published"] = {"commit": done.published.commit, "url": done.published.url}
    return found


def plan_all(sites: Mapping[str, RecipeOptions], in_spite_of: tuple[str, ...]) -> Answer:
    """Show what the merges for all sites will read together, and write."""
    from hub_magmax.planning.findings.finding import faults_left
    from hub_magmax.planning.summary import describe

    plans = _plans(sites, in_spite_of)
    refused = [site for site, one in plans.items() if faults_left(one.findings, one.in_spite_of)]
    read = max(one.bytes_in for one in plans.values())
    written = sum(one.bytes_out for one in plans.values())
    lines = [f"{site}: {_line(one)}" for site, one in plans.items()]
    lines.append(
        f"reads {format_bytes(read)}, once for all {len(plans)} sites; writes {format_bytes(written)}"
    )
    lines += [f"{site}: a merge would be refused: see `plan --site {site}`" for site in refused]
    described = {site: describe(one) for site, one in plans.items()}
    values = {"sites": described, "bytes_in": read, "bytes_out": written}
    return Answer(values, "\n".join(lines), exit_code=ERROR if refused else 0)


def _plans(sites: Mapping[str, RecipeOptions], in_spite_of: tuple[str, ...]) -> dict[str, Plan]:
    """Return the plan of each site; sites without a lock get the checkpoints that the first one pins."""
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.pipeline import lock, plan

    cache, first, plans = SourceCache(), None, {}
    for site, own in sites.items():
        found, locked = read_asked(own)
        locked = locked or lock(found, report=say, progress=progress, cache=cache, earlier=first)
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
