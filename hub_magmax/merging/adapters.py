"""Factors and configuration of a merged adapter."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hub_magmax.checkpoints.adapters.config import config_of
from hub_magmax.checkpoints.source import TensorSource, tensor_place
from hub_magmax.errors import NonFiniteError
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.planning.plan import (
    FactorJob,
    Plan,
)

if TYPE_CHECKING:
    from torch import Tensor


#: PEFT's names of the tasks of models.
_TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def factor_values(job: FactorJob, sources: Mapping[str, TensorSource]) -> Tensor:
    """Return a factor of the merged adapter, flat, in the output's dtype; computed in float32.

    Args:
        job: Of the factor.
        sources: The adapters as they are stored, by name.

    Raises:
        NonFiniteError: If a factor holds a NaN or an infinity, or the dtype cannot hold the result.
    """
    import torch

    pieces = []
    for part in job.parts:
        source = sources[part.source]
        info = source.index.tensors[part.tensor]
        flat = source.read(part.tensor, 0, info.num_elements).to(torch.float32)
        source.release(part.tensor, info.num_elements)
        if (bad := torch.nonzero(~torch.isfinite(flat))).numel():
            raise NonFiniteError(
                f"element {int(bad[0]):,} is {float(flat[bad[0]])}",
                where=tensor_place(source, info, int(bad[0])),
                expected="finite numbers only",
                hint="The adapter is damaged or its training diverged; use an earlier one.",
            )
        pieces.append((flat * part.coefficient).reshape(info.shape))
    joined = torch.cat(pieces, job.axis).to(torch_dtype(job.dtype)).reshape(-1)
    if not torch.isfinite(joined).all():
        raise NonFiniteError(
            "a merged element is infinite, from finite factors",
            where=f"tensor {job.name!r}",
            expected=f"numbers that {str(joined.dtype).removeprefix('torch.')} can hold",
            hint="Lower method.scaling, or choose a wider output.dtype.",
        )
    return joined


def adapter_config(plan: Plan, sources: Mapping[str, TensorSource]) -> str:
    """Return the `adapter_config.json` of a merged adapter: every layer has its rank, and the scale 1.

    Args:
        plan: From `plan_adapter`.
        sources: The adapters as they are stored, by name.
    """
    said = [json.loads(config_of(sources[name])) for name in plan.lock.tasks]
    kinds = {config.get("task_type") for config in said}
    kind = kinds.pop() if len(kinds) == 1 else None
    rank = Counter(plan.ranks.values()).most_common(1)[0][0]
    # Patterns match the end of a name unless they say where it starts.
    others = {f"^{re.escape(module)}": own for module, own in plan.ranks.items() if own != rank}
    base = plan.lock.base_model
    values = {
        "peft_type": "LORA",
        "task_type": kind if kind in _TASK_TYPES else None,
        "base_model_name_or_path": base.repo_id or base.reference,
        "revision": base.commit,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [*plan.ranks],
        "modules_to_save": None,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in said),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
