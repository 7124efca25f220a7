"""Classifiers of images and texts, with one output per class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators.examples import batches_of, class_lookup, label_names
from hub_magmax.evaluation.evaluators.registry import Columns, Outcome, evaluator
from hub_magmax.evaluation.evaluators.texts import encode_texts, text_config
from hub_magmax.kernels.lazy_imports import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from hub_magmax.evaluation.evaluators.loading import LoadedModel

#: Parts of the network's inputs, classes of the examples, and whether a part of each is left out.
Batch = tuple[list[Any], list[int], list[bool]]


class _Classification:
    """Inputs to one label each: the class with the largest output, equal ones to the first."""

    metric: ClassVar[str] = "accuracy"
    is_share: ClassVar[bool] = True
    input_column: ClassVar[str]

    def encode_inputs(self, model: LoadedModel, inputs: list[Any]) -> tuple[list[Any], list[bool]]:
        """Return what the network takes, in one part or several, and for each input whether it was cut."""
        raise NotImplementedError

    def wanted(self, columns: Columns) -> list[str]:
        return [columns.input or self.input_column, columns.label]

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[Batch]:
        to_class = _classes(model, label_names(examples, columns.label))
        for inputs, labels in batches_of(examples, self.wanted(columns), batch_size):
            encoded, cut = self.encode_inputs(model, inputs)
            yield encoded, [to_class(label) for label in labels], cut

    def encode_unlabelled(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[Batch]:
        """Yield batches without classes, for runs whose outcomes do not count."""
        for (inputs,) in batches_of(examples, [columns.input or self.input_column], batch_size):
            encoded, cut = self.encode_inputs(model, inputs)
            yield encoded, [], cut

    def outcomes(self, model: LoadedModel, batches: Iterable[Batch]) -> list[Outcome]:
        found = []
        with torch.inference_mode():
            for encoded, classes, cut in batches:
                logits = torch.cat([model.output(**part.to(model.device)).logits for part in encoded])
                scored = class_outcomes(logits, classes) if classes else []
                found += [outcome._replace(is_cut=c) for outcome, c in zip(scored, cut, strict=False)]
        return found

    def log_likelihoods(self, model: LoadedModel, batch: Batch) -> Iterator[tuple[float, Tensor]]:
        """Yield the probability of every class of one example, and its logarithm to be differentiated."""
        ((part,), *_) = batch
        logits = model.output(**part.to(model.device)).logits[0].float()
        if len(logits) == 1:
            raise _no_classes(model)
        likelihoods = logits.log_softmax(-1)
        yield from zip(likelihoods.detach().double().exp().tolist(), likelihoods, strict=True)

    def losses(self, model: LoadedModel, batch: Batch, smoothing: float) -> Tensor:
        """Return the cross-entropy of each example."""
        encoded, classes, _ = batch
        logits = torch.cat([model.output(**part.to(model.device)).logits for part in encoded])
        return class_losses(logits, classes, smoothing)


def class_losses(logits: Tensor, classes: list[int], smoothing: float) -> Tensor:
    """Return the cross-entropy of each row with its class, of whose target a share goes to all classes."""
    from torch.nn.functional import cross_entropy

    wanted = torch.tensor(classes, device=logits.device)
    return cross_entropy(logits.float(), wanted, reduction="none", label_smoothing=smoothing)


def class_outcomes(logits: Tensor, classes: list[int]) -> list[Outcome]:
    """Return whether each row's largest logit is that of its class, its probability and its margin."""
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


def _classes(model: LoadedModel, names: list[str] | None) -> Callable[[Any], int]:
    classes = {str(name): int(number) for name, number in model.network.config.label2id.items()}
    if len(classes) == 1:
        raise _no_classes(model)
    # What transformers writes where nobody named the classes: then only the numbers mean anything.
    return class_lookup(classes, names, named=not all(name.startswith("LABEL_") for name in classes))


def _no_classes(model: LoadedModel) -> EvaluationError:
    return EvaluationError(
        "it has one output, as of a regression, and no classes to choose from",
        where=model.name,
        expected="a model with two classes at least",
        hint="Choose an evaluator of your own that scores such outputs.",
    )


@evaluator("image-classification")
@dataclass(frozen=True)
class ImageClassification(_Classification):
    """Images to one of the classes of the model's head."""

    pipeline_tag: ClassVar[str] = "image-classification"
    model_class: ClassVar[str] = "AutoModelForImageClassification"
    processor_class: ClassVar[str] = "AutoImageProcessor"
    input_column: ClassVar[str] = "image"

    def encode_inputs(self, model: LoadedModel, inputs: list[Any]) -> tuple[list[Any], list[bool]]:
        with model.errors():
            return [model.processor(images=inputs, return_tensors="pt")], [False] * len(inputs)


@evaluator("text-classification")
@dataclass(frozen=True)
class TextClassification(_Classification):
    """Texts to one of the classes of the model's head."""

    pipeline_tag: ClassVar[str] = "text-classification"
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    processor_class: ClassVar[str] = "AutoTokenizer"
    input_column: ClassVar[str] = "text"

    def encode_inputs(self, model: LoadedModel, inputs: list[Any]) -> tuple[list[Any], list[bool]]:
        config = text_config(model)

        def is_alike(tokens: list[list[int]]) -> bool:
            pads = getattr(config, "pad_token_id", None) == model.processor.pad_token_id
            return pads and len(set(_ends(model, tokens))) < 2

        return encode_texts(model, inputs, is_alike)


def _ends(model: LoadedModel, tokens: list[list[int]]) -> list[int]:
    """Return how many ends of text the tokens of each text have, where a model reads its answer there.

    Raises:
        EvaluationError: If one has none.
    """
    config = model.network.config
    end = getattr(config, "eos_token_id", None)
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(end, int):
        return []
    found = [own.count(end) for own in tokens]
    if 0 in found:
        raise EvaluationError(
            f"its tokenizer puts no end of text (token {end}) behind a text, where it reads its answer",
            where=model.name,
            expected="the tokenizer that the model was trained with",
            hint="Put that one into its folder, as `save_pretrained` writes it.",
        )
    return found
