"""Tasks of the Language Model Evaluation Harness, with its own data, prompts and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from hub_magmax.errors import EvaluationError, MissingDependencyError
from hub_magmax.evaluation.evaluators.registry import Columns, Outcome, evaluator
from hub_magmax.evaluation.hub_data import without_prepared_copies

if TYPE_CHECKING:
    from datasets import Dataset

    from hub_magmax.evaluation.evaluators.loading import LoadedModel


@evaluator("lm-eval")
@dataclass(frozen=True)
class Harness:
    """A task of lm-eval: `dataset` names the task, and lm-eval brings the examples.

    Needs the extra `lm-eval`.

    Attributes:
        measure: Which of the task's metrics counts, from 0 to 1 for each example.
        num_fewshot: Solved examples in front of each question; the task's own number by default.
        limit: Examples that are scored, the first ones; all by default.
    """

    _: KW_ONLY
    measure: str = "acc"
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

    is_share: ClassVar[bool] = True
    brings_data: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-generation"
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    processor_class: ClassVar[str] = "AutoTokenizer"

    @property
    def metric(self) -> str:
        return self.measure

    def encode(
        self, model: LoadedModel, examples: Dataset | str, columns: Columns, batch_size: int
    ) -> Iterator[tuple[str, int]]:
        yield str(examples), batch_size

    def outcomes(self, model: LoadedModel, batches: Iterable[tuple[str, int]]) -> list[Outcome]:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise MissingDependencyError(
                "lm-eval is not installed", hint='Install it with: pip install "hub-magmax[lm-eval]"'
            ) from error
        found: list[Outcome] = []
        for task, batch_size in batches:
            language_model = HFLM(
                pretrained=model.network,
                tokenizer=model.processor,
                batch_size=batch_size,
                device=str(model.device),
            )
            try:
                with without_prepared_copies():
                    results = lm_eval.simple_evaluate(
                        model=language_model,
                        tasks=[task],
                        num_fewshot=self.num_fewshot,
                        limit=self.limit,
                        log_samples=True,
                        bootstrap_iters=0,
                    )
            except (KeyError, ValueError, OSError) as error:
                raise EvaluationError(
                    f"lm-eval cannot run the task ({type(error).__name__}: {str(error)[:300]})",
                    where=f"lm-eval task {task!r}",
                    hint="`lm-eval ls tasks` lists the tasks there are.",
                ) from error
            self._check_direction(results, task)
            found += [self._outcome(sample, task) for sample in results["samples"][task]]
        return found

    def _check_direction(self, results: Mapping[str, Any], task: str) -> None:
        directions = results.get("higher_is_better", {}).get(task, {})
        if directions.get(self.measure) is False:
            higher = [name for name, is_higher in directions.items() if is_higher]
            raise EvaluationError(
                f"lower values of {self.measure!r} are better, and models are compared by higher ones",
                where=f"lm-eval task {task!r}",
                expected=f"measure: one of {', '.join(higher)}" if higher else "",
            )

    def _outcome(self, sample: dict[str, Any], task: str) -> Outcome:
        if self.measure not in sample:
            measured = [name for name in sample.get("metrics", ()) if name in sample]
            raise EvaluationError(
                f"the task does not measure {self.measure!r} for each example",
                where=f"lm-eval task {task!r}",
                expected=f"measure: one of {', '.join(measured)}",
            )
        return Outcome(float(sample[self.measure]))
