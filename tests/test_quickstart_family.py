"""The digits benchmark, with training runs too short to learn much; one slow test learns for real."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import PartialState
from datasets import ClassLabel, load_dataset
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hub_magmax.errors import (
    CheckpointError,
    DistributedError,
    MissingDependencyError,
    OutputError,
    RecipeError,
)
from hub_magmax.files import sha256_of
from hub_magmax.processes import Processes
from hub_magmax.quickstart import DigitsFamily, Settings, Training, make_family
from hub_magmax.quickstart import family as family_module
from hub_magmax.quickstart.digits import load_examples

TINY = Settings(
    hidden_size=16,
    num_layers=1,
    pretext=Training(epochs=1, learning_rate=1e-3, batch_size=256),
    supervised=Training(epochs=1, learning_rate=1e-3, batch_size=64),
    task=Training(epochs=1, learning_rate=1e-3, batch_size=64, label_smoothing=0.05),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DigitsFamily:
    return make_family(tmp_path_factory.mktemp("digits"), settings=TINY)


def checkpoints(family: DigitsFamily) -> tuple[Path, ...]:
    return (family.base_model, *family.tasks.values())


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def labels(family: DigitsFamily, config: str, split: str) -> list[int]:
    return list(load_dataset(str(family.data), config, split=split)["label"])


def pixels(family: DigitsFamily, config: str, split: str) -> list[bytes]:
    return [image.tobytes() for image in load_dataset(str(family.data), config, split=split)["image"]]


def test_five_tasks_of_two_digits_are_named_after_their_digits(made: DigitsFamily):
    assert dict(made.classes) == {
        "zero-one": (0, 1),
        "two-three": (2, 3),
        "four-five": (4, 5),
        "six-seven": (6, 7),
        "eight-nine": (8, 9),
    }
    assert list(made.tasks) == list(made.classes)


def test_ten_tasks_have_one_digit_each(tmp_path: Path):
    family = make_family(tmp_path, num_tasks=10, settings=TINY)

    assert list(family.classes.values()) == [(digit,) for digit in range(10)]
    assert set(labels(family, "seven", "test")) == {7}


def test_a_checkpoint_folder_holds_a_model_a_processor_and_a_card(made: DigitsFamily):
    for checkpoint in checkpoints(made):
        assert {path.name for path in checkpoint.iterdir()} == {
            "README.md",
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
        }
        assert (checkpoint / "README.md").read_text().startswith("---\nlicense: cc-by-4.0\n")


def test_nothing_else_is_left_in_the_folder(made: DigitsFamily):
    assert {path.name for path in made.folder.iterdir()} == {"checkpoints", "data", "family.json"}
    assert {path.name for path in (made.folder / "checkpoints").iterdir()} == {"base", *made.classes}


def test_every_checkpoint_classifies_an_image_through_the_auto_classes(made: DigitsFamily):
    example = load_dataset(str(made.data), split="test")[0]
    for checkpoint in checkpoints(made):
        model = AutoModelForImageClassification.from_pretrained(checkpoint)
        processor = AutoImageProcessor.from_pretrained(checkpoint)

        logits = model(**processor(example["image"], return_tensors="pt")).logits

        assert logits.shape == (1, 10)
        assert model.config.id2label == {digit: str(digit) for digit in range(10)}


def test_the_processor_makes_what_the_models_were_trained_on(made: DigitsFamily):
    examples = load_examples()
    images = [Image.fromarray(image.numpy()) for image in examples.pixels[:20]]

    processed = AutoImageProcessor.from_pretrained(made.base_model)(images, return_tensors="pt")

    torch.testing.assert_close(processed["pixel_values"], examples.images[:20])
    assert processed["pixel_values"].amin() == -1
    assert processed["pixel_values"].amax() == 1


def test_all_checkpoints_share_an_orthogonal_head_without_bias(made: DigitsFamily):
    heads = [AutoModelForImageClassification.from_pretrained(c).classifier for c in checkpoints(made)]

    for head in heads:
        assert torch.equal(head.weight, heads[0].weight)
        assert not head.bias.any()
    expected = torch.eye(10) * TINY.head_scale**2
    torch.testing.assert_close(heads[0].weight @ heads[0].weight.T, expected, rtol=0, atol=1e-4)


def test_every_task_moves_every_tensor_outside_the_head(made: DigitsFamily):
    states = [AutoModelForImageClassification.from_pretrained(c).state_dict() for c in checkpoints(made)]

    for before, after in pairwise(states):
        still = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
        assert still == {"classifier.weight", "classifier.bias"}


def test_every_digit_image_is_in_exactly_one_part(made: DigitsFamily):
    parts = [("all", "train"), ("all", "test"), ("pretraining", "train")]
    found = Counter(image for part in parts for image in pixels(made, *part))

    originals = (load_digits().images * 255 / 16).round().astype("uint8")
    assert found == Counter(image.tobytes() for image in originals)


def test_three_in_ten_of_each_digit_are_tested_with(made: DigitsFamily):
    counts = Counter(load_digits().target.tolist())

    tested = Counter(labels(made, "all", "test"))

    assert tested == {digit: 3 * count // 10 for digit, count in counts.items()}
    assert Counter(labels(made, "pretraining", "train")) == dict.fromkeys(range(10), TINY.num_supervised)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_tasks_divide_the_data_between_them(made: DigitsFamily, split: str):
    divided: Counter[bytes] = Counter()
    for task, digits in made.classes.items():
        assert set(labels(made, task, split)) == set(digits)
        divided += Counter(pixels(made, task, split))
    assert divided == Counter(pixels(made, "all", split))


def test_a_task_folder_is_a_data_set_of_its_own(made: DigitsFamily):
    alone = load_dataset(str(made.data / "two-three"), split="test")

    assert alone["label"][:] == labels(made, "two-three", "test")
    assert alone.features["label"] == ClassLabel(names=[str(digit) for digit in range(10)])
    assert alone[0]["image"].size == (8, 8)


def test_the_first_examples_of_a_file_are_of_all_digits(made: DigitsFamily):
    assert set(labels(made, "all", "test")[:100]) == set(range(10))


def test_the_number_of_threads_does_not_change_a_byte(made: DigitsFamily, tmp_path: Path):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        again = make_family(tmp_path, settings=TINY)
    finally:
        torch.set_num_threads(before)

    assert digests(again.folder) == digests(made.folder)


def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(made: DigitsFamily, tmp_path: Path):
    def interrupt(line: str) -> None:
        if line.startswith("two-three: accuracy"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_family(tmp_path, settings=TINY, report=interrupt)
    half_written = tmp_path / "checkpoints" / "four-five.partial"
    half_written.mkdir()
    (half_written / "stale.txt").write_text("from the interrupted call")
    lines: list[str] = []

    make_family(tmp_path, settings=TINY, report=lines.append)

    assert [line for line in lines if "already there" in line] == [
        f"{part}: already there" for part in ("data", "base", "zero-one", "two-three")
    ]
    assert digests(tmp_path) == digests(made.folder)


def test_a_finished_family_is_not_touched_again(made: DigitsFamily):
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}

    assert make_family(made.folder, settings=TINY) == made

    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before


def test_another_seed_gives_another_split_and_other_weights(made: DigitsFamily, tmp_path: Path):
    other = digests(make_family(tmp_path, seed=1, settings=TINY).folder)

    same = {name for name, digest in digests(made.folder).items() if other[name] == digest}
    assert not {name for name in same if name.endswith((".parquet", ".safetensors"))}


def test_the_process_is_left_as_it_was(made: DigitsFamily, tmp_path: Path):
    shutil.copytree(made.folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "eight-nine")
    torch.manual_seed(5)
    before = (torch.get_num_threads(), torch.get_rng_state().tolist(), dict(PartialState._shared_state))
    bars = transformers.utils.logging.is_progress_bar_enabled()

    make_family(tmp_path / "copy", settings=TINY)

    after = (torch.get_num_threads(), torch.get_rng_state().tolist(), dict(PartialState._shared_state))
    assert after == before
    assert transformers.utils.logging.is_progress_bar_enabled() == bars


def test_progress_bars_are_silent_while_it_works_and_shown_again_afterwards(monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []
    logging = transformers.utils.logging
    monkeypatch.setattr(logging, "is_progress_bar_enabled", lambda: True)
    monkeypatch.setattr(logging, "disable_progress_bar", lambda: shown.append("off"))
    monkeypatch.setattr(logging, "enable_progress_bar", lambda: shown.append("on"))

    with family_module.undisturbed():
        shown.append("work")

    assert shown == ["off", "work", "on"]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"seed": 1}, '"seed": 0 there, "seed": 1 now'),
        ({"num_tasks": 2}, '"num_tasks": 5 there, "num_tasks": 2 now'),
        ({"settings": replace(TINY, num_layers=2)}, '"num_layers": 1 there, "num_layers": 2 now'),
    ],
)
def test_other_settings_are_refused_in_the_same_folder(
    made: DigitsFamily, changed: Mapping[str, object], difference: str
):
    before = digests(made.folder)

    with pytest.raises(OutputError) as caught:
        make_family(made.folder, **{"settings": TINY, **changed})

    assert difference in str(caught.value)
    assert digests(made.folder) == before


def test_a_cut_off_file_of_settings_is_refused(tmp_path: Path):
    (tmp_path / "family.json").write_text("")

    with pytest.raises(OutputError, match="cut off"):
        make_family(tmp_path, settings=TINY)


@pytest.mark.parametrize("name", ["checkpoints", "data"])
def test_a_folder_with_something_else_in_the_way_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()

    with pytest.raises(OutputError, match=f"already has something called {name}"):
        make_family(tmp_path, settings=TINY)

    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="file"):
        make_family(tmp_path / "file" / "digits", settings=TINY)


@pytest.mark.parametrize("num_tasks", [-5, 0, 3, 20])
def test_ten_digits_are_only_divided_evenly(tmp_path: Path, num_tasks: int):
    with pytest.raises(RecipeError, match="1, 2, 5 or 10"):
        make_family(tmp_path, num_tasks=num_tasks, settings=TINY)


def test_a_damaged_checkpoint_is_named(made: DigitsFamily, tmp_path: Path):
    shutil.copytree(made.folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "eight-nine")
    weights = tmp_path / "copy" / "checkpoints" / "six-seven" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])

    with pytest.raises(CheckpointError, match="six-seven"):
        make_family(tmp_path / "copy", settings=TINY)


def test_a_missing_scikit_learn_is_said_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(MissingDependencyError, match=r'pip install "hub-magmax\[quickstart\]"'):
        make_family(tmp_path / "digits", settings=TINY)

    assert not (tmp_path / "digits").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(family_module, "find_processes", lambda: Processes(rank=1, count=2))

    with pytest.raises(DistributedError, match="one process"):
        make_family(tmp_path, settings=TINY)


@pytest.mark.slow
def test_learning_one_task_after_the_other_forgets_and_merging_recovers(quickstart_folder: Path):
    family = make_family(quickstart_folder)  # which was made with the same settings
    models = [AutoModelForImageClassification.from_pretrained(c) for c in checkpoints(family)]
    base, *tasks = [dict(model.named_parameters()) for model in models]
    weights = torch.tensor([0.9, 0.025, 0.025, 0.025, 0.025])

    def merged(rule) -> dict[str, float]:
        tensors = {
            name: start + rule(torch.stack([task[name] - start for task in tasks]))
            for name, start in base.items()
        }
        model = AutoModelForImageClassification.from_pretrained(family.base_model)
        model.load_state_dict(tensors)
        return accuracies(model, family)

    def magmax(vectors: Tensor) -> Tensor:
        return 0.5 * vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]

    before = accuracies(models[0], family)
    learned = {
        task: accuracies(model, family)[task] for task, model in zip(family.tasks, models[1:], strict=True)
    }
    last = accuracies(models[-1], family)
    together = merged(magmax)
    first = merged(lambda vectors: torch.tensordot(weights, vectors, 1))

    assert 0.3 < mean(before) < 0.75
    assert min(learned.values()) > 0.9
    assert last["zero-one"] < 0.2
    assert last["eight-nine"] > 0.9
    assert mean(last) + 0.2 < mean(together) < mean(learned)
    assert first["zero-one"] > max(0.9, together["zero-one"] + 0.1)
    assert json.loads((family.folder / "family.json").read_text())["num_tasks"] == 5


@torch.no_grad()
def accuracies(model, family: DigitsFamily) -> dict[str, float]:
    """Share of right answers over all ten classes, by task."""
    processor = AutoImageProcessor.from_pretrained(family.base_model)
    found = {}
    for task in family.tasks:
        examples = load_dataset(str(family.data), task, split="test")
        logits = model(**processor(examples["image"][:], return_tensors="pt")).logits
        found[task] = (logits.argmax(1) == torch.tensor(examples["label"][:])).double().mean().item()
    return found


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
