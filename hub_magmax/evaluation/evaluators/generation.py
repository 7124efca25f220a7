"""Generative language models, scored by the text they answer with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from hub_magmax.evaluation.evaluators.examples import batches_of, label_names, label_text
from hub_magmax.evaluation.evaluators.registry import Columns, Outcome, evaluator

if TYPE_CHECKING:
    from datasets import Dataset

    from hub_magmax.evaluation.evaluators.loading import LoadedModel


@evaluator("text-to-text")
@dataclass(frozen=True)
class TextToText:
    """Texts to texts, right where the greedy answer is the label's text to the letter, case and spaces aside.

    For sequence-to-sequence models such as T5. Labels are texts, or numbers whose names the data has.

    Attributes:
        max_new_tokens: Where an answer is cut off.
        prefix: Put before every input, such as "summarize: ".
    """

    _: KW_ONLY
    max_new_tokens: Annotated[int, Field(ge=1)] = 16
    prefix: str = ""

    metric: ClassVar[str] = "exact match"
    is_share: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-generation"
    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    processor_class: ClassVar[str] = "AutoTokenizer"

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[tuple[Any, list[str]]]:
        names = label_names(examples, columns.label)
        for texts, labels in batches_of(examples, (columns.input or "text", columns.label), batch_size):
            prefixed = [self.prefix + text for text in texts]
            encoded = model.processor(prefixed, padding=True, truncation=True, return_tensors="pt")
            yield encoded, [label_text(label, names) for label in labels]

    def outcomes(self, model: LoadedModel, batches: Iterable[tuple[Any, list[str]]]) -> list[Outcome]:
        import torch

        found = []
        with torch.inference_mode():
            for encoded, wanted in batches:
                answers = model.network.generate(
                    **encoded.to(model.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                )
                texts = model.processor.batch_decode(answers, skip_special_tokens=True)
                found += [
                    Outcome(float(_plain(text) == _plain(label)))
                    for text, label in zip(texts, wanted, strict=True)
                ]
        return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
