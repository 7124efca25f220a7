"""Adapters merged into an adapter, against the same recipe's whole weights and against products by hand."""

import itertools
import json
import re

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hub_magmax.analysis.diagnosing import diagnose
from hub_magmax.checkpoints.adapters.adapter import AdapterSource
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.cli import main
from hub_magmax.errors import HubMagmaxError, MismatchError, NonFiniteError, OutputError, RecipeError
from hub_magmax.fleet.canaries import canary
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.budget import peak_memory_bytes
from hub_magmax.planning.summary import explain
from hub_magmax.publishing.preflight import rehearse
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import parse_recipe, updated
from tests.classifiers import write_classifiers
from tests.families import read_merged, recipe_values, write_checkpoint, write_recipe
from tests.test_checkpoints_adapter import FAMILIES, write_adapter, write_base

LLAMA = {
    f"model.layers.{number}.self_attn.{part}_proj.weight": (width, 24)
    for number in (0, 1)
    for part, width in (("q", 24), ("k", 8), ("v", 8), ("o", 24))
}
FAMILIES = {**FAMILIES, "llama": (LLAMA, ("q_proj", "v_proj"))}

_numbers = itertools.count()


def write_tasks(folder, family="t5", names="abc", **options):
    """Write a base model and an adapter per task; return the base's tensors and the factors by task."""
    shapes, targets = FAMILIES[family]
    base, _ = write_base(folder / "base", shapes)
    factors = {
        name: write_adapter(folder / name, base, targets, seed, **options)
        for seed, name in enumerate(names, 1)
    }
    return base, factors


def recipe_of(folder, names="abc", output=None, **changes):
    output = {"format": "adapter", "path": "out", **(output or {})}
    return parse_recipe(
        recipe_values(names, **{"method": "average", "output": output, **changes}), folder=folder
    )


def merged_adapter(folder, names="abc", **changes):
    recipe = recipe_of(folder, names, **changes)
    merge(plan(recipe))
    return recipe.output_path


def applied(folder, base):
    """Return base + product of a written adapter, layer by layer as PEFT computes it, without our reader."""
    config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())
    stored, found = load_file(folder / ADAPTER_NAME), dict(base)
    assert config["target_modules"] == [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in stored
        if name.endswith("lora_A.weight")
    ]
    for module in config["target_modules"]:
        patterns = (key for key in config["rank_pattern"] if re.match(rf"(.*\.)?({key})$", module))
        key = next(patterns, None)
        rank, alpha = (
            config["rank_pattern"].get(key, config["r"]),
            config["alpha_pattern"].get(key, config["lora_alpha"]),
        )
        first, second = (stored[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        assert len(first) == second.shape[1] == rank
        found[f"{module}.weight"] = base[f"{module}.weight"] + alpha / rank * (second @ first)
    return found


def read_back(folder, base_folder):
    """Return all tensors of base + adapter, as this project reads an adapter that is a task."""
    source = AdapterSource(LocalSource(base_folder), LocalSource(folder))
    tensors = source.index.tensors.values()
    return {info.name: source.read(info.name, 0, info.num_elements).reshape(info.shape) for info in tensors}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name].float(), values.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", ["each", "sequence"])
@pytest.mark.parametrize("method", ["average", {"name": "task_arithmetic", "scaling": 0.7}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_product_is_what_the_whole_weights_of_the_same_recipe_add_to_the_base_model(
    tmp_path, family, method, adapters
):
    base, _ = write_tasks(tmp_path, family)
    changes = {"method": method, "adapters": adapters, "preference": {"geometric": {"ratio": 2}}}
    adapter = merged_adapter(tmp_path, **changes)
    whole = merged_adapter(tmp_path, output={"format": "weights", "path": "whole"}, **changes)
    expected = read_merged(whole)
    assert_close(applied(adapter, base), expected)
    assert_close(read_back(adapter, tmp_path / "base"), expected)
    assert any(not expected[name].equal(base[name]) for name in base)


@pytest.mark.parametrize("method", ["average", "tsv"])
@pytest.mark.parametrize("adapters", ["each", "sequence"])
def test_vectors_of_one_length_are_merged_as_whole_weights_are(tmp_path, adapters, method):
    base, _ = write_tasks(tmp_path)
    changes = {"adapters": adapters, "norms": "equal", "preference": {"geometric": {"ratio": 2}}}
    changes["method"] = method
    adapter = merged_adapter(tmp_path, **changes)
    expected = read_merged(merged_adapter(tmp_path, output={"format": "weights", "path": "whole"}, **changes))
    assert_close(applied(adapter, base), expected)
    without = merged_adapter(tmp_path, output={"path": "without"}, **changes | {"norms": None})
    assert not all(torch.equal(value, expected[name]) for name, value in applied(without, base).items())


def test_factors_worked_by_hand(tmp_path):
    write_checkpoint(tmp_path / "base", {"x.q.weight": torch.zeros(2, 2)})
    for name, first, second, alpha in (
        ("a", [1.0, 10.0], [2.0, 3.0], 0.5),
        ("b", [4.0, 0.0], [1.0, 8.0], 2.0),
    ):
        (tmp_path / name).mkdir()
        factors = {"A": torch.tensor([first]), "B": torch.tensor([second]).T.contiguous()}
        stored = {f"base_model.model.x.q.lora_{side}.weight": tensor for side, tensor in factors.items()}
        save_file(stored, tmp_path / name / ADAPTER_NAME)
        (tmp_path / name / ADAPTER_CONFIG_NAME).write_text(json.dumps({"r": 1, "lora_alpha": alpha}))
    method = {"name": "average", "scaling": 2.0}
    preference = {"weights": {"a": 0.25, "b": 0.75}}
    # a: 2 · 0.25 · 0.5 = 0.25, b: 2 · 0.75 · 2 = 3.
    found = load_file(merged_adapter(tmp_path, "ab", method=method, preference=preference) / ADAPTER_NAME)
    assert found["base_model.model.x.q.lora_A.weight"].tolist() == [[1.0, 10.0], [4.0, 0.0]]
    assert found["base_model.model.x.q.lora_B.weight"].tolist() == [[0.5, 3.0], [0.75, 24.0]]
    # In sequence a's product is in both task vectors: 2 · (0.25 + 0.75) · 0.5 = 1.
    output = {"path": "sequence"}
    folder = merged_adapter(
        tmp_path, "ab", method=method, preference=preference, adapters="sequence", output=output
    )
    found = load_file(folder / ADAPTER_NAME)
    assert found["base_model.model.x.q.lora_B.weight"].tolist() == [[2.0, 3.0], [3.0, 24.0]]


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    alphas=st.lists(st.integers(-20, 20), min_size=4, max_size=4),
    weights=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    scaling=st.integers(-8, 8).map(lambda number: number / 4),
    sequence=st.booleans(),
    rslora=st.booleans(),
)
def test_product_is_the_weighted_sum_of_the_products(
    tmp_path_factory, ranks, alphas, weights, scaling, sequence, rslora
):
    folder, names = tmp_path_factory.mktemp("adapters"), "abcd"[: len(ranks)]
    weights = [weight + (not any(weights[: len(names)])) for weight in weights[: len(names)]]
    base = {"x.q.weight": torch.zeros(7, 5)}
    write_checkpoint(folder / "base", base)
    deltas = []
    for name, rank, alpha in zip(names, ranks, alphas, strict=False):
        config = {"lora_alpha": alpha, "use_rslora": rslora}
        factors = write_adapter(folder / name, base, ("q",), rank, rank=rank, config=config)
        scale = alpha / (rank**0.5 if rslora else rank)
        deltas.append(scale * (factors["x.q.weight"][0].double() @ factors["x.q.weight"][1].double()))
    vectors = [*itertools.accumulate(deltas)] if sequence else deltas
    shares = [weight / sum(weights) for weight in weights]
    expected = scaling * sum(share * vector for share, vector in zip(shares, vectors, strict=True))
    changes = {
        "method": {"name": "average", "scaling": scaling},
        "preference": {"weights": dict(zip(names, shares, strict=True))},
        "adapters": "sequence" if sequence else "each",
    }
    try:
        adapter = merged_adapter(folder, names, **changes)
    except RecipeError as error:
        assert "no layer is left" in str(error)
        assert not expected.any()
        return
    found = applied(adapter, base)["x.q.weight"]
    size = max(float(delta.abs().max()) for delta in deltas) * abs(scaling)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * size)


def test_layers_and_ranks_may_differ(tmp_path):
    base, _ = write_base(tmp_path / "base", FAMILIES["t5"][0])
    write_adapter(tmp_path / "a", base, ("q", "v"), 1, rank=2)
    write_adapter(tmp_path / "b", base, ("q", "k"), 2, rank=3, config={"use_rslora": True})
    adapter = merged_adapter(tmp_path, "ab")
    config = json.loads((adapter / ADAPTER_CONFIG_NAME).read_text())
    assert len(config["target_modules"]) == 12
    assert sorted({config["r"], *config["rank_pattern"].values()}) == [2, 3, 5]
    assert config["alpha_pattern"] == config["rank_pattern"]
    expected = read_merged(merged_adapter(tmp_path, "ab", output={"format": "weights", "path": "whole"}))
    assert_close(applied(adapter, base), expected)
    assert_close(read_back(adapter, tmp_path / "base"), expected)


def test_pattern_of_a_layer_is_not_that_of_another_whose_name_ends_alike(tmp_path):
    base = {
        name: torch.randn(6, 6)
        for name in ("layers.0.q.weight", "tower.layers.0.q.weight", "tower.layers.1.q.weight")
    }
    write_checkpoint(tmp_path / "base", base)
    write_adapter(tmp_path / "a", {"layers.0.q.weight": base["layers.0.q.weight"]}, ("q",), 1, rank=1)
    write_adapter(tmp_path / "b", base, ("q",), 2, rank=2)
    adapter = merged_adapter(tmp_path, "ab")
    expected = read_merged(merged_adapter(tmp_path, "ab", output={"format": "weights", "path": "whole"}))
    assert_close(applied(adapter, base), expected)
    assert_close(read_back(adapter, tmp_path / "base"), expected)


def test_embeddings_convolutions_and_transposed_layers_are_read_back(tmp_path):
    base = {
        "embed.weight": torch.randn(30, 8),
        "conv.weight": torch.randn(6, 3, 5, 5),
        "attn.weight": torch.randn(8, 24),  # inputs × outputs
    }
    write_checkpoint(tmp_path / "base", base)
    for rank, name in enumerate("abc", 1):
        stored = {
            "embed.lora_embedding_A": torch.randn(rank, 30),
            "embed.lora_embedding_B": torch.randn(8, rank),
            "conv.lora_A.weight": torch.randn(rank, 3, 5, 5),
            "conv.lora_B.weight": torch.randn(6, rank, 1, 1),
            "attn.lora_A.weight": torch.randn(rank, 8),
            "attn.lora_B.weight": torch.randn(24, rank),
        }
        (tmp_path / name).mkdir()
        save_file({f"base_model.model.{k}": v for k, v in stored.items()}, tmp_path / name / ADAPTER_NAME)
        config = {"r": rank, "lora_alpha": 2, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
        (tmp_path / name / ADAPTER_CONFIG_NAME).write_text(json.dumps(config))
    adapter = merged_adapter(tmp_path)
    expected = read_merged(merged_adapter(tmp_path, output={"format": "weights", "path": "whole"}))
    assert_close(read_back(adapter, tmp_path / "base"), expected)
    config = json.loads((adapter / ADAPTER_CONFIG_NAME).read_text())
    assert (config["fan_in_fan_out"], config["task_type"], config["r"]) == (True, "CAUSAL_LM", 6)
    assert "base_model.model.embed.lora_embedding_A" in load_file(adapter / ADAPTER_NAME)


def test_rules_are_applied_layer_by_layer(tmp_path):
    base, _ = write_tasks(tmp_path)
    rules = [
        {"match": "encoder.block.0.*", "take": "base_model"},
        {"match": "encoder.*", "take": "b"},
        {"match": "*.v.weight", "take": "base_model"},
    ]
    adapter = merged_adapter(tmp_path, tensors=rules, method={"name": "average", "scaling": 0.5})
    whole = {"format": "weights", "path": "whole"}
    expected = read_merged(
        merged_adapter(tmp_path, tensors=rules, method={"name": "average", "scaling": 0.5}, output=whole)
    )
    assert_close(applied(adapter, base), expected)
    ranks = plan(recipe_of(tmp_path, tensors=rules)).ranks
    assert {name: rank for name, rank in ranks.items() if name.startswith("encoder")} == {
        f"encoder.block.1.layer.0.SelfAttention.{part}": 4 for part in "qv"
    }
    assert len(ranks) == 4 and set(ranks.values()) == {4, 12}


def test_task_without_weight_takes_no_rank(tmp_path):
    write_tasks(tmp_path)
    preference = {"weights": {"a": 0.5, "c": 0.5}}
    assert set(plan(recipe_of(tmp_path, preference=preference)).ranks.values()) == {8}
    # In sequence the last task's vector holds the products of all.
    in_sequence = recipe_of(tmp_path, preference={"weights": {"c": 1.0}}, adapters="sequence")
    assert set(plan(in_sequence).ranks.values()) == {12}


def test_head_that_an_adapter_holds_can_be_left_out(tmp_path):
    extra = {
        "base_model.model.classifier.weight": torch.ones(3, 24),
        "base_model.model.final.bias": torch.ones(24),
    }
    base, _ = write_tasks(tmp_path, extra=extra)
    with pytest.raises(
        RecipeError, match=r"a, adapter_model.safetensors: the adapter holds 'classifier.weight'"
    ) as caught:
        plan(recipe_of(tmp_path))
    assert "take: nothing" in caught.value.hint
    rules = [{"match": "classifier.*", "take": "nothing"}, {"match": "final.bias", "take": "base_model"}]
    expected = merged_adapter(tmp_path, tensors=rules, output={"format": "weights", "path": "whole"})
    assert_close(applied(merged_adapter(tmp_path, tensors=rules), base), read_merged(expected))


@pytest.mark.parametrize("method", ["ties", "magmax", "tunable_magmax", "single_task", "agreement"])
def test_method_that_is_not_linear_is_refused_with_those_that_are(tmp_path, method):
    with pytest.raises(
        RecipeError, match=rf"method\.name: {method} is not linear.* average, task_arithmetic;"
    ):
        recipe_of(tmp_path, method=method)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "auto", "compare": {"tune": {"dataset": "x"}}}, r"compare\.methods\.0: agreement is not"),
        ({"token_rows": ["shared.weight"]}, "token_rows: an adapter has no rows of tokens"),
        ({"output": {"format": "lora"}}, r"output\.format: 'lora' should be 'weights', 'adapter' or 'sel"),
    ],
    ids=str,
)
def test_what_no_adapter_can_hold_is_refused_with_the_recipe(tmp_path, changes, reason):
    with pytest.raises(RecipeError, match=reason):
        recipe_of(tmp_path, **changes)


def test_comparison_of_linear_methods_is_allowed(tmp_path):
    compare = {"tune": {"dataset": "x"}, "methods": ["average", "task_arithmetic"]}
    assert recipe_of(tmp_path, method="auto", compare=compare).output.is_adapter


def test_method_of_another_package_is_not_looked_for(tmp_path):
    with pytest.raises(RecipeError, match="there is no merge method 'averag'"):
        recipe_of(tmp_path, method="averag")


def _whole_task(folder, base):
    write_checkpoint(folder / "b", base)


def _other_class(folder, base):
    renamed = {f"model.{name}": tensor for name, tensor in base.items()}
    write_adapter(folder / "b", renamed, ("q_proj",), 2)


def _transposed(folder, base):
    square = {name: tensor for name, tensor in base.items() if tensor.shape == (24, 24)}
    write_adapter(folder / "b", square, ("q_proj",), 2, config={"fan_in_fan_out": True})


def _head_beneath(folder, base):
    extra = {
        "base_model.model.shared.base_layer.weight": base["shared.weight"],
        "base_model.model.shared.lora_embedding_A": torch.ones(4, 40),
        "base_model.model.shared.lora_embedding_B": torch.ones(24, 4),
    }
    write_adapter(folder / "b", base, ("q_proj",), 2, extra=extra)


@pytest.mark.parametrize(
    ("write", "rules", "error", "reason"),
    [
        (_whole_task, [], RecipeError, r"output\.format: b is a whole checkpoint\. Expected LoRA adapters"),
        (_other_class, [], MismatchError, r"^\./b: '.*' is changed by 'base_model.model.model.*as in \./a"),
        (_transposed, [], MismatchError, r"^\./b: `fan_in_fan_out` is true\. Expected the same as in \./a"),
        (_head_beneath, [], RecipeError, r"holds 'shared.weight' whole.*save_embedding_layers=False"),
        (None, [{"match": "shared.*", "take": "nothing"}], RecipeError, r"leaves out 'shared.weight'"),
        (None, [{"match": "*", "take": "base_model"}], RecipeError, "no layer is left to be adapted"),
        (None, [{"match": "sharde.*", "take": "a"}], RecipeError, r"the glob 'sharde.\*' matches no tensor"),
    ],
)  # fmt: skip
def test_adapters_that_make_no_adapter_are_refused(tmp_path, write, rules, error, reason):
    base, _ = write_tasks(tmp_path, "clip", "a" if write else "ab")
    if write:
        write(tmp_path, base)
    recipe = recipe_of(tmp_path, "ab", tensors=rules)
    with pytest.raises(error, match=reason) as caught:
        plan(recipe)
    assert caught.value.where
    with pytest.raises(error):
        run(recipe)
    assert not recipe.output_path.exists()


def test_lock_of_whole_checkpoints_does_not_become_an_adapter(tmp_path):
    base, _ = write_tasks(tmp_path, names="a")
    write_checkpoint(tmp_path / "b", base)
    locked = lock(recipe_of(tmp_path, "ab", output={"format": "weights"}))
    with pytest.raises(RecipeError, match="b is a whole checkpoint"):
        plan(recipe_of(tmp_path, "ab"), locked)


@pytest.mark.parametrize("kind", [MismatchError, RecipeError])
def test_every_refusal_is_an_error_of_ours(kind):
    assert issubclass(kind, HubMagmaxError)


def test_nan_in_a_factor_is_named_and_nothing_appears(tmp_path):
    write_tasks(tmp_path)
    stored = load_file(tmp_path / "b" / ADAPTER_NAME)
    name = min(stored)
    stored[name][1, 2] = torch.nan
    save_file(stored, tmp_path / "b" / ADAPTER_NAME)
    recipe = recipe_of(tmp_path)
    with pytest.raises(NonFiniteError, match=rf"tensor '{re.escape(name)}'.*element 26 is nan"):
        merge(plan(recipe))
    assert not recipe.output_path.exists()


def test_factor_that_the_dtype_cannot_hold_is_refused(tmp_path):
    write_tasks(tmp_path)
    method = {"name": "average", "scaling": 1e6}
    with pytest.raises(NonFiniteError, match="numbers that float16 can hold"):
        merge(plan(recipe_of(tmp_path, method=method, output={"dtype": "float16"})))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_factors_have_the_dtype_that_was_asked_for(tmp_path, dtype):
    write_tasks(tmp_path)
    stored = load_file(merged_adapter(tmp_path, output={"dtype": dtype}) / ADAPTER_NAME)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}


def test_bytes_are_the_same_whatever_the_number_of_threads(tmp_path):
    write_tasks(tmp_path)
    threads, hashes = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            recipe = recipe_of(tmp_path, output={"path": f"out{number}"})
            hashes.add(merge(plan(recipe)).shards[0].sha256)
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1


def test_plan_tells_what_is_read_and_written(tmp_path):
    write_tasks(tmp_path)
    planned = plan(recipe_of(tmp_path))
    (shard,) = planned.shards
    report = merge(planned)
    written = load_file(tmp_path / "out" / ADAPTER_NAME)
    sizes = {
        name: sum(t.nbytes for t in load_file(tmp_path / name / ADAPTER_NAME).values()) for name in "abc"
    }
    assert planned.bytes_in == sum(sizes.values())
    assert planned.bytes_out == shard.data_bytes == sum(tensor.nbytes for tensor in written.values())
    assert report.elements_merged == sum(tensor.numel() for tensor in written.values())
    assert report.bytes_out == (tmp_path / "out" / ADAPTER_NAME).stat().st_size
    assert not planned.tensors_read(planned.jobs)["base_model"]
    assert "adapter      8 layers, rank 12" in explain(planned)
    assert 180e6 < peak_memory_bytes(planned) < 181e6
    assert plan(recipe_of(tmp_path, output={"format": "weights"})).digest != planned.digest


def test_the_same_merge_again_is_the_stored_one_and_nothing_is_overwritten(tmp_path):
    write_tasks(tmp_path)
    recipe = recipe_of(tmp_path)
    first = merge(plan(recipe))
    assert merge(plan(recipe)) == first
    with pytest.raises(OutputError, match="already holds a model"):
        merge(plan(updated(recipe, {"method": {"name": "average", "scaling": 0.5}})))


def test_folder_is_verified_rebuilt_and_described(tmp_path):
    write_tasks(tmp_path)
    run(recipe_of(tmp_path))
    folder = tmp_path / "out"
    hashes = verify(str(folder))
    assert "config.json" not in hashes  # or transformers would look for whole weights beside it
    assert {ADAPTER_NAME, ADAPTER_CONFIG_NAME, "recipe.yaml", "recipe.lock.json", "provenance.json"} <= set(
        hashes
    )
    assert rebuild(str(folder), folder=tmp_path).shards[0].sha256 == hashes[ADAPTER_NAME]
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert (
        'base = AutoModel.from_pretrained("./base")\nmodel = PeftModel.from_pretrained(base, "out")' in card
    )
    assert "nothing is approximated" in card
    statement = json.loads((folder / "provenance.json").read_text())
    assert [subject["name"] for subject in statement["subject"]] == [ADAPTER_NAME]
    (folder / ADAPTER_CONFIG_NAME).write_text("{}")
    with pytest.raises(OutputError, match=r"adapter_config\.json: sha256 is"):
        verify(str(folder))


def test_dry_run_and_command_line(tmp_path):
    write_tasks(tmp_path)
    findings = rehearse(plan(recipe_of(tmp_path)), None)
    assert not any(finding.error for finding in findings)
    path = write_recipe(tmp_path, method="average", output={"format": "adapter", "path": "out"})
    for verb in (["plan", path], ["run", path], ["verify", tmp_path / "out"]):
        result = CliRunner().invoke(main, [str(argument) for argument in verb])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("keep", [True, False], ids=["folder", "straight"])
def test_adapter_is_pushed_and_takes_the_place_of_weights(hub, tmp_path, keep):
    number = next(_numbers)
    repo, prefix = f"me/merged-adapter{number}", f"me/adapting{number}"
    base, _ = write_tasks(tmp_path)
    base["head.weight"] = torch.randn(1000, 1000)  # which is not read
    write_checkpoint(tmp_path / "base", base)
    for name in ("base", "a", "b", "c"):
        hub.add_repo(f"{prefix}-{name}", folder=tmp_path / name)
    tasks = [{"name": name, "model": f"{prefix}-{name}"} for name in "abc"]
    output = {"push_to_hub": repo, "keep": keep}
    recipe = recipe_of(tmp_path, base_model=f"{prefix}-base", tasks=tasks, output=output)
    hub.add_repo(repo, files={"model.safetensors": b"old", "notes.md": b"mine"})
    hub.reset_log()
    done = run(recipe)
    whole = (tmp_path / "base" / "model.safetensors").stat().st_size
    sent = sum(e.bytes_sent for e in hub.log if e.route == "storage" and e.method == "GET")
    assert sent < sum((tmp_path / name / ADAPTER_NAME).stat().st_size for name in "abc") + whole / 2
    assert done.published.commit == hub.head(repo)
    assert [name for name in hub.files(repo) if "safetensors" in name] == [ADAPTER_NAME]
    config = json.loads(hub.read(repo, ADAPTER_CONFIG_NAME))
    pinned = done.plan.lock.base_model.commit
    assert (config["base_model_name_or_path"], config["revision"]) == (f"{prefix}-base", pinned)
    card = hub.read(repo, "README.md").decode()
    front = card.split("---\n")[1]
    assert f"base_model:\n- {prefix}-base\nlibrary_name: peft\n" in front
    assert "\nbase_model_relation: adapter\n" in front
    assert f'base = AutoModel.from_pretrained("{prefix}-base", revision="{pinned}")' in card
    assert verify(repo)[ADAPTER_NAME] == done.report.shards[0].sha256
    rebuild(repo)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / ADAPTER_NAME).write_bytes(hub.read(repo, ADAPTER_NAME))
    (tmp_path / "again" / ADAPTER_CONFIG_NAME).write_bytes(hub.read(repo, ADAPTER_CONFIG_NAME))
    expected = merged_adapter(tmp_path, output={"format": "weights", "path": "whole"})
    assert_close(applied(tmp_path / "again", base), read_merged(expected))
    # Whole weights, pushed over it, are not taken for an adapter.
    push(tmp_path / "whole", repo)
    assert ADAPTER_CONFIG_NAME not in hub.files(repo)
    assert "model.safetensors" in verify(repo)


def test_merging_in_memory_and_a_diagnosis_see_the_checkpoints(tmp_path):
    write_tasks(tmp_path)
    recipe = recipe_of(tmp_path)
    locked = lock(recipe)
    with InMemoryMerger(recipe, locked) as bench:
        found = bench.merge({"name": "average"}, (1 / 3,) * 3).weights(1.0)
    expected = read_merged(merged_adapter(tmp_path, output={"format": "weights", "path": "whole"}))
    assert all(found[name].equal(expected[name]) for name in expected)
    assert diagnose(plan(recipe, locked)).table() != ""


def write_classifiers_with_adapters(folder):
    """Write a classifier and two adapters of its attention; return the recipe's evaluation."""
    write_classifiers(folder, {"base": (0.3, 0.2, 0.1)})
    base = load_file(folder / "base" / "model.safetensors")
    base["classifier.weight"] = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    queries = {name: tensor for name, tensor in base.items() if "attention" in name and tensor.ndim == 2}
    targets = {name.removesuffix(".weight").rpartition(".")[2] for name in queries}
    for seed, name in enumerate("ab", 1):
        write_adapter(folder / name, queries, targets, seed)
    tasks = {name: {"dataset": "./rows.parquet", "split": "train"} for name in "ab"}
    return {"evaluator": "image-classification", "tasks": tasks, "quantized": ["int4"]}


def test_merged_adapter_is_scored_on_its_base_model(tmp_path):
    evaluation = write_classifiers_with_adapters(tmp_path)
    found = {}
    for kind in ("adapter", "weights"):
        output = {"format": kind, "path": kind}
        found[kind] = run(recipe_of(tmp_path, "ab", output=output, evaluation=evaluation)).scores
    assert {score.model for score in found["adapter"].scores} == {
        "base_model",
        "a",
        "b",
        "merged",
        "merged:int4",
    }
    for one, other in zip(found["adapter"].scores, found["weights"].scores, strict=True):
        assert (one.model, one.task, one.outcomes) == (other.model, other.task, other.outcomes)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert (
        found["adapter"].get("merged", "a").probabilities
        != found["adapter"].get("base_model", "a").probabilities
    )
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'base = AutoModelForImageClassification.from_pretrained("./base")' in card
    assert 'processor = AutoImageProcessor.from_pretrained("./base")' in card
    assert not canary(str(tmp_path / "adapter"), folder=tmp_path).regressed


def test_merged_adapter_is_scored_on_the_hub(hub, tmp_path):
    evaluation = write_classifiers_with_adapters(tmp_path)
    repo = f"me/scored-adapter{next(_numbers)}"
    run(recipe_of(tmp_path, "ab", output={"push_to_hub": repo}, evaluation=evaluation))
    found = canary(repo, folder=tmp_path)
    assert not found.regressed
    assert [task.now for task in found.tasks] == [task.before for task in found.tasks]


def test_merged_adapter_fits_a_base_model_that_was_saved_from_within_a_wrapper(tmp_path):
    plain, _ = write_base(tmp_path / "plain", {f"layers.{n}.q_proj.weight": (24, 24) for n in range(2)})
    write_checkpoint(tmp_path / "base", {f"_orig_mod.{name}": value for name, value in plain.items()})
    for seed, name in enumerate("ab"):
        # Trained on the model within another, so that the lock holds where the layers lie.
        inner = {f"encoder.{layer}": value for layer, value in plain.items()}
        write_adapter(tmp_path / name, inner, ["q_proj"], seed)
    found = []
    for number, base in enumerate(("./plain", "./base")):
        output = {"format": "adapter", "path": f"out{number}"}
        recipe = parse_recipe(
            recipe_values(names=("a", "b"), base_model=base, method="average", output=output), folder=tmp_path
        )
        merge(plan(recipe), tmp_path / f"out{number}")
        found.append(load_file(tmp_path / f"out{number}" / ADAPTER_NAME))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
