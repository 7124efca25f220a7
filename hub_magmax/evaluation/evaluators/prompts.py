"""Prompts of language models: templates filled in, solved examples before them, the joint with the answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import EvaluationError
from hub_magmax.recipe.templates import compile_template, mentioned_columns
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset


#: Columns that are made when the data is loaded; data of its own may not have them.
PROMPT_COLUMN = "(prompt)"
SHOTS_COLUMN = "(few-shot)"

#: Between a solved example and what follows.
SEPARATOR = "\n\n"

#: A prompt and its answer.
Solved = tuple[str, str]


def with_prompts(examples: Dataset, spec: Data, load: Callable[[Data], Dataset]) -> Dataset:
    """Return the examples with the prompts that their template makes, and the solved examples before them.

    Args:
        examples: What `spec` names.
        spec: Its template and its few-shot examples.
        load: Returns the data that few-shot examples are drawn from.

    Raises:
        EvaluationError: If a template does not fit the data, or there are too few examples to draw from.
    """
    if spec.template is not None:
        examples = examples.add_column(PROMPT_COLUMN, list(_rendered(examples, spec)))
    if spec.few_shot is None or spec.shots is None:
        return examples
    source = load(spec.shots)
    if len(source) < spec.few_shot.count:
        raise EvaluationError(
            f"{spec.few_shot.count} solved examples are asked for, and there are {len(source)}",
            where=f"{spec.shots.dataset}, split {spec.shots.split}",
            key=("few_shot", "count"),
        )
    drawn = random.Random(spec.few_shot.seed).sample(range(len(source)), spec.few_shot.count)  # noqa: S311
    shots = json.dumps([source[index] for index in drawn], default=str)
    return examples.add_column(SHOTS_COLUMN, [shots] * len(examples))


def _rendered(examples: Dataset, spec: Data) -> Iterator[str]:
    from jinja2 import TemplateError

    assert spec.template is not None
    template, columns = compile_template(spec.template), mentioned_columns(spec.template)
    where = f"template of {spec.dataset}, split {spec.split}"
    if missing := [column for column in columns if column not in examples.column_names]:
        raise EvaluationError(
            f"there is no column {missing[0]!r}",
            where=where,
            expected=f"one of {', '.join(examples.column_names)}",
            key=("template",),
        )
    for number, example in enumerate(examples.select_columns(list(columns))):
        try:
            yield template.render(example)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise EvaluationError(
                f"the template cannot be filled in ({type(error).__name__}: {error})",
                where=f"{where}, example {number}",
                key=("template",),
            ) from error


def joint(prompt: str, answer: str, delimiter: str | None) -> str:
    """Return what goes between prompt and answer.

    That is `delimiter`, or where there is none a space, unless either brings its own white space.
    """
    if delimiter is not None:
        return delimiter if prompt else ""
    return "" if not prompt or prompt[-1].isspace() or answer[:1].isspace() else " "


def describe_joint(delimiter: str | None, *, chat: bool) -> str:
    """Say for people what goes between prompt and answer."""
    if delimiter is not None:
        return (
            f"{delimiter!r} between prompt and answer" if delimiter else "nothing between prompt and answer"
        )
    if chat:
        return "nothing between prompt and answer but what the chat template has"
    return "a space between prompt and answer, where neither has white space there"


@dataclass(frozen=True)
class Prompter:
    """Puts prompt and answer together.

    Attributes:
        processor: The model's tokenizer.
        name: The model's, for messages.
        delimiter: See `joint`.
        chat: Prompts are a user's turn in the model's own chat template, and solved examples turns before.
    """

    processor: Any
    name: str
    delimiter: str | None = None
    chat: bool = False

    def joined(self, shots: Sequence[Solved], prompt: str, answer: str) -> Solved:
        """Return the whole text before the answer, and the answer with what joins it."""
        if self.chat:
            return self._turns(shots, prompt), (self.delimiter or "") + answer
        before = "".join(p + joint(p, a, self.delimiter) + a + SEPARATOR for p, a in shots)
        return before + prompt, joint(before + prompt, answer, self.delimiter) + answer

    def _turns(self, shots: Sequence[Solved], prompt: str) -> str:
        if not getattr(self.processor, "chat_template", None):
            raise EvaluationError(
                "the tokenizer has no chat template, and the evaluation asks for one",
                where=self.name,
                hint="Leave chat_template out, and write the turns in the data's template.",
            )
        turns = [
            {"role": role, "content": text}
            for solved in shots
            for role, text in zip(("user", "assistant"), solved, strict=True)
        ]
        turns.append({"role": "user", "content": prompt})
        rendered: str = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return rendered


def shots_of(cell: str | None, solve: Callable[[Mapping[str, Any]], Solved]) -> list[Solved]:
    """Return the solved examples that `with_prompts` put beside an example."""
    rows: Iterable[Mapping[str, Any]] = json.loads(cell) if cell else ()
    return [solve(row) for row in rows]
