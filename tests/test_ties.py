"""Tied weights are one parameter, however often a file stores them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.analysis.diagnosing import diagnose
from hub_magmax.errors import MismatchError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.loading import load_recipe
from tests.families import accepted, write_recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
#: How a checkpoint of a tied or untied model may be stored.
STORED_ONCE, STORED_TWICE, TRAINED_APART = "once", "twice", "apart"


def write(folder, seed, stored, config=None):
    generator = torch.Generator().manual_seed(seed)
    start = torch.arange(96, dtype=torch.float32).reshape(12, 8)
    tensors = {
        EMBEDDING: start + torch.randn(12, 8, generator=generator),
        "norm.weight": torch.ones(8) + seed / 100,
    }
    if stored == STORED_TWICE:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    if stored == TRAINED_APART:
        tensors[HEAD] = start + torch.randn(12, 8, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = (UNTIED if stored == TRAINED_APART else TIED) if config is None else config
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **said}, indent=2))


def write_family(folder, *stored, **configs):
    for seed, (name, kind) in enumerate(zip(("base", "a", "b"), stored, strict=True)):
        write(folder / name, seed, kind, configs.get(name))
    tasks = [{"name": name, "model": f"./{name}"} for name in ("a", "b")]
    return lambda **changes: load_recipe(
        write_recipe(folder, **{"tasks": tasks, "preference": None, "method": "average", **changes})
    )


def loaded(folder, name):
    """Return a parameter as a loader has it: a head that is not stored is the embedding."""
    tensors = load_file(folder / "model.safetensors")
    return tensors.get(name, tensors[EMBEDDING])


def says_tied(folder):
    return json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")


KINDS = (STORED_ONCE, STORED_TWICE, TRAINED_APART)


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("b", KINDS)
def test_loaded_output_is_the_merge_of_loaded_sources(tmp_path, base, a, b):
    recipe = write_family(tmp_path, base, a, b)()
    merge(plan(recipe))
    for name in (EMBEDDING, HEAD):
        expected = (loaded(tmp_path / "a", name) + loaded(tmp_path / "b", name)) / 2
        torch.testing.assert_close(loaded(recipe.output_path, name), expected)
    is_apart = TRAINED_APART in (base, a, b)
    stored = HEAD in load_file(recipe.output_path / "model.safetensors")
    assert stored == (is_apart or base == STORED_TWICE)
    assert says_tied(recipe.output_path) is not is_apart
    verify(str(recipe.output_path))
    rebuild(str(recipe.output_path), folder=tmp_path)


@pytest.mark.parametrize("method", ["dare", "tunable_magmax", "ties", "magmax", "breadcrumbs"])
def test_copy_is_the_merged_tensor_to_the_bit(tmp_path, method):
    recipe = write_family(tmp_path, STORED_TWICE, STORED_ONCE, STORED_TWICE)(method=method)
    planned = plan(recipe)
    merge(planned)
    tensors = load_file(recipe.output_path / "model.safetensors")
    assert torch.equal(tensors[HEAD], tensors[EMBEDDING])
    with InMemoryMerger(recipe, planned.lock) as merger:
        found = merger.merge(planned.lock.method, planned.lock.weights).weights(
            planned.lock.method["scaling"]
        )
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_copy_in_another_file_is_the_merged_tensor(tmp_path):
    recipe = write_family(tmp_path, STORED_TWICE, STORED_ONCE, STORED_ONCE)(
        method="dare", output={"path": "out", "shard_size": 400}
    )
    report = merge(plan(recipe))
    assert len(report.shards) > 1
    tensors = {}
    for shard in report.shards:
        tensors |= load_file(recipe.output_path / shard.file)
    assert torch.equal(tensors[HEAD], tensors[EMBEDDING])


def test_parameter_counts_once_where_the_method_looks_at_the_whole_model(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    merged = []
    for folder, base in ((once, STORED_ONCE), (twice, STORED_TWICE)):
        folder.mkdir()
        recipe = write_family(folder, base, STORED_ONCE, STORED_ONCE)(
            method={"name": "tunable_magmax", "scope": "model"}
        )
        merge(plan(recipe))
        merged.append(load_file(recipe.output_path / "model.safetensors")[EMBEDDING])
    assert torch.equal(*merged)


def test_notice_names_the_tie_and_who_trained_it_apart(tmp_path):
    planned = plan(write_family(tmp_path, STORED_ONCE, TRAINED_APART, STORED_ONCE)())
    (tie,) = [line for line in notices(planned) if "tied" in line]
    assert HEAD in tie and "a trained it apart" in tie
    assert any("but for tie_word_embeddings false" in line for line in notices(planned))


def test_key_that_scales_the_head_stays_where_no_source_is_untied(tmp_path):
    t5 = {"model_type": "t5", **TIED}
    recipe = write_family(tmp_path, STORED_ONCE, TRAINED_APART, STORED_ONCE, base=t5, a=t5, b=t5)()
    merge(plan(recipe))
    assert HEAD in load_file(recipe.output_path / "model.safetensors")
    assert says_tied(recipe.output_path) is True


def test_lock_without_ties_has_no_field_for_them(tmp_path):
    recipe = write_family(tmp_path, *[STORED_ONCE] * 3)()
    assert "ties" not in lock(recipe).to_json()


def test_untied_sources_with_heads_that_are_equal_by_chance_stay_untied(tmp_path):
    recipe = write_family(tmp_path, *[STORED_TWICE] * 3, base=UNTIED, a=UNTIED, b=UNTIED)()
    assert "ties" not in lock(recipe).to_json()


def test_head_that_an_untied_task_lacks_is_no_alias(tmp_path):
    recipe = write_family(tmp_path, TRAINED_APART, STORED_ONCE, STORED_ONCE, a=UNTIED)()
    with pytest.raises(MismatchError, match="tie_word_embeddings: true") as error:
        plan(recipe)
    assert "take" not in str(error.value)
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "llama", **TIED}))
    merge(plan(recipe))
    expected = (loaded(tmp_path / "a", HEAD) + loaded(tmp_path / "b", HEAD)) / 2
    torch.testing.assert_close(loaded(recipe.output_path, HEAD), expected)


def test_equal_contents_tie_where_no_configuration_tells(tmp_path):
    configs = {name: {"model_type": "mine"} for name in ("base", "a", "b")}
    recipe = write_family(tmp_path, STORED_TWICE, STORED_ONCE, STORED_TWICE, **configs)()
    merge(plan(recipe))
    tensors = load_file(recipe.output_path / "model.safetensors")
    assert torch.equal(tensors[HEAD], tensors[EMBEDDING])


def test_names_that_tell_nothing_are_tied_by_their_contents(tmp_path):
    recipe = write_family(tmp_path, *[STORED_ONCE] * 3)()
    for name in ("base", "a"):  # b lacks the second name
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "mixer.out": tensors[EMBEDDING].clone()}, file, metadata={"format": "pt"})
    merge(plan(recipe))
    tensors = load_file(recipe.output_path / "model.safetensors")
    assert torch.equal(tensors["mixer.out"], tensors[EMBEDDING])


def test_rule_about_a_tied_name_is_carried_out_and_unties(tmp_path):
    rules = [{"match": HEAD, "take": "base_model"}]
    recipe = write_family(tmp_path, STORED_TWICE, STORED_ONCE, STORED_ONCE)(tensors=rules)
    merge(plan(recipe))
    torch.testing.assert_close(loaded(recipe.output_path, HEAD), loaded(tmp_path / "base", HEAD))
    assert says_tied(recipe.output_path) is False


def test_rule_about_the_embedding_holds_for_its_copy(tmp_path):
    rules = [{"match": EMBEDDING, "take": "a"}]
    recipe = write_family(tmp_path, STORED_TWICE, STORED_ONCE, STORED_ONCE)(tensors=rules)
    merge(accepted(plan(recipe)))
    torch.testing.assert_close(loaded(recipe.output_path, HEAD), loaded(tmp_path / "a", EMBEDDING))
    assert says_tied(recipe.output_path) is True


def test_copy_that_only_a_task_stores_may_be_left_out_by_a_rule(tmp_path):
    rules = [{"match": HEAD, "take": "nothing"}]
    recipe = write_family(tmp_path, STORED_ONCE, STORED_TWICE, STORED_ONCE)(tensors=rules)
    merge(plan(recipe))
    assert HEAD not in load_file(recipe.output_path / "model.safetensors")
    assert says_tied(recipe.output_path) is True


def test_diagnosis_looks_at_a_parameter_once(tmp_path):
    planned = plan(write_family(tmp_path, STORED_TWICE, STORED_ONCE, STORED_ONCE)())
    diagnose(planned)
    assert [job.name for job in planned.merged] == [EMBEDDING, "norm.weight"]


def test_ties_of_checkpoints_on_the_hub_are_published_without_a_folder(tmp_path, hub):
    make = write_family(tmp_path, STORED_ONCE, TRAINED_APART, STORED_TWICE)
    base = hub.add_repo("me/tied-base", folder=tmp_path / "base")
    one = hub.add_repo("me/tied-a", folder=tmp_path / "a")
    recipe = make(
        base_model=f"me/tied-base@{base}",
        tasks=[{"name": "a", "model": f"me/tied-a@{one}"}, {"name": "b", "model": "./b"}],
        method="dare",
        output={"path": "out", "push_to_hub": "me/tied-merged", "keep": False, "shard_size": 400},
    )
    run(recipe)
    assert json.loads(hub.read("me/tied-merged", "config.json"))["tie_word_embeddings"] is False
    verify("me/tied-merged")
    rebuild("me/tied-merged", folder=tmp_path)


def test_copy_follows_rows_that_are_matched_by_token(tmp_path):
    recipe = write_family(tmp_path, STORED_TWICE, STORED_ONCE, STORED_ONCE)(token_rows=[EMBEDDING])
    tokens = {name: [f"t{row}" for row in range(12)] for name in ("base", "a", "b")}
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING].flip(0), torch.ones(2, 8)])
    save_file(tensors, file, metadata={"format": "pt"})
    tokens["a"] = [*reversed(tokens["a"]), "new", "newer"]
    for name, words in tokens.items():
        vocabulary = {"model": {"vocab": {word: row for row, word in enumerate(words)}}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(vocabulary))
    merge(plan(recipe))
    expected = (tensors[EMBEDDING][:12].flip(0) + loaded(tmp_path / "b", EMBEDDING)) / 2
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(loaded(recipe.output_path, name), expected)


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("h.{}.attn.bias", torch.ones(1, 1, 6, 6).tril()),
        ("h.{}.attn.rotary_emb.cos_cached", torch.arange(12.0).reshape(6, 2).cos()),
        ("h.{}.attn.relative_coords_table", torch.arange(18.0).reshape(1, 3, 3, 2)),
        ("h.{}.attn.slopes", torch.arange(8.0).reshape(4, 2)),
    ],
)
def test_buffers_that_are_equal_in_all_layers_are_not_tied(tmp_path, name, buffer):
    """As openai-community/gpt2 stores its masks, and fine-tuned models do not."""
    recipe = write_family(tmp_path, STORED_ONCE, STORED_ONCE, STORED_TWICE)(
        tensors=[{"match": "h.*", "take": "base_model"}]
    )
    file = tmp_path / "base" / "model.safetensors"
    buffers = {name.format(layer): buffer.clone() for layer in range(3)}
    save_file(load_file(file) | buffers, file, metadata={"format": "pt"})
    planned = plan(recipe)
    merge(planned)
    assert not [line for line in notices(planned) if "tied" in line and "h.0" in line]
    assert says_tied(recipe.output_path) is True
    found = load_file(recipe.output_path / "model.safetensors")
    assert all(torch.equal(found[key], buffer) for key in buffers)
