"""Configurations of mergekit read line by line: structure, levels, verdicts."""

import json
from pathlib import Path

import pytest
import yaml

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.importing.mergekit_files import shown_in_card
from hub_magmax.recipe.importing.model_facts import ModelFacts
from hub_magmax.recipe.importing.other_tools import import_text
from hub_magmax.recipe.loading import parse_recipe
from tests.test_cli import call

NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{n}.{part}"
        for n in range(4)
        for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight")
    ),
    "model.norm.weight",
    "lm_head.weight",
]
SIX = ModelFacts(dict.fromkeys(NAMES, "F32"), dict.fromkeys(NAMES, 6), 4)


class Known:
    """Checkpoints of four blocks in float32, but those that are named otherwise."""

    def __init__(self, **others):
        self.others = others

    def facts(self, place):
        return self.others.get(place.plain.path, SIX)

    def written(self, place):
        return place.written


class Unseen(Known):
    """Checkpoints that cannot be read."""

    def facts(self, place):
        return None


def imported(text, models=None, without=()):
    return import_text(text, "mix.yml", models or Known(), without=without)


def verdicts(text, **facts):
    """Return {line: verdicts on it}."""
    found = {}
    for finding in imported(text, Known(**facts)).findings:
        found.setdefault(finding.line, set()).add(finding.verdict)
    return found


def recipe_of(text, models=None):
    found = imported(text, models)
    assert found.recipe is not None, [f for f in found.findings if f.is_lost]
    parse_recipe(dict(found.recipe))
    return found.recipe


def models_of(method, *models, base="", rest=""):
    """Return a configuration of `NAME weight` entries."""
    lines = [f"merge_method: {method}", *([f"base_model: {base}"] if base else []), "models:"]
    for model in models:
        name, *weight = model.split()
        lines.append(f"  - model: {name}")
        lines += [f"    parameters: {{weight: {weight[0]}}}"] if weight else []
    return "\n".join(lines) + f"\n{rest}"


def test_a_mean_counts_the_base_model_in_the_scaling():
    # (0.4 base + 1 a + 0.6 b) / 2 = base + 0.8 (0.625 τ_a + 0.375 τ_b)
    values = recipe_of(models_of("linear", "o 0.4", "a 1", "b 0.6", base="o", rest="dtype: bfloat16\n"))
    assert values["method"] == {"name": "average", "scaling": 0.8}
    assert values["preference"] == {"weights": {"a": 0.625, "b": 0.375}}
    assert values["output"]["dtype"] == "bfloat16"


def test_weights_of_a_sum_become_coefficients():
    values = recipe_of(
        models_of("task_arithmetic", "a@v1 0.8", "b -0.5", base="o", rest="parameters: {lambda: 0.7}")
    )
    assert values["tasks"] == [{"name": "a", "model": "a@v1"}, {"name": "b", "model": "b"}]
    assert values["method"] == {"name": "task_arithmetic", "scaling": 0.7}
    assert values["preference"] == {"coefficients": {"a": 0.8, "b": -0.5}}


def test_adapters_on_one_model_are_tasks_over_it():
    values = recipe_of(models_of("linear", "me/o+lora/a 1", "me/o+lora/b@v2 3"))
    assert values["base_model"] == "me/o"
    assert [task["model"] for task in values["tasks"]] == ["lora/a", "lora/b@v2"]
    assert values["preference"] == {"weights": {"a": 0.25, "b": 0.75}}


def test_an_adapter_on_another_model_is_two_tasks_of_a_sum_and_nothing_elsewhere():
    text = models_of("task_arithmetic", "o+l 0.5", "a+l 0.25", base="o")
    assert recipe_of(text)["preference"] == {"coefficients": {"l": 0.75, "a": 0.25}}
    assert verdicts(text.replace("task_arithmetic", "ties"))[6] >= {"not representable"}


def test_a_single_model_is_copied():
    values = recipe_of("models: [{model: a}]\nmerge_method: passthrough\n")
    assert values["base_model"] == "a" and values["tensors"] == [{"match": "*", "take": "base_model"}]
    assert imported("models: [{model: a}]\nmerge_method: passthrough\n").verdict == "exact"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("merge_method: slrp\nmodels: []\n", 1, "slerp"),
        ("models: [{model: a}]\n", 1, "no merge_method"),
        ("merge_method: linear\nmodels: [{model: a}]\nslices: [{}]\n", 3, "exclude each other"),
        ("merge_method: linear\nmodels:\n  - {parameters: {weight: 1}}\n", 3, "no model is named"),
        ("merge_method: linear\nmodels:\n  - {model: a+b+c}\n", 3, "one plus sign at most"),
        ("merge_method: linear\nmodels:\n  - {model: a}\n", 3, "no weight, which linear needs"),
        ("merge_method: ties\nmodels:\n  - {model: a}\n", 1, "needs a base_model"),
        (models_of("linear", "a 0.6", "b -0.1", rest="parameters: {normalize: false}\n"), 6, "below 0"),
        (models_of("linear", "a 1", "b -1"), 1, "NaN"),
        (models_of("ties", "a 1", base="o", rest="dtype: bf16\n"), 6, "no dtype"),
        (models_of("ties", "a 1", base="o", rest="parameters: {density: [0, 1]}\n"), 6, "0 in some blocks"),
        (models_of("ties", "a high", base="o"), 5, "no number"),
        (models_of("ties", "a", base="o", rest="parameters: {weight: }\n"), 5, "nothing is written"),
        (models_of("ties", "a 1", base="o", rest="parameters: {t: [{filter: x}]}\n"), 6, "no value"),
        (
            models_of("ties", "a 1", base="o", rest="parameters: {density: {filter: 2, value: 1}}\n"),
            6,
            "one text",
        ),
        (models_of("multislerp", "a 1", "b 1", rest="parameters: {eps: 0.001}\n"), 7, "up to 1e-8"),
        (models_of("sce", "a", base="o", rest="parameters: {select_topk: 0}\n"), 5, "above 0"),
        (models_of("linear", "a 1", rest="chat_template: [x]\n"), 5, "the name or the text"),
        ("merge_method: linear\nmodules:\n  text: {models: [{model: a}]}\n", 3, "parts of a model"),
    ],
)
def test_what_has_no_counterpart_is_named_at_its_line(text, line, word):
    found = imported(text)
    assert found.recipe is None and found.verdict == "not representable"
    (why,) = {f.why for f in found.findings if f.is_lost and f.line == line}
    assert word in why


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("name: one\nmerge_method: linear\n---\nmerge_method: linear\nmodels:\n  - model: one\n", {1, 4, 6}),
        ("experts: []\ngate_mode: hidden\nbase_model: a\n", {1, 2}),
        ("genome: {models: [a]}\ntasks: []\n", {1}),
        ("layer_slices: []\n", {1}),
        (models_of("linear", "a/model.safetensors 1"), {3}),
    ],
)
def test_files_of_other_programs_are_refused(text, lines):
    found = imported(text)
    assert found.recipe is None and found.verdict == "refused"
    assert {f.line for f in found.findings if f.verdict == "refused"} == lines


SLIPS = """\
merge_method: ties
base_model: o
models:
  - model: o
    parameters: {weight: 9}
  - model: a
    weight: 0.5
    parameters:
      weight: 1
      normalize: false
      densty: 0.1
      gamma: 0.2
normalize: false
parameters:
  density: 0.5
  density: 0.4
  lamda: 3
tokenizr_source: base
"""


def test_what_mergekit_reads_over_is_named_and_the_rest_counts():
    found = verdicts(SLIPS)
    assert {line for line, words in found.items() if "warning" in words} >= {5, 7, 10, 11, 12, 13, 15, 17, 18}
    method = {"name": "ties", "density": 0.4, "rounding": "down", "scaling": 1.0}
    assert recipe_of(SLIPS)["method"] == method


def test_the_nearest_level_counts_and_what_never_does_is_said():
    text = models_of(
        "ties", "a 1", "b 1", base="o", rest="parameters: {weight: 3, density: 0.5, int8_mask: 1}\n"
    )
    found = imported(text)
    assert [f.why for f in found.findings if f.line == 8 and f.key[-1] == "weight"] == [
        "never used: every tensor finds a value before this one"
    ]
    assert recipe_of(text)["preference"] == {"weights": {"a": 0.5, "b": 0.5}}


def test_yaml_is_read_as_mergekit_reads_it():
    # Text that is a number, an alias, a merge key, `no` for false.
    text = (
        "merge_method: linear\nmodels:\n  - model: a\n    parameters: &p {weight: 5e-1}\n"
        "  - model: b\n    parameters: {<<: *p}\nparameters: {normalize: no}\n"
    )
    assert recipe_of(text)["method"] == {"name": "average", "scaling": 0.5}
    assert verdicts(text)[7] == {"exact"}  # they sum to 1


@pytest.mark.parametrize("word", ["false", "No", "'off'", "0", "0.0", "n"])
def test_words_for_false_are_those_of_mergekit(word):
    text = models_of("ties", "a 1", base="o", rest=f"parameters: {{normalize: {word}, density: true}}\n")
    assert recipe_of(text)["method"] == {"name": "ties", "density": 1.0, "consensus": "sum", "scaling": 1.0}


def test_keys_of_a_condition_that_mergekit_does_not_know_are_named():
    text = models_of("ties", "a 1", base="o", rest="parameters: {density: [{fliter: mlp, value: 0.5}]}\n")
    assert "filter" in next(f.why for f in imported(text).findings if f.key[-1] == "fliter")
    assert recipe_of(text)["method"]["density"] == 0.5  # for every name


def test_equal_numbers_of_16_bits_are_named_where_they_are_ranked():
    halves = Known(**dict.fromkeys("oab", ModelFacts(dict.fromkeys(NAMES, "BF16"), {}, 4)))
    for method, is_ranked in (
        ("ties", True),
        ("sce", True),
        ("task_arithmetic", False),
        ("dare_ties", False),
    ):
        text = models_of(method, *(["a 1", "b 1"] if method != "sce" else "ab"), base="o")
        found = imported(text, halves)
        assert any("16 bits" in f.why for f in found.findings) == is_ranked, method
        assert found.draws == (method != "task_arithmetic")
        assert not any("16 bits" in f.why for f in imported(text).findings)
    wide = imported(models_of("ties", "a 1", base="o", rest="dtype: bfloat16\n"))
    assert wide.draws and wide.verdict == "in expectation"
    assert imported(models_of("ties", "a 1", base="o")).verdict == "rounding"


def test_sce_counts_as_mergekit_does():
    text = models_of("sce", "o", "a", "b", base="o", rest="parameters: {select_topk: 0.6}\n")
    values = recipe_of(text)
    method = {"name": "sce", "density": 0.6, "rounding": "down", "floor": 1e-6, "scaling": 1.0}
    assert values["method"] == method and values["preference"] == {"weights": {"a": 0.5, "b": 0.5}}
    alone = models_of("sce", "a", base="o", rest="parameters: {select_topk: 0.6}\n")
    assert recipe_of(alone)["tensors"] == [{"match": "*", "take": "base_model"}]


def test_slices_of_all_blocks_are_models():
    part = "  - {model: %s, layer_range: [0, %d], parameters: {weight: 1}}\n"
    text = "merge_method: linear\nslices:\n- sources:\n" + part % ("a", 4) + part % ("b", 4)
    assert recipe_of(text)["tasks"] == [{"name": "b", "model": "b"}]
    assert "layers" not in recipe_of(text)
    assert recipe_of(text.replace("[0, 4]", "[0, 3]"))["layers"] == [{"blocks": [0, 3]}]
    assert recipe_of(text, Unseen())["layers"] == [{"blocks": [0, 4]}]  # nobody knows how many there are
    for wrong, why in (("[0, 5]", "has 4 blocks"), ("[1, 4]", "more blocks, or fewer"), ("[4]", "two whole")):
        found = imported(text.replace("[0, 4]", wrong, 1))
        assert found.recipe is None and any(why in f.why for f in found.findings if f.is_lost), wrong


def test_filters_of_no_name_are_named():
    rest = (
        "parameters: {density: [{filter: mlp.*up, value: 0.1}, {filter: conv, value: 0.2}, {value: 0.5}]}\n"
    )
    text = models_of("ties", "a 1", base="o", rest=rest)
    why = [f.why for f in imported(text).findings if f.verdict == "warning" and f.line == 6]
    assert len(why) == 2 and "not patterns" in why[0] and "no name" in why[1]
    assert recipe_of(text)["method"]["density"] == 0.5


def test_dtypes_that_models_have_change_nothing():
    halves = ModelFacts(dict.fromkeys(NAMES, "BF16"), {}, 4)
    text = models_of("linear", "a 1", "b 1", rest="dtype: float32\nout_dtype: bfloat16\n")
    assert verdicts(text, b=halves)[7] == {"exact"} and verdicts(text, b=halves)[8] == {"rounding"}
    # Without a dtype mergekit promotes; a recipe takes the base model's.
    assert recipe_of(models_of("linear", "b 1", "a 1"), Known(b=halves))["output"]["dtype"] == "float32"


ROWS = {"model.embed_tokens.weight": 3, "lm_head.weight": 3}


def with_tokens(*tokens, rows=None):
    sizes = dict.fromkeys(ROWS, rows or len(tokens))
    return ModelFacts(dict.fromkeys(NAMES, "F32"), sizes, 4, {token: n for n, token in enumerate(tokens)})


@pytest.mark.parametrize(
    ("source", "models", "verdict", "word"),
    [
        ("base", {"a": with_tokens("x", "y")}, "exact", "the same tokens"),
        ("union", {}, "exact", "the same tokens"),
        ("base", {"a": with_tokens("x", "y", "new")}, "rounding", "the tokens of o"),
        ("a", {"a": with_tokens("x", "y", "new")}, "rounding", "the tokens of a"),
        ("union", {"a": with_tokens("x", "y", "new")}, "rounding", "the tokens of all models"),
        ("a", dict.fromkeys("ab", with_tokens("x", "y", "new")), "rounding", "the tokens of a"),
        ("a", {"a": with_tokens("x", "y", rows=8)}, "rounding", "the tokens of a"),
        ("base", {"a": with_tokens("x", "y", rows=8)}, "rounding", "the tokens of o"),
        ("a", {"a": with_tokens("x", "y", rows=1)}, "not representable", "tokens without a row"),
        ("a", {"a": SIX}, "not representable", "could not be read"),
        ("c", {}, "not representable", "nor one of the models"),
    ],
)
def test_rows_are_matched_by_token(source, models, verdict, word):
    same = with_tokens("x", "y")
    known = Known(**{"o": same, "a": same, "b": same} | models)
    text = models_of("linear", "o 1", "a 1", "b 1", base="o", rest=f"tokenizer_source: {source}\n")
    found = imported(text, known)
    ((said, why),) = [(f.verdict, f.why) for f in found.findings if f.line == 10 and f.verdict != "warning"]
    assert said == verdict and word in why
    if verdict != "not representable":
        name = {"base": "base_model"}.get(source, source)
        expected = {"source": name} | ({"tokens": {"new": "mean"}} if len(models) == 2 else {})
        assert found.recipe.get("tokenizer") == (expected if verdict == "rounding" else None)
        warned = [f.why for f in found.findings if f.verdict == "warning"]
        assert ("6 rows of no token are dropped" in warned) == any(
            8 in one.rows.values() for one in models.values()
        )
        assert any("from run to run" in why for why in warned) == (source == "union" and bool(models))


CHOSEN = """\
merge_method: linear
base_model: o
models:
- {model: o, parameters: {weight: 1}}
- {model: a, parameters: {weight: 2}}
tokenizer:
  source: union
  tokens:
    new: {source: a}
    x:
      source: {kind: model_token, model: a, token_id: 2}
      force: true
    y: {source: {kind: zero}, force: false}
  pad_to_multiple_of: 8
"""


def test_rows_of_single_tokens_and_padding():
    known = Known(o=with_tokens("x", "y"), a=with_tokens("x", "y", "new"))
    assert recipe_of(CHOSEN, known)["tokenizer"] == {
        "source": "union",
        "tokens": {"new": "a", "x": {"take": "a", "token_id": 2, "force": True}, "y": "zero"},
        "pad_to_multiple_of": 8,
    }
    for line in (7, 9, 11, 12, 13, 14):
        assert "rounding" in {f.verdict for f in imported(CHOSEN, known).findings if f.line == line}, line


@pytest.mark.parametrize(
    ("change", "line", "word"),
    [
        (("new: {source: a}", "newer: {source: a}"), 9, "mergekit adds"),
        (("new: {source: a}", "new: {source: o}"), 9, "no row of 'new'"),
        (("new: {source: a}", "new: {source: c}"), 9, "neither one of the models"),
        (("new: {source: a}", "new: {force: true}"), 9, "no source of the row"),
        (("token_id: 2", "token_id: 3"), 11, "no row of '3'"),
        (("token_id: 2", "token: z"), 11, "no row of 'z'"),
        (("token_id: 2", "token_id: 2, token: y"), 11, "one of them"),
        (("force: true", "force: 7"), 12, "neither true nor false"),
        (("kind: zero", "kind: one"), 13, "one of them"),
        (("pad_to_multiple_of: 8", "pad_to_multiple_of: 0.5"), 14, "a whole number above 0"),
        (("tokenizer:\n", "tokenizer_source: base\ntokenizer:\n"), 7, "exclude each other"),
    ],
)
def test_rows_of_single_tokens_that_cannot_be_are_named(change, line, word):
    known = Known(o=with_tokens("x", "y"), a=with_tokens("x", "y", "new"))
    found = imported(CHOSEN.replace(*change), known)
    assert found.recipe is None
    assert [f.line for f in found.findings if f.is_lost and word in f.why] == [line]


def test_keys_can_be_left_out_by_name():
    text = models_of("task_arithmetic", "a 1", base="o", rest="tokenizer: {pad_to_multiple_of: 8}\n")
    assert imported(text).recipe is None
    found = imported(text, without=["tokenizer"])
    assert found.recipe is not None
    assert [f.verdict for f in found.findings if f.line == 6] == ["warning"]
    with pytest.raises(RecipeError, match="no key 'tokens'"):
        imported(text, without=["tokens"])


@pytest.mark.parametrize("text", ["", "a: b\n", "- 1\n", "license: mit\n"])
def test_other_texts_are_no_configurations(text):
    with pytest.raises(RecipeError, match="no configuration that can be imported"):
        imported(text)


def test_a_recipe_is_called_one():
    with pytest.raises(RecipeError, match="this is a recipe already"):
        imported("tasks: []\nbase_model: x\n")


@pytest.mark.parametrize("text", ["a: [", "&a [*a, *a]", "[" * 50, "a: &x {<<: *x}\nmerge_method: b\n"])
def test_yaml_that_cannot_be_read_is_an_error(text):
    with pytest.raises(RecipeError):
        imported(text)


STAGES = """\
name: first
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
---
merge_method: task_arithmetic
base_model: o
models:
  - {model: first, parameters: {weight: 0.5}}
"""


def test_one_merge_of_several_is_imported_by_name_or_number():
    first = import_text(STAGES, "mix.yml", Known(), stage="first").recipe
    assert first["output"]["path"] == "first" and first["tasks"] == [{"name": "b", "model": "b"}]
    second = import_text(STAGES, "mix.yml", Known(), stage="2").recipe
    assert second["tasks"] == [{"name": "first", "model": "./first"}]
    with pytest.raises(RecipeError, match="no merge 'third'"):
        import_text(STAGES, "mix.yml", Known(), stage="third")


PEFT = "adapters: [x/poem, x/sql@v2]\nweights: [0.7, -0.2]\ncombination_type: cat\n"
RANKS = {"x/poem": 4, "x/sql": 8}


def adapters(**changes):
    found = {
        name: ModelFacts({}, is_adapter=True, rank=rank, adapter_base="me/o") for name, rank in RANKS.items()
    }
    return Known(**found | changes)


def test_adapters_that_peft_concatenates_become_one_adapter():
    values = recipe_of(PEFT, adapters())
    assert values["base_model"] == "me/o" and values["output"] == {"path": "merged", "format": "adapter"}
    assert values["preference"] == {"coefficients": {"poem": 0.7, "sql": -0.2}}
    assert [task["model"] for task in values["tasks"]] == ["x/poem", "x/sql@v2"]


@pytest.mark.parametrize(
    ("change", "line", "word"),
    [
        (("cat", "linear"), 3, "factors"),
        (("cat", "ties"), 3, "factors"),
        (("cat", "ties_svd"), 3, "cut to a rank"),
        (("cat", "svd\nsvd_rank: 0"), 4, "a whole number from 1"),
        (("cat", "svd\nsvd_rank: wide"), 4, "a whole number from 1"),
        (("cat", "svd\nsvd_rank: 9\nsvd_clamp: 0.9"), 5, "values of factors that are cut off"),
        (("cat", "cats"), 3, "no way"),
        (("[0.7, -0.2]", "[0.7]"), 2, "a list of 2 numbers"),
        (("x/poem", "x/poem+y"), 1, "no name of an adapter"),
    ],
)
def test_what_peft_does_otherwise_is_named(change, line, word):
    found = imported(PEFT.replace(*change), adapters())
    assert found.recipe is None
    assert any(f.line == line and word in f.why for f in found.findings if f.is_lost)


def test_a_product_of_full_rank_is_the_weighted_sum():
    text = PEFT.replace("cat", "svd\nsvd_rank: 12\nsvd_driver: gesvd\ndensty: 1")
    assert recipe_of(text, adapters()) == recipe_of(PEFT, adapters())
    assert [f.verdict for f in imported(text, adapters()).findings if f.line > 4] == ["exact", "warning"]
    one = "adapters: [x/sql]\nweights: [0.5]\ncombination_type: linear\n"
    assert recipe_of(one, adapters())["preference"] == {"coefficients": {"sql": 0.5}}


def test_a_product_that_is_cut_has_the_rank_of_its_output():
    for written, rank in (("svd", 8), ("svd\nsvd_rank: 10", 10)):
        text = PEFT.replace("cat", written)
        output = {"path": "merged", "format": "adapter", "rank": rank}
        assert recipe_of(text, adapters())["output"] == output
        assert imported(text, adapters()).verdict == "rounding"


def test_adapters_whose_factor_peft_gets_wrong_are_refused():
    stabilised = ModelFacts({}, is_adapter=True, rank=8, is_rank_stabilised=True, adapter_base="me/o")
    found = imported(PEFT, adapters(**{"x/sql": stabilised}))
    assert found.recipe is None and any("x/sql is rank-stabilised" in f.why for f in found.findings)


def test_recipes_of_sd_mecha_are_refused_by_name():
    text = 'version 0.1.0\nmodel "a.safetensors" "sd1-ldm" "weight"\n'
    with pytest.raises(RecipeError, match="a recipe of sd-mecha"):
        imported(text)


CARD = """---
license: mit
---
# Mix

```python
print("merge_method: no")
```

```yaml
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./a
    parameters: {weight: 1.0}
```
"""


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("```yaml", "```"), ("```YML", "```"), ("~~~ yaml", "~~~"), ("````", "`````"),
        ("   ```yaml", "   ```"), ("     ```yaml", "     ```"), ("```{yaml}", "```"),
        ("```yaml title=x", "```  "), ("```text", "```"), ("```yaml", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_configurations_of_cards_are_found_in_any_fence(start, end, newline):
    text = f"# Mix\n\n{start}\nslices: []\n'merge_method': linear\n{end}\n".replace("\n", newline)
    assert [len(one) - len(one.lstrip("\n")) for one in shown_in_card(text)] == [3]
    if end:
        assert len(shown_in_card(text + text)) == 1


def test_a_file_a_card_and_a_folder_are_imported(family, monkeypatch):
    monkeypatch.chdir(family)
    folder = family / "theirs"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    code, out, _ = call("import", "theirs", "--out", "one.yaml")
    assert code == 0 and "14  parameters" not in out and "15  parameters: {weight: 1.0}" in out
    (folder / "mergekit_config.yml").write_text(CARD.split("```yaml\n")[1].rstrip("`\n"))
    assert call("import", folder, "--out", "sub.yaml")[0] == 0
    written = yaml.safe_load((family / "sub.yaml").read_text())
    assert written == yaml.safe_load((family / "one.yaml").read_text())
    assert written["tasks"] == [{"name": "a", "model": "./a"}]


@pytest.mark.parametrize("name", ["README.md", "mergekit_moe_config.yml"])
def test_a_published_mixture_of_experts_is_refused_by_name(family, monkeypatch, name):
    monkeypatch.chdir(family)
    (family / "moe").mkdir()
    text = "base_model: ./base\ngate_mode: random\nexperts: [{source_model: ./a}]\n"
    (family / "moe" / name).write_text(f"# Moe\n```yaml\n{text}```\n" if name == "README.md" else text)
    code, out, _ = call("import", "moe")
    assert code == 1 and "mixture of experts" in out and not (family / "recipe.yaml").exists()


def test_a_repository_is_imported(family, hub, monkeypatch):
    monkeypatch.chdir(family)
    hub.add_repo("me/theirs", files={"README.md": CARD.encode()})
    assert call("import", "me/theirs")[0] == 0
    assert Path("recipe.yaml").is_file()
    code, _, err = call("import", "me/theirs")
    assert code == 1 and "already" in err


def test_nothing_is_written_where_a_line_has_no_counterpart(family, monkeypatch):
    monkeypatch.chdir(family)
    Path("mix.yml").write_text(models_of("ties", "./a 1", base="./base", rest="tokenizer: {source: union}\n"))
    code, out, _ = call("import", "mix.yml", "--json")
    values = json.loads(out)
    assert code == 1 and values["verdict"] == "not representable" and values["recipe"] is None
    assert not Path("recipe.yaml").exists()
    lost = [line for line in values["lines"] if line["verdict"] == "not representable"]
    assert [(one["line"], one["key"]) for one in lost] == [(6, ["tokenizer", "source"])]
    assert call("import", "mix.yml", "--without", "tokenizer.source")[0] == 1  # union is the default
    assert "--without tokenizer" in call("import", "mix.yml")[1]
    assert call("import", "mix.yml", "--without", "tokenizer")[0] == 0


def test_a_checkpoint_that_cannot_be_read_is_told_before_lines_are_left_out(family, monkeypatch):
    monkeypatch.chdir(family)
    scale = "parameters: {scale: [{filter: a, value: 0}, {value: 1}]}"
    Path("mix.yml").write_text(f"""\
merge_method: passthrough
slices:
  - sources: [{{model: ./none, layer_range: [0, 2], {scale}}}]
  - sources: [{{model: ./none, layer_range: [1, 3]}}]
""")
    code, out, _ = call("import", "mix.yml")
    assert code == 1 and "./none: there is no such folder" in out and "the recipe's own folder" not in out
    assert "once the checkpoints above can be read" in out
    assert "--without merge_method" not in out, "without it there is no merge"


def test_values_in_one_line_are_told_apart(family, monkeypatch):
    monkeypatch.chdir(family)
    text = models_of("ties", "./a 1", base="./base", rest="parameters: {density: 0.5, normalize: true}\n")
    Path("mix.yml").write_text(text)
    out = call("import", "mix.yml")[1]
    assert "parameters.density " in out and "parameters.normalize " in out


def test_names_that_no_recipe_can_have_are_told_with_the_file_that_has_them(family, monkeypatch):
    monkeypatch.chdir(family)
    Path("mix.yml").write_text(models_of("linear", "base 1", "C:\\a 1"))
    code, _, err = call("import", "mix.yml", "--out", "mine.yaml")
    assert code == 1 and "mix.yml, as a recipe" in err and "with / between their names" in err


def test_a_file_that_is_not_there_is_told_with_its_neighbour(family, monkeypatch):
    monkeypatch.chdir(family)
    Path("mix.yml").write_text("")
    code, _, err = call("import", "mik.yml")
    assert code == 1 and "mik.yml: there is no such file. Did you mean mix.yml?" in err


def test_paths_start_at_the_folder_of_the_recipe(family, tmp_path, monkeypatch):
    monkeypatch.chdir(family)
    (family / "sub").mkdir()
    Path("mix.yml").write_text(models_of("linear", "base 1", "./a 1"))
    assert call("import", "mix.yml", "--out", "sub/mix.yaml")[0] == 0
    assert yaml.safe_load(Path("sub/mix.yaml").read_text())["base_model"] == "../base"
    assert call("plan", "sub/mix.yaml")[0] == 0
