"""Card files: rendered, written with a digest, and recognised as edited."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from hub_magmax.checkpoints.index import ROUTER_NAME
from hub_magmax.errors import OutputError
from hub_magmax.evaluation.blind_spots import BLIND_SPOTS_NAME, read_blind_spots
from hub_magmax.evaluation.scores import SCORES_NAME, Scores, other_scores, read_scores, write_scores
from hub_magmax.files import write_text
from hub_magmax.merging.output.report import REPORT_NAME, SIGNATURE_NAME, MergeReport, read_report
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.loading import RecipeLike, as_recipe, load_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, LockLike, as_lock, read_lock
from hub_magmax.recipe.schema import RECIPE_NAME, Recipe
from hub_magmax.reporting.card import JUDGEMENT_NAME, Beside, render_card
from hub_magmax.reporting.diagnosis import DIAGNOSIS_NAME, HEAT_MAP_NAME, read_diagnosis
from hub_magmax.reporting.model_kind import files_in
from hub_magmax.reporting.router_report import read_router_report
from hub_magmax.reporting.tradeoff_surface import EXPLORER_NAME
from hub_magmax.text import step

#: Names of the card and of the picture beside it.
CARD_NAME = "README.md"
PICTURE_NAME = "tradeoff.png"

#: Last line of a written card: the sha256 of the text above it, in a comment that no page shows.
_DIGEST_LINE = re.compile(r"\n<!-- hub_magmax sha256:([0-9a-f]{64}) -->\n\Z")


@checked
@step("writing the card")
def write_card(
    recipe: RecipeLike,
    locked: LockLike,
    merged: MergeReport,
    scores: Scores | None,
    output: Path,
    *,
    keep_edited: bool = False,
) -> Path:
    """Write the card, and the scores with their picture where there are any, and return the card's path.

    Args:
        recipe: What was asked for.
        locked: The lock it was merged by.
        merged: The report of the merge.
        scores: What was measured; None says that nothing was.
        output: Folder of the merged model.
        keep_edited: Leave a card alone that `is_edited`; scores and picture are written all the same.

    Raises:
        OutputError: If there is no such folder, or it cannot be written.
    """
    recipe, locked = as_recipe(recipe), as_lock(locked)
    if not output.is_dir():
        hint = "Give the folder of the merged model."
        raise OutputError("there is no such folder", where=str(output), hint=hint)
    if scores is not None:
        write_scores(scores, output)
        from hub_magmax.reporting.figures import draw_tradeoff

        draw_tradeoff(scores, locked.preference.shares, output / PICTURE_NAME)
    card = output / CARD_NAME
    if not (keep_edited and is_edited(card)):
        picture = PICTURE_NAME if scores is not None else None
        found = _found_beside(recipe, output, scores)
        text = render_card(recipe, locked, merged, scores, picture=picture, beside=found)
        write_text(card, _with_digest(text))
    return card


def write_stored_card(recipe: Recipe, locked: Lock, *, keep_edited: bool = False) -> Path:
    """Write the card of the values stored in the recipe's output folder, as `write_card`."""
    folder = recipe.output_path
    scores = read_scores(folder) if (folder / SCORES_NAME).is_file() else None
    report = read_report(folder / REPORT_NAME)
    return write_card(recipe, locked, report, scores, folder, keep_edited=keep_edited)


def write_own_card(folder: Path) -> Path:
    """Write the card of a merged folder again, by its own recipe and lock; one that was edited stays."""
    recipe, locked = load_recipe(folder / RECIPE_NAME), read_lock(folder / LOCK_NAME)
    scores = read_scores(folder) if (folder / SCORES_NAME).is_file() else None
    report = read_report(folder / REPORT_NAME)
    return write_card(recipe, locked, report, scores, folder, keep_edited=True)


def stored_card(folder: Path, repo_id: str, report: MergeReport | None = None) -> str:
    """Return the card of the values stored in a merged folder, for the repository `repo_id`.

    Args:
        folder: A finished output folder.
        repo_id: `org/model`.
        report: In place of the one that is stored.

    Raises:
        HubMagmaxError: If recipe, lock, report or scores cannot be read.
    """
    recipe = load_recipe(folder / RECIPE_NAME)
    scores = read_scores(folder) if (folder / SCORES_NAME).is_file() else None
    text = render_card(
        recipe,
        read_lock(folder / LOCK_NAME),
        report or read_report(folder / REPORT_NAME),
        scores,
        picture=PICTURE_NAME if (folder / PICTURE_NAME).is_file() else None,
        beside=_found_beside(recipe, folder, scores),
        repo_id=repo_id,
    )
    return _with_digest(text)


def is_edited(card: Path) -> bool:
    """Say whether a card is there and is not, byte for byte, one that this program wrote.

    A card is known by the digest in its last line, whatever the template was when it was written. Cards of
    earlier versions have none and count as edited, so that nothing which people may have written is replaced.
    """
    if not card.is_file():
        return False
    content = card.read_bytes().decode("utf-8", errors="replace")
    line = _DIGEST_LINE.search(content)
    return line is None or line[1] != _sha256(content[: line.start()])


def _with_digest(text: str) -> str:
    text = text.rstrip("\n")
    return f"{text}\n<!-- hub_magmax sha256:{_sha256(text)} -->\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _found_beside(recipe: Recipe, folder: Path, scores: Scores | None) -> Beside:
    """Return what lies in a folder, without what was measured with another evaluation than the recipe's."""
    diagnosis = None
    if (folder / DIAGNOSIS_NAME).is_file() and (folder / HEAT_MAP_NAME).is_file():
        diagnosis = read_diagnosis(folder / DIAGNOSIS_NAME)
    others = other_scores(folder)
    explorer, signature = ((folder / name).is_file() for name in (EXPLORER_NAME, SIGNATURE_NAME))
    record = folder / ROUTER_NAME
    router = read_router_report(record) if record.is_file() else None
    spots = folder / BLIND_SPOTS_NAME
    blind_spots = read_blind_spots(spots) if spots.is_file() else None
    asked = recipe.evaluation
    if blind_spots is not None and (asked is None or blind_spots.evaluation != asked.digest):
        blind_spots = None
    return Beside(
        explorer,
        diagnosis,
        files_in(folder),
        signature,
        router,
        others,
        blind_spots,
        _is_judged(folder, scores),
    )


def _is_judged(folder: Path, scores: Scores | None) -> bool:
    """Say whether the page of a merge's success is there, and of these scores, whose digest it holds."""
    page = folder / JUDGEMENT_NAME
    return scores is not None and page.is_file() and scores.digest in page.read_text(encoding="utf-8")
