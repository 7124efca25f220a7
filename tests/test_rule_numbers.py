"""Numbers by rule wherever tensors are merged: adapters, tokens, ties, the Hub, memory, studies."""

import json
import operator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import wilcoxon

from benchmarks import blocks
from hub_magmax.analysis.comparing import comparable, compare, winning_recipe
from hub_magmax.analysis.diagnosing import diagnose
from hub_magmax.analysis.sweeping import sweep, sweepable
from hub_magmax.errors import LockError, RecipeError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.state_dicts import merge_state_dicts
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import describe, explain, notices
from hub_magmax.recipe.blocks import block_of, depths_of
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.matching import check_lock
from hub_magmax.recipe.merge_values import rules_under
from tests import test_adapting, test_ties
from tests.classifiers import classifier_recipe, write_leaning
from tests.families import read_merged, recipe_values, write_checkpoint, write_family, write_recipe
from tests.test_checkpoints_vocabulary import tensors_of, tokenizer
from tests.test_cli import call
from tests.test_in_memory import same

SHAPES = {
    "embed.weight": (6, 4),
    **{f"layer.{block}.{part}": (4, 4) for block in range(4) for part in ("attn", "mlp")},
    "scale": (),
}
RULES = [
    {"match": "*attn", "weights": {"a": {"gradient": [1, 0]}, "b": 1}},
    {"layers": [1, 3], "scaling": {"gradient": [0.2, 0.8], "over": "layers"}},
    {"scaling": {"gradient": [0.5, 1]}},
]


@pytest.fixture
def small(tmp_path):
    write_family(tmp_path, ("a", "b"), shapes=SHAPES)
    return tmp_path


def recipe_of(folder, **changes):
    values = {"names": ("a", "b"), "method": {"name": "average", "scaling": 1.0}, "tensors": RULES}
    return load_recipe(write_recipe(folder, **values | changes))


# Names of real architectures


def names_of(folder, kind, sizes):
    """Return the names that the file of a tiny model has, which may be others than in memory."""
    import transformers

    model, config = (getattr(transformers, name) for name in kind)
    model(config(**sizes)).save_pretrained(folder)
    return list(load_file(folder / "model.safetensors"))


HIDDEN = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
ARCHITECTURES = {
    "t5": (
        ("T5ForConditionalGeneration", "T5Config"),
        {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 3, "num_decoder_layers": 2},
        {"encoder.block": 3, "decoder.block": 2},
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", 2),
    ),
    "clip": (
        ("CLIPModel", "CLIPConfig"),
        {
            "text_config": HIDDEN | {"num_hidden_layers": 3},
            "vision_config": HIDDEN | {"num_hidden_layers": 4, "image_size": 8, "patch_size": 4},
        },
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 4},
        ("vision_model.encoder.layers.3.self_attn.k_proj.weight", 3),
    ),
    "swin": (
        ("SwinModel", "SwinConfig"),
        {"image_size": 16, "embed_dim": 4, "depths": [1, 2], "num_heads": [1, 1], "window_size": 2},
        {"encoder.layers": 2},
        ("encoder.layers.1.blocks.0.attention.self.query.weight", 1),
    ),
    "gpt2": (
        ("GPT2Model", "GPT2Config"),
        {"n_embd": 8, "n_layer": 3, "n_head": 2, "vocab_size": 9},
        {"h": 3},
        ("h.2.attn.c_attn.weight", 2),
    ),
    "vit": (
        ("ViTModel", "ViTConfig"),
        HIDDEN | {"num_hidden_layers": 3, "image_size": 8, "patch_size": 4},
        {"encoder.layer": 3},
        ("encoder.layer.1.attention.attention.query.weight", 1),
    ),
    "mixtral": (
        ("MixtralModel", "MixtralConfig"),
        HIDDEN | {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 5, "vocab_size": 9},
        {"layers": 2},
        ("layers.1.block_sparse_moe.experts.4.w1.weight", 1),
    ),
    "wav2vec2": (
        ("Wav2Vec2Model", "Wav2Vec2Config"),
        HIDDEN | {
            "num_hidden_layers": 2, "conv_dim": [8, 8, 8], "conv_stride": [2, 2, 2], "conv_kernel": [3, 3, 3],
            "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        },
        {"feature_extractor.conv_layers": 3, "encoder.layers": 2},
        ("feature_extractor.conv_layers.2.conv.weight", 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stacks_of_real_architectures_are_told_by_their_names(tmp_path, name):
    kind, sizes, stacks, (tensor, number) = ARCHITECTURES[name]
    names = names_of(tmp_path, kind, sizes)
    assert depths_of(names) == stacks
    assert tensor in names and block_of(tensor).number == number
    assert all(block_of(other) is None for other in names if "embed" in other)


def test_encoder_and_decoder_have_gradients_of_their_own(tmp_path):
    kind, sizes, *_ = ARCHITECTURES["t5"]
    names = names_of(tmp_path, kind, sizes)
    base = {name: torch.zeros(1) for name in names}
    tasks = {"a": {name: torch.ones(1) for name in names}}
    rules = [{"scaling": {"gradient": [0.25, 0.75]}}]
    found = merge_state_dicts(base, tasks, method="average", tensors=rules)
    wanted = {("encoder.block", 0): 0.25, ("encoder.block", 1): 0.5, ("encoder.block", 2): 0.75}
    wanted |= {("decoder.block", 0): 0.25, ("decoder.block", 1): 0.75}
    for name, value in found.items():
        block = block_of(name)
        assert value.item() == (wanted[block[:2]] if block else 0.25), name


# Adapters


ADAPTER_RULES = [
    {"match": "encoder.*", "weights": {"a": 2, "b": {"gradient": [0, 6]}}, "scaling": {"gradient": [0.5, 1]}},
    {"match": "*.1.*.v.*", "scaling": 0.25},
]


@pytest.mark.parametrize("adapters", ["each", "sequence"])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_a_merged_adapter_has_the_numbers_of_each_layer(tmp_path, method, adapters):
    base, _ = test_adapting.write_tasks(tmp_path)
    rules = ADAPTER_RULES
    changes = {"method": method, "tensors": rules, "adapters": adapters}
    adapter = test_adapting.merged_adapter(tmp_path, **changes)
    whole = test_adapting.merged_adapter(tmp_path, output={"format": "weights", "path": "whole"}, **changes)
    test_adapting.assert_close(test_adapting.applied(adapter, base), read_merged(whole))
    plain = test_adapting.merged_adapter(
        tmp_path, output={"format": "weights", "path": "plain"}, **changes | {"tensors": []}
    )
    assert not same(read_merged(whole), read_merged(plain))
    assert describe(plan(test_adapting.recipe_of(tmp_path, **changes)))["rules"][0]["tensors"] > 0


def test_numbers_for_what_no_adapter_changes_are_refused(tmp_path):
    test_adapting.write_tasks(tmp_path)
    recipe = test_adapting.recipe_of(tmp_path, tensors=[{"match": "final*", "scaling": 0.5}])
    with pytest.raises(
        RecipeError, match=r"tensors\.0: the rule 'final\*' covers only tensors that are not merged"
    ):
        plan(recipe)


# Ties and tokens


def test_a_rule_for_a_tied_name_is_told_and_one_for_the_stored_name_counts_for_both(tmp_path):
    make = test_ties.write_family(tmp_path, *[test_ties.STORED_TWICE] * 3)
    with pytest.raises(
        RecipeError, match=r"'lm_head\.weight' is tied to 'model\.embed_tokens\.weight'.*or both"
    ):
        plan(make(tensors=[{"match": test_ties.HEAD, "scaling": 0.5}]))
    rules = [{"match": test_ties.EMBEDDING, "scaling": 0.5}, {"match": test_ties.HEAD, "scaling": 0.25}]
    with pytest.raises(RecipeError, match=r"tensors\.1: 'lm_head\.weight' is tied"):
        plan(make(tensors=rules))
    recipe = make(tensors=[rules[0]])
    merge(plan(recipe))
    found = read_merged(recipe.output_path)
    base, a, b = (read_merged(tmp_path / name)[test_ties.EMBEDDING] for name in ("base", "a", "b"))
    torch.testing.assert_close(found[test_ties.EMBEDDING], base + 0.5 * ((a + b) / 2 - base))
    assert found[test_ties.HEAD].equal(found[test_ties.EMBEDDING])
    told = f"are one parameter, merged once by the numbers of '{test_ties.EMBEDDING}'"
    assert any(told in notice for notice in notices(plan(recipe)))
    assert not any("by the numbers" in notice for notice in notices(plan(make(tensors=[{"scaling": 0.5}]))))


def test_a_new_token_has_the_mean_by_the_weights_of_its_tensor(tmp_path):
    rows = {"base": {"x": 1.0}, "a": {"x": 1.0, "new": 4.0}, "b": {"new": 8.0, "x": 1.0}}
    for name, known in rows.items():
        write_checkpoint(tmp_path / name, tensors_of(known.values()))
        (tmp_path / name / "tokenizer.json").write_text(tokenizer(list(known)))
    changes = {"token_rows": ["embed.*", "head.bias"], "output": {"files_from": "a", "path": "out"}}
    rules = [{"match": "head.*", "weights": {"a": 1, "b": 3}}]
    recipe = recipe_of(tmp_path, method="average", tensors=rules, **changes)
    merge(plan(recipe))
    found = read_merged(tmp_path / "out")
    assert found["head.bias"].tolist() == [1, 7]
    assert found["embed.weight"][:, 0].tolist() == [1, 6]
    with InMemoryMerger(recipe, locked := lock(recipe)) as merger:
        assert same(merger.merge(locked.method, locked.weights).weights(1.0), found)


# Stacks of layers


def test_blocks_of_a_rule_are_those_of_the_output(small):
    (small / "base" / "config.json").write_text(json.dumps({"model_type": "test", "num_hidden_layers": 4}))
    rules = [{"match": "layer.*.mlp", "scaling": {"gradient": [0, 1]}}, {"match": "layer.*", "scaling": 0}]
    recipe = recipe_of(small, tensors=rules, layers=[{"blocks": [0, 3]}, {"blocks": [1, 4]}])
    merge(plan(recipe))
    found, base = read_merged(recipe.output_path), read_merged(small / "base")
    a, b = (read_merged(small / name) for name in "ab")
    for block, own in enumerate((0, 1, 2, 1, 2, 3)):
        name, stored = f"layer.{block}.mlp", f"layer.{own}.mlp"
        expected = base[stored] + block / 5 * ((a[stored] + b[stored]) / 2 - base[stored])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
        assert found[f"layer.{block}.attn"].equal(base[f"layer.{own}.attn"])


def test_a_rule_of_numbers_goes_with_one_that_takes_what_has_no_block(small):
    rules = [{"match": "embed.*", "take": "a"}, {"match": "layer.*", "scaling": 0.5}]
    made = plan(recipe_of(small, tensors=rules))
    assert {job.name: job.source for job in made.jobs}["embed.weight"] == "a"


# Locks, plans and the Hub


def test_locks_hold_the_rules_and_go_with_their_recipe_alone(small):
    recipe = recipe_of(small)
    locked = lock(recipe)
    (small / "lock.json").write_text(locked.to_json())
    again = read_lock(small / "lock.json")
    assert again == locked
    assert json.loads(locked.to_json())["tensors"][1] == {
        "match": "*", "layers": [1, 3], "scaling": {"gradient": [0.2, 0.8], "over": "layers"}
    }  # fmt: skip
    check_lock(recipe, again, "x")
    for changed in (RULES[:2], [*RULES[:2], {"scaling": 0.5}], RULES[::-1]):
        with pytest.raises(LockError, match="tensors"):
            check_lock(recipe_of(small, tensors=changed), again, "x")


def test_rules_that_only_take_are_locked_as_before(small):
    rules = [{"match": "layer.1.*", "take": "a"}, {"match": "layer.*", "layers": [2, 4], "take": "b"}]
    recipe = recipe_of(small, tensors=rules)
    locked = lock(recipe)
    assert locked.tensors == (("layer.1.*", "a"), {"match": "layer.*", "layers": [2, 4], "take": "b"})
    made = plan(recipe, locked)
    assert not made.own_values
    sources = {job.name: job.source for job in made.jobs}
    assert (sources["layer.1.mlp"], sources["layer.2.mlp"], sources["layer.0.mlp"]) == ("a", "b", "merge")


def test_plans_tell_the_first_and_the_last_numbers_of_each_rule(small):
    made = plan(recipe_of(small))
    lines = [" ".join(line.split()) for line in explain(made).splitlines()]
    assert "rules '*attn': 4 tensors, weights a 0.5, b 0.5 … a 0, b 1; 4 sets of numbers" in lines
    assert "'*' in layers [1, 3]: 2 tensors, scaling 0.2 … 0.8" in lines
    assert "'*': 4 tensors, scaling 0.5 … 1" in lines
    rules = describe(made)["rules"]
    assert [rule["rule"] for rule in rules] == [0, 1, 2]
    assert [found["tensor"] for found in rules[1]["values"]] == ["layer.1.mlp", "layer.2.mlp"]
    assert rules[0]["values"][1]["weights"] == pytest.approx({"a": 0.4, "b": 0.6})
    assert rules[2]["values"][0] == {"tensor": "embed.weight", "tensors": 3, "scaling": 0.5}
    assert describe(plan(recipe_of(small, tensors=[])))["rules"] == []


def test_another_number_is_another_merge(small):
    first, second = (plan(recipe_of(small, tensors=[{"scaling": number}])) for number in (0.5, 0.25))
    assert first.digest != second.digest
    merge(first)
    report = json.loads((small / "merged" / "merge_report.json").read_text())
    assert report["plan_digest"] == first.digest
    stored = json.loads((small / "merged" / "provenance.json").read_text())
    internal = stored["predicate"]["buildDefinition"]["internalParameters"]
    assert internal["tensors"] == [{"match": "*", "scaling": 0.5}]


def test_numbers_from_the_command_line_take_their_place(small):
    path = write_recipe(small, names=("a", "b"), method="average", tensors=RULES)
    code, out, _ = call("plan", path, "--set", "tensors.1.scaling=0.125", "--json")
    assert code == 0
    assert json.loads(out)["rules"][1]["values"] == [
        {"tensor": "layer.1.mlp", "tensors": 2, "scaling": 0.125}
    ]
    code, out, _ = call("plan", path, "--set", "tensors=[{match: scale, scaling: 2}]", "--json")
    assert [rule["match"] for rule in json.loads(out)["rules"]] == ["scale"]


def test_models_on_the_hub_are_merged_and_streamed_the_same(small, hub):
    for name in ("base", "a", "b"):
        hub.add_repo(f"me/numbers-{name}", folder=small / name)
    tasks = [{"name": name, "model": f"me/numbers-{name}"} for name in "ab"]
    method = {"name": "ties", "density": 0.4, "scope": "model"}
    here = run(recipe_of(small, method=method, output={"path": "here", "shard_size": "200B"}))
    output = {"path": "there", "shard_size": "200B", "push_to_hub": "me/numbers-merged", "keep": False}
    run(recipe_of(small, method=method, base_model="me/numbers-base", tasks=tasks, output=output))
    stored = {
        path: hub.read("me/numbers-merged", path)
        for path in hub.files("me/numbers-merged") if path.endswith(".safetensors")
    }  # fmt: skip
    (small / "read").mkdir()
    for name, content in stored.items():
        (small / "read" / name).write_bytes(content)
    assert same(read_merged(small / "read"), read_merged(here.output))
    assert rebuild(str(here.output), folder=small).shards == here.report.shards
    assert (
        "Merged by numbers of their own:** tensors that match `*` in the blocks 1 to 2"
        in (here.output / "README.md").read_text()
    )


# Studies


def test_a_diagnosis_counts_quotas_by_the_weights_of_each_tensor(small):
    def lacking(**changes):
        recipe = recipe_of(small, method="tunable_magmax", **changes)
        found = diagnose(plan(recipe))
        return {group.name: group.lacking for group in found.layers}

    fixed = lacking(tensors=[{"match": "layer.1.*", "weights": {"a": 1}}])
    uniform = lacking(tensors=[])
    alone = lacking(tensors=[], preference={"weights": {"a": 1}})
    assert fixed["layer.1"] == alone["layer.1"] != uniform["layer.1"]
    assert fixed["layer.0"] == uniform["layer.0"] != alone["layer.0"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    write_leaning(folder)
    return folder


def study_of(folder, **changes):
    tasks = {"a": {"dataset": "./cats.parquet"}, "b": {"dataset": "./dogs.parquet"}}
    values = classifier_recipe(
        method={"name": "average", "scaling": 1.0},
        evaluation={"tasks": tasks},
        sweep={"walk": "grid", "budget": 3},
        compare={
            "tune": tasks["a"], "report": {"dataset": "./rows.parquet"}, "methods": ["ties", "magmax"],
            "scaling": [1.0],
        },
    )  # fmt: skip
    return parse_recipe(values | changes, folder=folder)


def test_rules_with_weights_keep_them_in_a_sweep_and_the_others_follow(classifiers):
    by_b = study_of(classifiers, tensors=[{"match": "classifier.*", "weights": {"b": 1}}])
    found = sweep(by_b, lock(sweepable(by_b)))
    assert {tuple(score.value for score in point.scores) for point in found.points} == {(0.0, 0.7)}
    plain = study_of(classifiers)
    expected = sweep(plain, lock(sweepable(plain)))
    assert len({tuple(score.value for score in point.scores) for point in expected.points}) > 1
    # The base model and the tasks' own checkpoints are what they are.
    assert [s.value for s in found.base_model] == [s.value for s in expected.base_model]
    assert [s.value for s in found.own] == [s.value for s in expected.own]


def test_a_sweep_that_could_change_nothing_is_refused(classifiers):
    fixed = study_of(classifiers, tensors=[{"weights": {"a": 1, "b": 1}}])
    with pytest.raises(RecipeError, match="every point would be the same model"):
        sweep(fixed, lock(sweepable(fixed)))


def test_a_comparison_counts_the_rules_and_its_winner_can_be_merged(classifiers, tmp_path):
    rules = [
        {"match": "classifier.*", "weights": {"a": 1}},
        {"match": "vit.encoder*", "options": {"density": 0.5}},
        {"scaling": 0.5},
    ]
    asked = study_of(classifiers, method="dare", tensors=rules)
    found = compare(asked, lock(comparable(asked)))
    by_label = {method.label: method for method in found.methods}
    # By the weights of the rule every method that uses the preference says cat.
    assert by_label["ties"].tuned == 0.9
    assert found.base_model.value == 0.1
    won = winning_recipe(asked, found)
    assert [rule.match for rule in won.tensors] == ["classifier.*", "vit.encoder*", "*"]
    plan(won)
    with pytest.raises(RecipeError, match="a comparison tries methods that need shares"):
        refused = study_of(
            classifiers, method="task_arithmetic", tensors=[{"match": "vit*", "coefficients": {"a": 1}}]
        )
        compare(refused, lock(comparable(refused)))


def test_rules_under_another_method_say_what_they_do_there():
    recipe = parse_recipe(
        recipe_values(
            method={"name": "ties", "density": 0.2},
            tensors=[
                {"match": "x", "options": {"density": 0.5}},
                {"match": "y", "weights": {"a": 1}, "scaling": 2},
                {"match": "z", "take": "a"},
            ],
        )
    )
    assert rules_under(recipe.tensors, "ties", {"name": "ties", "scaling": 1.0})[0]["options"] == {
        "density": 0.5
    }
    assert rules_under(recipe.tensors, "ties", {"name": "magmax", "scaling": 0.3}) == [
        {"match": "x", "scaling": 0.3},
        {"match": "y", "scaling": 2.0},
        {"match": "z", "take": "a"},
    ]


def test_auto_scaling_goes_with_options_by_rule(classifiers):
    tasks = study_of(classifiers).evaluation.tasks
    asked = study_of(
        classifiers,
        method={"name": "ties", "scaling": "auto"},
        tensors=[{"match": "vit*", "options": {"density": 0.5}}],
    )
    locked = lock(asked)
    assert locked.chosen and locked.method["name"] == "ties"
    assert plan(asked, locked).values_of("vit.layernorm.weight").options["density"] == 0.5
    assert tasks


# What was measured


def test_the_page_tells_the_stored_numbers_of_the_digits():
    rows = json.loads(blocks.RESULTS.read_text())
    page = (Path(blocks.__file__).parents[1] / "docs" / "tensors.md").read_text(encoding="utf-8")
    for form, (mean, deviation) in blocks.means(rows).items():
        assert f"| {form} | {blocks.FORMS[form][0]} | {mean} ± {deviation} |" in page
    by_seed = {form: [row["accuracy"] for row in rows if row["form"] == form] for form in blocks.FORMS}
    both, one, by_task = (by_seed[form] for form in ("by block and task", "one", "by task"))
    assert len(both) == 10 and {row["tries"] for row in rows} <= {*range(61)}
    assert all(map(operator.gt, both, one))
    assert sum(map(operator.gt, both, by_task)) == 8
    assert "(p = 0.22, Wilcoxon's" in page and round(wilcoxon(both, by_task).pvalue, 2) == 0.22
    lines = np.array([row["numbers"] for row in rows if row["form"] == "line over the blocks"])
    assert (lines[:, 0] > lines[:, 1]).all()
    assert "from {:.2f} in the first of three blocks to −{:.2f} in the last".format(
        *abs(lines.mean(0))
    ) in " ".join(page.split())


@pytest.mark.parametrize("form", blocks.FORMS)
def test_every_form_of_coefficients_can_say_one_number(form):
    size, coefficients_of = blocks.FORMS[form]
    assert (coefficients_of(np.full(size, 0.2)) == 0.2).all()
    assert coefficients_of(np.arange(1.0, 1 + size)).shape == (len(blocks.GROUPS), blocks.NUM_TASKS)
