"""The verb that imports configurations of other tools, and makes what was published from them again."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_magmax.cli.completing import FilePath
from hub_magmax.cli.options import from_cache_option, from_option
from hub_magmax.cli.terminal import ERROR, REGRESSED, Answer, progress, verb

if TYPE_CHECKING:
    from hub_magmax.fleet.reproducing import Reproduction
    from hub_magmax.recipe.importing.findings import Finding, Verdict
    from hub_magmax.recipe.importing.translation import Imported
    from hub_magmax.recipe.schema import Recipe

#: Verdicts as people read them.
_WORDS = {"rounding": "up to rounding"}

#: Characters of a line that are shown, and tensors.
_MOST, _MOST_TENSORS = 44, 40

#: A key without which there is no merge, so that it cannot be left out.
_NEEDED = ("merge_method",)

#: Bytes of a file of a merge that is only compared.
_SHARD_BYTES = 10**9


@verb
@click.argument("source", metavar="FILE|REPO")
@click.option("--out", type=FilePath(), help="File to write; recipe.yaml.")
@click.option(
    "--without",
    multiple=True,
    metavar="KEY",
    help="Go on without a key of FILE, such as tokenizer.pad_to_multiple_of; can be repeated.",
)
@click.option("--stage", metavar="NAME", help="Of several merges in FILE, the one of this name or number.")
@from_option("Where relative paths in FILE", default=Path())
@click.option("--check", is_flag=True, help="Merge again, and compare with the published weights.")
@click.option("--against", metavar="MODEL", help="With --check: whose weights these are; those of REPO.")
@from_cache_option
def import_(
    source: str,
    out: Path | None,
    without: tuple[str, ...],
    stage: str | None,
    folder: Path,
    check: bool,
    against: str | None,
) -> Answer:
    """Write the recipe that a mergekit configuration stands for.

    FILE is such a configuration, a model card that shows one, or a merged folder that holds one; REPO is a
    model on the Hub. What becomes of it is said line by line. Where a line that decides the weights has no
    counterpart, nothing is written. With --check nothing is written without --out, and the exit code is 3 if
    the weights differ.

    \b
    Examples:
      hub-magmax import mergekit_config.yml --out imported.yaml
      hub-magmax import theirs --check
    """
    out = out or (None if check else Path("recipe.yaml"))
    here = out.parent if out else folder
    imported, name, unread = _read(source, folder, here, without, stage)
    values, lines = _values(imported, name, unread), [*_told_lines(imported, unread)]
    if imported.recipe is None:
        refusal = _refusal(name, imported.findings, is_unread=bool(unread))
        return Answer(values, "\n".join([*lines, refusal]), ERROR)
    recipe = _checked(imported, here, name)
    if out is not None:
        _write(imported, name, out)
        lines.append(f"wrote {out}: {_told(imported.verdict)}; `hub-magmax plan {out}` reads its checkpoints")
        values["written"] = str(out)
    if check:
        return _with_check(values, lines, imported, recipe, against or source)
    return Answer(values, "\n".join(lines))


def _with_check(
    values: dict[str, Any], lines: list[str], imported: Imported, recipe: Recipe, model: str
) -> Answer:
    """Return the answer with a comparison of the published weights with a merge of the recipe."""
    made = _made_again(imported, recipe, model)
    text = "\n".join([*lines, *_comparison(made, model)])
    return Answer(values | {"check": made.to_dict()}, text, REGRESSED if made.verdict == "differs" else 0)


def _told_lines(imported: Imported, unread: dict[str, str]) -> Iterable[str]:
    """Yield what is said of every line, and what the file does not say."""
    yield from _table(imported.findings)
    yield from (f"not in the file: {remark}" for remark in imported.remarks)
    yield from (f"could not be read: {error}" for error in unread.values())


def _read(
    source: str, folder: Path, here: Path, without: tuple[str, ...], stage: str | None
) -> tuple[Imported, str, dict[str, str]]:
    """Return what a configuration becomes, its name, and the checkpoints that could not be read."""
    from hub_magmax.checkpoints.model_facts import CheckpointFacts, read_foreign
    from hub_magmax.recipe.importing.other_tools import import_text

    found = read_foreign(source, sys.stdin.buffer)
    models = CheckpointFacts(folder, here)
    imported = import_text(found.text, found.name, models, without=without, stage=stage)
    return imported, found.name, models.unread


def _values(imported: Imported, name: str, unread: dict[str, str]) -> dict[str, Any]:
    return {
        "source": name,
        "verdict": imported.verdict,
        "lines": [finding.to_dict() for finding in imported.findings],
        "remarks": list(imported.remarks),
        "unread": unread,
        "recipe": imported.recipe,
        "written": None,
    }


def _table(findings: Sequence[Finding]) -> Iterable[str]:
    from hub_magmax.text import at_most, cut_name, printable

    keys: dict[int, set[str]] = {}
    for finding in findings:
        keys.setdefault(finding.line, set()).add(finding.key_text)
    texts = [f.text if len(keys[f.line]) == 1 else f.key_text for f in findings]
    rows = [
        (f.line, cut_name(printable(text), at_most(_MOST)), _told(f.verdict), f.why)
        for f, text in zip(findings, texts, strict=True)
    ]
    widths = [max((len(str(row[column])) for row in rows), default=0) for column in range(3)]
    for line, text, verdict, why in rows:
        yield f"{line:>{widths[0]}}  {text:<{widths[1]}}  {verdict:<{widths[2]}}  {why}"


def _told(verdict: Verdict) -> str:
    return _WORDS.get(verdict, verdict)


# Complex by its comprehensions, and flat: a part of the sentence for each condition.
def _refusal(name: str, findings: Sequence[Finding], *, is_unread: bool) -> str:
    """Return what keeps a recipe from being written, and how to go on.

    Args:
        name: Of the configuration.
        findings: On its lines.
        is_unread: Some checkpoints could not be read, for which alone lines may have no counterpart.
    """
    lost = [finding for finding in findings if finding.verdict == "not representable"]
    if not lost:
        return f"{name}: nothing was written"
    count = len({finding.line for finding in lost})
    left_out = [f.key_text for f in lost if f.key and f.key != _NEEDED]
    keys = " ".join(f"--without {key}" for key in dict.fromkeys(left_out))
    hint = f"; to go on as if they were not there: {keys}" if keys else ""
    if is_unread:
        hint = f"; that may change once the checkpoints above can be read (--from: where paths start){hint}"
    return f"{name}: nothing was written, for {count} line(s) are not representable{hint}"


def _checked(imported: Imported, folder: Path, name: str) -> Recipe:
    from hub_magmax.recipe.loading import parse_recipe

    return parse_recipe(dict(imported.recipe or {}), folder=folder, where=f"{name}, as a recipe")


def _write(imported: Imported, name: str, out: Path) -> None:
    """Write the recipe, with what a reader of it has to know."""
    import yaml

    from hub_magmax.errors import OutputError
    from hub_magmax.files import write_text
    from hub_magmax.text import one_line

    if out.exists():
        hint = "Name another one: --out FILE."
        raise OutputError("there is such a file already", where=str(out), hint=hint)
    told = [f"Imported from {one_line(Path(name).name)}: {_told(imported.verdict)}."]
    told += [f"Line {f.line}: {one_line(f.why)}." for f in imported.findings if f.verdict == "warning"]
    body = yaml.safe_dump(
        dict(imported.recipe or {}), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )
    write_text(out, "".join(f"# {line}\n" for line in told) + body)


def _made_again(imported: Imported, recipe: Recipe, model: str) -> Reproduction:
    """Merge again, file by file, and compare with a published model."""
    from contextlib import closing
    from tempfile import TemporaryDirectory

    from hub_magmax.checkpoints.opening import open_model
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.fleet.reproducing import reproduce
    from hub_magmax.pipeline import plan
    from hub_magmax.recipe.loading import updated

    recipe = updated(recipe, {"output": recipe.to_dict()["output"] | {"shard_size": _SHARD_BYTES}})
    cache = SourceCache()
    planned = plan(recipe, cache=cache)
    with (
        closing(open_model(model, None)) as published,
        TemporaryDirectory(prefix="hub_magmax_import_") as temporary,
        progress(planned.progress_bytes, "merging") as advance,
    ):
        return reproduce(
            planned,
            published,
            Path(temporary),
            precision=imported.precision,
            draws=imported.draws,
            progress=advance,
            cache=cache,
        )


def _comparison(made: Reproduction, model: str) -> Iterable[str]:
    """Yield what the comparison with a published model shows: tensors that are not the same bits first."""
    other = [one for one in made.tensors if one.verdict != "same bits"]
    shown = sorted(other, key=lambda one: (one.verdict != "differs", -one.largest))[:_MOST_TENSORS]
    width = max((len(one.name) for one in shown), default=0)
    for one in shown:
        count = f"{one.num_different:,} of {one.num_elements:,} elements, by {one.largest:.3g} at most"
        yield f"{one.name:<{width}}  {one.verdict:<15}  {one.problem or count}"
    if len(other) > len(shown):
        yield f"and {len(other) - len(shown):,} more that are not the same bits"
    yield from made.remarks
    same = len(made.tensors) - len(other)
    yield f"{model}: {made.verdict}, {same:,} of {len(made.tensors):,} tensors bit for bit"
