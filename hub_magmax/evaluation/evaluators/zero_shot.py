"""Zero-shot image classification by a model of images and texts, such as CLIP."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from hub_magmax.evaluation.evaluators.classification import class_losses, class_outcomes
from hub_magmax.evaluation.evaluators.examples import batches_of, class_lookup, label_names
from hub_magmax.evaluation.evaluators.registry import Columns, Outcome, evaluator
from hub_magmax.kernels.lazy_imports import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from hub_magmax.evaluation.evaluators.loading import LoadedModel


@evaluator("zero-shot-image-classification")
@dataclass(frozen=True)
class ZeroShotImageClassification:
    """Images to one of the classes that the recipe names, by a head made from the model's text tower.

    A class is the mean direction of its templates' embeddings; an image goes to the class whose
    direction is nearest to its own. Checkpoints that were fine-tuned with the text tower frozen all
    have the same head.

    Source: CLIP (arXiv:2103.00020), section 3.1.4.

    Attributes:
        classes: Names, in the order of the data's labels where these are numbers without names.
        templates: Texts with `{}` where the name goes.
    """

    _: KW_ONLY
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {}.",)

    metric: ClassVar[str] = "accuracy"
    is_share: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "zero-shot-image-classification"
    model_class: ClassVar[str] = "AutoModelForZeroShotImageClassification"
    processor_class: ClassVar[str] = "AutoProcessor"

    def describe_inputs(self) -> dict[str, str]:
        return {"class_templates": json.dumps(self.templates, ensure_ascii=False)}

    def wanted(self, columns: Columns) -> list[str]:
        return [columns.input or "image", columns.label]

    def encode(
        self, model: LoadedModel, examples: Dataset, columns: Columns, batch_size: int
    ) -> Iterator[tuple[Any, list[int]]]:
        numbers = {name: number for number, name in enumerate(self.classes)}
        to_class = class_lookup(numbers, label_names(examples, columns.label))
        for images, labels in batches_of(examples, self.wanted(columns), batch_size):
            with model.errors():
                encoded = model.processor(images=images, return_tensors="pt")
            yield encoded, [to_class(label) for label in labels]

    def outcomes(self, model: LoadedModel, batches: Iterable[tuple[Any, list[int]]]) -> list[Outcome]:
        found = []
        with torch.inference_mode():
            with model.errors():
                head = self.head(model)
            for encoded, classes in batches:
                found += class_outcomes(self._logits(model, encoded, head), classes)
        return found

    def losses(self, model: LoadedModel, batch: tuple[Any, list[int]], smoothing: float) -> Tensor:
        """Return the cross-entropy of each image; the head is the text tower's, and learns nothing by it."""
        encoded, classes = batch
        with torch.no_grad(), model.errors():
            head = self.head(model)
        return class_losses(self._logits(model, encoded, head), classes, smoothing)

    def _logits(self, model: LoadedModel, encoded: Any, head: Tensor) -> Tensor:
        with model.errors():
            seen = model.network.get_image_features(**encoded.to(model.device)).pooler_output
        logits: Tensor = _unit(seen) @ head.T * model.network.logit_scale.exp()
        return logits

    def head(self, model: LoadedModel) -> Tensor:
        """Return one unit vector per class."""
        rows = []
        for name in self.classes:
            texts = [template.format(name) for template in self.templates]
            encoded = model.processor(text=texts, padding=True, truncation=True, return_tensors="pt")
            embedded = model.network.get_text_features(**encoded.to(model.device)).pooler_output
            rows.append(_unit(_unit(embedded).mean(dim=0)))
        return torch.stack(rows)


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True)
    return unit
