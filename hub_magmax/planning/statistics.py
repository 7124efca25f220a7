"""Statistics, counters and fixed buffers: tensors that no optimiser moved, so that they have no task vector.

A checkpoint stores them among its weights, and they are told by name, dtype and shape. Their merge is a mean
that stays between the checkpoints' values, or a copy of the base model's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hub_magmax import methods
from hub_magmax.checkpoints.index import EXACT_DTYPES, MERGEABLE_DTYPES, TensorInfo
from hub_magmax.planning.plan import EXACT_REASON, MEAN, Plan
from hub_magmax.recipe.merge_values import MergeValues
from hub_magmax.recipe.tensor_rules import rule_for
from hub_magmax.text import listed, shown

Shape = tuple[int, ...]
Key = TypeVar("Key")

BASE = "base_model"


@dataclass(frozen=True)
class Kind:
    """A kind of tensor that is no weight.

    Attributes:
        name: As plans call several of them.
        pattern: Matches the last part of a tensor's name, after the last dot.
        source: `MEAN` for a mean over the tasks, or `base_model` for a copy.
        has_shape: Says whether a shape is one of theirs.
        dtypes: Theirs.
        may_lack: Whether a checkpoint without it is complete, as the model's code makes it anew.
        parent: Matches the part of the name before that.
        must_agree: Whether values that differ are an error: those of integers that the code decides.
        note: Ends the sentence that plans, reports and cards say about them; empty where nothing is said.
    """

    name: str
    pattern: str
    source: str
    has_shape: Callable[[Shape], bool] = lambda shape: True
    dtypes: Sequence[str] = (*MERGEABLE_DTYPES, *EXACT_DTYPES)
    may_lack: bool = False
    parent: str = ".*"
    must_agree: bool = False
    note: str = ""

    def covers(self, info: TensorInfo, parent: str, last: str) -> bool:
        """Say whether a tensor with these last parts of its name is of this kind."""
        is_named = re.fullmatch(self.pattern, last) and re.fullmatch(self.parent, parent)
        return bool(is_named) and info.dtype in self.dtypes and self.has_shape(info.shape)

    @property
    def reason(self) -> str:
        """Why a copy is one, for the plan."""
        return EXACT_REASON if self.must_agree else f"{self.name}, which are no weights"

    @property
    def is_copied(self) -> bool:
        """Whether the other checkpoints do not matter."""
        return self.source == BASE and not self.must_agree


def _is_single(shape: Shape) -> bool:
    return math.prod(shape) == 1


def _is_causal(shape: Shape) -> bool:
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def _is_square(shape: Shape) -> bool:
    return len(shape) >= 2 and shape[-1] == shape[-2]


_RUNNING = (
    "are means over the tasks, weighted by the preference and not scaled; to set them anew, pass data "
    "through the merged model in training mode"
)
_MEANS = "are means over the tasks, weighted by the preference and not scaled"
_COUNTED = "are the base model's"
_OBSERVED = "are the base model's; pass data through the merged model before it is quantised"

#: Parts of names that tell counters from other single integers.
_COUNTING = "num|n|count|counter|counts|calls|step|steps|iter|iters|iteration|iterations|epoch|epochs|updates"

#: Modules of PyTorch's quantisation-aware training, and their buffers.
_OBSERVER = r"\w*(?:fake_quant|activation_post_process|observer)\w*"
_OBSERVED_VALUE = "(?:min|max)_vals?|scale|zero_point|eps|histogram|(?:fake_quant|observer)_enabled"

#: Modules that keep statistics of data: of policies' inputs and outputs, of observations and rewards.
_NORMALISER = r"(?:\w+_)?(?:rms|normali[sz]er|standardi[sz]er|stats|statistics|mean_(?:var|std))"

_ATTENTION = r"\w*(?:attn|attention)"

#: The first kind that covers a tensor counts.
KINDS: tuple[Kind, ...] = (
    Kind("running means", "(?:running|moving)_mean", MEAN, dtypes=MERGEABLE_DTYPES, note=_RUNNING),
    Kind(
        "running variances", "(?:running|moving)_(?:var|variance|std)", MEAN,
        dtypes=MERGEABLE_DTYPES, note=_RUNNING,
    ),
    Kind("statistics", "mean|std|min|max", MEAN, parent=r"buffer_\w+", dtypes=MERGEABLE_DTYPES, note=_MEANS),
    Kind(
        "statistics", "_?(?:mean|var|variance|std|sigma)", MEAN, parent=_NORMALISER,
        dtypes=MERGEABLE_DTYPES, note=_MEANS,
    ),
    Kind(
        "statistics", "_?(?:ema_)?cluster_(?:size|usage)|embed_(?:avg|sum)", MEAN,
        dtypes=MERGEABLE_DTYPES, note=_MEANS,
    ),
    Kind("counters", "num_batches_tracked", BASE, _is_single, may_lack=True, note=_COUNTED),
    Kind(
        "counters", rf"_?(?:[a-z0-9]+_)*(?:{_COUNTING})(?:_[a-z0-9]+)*", BASE, _is_single,
        EXACT_DTYPES, note=_COUNTED,
    ),
    Kind("ranges of observers", _OBSERVED_VALUE, BASE, parent=_OBSERVER, note=_OBSERVED),
    Kind("ranges of observers", "(?:min|max)_vals?", BASE, dtypes=MERGEABLE_DTYPES, note=_OBSERVED),
    Kind(
        "positions", "position_ids|token_type_ids|relative_position_index", BASE,
        dtypes=EXACT_DTYPES, may_lack=True, must_agree=True,
    ),
    Kind("frequencies", "inv_freq|(?:cos|sin)_cached", BASE, dtypes=MERGEABLE_DTYPES, may_lack=True),
    Kind("coordinates", "relative_coords_table", BASE, dtypes=MERGEABLE_DTYPES, may_lack=True),
    *(
        Kind(
            "masks", pattern, BASE, has_shape, dtypes,
            may_lack=True, parent=parent, must_agree=dtypes is EXACT_DTYPES,
        )
        for pattern, parent, has_shape in (
            ("bias", _ATTENTION, _is_causal),
            ("masked_bias", _ATTENTION, _is_single),
            ("(?:causal|attn|attention)_mask", ".*", _is_square),
        )
        for dtypes in (EXACT_DTYPES, MERGEABLE_DTYPES)
    ),
)  # fmt: skip


#: Decides about nearly all tensors at once: one of 30,000 must not take longer than reading its header.
_ANY_KIND = re.compile("|".join(f"(?:{kind.pattern})" for kind in KINDS))


def kind_of(info: TensorInfo) -> Kind | None:
    """Return the kind of a tensor that is no weight, None for a weight."""
    above, _, last = info.name.rpartition(".")
    if not _ANY_KIND.fullmatch(last):
        return None
    parent = above.rpartition(".")[2]
    return next((kind for kind in KINDS if kind.covers(info, parent, last)), None)


def may_lack(info: TensorInfo) -> bool:
    """Say whether a checkpoint may lack a tensor that another one has."""
    kind = kind_of(info)
    return kind is not None and kind.may_lack


def shares_of(method: Mapping[str, Any], weights: Sequence[float], scaling: float) -> tuple[float, ...]:
    """Return the weights of a mean of statistics: of the base model, and of each task.

    The tasks that a merge adds share it, by their weights: a task that is subtracted brings the model no
    nearer to its statistics. Where nothing is added, the base model's are left. The scaling coefficient
    has no other part, so that a variance never is negative.

    Args:
        method: As a lock describes it. One that ignores the preference weighs all tasks alike.
        weights: One per task.
        scaling: Scaling coefficient.

    Returns:
        Non-negative numbers that sum to 1.
    """
    found = methods.get_method(method["name"])
    unread = found.unread(tuple(weights))
    sign = (scaling > 0) - (scaling < 0)
    added = [
        0.0 if task in unread else max(0.0, sign * (weight if found.uses_preference else 1.0))
        for task, weight in enumerate(weights)
    ]
    total = math.fsum(added)
    return (0.0, *(share / total for share in added)) if total else (1.0, *added)


def without_share(sources: Iterable[str], values: MergeValues) -> tuple[str, ...]:
    """Return the sources that are not read for means of statistics; the base model is the first."""
    shares = shares_of(values.method, values.weights, values.scaling)
    return tuple(name for name, share in zip(sources, shares, strict=True) if not share)


def unweighted_notices(plan: Plan) -> tuple[str, ...]:
    """Return sentences about statistics and counters, and about buffers that some checkpoints lack."""
    return (*_noted(plan), *_lacking(plan), *_surplus(plan))


def _noted(plan: Plan) -> Iterator[str]:
    noted = {kind.reason: kind for kind in KINDS if kind.note}
    found = _grouped((job.reason, job.name) for job in plan.jobs if job.reason in noted)
    for reason, names in found.items():
        yield f"{noted[reason].name} ({len(names):,}: {listed(names, 2)}) {noted[reason].note}"


def _lacking(plan: Plan) -> Iterator[str]:
    found = _grouped((job.unread, job.name) for job in plan.jobs if job.source == BASE and job.unread)
    for tasks, names in found.items():
        yield f"missing in {listed(tasks)} and copied from the base model: {listed(names, 3)}"


def _surplus(plan: Plan) -> Iterator[str]:
    ruled = [rule for rule in plan.recipe.tensors if rule.take == "nothing"]
    names = [shown(name) for name in plan.left_out if rule_for(name, ruled) is None]
    if names:
        yield f"left out, as the base model lacks them: {listed(names, 3)}"


def _grouped(named: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    """Return names of tensors as messages show them, by key."""
    found: dict[Key, list[str]] = {}
    for key, name in named:
        found.setdefault(key, []).append(shown(name))
    return found
