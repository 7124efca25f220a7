"""Generative language models, scored by the text they answer with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from hub_magmax.evaluation.evaluators.examples import label_names, label_text, rows_of
from hub_magmax.evaluation.evaluators.prompts import Prompter, Solved, shots_of
from hub_magmax.evaluation.evaluators.registry import Columns, Outcome, Sample, evaluator
from hub_magmax.evaluation.evaluators.texts import encode_texts, text_in
from hub_magmax.kernels.lazy_imports import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from hub_magmax.evaluation.evaluators.loading import LoadedModel


class Inputs(NamedTuple):
    """A batch: what the model gets, in parts, the right answers, and the texts before they were cut."""

    encoded: list[Any]
    answers: list[str]
    prompts: list[str]
    cut: list[bool]


@evaluator("text-to-text")
@dataclass(frozen=True)
class TextToText:
    """Texts to texts, right where the greedy answer is the label's text to the letter, case and spaces aside.

    For sequence-to-sequence models such as T5. Labels are texts, or numbers whose names the data has. Prompts
    of the data, and solved examples before them, take the place of the input.

    Attributes:
        max_new_tokens: Where an answer is cut off.
        prefix: Put before every input, such as "summarize: ".
    """

    _: KW_ONLY
    max_new_tokens: Annotated[int, Field(ge=1)] = 16
    prefix: str = ""

    metric: ClassVar[str] = "exact match"
    is_share: ClassVar[bool] = True
    has_prompts: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-generation"
    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    processor_class: ClassVar[str] = "AutoTokenizer"

    def describe_inputs(self) -> dict[str, str]:
        return {"prefix": self.prefix} if self.prefix else {}

    def wanted(self, columns: Columns) -> list[str]:
        source = columns.prompt or columns.input or "text"
        return [source, columns.label, *([columns.shots] if columns.shots else [])]

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[Inputs]:
        names = label_names(examples, columns.label)
        column = columns.prompt or columns.input or "text"

        def solve(row: Mapping[str, Any]) -> Solved:
            return self.prefix + text_in(row, column), label_text(row[columns.label], names)

        prompter = Prompter(model.processor, model.name)
        for rows in rows_of(examples, self.wanted(columns), batch_size):
            prompts, answers = [], []
            for row in rows:
                prompt, answer = solve(row)
                shots = shots_of(row[columns.shots], solve) if columns.shots else []
                prompts.append(prompter.joined(shots, prompt, answer)[0])
                answers.append(answer)
            encoded, cut = encode_texts(model, prompts, lambda tokens: True)
            yield Inputs(encoded, answers, prompts, cut)

    def outcomes(self, model: LoadedModel, batches: Iterable[Inputs]) -> list[Outcome]:
        return [
            Outcome(self._score(text, label), is_cut=is_cut)
            for inputs in batches
            for text, label, is_cut in zip(
                self._generated(model, inputs), inputs.answers, inputs.cut, strict=True
            )
        ]

    def losses(self, model: LoadedModel, batch: Inputs, smoothing: float) -> Tensor:
        """Return minus the mean log-probability per token of each answer."""
        from torch.nn.functional import cross_entropy

        found, answers = [], iter(batch.answers)
        for part in batch.encoded:
            texts = list(islice(answers, len(part["input_ids"])))
            labels = model.processor(text_target=texts, padding=True, truncation=True, return_tensors="pt")
            wanted = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100).to(model.device)
            logits = model.output(**part.to(model.device), labels=wanted).logits.float()
            losses = cross_entropy(
                logits.transpose(1, 2), wanted, reduction="none", label_smoothing=smoothing
            )
            found.append(losses.sum(1) / (wanted != -100).sum(1))
        return torch.cat(found)

    def samples(self, model: LoadedModel, batches: Iterable[Inputs]) -> list[Sample]:
        """Return the inputs, what was generated, and the labels' texts."""
        return [
            Sample(prompt, text, label, self._score(text, label))
            for inputs in batches
            for prompt, text, label in zip(
                inputs.prompts, self._generated(model, inputs), inputs.answers, strict=True
            )
        ]

    def _generated(self, model: LoadedModel, inputs: Inputs) -> list[str]:
        texts: list[str] = []
        with torch.inference_mode(), model.errors():
            for part in inputs.encoded:
                answers = model.network.generate(
                    **part.to(model.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                )
                texts += model.processor.batch_decode(answers, skip_special_tokens=True)
        return texts

    def _score(self, text: str, label: str) -> float:
        return float(_plain(text) == _plain(label))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
