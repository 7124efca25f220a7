"""Models that answer one input at a time, with settings under which the same input gives the same bits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME
from hub_magmax.checkpoints.locations import Location, Pin, locate
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.errors import ArgumentError, EvaluationError, HubMagmaxError
from hub_magmax.evaluation.evaluators.classification import ImageClassification, TextClassification
from hub_magmax.evaluation.evaluators.likelihoods import context_of
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.evaluation.evaluators.prompts import Prompter
from hub_magmax.evaluation.models import with_adapter
from hub_magmax.fleet.adapted import base_of
from hub_magmax.fleet.decision_record import Header
from hub_magmax.fleet.model_contents import CUBLAS_WORKSPACE, Based, contents_of, environment_of
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.reporting.model_kind import ModelFiles, kind_of
from hub_magmax.text import listed, without_secrets

IMAGES, TEXTS, GENERATION = "image-classification", "text-classification", "text-generation"

#: Tasks, with the classes of transformers that load the model and what prepares its inputs.
TASKS: Mapping[str, tuple[str, str]] = {
    IMAGES: ("AutoModelForImageClassification", "AutoImageProcessor"),
    TEXTS: ("AutoModelForSequenceClassification", "AutoTokenizer"),
    GENERATION: ("AutoModelForCausalLM", "AutoTokenizer"),
}

#: Columns of data in which inputs are looked for.
INPUT_COLUMNS: Mapping[str, str] = {IMAGES: "image", TEXTS: "text", GENERATION: "text"}

#: Settings of torch while a model answers.
DETERMINISTIC: Mapping[str, Any] = {
    "deterministic_algorithms": True,
    "cudnn_benchmark": False,
    "float32_matmul_precision": "highest",
}


@dataclass(frozen=True)
class Decoding:
    """How a language model's answer is decoded; classifiers have no such settings.

    Attributes:
        max_new_tokens: Where an answer is cut off.
        temperature: Of the draws; None takes the most probable token each time.
        top_p: Tokens are drawn from the most probable ones whose probabilities sum to it.
        seed: Of the first decision's draws; each later one has the next number.
        chat: Texts are a user's turn in the model's chat template.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature is None or 0 < self.temperature < math.inf, "above 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        }
        for name, (is_right, expected) in rules.items():
            if not is_right:
                raise ArgumentError(f"{name} is {getattr(self, name)}", expected=f"a number {expected}")
        if self.temperature is None and self.top_p != 1:
            raise ArgumentError(
                "top_p counts where tokens are drawn, and none are", hint="Give a temperature too."
            )

    def seed_of(self, number: int) -> int | None:
        """Return the seed of a decision by its number from 0; None where nothing is drawn."""
        return None if self.temperature is None else (self.seed + number) % 2**63

    def to_dict(self) -> dict[str, Any]:
        """Return what a record says; the seed is that of each decision."""
        draws = self.temperature is not None
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": draws,
            "num_beams": 1,
            "chat": self.chat,
            "temperature": self.temperature,
            "top_p": self.top_p if draws else None,
            "top_k": 0 if draws else None,  # every token, whatever the model's own settings say
        }

    @classmethod
    def from_dict(cls, stated: Mapping[str, Any]) -> Decoding:
        top_p = 1.0 if stated["top_p"] is None else stated["top_p"]
        return cls(stated["max_new_tokens"], stated["temperature"], top_p, chat=stated["chat"])


@dataclass(frozen=True)
class Predictor:
    """A loaded model that answers.

    Attributes:
        task: One of `TASKS`.
        model: With its tokenizer or image processor.
        header: What all its decisions have in common.
        decoding: Of a language model's answers.
    """

    task: str
    model: LoadedModel
    header: Header
    decoding: Decoding

    def answer(self, asked: Any, seed: int | None) -> dict[str, Any]:
        """Return the answer to one text or image, which is run alone: no other input is in its batch.

        Raises:
            EvaluationError: If the model cannot be run on it.
        """
        try:
            with deterministic(), torch.inference_mode():
                if self.task == GENERATION:
                    return _generated(self.model, asked, self.decoding, seed)
                return _classified(self.model, self.task, asked)
        except HubMagmaxError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().split("\n")[0][:300]
            raise EvaluationError(
                f"the model cannot be run on this input ({reason})", where=self.model.name
            ) from error


def place_of(model: str) -> Location:
    """Return where a model is, pinned: a folder, or a name on the Hub, as a recipe writes it.

    Raises:
        RecipeError, SourceError: If the name is malformed, or nothing is there.
    """
    with taken_for_repository(model, Path()):
        return locate(model, Path()).pinned()


def load_predictor(
    location: Location, written: str, decoding: Decoding | None = None, expected: str | None = None
) -> Predictor:
    """Load a model that answers; an adapter over the base model that its configuration names.

    Args:
        location: From `place_of`.
        written: Its name.
        decoding: Of a language model's answers; the most probable tokens by default.
        expected: The task that it has to be of; any if None.

    Raises:
        EvaluationError: If it is of another kind, or cannot be loaded.
        SourceError: If it, or the base model of an adapter, is not there.
        CheckpointError, MismatchError: If an adapter does not fit its base model.
    """
    with closing(location.open()) as source:
        if ADAPTER_CONFIG_NAME not in source.sizes:
            task = _task_of(source, written, expected)
            loaded = load_model(location.model_place, *TASKS[task], "predictions")
            return _predictor(task, loaded, location, written, decoding)
        name, base = base_of(source)
        with closing(base.open()) as below:
            task = _task_of(below, name, expected)
            loaded = load_model(base.model_place, *TASKS[task], "predictions", accepts_misnamed=True)
            loaded = with_adapter(loaded, below, source, location.model_place)
            based = Based(name, base.pin.commit, below)
            return _predictor(task, loaded, location, written, decoding, based)


def _task_of(source: FileSource, written: str, expected: str | None) -> str:
    """Return of which task a model is, by its files."""
    found = kind_of(ModelFiles(frozenset(source.sizes), stated_config(source)))
    task = next((task for task, (loader, _) in TASKS.items() if loader == found.loader), None)
    if task is None or expected not in (None, task):
        raise _other_kind(found.model_class or found.task, written, expected)
    return task


def from_pipeline(pipeline: Any, decoding: Decoding | None = None) -> Predictor:
    """Return a predictor of a transformers pipeline's model and tokenizer, or image processor.

    Files are looked at where the pipeline says it has them from; their digests are null if it does not say.

    Raises:
        ArgumentError: If it is no pipeline.
        EvaluationError: If it is one of another task.
    """
    network: Any = getattr(pipeline, "model", None)
    task = getattr(pipeline, "task", None)
    if not (isinstance(task, str) and hasattr(network, "state_dict")):
        raise ArgumentError(
            f"this is a {type(pipeline).__name__}",
            where="recording, model",
            expected="a pipeline of transformers, or the name of a model",
        )
    task = TEXTS if task == "sentiment-analysis" else task
    if task not in TASKS:
        raise _other_kind(task, "pipeline")
    written = str(getattr(network.config, "_name_or_path", ""))
    if getattr(network, "peft_config", None):
        raise _adapter_refused(written or "pipeline")
    processor = pipeline.image_processor if task == IMAGES else pipeline.tokenizer
    loaded = LoadedModel(network.eval(), processor, written or "pipeline")
    return _predictor(task, loaded, _place_of(network, written), written, decoding)


def _place_of(network: Any, written: str) -> Location | None:
    """Return where a model in memory says that it was loaded from; None if it is not there."""
    commit = getattr(network.config, "_commit_hash", None)
    try:
        return locate(f"{written}@{commit}" if commit else written, Path()).pinned() if written else None
    except HubMagmaxError:
        return None


def _predictor(
    task: str,
    loaded: LoadedModel,
    location: Location | None,
    written: str,
    decoding: Decoding | None,
    base: Based | None = None,
) -> Predictor:
    decoding = decoding or Decoding()
    _check_decoding(task, loaded, decoding)
    if loaded.device.type == "cuda":
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # which counts if cuBLAS was not used before
    pin, kind, contents = Pin(), None, None
    if location is not None:
        pin, kind = location.pin, location.name
        with closing(location.open()) as source:
            contents = contents_of(source, loaded, base)
    place = {"place": without_secrets(written) or None, "kind": kind, **pin._asdict(), "task": task}
    settings = {GENERATION: decoding.to_dict(), TEXTS: {"truncation": True}}.get(task, {})
    settings |= {"batch_size": 1, "torch": dict(DETERMINISTIC)}
    header = Header(place, contents or contents_of(None, loaded), settings, environment_of(loaded))
    return Predictor(task, loaded, header, decoding)


def _check_decoding(task: str, loaded: LoadedModel, decoding: Decoding) -> None:
    if task != GENERATION and decoding != Decoding():
        raise ArgumentError(
            "settings of generation are given to a classifier", where=loaded.name, hint="Leave them out."
        )
    if decoding.chat and not getattr(loaded.processor, "chat_template", None):
        raise EvaluationError(
            "the tokenizer has no chat template, and one is asked for",
            where=loaded.name,
            hint="Leave chat out, and write the turns in the texts.",
        )


def _adapter_refused(where: str) -> EvaluationError:
    return EvaluationError(
        "this is an adapter in memory, whose base model is not known",
        where=where,
        expected="a whole model",
        hint="Name the adapter's folder instead: its adapter_config.json names the base model.",
    )


def _other_kind(found: str, where: str, expected: str | None = None) -> EvaluationError:
    return EvaluationError(
        f"decisions of {found or 'a model of an unknown kind'} are not "
        + ("those that were recorded" if expected else "recorded"),
        where=where,
        expected=f"a model for {expected or listed(list(TASKS))}, as `architectures` in its config.json says",
    )


@contextmanager
def deterministic() -> Iterator[None]:
    """Set `DETERMINISTIC`, and what was set before at the end.

    An operation that has no deterministic form runs all the same, and torch warns of it.
    """
    was_on, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(precision)


def _classified(model: LoadedModel, task: str, asked: Any) -> dict[str, Any]:
    """Return the label of the largest output, and all outputs before any softmax, in order of the classes."""
    evaluator = ImageClassification() if task == IMAGES else TextClassification()
    (encoded,), (is_cut,) = evaluator.encode_inputs(model, [asked])
    # Pixels in the dtype of the weights.
    moved = {
        name: value.to(model.device, model.network.dtype if value.is_floating_point() else None)
        for name, value in encoded.items()
    }
    logits = model.output(**moved).logits[0].float().cpu()
    config = model.network.config
    found: dict[str, Any] = {"scores": [_exact(value) for value in logits.tolist()]}
    if task == TEXTS:
        found["is_cut"] = is_cut
    # With one output, or several labels at once, the largest output is no answer by itself.
    if len(logits) > 1 and getattr(config, "problem_type", None) in (None, "single_label_classification"):
        found["label"] = config.id2label[int(logits.argmax())]
    return found


def _exact(value: float) -> float | str:
    """Return a float32 as the decimal number that is exactly it; NaN and infinities as words."""
    return value if math.isfinite(value) else str(value)


def _generated(model: LoadedModel, asked: str, decoding: Decoding, seed: int | None) -> dict[str, Any]:
    """Return the tokens that follow a text, and their text without special tokens."""
    prompter = Prompter(model.processor, model.name, chat=decoding.chat)
    text = prompter.joined((), asked, "")[0]
    # A chat template has written the tokens that begin a text.
    encoded = model.processor(text, return_tensors="pt", add_special_tokens=not decoding.chat)
    num_tokens = encoded["input_ids"].shape[-1]
    _check_length(model, num_tokens, decoding)
    stated = {key: value for key, value in decoding.to_dict().items() if key != "chat" and value is not None}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        answer = model.network.generate(
            **encoded.to(model.device), **stated, num_return_sequences=1, return_dict_in_generate=False
        )
    tokens = answer[0, num_tokens:].tolist()
    return {"tokens": tokens, "text": model.processor.decode(tokens, skip_special_tokens=True)}


def _check_length(model: LoadedModel, num_tokens: int, decoding: Decoding) -> None:
    limit = context_of(model)
    if num_tokens == 0:
        raise EvaluationError("the text has no tokens, so nothing can follow it", where="input")
    if limit is not None and num_tokens + decoding.max_new_tokens > limit:
        raise EvaluationError(
            f"{num_tokens} tokens of the text and {decoding.max_new_tokens} new ones are more than the "
            "model's context",
            where="input",
            expected=f"at most {limit} tokens",
            hint="Shorten the text, or lower max_new_tokens.",
        )
