"""Examples of four tasks of a language model: in three an answer is chosen, in one a call is written."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.blindspots import CLASSES, NUM_TEST, NUM_TRAIN, Rows, definitions
from hub_magmax.files import sha256_of

#: Classes of definitions of verbs, by their numbers in WordNet (lexnames(5WN)).
VERBS = {"change": 30, "communication": 32, "contact": 35, "motion": 38}

#: Answers of the tasks of choice, each of which is one token; FORMAT generates its answer.
CHOICES = {"nouns": tuple(CLASSES), "verbs": tuple(VERBS), "films": ("positive", "negative")}
FORMAT = "calls"
TASKS = (*CHOICES, FORMAT)

#: Requests by the tool that they call, with the numbers in the order of the call's arguments.
TOOLS: Mapping[str, tuple[str, ...]] = {
    "add": ("add {0} and {1}", "what is {0} plus {1}", "the sum of {0} and {1}"),
    "subtract": ("take {1} from {0}", "what is {0} minus {1}", "how much more is {0} than {1}"),
    "multiply": ("multiply {0} by {1}", "what is {0} times {1}", "the product of {0} and {1}"),
    "divide": ("divide {0} by {1}", "share {0} among {1}", "how many times does {1} go into {0}"),
    "maximum": ("the larger of {0} and {1}", "which is more, {0} or {1}", "the most of {0} and {1}"),
    "minimum": ("the smaller of {0} and {1}", "which is less, {0} or {1}", "the least of {0} and {1}"),
}


@dataclass(frozen=True)
class Sources:
    """Places of the packages' files."""

    llm: Path
    wordnet: Path
    films: Path

    def digests(self) -> dict[str, str]:
        """Return the first 16 digits of the sha256 of every file that is read."""
        files = (*self.llm.glob("*.gguf"), *(self.wordnet / f"data.{kind}" for kind in ("noun", "verb")))
        return {path.name: sha256_of(path)[:16] for path in (*files, self.films)}

    def rows(self, seed: int) -> dict[str, Rows]:
        """Return the examples of every task: those to test, to validate and to train with, in this order."""
        return {
            "nouns": definitions(self.wordnet / "data.noun", seed),
            "verbs": definitions(self.wordnet / "data.verb", seed, VERBS, "Verb: {}\nKind:"),
            "films": films(self.films, seed),
            FORMAT: calls(seed),
        }


def calls(seed: int) -> Rows:
    """Return requests with the calls that answer them, each of which is there once."""
    kinds = [(tool, phrase) for tool, phrases in TOOLS.items() for phrase in phrases]
    every = list(product(kinds, range(2, 100), range(2, 100)))
    rows = []
    for (tool, phrase), *pair in random.Random(f"{seed} calls").sample(every, NUM_TEST + NUM_TRAIN):
        call = json.dumps({"tool": tool, "arguments": pair})
        rows.append({"prompt": f"Request: {phrase.format(*pair)}\nCall:", "answer": f"{call}\n"})
    return rows


def films(archive: Path, seed: int) -> Rows:
    """Return short sentences about films that people found positive or negative, in turn."""
    rated = [(rating, text) for rating, text in _ratings(archive) if 20 <= len(text) <= 80]
    draws, sides = random.Random(f"{seed} films"), []
    for sign, answer in zip((1, -1), CHOICES["films"], strict=True):
        texts = sorted({text for rating, text in rated if sign * rating >= 0.5})
        chosen = draws.sample(texts, (NUM_TEST + NUM_TRAIN) // 2)
        sides.append([{"prompt": f"Review: {text}\nSentiment:", "answer": answer} for text in chosen])
    return [row for pair in zip(*sides, strict=True) for row in pair]


def _ratings(archive: Path) -> Iterator[tuple[float, str]]:
    """Yield mean rating, from -4 to 4, and text of every sentence about a film."""
    with zipfile.ZipFile(archive) as outer:
        inner = next(name for name in outer.namelist() if name.endswith(".tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as files:
            name = next(n for n in files.getnames() if n.endswith("movieReviewSnippets_GroundTruth.txt"))
            found = files.extractfile(name)
            assert found is not None
            lines = found.read().decode("latin-1").splitlines()
    for line in lines:
        _, rating, text = line.split("\t", 2)
        yield float(rating), text.strip()
