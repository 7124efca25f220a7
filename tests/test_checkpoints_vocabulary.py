"""Rows of embeddings and heads, matched by the token that they stand for."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel

from benchmarks.golden_cases import OF_TWO
from hub_magmax.checkpoints.rows.token_rows import with_settled_rows, with_token_rows
from hub_magmax.checkpoints.rows.vocabulary import read_vocabulary
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.errors import CheckpointError, LockError, MismatchError, RecipeError
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.methods import get_method, method_names
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.matching import check_lock
from tests.families import read_merged, recipe_values, write_checkpoint

NAMES = ("embed.weight", "head.bias")


def tokenizer(tokens, added=()):
    """Return a `tokenizer.json` with these tokens in the rows 0, 1, ..."""
    content = [{"id": len(tokens) + number, "content": token} for number, token in enumerate(added)]
    vocabulary = {token: row for row, token in enumerate(tokens)}
    return json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": content})


def tensors_of(rows, width=2):
    """Return an embedding and a bias with these numbers in their rows, and a matrix without tokens."""
    numbers = torch.tensor([float(number) for number in rows])
    return {
        "embed.weight": numbers[:, None] * torch.arange(1.0, width + 1),
        "head.bias": numbers.clone(),
        "layer.weight": torch.ones(3, 3),
    }


def source(rows, label="x"):
    return MemorySource.from_tensors(tensors_of(rows), label)


def aligned(target="base_model", **checkpoints):
    """Return the sources of checkpoints given as {token: number in its row}."""
    sources = {name: source(rows.values(), name) for name, rows in checkpoints.items()}
    vocabularies = {name: dict(enumerate(rows)) for name, rows in checkpoints.items()}
    return with_token_rows(sources, vocabularies, target, ["embed.*", "head.bias"])


def rows_of(found, name):
    """Return what is in the rows of a checkpoint, after a look at all its tensors."""
    tensors = {
        key: found[name].read(key, 0, info.num_elements).reshape(info.shape)
        for key, info in found[name].index.tensors.items()
    }
    assert tensors["embed.weight"].tolist() == [[number, 2 * number] for number in tensors["head.bias"]]
    assert tensors["layer.weight"].equal(torch.ones(3, 3))
    return tensors["head.bias"].tolist()


def test_rows_come_in_the_order_of_the_vocabulary_that_the_output_gets():
    found = aligned(base_model={"x": 1, "y": 2, "z": 3}, a={"z": 30, "x": 10, "y": 20})
    assert rows_of(found, "base_model") == [1, 2, 3]
    assert rows_of(found, "a") == [10, 20, 30]


def test_token_of_the_base_model_that_a_task_lacks_has_the_base_models_row_there():
    found = aligned(base_model={"x": 1, "y": 2}, a={"y": 20}, b={"x": 10, "y": 30})
    assert rows_of(found, "base_model") == [1, 2]
    assert rows_of(found, "a") == [1, 20]
    assert rows_of(found, "b") == [10, 30]


NEW_TOKEN = {
    "base_model": {"x": 1},
    "a": {"x": 10, "new": 4},
    "b": {"new": 8, "x": 20},
    "c": {"x": 30},
}


def test_token_that_the_base_model_lacks_keeps_its_rows_in_tasks_and_is_their_mean_elsewhere():
    found = aligned("a", **NEW_TOKEN)
    assert rows_of(found, "base_model") == [1, 6]
    assert rows_of(found, "a") == [10, 4]
    assert rows_of(found, "b") == [20, 8]
    assert rows_of(found, "c") == [30, 6]


@pytest.mark.parametrize(
    ("shares", "row"),
    [
        ({"a": 0.25, "b": 0.25, "c": 0.5}, 6),
        ({"a": 0.75, "b": 0.25, "c": 0}, 5),
        ({"a": 0, "b": 1, "c": 0}, 8),
        ({"a": 0, "b": 0, "c": 1}, 6),
    ],
)
def test_token_that_the_base_model_lacks_is_one_row_in_all_checkpoints_that_are_merged(shares, row):
    found = with_settled_rows(aligned("a", **NEW_TOKEN), lambda name: shares, lambda name: True)
    assert [rows_of(found, name)[1] for name in NEW_TOKEN] == [row] * 4
    assert [rows_of(found, name)[0] for name in NEW_TOKEN] == [1, 10, 20, 30]
    copied = with_settled_rows(aligned("a", **NEW_TOKEN), lambda name: shares, lambda name: False)
    assert rows_of(copied, "b") == [20, 8]


def test_row_of_a_new_token_is_one_number_whatever_the_dtypes():
    dtypes = {"base_model": torch.bfloat16, "a": torch.float32, "b": torch.float16}
    rows = {"base_model": [1.0], "a": [1.0, 0.3], "b": [1.0, 0.7]}
    sources = {
        name: MemorySource.from_tensors({"embed.weight": torch.tensor(rows[name], dtype=dtype)[:, None]})
        for name, dtype in dtypes.items()
    }
    known = {name: {row: f"t{row}" for row in range(len(values))} for name, values in rows.items()}
    found = with_settled_rows(
        with_token_rows(sources, known, "a", ["*"]), lambda name: {"a": 0.5, "b": 0.5}, lambda name: True
    )
    values = [float(source.read("embed.weight", 1, 2)) for source in found.values()]
    assert values == [pytest.approx(0.5, abs=1e-3)] * 3
    assert len(set(values)) == 1
    assert float(found["a"].read_stored("embed.weight", 1, 2).tensor) == values[0]


def test_rows_that_the_output_has_no_token_for_are_left_out():
    found = aligned(base_model={"x": 1, "y": 2}, a={"x": 10, "new": 5, "y": 20})
    assert rows_of(found, "a") == [10, 20]


def test_padding_is_known_by_its_number():
    sources = {"base_model": source([1, 2, 7, 7]), "a": source([20, 10, 70])}
    vocabularies = {"base_model": {0: "x", 1: "y"}, "a": {0: "y", 1: "x"}}
    found = with_token_rows(sources, vocabularies, "base_model", ["embed.weight", "head.bias"])
    assert rows_of(found, "a") == [10, 20, 70, 7]


def test_checkpoint_without_a_tokenizer_uses_the_base_models():
    sources = {"base_model": source([1, 2]), "a": source([10, 20]), "b": source([4, 5, 6])}
    vocabularies = {"base_model": {0: "x", 1: "y"}, "a": None, "b": {0: "x", 1: "y", 2: "new"}}
    found = with_token_rows(sources, vocabularies, "b", NAMES)
    assert rows_of(found, "a") == [10, 20, 6]
    with pytest.raises(MismatchError, match=r"3 rows and no tokenizer\.json.*Expected 2 rows"):
        with_token_rows(sources, vocabularies | {"b": None}, "base_model", NAMES)


@settings(deadline=None)
@given(
    st.permutations(range(6)),
    st.integers(0, 6),
    st.integers(1, 3),
    st.lists(st.integers(0, 18), max_size=4),
)
def test_any_piece_is_that_piece_of_the_whole(order, shared, width, cuts):
    own = {f"t{row}": row + 1 for row in order[:shared]}
    base = {f"t{row}": 10 * (row + 1) for row in range(6)}
    sources = {
        "base_model": MemorySource.from_tensors(tensors_of(base.values(), width)),
        "a": MemorySource.from_tensors(tensors_of(own.values() if own else [0], width)),
    }
    vocabularies = {"base_model": dict(enumerate(base)), "a": dict(enumerate(own or ["other"]))}
    found = with_token_rows(sources, vocabularies, "base_model", ["embed.weight"])["a"]
    expected = [own.get(token, base[token]) for token in base]
    total = 6 * width
    places = sorted({0, total, *(cut for cut in cuts if cut < total)})
    pieces = [found.read("embed.weight", one, other) for one, other in itertools.pairwise(places)]
    assert torch.cat(pieces).reshape(6, width)[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tokenizer(["a", "b"], ["<new>"]), {0: "a", 1: "b", 2: "<new>"}),
        ('{"model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", -2]]}}', {0: "a", 1: "b"}),
    ],
)
def test_vocabulary_is_read_from_the_tokenizer(content, expected):
    assert read_vocabulary(content.encode(), "x") == expected


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": [1]}}', '{"model": {"vocab": 3}}'])
def test_tokenizer_that_lists_no_tokens_is_one_sentence(content):
    with pytest.raises(CheckpointError, match="not a tokenizer whose tokens can be listed"):
        read_vocabulary(content.encode(), "x")


@pytest.fixture
def folder(tmp_path):
    """A base model, a task with a token of its own, and a task with another order."""
    for name, rows in {
        "base": {"x": 1, "y": 2},
        "a": {"x": 3, "y": 6, "new": 9},
        "b": {"y": 4, "x": 5},
    }.items():
        write_checkpoint(tmp_path / name, tensors_of(rows.values()))
        (tmp_path / name / "tokenizer.json").write_text(tokenizer(list(rows)))
    return tmp_path


def recipe_of(folder, **changes):
    return parse_recipe(recipe_values(names=("a", "b"), method="average") | changes, folder=folder)


@pytest.mark.parametrize(
    ("files_from", "expected"), [("base_model", [4.0, 5.0]), ("a", [4.0, 5.0, 9.0]), ("b", [5.0, 4.0])]
)
def test_average_is_by_token_in_the_vocabulary_of_the_copied_tokenizer(folder, files_from, expected):
    recipe = recipe_of(folder, token_rows=["embed.weight", "head.*"], output={"files_from": files_from})
    merge(plan(recipe), folder / "out")
    found = read_merged(folder / "out")
    assert found["head.bias"].tolist() == expected
    assert found["embed.weight"][:, 1].tolist() == [2 * number for number in expected]
    copied = (folder / "out" / "tokenizer.json").read_bytes()
    assert copied == (folder / files_from.replace("_model", "") / "tokenizer.json").read_bytes()


def aligned_by_hand(family, target, shares):
    """Return what is merged, written out: {checkpoint: numbers of its rows}, in the target's order."""
    rows = {name: [] for name in family}
    for token in family[target]:
        having = {name: known[token] for name, known in family.items() if token in known}
        total = sum(shares.get(name, 0) for name in having)
        counted = shares if total else dict.fromkeys(having, 1)
        mean = sum(row * counted.get(name, 0) for name, row in having.items()) / (total or len(having))
        for name in family:
            common = family["base"].get(token, mean)
            rows[name].append(having.get(name, common) if token in family["base"] else common)
    return rows


PREFERENCE = {"a": 0.5, "b": 0.125, "c": 0.375}

#: What a method looks at that takes one task: how much a, b and c count for a new token.
PICKED = {"single_task": {"a": 1}, "last_task": {"c": 1}}


@pytest.mark.parametrize(
    "method",
    [name for name in method_names() if name not in OF_TWO and get_method(name).statistics is None],
)
@pytest.mark.parametrize("target", ["base", "a", "c"])
def test_every_method_merges_what_stands_written_out(tmp_path, method, target):
    family = {
        "base": {"x": 1.0, "y": 2.0, "z": -3.0},
        "a": {"z": 3.5, "x": 1.5, "one": 7.0, "both": 4.0},
        "b": {"x": 0.25, "y": 2.5, "both": 8.0},
        "c": {"both": -2.0, "y": 1.0, "x": 1.25, "z": -4.0},
    }
    counted = PREFERENCE if get_method(method).uses_preference else dict.fromkeys("abc", 1)
    shares = PICKED.get(method, counted)
    out = {}
    for kind, rows in (("by token", None), ("by hand", aligned_by_hand(family, target, shares))):
        for name, known in family.items():
            folder = tmp_path / kind / name
            write_checkpoint(folder, tensors_of(known.values() if rows is None else rows[name]))
            (folder / "tokenizer.json").write_text(tokenizer(list(known)))
        values = recipe_values(names=("a", "b", "c"), method=method, preference={"weights": PREFERENCE})
        keys = {"token_rows": list(NAMES), "output": {"files_from": target.replace("base", "base_model")}}
        recipe = parse_recipe(values | (keys if rows is None else {}), folder=tmp_path / kind)
        merge(plan(recipe), tmp_path / kind / "out")
        out[kind] = read_merged(tmp_path / kind / "out")
        with InMemoryMerger(recipe, locked := lock(recipe)) as merger:
            held = merger.merge(locked.method, locked.weights).weights(locked.method["scaling"])
        assert all(held[name].equal(tensor) for name, tensor in out[kind].items())
    assert all(out["by token"][name].equal(tensor) for name, tensor in out["by hand"].items())


def test_rows_that_lie_beside_each_other_are_matched_by_token():
    rows = {"base_model": {"x": 1.0, "y": 2.0}, "a": {"y": 4.0, "new": 9.0, "x": 3.0}}
    sources = {
        name: MemorySource.from_tensors({"final_logits_bias": torch.tensor([[*values.values()]])}, name)
        for name, values in rows.items()
    }
    vocabularies = {name: dict(enumerate(values)) for name, values in rows.items()}
    found = with_token_rows(sources, vocabularies, "base_model", ["final_logits_bias"])["a"]
    assert found.index.tensors["final_logits_bias"].shape == (1, 2)
    assert found.read("final_logits_bias", 0, 2).tolist() == [3, 4]


def test_task_without_a_token_of_the_base_model_alone_gives_its_row(folder):
    recipe = recipe_of(
        folder, method="single_task", token_rows=list(NAMES), preference={"weights": {"a": 0, "b": 1}}
    )
    for name, rows in {
        "a": {"x": 3, "y": 6, "z": 90},
        "b": {"x": 5},
        "base": {"x": 1, "y": 2, "z": 7},
    }.items():
        write_checkpoint(folder / name, tensors_of(rows.values()))
        (folder / name / "tokenizer.json").write_text(tokenizer(list(rows)))
    merge(plan(recipe), folder / "out")
    assert read_merged(folder / "out")["head.bias"].tolist() == [5, 2, 7]


def test_rule_takes_the_rows_of_one_task_as_they_are(folder):
    write_checkpoint(folder / "b", tensors_of([4, 5, 30]))
    (folder / "b" / "tokenizer.json").write_text(tokenizer(["y", "x", "new"]))
    rules = [{"match": "head.bias", "take": "b"}]
    recipe = recipe_of(folder, token_rows=list(NAMES), tensors=rules, output={"files_from": "a"})
    merge(plan(recipe), folder / "out")
    found = read_merged(folder / "out")
    assert found["head.bias"].tolist() == [5, 4, 30]
    assert found["embed.weight"][:, 0].tolist() == [4, 5, (9 + 30) / 2]


def test_rows_are_matched_by_token_from_the_hub(folder, hub):
    for name in ("base", "a", "b"):
        hub.add_repo(f"me/rows-{name}", folder=folder / name)
    tasks = [{"name": name, "model": f"me/rows-{name}"} for name in "ab"]
    output = {"files_from": "a"}
    recipe = recipe_of(folder, base_model="me/rows-base", tasks=tasks, token_rows=list(NAMES), output=output)
    merge(plan(recipe), folder / "out")
    assert read_merged(folder / "out")["head.bias"].tolist() == [4.0, 5.0, 9.0]


def test_token_rows_are_locked(folder):
    recipe = recipe_of(folder, token_rows=list(NAMES))
    locked = lock(recipe)
    assert locked.token_rows == NAMES
    with pytest.raises(LockError, match="token_rows"):
        check_lock(recipe_of(folder), locked, "lock")
    (folder / "b" / "tokenizer.json").write_text(tokenizer(["x", "y"]))
    with pytest.raises(LockError, match=r"\./b: tokenizer\.json changed since"):
        plan(recipe, locked)


@pytest.mark.parametrize(
    ("globs", "error", "reason"),
    [
        (["none.*"], RecipeError, r"token_rows\.0: the glob 'none\.\*' matches no tensor"),
        (["count"], MismatchError, "has no rows of floating point"),
    ],
)
def test_globs_must_name_tensors_with_rows(folder, globs, error, reason):
    write_checkpoint(folder / "base", tensors_of([1, 2]) | {"count": torch.tensor([1, 2])})
    with pytest.raises(error, match=reason):
        plan(recipe_of(folder, token_rows=globs))


@pytest.mark.parametrize("vocabulary", [None, {0: "x"}], ids=["without tokenizer", "with tokenizer"])
def test_a_task_without_axes_where_rows_are_expected_is_named(vocabulary):
    scalar = MemorySource.from_tensors(tensors_of([1]) | {"head.bias": torch.tensor(1.0)}, "./a")
    vocabularies = {"base_model": {0: "x"}, "a": vocabulary}
    with pytest.raises(MismatchError, match=r"^\./a: tensor 'head\.bias' has no rows"):
        with_token_rows({"base_model": source([1]), "a": scalar}, vocabularies, "base_model", ["head.bias"])


def test_tokenizer_of_the_base_model_is_needed(folder):
    (folder / "base" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"\./base: there is no tokenizer\.json"):
        plan(recipe_of(folder, token_rows=list(NAMES)))


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        (Unigram([("u", 0.0), ("a", -1.0), ("b", -2.0), ("a", -3.0)], 0), [], {0: "u", 2: "b", 3: "a"}),
        (WordLevel({"u": 0, "a": 1}, "u"), [(2, "a"), (3, "c")], {0: "u", 1: "a", 3: "c"}),
    ],
)
def test_a_token_with_several_rows_has_the_one_that_the_library_gives_it(model, given, expected):
    values = json.loads(Tokenizer(model).to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    values["added_tokens"] = [{"id": row, "content": token, **flags} for row, token in given]
    content = json.dumps(values)
    found, library = read_vocabulary(content.encode(), "x"), Tokenizer.from_str(content)
    assert found == expected
    known = {
        token: row for row, token in found.items() if token != "c"
    }  # whose row the library counts itself
    assert known == {token: library.token_to_id(token) for token in known}
