"""Templates of prompts: Jinja2 over the columns of an example, in its sandbox."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


@lru_cache
def compile_template(text: str) -> Template:
    """Return the template; it loads no other one, and a column that is missing is an error.

    Raises:
        ValueError: If it is no template.
    """
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"is no Jinja2 template ({error.message}, in its line {error.lineno})") from error


def mentioned_columns(text: str) -> tuple[str, ...]:
    """Return the columns that a template uses, sorted."""
    from jinja2 import Environment, meta

    return tuple(sorted(meta.find_undeclared_variables(Environment(autoescape=True).parse(text))))


def checked_template(text: str) -> str:
    """Return the template as it is, after a look at it.

    Raises:
        ValueError: If it is no template, or uses no column.
    """
    compile_template(text)
    if not mentioned_columns(text):
        raise ValueError(
            "uses no column, so that every prompt would be the same; a column is written {{question}}"
        )
    return text
