"""Families of packaged texts: small files of the same form, an encoder of six small layers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from benchmarks import wordnet
from benchmarks.continual import __main__ as main
from benchmarks.continual import measuring
from benchmarks.continual.frozen import FrozenStart
from benchmarks.continual.measuring import Bench
from benchmarks.continual.packaged import (
    CLEAR,
    DOMAINS,
    LANGUAGES,
    SECTIONS,
    definitions,
    languages,
    packaged_family,
    sentiment,
)
from benchmarks.continual.results import measure
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators import columns_of, get_evaluator
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.recipe.schema import Method
from tests.test_continual import PROTOCOL as SMALL
from tests.test_continual import check_row
from tests.test_walkthrough import make_sources

PROTOCOL = replace(SMALL, mixtures=((3, 1),), largest=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    yield tmp_path_factory.mktemp("packaged")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sources(folder):
    return make_sources(folder)


@pytest.fixture(scope="module")
def family(sources, folder):
    encoder, nouns = sources
    made = packaged_family("definitions", nouns, encoder, folder / "made", 2, 3)
    few = {task: data.model_copy(update={"split": "train[:20]"}) for task, data in made.statistics.items()}
    return replace(made, statistics=few, num_statistics=20)


@pytest.fixture(scope="module")
def result(family, folder):
    """Results of a few methods: tests of digits measure every one."""
    few = [Method(name="average"), Method(name="ties"), measuring.TUNABLE, measuring.TOP_N]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "tried_methods", lambda: few)
        return measure(family, PROTOCOL, folder / "scores", at="here")


def texts_of(parts):
    return [text for classes in parts.values() for texts in classes.values() for text in texts]


def test_parts_of_definitions_share_no_text(sources):
    found = definitions(sources[1], 0)
    parts = (
        [text for texts in found.head.values() for text in texts],
        *map(texts_of, (found.train, found.test)),
    )
    assert all(parts) and sum(map(len, parts)) == len({text for part in parts for text in part})
    assert [*found.hashes] == ["data.noun"] and len(found.hashes["data.noun"]) == 64


def test_sentiment_takes_clear_ratings_as_many_of_each_kind(tmp_path):
    for start in DOMAINS.values():
        rows = [(f"{start} {number}", (-1) ** number * (number % 5) / 2) for number in range(2500)]
        lines = [f"{number}\t{mean}\t{text}\n" for number, (text, mean) in enumerate(rows)]
        (tmp_path / f"{start}_GroundTruth.txt").write_text("".join(lines), encoding="latin-1")
    found = sentiment(tmp_path, 0)
    for domain in DOMAINS:
        sizes = [len(part[domain]["positive"]) for part in (found.test, found.train)]
        assert sizes == [60, 600]
    rated = dict(rows)
    for part in (found.train, found.test):
        assert [*part] == [*DOMAINS]
        for classes in part.values():
            assert len(classes["negative"]) == len(classes["positive"])
    for name, sign in (("negative", -1), ("positive", 1)):
        for part in (found.train, found.test):
            assert all(sign * rated[text] >= CLEAR for text in part["editorials"][name])
    heads, rest = (
        {*found.head["positive"], *found.head["negative"]},
        {*texts_of(found.train), *texts_of(found.test)},
    )
    assert heads and not heads & rest and not {*texts_of(found.train)} & {*texts_of(found.test)}


def test_packages_of_one_source_are_in_one_part_whatever_the_language(tmp_path):
    packages, translated = [], {language: [] for language in ("en", *LANGUAGES)}
    for number in range(400):
        section = SECTIONS[number % len(SECTIONS)]
        packages.append(f"Package: p{number}\nSource: s{number // 16} (1.0)\nSection: contrib/{section}\n\n")
        for language, entries in translated.items():
            entries.append(f"Package: p{number}\nDescription-{language}: text {number} {language}\n more\n\n")
    (tmp_path / "Packages").write_text("".join(packages))
    for language, entries in translated.items():
        (tmp_path / f"Translation-{language}").write_text("".join(entries))
    found = languages(tmp_path, 0)
    parts = (
        [text for texts in found.head.values() for text in texts],
        *map(texts_of, (found.train, found.test)),
    )
    sources_of = [{int(text.split()[1]) // 16 for text in part} for part in parts]
    assert all(sources_of) and sum(map(len, sources_of)) == len(set.union(*sources_of))
    assert {text.split()[2] for text in parts[0]} == {"en"} and [*found.train] == [*LANGUAGES]
    assert all(
        int(text.split()[1]) % len(SECTIONS) == SECTIONS.index(section)
        for classes in found.test.values()
        for section, texts in classes.items()
        for text in texts
    )


def test_a_description_of_several_parts_or_sections_is_left_out(tmp_path):
    files = {"Packages": ""} | {f"Translation-{language}": "" for language in ("en", *LANGUAGES)}
    for number in range(400):
        section = SECTIONS[number % len(SECTIONS)]
        files["Packages"] += f"Package: p{number}\nSection: {section}\n\n"
        # One text for all packages, one for each section, and one of each package.
        text = ("a package", f"a package for {section}", f"package {number}")[number // 8 % 3]
        for language in ("en", *LANGUAGES):
            files[f"Translation-{language}"] += f"Package: p{number}\nDescription-{language}: {text}\n\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = languages(tmp_path, 0)
    kept = {text for texts in found.head.values() for text in texts}
    kept |= {*texts_of(found.train), *texts_of(found.test)}
    assert kept and not any(text.startswith("a package") for text in kept)


def test_a_family_of_texts_is_measured_like_digits(family, result):
    keys = {(row["method"], row["preference"]) for row in result["rows"]}
    assert {("average", "labels"), ("average", "transport"), ("ties", "labels")} <= keys
    assert ("ties", "transport") not in keys and ("regmean", "labels") in keys
    assert result["sources"] == dict(family.sources)
    assert json.loads(json.dumps(result)) == result


def test_checkpoints_that_are_there_are_not_learned_again(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder, nouns = sources
    said = []
    for _ in range(2):
        packaged_family("definitions", nouns, encoder, Path("made"), 2, 0, report=said.append)
    assert len(said) == 3  # two tasks, and all together


def test_definitions_are_learned_to_the_byte_as_benchmarks_wordnet_learns_them(sources, family, tmp_path):
    wordnet.make_family(tmp_path, *sources, family.seed, 1)
    for name, place in (("base", family.base_model), ("living", family.tasks["living"])):
        own = tmp_path / name / "model.safetensors"
        assert own.read_bytes() == (place / "model.safetensors").read_bytes()


def test_domains_start_at_the_base_model_and_share_their_labels(sources, tmp_path):
    from safetensors.torch import load_file

    words = ["alpha", "beta", "gamma", "delta"]
    for start in DOMAINS.values():
        lines = [
            f"{n}\t{1 if n % 2 else -1}\t{start} {words[n % 4]} {words[n // 4 % 4]} {n}\n" for n in range(400)
        ]
        (tmp_path / f"{start}_GroundTruth.txt").write_text("".join(lines), encoding="latin-1")
    made = packaged_family("sentiment", tmp_path, sources[0], tmp_path / "made", 2, 0)
    assert made.kinds == ("known", "transport") and not made.classes
    base, *tasks = (
        load_file(place / "model.safetensors") for place in (made.base_model, *made.tasks.values())
    )
    assert base["classifier.weight"].shape[0] == 2
    assert torch.equal(base["classifier.weight"][0], -base["classifier.weight"][1])
    for task in tasks:
        changed = [name for name, value in task.items() if not torch.equal(value, base[name])]
        parts = {".".join(name.split(".")[:4]) for name in changed if ".layer." in name}
        assert parts == {"bert.encoder.layer.4", "bert.encoder.layer.5"}
        assert not any("embeddings" in name or "classifier" in name for name in changed)


def test_blocks_with_unchanged_weights_run_once_for_a_batch():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_labels=3,
    )  # fmt: skip
    network, other = (BertForSequenceClassification(config).eval() for _ in range(2))
    slots = dict(network.named_parameters())
    changed = ("bert.encoder.layer.2.", "bert.pooler.", "classifier.")
    unchanged = {name: value.clone() for name, value in slots.items() if not name.startswith(changed)}
    other.load_state_dict(network.state_dict())
    start, calls = FrozenStart(network, slots, unchanged), []
    for number in range(3):
        attention = network.bert.encoder.layer[number].attention
        attention.register_forward_hook(lambda *_, number=number: calls.append(number))
    first, second = (torch.tensor(rows) for rows in ([[1, 2, 3]], [[4, 5, 6]]))

    def run(tokens, **weights):
        calls.clear()
        with torch.inference_mode():
            for name, value in weights.items():
                slots[name].copy_(value)
                other.get_parameter(name).copy_(value)
            start.check(slots)
            found, wanted = network(input_ids=tokens).logits, other(input_ids=tokens).logits
        assert torch.equal(found, wanted)
        return [*calls]

    assert start.num_blocks == 2
    assert [run(first), run(first), run(second), run(first)] == [[0, 1, 2], [2], [0, 1, 2], [2]]
    last = "bert.encoder.layer.2.output.dense.bias"
    assert run(first, **{last: torch.ones(8)}) == [2]  # what is kept does not depend on it
    frozen = "bert.encoder.layer.0.output.dense.bias"
    before = slots[frozen].detach().clone()
    assert run(first, **{frozen: torch.ones(8)}) == [0, 1, 2]
    assert run(first, **{frozen: before}) == [2]


def test_other_networks_run_whole():
    config = ViTConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    network = ViTForImageClassification(config).eval()
    slots = dict(network.named_parameters())
    start, pixels = FrozenStart(network, slots, slots), torch.zeros(1, 3, 8, 8)
    start.check(slots)
    with torch.inference_mode():
        other = network(pixel_values=pixels + 1).logits
        assert start.num_blocks == 0 and not torch.equal(network(pixel_values=pixels).logits, other)


@pytest.mark.parametrize("changed", ["bert.embeddings.", "bert.encoder.layer.0."])
def test_nothing_is_skipped_behind_a_change(changed):
    config = BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    network = BertForSequenceClassification(config)
    slots = dict(network.named_parameters())
    unchanged = {name: value for name, value in slots.items() if not name.startswith(changed)}
    assert FrozenStart(network, slots, unchanged).num_blocks == 0
    assert FrozenStart(network, slots, {}).num_blocks == 0


def test_a_row_of_texts_is_what_compare_finds_for_each_target(family):
    check_row(family, PROTOCOL, measuring.AVERAGE)


def test_references_are_each_task_s_own_checkpoint_and_joint_training(family, result):
    scores = {}
    for name, place in {**family.tasks, "joint": family.joint}.items():
        kinds = "AutoModelForSequenceClassification", "AutoTokenizer"
        model = load_model(ModelPlace(str(place)), *kinds, "tests")
        evaluator = get_evaluator("text-classification").make()
        batches = evaluator.encode(model, family.test, columns_of(family.columns), 256)
        scores[name] = [outcome.score for outcome in evaluator.outcomes(model, batches)]
    own = [scores[[*family.tasks][task]][row] for row, task in enumerate(family.owners)]
    with Bench(family, PROTOCOL) as bench:
        for name, wanted in (("own checkpoint", own), ("joint training", scores["joint"])):
            assert result["references"][name] == [
                [
                    sum(wanted[row] for row in target.held_out if family.owners[row] == task)
                    for task in target.tasks
                ]
                for target in bench.targets
            ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "definitions"], "--data definitions needs --encoder and --source"),
        (["--methods", "avarage"], "--methods: there is no avarage"),
    ],
)
def test_the_command_says_what_it_lacks(words, said, capsys):
    with pytest.raises(SystemExit):
        main.parse(words)
    assert said in capsys.readouterr().err
