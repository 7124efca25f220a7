"""Tokenizers of outputs: their files as transformers loads them, and the rows of their tokens."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hub_magmax.errors import CheckpointError, LockError, RecipeError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.matching import changed_keys
from tests.families import accepted, read_merged, recipe_values
from tests.tiny_llama import CHAT

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = ["<unk>", "<s>", "</s>"]
ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

#: Words that each tokenizer learned, in its order.
WORDS = {"base": ["ba", "be", "bi"], "a": ["bi", "ba", "be"], "b": ["ba", "be", "bi", "bo"]}
#: Tokens that each was given.
GIVEN = {"base": [], "a": ["<call>", "<end>"], "b": ["<end>", "<user>"]}


def by_words(words):
    model = Tokenizer(
        WordLevel({word: row for row, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    )
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model


def by_pieces(words):
    """WordPiece: letters and their endings, and words."""
    letters = [f"{start}{letter}" for start in ("", "##") for letter in "abeio"]
    vocabulary = {word: row for row, word in enumerate([*SPECIAL, *letters, *words])}
    model = Tokenizer(WordPiece(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return model


def by_merges(words):
    """BPE: letters, and one merge per word, in the order of the vocabulary."""
    vocabulary = {word: row for row, word in enumerate([*SPECIAL, *"abeio", *words])}
    model = Tokenizer(BPE(vocabulary, [(word[0], word[1]) for word in words], unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return model


def by_scores(words):
    """Unigram: letters that cost much, and words that cost little."""
    pieces = [(word, 0.0) for word in SPECIAL] + [(letter, -9.0) for letter in "abeio"]
    model = Tokenizer(Unigram(pieces + [(word, -2.0 - row) for row, word in enumerate(words)], unk_id=0))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return model


KINDS = {"words": by_words, "pieces": by_pieces, "merges": by_merges, "scores": by_scores}


def tokenizer(make, words, given=(), **options):
    model = make(words)
    model.add_special_tokens([*SPECIAL])
    found = PreTrainedTokenizerFast(tokenizer_object=model, **ROLES, **options)
    found.add_special_tokens({"additional_special_tokens": [*given]}) if given else None
    return found


def write(folder, name, words, *, seed=0, padding=0, config=None, **tensors):
    """Write a tokenizer, and tensors whose rows tell source and row: 1000 times seed plus the number."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    words.save_pretrained(folder / name)
    rows = len(words) + padding
    numbers = torch.arange(rows, dtype=torch.float32) + 1000 * seed
    found = {EMBEDDING: numbers[:, None].repeat(1, 2), "w": torch.tensor([float(seed)])}
    found = {name: tensor.clone() for name, tensor in {**found, HEAD: -found[EMBEDDING], **tensors}.items()}
    save_file(found, folder / name / "model.safetensors", {"format": "pt"})
    values = {"model_type": "llama", "vocab_size": rows, "tie_word_embeddings": False, **(config or {})}
    (folder / name / "config.json").write_text(json.dumps(values, indent=2))


def write_family(folder, make=by_words, **options):
    found = {name: tokenizer(make, WORDS[name], GIVEN[name], **options) for name in WORDS}
    for seed, (name, words) in enumerate(found.items()):
        write(folder, name, words, seed=seed)
    return found


def recipe_of(folder, wanted, names=("a", "b"), **changes):
    values = {"method": {"name": "average", "scaling": 1}, "output": {"path": "out"}} | changes
    return parse_recipe(recipe_values(names, tokenizer=wanted, **values), folder=folder)


def made(recipe):
    merge(accepted(plan(recipe)))
    verify(str(recipe.output_path))
    rebuild(str(recipe.output_path), folder=recipe.folder)
    return recipe.output_path


def rows_of(folder):
    """Return the number in the row of each token, as the tokenizer of a merged model counts rows."""
    words, tensors = AutoTokenizer.from_pretrained(folder), read_merged(folder)
    assert tensors[EMBEDDING].shape[0] == json.loads((folder / "config.json").read_text())["vocab_size"]
    assert torch.equal(tensors[HEAD], -tensors[EMBEDDING])
    return {token: tensors[EMBEDDING][row, 0].item() for token, row in words.get_vocab().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_union_loads_with_all_tokens_in_the_rows_that_were_written(tmp_path, kind):
    family = write_family(tmp_path, KINDS[kind])
    folder = made(recipe_of(tmp_path, "union"))
    words = AutoTokenizer.from_pretrained(folder)
    known = [*family["base"].get_vocab(), "<call>", "<end>", "bo", "<user>"]
    assert {*words.get_vocab()} == {*known} and len(words) == len(known)
    base = family["base"].get_vocab()
    assert {token: row for token, row in words.get_vocab().items() if token in base} == base
    found = rows_of(folder)
    for token in known:
        rows = [
            1000 * seed + own.get_vocab()[token]
            for seed, own in enumerate(family.values())
            if token in own.get_vocab()
        ]
        if token in base:  # the mean of the tasks' rows, the base model's where a task has none
            tasks = rows[1:] + [rows[0]] * (3 - len(rows))
            assert found[token] == pytest.approx(sum(tasks) / 2)
        else:
            assert found[token] == pytest.approx(sum(rows) / len(rows))
    for token in ("<call>", "<end>", "<user>", "</s>", "ba", "bo"):
        assert words(token, add_special_tokens=False).input_ids == [words.convert_tokens_to_ids(token)]
    assert words.decode(words("<end> ba <user>").input_ids, skip_special_tokens=True).strip() == "ba"
    assert (words.bos_token, words.eos_token, words.unk_token) == ("<s>", "</s>", "<unk>")
    assert {"<call>", "<end>", "<user>"} <= {*words.all_special_tokens}
    text = "be ba <call> bi"
    assert words(text).input_ids[:2] == family["base"](text).input_ids[:2]


def test_merges_of_another_order_are_not_taken_over_and_that_is_told(tmp_path):
    words = {"base": tokenizer(by_merges, ["ba", "be"]), "a": tokenizer(by_merges, ["bo", "ba", "be"])}
    for seed, (name, one) in enumerate(words.items()):
        write(tmp_path, name, one, seed=seed)
    recipe = recipe_of(tmp_path, "union", names=("a",))
    assert "no merge of the tokenizer gives 1 of the tokens, such as 'bo'" in " ".join(notices(plan(recipe)))
    found = AutoTokenizer.from_pretrained(made(recipe))
    assert found.convert_tokens_to_ids("bo") == len(words["base"])
    assert found("bo ba").input_ids == words["base"]("bo ba").input_ids


def test_tokenizers_that_write_text_in_different_ways_have_no_union_of_what_they_learned(tmp_path):
    write(tmp_path, "base", tokenizer(by_words, WORDS["base"]))
    write(tmp_path, "a", tokenizer(by_pieces, WORDS["a"]), seed=1)
    with pytest.raises(
        RecipeError,
        match=r"tokenizer.source: the tokenizers of base_model \(WordLevel.*10 learned tokens more",
    ):
        plan(recipe_of(tmp_path, "union", names=("a",)))
    given = tokenizer(lambda words: Tokenizer(WordPiece(by_words(words).get_vocab())), WORDS["base"], ["<x>"])
    write(tmp_path, "a", given, seed=1)
    assert "<x>" in rows_of(made(recipe_of(tmp_path, "union", names=("a",))))


def test_union_of_equal_vocabularies_changes_no_file_and_no_row(tmp_path):
    for seed, name in enumerate(WORDS):
        write(tmp_path, name, tokenizer(by_words, WORDS["base"]), seed=seed)
    united = made(recipe_of(tmp_path, "union"))
    plain = made(recipe_of(tmp_path, None, output={"path": "plain"}))
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (united / file).read_bytes() == (tmp_path / "base" / file).read_bytes()
    one, two = read_merged(united), read_merged(plain)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_order_of_tasks_decides_rows_and_not_values(tmp_path):
    write_family(tmp_path)
    one = rows_of(made(recipe_of(tmp_path, "union")))
    two = rows_of(made(recipe_of(tmp_path, "union", names=("b", "a"), output={"path": "other"})))
    assert one == pytest.approx(two)


def test_tokens_of_a_named_source_with_the_configuration_of_another(tmp_path):
    family = write_family(tmp_path, model_max_length=77)
    ids = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": None}
    write(tmp_path, "base", family["base"], config=ids)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_k": 5}))
    moved = tokenizer(by_words, ["bi", "ba", "be"], ["<x>"])
    values = json.loads(moved._tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    vocabulary["<s>"], vocabulary["</s>"] = vocabulary["</s>"], vocabulary["<s>"]
    for entry in values["added_tokens"]:
        entry["id"] = vocabulary.get(entry["content"], entry["id"])
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)), **ROLES)
    write(tmp_path, "a", swapped, seed=1, padding=3)
    folder = made(recipe_of(tmp_path, "a"))
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    words, config = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == len(words) == 7  # the rows of no token are left out
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, [1], None)
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 1, "top_k": 5}
    assert words.convert_ids_to_tokens(config["bos_token_id"]) == "<s>"
    assert rows_of(folder)["<s>"] == (1002 + 2001) / 2


def test_configuration_names_no_token_that_the_named_source_lacks(tmp_path):
    """Rows of <x>, <y>: 6, 7 in the base model; <y> is 6 in `a`, which lacks <x>."""
    write_family(tmp_path)
    base, a = tokenizer(by_words, WORDS["base"], ["<x>", "<y>"]), tokenizer(by_words, WORDS["a"], ["<y>"])
    ids = {
        "eos_token_id": [6, 2], "pad_token_id": 6, "text_config": {"image_token_index": 7, "bos_token_id": 1},
        "codebook_pad_token_id": 7, "stop_token_ids": {"x": 6, "y": [7]}, "bad_words_ids": [[7, 6], [7]],
    }  # fmt: skip
    write(tmp_path, "base", base, config=ids)
    write(tmp_path, "a", a, seed=1, config={"eos_token_id": 2})
    generation = {"forced_decoder_ids": [[6, 7], [7, 6]], "suppress_tokens": [-1, 7], "top_k": 7}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    folder = made(recipe_of(tmp_path, "a"))
    found = json.loads((folder / "config.json").read_text())
    assert {key: found[key] for key in ids} == {
        "eos_token_id": 2,  # as `a` states
        "pad_token_id": None,
        "text_config": {"image_token_index": 6, "bos_token_id": 1},
        "codebook_pad_token_id": 7,  # of another vocabulary
        "stop_token_ids": {"y": [6]},
        "bad_words_ids": [[6], [6]],
    }
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "forced_decoder_ids": [[6, 6], [7, None]], "suppress_tokens": [-1, 6], "top_k": 7
    }  # fmt: skip


def test_templates_in_a_folder_come_with_the_named_source(tmp_path):
    write_family(tmp_path)
    place = "additional_chat_templates/tool.jinja"
    (tmp_path / "a" / place).parent.mkdir()
    (tmp_path / "a" / place).write_text(CHAT)
    folder = made(recipe_of(tmp_path, "a"))
    assert (folder / place).read_text() == CHAT


def test_rows_that_the_tokenizer_explains_are_no_sign_of_another_tokenizer(tmp_path):
    write_family(tmp_path)
    rules = [{"match": "w", "take": "a"}]
    told = " ".join(notices(plan(recipe_of(tmp_path, {"pad_to_multiple_of": 32}, tensors=rules))))
    assert "but for vocab_size 32" in told
    assert "its tokenizer is copied" not in told


# Rows that the recipe chooses.


def test_rows_that_are_chosen_worked_by_hand(tmp_path):
    """Base rows are 0 to 5; in `a` <call> is 1006 and <end> 1007, in `b` <end> is 2007 and <user> 2008."""
    write_family(tmp_path)
    wanted = {
        "source": "union",
        "tokens": {
            "<end>": "b",  # for the base model, which lacks it
            "<call>": {"take": "base_model", "token": "ba", "force": True},
            "<user>": "zero",  # for the base model and a; b keeps its own
            "</s>": {"take": "a", "force": True},
            "bo": {"take": "b", "token_id": 4},
        },
    }
    method = {"name": "task_arithmetic", "scaling": 1}
    folder = made(
        recipe_of(tmp_path, wanted, method=method, preference={"coefficients": {"a": 0.5, "b": 0.25}})
    )
    found = rows_of(folder)
    assert found["<end>"] == 2007 + 0.5 * (1007 - 2007)
    assert found["<call>"] == 3
    assert found["<user>"] == 0.25 * 2008
    assert found["</s>"] == 1002
    assert found["bo"] == 2004 + 0.25 * (2006 - 2004)
    assert found["<s>"] == 1 + 0.5 * 1000 + 0.25 * 2000


def test_a_token_that_no_model_has_a_row_of_is_told(tmp_path):
    """Its row would be zeros, though a task seems to have it."""
    write(tmp_path, "base", base := tokenizer(by_words, WORDS["base"]))
    write(tmp_path, "a", base, seed=1)
    longer = tokenizer(by_words, [*WORDS["base"], "more"])
    longer.save_pretrained(tmp_path / "a")
    with pytest.raises(RecipeError, match=r"no model has a row of the token 'more': .* of a has") as found:
        lock(recipe_of(tmp_path, "union", names=("a",)))
    assert found.value.problems[0].key == ("tokenizer",)
    chosen = {"source": "union", "tokens": {"more": {"take": "zero"}}}
    assert rows_of(made(recipe_of(tmp_path, chosen, names=("a",))))["more"] == 0


def test_padding_has_the_mean_of_all_rows_of_each_checkpoint(tmp_path):
    write_family(tmp_path)
    folder = made(recipe_of(tmp_path, {"source": "union", "pad_to_multiple_of": 8}))
    rows = read_merged(folder)[EMBEDDING]
    assert rows.shape[0] == 16 and len(AutoTokenizer.from_pretrained(folder)) == 10
    for row in rows[10:]:
        torch.testing.assert_close(row, rows[:10].mean(0))
    same = made(recipe_of(tmp_path, {"source": "union", "pad_to_multiple_of": 5}, output={"path": "ten"}))
    assert read_merged(same)[EMBEDDING].shape[0] == 10


def test_sources_that_lack_a_token_have_the_mean_of_the_tasks_that_have_it(tmp_path):
    """The row of <end> is 1007 in `a`, 2007 in `b`, and so 1507 in the base model; <user> is in `b` alone."""
    write_family(tmp_path)
    wanted = {"source": "union", "tokens": {"<end>": "mean", "<user>": "mean", "<call>": "mean"}}
    method = {"name": "task_arithmetic", "scaling": 1}
    found = rows_of(
        made(recipe_of(tmp_path, wanted, method=method, preference={"coefficients": {"a": 0.5, "b": -0.25}}))
    )
    assert found["<end>"] == 1507 + 0.5 * (1007 - 1507) - 0.25 * (2007 - 1507)
    assert found["<user>"] == 2008 and found["<call>"] == 1006
    forced = {"source": "union", "tokens": {"<s>": {"take": "mean", "force": True}}}
    assert rows_of(made(recipe_of(tmp_path, forced, output={"path": "forced"})))["<s>"] == 1501


@pytest.mark.parametrize("method", ["average", "ties", "tunable_magmax", "magmax"])
def test_chunks_processes_and_memory_change_no_row(tmp_path, method):
    write_family(tmp_path)
    wanted = {"source": "union", "pad_to_multiple_of": 16, "tokens": {"<end>": "a"}}
    recipe = recipe_of(tmp_path, wanted, method=method)
    planned = accepted(plan(recipe))
    merge(planned, tmp_path / "one", chunk_elements=3)
    merge(planned, tmp_path / "two")
    with InMemoryMerger(recipe, planned.lock) as merger:
        weights = merger.merge(planned.lock.method, planned.lock.weights).weights(
            planned.lock.method["scaling"]
        )
    one, two = read_merged(tmp_path / "one"), read_merged(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) and torch.equal(two[name], weights[name]) for name in two)


def test_merged_language_model_speaks_with_its_tokenizer(tmp_path):
    """A tied Llama: embedding and head are one parameter, and the tokens of all find their rows."""
    for seed, name in enumerate(WORDS):
        words = tokenizer(by_words, WORDS[name], GIVEN[name], chat_template=CHAT)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(words) + 4, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    recipe = recipe_of(tmp_path, {"source": "union", "chat_template": "a"})
    done = run(recipe, in_spite_of=accepted(plan(recipe)).in_spite_of)
    model, words = (
        AutoModelForCausalLM.from_pretrained(done.output),
        AutoTokenizer.from_pretrained(done.output),
    )
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == len(words) == 10
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = words.apply_chat_template([{"role": "user", "content": "ba bo"}], return_tensors="pt")
    assert model(**ids).logits.shape[-1] == 10
    assert changed_keys(recipe, read_lock(done.output / "recipe.lock.json")) == []


# Files beside tokenizer.json.


def test_older_files_get_the_tokens_or_are_left_out(tmp_path):
    family = write_family(tmp_path, by_merges)
    base = tmp_path / "base"
    values = json.loads((base / "tokenizer_config.json").read_text())
    decoder = {str(row): {"content": token, "special": True} for row, token in enumerate(SPECIAL)}
    values |= {"added_tokens_decoder": decoder, "additional_special_tokens": ["<s>"], "chat_template": "old"}
    (base / "tokenizer_config.json").write_text(json.dumps(values))
    (base / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<s>"], **ROLES}))
    (base / "added_tokens.json").write_text(json.dumps({"<s>": 1}))
    (base / "vocab.json").write_text(json.dumps(family["base"].get_vocab()))
    (base / "merges.txt").write_text("#version: 0.2\nb a\nb e\nb i\n")
    for name in "ab":
        (tmp_path / name / "special_tokens_map.json").write_text(
            json.dumps({"additional_special_tokens": [{"content": token} for token in GIVEN[name]]})
        )
    recipe = recipe_of(tmp_path, "union")
    assert "merges.txt and vocab.json know fewer tokens, and are left out" in " ".join(notices(plan(recipe)))
    folder = made(recipe)
    assert not {"vocab.json", "merges.txt"} & {path.name for path in folder.iterdir()}
    found = json.loads((folder / "tokenizer_config.json").read_text())
    words = AutoTokenizer.from_pretrained(folder)
    ids = {token: words.convert_tokens_to_ids(token) for token in ("<call>", "<end>", "<user>")}
    assert {found["added_tokens_decoder"][str(row)]["content"] for row in ids.values()} == {*ids}
    special = json.loads((folder / "special_tokens_map.json").read_text())
    assert special == {"additional_special_tokens": ["<s>", "<call>", "<end>", "<user>"], **ROLES}
    assert json.loads((folder / "added_tokens.json").read_text()) == {"<s>": 1, **ids}


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json", "file", "chatml"]
)
def test_chat_template_of_a_source_a_file_or_by_name(tmp_path, place):
    for seed, name in enumerate(WORDS):
        write(tmp_path, name, tokenizer(by_words, WORDS["base"]), seed=seed)
    base, a = tmp_path / "base", tmp_path / "a"
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "of base"}))
    if place == "chat_template.jinja":
        (a / place).write_text(CHAT)
    elif place == "tokenizer_config.json":
        named = [{"name": "tool", "template": "no"}, {"name": "default", "template": CHAT}]
        (a / place).write_text(json.dumps({**config, "chat_template": named}))
    elif place == "chat_template.json":
        (a / place).write_text(json.dumps({"chat_template": CHAT}))
    (tmp_path / "own.jinja").write_text(CHAT)
    wanted = {"file": "./own.jinja", "chatml": "chatml"}.get(place, "a")
    recipe = recipe_of(tmp_path, {"chat_template": wanted})
    told = " ".join(notices(plan(recipe)))
    assert ("chatml writes '<|im_start|>' and '<|im_end|>', which are no tokens" in told) == (
        place == "chatml"
    )
    assert "chat_template.jinja (added)" not in told  # the recipe says whose the output has
    folder = made(recipe)
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "ba"}], tokenize=False, add_generation_prompt=True
    )
    expected = (
        "<|im_start|>user\nba<|im_end|>\n<|im_start|>assistant\n"
        if place == "chatml"
        else "<|user|>ba\n<|assistant|>"
    )
    assert text == expected
    assert read_merged(folder)[EMBEDDING].shape[0] == 6  # nothing is said of tokens
    if place == "file":  # the lock has its text
        (tmp_path / "own.jinja").unlink()
        rebuild(str(folder), folder=tmp_path)


def test_changed_tokenizer_of_a_task_is_a_changed_lock(tmp_path):
    write_family(tmp_path)
    recipe = recipe_of(tmp_path, "union")
    locked = lock(recipe)
    tokenizer(by_words, WORDS["a"], ["<other>"]).save_pretrained(tmp_path / "a")
    with pytest.raises(LockError, match=r"tokenizer.json changed since the lock was written"):
        plan(recipe, locked)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("unoin", r"tokenizer\.source: there is no 'unoin'.*union"),
        ({"source": "c"}, r"there is no 'c'; the choices are base_model, a, b, union"),
        ({"tokens": {"<end>": "c"}}, r"tokenizer\.tokens\.<end>\.take: there is no 'c'"),
        ({"tokens": {"<end>": {"take": "a", "token": "x", "token_id": 1}}}, r"both say which row it is"),
        ({"tokens": {"<end>": {"take": "zero", "token": "x"}}}, r"a row of zeros is no other token's"),
        ({"tokens": {"<end>": {"take": "mean", "token_id": 1}}}, r"mean of the tasks' rows is no other"),
        ({"tokens": {"<end>": {}}}, r"the key 'take' is required"),
        ({"pad_to_multiple_of": 0}, r"pad_to_multiple_of: 0 should be above 0"),
        ({"chat_template": "llama3"}, r"there is no 'llama3'.*chatml, or the path of a file"),
        ({"sourc": "a"}, r"unknown key 'sourc'"),
        ({"source": "union", "tokens": {"<emd>": "a"}}, r"tokens\.<emd>.*has no token '<emd>'.*<end>"),
        ({"source": "union", "tokens": {"<end>": {"take": "a", "token": "bu"}}}, r"a has no token 'bu'"),
        ({"source": "union", "tokens": {"<end>": {"take": "a", "token_id": 99}}}, r"has no row for '99'"),
        ({"chat_template": "./none.jinja"}, r"none.jinja cannot be read \(No such file"),
        ({"chat_template": "a"}, r"a has no chat template.*chatml"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_with_its_key(tmp_path, wanted, reason):
    write_family(tmp_path)
    with pytest.raises(RecipeError, match=rf"tokenizer(.|\n)*{reason}|{reason}"):
        plan(recipe_of(tmp_path, wanted))


def test_adapters_and_own_bases_have_no_tokenizer(tmp_path):
    write_family(tmp_path)
    with pytest.raises(RecipeError, match=r"tokenizer: an adapter has no rows of tokens"):
        recipe_of(tmp_path, "union", output={"format": "adapter"})
    with pytest.raises(RecipeError, match=r"tasks\.0\.base: rows are matched by token"):
        recipe_of(tmp_path, "union", tasks=[{"name": "a", "model": "./a", "base": "./b"}])


def test_model_without_a_tokenizer_or_without_known_names_is_told(tmp_path):
    write_family(tmp_path)
    for name in WORDS:
        path = tmp_path / name / "model.safetensors"
        tensors = {
            f"x.{key}": value for key, value in zip("abc", read_merged(tmp_path / name).values(), strict=True)
        }
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"no name of a tensor tells.*token_rows: \[GLOB, GLOB\]"):
        lock(recipe_of(tmp_path, "union"))
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"base: there is no tokenizer.json"):
        lock(recipe_of(tmp_path, "union"))
