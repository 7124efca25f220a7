"""Page of a judgement: one HTML file without scripts, and the same answers for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hub_magmax.analysis.judgement_answers import Part, parts, sentence
from hub_magmax.analysis.judging import Judgement
from hub_magmax.files import write_text
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.card import JUDGEMENT_NAME
from hub_magmax.reporting.front_matter import model_name
from hub_magmax.text import number_of, spelled_out, without_secrets

TEMPLATE_NAME = "judgement.html.jinja"


def in_words(found: Judgement, locked: Lock) -> str:
    """Return the judgement, the answers, and the commands that go on from there, as lines."""
    lines = [sentence(found, locked), ""]
    for part in parts(found, locked):
        lines += [f"{part.question} {part.answer}"]
        lines += [f"  {why} {command}" for why, command in part.commands]
    return "\n".join(lines)


def write_judgement(found: Judgement, recipe: Recipe, locked: Lock) -> Path:
    """Write the page into the folder of the merged model, and return its path."""
    path = recipe.output_path / JUDGEMENT_NAME
    write_text(path, render_judgement(found, locked, model_name(recipe)))
    return path


def render_judgement(found: Judgement, locked: Lock, title: str) -> str:
    """Return the page; all that others wrote is shown as text.

    Args:
        found: What is known.
        locked: Of the merge.
        title: Name of the model.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("hub_magmax.analysis", "")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = template.get_template(TEMPLATE_NAME).render(
        title=spelled_out(title),
        about=f"{number_of(len(found.tasks), 'task')} merged by {spelled_out(found.method)}",
        sentence=spelled_out(sentence(found, locked)),
        parts=[_spelled_out(part) for part in parts(found, locked)],
        scores=found.scores.digest if found.scores else "",
    )
    return without_secrets(page)


def _spelled_out(part: Part) -> dict[str, Any]:
    return {
        "question": part.question,
        "answer": spelled_out(part.answer),
        "facts": [spelled_out(fact) for fact in part.facts],
        "head": part.head,
        "rows": [[spelled_out(cell) for cell in row] for row in part.rows],
        "commands": [(spelled_out(why), command) for why, command in part.commands],
    }
