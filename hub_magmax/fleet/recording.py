"""Decisions recorded while a model answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from hub_magmax.errors import ArgumentError
from hub_magmax.files import check_files
from hub_magmax.fleet.decision_inputs import stored_input
from hub_magmax.fleet.decision_record import Decision, RecordWriter, check_record, open_record
from hub_magmax.fleet.predicting import IMAGES, Decoding, Predictor, from_pipeline, load_predictor, place_of
from hub_magmax.recipe.arguments import checked


@checked
def recording(
    model: Any,
    record: Path,
    *,
    digest_inputs: bool = False,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> AbstractContextManager[Recorder]:
    """Return a context manager that yields a `Recorder`, which answers one input at a time.

    An answer is returned after it is on the disk, so that a kill loses at most the decision under way. The
    model's digests, and the number of threads, are those of the beginning: leave both alone meanwhile.

    Args:
        model: A pipeline of transformers (text-classification, image-classification, text-generation), whose
            model and tokenizer are run without the pipeline's own steps before and after; or the name of a
            model, a folder or a repository on the Hub.
        record: File to write, or to go on with.
        digest_inputs: Keep the sha256 of every input in place of the input.
        max_new_tokens: Where an answer of a language model is cut off.
        temperature: Of random draws of tokens; None takes the most probable token each time.
        top_p: Tokens are drawn from the most probable ones whose probabilities sum to it.
        seed: Of the first decision's draws; each later one has the next number.
        chat: Texts are a user's turn in the model's chat template.

    Raises:
        ArgumentError: If it is no pipeline, or a setting is out of range.
        EvaluationError: If the model is of another kind, or cannot be loaded.
        OutputError: If the record cannot be written.
        RecordError: If it is no record, or a broken one.
    """
    decoding = Decoding(max_new_tokens, temperature, top_p, seed, chat)
    check_place(record)
    if isinstance(model, str | Path):
        predictor = load_predictor(place_of(str(model)), str(model), decoding)
    else:
        predictor = from_pipeline(model, decoding)
    return record_of(predictor, record, digest_inputs=digest_inputs)


def check_place(record: Path) -> None:
    """Raise OutputError or RecordError where nothing can be recorded; called before a model is loaded."""
    check_files([record])
    if record.exists():
        check_record(record)


@contextmanager
def record_of(predictor: Predictor, record: Path, *, digest_inputs: bool) -> Iterator[Recorder]:
    """Yield what asks a predictor and records its decisions."""
    with open_record(record) as writer:
        yield Recorder(predictor, writer, digest_inputs=digest_inputs)


class Recorder:
    """A model that answers, and whose every answer is on the disk before it is returned.

    Threads that ask at once are answered one after the other.

    Attributes:
        num_decisions: How many were recorded.
    """

    def __init__(self, predictor: Predictor, writer: RecordWriter, *, digest_inputs: bool) -> None:
        self.num_decisions = 0
        self._predictor, self._writer, self._digest_inputs = predictor, writer, digest_inputs
        self._turn = Lock()

    @property
    def last(self) -> str | None:
        """The sha256 of the record's last line, to be kept elsewhere; None while it has none."""
        return self._writer.last

    def __call__(self, asked: Any) -> dict[str, Any]:
        """Return the answer to a text, or to an image of Pillow.

        That is `label` and `scores` of a classifier, `tokens` and `text` of a language model.

        Raises:
            ArgumentError: If it is neither.
            EvaluationError: If the model cannot be run on it.
            OutputError: If it cannot be recorded.
        """
        self._check(asked)
        stored = stored_input(asked, digest_only=self._digest_inputs)
        with self._turn:
            seed = self._predictor.decoding.seed_of(self.num_decisions)
            output = self._predictor.answer(asked, seed)
            header = self._predictor.header
            self._writer.add(header)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._writer.add(Decision(header.digest, stored, seed, output, now))
            self.num_decisions += 1
        return output

    def _check(self, asked: Any) -> None:
        from PIL.Image import Image

        is_image = self._predictor.task == IMAGES
        if not isinstance(asked, Image if is_image else str):
            raise ArgumentError(
                f"this is a {type(asked).__name__}",
                where="input",
                expected="an image of Pillow" if is_image else "a text",
            )
