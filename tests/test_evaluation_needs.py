"""What an evaluation will take is told before it starts."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.evaluation.needs import bytes_of_token, check_download_room, check_fits, evaluation_needs
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import describe, explain
from hub_magmax.publishing.preflight import rehearse
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import LockedFile
from hub_magmax.text import format_bytes
from tests.families import recipe_values
from tests.tiny_llama import write_llama


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_llama(folder / "base")
    network = LlamaForCausalLM.from_pretrained(folder / "base")
    write_llama(folder / "a")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    network.save_pretrained(folder / "a")
    rows = {"question": ["the film"], "choices": [["good", "bad"]], "label": [0]}
    Dataset.from_dict(rows).to_json(folder / "rows.jsonl")
    return folder


def recipe_of(folder, evaluator="multiple-choice", **changes):
    evaluation = {"evaluator": evaluator, "tasks": {"a": {"dataset": str(folder / "rows.jsonl")}}}
    return parse_recipe(recipe_values(("a",), evaluation=evaluation) | changes, folder=folder)


def on_hub(locked, size):
    """Return a lock whose sources are repositories with so many bytes of weights."""
    files = (LockedFile("model.safetensors", size, "0" * 64),)

    def moved(source):
        return replace(source, kind="hub", repo_id="me/none", commit="0" * 40, files=files)

    tasks = {f"t{n}": moved(locked.tasks["a"]) for n in range(8)}
    return replace(locked, base_model=moved(locked.base_model), tasks=tasks)


def test_downloads_of_nine_large_models_are_counted_and_one_is_held(family):
    recipe = recipe_of(family)
    needs = evaluation_needs(recipe, on_hub(lock(recipe), 14 * 10**9), 14 * 10**9)
    assert (needs.num_models, needs.download_bytes, needs.held_bytes) == (10, 126 * 10**9, 14 * 10**9)
    assert str(needs) == "10 models; downloads 126.0 GB of checkpoints and holds one of 14.0 GB in memory"


def test_adapter_is_held_with_its_base_model(family):
    recipe = recipe_of(family)
    locked = on_hub(lock(recipe), 10**9)
    adapter = replace(locked.tasks["t0"], adapter_config="0" * 64, files=(LockedFile("a", 10**6, ""),))
    needs = evaluation_needs(recipe, replace(locked, tasks={"a": adapter}), 10**6)
    assert (needs.download_bytes, needs.held_bytes) == (10**9 + 10**6, 10**9 + 10**6)


def test_weights_that_are_made_of_an_adapter_are_memory_and_no_mapped_file(family):
    """SmolLM2-135M and two adapters: 684 MB stated; 761 taken, 415 stated before."""
    recipe = recipe_of(family)
    locked = on_hub(lock(recipe), 10**9)
    adapter = replace(locked.tasks["t0"], adapter_config="0" * 64, files=(LockedFile("a", 10**6, ""),))
    whole = evaluation_needs(recipe, locked, 10**6)
    made = evaluation_needs(recipe, replace(locked, tasks={"a": adapter}), 10**6)
    assert (whole.made_bytes, made.made_bytes) == (0, 10**9)
    assert made.memory_bytes - whole.memory_bytes == 10**9
    assert made.resident_bytes - whole.resident_bytes == 10**9 + (made.held_bytes - whole.held_bytes)
    merged = recipe.output.model_copy(update={"format": "adapter"})
    to_adapter = evaluation_needs(recipe.model_copy(update={"output": merged}), locked, 10**6)
    assert to_adapter.made_bytes == 10**9


@pytest.mark.parametrize(("free", "output"), [(125 * 10**9, 0), (130 * 10**9, 14 * 10**9)])
def test_downloads_without_room_are_refused_before_anything_starts(family, monkeypatch, free, output):
    recipe = recipe_of(family)
    needs = evaluation_needs(recipe, on_hub(lock(recipe), 14 * 10**9), 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(family / "cache"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, free))
    with pytest.raises(EvaluationError, match=r"downloads 126\.0 GB of checkpoints.*are free"):
        check_download_room(needs, family / "merged", output)
    assert "where there is room" in check_download_room(needs, family / "merged", output - 30 * 10**9)


def test_plan_says_what_is_scored_and_what_goes_between(family):
    made = plan(recipe_of(family))
    text = explain(made)
    assert "scores       multiple-choice on a: 3 models; holds one of" in text
    assert "a space between prompt and answer, where neither has white space there" in text
    assert describe(made)["evaluation"]["download_bytes"] == 0
    named = plan(recipe_of(family, {"name": "multiple-choice", "delimiter": "\n"}))
    assert "'\\n' between prompt and answer" in explain(named)


def test_dry_run_sees_that_the_evaluator_does_not_fit(family):
    made = plan(recipe_of(family, "image-classification"))
    (found,) = [result for result in rehearse(made, None) if result.subject == "evaluator"]
    reason = "image-classification does not run models of the type 'llama'"
    assert reason in str(found.error)
    assert "one of text-classification, log-likelihood, multiple-choice, lm-eval" in str(found.error)
    with pytest.raises(EvaluationError, match=reason):
        run(recipe_of(family, "image-classification"))
    fitting = recipe_of(family)
    assert check_fits(fitting, lock(fitting)) == "multiple-choice runs models of the type llama"


def test_parts_that_would_be_random_are_refused_but_in_the_base_model(family, tmp_path):
    write_llama(tmp_path / "base")
    LlamaModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    with pytest.raises(EvaluationError, match=r"lm_head.weight is not in its files.*random"):
        load_model(ModelPlace(str(tmp_path / "base")), "AutoModelForCausalLM", "AutoTokenizer", "a test")
    recipe = recipe_of(family)
    locked, said = lock(recipe), []
    bare = replace(locked, base_model=replace(locked.base_model, reference=str(tmp_path / "base")))
    evaluate(recipe, bare, family / "a", report=said.append)
    assert "base_model lacks lm_head.weight: it is scored with random ones" in said


def test_run_announces_downloads(hub, family, tmp_path):
    for name in ("base", "a"):
        files = {path.name: path.read_bytes() for path in (family / name).iterdir()}
        hub.add_repo(f"me/needs-{name}", files=files)
    size = (family / "base" / "model.safetensors").stat().st_size
    changes = {"base_model": "me/needs-base", "tasks": [{"name": "a", "model": "me/needs-a"}]}
    recipe = recipe_of(family, **changes, output={"path": str(tmp_path / "out")})
    said = []
    run(recipe, report=said.append)
    announced = [line for line in said if line.startswith("for the scores")]
    assert announced == [
        f"for the scores: 3 models; downloads {2 * size / 1000:.1f} kB of checkpoints and holds one of "
        f"{size / 1000:.1f} kB in memory"
    ]
    assert said.index(announced[0]) < next(n for n, line in enumerate(said) if line.startswith("scoring"))
    again = []
    run(recipe, report=again.append)
    assert not [line for line in again if line.startswith("for the scores")]


def test_dry_run_sees_that_a_column_is_missing(family):
    (found,) = [c for c in rehearse(plan(recipe_of(family, "log-likelihood")), None) if c.subject == "data"]
    assert "there is no column 'text', which the evaluator reads" in str(found.error)
    rows = {"dataset": str(family / "rows.jsonl"), "input_column": "question"}
    named = recipe_of(family, evaluation={"evaluator": "log-likelihood", "tasks": {"a": rows}})
    (found,) = [c for c in rehearse(plan(named), None) if c.subject == "data"]
    assert found.error is None


def test_memory_of_a_batch_is_told_for_each_token_of_texts(family):
    rows = {"text": ["a good film"]}
    Dataset.from_dict(rows).to_json(family / "texts.jsonl")
    evaluation = {"evaluator": "log-likelihood", "batch_size": 3}
    evaluation["tasks"] = {"a": {"dataset": str(family / "texts.jsonl")}}
    made = plan(recipe_of(family, evaluation=evaluation))
    config = json.loads((family / "base" / "config.json").read_text())
    vocabulary, width, between = (config[key] for key in ("vocab_size", "hidden_size", "intermediate_size"))
    expected = 3 * (4 * vocabulary + 24 * width + 12 * between) + 16 * vocabulary
    assert describe(made)["evaluation"]["token_bytes"] == expected
    assert f"about {format_bytes(expected)} for each token of its longest text; more" in explain(made)
    assert bytes_of_token({}, 3) == 0 and bytes_of_token({"text_config": config}, 3) == expected
    assert "for each answer of an example" in explain(plan(recipe_of(family)))


#: Takes a folder, and prints what is stated and taken by texts of one batch.
BATCH = """
import json, sys
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.needs import bytes_of_token
from hub_magmax.evaluation.evaluators import make_evaluator
from hub_magmax.evaluation.evaluators.likelihoods import Row, log_likelihoods
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.merging.profile import MemoryWatch

evaluator = make_evaluator("log-likelihood", {})
model = load_model(ModelPlace(sys.argv[1]), evaluator.model_class, evaluator.processor_class, "a test")
log_likelihoods(model, [Row([1, 2, 3], 1)])
with MemoryWatch() as watch:
    before = watch.peak_bytes
    log_likelihoods(model, [Row([1 + n, *[2] * 96], 1) for n in range(16)])
print(json.dumps([bytes_of_token(model.network.config.to_dict(), 16) * 96, watch.peak_bytes - before]))
"""


def test_memory_of_a_batch_is_what_it_takes_within_a_quarter(family, tmp_path):
    shutil.copytree(family / "base", tmp_path / "base")
    config = LlamaConfig(
        vocab_size=30_000, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, "-c", BATCH, str(tmp_path / "base")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stated, taken = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 <= stated / taken <= 1.25, f"{stated / 1e6:.0f} MB stated, {taken / 1e6:.0f} taken"
