"""Bytes that a plan says are read, compared with those that the local Hub sends."""

import pytest
import torch

from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import describe, explain
from hub_magmax.recipe.loading import parse_recipe
from tests.families import accepted, recipe_values, write_checkpoint
from tests.test_checkpoints_adapter import write_adapter

#: Bytes of headers and of what comes along with them.
HEADER_BYTES = 2**16

EMBEDDING = {"match": "embed.weight", "take": "base_model"}
WHOLE_MODEL = {"name": "ties", "scope": "model"}
SCORED = {"name": "pcb", "scope": "model"}


def upload(hub, folder, case):
    """Put a base model, whole tasks and adapters on the Hub, and return the number of bytes of each."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (400, 128)} | {
        f"m.layers.{n}.{p}.weight": (256, 128) for n in range(6) for p in "qk"
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("base", "donor"):
        write_checkpoint(folder / name, base)
    for seed, name in enumerate("ab"):
        noise = {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        write_checkpoint(folder / name, {key: base[key] + noise[key] for key in base})
        write_adapter(folder / f"lora-{name}", base, ("q",), seed)
    for path in folder.iterdir():
        hub.add_repo(f"me/reads-{case}-{path.name}", folder=path)
    factors = 4 * 6 * 4 * (256 + 128)  # rank 4, in six layers
    return sum(tensor.nbytes for tensor in base.values()), factors


@pytest.mark.parametrize(
    ("case", "models", "changes", "num_models", "num_adapters"),
    [
        ("whole", ("a", "b"), {}, 3, 0),
        ("adapters", ("lora-a", "lora-b"), {}, 1, 2),
        ("surveyed", ("lora-a", "lora-b"), {"method": "ties"}, 1, 2),
        ("sequence", ("lora-a", "lora-b"), {"adapters": "sequence"}, 1, 2),
        ("one-of-each", ("lora-a", "b"), {}, 2, 1),
        ("model", ("a", "b"), {"method": WHOLE_MODEL}, 6, 0),
        ("scores", ("a", "b"), {"method": SCORED}, 9, 0),
        ("adapters-model", ("lora-a", "lora-b"), {"method": WHOLE_MODEL}, 2, 4),
        ("same", ("a", "a"), {}, 2, 0),
        ("own-base", ("lora-a", "lora-b"), {"base": "donor"}, 2, 2),
        ("one-counts", ("a", "b"), {"preference": {"weights": {"a": 1}}}, 2, 0),
        ("adapter", ("lora-a", "lora-b"), {"output": {"path": "out", "format": "adapter"}}, 0, 2),
    ],
)
def test_a_plan_counts_what_a_merge_fetches(hub, tmp_path, case, models, changes, num_models, num_adapters):
    model_bytes, adapter_bytes = upload(hub, tmp_path, case)
    own = {"base": f"me/reads-{case}-{changes['base']}"} if "base" in changes else {}
    tasks = [{"name": n, "model": f"me/reads-{case}-{m}", **own} for n, m in zip("ab", models, strict=True)]
    changes = {"method": "average", "output": {"path": "out"}} | {
        k: v for k, v in changes.items() if k != "base"
    }
    recipe = parse_recipe(
        recipe_values(base_model=f"me/reads-{case}-base", tasks=tasks, **changes), folder=tmp_path
    )
    made = accepted(plan(recipe, lock(recipe)))
    assert (
        made.bytes_in == describe(made)["bytes_in"] == num_models * model_bytes + num_adapters * adapter_bytes
    )
    assert ("reads        at least" in explain(made)) == (changes["method"] in (WHOLE_MODEL, SCORED))
    hub.reset_log()
    assert merge(made).bytes_in == made.bytes_in
    fetched = sum(found.bytes_sent for found in hub.log if found.route == "storage" and found.method == "GET")
    # A look at the model may begin with what the one before fetched last.
    assert abs(fetched - made.bytes_in) <= 4 * HEADER_BYTES + made.looked_at_bytes // 8


def test_an_adapter_of_a_bound_rank_counts_the_matrices_that_it_is_made_of(hub, tmp_path):
    upload(hub, tmp_path, "low-rank")
    tasks = [{"name": name, "model": f"me/reads-low-rank-{name}"} for name in "ab"]
    output = {"path": "out", "format": "adapter", "rank": 2}
    values = recipe_values(
        base_model="me/reads-low-rank-base", tasks=tasks, output=output, tensors=[EMBEDDING]
    )
    made = plan(parse_recipe(values | {"method": "average"}, folder=tmp_path))
    assert made.bytes_in == 3 * 12 * 256 * 128 * 4
