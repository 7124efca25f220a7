"""Schema of examples: what is evaluated, what a router learns from, what statistics are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hub_magmax.files import digest
from hub_magmax.recipe.values import GPTQ, Data, EvaluatorChoice, Number, Quantized, Spec, TaskData


class Evaluation(Spec):
    """Per task, the examples that the card reports on.

    `quantized` scores the merged model again on weights rounded to fewer bits; with `quantized_models: all`
    the base model and the tasks' checkpoints on their own tasks too. `int3-gptq` rounds by GPTQ, by the
    examples of `calibration`. `guard` names examples on which the merged model may score at most `margin`
    less than the base model. `device_map` spreads each model over the devices of this machine, as accelerate
    does. `cells: own` scores each task's checkpoint on its own task only, by default on all.
    """

    evaluator: EvaluatorChoice = EvaluatorChoice()
    tasks: TaskData
    batch_size: Annotated[int, Field(ge=1)] = 64
    quantized: tuple[Quantized, ...] = ()
    quantized_models: Literal["merged", "all"] | None = None
    calibration: Data | None = None
    guard: TaskData = Field(default_factory=dict)
    margin: Annotated[Number, Field(ge=0)] = 0.01
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    cells: Literal["all", "own"] | None = None

    @property
    def digest(self) -> str:
        """Digest of what decides the scores."""
        aside = {"margin", "device_map"} | ({"cells"} if self.cells != "own" else set())
        # Keys that came later, and are not given, are left out, as in older digests.
        later = {"quantized_models", "calibration"}
        aside |= {name for name in later if getattr(self, name) is None}
        return digest(self.model_dump(mode="json", exclude=aside))

    @property
    def needs_calibration(self) -> bool:
        """Whether weights are rounded by what examples say."""
        return any(kind.endswith(GPTQ) for kind in self.quantized)

    def own_cells(self, task: str) -> tuple[str, ...]:
        """Return the tasks on whose examples a task's own checkpoint is scored."""
        return tuple(other for other in self.tasks if other == task or self.cells != "own")

    @property
    def data(self) -> dict[str, Data]:
        """Return the examples of tasks and guards by name."""
        return self.tasks | self.guard


class Routing(Spec):
    """Per task, examples that a router is fitted to and calibrated on; those of `evaluation` measure it."""

    tasks: TaskData


class Statistics(Spec):
    """Examples of each task, on which its own checkpoint runs for statistics of its data.

    `evaluator` says how models run, by default as in `evaluation`.
    """

    data: TaskData
    evaluator: EvaluatorChoice | None = None
    batch_size: Annotated[int, Field(ge=1)] = 64
