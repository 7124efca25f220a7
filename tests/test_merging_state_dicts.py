import pytest
import torch
from safetensors.torch import load_file

from hub_magmax.errors import ArgumentError, CheckpointError, MismatchError, NonFiniteError, RecipeError
from hub_magmax.merging.execution import merge
from hub_magmax.merging.state_dicts import merge_state_dicts
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe
from tests.families import make_tensors, write_checkpoint, write_recipe
from tests.test_in_memory import same
from tests.test_merging import METHODS

NAMES = ("a", "b", "c")


@pytest.fixture
def models() -> dict[str, dict[str, torch.Tensor]]:
    base = make_tensors(0)
    return {"base": base} | {name: make_tensors(seed, base=base) for seed, name in enumerate(NAMES, 1)}


def test_an_average_worked_by_hand():
    base = {"w": torch.tensor([0.0, 1.0]), "steps": torch.tensor(3)}
    tasks = {"a": {"w": torch.tensor([4.0, 1.0]), "steps": torch.tensor(3)}}
    tasks["b"] = {"w": torch.tensor([0.0, 5.0]), "steps": torch.tensor(3)}
    found = merge_state_dicts(base, tasks, preference={"a": 0.75, "b": 0.25}, method="average")
    assert found["w"].tolist() == [3.0, 2.0]
    assert found["steps"].item() == 3
    half = merge_state_dicts(base, tasks, method={"name": "average", "scaling": 0.5})
    assert half["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_values_are_those_of_a_merge_of_files(tmp_path, models, method):
    for name, tensors in models.items():
        write_checkpoint(tmp_path / name, tensors)
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    recipe = load_recipe(write_recipe(tmp_path, method=method, preference={"weights": weights}, seed=7))
    merge(plan(recipe, lock(recipe)))
    base, *tasks = models.values()
    found = merge_state_dicts(
        base, dict(zip(NAMES, tasks, strict=True)), preference=weights, method=method, seed=7
    )
    assert same(found, load_file(recipe.output_path / "model.safetensors"))


def test_state_dicts_are_not_changed_and_the_result_has_memory_of_its_own(models):
    kept = {name: {key: value.clone() for key, value in model.items()} for name, model in models.items()}
    base, *tasks = models.values()
    found = merge_state_dicts(base, dict(zip(NAMES, tasks, strict=True)), method="last_task")
    for value in found.values():
        value.zero_()
    assert all(same(models[name], kept[name]) for name in models)


def test_views_and_transposed_tensors_are_read_as_their_values(models):
    base, *tasks = models.values()
    expected = merge_state_dicts(base, dict(zip(NAMES, tasks, strict=True)))
    turned = [
        {name: value.t().contiguous().t() if value.dim() == 2 else value for name, value in task.items()}
        for task in tasks
    ]
    assert same(merge_state_dicts(base, dict(zip(NAMES, turned, strict=True))), expected)


def test_a_trainers_language_model_with_tied_layers_takes_the_result():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    base = {name: value.clone() for name, value in model.named_parameters()}
    tuned = [LlamaForCausalLM(config) for _ in "ab"]
    merged = merge_state_dicts(
        model.state_dict(),
        {name: one.state_dict() for name, one in zip("ab", tuned, strict=True)},
        preference=(0.75, 0.25),
        method={"name": "dare", "scaling": 1.0, "density": 0.5},
        dtype="float32",
    )
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    model.load_state_dict(merged, strict=True)
    # Drawn once: the head is the embedding. Every element is the base's, or moved by a task or by both.
    a, b = (
        one.get_parameter("model.embed_tokens.weight") - base["model.embed_tokens.weight"] for one in tuned
    )
    moved = model.get_parameter("model.embed_tokens.weight") - base["model.embed_tokens.weight"]
    possible = [x * 3 * a + y * b for x in (0, 1) for y in (0, 1)]
    nearest = torch.stack([(moved - one).abs() for one in possible]).amin(0)
    assert nearest.max() < 1e-6
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_sentence_transformers_embed_as_with_the_average_of_their_weights(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog"])
    )
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoders = []
    for seed in range(3):
        torch.manual_seed(seed)
        BertModel(BertConfig(vocab_size=7, **sizes)).save_pretrained(tmp_path)
        encoders.append(sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu"))
    base, *tuned = [encoder.state_dict() for encoder in encoders]
    merged = merge_state_dicts(
        base, dict(zip(("cats", "dogs"), tuned, strict=True)), method={"name": "average", "scaling": 1}
    )
    expected = {name: (tuned[0][name] + tuned[1][name]) / 2 for name in base}
    found = []
    for weights in (merged, expected):
        encoders[0].load_state_dict(weights, strict=True)
        found.append(torch.from_numpy(encoders[0].encode(["cat", "dog cat"])))
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.allclose(found[0], torch.from_numpy(encoders[1].encode(["cat", "dog cat"])), atol=1e-2)


def test_layers_tied_in_one_model_alone_are_merged_apart():
    shared = torch.ones(2, 2)
    base = {"head": shared, "embed": shared}
    task = {"head": torch.full((2, 2), 3.0), "embed": torch.full((2, 2), 5.0)}
    found = merge_state_dicts(base, {"a": task}, method="average")
    assert (found["head"][0, 0], found["embed"][0, 0]) == (3, 5)


def test_rules_coefficients_and_dtypes_are_those_of_recipes():
    base = {"w": torch.zeros(2, dtype=torch.bfloat16), "head": torch.zeros(1)}
    tasks = {
        "a": {"w": torch.tensor([1.0, 2.0]).bfloat16(), "head": torch.ones(1)},
        "b": {"w": torch.tensor([4.0, 0.0]).bfloat16(), "head": torch.ones(1)},
    }
    found = merge_state_dicts(
        base,
        tasks,
        preference={"coefficients": {"a": 1, "b": -0.5}},
        method={"name": "task_arithmetic", "scaling": 1},
        tensors=[{"match": "head", "take": "b"}],
        dtype="float32",
    )
    assert found["w"].tolist() == [-1.0, 2.0] and found["w"].dtype == torch.float32
    assert found["head"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"preference": [1]}, "1 weights for 2 tasks"),
        ({"preference": [["x"], 1]}, "are no weights"),
        ({"preference": {"x": 1.0}}, "preference.weights.x"),
        ({"method": "averag"}, "Did you mean 'average'"),
        ({"method": {"name": "ties", "densty": 1}}, "did you mean 'density'"),
        ({"preference": {"search": {"target": {"dataset": "x"}}}}, "needs examples"),
        ({"tensors": [{"match": "nothing.*", "take": "a"}]}, "matches no tensor"),
    ],
    ids=str,
)
def test_a_wrong_call_is_an_error_of_the_recipe(call, text):
    models = {name: {"w": torch.ones(2)} for name in "ab"}
    with pytest.raises(RecipeError) as caught:
        merge_state_dicts({"w": torch.zeros(2)}, models, **call)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("task", "error", "text"),
    [
        (
            {"w": torch.ones(3), "ids": torch.tensor([1, 2])},
            MismatchError,
            r"tensor 'w': shape \[3\]. Expected \[2\]",
        ),
        ({"ids": torch.tensor([1, 2])}, MismatchError, "lacks tensor 'w'"),
        ({"w": torch.ones(2), "ids": torch.tensor([1, 3])}, MismatchError, "integers differ.*'ids'"),
        ({"w": torch.ones(2), "n": torch.tensor(1), "lr": 0.1}, CheckpointError, "'lr' is no dense tensor"),
        (
            {"w": torch.ones(2).to_sparse(), "ids": torch.tensor([1, 2])},
            CheckpointError,
            "'w' is no dense tensor",
        ),
        (
            {"w": torch.ones(2).to(torch.complex128), "ids": torch.tensor([1, 2])},
            CheckpointError,
            "complex128",
        ),
        (
            {"w": torch.tensor([1.0, float("nan")]), "ids": torch.tensor([1, 2])},
            NonFiniteError,
            "element 1 is nan",
        ),
    ],
    ids=["shape", "missing", "integers", "number", "sparse", "dtype", "nan"],
)
def test_a_state_dict_that_does_not_fit_is_an_error_that_names_the_tensor(task, error, text):
    with pytest.raises(error, match=text):
        merge_state_dicts({"w": torch.zeros(2), "ids": torch.tensor([1, 2])}, {"a": task})


def test_a_model_in_place_of_its_state_dict_is_told():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="Linear is no state dict"):
        merge_state_dicts(model, {"a": model.state_dict()})
    with pytest.raises(RecipeError, match="merge_state_dicts, a: Linear is no state dict"):
        merge_state_dicts(model.state_dict(), {"a": model})
    with pytest.raises(ArgumentError, match=r"tasks: this is a list\. Expected a mapping"):
        merge_state_dicts(model.state_dict(), [model.state_dict()])
