"""The verb that imports configurations of other tools."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_magmax.cli.completing import FilePath
from hub_magmax.cli.options import from_cache_option
from hub_magmax.cli.terminal import ERROR, Answer, verb

if TYPE_CHECKING:
    from hub_magmax.recipe.importing.findings import Finding, Verdict
    from hub_magmax.recipe.importing.translation import Imported

#: Verdicts as people read them.
_WORDS = {"rounding": "up to rounding"}

#: Characters of a line that are shown.
_MOST = 44


@verb
@click.argument("source", metavar="FILE|REPO")
@click.option("--out", type=FilePath(), default=Path("recipe.yaml"), show_default=True, help="File to write.")
@click.option(
    "--without",
    multiple=True,
    metavar="KEY",
    help="Go on without a key of FILE, such as models.0.parameters.scale; can be repeated.",
)
@click.option(
    "--from",
    "folder",
    type=FilePath("dir"),
    default=Path(),
    help="Where relative paths in FILE start; the current folder.",
)
@from_cache_option
def import_(source: str, out: Path, without: tuple[str, ...], folder: Path) -> Answer:
    """Write the recipe that a mergekit configuration stands for.

    FILE is such a configuration, a model card that shows one, or a merged folder that holds one; REPO is a
    model on the Hub. What becomes of it is said line by line. Where a line that decides the weights has no
    counterpart, nothing is written.

    \b
    Example:
      hub-magmax import mergekit_config.yml --out imported.yaml
    """
    from hub_magmax.checkpoints.foreign_texts import read_foreign
    from hub_magmax.checkpoints.model_facts import CheckpointFacts
    from hub_magmax.recipe.importing.mergekit_files import import_mergekit

    found = read_foreign(source, sys.stdin.buffer)
    models = CheckpointFacts(folder, out.parent)
    imported = import_mergekit(found.text, found.name, models, without)
    values: dict[str, Any] = {
        "source": found.name,
        "verdict": imported.verdict,
        "lines": [finding.to_dict() for finding in imported.findings],
        "remarks": list(imported.remarks),
        "unread": models.unread,
        "recipe": imported.recipe,
        "written": None,
    }
    lines = [*_table(imported.findings), *(f"not in the file: {remark}" for remark in imported.remarks)]
    lines += [f"could not be read: {error}" for error in models.unread.values()]
    if imported.recipe is None:
        lines.append(_refusal(found.name, imported.findings))
        return Answer(values, "\n".join(lines), ERROR)
    _write(imported, found.name, out)
    lines.append(f"wrote {out}: {_told(imported.verdict)}; `hub-magmax plan {out}` reads its checkpoints")
    return Answer(values | {"written": str(out)}, "\n".join(lines))


def _table(findings: Sequence[Finding]) -> Iterable[str]:
    from hub_magmax.text import cut_in_middle, printable

    rows = [(f.line, cut_in_middle(printable(f.text), _MOST), _told(f.verdict), f.why) for f in findings]
    widths = [max((len(str(row[column])) for row in rows), default=0) for column in range(3)]
    for line, text, verdict, why in rows:
        yield f"{line:>{widths[0]}}  {text:<{widths[1]}}  {verdict:<{widths[2]}}  {why}"


def _told(verdict: Verdict) -> str:
    return _WORDS.get(verdict, verdict)


def _refusal(name: str, findings: Sequence[Finding]) -> str:
    """Return what keeps a recipe from being written, and how to go on."""
    lost = [finding for finding in findings if finding.verdict == "not representable"]
    if not lost:
        return f"{name}: nothing was written"
    count = len({finding.line for finding in lost})
    keys = " ".join(f"--without {key}" for key in dict.fromkeys(f.key_text for f in lost if f.key))
    hint = f"; to go on as if they were not there: {keys}" if keys else ""
    return f"{name}: nothing was written, for {count} line(s) are not representable{hint}"


def _write(imported: Imported, name: str, out: Path) -> None:
    """Write the recipe, with what a reader of it has to know, and check it."""
    import yaml

    from hub_magmax.errors import OutputError
    from hub_magmax.files import write_text
    from hub_magmax.recipe.loading import parse_recipe
    from hub_magmax.text import one_line

    assert imported.recipe is not None
    parse_recipe(dict(imported.recipe), folder=out.parent, where=str(out))
    if out.exists():
        raise OutputError(
            "there is such a file already", where=str(out), hint="Name another one: --out FILE."
        )
    told = [f"Imported from {one_line(Path(name).name)}: {_told(imported.verdict)}."]
    told += [f"Line {f.line}: {one_line(f.why)}." for f in imported.findings if f.verdict == "warning"]
    body = yaml.safe_dump(
        dict(imported.recipe), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )
    write_text(out, "".join(f"# {line}\n" for line in told) + body)
