"""Merges of a language model's adapters: the tasks, the scores from kept states, a run with a tiny Llama."""

import io
import itertools
import json
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import load_file

import hub_magmax as hm
from benchmarks import llm_lora, llm_tasks
from benchmarks.llm_lora import Network, Settings
from benchmarks.llm_lora_tables import Accuracies, section
from benchmarks.llm_tasks import CHOICES, FORMAT, TASKS, Sources
from hub_magmax.evaluation.evaluators.causal import continued
from hub_magmax.evaluation.evaluators.likelihoods import Row, log_likelihoods
from tests.tiny_llama import tokenizer, write_llama

ANSWERS = " ".join(answer for answers in CHOICES.values() for answer in answers)
WORDS = ("a", "the", "good", "bad", "odd", "film", "answer", "so", "it", "or")


@pytest.fixture
def base(tmp_path):
    """A Llama of two blocks whose tokenizer has a token for every answer that is chosen."""
    return write_llama(tmp_path / "work" / "base", words=tokenizer(lines=[f" {ANSWERS}"] * 9, size=500))


@pytest.fixture
def sources(tmp_path):
    """Files as those of the packages, with made-up texts."""
    texts = [" ".join(words) for words in itertools.product(WORDS, repeat=4) if len(" ".join(words)) >= 20]
    for kind, classes in {"noun": llm_tasks.CLASSES, "verb": llm_tasks.VERBS}.items():
        lines = [
            f"{place:08} {number:02} n 01 word 0 000 | {text}"
            for place, (number, text) in enumerate(zip(200 * [*classes.values()], texts, strict=False))
        ]
        (tmp_path / f"data.{kind}").write_text("\n".join(lines) + "\n")
    rated = "".join(f"{n}\t{(-1) ** n * 2.0}\t{text}\n" for n, text in enumerate(texts)).encode("latin-1")
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        entry = tarfile.TarInfo("resources/movieReviewSnippets_GroundTruth.txt")
        entry.size = len(rated)
        files.addfile(entry, io.BytesIO(rated))
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as outer:
        outer.writestr("resources.tar.gz", inner.getvalue())
    return Sources(tmp_path, tmp_path, tmp_path / "films.zip")


def test_requests_are_answered_by_calls_that_are_each_there_once():
    rows = llm_tasks.calls(0)
    assert len({row["prompt"] for row in rows}) == len(rows) == 540
    assert rows == llm_tasks.calls(0) != llm_tasks.calls(1)
    for row in rows:
        call = json.loads(row["answer"])
        prompts = [
            f"Request: {phrase.format(*call['arguments'])}\nCall:" for phrase in llm_tasks.TOOLS[call["tool"]]
        ]
        assert row["prompt"] in prompts and row["answer"].endswith("}\n")


def test_arguments_stand_in_the_order_of_the_call():
    by_prompt = {row["prompt"]: row["answer"] for seed in range(20) for row in llm_tasks.calls(seed)}
    taken = next(prompt for prompt in by_prompt if prompt.startswith("Request: take "))
    second, first = (int(word) for word in taken.replace("\n", " ").split() if word.isdigit())
    assert by_prompt[taken] == f'{{"tool": "subtract", "arguments": [{first}, {second}]}}\n'


def test_answers_that_are_chosen_are_as_many_of_each(sources):
    for task, rows in sources.rows(0).items():
        if task in CHOICES:
            found = [row["answer"] for row in rows[:60]]
            assert {found.count(answer) for answer in CHOICES[task]} == {60 // len(CHOICES[task])}


def test_a_generated_answer_is_right_exactly_if_greedy_decoding_gives_it(base, monkeypatch):
    monkeypatch.setattr(llm_lora, "BATCH_SIZE", 3)
    network, rows = Network(base, first_block=1), []
    for number, text in enumerate(("was it good?", "a bad film", "the review: so odd", "answer")):
        prompt = network.model.processor(text).input_ids
        made = network.model.network.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
        tokens = made[0].tolist()
        if number % 2:  # another answer, wrong from its first token on or in its last one alone
            place = -1 if number == 1 else len(prompt)
            tokens[place] = (tokens[place] + 1) % 300
        rows.append(Row(tokens, len(prompt)))
    batches, runs = network.batches(rows), []
    for number, block in enumerate(network.model.network.model.layers):
        block.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
    for _ in range(2):
        assert network.answers(batches) == ("1010", "1110")
    assert runs == [0, 1, 0, 1, 1, 1], "the first block runs once for each batch"
    assert continued(network.model, rows[0]) == network.model.processor.decode(
        rows[0].tokens[rows[0].first :]
    )


def test_the_chosen_answer_is_the_likeliest_one(base):
    network, answers = Network(base, first_block=1), CHOICES["nouns"]
    texts = ["so good a film", "it", "the odd answer or a bad one"]
    rows = [network.row({"prompt": text, "answer": answers[0]}) for text in texts]
    expected = ""
    for text in texts:
        each = log_likelihoods(
            network.model, [network.row({"prompt": text, "answer": one}) for one in answers]
        )
        expected += str(int(each.index(max(each)) == 0))
    assert network.answers(network.batches(rows, answers))[0] == expected


@pytest.fixture
def measured(base, sources, tmp_path, monkeypatch):
    """Everything measured for one seed, by the command itself."""
    pytest.importorskip("peft", reason="the package peft is not installed")
    monkeypatch.setattr(llm_lora, "RESULTS", tmp_path / "found.json")
    monkeypatch.setattr(llm_lora, "SETTINGS", Settings(6, 4, 3, 2, 0.05, 2, 1))
    monkeypatch.setattr(llm_lora, "METHODS", {name: llm_lora.METHODS[name] for name in ("average", "dare")})
    places = ["--llm", tmp_path, "--wordnet", tmp_path, "--films", tmp_path / "films.zip"]
    command = [str(word) for word in ("llm_lora", tmp_path / "work", *places, "--seeds", 0)]
    monkeypatch.setattr("sys.argv", command)
    llm_lora.main()
    return json.loads(llm_lora.RESULTS.read_text())


def test_the_command_measures_every_model_once_and_goes_on_where_it_stopped(measured, monkeypatch):
    rows = measured["seeds"]["0"]
    assert [row["model"] for row in rows] == ["base", *TASKS, *["average"] * 4, *["dare"] * 4]
    for row in rows:
        assert {task: len(right) for task, right in row["right"].items()} == dict.fromkeys(TASKS, 6)
    assert all(row["scaling"] in (0.25, 0.5, 0.75) and len(row["tried"]) == 3 for row in rows[9:])
    assert rows[9]["own"]["scaling"] == 0.3 and "own" not in rows[10]
    llm_lora.RESULTS.write_text(json.dumps(measured | {"seeds": {"0": rows[:-1]}}))
    llm_lora.main()
    again = json.loads(llm_lora.RESULTS.read_text())["seeds"]["0"]
    assert again[:-1] == rows[:-1] and again[-1] | {"seconds": 0} == rows[-1] | {"seconds": 0}
    text = section(measured)
    assert "| `average` | 1 | " in text and "| `dare` | 0.3 | " in text and "One run of SmolLM2-135M" in text
    request = llm_tasks.calls(0)[0]["prompt"].replace("\n", "⏎")
    assert f"first request of seed 0, `{request}`:" in text


@pytest.mark.parametrize("name", ["settings", "sources", "versions"])
def test_rows_that_were_measured_otherwise_are_refused_and_left_as_they_are(measured, name):
    llm_lora.RESULTS.write_text(text := json.dumps(measured | {name: {"rank": 1}}))
    with pytest.raises(SystemExit, match=rf"the {name} \{{'rank': 1\}}, now .* start anew"):
        llm_lora.main()
    assert llm_lora.RESULTS.read_text() == text


def test_training_that_was_interrupted_counts_and_adapters_that_are_there_do_not(
    measured, tmp_path, monkeypatch
):
    seconds = measured["training_seconds"]["0"]
    llm_lora.main()
    assert json.loads(llm_lora.RESULTS.read_text())["training_seconds"] == {"0": seconds}

    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "work" / "seed-0" / FORMAT / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(llm_lora, "make_family", interrupted)
    times = itertools.chain([100.0, 107.0, 200.0, 203.0], itertools.count(300.0))
    monkeypatch.setattr("time.process_time", lambda: next(times))
    for after in (7.0, 10.0):
        with pytest.raises(KeyboardInterrupt):
            llm_lora.main()
        stored = json.loads(llm_lora.RESULTS.read_text())
        assert stored["training_seconds"]["0"] == pytest.approx(seconds + after)
        assert stored["seeds"] == measured["seeds"]


def test_the_weights_that_are_scored_are_those_of_the_merged_model(measured, sources, tmp_path):
    seed, data, settings = tmp_path / "work" / "seed-0", sources.rows(0), llm_lora.SETTINGS
    recipe = llm_lora.make_family(seed, data, 0, settings)
    bench = llm_lora.Bench(Network(seed.parent / "base", 1), recipe, data, settings)
    hm.run(recipe)
    merged = load_file(seed / "merged" / "model.safetensors")
    found = bench.merge("average", 0.25)(1.0)
    assert len(found) == 4
    for name, tensor in found.items():
        assert torch.allclose(tensor, merged[name], atol=1e-6), name
        assert not torch.allclose(tensor, bench.weights["base"][name], atol=1e-4)


def test_the_section_of_the_page_is_what_is_stored():
    stored = json.loads(llm_lora.RESULTS.read_text())
    assert section(stored) in llm_lora.PAGE.read_text(encoding="utf-8"), (
        "python -m benchmarks.llm_lora --render"
    )


def row(model, calls, others, weight=None, **more):
    right = dict.fromkeys(CHOICES, others) | {FORMAT: calls}
    return {"model": model, "weight": weight, "right": right, "opened": calls, "said": "", **more}


def test_what_a_weight_gives_the_format_and_takes_from_the_others_is_told():
    own = {"scaling": 1.0, **row("average", "0000", "1111")}
    rows = [row(model, "1111" if model == FORMAT else "0000", "1100") for model in ("base", *TASKS)]
    rows += [
        row("average", calls, others, weight, scaling=1.0, **({"own": own} if weight == 0.25 else {}))
        for weight, calls, others in (
            (0.25, "0000", "1111"), (0.5, "1000", "1110"), (0.7, "1111", "1100"), (0.9, "1111", "0000")
        )
    ]  # fmt: skip
    rows = [
        {"seconds": 60, **{key: value for key, value in one.items() if value is not None}} for one in rows
    ]
    stored = {"seeds": {"0": rows}, "settings": vars(Settings()), "training_seconds": {"0": 120}}
    assert Accuracies(stored["seeds"]).of([*CHOICES], "average", 0.5) == {"0": 75}
    text = section(stored)
    # By hand: own adapters of the others have half of theirs right, as the base model has.
    assert "The others' own adapters have a mean of 50.0 %, the base model 50.0 %." in text
    # By hand: at .7 all four calls are right in place of none, and two of four others in place of all.
    gained = next(line for line in text.splitlines() if line.startswith("| `average` | +25.0 ["))
    assert "| +100.0 [+100.0, +100.0] | -50.0 [" in gained
    assert "0.0 / 100.0 (1) | 25.0 / 75.0 (1) | 100.0 / 50.0 (1) | 100.0 / 0.0 (1) |" in text
