"""Accidents of mergekit that decide weights, found by running both on configurations made at random."""

from dataclasses import replace

import pytest

from hub_magmax.recipe.importing.model_facts import ModelFacts
from tests.test_importing import NAMES, SIX, Known, imported, models_of, recipe_of

HALVES = Known(**dict.fromkeys("oab", ModelFacts(dict.fromkeys(NAMES, "BF16"), {}, 4)))

#: All slices have a base model of their own, and another one stands at the top.
OWN_BASE = """\
merge_method: ties
base_model: o
slices:
- base_model: a
  sources: [{model: o, layer_range: [0, 4]}, {model: a, layer_range: [0, 4]}]
parameters: {weight: 1}
"""


def test_the_one_base_model_of_all_slices_beats_that_at_the_top():
    values = recipe_of(OWN_BASE)
    assert values["base_model"] == "a" and [task["model"] for task in values["tasks"]] == ["o"]
    assert values["output"]["files_from"] == "o"  # mergekit copies config and tokenizer from there
    method, _, *slices, parameters = OWN_BASE.splitlines()
    lines = [method, "modules:", "  default:", *(f"    {line}" for line in slices), parameters]
    in_module = recipe_of("\n".join(lines))
    assert in_module["base_model"] == "a" and in_module["preference"] == values["preference"]
    shared = recipe_of(OWN_BASE.replace("- base_model: a\n  sources", "- sources"))
    assert shared["base_model"] == "o" and "files_from" not in shared["output"]


@pytest.mark.parametrize(
    ("method", "how"), [("ties", "norm"), ("breadcrumbs", "norm"), ("breadcrumbs_ties", None)]
)
def test_what_is_left_is_scaled_up_by_methods_that_have_that(method, how):
    text = models_of(method, "a 1", base="o", rest="parameters: {rescale: true, density: 1}\n")
    assert recipe_of(text)["method"]["density"] == 1 and "rescale" not in recipe_of(text)["method"]
    half = text.replace("density: 1", "density: 0.5")
    if how is None:
        assert imported(half).recipe is None
        return
    assert recipe_of(half)["method"]["rescale"] == how
    assert "rescale" not in recipe_of(half.replace("rescale: true, ", ""))["method"]
    by_name = half.replace("rescale: true", "rescale: [{filter: mlp, value: %s}]")
    assert recipe_of(by_name % "true")["method"]["rescale"] == "none"
    (rule,) = recipe_of(by_name % "true")["tensors"]
    assert rule["options"] == {"rescale": "norm"}


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_ties", "della_linear"])
def test_a_model_of_density_0_counts_nothing(method):
    text = models_of(method, "a 0.5", "b 0.25", base="o", rest="parameters: {normalize: false}\n")
    text = text.replace("weight: 0.25", "weight: 0.25, density: 0.0")
    values = recipe_of(text)
    assert values["preference"] == {"coefficients": {"a": 0.5, "b": 0}}
    assert values["method"]["density"] == 1
    # A mean without an election is divided by all weights, one with it by those that agree.
    of_mean = recipe_of(text.replace("false", "true"))["preference"]
    if method in ("breadcrumbs", "della_linear"):
        assert of_mean["coefficients"]["a"] == pytest.approx(2 / 3)
    else:
        assert of_mean == {"weights": {"a": 1, "b": 0}}


@pytest.mark.parametrize(
    ("normalize", "consensus"),
    [
        ("[true, 1]", None),
        ("[{filter: lm_head, value: [true, false]}, {value: true}]", None),
        ("[no, 'off', 0]", "sum"),
    ],
)
def test_gradients_of_switches_count_where_they_have_one_value(normalize, consensus):
    text = models_of("ties", "a 1", "b 1", base="o", rest=f"parameters: {{normalize: {normalize}}}\n")
    assert recipe_of(text)["method"].get("consensus") == consensus


def test_a_switch_that_differs_between_blocks_is_named():
    found = imported(models_of("ties", "a 1", base="o", rest="parameters: {normalize: [true, false]}\n"))
    assert [f.why for f in found.findings if f.is_lost] == [
        "a normalize that is true in some blocks, and false in others"
    ]


@pytest.mark.parametrize("method", ["arcee_fusion", "ramplus_tl"])
@pytest.mark.parametrize(
    ("models", "rest", "dtype"),
    [
        (Known(), "dtype: bfloat16\n", "float32"),
        (Known(), "dtype: bfloat16\nout_dtype: bfloat16\n", "bfloat16"),
        (Known(), "dtype: float64\n", "float64"),
        (HALVES, "", "float32"),
    ],
)
def test_products_with_masks_are_stored_in_float32(method, models, rest, dtype):
    found = imported(models_of(method, "a", base="o", rest=rest), models)
    assert found.recipe["output"]["dtype"] == dtype
    is_named = any("writes float32" in f.why for f in found.findings if f.verdict == "warning")
    assert is_named == (dtype == "float32" and bool(rest))


def test_rounded_changes_near_the_limit_of_ram_are_a_matter_of_chance():
    text = models_of("ram", "a", "b", base="o")
    assert imported(text).verdict == "rounding" and imported(text, HALVES).verdict == "in expectation"


@pytest.mark.parametrize(
    ("method", "in_32_bits", "told"),
    [
        ("arcee_fusion", "in expectation", "keeps other elements than here, and mostly more of them"),
        ("karcher", "rounding", "ends elsewhere on the way"),
    ],
)
def test_steps_in_16_bits_that_decide_elements_or_angles_are_told_in_the_verdict(method, in_32_bits, told):
    text = models_of(method, "a", base="o")
    for models, rest in ((HALVES, ""), (None, "dtype: float16\n")):
        found = imported(text + rest, models)
        (of_16_bits,) = (f for f in found.findings if "in 16 bits" in f.why)
        assert (of_16_bits.verdict, of_16_bits.key) == ("in expectation", ("merge_method",))
        assert found.recipe is not None and found.verdict == "in expectation" and told in of_16_bits.why
    found = imported(text)
    assert found.verdict == in_32_bits and not any("in 16 bits" in f.why for f in found.findings)


def test_a_model_alone_is_copied_by_multislerp_whatever_its_weight():
    text = models_of("multislerp", "a 0.7", base="o", rest="parameters: {normalize_weights: false}\n")
    for weight in ("0.7", "-2", "0"):
        values = recipe_of(text.replace("0.7", weight))
        assert values["method"]["scaling"] == 1 and values["preference"] == {"weights": {"a": 1}}


def test_ramplus_divides_by_epsilon_where_a_model_changed_nothing_alone():
    found = imported(models_of("ramplus_tl", "a", base="o", rest="parameters: {epsilon: 0}\n"))
    assert [f.line for f in found.findings if f.is_lost] == [5]


def test_a_mean_of_one_model_in_slices_is_that_model():
    part = "- sources: [{model: a, layer_range: [%d, %d], parameters: {weight: 0.5}}]\n"
    values = recipe_of("merge_method: linear\nslices:\n" + part % (0, 3) + part % (2, 3))
    assert values["layers"] == [
        {"take": "base_model", "blocks": [0, 3]},
        {"take": "base_model", "blocks": [2, 3]},
    ]


def test_a_mean_by_weights_of_zero_adds_nothing():
    rest = "parameters: {weight: [{filter: mlp, value: 0.3}, {value: %s}]}\n"
    text = models_of("ties", "a", "b", base="o", rest=rest)
    (rule,) = recipe_of(text % 0)["tensors"]
    assert rule["match"] == "*mlp*" and recipe_of(text % 0)["method"]["scaling"] == 0
    assert rule["scaling"] == 1
    found = imported(text % "[1, 0]")
    assert any("in some blocks" in f.why for f in found.findings if f.is_lost)


def test_sums_of_gradients_are_looked_at_block_by_block():
    for method, numbers in (
        ("breadcrumbs", "density: [0.5, 0.9], gamma: [0.5, 0.1]"),
        ("della", "density: [0.3, 0.8], epsilon: [0.25, 0.15]"),
    ):
        text = models_of(method, "a 1", base="o", rest=f"parameters: {{{numbers}}}\n")
        recipe_of(text)
        assert imported(text.replace("0.1", "0.2")).recipe is None, method


def test_models_as_mappings_have_revisions_in_their_texts_and_keys_that_are_read_over():
    text = models_of("ties", "a 1", base="o@v1")
    text = text.replace("model: a", "model: {model: a@v2, lora: b@v3, rank: 1}")
    found = imported(text.replace("a@v2", "o@v1"))
    assert found.recipe["base_model"] == "o@v1" and found.recipe["tasks"][0]["model"] == "b@v3"
    assert [f.key_text for f in found.findings if f.verdict == "warning"] == ["models.0.model.rank"]
    text = text.replace("a@v2", "{path: a, revison: v2}")
    keys = [f.key_text for f in imported(text).findings if f.verdict == "warning"]
    assert keys == ["models.0.model.model.revison", "models.0.model.rank"]


def lost_in(text, models=None):
    """Return the line and the reason of everything that has no counterpart."""
    return [(f.line, f.why) for f in imported(text, models).findings if f.is_lost]


def warnings_in(text):
    return [(f.line, f.why) for f in imported(text).findings if f.verdict == "warning"]


def test_a_key_that_replaces_a_merged_one_is_no_key_twice():
    text = "models:\n- &one\n  model: a\n  parameters: {weight: 1}\n- <<: *one\n  model: b\n"
    text += "merge_method: ties\nbase_model: o\n"
    assert [task["model"] for task in recipe_of(text)["tasks"]] == ["a", "b"] and not warnings_in(text)
    ((line, why),) = warnings_in(text.replace("model: b", "model: c\n  model: b"))
    assert line == 6 and "stands here again" in why


def test_what_is_wrong_is_told_at_its_line():
    text = "merge_method: passthrough\nslices:\n- model: a\n  layer_range: [0, 4]\n"
    assert lost_in(text) == [(3, "expected a list of sources")]
    ranged = "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [4, 0]\n"
    assert [line for line, why in lost_in(ranged) if "the second one larger" in why] == [5]
    assert lost_in("merge_method: karcher\nmodels:\n- a\n")[0] == (
        3,
        "no model is named here: expected `- model: NAME`",
    )
    misspelt = models_of("ties", "a 1", base="o").replace("merge_method", "merge-method")
    assert any("did you mean 'merge_method'" in why for _, why in warnings_in(misspelt))


def test_a_density_that_is_no_share_is_warned_of():
    text = models_of("ties", "a 1", base="o", rest="parameters: {density: 50}\n")
    ((line, why),) = warnings_in(text)
    assert line == 5 + 1 and why.startswith("above 1")
    assert recipe_of(text)["method"]["density"] == 1


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "breadcrumbs"])
def test_weights_that_cancel_are_added_as_mergekit_does(method):
    text = models_of(method, "a 1", "b -1", base="o", rest="parameters: {normalize: true}\n")
    assert recipe_of(text)["preference"]["coefficients"] == {"a": 1, "b": -1}
    assert any("sum to 0" in why for _, why in warnings_in(text))


def test_an_adapter_without_its_model_is_refused():
    adapter = ModelFacts({"lora_A": "F32"}, {"lora_A": 4}, is_adapter=True)
    found = lost_in(models_of("ties", "a 1", "b 1", base="o"), Known(a=adapter))
    assert found == [(4, "an adapter, which mergekit takes as MODEL+ADAPTER alone")]


@pytest.mark.parametrize(
    ("template", "is_known"),
    [
        ("chatml", True),
        ("auto", True),
        ("'{% for m in messages %}{{ m }}{% endfor %}'", True),
        ("chatMl", False),
    ],
)
def test_chat_templates_that_mergekit_forgets_are_told(template, is_known):
    text = models_of("ties", "a 1", base="o", rest=f"chat_template: {template}\n")
    ((_, why),) = warnings_in(text)
    assert ("neither a template's text" in why) is not is_known


def test_documents_without_values_are_left_out():
    text = models_of("ties", "a 1", base="o")
    assert recipe_of(text + "---\n") == recipe_of(f"---\n---\n{text}...\n") == recipe_of(text)


def test_weights_whose_sum_passes_0_on_the_way_are_refused():
    text = models_of("linear", "a 0.5", "b [0.25,-1]")
    found = imported(text)
    assert [f.line for f in found.findings if f.is_lost] == [4, 6]
    assert imported(text.replace("0.25,-1", "0.25,-0.25")).recipe is not None


def test_rows_of_padding_are_equal_where_elements_are_ranked():
    rest = "tokenizer: {source: union, pad_to_multiple_of: %d}\nparameters: {density: 0.5}\n"
    known = Known(**dict.fromkeys("oa", replace(SIX, tokens={str(n): n for n in range(6)})))
    text = models_of("ties", "a 1", base="o", rest=rest)
    assert imported(text % 4, known).verdict == "in expectation"
    assert imported(text % 3, known).verdict == "rounding"
    assert imported(text.replace("{density: 0.5}", "{lambda: 1}") % 4, known).verdict == "rounding"
    whole = text.replace("0.5", "1") % 4
    assert imported(whole, known).verdict == "rounding"
    assert imported(whole.replace("ties", "breadcrumbs"), known).verdict == "rounding"
    assert imported(text.replace("0.5", "[1, 0.5]") % 4, known).verdict == "in expectation"


def test_ranges_of_layers_may_be_texts_and_floats():
    text = OWN_BASE.replace("[0, 4]", "['0', 4.0]")
    assert recipe_of(text) == recipe_of(OWN_BASE)
