"""Scores of language models compared with those of lm-eval, on a tiny Llama and data made here.

    python -m benchmarks.lm_eval_agreement            # needs pip install "hub-magmax[lm-eval]"
    python -m benchmarks.lm_eval_agreement --write    # and store it in benchmarks/results/

The model is in float64, so that the two may differ only by the order of sums: by 1e-12 at most, relatively.
Of a multiple-choice task whether each answer is right is compared, of a likelihood task the log-likelihood of
each answer. Both read the same file with the same template; choices with and without a space of their own,
prompts with white space at their end, and prompts beyond the context are among them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.data import load_examples
from hub_magmax.evaluation.evaluators import columns_of, make_evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.recipe.values import Data
from tests.tiny_llama import write_llama

RESULTS = Path(__file__).parent / "results" / "lm_eval_agreement.json"

_WORDS = ("a", "good", "film", "bad", "odd", "one", "review", "answer:", "was", "it?")
_TEMPLATE = "review: {{ question }}\nanswer:"


@dataclass(frozen=True)
class Case:
    """One task: how lm-eval names it, and how a recipe does.

    Attributes:
        name: For people.
        evaluator, options: As in a recipe.
        output_type: What lm-eval calls it.
        delimiter: Between prompt and answer, in lm-eval's task.
        space: Every answer begins with it.
        num_examples: How many are made.
        data: Further keys of the recipe's data.
    """

    name: str
    evaluator: str
    output_type: str
    delimiter: str = " "
    space: str = ""
    num_examples: int = 60
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=lambda: {"template": _TEMPLATE})


CASES = (
    Case("multiple choice", "multiple-choice", "multiple_choice"),
    Case("multiple choice with spaces in the data", "multiple-choice", "multiple_choice", "", " "),
    Case(
        "multiple choice on new lines",
        "multiple-choice",
        "multiple_choice",
        "\n",
        options={"delimiter": "\n"},
    ),
    Case("likelihood", "log-likelihood", "loglikelihood"),
    Case("likelihood with spaces in the data", "log-likelihood", "loglikelihood", "", " "),
    Case(
        "likelihood after white space",
        "log-likelihood",
        "loglikelihood",
        "",
        data={"prompt_column": "question"},
    ),
)


def compared(case: Case, folder: Path) -> tuple[list[float], list[float]]:
    """Return what each example scores here and in lm-eval, from files written into `folder`."""
    write_llama(folder / "model", context=48, dtype=torch.float64)
    path = folder / "rows.jsonl"
    Dataset.from_list(_rows(case)).to_json(path)
    model = load_model(
        ModelPlace(str(folder / "model")), "AutoModelForCausalLM", "AutoTokenizer", "a comparison"
    )
    return _ours(case, model, path), _theirs(case, model, path)


def _rows(case: Case) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(least, most)))

    rows = []
    for number in range(case.num_examples):
        question = text(60, 80) if number % 10 == 0 else text(1, 9)
        if not case.space and not case.delimiter:
            question += " "
        choices = [case.space + text(1, 4) for _ in range(4)]
        rows.append(
            {"question": question, "choices": choices, "label": draw.randrange(4), "text": choices[0]}
        )
    return rows


def _ours(case: Case, model: LoadedModel, path: Path) -> list[float]:
    data = Data(dataset=str(path), **case.data)
    examples = load_examples(data, path.parent, labelled=False)
    evaluator = make_evaluator(case.evaluator, case.options)
    batches = list(evaluator.encode(model, examples, columns_of(data), 16))
    scores = [outcome.score for outcome in evaluator.outcomes(model, batches)]
    if case.evaluator == "multiple-choice":
        return scores
    counted = [text.row.num_counted for batch in batches for text in batch]
    return [score * count for score, count in zip(scores, counted, strict=True)]  # sums, as lm-eval has them


def _theirs(case: Case, model: LoadedModel, path: Path) -> list[float]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    is_choice = case.evaluator == "multiple-choice"
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": case.output_type,
        "target_delimiter": case.delimiter,
        "doc_to_text": case.data.get("template", "{{question}}"),
        # Of a likelihood task lm-eval leaves its own delimiter out.
        "doc_to_target": "label" if is_choice else case.delimiter + "{{text}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    } | ({"doc_to_choice": "choices"} if is_choice else {})
    found = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=model.network,
            tokenizer=model.processor,
            batch_size=8,
            device="cpu",
            logits_cache=False,  # lm-eval 0.4.13 mixes up prompts that differ by one token with it
        ),
        tasks=[task],
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    if is_choice:
        return [float(sample["acc"]) for sample in samples]
    return [float(sample["filtered_resps"][0][0]) for sample in samples]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="store the result")
    chosen = parser.parse_args(arguments)
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = compared(case, Path(folder))
        largest = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
        rows.append(
            {"case": case.name, "examples": len(ours), "mean": sum(ours) / len(ours), "difference": largest}
        )
        print(f"{case.name:<42} {rows[-1]['mean']:.12f}  largest difference {largest:.1e}")
    if chosen.write:
        packages = ("lm_eval", "torch", "transformers")
        result = {"versions": {name: version(name) for name in packages}, "cases": rows}
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
