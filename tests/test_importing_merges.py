"""Imported configurations of mergekit merged, and compared with mergekit's arithmetic in float64."""

import json

import numpy as np
import pytest

from hub_magmax.checkpoints.model_facts import CheckpointFacts
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.importing.other_tools import import_text
from hub_magmax.recipe.loading import parse_recipe
from tests import oracles_mergekit as oracle
from tests import test_tokenizers
from tests.families import accepted, read_merged, write_family
from tests.test_importing import models_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    found = write_family(folder, ("a", "b", "c"))
    for name in found:
        config = {"model_type": "test", "num_hidden_layers": 2}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder, found


def merged(folder, text, output):
    """Return the tensors of the merge that a configuration stands for, in float64, and the verdict."""
    found = import_text(text, "mix.yml", CheckpointFacts(folder, folder))
    assert found.recipe is not None, [f for f in found.findings if f.is_lost]
    values = dict(found.recipe) | {"output": {**found.recipe["output"], "path": str(output)}}
    recipe = parse_recipe(values, folder=folder)
    merge(accepted(plan(recipe, lock(recipe))), output)
    return {name: tensor.double().numpy() for name, tensor in read_merged(output).items()}, found.verdict


def added(**how):
    return lambda base, *tasks: oracle.added(base, tasks, **how)


#: A configuration, and what mergekit computes from base, a, b and c.
CASES = {
    "linear": (
        models_of("linear", "./base 0.4", "./a 1", "./b 0.6", base="./base"),
        lambda base, a, b, c: oracle.linear([base, a, b], [0.4, 1, 0.6]),
    ),
    "linear without a base model": (
        models_of("linear", "./a 0.5", "./b 0.3", "./c 0.2"),
        lambda base, a, b, c: oracle.linear([a, b, c], [0.5, 0.3, 0.2]),
    ),
    "linear with a negative weight": (
        models_of("linear", "./a 1.5", "./b -0.3"),
        lambda base, a, b, c: oracle.linear([a, b], [1.5, -0.3]),
    ),
    "task arithmetic": (
        models_of("task_arithmetic", "./a 0.8", "./b -0.5", base="./base", rest="parameters: {lambda: 0.7}"),
        lambda base, a, b, c: oracle.added(base, [a, b], [0.8, -0.5], scaling=0.7),
    ),
    "task arithmetic, normalized": (
        models_of("task_arithmetic", "./a 3", "./b 1", base="./base", rest="parameters: {normalize: true}"),
        lambda base, a, b, c: oracle.added(base, [a, b], [3, 1], normalize=True),
    ),
    "ties": (
        models_of("ties", "./a 0.7", "./b 0.2", "./c 0.3", base="./base", rest="parameters: {density: 0.5}"),
        lambda base, *tasks: oracle.added(
            base,
            tasks,
            [0.7, 0.2, 0.3],
            elects=True,
            normalize=True,
            sparsify=lambda n, v: oracle.trimmed(v, 0.5),
        ),
    ),
    "breadcrumbs": (
        models_of(
            "breadcrumbs",
            "./a 0.7",
            "./b 0.4",
            base="./base",
            rest="parameters: {density: 0.5, gamma: 0.125}",
        ),
        lambda base, a, b, c: oracle.added(
            base, [a, b], [0.7, 0.4], sparsify=lambda n, v: oracle.trimmed(v, 0.5, 0.125)
        ),
    ),
    "ties, rescaled": (
        models_of(
            "ties",
            "./a 0.7",
            "./b 0.2",
            "./c 0.3",
            base="./base",
            rest="parameters: {density: 0.5, rescale: true}",
        ),
        lambda base, *tasks: oracle.added(
            base,
            tasks,
            [0.7, 0.2, 0.3],
            elects=True,
            normalize=True,
            sparsify=lambda n, v: oracle.to_norm(v, oracle.trimmed(v, 0.5)),
        ),
    ),
    "breadcrumbs, rescaled": (
        models_of(
            "breadcrumbs",
            "./a 0.7",
            "./b -0.4",
            base="./base",
            rest="parameters: {density: 0.5, gamma: 0.125, rescale: true}",
        ),
        lambda base, a, b, c: oracle.added(
            base,
            [a, b],
            [0.7, -0.4],
            sparsify=lambda n, v: oracle.to_norm(v, oracle.trimmed(v, 0.5, 0.125)),
        ),
    ),
    "breadcrumbs without density": (
        models_of("breadcrumbs", "./a 0.7", base="./base", rest="parameters: {gamma: 0.25}"),
        lambda base, a, b, c: oracle.added(base, [a], [0.7]),
    ),
    "passthrough": (models_of("passthrough", "./b"), lambda base, a, b, c: b),
}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_configuration_gives_what_mergekit_computes(models, tmp_path, case):
    folder, family = models
    text, expected = CASES[case]
    found, verdict = merged(folder, text, tmp_path / "merged")
    exact = verdict == "exact"
    for name, array in found.items():
        arrays = [family[model][name].double().numpy() for model in ("base", "a", "b", "c")]
        if name == "position_ids":
            continue
        # Tensors of one element are trimmed to it by both.
        wanted = expected(*arrays)
        assert np.abs(array - wanted).max() <= (0 if exact else 1e-6), name


def share(name):
    """Return the place of a tensor among the two blocks of the family: the first, the last, or outside."""
    return 1.0 if name.startswith("layer.1.") else 0.0


def running(points, name):
    """Return a gradient of two points, or of three, at a tensor of two blocks."""
    return points[-1] if share(name) else points[0]


SLICED = """\
merge_method: task_arithmetic
base_model: ./base
slices:
- sources:
  - {model: ./base, layer_range: [0, 1]}
  - {model: ./a, layer_range: [0, 1], parameters: {weight: [0.9, 0.4]}}
  parameters: {lambda: 2}
- sources:
  - {model: ./base, layer_range: [1, 2]}
  - {model: ./a, layer_range: [1, 2]}
parameters: {lambda: 0.5, weight: 0.3}
"""

#: Configurations whose numbers differ between tensors, and what mergekit computes for one.
BY_TENSOR = {
    "linear over the blocks": (
        "merge_method: linear\nmodels:\n- {model: ./a, parameters: {weight: [0.9, 0.1]}}\n"
        "- {model: ./b, parameters: {weight: [0.1, 2, 0.6]}}\n- {model: ./c, parameters: {weight: [0.3]}}\n",
        lambda name, base, a, b, c: oracle.linear(
            [a, b, c], [running([0.9, 0.1], name), running([0.1, 2, 0.6], name), 0.3]
        ),
    ),
    "linear over the blocks, with a weight below 0": (
        "merge_method: linear\nmodels:\n- {model: ./a, parameters: {weight: [0.9, 0.1]}}\n"
        "- {model: ./b, parameters: {weight: [0.1, 2, 0.6]}}\n"
        "- {model: ./c, parameters: {weight: [{filter: bias, value: 0.5}, {value: [-0.3, 0]}]}}\n",
        lambda name, base, a, b, c: oracle.linear(
            [a, b, c],
            [
                running([0.9, 0.1], name),
                running([0.1, 2, 0.6], name),
                0.5 if "bias" in name else running([-0.3, 0], name),
            ],
        ),
    ),
    "a mean in some tensors, with weights that differ in sum, and a sum in others": (
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n"
        "- {model: ./a, parameters: {weight: [0.9, 0.1]}}\n- {model: ./b, parameters: {weight: [0.5, 0.4]}}\n"
        "parameters: {normalize: [{filter: bias, value: false}, {value: true}], lambda: [1, 0.5]}\n",
        lambda name, base, a, b, c: oracle.added(
            base,
            [a, b],
            [running([0.9, 0.1], name), running([0.5, 0.4], name)],
            normalize="bias" not in name,
            scaling=running([1, 0.5], name),
        ),
    ),
    "a trimmed mean with weights that differ in sum": (
        "merge_method: breadcrumbs\nbase_model: ./base\nmodels:\n"
        "- {model: ./a, parameters: {weight: [0.9, 0.3]}}\n"
        "- {model: ./b, parameters: {weight: [0.5, -0.1]}}\n"
        "parameters: {normalize: true, gamma: 0, density: [0.5, 0.25]}\n",
        lambda name, base, a, b, c: oracle.added(
            base,
            [a, b],
            [running([0.9, 0.3], name), running([0.5, -0.1], name)],
            normalize=True,
            sparsify=lambda n, v: oracle.trimmed(v, running([0.5, 0.25], name), 0.0),
        ),
    ),
    "linear over the blocks, to one": (
        "merge_method: linear\nmodels:\n- {model: ./a, parameters: {weight: [1, 0.25]}}\n"
        "- {model: ./b, parameters: {weight: [0, 0.75]}}\nparameters: {normalize: false}\n",
        lambda name, base, a, b, c: oracle.linear(
            [a, b], [running([1, 0.25], name), running([0, 0.75], name)], normalize=False
        ),
    ),
    "sum by name, block and level": (
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n"
        "- {model: ./a, parameters: {weight: [{filter: bias, value: 0.2}, "
        "{filter: layer, value: [0.5, -1]}]}}\n"
        "- {model: ./b, parameters: {weight: {filter: r.1.w, value: 3}}}\n"
        "parameters: {weight: 0.1, lambda: [{filter: weight, value: [1, 0.5]}, {value: 2}]}\n",
        lambda name, base, a, b, c: oracle.added(
            base,
            [a, b],
            [
                0.2 if "bias" in name else running([0.5, -1], name) if "layer" in name else 0.1,
                3 if "r.1.w" in name else 0.1,
            ],
            scaling=running([1, 0.5], name) if "weight" in name else 2,
        ),
    ),
    "elections with a density each, and a sum in some": (
        "merge_method: ties\nbase_model: ./base\nmodels:\n"
        "- {model: ./a, parameters: {weight: 0.7, density: [0.9, 0.3]}}\n"
        "- {model: ./b, parameters: {weight: 0.4}}\n- {model: ./c, parameters: {weight: 0.2, density: 1}}\n"
        "parameters: {density: 0.57, normalize: [{filter: embed, value: false}]}\n",
        lambda name, base, *tasks: oracle.added(
            base,
            tasks,
            [0.7, 0.4, 0.2],
            elects=True,
            normalize="embed" not in name,
            sparsify=lambda n, v: oracle.trimmed(v, [running([0.9, 0.3], name), 0.57, 1][n]),
        ),
    ),
    "linear that is not normalized": (
        "merge_method: linear\nmodels:\n- {model: ./a, parameters: {weight: [0.9, 0.1]}}\n"
        "- {model: ./b, parameters: {weight: [{filter: bias, value: 0}, {value: 0.6}]}}\n"
        "parameters: {normalize: false}\n",
        lambda name, base, a, b, c: oracle.linear(
            [a, b], [running([0.9, 0.1], name), 0 if "bias" in name else 0.6], normalize=False
        ),
    ),
    "slerp": (
        "merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./b}, {model: ./a}]\n"
        "parameters: {t: [{filter: layer, value: [0.2, 0.5, 1]}, {value: 0.4}]}\n",
        lambda name, base, a, b, c: oracle.slerp(
            a, b, running([0.2, 0.5, 1], name) if "layer" in name else 0.4
        ),
    ),
    "slerp from a base model of each slice": (
        "merge_method: slerp\nbase_model: ./c\nslices:\n"
        "- {base_model: ./a, parameters: {t: [0.1, 0.3]},\n"
        "   sources: [{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [0, 1]}]}\n"
        "- {base_model: ./b,\n"
        "   sources: [{model: ./c, layer_range: [1, 2]}, {model: ./b, layer_range: [1, 2]}]}\n"
        "parameters: {t: 0.8}\n",
        lambda name, base, a, b, c: {
            "embed.weight": lambda: oracle.slerp(a, b, 0.1),
            "layer.0.weight": lambda: oracle.slerp(a, b, 0.3),
            "layer.0.bias": lambda: oracle.slerp(a, b, 0.3),
        }.get(name, lambda: oracle.slerp(b, c, 0.8))(),
    ),
    "nuslerp of models": (
        "merge_method: nuslerp\nmodels:\n- {model: ./a, parameters: {weight: 3}}\n"
        "- {model: ./b, parameters: {weight: [1, 6]}}\n",
        lambda name, base, a, b, c: oracle.slerp(a, b, running([0.25, 2 / 3], name), 1),
    ),
    "multislerp of task vectors": (
        models_of("multislerp", "./a 0.5", "./b 0.3", "./c 0.4", base="./base"),
        lambda name, base, *tasks: base + oracle.multislerp([t - base for t in tasks], [0.5, 0.3, 0.4]),
    ),
    "model stock": (
        models_of("model_stock", "./a", "./b", "./c", base="./base"),
        lambda name, base, *tasks: oracle.model_stock(base, tasks),
    ),
    "slices": (
        SLICED,
        lambda name, base, a, b, c: oracle.added(
            base,
            [a],
            # The first slice has one block, which stands at the end; what is before it stands at the start.
            [{"embed.weight": 0.9, "layer.0.weight": 0.4, "layer.0.bias": 0.4}.get(name, 0.3)],
            scaling=2 if name.startswith(("embed", "layer.0")) else 0.5,
        ),
    ),
}


@pytest.mark.parametrize("case", BY_TENSOR)
def test_numbers_by_name_and_block_are_those_of_mergekit(models, tmp_path, case):
    folder, family = models
    text, expected = BY_TENSOR[case]
    found, _ = merged(folder, text, tmp_path / "merged")
    for name in found.keys() - {"position_ids"}:
        arrays = [family[model][name].double().numpy() for model in ("base", "a", "b", "c")]
        assert np.abs(found[name] - expected(name, *arrays)).max() <= 1e-6, name


def test_rows_of_tokens_that_the_base_model_lacks_are_those_of_mergekit(tmp_path):
    """<end> is row 1007 of `a` and 2007 of `b`, in the mean 1507; <call> is 1006, <user> 2008, <s> 1."""
    test_tokenizers.write_family(tmp_path)
    text = models_of(
        "task_arithmetic", "./a 0.5", "./b 0.25", base="./base", rest="tokenizer_source: union\n"
    )
    merged(tmp_path, text, tmp_path / "merged")
    found = test_tokenizers.rows_of(tmp_path / "merged")
    assert found["<end>"] == 1507 + 0.5 * (1007 - 1507) + 0.25 * (2007 - 1507)
    assert found["<call>"] == 1006 and found["<user>"] == 2008
    assert found["<s>"] == 1 + 0.5 * (1001 - 1) + 0.25 * (2001 - 1)
    # The row of a token that a recipe names counts for the models that lack it.
    rest = "tokenizer:\n  tokens: {<end>: {source: ./b}, <call>: {source: {kind: zero}, force: true}}\n"
    merged(tmp_path, text.replace("tokenizer_source: union\n", rest), tmp_path / "chosen")
    found = test_tokenizers.rows_of(tmp_path / "chosen")
    assert found["<end>"] == 2007 + 0.5 * (1007 - 2007) and found["<call>"] == 0


THREE = {"embed.weight": (6, 4)} | {f"layers.{n}.{part}": (4, 4) for n in range(3) for part in ("in", "out")}
THREE |= {"norm.weight": (4,), "head.weight": (6, 4)}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Models of three blocks of the same shapes."""
    folder = tmp_path_factory.mktemp("deep")
    found = write_family(folder, ("a", "b"), shapes=THREE)
    for name in found:
        config = {"model_type": "test", "num_hidden_layers": 3}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder, found


def of_block(name, number):
    """Return a name of the output in the model that it comes from."""
    start, _, rest = name.partition(".")
    return f"{start}.{number}.{rest.partition('.')[2]}" if start == "layers" else name


def test_blocks_of_several_models_are_stacked(deep, tmp_path):
    folder, family = deep
    text = """\
merge_method: passthrough
slices:
- sources: [{model: ./a, layer_range: [0, 2]}]
- sources: [{model: ./b, layer_range: [1, 3]}]
- sources: [{model: ./a, layer_range: [2, 3]}]
"""
    found, verdict = merged(folder, text, tmp_path / "merged")
    assert verdict == "exact"
    origins = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    names = {f"layers.{n}.{part}" for n in range(5) for part in ("in", "out")}
    assert found.keys() == names | {"embed.weight", "norm.weight", "head.weight", "position_ids"}
    for name, array in found.items():
        model, block = origins[int(name.split(".")[1])] if name in names else ("a", 0)
        assert (array == family[model][of_block(name, block)].double().numpy()).all(), name
    assert json.loads((tmp_path / "merged/config.json").read_text())["num_hidden_layers"] == 5


def test_shifted_blocks_are_merged_and_filters_look_at_names_in_each_model(deep, tmp_path):
    folder, family = deep
    text = """\
merge_method: task_arithmetic
base_model: ./base
slices:
- sources:
  - {model: ./base, layer_range: [0, 2]}
  - model: ./a
    layer_range: [1, 3]
    parameters: {weight: [{filter: s.1.in, value: 0.5}, {value: [0.2, 0.4]}]}
  parameters: {lambda: [{filter: s.1., value: 2}, {value: 3}]}
- sources:
  - {model: ./a, layer_range: [2, 3]}
  - {model: ./base, layer_range: [0, 1]}
parameters: {weight: 0.7}
"""
    found, _ = merged(folder, text, tmp_path / "merged")
    # In the output's block 0 the task's own is 1; parameters of the slice look at the output's names.
    numbers = {
        "embed.weight": (0, 0, 3 * 0.2),
        "layers.0.in": (0, 1, 3 * 0.5),
        "layers.0.out": (0, 1, 3 * 0.2),
        "layers.1.in": (1, 2, 2 * 0.4),
        "layers.1.out": (1, 2, 2 * 0.4),
        "layers.2.in": (0, 2, 0.7),
        "layers.2.out": (0, 2, 0.7),
        "norm.weight": (0, 0, 0.7),
        "head.weight": (0, 0, 0.7),
    }
    for name, (base, own, weight) in numbers.items():
        start, end = (family[m][of_block(name, n)].double().numpy() for m, n in (("base", base), ("a", own)))
        assert np.abs(found[name] - oracle.added(start, [end], [weight])).max() <= 1e-6, name


def test_means_of_a_stack_by_weights_that_differ_in_sum_and_sign(deep, tmp_path):
    folder, family = deep
    text = """\
merge_method: linear
slices:
- sources: [{model: ./base, layer_range: [0, 1], parameters: {weight: 1}},
            {model: ./a, layer_range: [0, 1], parameters: {weight: -0.25}}]
- sources: [{model: ./base, layer_range: [0, 2], parameters: {weight: [1, 0.5]}},
            {model: ./a, layer_range: [0, 2], parameters: {weight: [0.25, 0.5]}}]
"""
    found, _ = merged(folder, text, tmp_path / "merged")
    weights = {"layers.0.": (1, -0.25), "layers.1.": (1, 0.25), "layers.2.": (0.5, 0.5), "embed": (1, -0.25)}
    for name, array in found.items():
        own = of_block(name, max(0, int(name.split(".")[1]) - 1)) if "layers" in name else name
        both = [family[model][own].double().numpy() for model in ("base", "a")]
        wanted = next((w for start, w in weights.items() if name.startswith(start)), (1, 0.25))
        assert np.abs(array - oracle.linear(both, wanted)).max() <= 1e-6, name


def test_copies_are_multiplied_by_name_and_block(deep, tmp_path):
    folder, family = deep
    text = """\
merge_method: passthrough
slices:
- sources: [{model: ./a, layer_range: [0, 2], parameters: {scale: [{filter: out, value: [1, 0.5]}]}}]
- sources:
  - model: ./a
    layer_range: [1, 2]
    parameters: {scale: [{filter: s.1.out, value: 0}, {filter: norm, value: 4}, {value: 1}]}
"""
    found, verdict = merged(folder, text, tmp_path / "merged")
    assert verdict == "rounding"  # of gradients; here it rounds nothing
    factors = {"layers.1.out": 0.5, "layers.2.out": 0, "norm.weight": 4}
    for name, array in found.items():
        own = family["a"][of_block(name, min(1, int(name.split(".")[1])) if "layers" in name else 0)]
        assert (array == factors.get(name, 1) * own.double().numpy()).all(), name
    single = "models: [{model: ./b, parameters: {scale: [{filter: in, value: 0.5}, {value: 1}]}}]\n"
    found, verdict = merged(folder, single + "merge_method: passthrough\n", tmp_path / "single")
    assert verdict == "exact"
    for name, array in found.items():
        assert (array == (0.5 if "in" in name else 1) * family["b"][name].double().numpy()).all(), name
