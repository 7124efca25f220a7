"""Verbs for models in use: fleet, verify, apply, sign, history, rollback, canary."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_magmax.cli.completing import FilePath
from hub_magmax.cli.options import format_option, from_cache_option, from_option
from hub_magmax.cli.terminal import ERROR, REGRESSED, Answer, progress, say, table_and, verb
from hub_magmax.fleet import MARGIN
from hub_magmax.text import number_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hub_magmax.evaluation.tables import Format
    from hub_magmax.fleet.status import Status


@verb
@click.argument("model")
@click.option("--revision", help="Revision of a model on the Hub.")
@click.option("--rebuild", is_flag=True, help="Also merge it again from its sources, and compare every byte.")
@from_option("With --rebuild: where relative paths of local checkpoints")
@click.option("--public-key", type=FilePath(), help="Also check a folder's signature.")
@from_cache_option
def verify(
    model: str, revision: str | None, rebuild: bool, folder: Path | None, public_key: Path | None
) -> Answer:
    """Check a merged MODEL against its own merge report.

    MODEL is a folder or a Hub id.

    \b
    Examples:
      hub-magmax verify merged
      hub-magmax verify me/merged --rebuild
    """
    from hub_magmax.errors import OutputError, PublishError
    from hub_magmax.fleet.checks import note, noting_failures
    from hub_magmax.fleet.verifying import verify as do_verify

    with noting_failures("verify", model, revision, (OutputError, PublishError)):
        hashes = do_verify(model, revision=revision)
    lines = [f"{sha256}  {path}" for path, sha256 in hashes.items()]
    lines.append(f"{model}: {number_of(len(hashes), 'file')}, all as merged")
    if public_key is not None:
        from hub_magmax.errors import SignatureError
        from hub_magmax.fleet.signing import check_signature

        with noting_failures("verify", model, revision, (SignatureError,)):
            check_signature(model, public_key)
        lines.append(f"{model}: signed by the owner of {public_key}")
    values: dict[str, Any] = {
        "sha256": hashes,
        "rebuilt": rebuild,
        "signature_checked": public_key is not None,
    }
    if rebuild:
        from hub_magmax.fleet.rebuilding import DIFFERENT, changed_data
        from hub_magmax.fleet.rebuilding import rebuild as do_rebuild

        with noting_failures("verify", model, revision, DIFFERENT):
            again = do_rebuild(model, revision=revision, folder=folder)
        values["same_bytes"] = all(hashes.get(shard.file) == shard.sha256 for shard in again.shards)
        same = "every byte the same" if values["same_bytes"] else "the same but for last bits of few elements"
        lines.append(f"{model}: merged again from its sources, {same}")
        values["data_changed"] = changed = changed_data(model, revision=revision, folder=folder)
        lines += [f"{name}: no longer the data that was locked, so scores may differ" for name in changed]
    note("verify", model, "passed", revision=revision)
    return Answer(values, "\n".join(lines))


@verb
@click.argument("selection")
@click.option("--out", type=FilePath(), help="Folder to create; by default NAME-weights.")
@click.option("--revision", help="Revision of a selection on the Hub.")
@from_option("Where relative paths of local checkpoints")
@from_cache_option
def apply(selection: str, out: Path | None, revision: str | None, folder: Path | None) -> Answer:
    """Make the weights of a SELECTION from its checkpoints.

    SELECTION is a folder or a Hub id. The weights are those that the merge would
    have written with `output.format: weights`, byte for byte.

    \b
    Example:
      hub-magmax apply north --out north-weights
    """
    from hub_magmax.files import from_here
    from hub_magmax.fleet.applying import apply as do_apply
    from hub_magmax.text import format_bytes

    name = Path(selection.partition("@")[0]).name
    output = Path(f"{name}-weights") if out is None else out
    report = do_apply(selection, output, revision=revision, folder=folder, progress=progress)
    lines = [f"{shard.sha256}  {shard.file}" for shard in report.shards]
    size = f"{format_bytes(report.bytes_out)} in {number_of(len(report.shards), 'file')}"
    lines += [f"{size}, {report.seconds:.1f} s", f"wrote {from_here(output)}"]
    return Answer({"output": from_here(output), "report": json.loads(report.to_json())}, "\n".join(lines))


@verb
@click.argument("folder", type=FilePath("dir"))
@click.option("--private-key", required=True, type=FilePath(), help="PEM file of the key.")
def sign(folder: Path, private_key: Path) -> Answer:
    """Sign a merged FOLDER with a key (OpenSSF model-signing).

    \b
    Example:
      hub-magmax sign merged --private-key key.pem
    """
    from hub_magmax.fleet.signing import sign as do_sign

    path = do_sign(folder, private_key)
    return Answer({"signature": str(path)}, f"wrote {path}")


@verb
@click.argument("model", metavar="REPO")
@click.option("--branch", help="Branch, tag or commit; the default branch.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many.")
@format_option
def history(model: str, branch: str | None, limit: int, form: Format) -> Answer:
    """List the revisions of REPO, with their stored scores.

    \b
    Example:
      hub-magmax history me/merged
    """
    from hub_magmax.fleet.history import as_table
    from hub_magmax.fleet.history import history as look_back

    found = look_back(model, branch=branch, limit=limit)
    return Answer([revision.to_dict() for revision in found], as_table(found).write(form))


@verb
@click.argument("model", metavar="REPO")
@click.option("--branch", help="Branch to move; the default branch.")
@click.option("--to", metavar="REVISION", help="What to restore; the last good model.")
@click.option("--dry-run", is_flag=True, help="Say what would be restored, and change nothing.")
def rollback(model: str, branch: str | None, to: str | None, dry_run: bool) -> Answer:
    """Move REPO back to an earlier model, in one commit.

    That is the last good other one that passes `verify`, unless --to names it; once more, and it is an
    older one.

    \b
    Example:
      hub-magmax rollback me/merged --dry-run
    """
    from hub_magmax.fleet.rollback import rollback as do_rollback
    from hub_magmax.publishing.addresses import told

    done = do_rollback(model, branch=branch, to=to, dry_run=dry_run)
    files = f"{number_of(len(done.copied), 'file')} copied on the Hub, {len(done.removed)} removed"
    place, how = f"{model}@{branch}" if branch else model, "would be" if dry_run else "was"
    why = f": {done.why}" if done.why else ""
    text = f"{place}: {done.restored} {how} restored in place of {done.replaced}{why} ({files})"
    places = told(done.url, branch) if done.url else ""
    return Answer(asdict(done) | {"dry_run": dry_run}, "\n".join(filter(None, [text, places])))


@verb
@click.argument("model")
@click.option("--revision", help="Revision of a model on the Hub.")
@click.option(
    "--against",
    metavar="REVISION",
    help="Whose stored scores are pinned: last-good (the default), previous, or a revision.",
)
@click.option(
    "--margin", type=click.FloatRange(min=0), default=MARGIN, show_default=True, help="Allowed loss."
)
@from_option("Where relative paths of local data")
@click.option("--dry-run", is_flag=True, help="Leave the tag where it is.")
@from_cache_option
@format_option
def canary(
    model: str,
    revision: str | None,
    against: str | None,
    margin: float,
    folder: Path | None,
    dry_run: bool,
    form: Format,
) -> Answer:
    """Score a merged MODEL again; compare with pinned results.

    Exits with 3 if a task is worse by more than the margin. Otherwise the tag last-good moves to the
    newest revision.

    \b
    Example:
      hub-magmax canary me/merged --margin 0.02
    """
    from hub_magmax.fleet.canaries import canary as do_canary
    from hub_magmax.fleet.checks import note

    found = do_canary(
        model,
        revision=revision,
        against=against,
        margin=margin,
        folder=folder,
        dry_run=dry_run,
        report=say,
        progress=progress,
    )
    note("canary", model, "regressed" if found.regressed else "passed", commit=found.commit)
    return Answer(found.to_dict(), found.table(form), exit_code=REGRESSED if found.regressed else 0)


@verb
@click.argument("target", metavar="FILE|FOLDER|REPO|USER")
@click.option("--html", "page", type=FilePath(), help="Also write a page for browsers.")
@format_option
def fleet(target: str, page: Path | None, form: Format) -> Answer:
    """Show the state of many merged models.

    They are listed in FILE (YAML or JSON: repositories, folders, recipes), lie in FOLDER, or are those
    of a user or an organisation on the Hub. Shown are how each was merged, its last checks, changes by
    hand, and sources that moved since. Exits with 3 if files are not as merged or the last check did not
    pass, and with 1 if something could not be looked at.

    \b
    Examples:
      hub-magmax fleet .
      hub-magmax fleet . --html fleet.html
    """
    from hub_magmax.files import check_files, write_text
    from hub_magmax.fleet.status import fleet_status
    from hub_magmax.fleet.status_page import render_page
    from hub_magmax.fleet.status_table import as_table, summary

    as_file = None if page is None else str(page)
    if page is not None:
        check_files([page])
    found = fleet_status(target)
    if page is not None:
        write_text(page, render_page(found, target))
    table = as_table(found).write(form)
    text = f"{table}\n\n{summary(found)}" if form == "text" else table
    values = {"models": [status.to_dict() for status in found], "page": as_file}
    return Answer(values, text if page is None else table_and([page], text, form), _code_of(found))


def _code_of(found: Sequence[Status]) -> int:
    """Return the exit code for models: a fault that is known counts more than what is not known."""
    if any(status.is_faulty for status in found):
        return REGRESSED
    return ERROR if any(status.problems for status in found) else 0
