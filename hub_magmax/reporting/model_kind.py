"""Kind of a merged model: library and class that load it, task, and processor of the inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.config import CONFIG_NAME, MAX_CONFIG_BYTES, stated_architecture, values_of
from hub_magmax.checkpoints.side_files import MODULES_NAME, is_tokenizer_file
from hub_magmax.recipe.lockfile import LockedSource

#: Configuration of a sentence-transformers model, which says which of its classes it is.
_SENTENCE_CONFIG = "config_sentence_transformers.json"

_TOKENIZER_CONFIG = "tokenizer_config.json"

#: File of a tokenizer's chat template; older ones are in its configuration.
CHAT_NAME = "chat_template.jinja"

_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")

_CONTRASTIVE = "Align|AltCLIP|Blip|ChineseCLIP|CLIP|CLIPSeg|MetaClip2|Siglip2?|Tipsv2"
_SPEECH = "Data2VecAudio|Hubert|SEW|UniSpeech|Wav2Vec2|WavLM"

#: Classes of transformers, as patterns, with the automatic class that gives them and the Hub's name of their
#: task; the first that fits counts. A class that is not here is loaded by its own name, which is never wrong.
_CLASSES = tuple(
    (re.compile(pattern), loader and f"AutoModelFor{loader}", task)
    for pattern, loader, task in (
        (r"(?!Mistral4).*(ForCausalLM|(?<!With)LMHeadModel)", "CausalLM", "text-generation"),
        (r".*(ForMaskedLM|WithLMHeadModel)", "MaskedLM", "fill-mask"),
        (rf"({_SPEECH}).*ForSequenceClassification", "AudioClassification", "audio-classification"),
        (r".*ForAudioClassification", "AudioClassification", "audio-classification"),
        (r".*ForSequenceClassification", "SequenceClassification", "text-classification"),
        (r".*ForTokenClassification", "TokenClassification", "token-classification"),
        (r"(LayoutLM|Tapas)ForQuestionAnswering", "", ""),
        (r"(Blip|Vilt)ForQuestionAnswering", "", "visual-question-answering"),
        (r".*ForQuestionAnswering", "QuestionAnswering", "question-answering"),
        (r".*ForMultipleChoice", "MultipleChoice", ""),
        (r".*ForImageClassification", "ImageClassification", "image-classification"),
        (r".*ForSemanticSegmentation", "SemanticSegmentation", "image-segmentation"),
        (r".*ForDepthEstimation", "DepthEstimation", "depth-estimation"),
        (r".*ForVideoClassification", "VideoClassification", "video-classification"),
        (r"(?:MM)?(GroundingDino|OmDetTurbo|Owl).*ForObjectDetection", "", "zero-shot-object-detection"),
        (r".*ForObjectDetection", "ObjectDetection", "object-detection"),
        (r".*ForCTC", "CTC", "automatic-speech-recognition"),
        (r"(Whisper|Speech2Text|Moonshine).*Generation", "SpeechSeq2Seq", "automatic-speech-recognition"),
        (rf"({_CONTRASTIVE})Model", "ZeroShotImageClassification", "zero-shot-image-classification"),
    )
)  # fmt: skip

#: The same where only the evaluation tells what the model is.
_BY_TASK = {task: loader for _, loader, task in reversed(_CLASSES) if loader and task}


@dataclass(frozen=True)
class ModelFiles:
    """Files of a merged model by which its kind is known.

    Attributes:
        names: Of the files beside its weights.
        config: Values of its config.json.
        sentence_config: Values of `config_sentence_transformers.json`.
        tokenizer_config: Values of `tokenizer_config.json`.
    """

    names: frozenset[str]
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sentence_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a chat template, in a file of its own or in its configuration."""
        return CHAT_NAME in self.names or bool(self.tokenizer_config.get("chat_template"))


def files_in(folder: Path) -> ModelFiles:
    """Return the files of a merged folder."""
    names = frozenset(path.name for path in folder.iterdir() if path.is_file())
    stated = (_stated(folder / name) for name in (CONFIG_NAME, _SENTENCE_CONFIG, _TOKENIZER_CONFIG))
    return ModelFiles(names, *stated)


def _stated(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        return values_of(file.read(MAX_CONFIG_BYTES))


def locked_files(source: LockedSource) -> ModelFiles:
    """Return the files of a source as far as the lock tells."""
    stated = {"model_type": source.model_type, "architectures": list(source.architectures)}
    return ModelFiles(frozenset(source.side_files), stated)


@dataclass(frozen=True)
class ModelKind:
    """Kind of a model, and the class that loads it.

    Attributes:
        library: `transformers`, `sentence-transformers`, `diffusers`, or empty: a file of tensors.
        model_class: Class of the model as its configuration names it, or empty.
        loader: Class of the library that loads it.
        task: The Hub's name of what it does, or empty.
        inputs: Class of transformers that prepares its inputs, or empty.
        runs_code: Whether it is made by code that lies beside it.
        has_chat: Whether its tokenizer has a chat template.
    """

    library: str
    model_class: str = ""
    loader: str = ""
    task: str = ""
    inputs: str = ""
    runs_code: bool = False
    has_chat: bool = False


def kind_of(files: ModelFiles, evaluated: str = "") -> ModelKind:
    """Return the kind of a model.

    Args:
        files: Beside its weights.
        evaluated: The Hub's name of the task that it was evaluated for, if it was; other text is left out.
    """
    if not re.fullmatch(r"[a-z0-9-]{1,64}", evaluated):
        evaluated = ""
    if MODULES_NAME in files.names:
        return _sentence_encoder(files, evaluated)
    part = files.config.get("_class_name")
    if isinstance(part, str) and part.isidentifier():
        return ModelKind("diffusers", part, part, evaluated)
    model_type, classes = stated_architecture(files.config)
    model_class = next(filter(str.isidentifier, classes), "")
    if model_class or model_type or evaluated:
        return _of_transformers(files, model_class, evaluated)
    return ModelKind("")


def _of_transformers(files: ModelFiles, model_class: str, evaluated: str) -> ModelKind:
    loader, task = _known(model_class)
    custom = _custom_loader(files.config)
    loader = custom or loader or model_class or _BY_TASK.get(evaluated, "AutoModel")
    inputs = _inputs(files.names, evaluated or task)
    task = evaluated or task or _encoder_task(model_class, inputs)
    return ModelKind("transformers", model_class, loader, task, inputs, bool(custom), files.has_chat)


def _sentence_encoder(files: ModelFiles, evaluated: str) -> ModelKind:
    """Return the kind of a model of sentence-transformers, by default one that makes a vector of a text."""
    tasks = {"CrossEncoder": "text-ranking", "SparseEncoder": "feature-extraction"}
    stated = files.sentence_config.get("model_type")
    loader = stated if stated in tasks else "SentenceTransformer"
    _, classes = stated_architecture(files.config)
    task = evaluated or tasks.get(loader, "sentence-similarity")
    return ModelKind("sentence-transformers", next(iter(classes), ""), loader, task)


def _known(model_class: str) -> tuple[str, str]:
    found = ((loader, task) for pattern, loader, task in _CLASSES if pattern.fullmatch(model_class))
    return next(found, ("", ""))


def _custom_loader(config: Mapping[str, Any]) -> str:
    """Return the most special automatic class under which a configuration names code of its own."""
    named = config.get("auto_map")
    names = (
        [name for name in named if re.fullmatch(r"AutoModel\w*", str(name))]
        if isinstance(named, dict)
        else []
    )
    return max(names, key=len, default="")


def _inputs(names: frozenset[str], task: str) -> str:
    """Return the class of transformers that prepares the inputs."""
    has_tokenizer = any(map(is_tokenizer_file, names))
    if any(name in names for name in _PREPROCESSORS):
        is_image = task.startswith("image-") and not has_tokenizer
        return "AutoImageProcessor" if is_image else "AutoProcessor"
    if has_tokenizer:
        return "AutoTokenizer"
    return "" if names else _EVALUATED_INPUTS.get(task, "")


#: Where no file is known, the processor that the evaluation of such a task has loaded.
_EVALUATED_INPUTS = {
    "image-classification": "AutoImageProcessor",
    "text-classification": "AutoTokenizer",
    "text-generation": "AutoTokenizer",
    "zero-shot-image-classification": "AutoProcessor",
}


def _encoder_task(model_class: str, inputs: str) -> str:
    """Return the task of a model without a head, such as BertModel, and of one that writes text."""
    if re.fullmatch(r"\w*ForConditionalGeneration", model_class):
        return "text-generation" if inputs == "AutoTokenizer" else ""
    if not re.fullmatch(r"\w+Model", model_class):
        return ""
    return {"AutoTokenizer": "feature-extraction"}.get(inputs, "")
