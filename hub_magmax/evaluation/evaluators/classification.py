"""Classifiers of images and texts, with one output per class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hub_magmax.evaluation.evaluators.examples import batches_of, class_lookup, cut_texts, label_names
from hub_magmax.evaluation.evaluators.registry import Columns, Outcome, evaluator

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from hub_magmax.evaluation.evaluators.loading import LoadedModel


class _Classification:
    """Inputs to one label each: the class with the largest output, equal ones to the first."""

    metric: ClassVar[str] = "accuracy"
    is_share: ClassVar[bool] = True
    input_column: ClassVar[str]

    def encode_inputs(self, processor: Any, inputs: list[Any]) -> Any:
        raise NotImplementedError

    def cut_inputs(self, processor: Any, inputs: list[Any]) -> list[bool]:
        """Return for each input whether a part of it is left out."""
        return [False] * len(inputs)

    def wanted(self, columns: Columns) -> list[str]:
        return [columns.input or self.input_column, columns.label]

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[tuple[Any, list[int], list[bool]]]:
        to_class = _classes(model.network.config, label_names(examples, columns.label))
        for inputs, labels in batches_of(examples, self.wanted(columns), batch_size):
            encoded = self.encode_inputs(model.processor, inputs)
            yield encoded, [to_class(label) for label in labels], self.cut_inputs(model.processor, inputs)

    def outcomes(
        self, model: LoadedModel, batches: Iterable[tuple[Any, list[int], list[bool]]]
    ) -> list[Outcome]:
        import torch

        found = []
        with torch.inference_mode():
            for encoded, classes, cut in batches:
                scored = class_outcomes(model.network(**encoded.to(model.device)).logits, classes)
                found += [outcome._replace(is_cut=c) for outcome, c in zip(scored, cut, strict=True)]
        return found

    def log_likelihoods(self, model: LoadedModel, batch: Any) -> Iterator[tuple[float, Tensor]]:
        """Yield the probability of every class of one example, and its logarithm to be differentiated."""
        logits = model.network(**batch[0].to(model.device)).logits[0].float()
        likelihoods = logits.log_softmax(-1)
        yield from zip(likelihoods.detach().double().exp().tolist(), likelihoods, strict=True)


def class_outcomes(logits: Tensor, classes: list[int]) -> list[Outcome]:
    """Return whether each row's largest logit is that of its class, its probability and its margin."""
    import torch

    predicted = logits.argmax(-1).tolist()
    logits = logits.double()
    wanted = torch.tensor(classes, device=logits.device)[:, None]
    right = logits.gather(-1, wanted).squeeze(-1)
    margins = right - logits.scatter(-1, wanted, -torch.inf).amax(-1)
    probabilities = logits.softmax(-1).gather(-1, wanted).squeeze(-1)
    return [
        Outcome(float(guess == label), probability, margin)
        for guess, label, probability, margin in zip(
            predicted, classes, probabilities.tolist(), margins.tolist(), strict=True
        )
    ]


def _classes(config: Any, names: list[str] | None) -> Callable[[Any], int]:
    classes = {str(name): int(number) for name, number in config.label2id.items()}
    # What transformers writes where nobody named the classes: then only the numbers mean anything.
    return class_lookup(classes, names, named=not all(name.startswith("LABEL_") for name in classes))


@evaluator("image-classification")
@dataclass(frozen=True)
class ImageClassification(_Classification):
    """Images to one of the classes of the model's head."""

    pipeline_tag: ClassVar[str] = "image-classification"
    model_class: ClassVar[str] = "AutoModelForImageClassification"
    processor_class: ClassVar[str] = "AutoImageProcessor"
    input_column: ClassVar[str] = "image"

    def encode_inputs(self, processor: Any, inputs: list[Any]) -> Any:
        return processor(images=inputs, return_tensors="pt")


@evaluator("text-classification")
@dataclass(frozen=True)
class TextClassification(_Classification):
    """Texts to one of the classes of the model's head."""

    pipeline_tag: ClassVar[str] = "text-classification"
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    processor_class: ClassVar[str] = "AutoTokenizer"
    input_column: ClassVar[str] = "text"

    def encode_inputs(self, processor: Any, inputs: list[Any]) -> Any:
        return processor(inputs, padding=True, truncation=True, return_tensors="pt")

    def cut_inputs(self, processor: Any, inputs: list[Any]) -> list[bool]:
        return cut_texts(processor, inputs)
