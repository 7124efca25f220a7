import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants, try_to_load_from_cache
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

import hub_magmax as hm
from hub_magmax.errors import ArgumentError, EvaluationError, OutputError, RecordError
from hub_magmax.files import canonical_json, digest
from hub_magmax.fleet.decision_inputs import digest_of, restored_input, stored_input
from hub_magmax.fleet.decision_record import Decision, Header, check_record, open_record, read_decisions
from hub_magmax.fleet.predicting import Decoding, deterministic
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import parse_recipe
from tests.classifiers import classifier_recipe, write_classifiers
from tests.test_cli import call
from tests.test_terminal import interrupted
from tests.tiny_llama import CHAT, tokenizer, write_llama

TEXTS = ["a good film", "a bad film", "an odd one: was it good?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A language model with a chat template, a classifier of texts, one of images, and inputs for them."""
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "llama")
    words = tokenizer()
    words.chat_template = CHAT
    words.save_pretrained(folder / "llama")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=3, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    write_classifiers(folder, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """A copy of them in the current folder."""
    folder = shutil.copytree(models, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


def record(model="bert", texts=TEXTS, path="decisions.jsonl", **settings):
    with hm.recording(model, path, **settings) as ask:
        return [ask(text) for text in texts]


def lines(path="decisions.jsonl"):
    return Path(path).read_bytes().splitlines(keepends=True)


def decisions(path):
    return read_decisions(Path(path), check_record(Path(path)))


HEADER = Header({"place": "m", "task": "text-classification"}, {"weights": {}}, {}, {"threads": 1})


def write_small_record(path, count=6):
    """Write a record of a header and decisions, of no model."""
    with open_record(path) as writer:
        writer.add(HEADER)
        for number in range(count):
            writer.add(Decision(HEADER.digest, {"text": str(number)}, None, {"label": "x"}, "2026-01-01"))


# The chain


def test_every_line_holds_the_sha256_of_the_line_before_and_a_digest_of_itself(tmp_path):
    path = tmp_path / "record"
    write_small_record(path)
    found = lines(path)
    assert json.loads(found[0])["previous"] is None
    for before, line in pairwise(found):
        assert json.loads(line)["previous"] == hashlib.sha256(before).hexdigest()
    for line in found:
        values = json.loads(line)
        own = values.pop("digest")
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert own == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    checked = check_record(path)
    assert checked.last == hashlib.sha256(found[-1]).hexdigest()
    assert (checked.num_decisions, checked.torn_bytes, list(checked.headers.values())) == (6, 0, [HEADER])
    assert [line for line, _ in decisions(path)] == [2, 3, 4, 5, 6, 7]


def changed(found, number, old, new):
    line = found[number - 1]
    assert old in line
    return [*found[: number - 1], line.replace(old, new), *found[number:]]


def forged(found, number):
    """Change a line and write its digest anew, as somebody would who knows the format."""
    values = json.loads(found[number - 1])
    values["output"] = {"label": "forged"}
    del values["digest"]
    line = (canonical_json({**values, "digest": digest(values)}) + "\n").encode()
    return [*found[: number - 1], line, *found[number:]]


TAMPERED = {
    "changed": (lambda f: changed(f, 3, b'"label":"x"', b'"label":"y"'), "line 3 was changed"),
    "first changed": (lambda f: changed(f, 1, b'"place":"m"', b'"place":"n"'), "line 1 was changed"),
    "last changed": (lambda f: changed(f, 7, b'"label":"x"', b'"label":"y"'), "line 7 was changed"),
    "two changed": (
        lambda f: changed(changed(f, 3, b"x", b"y"), 5, b"x", b"y"),
        "line 3 was changed and line 5 was changed",
    ),
    "spaces": (lambda f: changed(f, 4, b'"label":', b'"label": '), "line 4 was changed"),
    "not JSON": (lambda f: changed(f, 4, b"{", b"["), "line 4 was changed"),
    "blank line": (lambda f: [*f[:3], b"\n", *f[3:]], "line 4 was changed"),
    "missing": (lambda f: [*f[:3], *f[4:]], "before line 4 a line is missing"),
    "header missing": (lambda f: f[1:], "before line 1 a line is missing"),
    "swapped": (
        lambda f: [*f[:2], f[3], f[2], *f[4:]],
        "line 3 belongs after line 4, line 4 belongs after line 2 and line 5 belongs after line 3",
    ),
    "moved to the end": (
        lambda f: [*f[:2], *f[3:], f[2]],
        "line 3 belongs after line 7 and line 7 belongs after line 2",
    ),
    "twice": (lambda f: [*f[:3], f[2], *f[3:]], "line 4 belongs after line 2"),
    "digest anew": (lambda f: forged(f, 3), "before line 4 a line is missing"),
    "line ends of Windows": (lambda f: [line[:-1] + b"\r\n" for line in f], "this is no record of decisions"),
    "another file": (lambda f: [b'{"text": "a"}\n', b'{"text": "b"}\n'], "this is no record of decisions"),
    "one line of another file": (lambda f: [b'{"text": "a"}'], "this is no record of decisions"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampering_is_found_and_named_by_line(how, tmp_path):
    path = tmp_path / "record"
    write_small_record(path)
    tamper, message = TAMPERED[how]
    path.write_bytes(b"".join(tamper(lines(path))))
    before = path.read_bytes()
    for read in (lambda: check_record(path), lambda: hm.replay(path), lambda: write_small_record(path)):
        with pytest.raises(RecordError) as caught:
            read()
        assert caught.value.what == message
    assert path.read_bytes() == before


def test_lines_cut_off_at_the_end_are_known_by_the_last_sha256_alone(tmp_path):
    path = tmp_path / "record"
    write_small_record(path)
    last = check_record(path).last
    path.write_bytes(b"".join(lines(path)[:-1]))
    checked = check_record(path)
    assert checked.num_decisions == 5 and checked.last != last


@pytest.mark.parametrize(
    "values", [{"kind": 1}, {"contents": 1}, {"header": "x", "version": 1}, {"version": 2}]
)
def test_line_of_another_form_is_refused_though_its_digests_fit(values, tmp_path):
    path = tmp_path / "record"
    values = {**values, "previous": None}
    path.write_text(canonical_json({**values, "digest": digest(values)}) + "\n")
    with pytest.raises(RecordError, match="no line of a record of this version"):
        check_record(path)


def test_decision_without_its_header_is_refused(tmp_path):
    path = tmp_path / "record"
    with open_record(path) as writer:
        writer.add(Decision("sha256:0", {}, None, {}, "2026-01-01"))
    with pytest.raises(RecordError, match="line 1: the decision names a header that is not there"):
        check_record(path)


@pytest.mark.parametrize("cut", [1, 20, 1000])
def test_torn_last_line_is_told_and_taken_away_when_recording_goes_on(cut, here, caplog):
    record()
    whole = lines()
    Path("decisions.jsonl").write_bytes(b"".join(whole[:-1]) + whole[-1][:-cut])
    left = len(whole[-1][:-cut])
    found = hm.replay("decisions.jsonl")
    assert (found.decisions, found.same, found.torn_bytes) == (2, 2, left)
    assert ("was cut short" in found.text) == bool(left)
    with caplog.at_level("INFO"):
        record(texts=TEXTS[2:])
    assert ("was cut short" in caplog.text) == bool(left)
    assert [json.loads(line)["output"] for line in lines()[1:]] == [
        json.loads(line)["output"] for line in whole[1:]
    ]
    assert hm.replay("decisions.jsonl").is_same


def test_torn_first_line_is_taken_away_and_a_foreign_one_stays(tmp_path):
    path = tmp_path / "record"
    write_small_record(path)
    whole = path.read_bytes()
    for length in (0, 1, 12, 13, 40):
        path.write_bytes(whole[:length])
        write_small_record(path)
        assert path.read_bytes() == whole
    path.write_text('{"text": "mine"}')
    with pytest.raises(RecordError, match="no record of decisions"):
        write_small_record(path)
    assert path.read_text() == '{"text": "mine"}'


def test_line_that_cannot_be_written_leaves_nothing_of_it(tmp_path, monkeypatch):
    path = tmp_path / "record"
    with open_record(path) as writer:
        writer.add(HEADER)
        before, last = path.read_bytes(), writer.last

        def fail(descriptor):
            raise OSError(28, "No space left on device")

        other = replace(HEADER, settings={"other": 1})
        more = [other, Decision(other.digest, {}, None, {}, "2026-01-01")]
        for line in more:
            with monkeypatch.context() as patched:
                patched.setattr(os, "fsync", fail)
                with pytest.raises(OutputError, match="No space left"):
                    writer.add(line)
            assert path.read_bytes() == before and writer.last == last
            writer.add(line)
            before, last = path.read_bytes(), writer.last
    assert check_record(path).num_decisions == 1
    with pytest.raises(OutputError, match=r"closed.*inside the `with` block"):
        writer.add(more[1])
    assert path.read_bytes() == before


def test_what_an_interrupted_call_wrote_is_replaced(tmp_path):
    path = tmp_path / "record"
    with open_record(path) as writer:
        writer.add(HEADER)
        with path.open("ab") as other:
            other.write(b'{"half a li')
        writer.add(Decision(HEADER.digest, {}, None, {}, "2026-01-01"))
    assert check_record(path).num_decisions == 1


def test_two_processes_do_not_record_into_one_file(tmp_path):
    path = tmp_path / "record"
    with open_record(path), pytest.raises(OutputError, match="another process records"), open_record(path):
        pass


def test_every_line_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(fsync(descriptor)))
    write_small_record(tmp_path / "record")
    assert len(synced) == 8  # the folder, a header, six decisions


WRITING_UNTIL_KILLED = """
import sys, itertools
from hub_magmax.fleet.decision_record import Decision, Header, open_record
header = Header({"place": "m", "task": "text-classification"}, {"weights": {}}, {}, {"threads": 1})
with open_record(sys.argv[1]) as writer:
    writer.add(header)
    for number in itertools.count(int(sys.argv[2])):
        print(number, flush=True)  # is under way
        writer.add(Decision(header.digest, {"text": "t" * 5000}, None, {"number": number}, "2026-01-01"))
""".replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])")


def test_a_kill_loses_at_most_the_decision_under_way(tmp_path):
    path, draws, begun = tmp_path / "record", random.Random(0), 0
    for _ in range(5):
        command = [sys.executable, "-c", WRITING_UNTIL_KILLED, str(path), str(begun)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            first = process.stdout.readline()
            time.sleep(draws.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            said = [int(word) for word in (first + process.stdout.read()).split()]
        numbers = [decision.output["number"] for _, decision in decisions(path)]
        check_record(path)
        assert numbers == list(range(len(numbers)))  # none is lost in the middle, none is there twice
        assert said[-1] <= len(numbers) <= said[-1] + 1
        begun = len(numbers)
    assert begun > 5


def test_lines_added_since_a_record_was_checked_are_left_out(tmp_path):
    path = tmp_path / "record"
    write_small_record(path)
    checked = check_record(path)
    write_small_record(path)
    assert len(list(read_decisions(path, checked))) == 6 and len(list(decisions(path))) == 12


# Replay


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9}, {"temperature": 2.0, "top_p": 0.8, "chat": True}]
)
def test_language_model_answers_the_same_bits_again(settings, here):
    outputs = record("llama", max_new_tokens=6, seed=3, **settings)
    assert all(1 <= len(output["tokens"]) <= 6 for output in outputs)
    found = [decision for _, decision in decisions("decisions.jsonl")]
    assert [dict(decision.output) for decision in found] == outputs
    assert [decision.seed for decision in found] == ([3, 4, 5] if settings else [None] * 3)
    found = hm.replay("decisions.jsonl")
    assert found.is_same and (found.model, found.environment) == ((), ())
    assert f"3 of 3 came out again, bit for bit\nsha256 of the last line: {found.last}" in found.text


def test_greedy_answer_is_that_of_the_library_and_draws_depend_on_the_seed_alone(here):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (output,) = record("llama", TEXTS[:1], max_new_tokens=5)
    words, network = AutoTokenizer.from_pretrained("llama"), AutoModelForCausalLM.from_pretrained("llama")
    encoded = words(TEXTS[0], return_tensors="pt")
    wanted = network.generate(**encoded, max_new_tokens=5, do_sample=False)[
        0, encoded["input_ids"].shape[1] :
    ]
    assert output["tokens"] == wanted.tolist()
    draws = [
        record("llama", [TEXTS[0]] * 2, f"{name}.jsonl", temperature=1.5, seed=seed, max_new_tokens=8)
        for name, seed in (("one", 1), ("two", 1), ("three", 2))
    ]
    assert draws[0] == draws[1] and draws[0][0] != draws[0][1] and draws[0][1] == draws[2][0]
    state = torch.random.get_rng_state()
    record("llama", TEXTS[:1], "four.jsonl", temperature=1.0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_scores_are_the_outputs_of_the_network_to_the_bit(here):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    outputs = record()
    words, network = (
        AutoTokenizer.from_pretrained("bert"),
        AutoModelForSequenceClassification.from_pretrained("bert"),
    )
    for text, output in zip(TEXTS, outputs, strict=True):
        with torch.inference_mode():
            logits = network.eval()(**words(text, return_tensors="pt")).logits[0]
        assert torch.equal(torch.tensor(output["scores"]), logits)
        assert output["label"] == f"LABEL_{int(logits.argmax())}" and output["is_cut"] is False
    stored = [decision.output["scores"] for _, decision in decisions("decisions.jsonl")]
    assert stored == [output["scores"] for output in outputs]
    assert hm.replay("decisions.jsonl").is_same


def test_a_decision_does_not_depend_on_its_neighbours(here):
    together = record()
    alone = [record(texts=[text], path=f"{number}.jsonl")[0] for number, text in enumerate(TEXTS)]
    assert together == alone


def test_threads_are_answered_one_after_the_other(here):
    asked = hm.recording("llama", "decisions.jsonl", temperature=1.0, max_new_tokens=4)
    with asked as ask, ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, TEXTS * 4))
    found = hm.replay("decisions.jsonl")
    assert found.decisions == 12 and found.is_same


def test_long_text_is_cut_and_marked(here):
    assert record(texts=["film " * 600])[0]["is_cut"] is True


def test_one_bit_of_a_weight_is_named_with_file_and_tensor(here):
    record()
    path = here / "bert" / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"].view(torch.int32)[1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    found = hm.replay("decisions.jsonl")
    assert [change.name for change in found.model] == [
        "parameters.classifier.bias",
        "weights.model.safetensors",
    ]
    assert not found.is_same
    code, out, _ = call("replay", "decisions.jsonl")
    assert code == 3 and "the model differs: parameters.classifier.bias: recorded sha256:" in out


def test_first_difference_is_named_by_line_and_value(here):
    record()
    path = here / "bert" / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"][1] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    found = hm.replay("decisions.jsonl")
    assert (found.same, found.first_line) == (0, 2)
    before = json.loads(lines()[1])["output"]
    if found.first.name == "scores[1]":
        assert found.first.recorded == before["scores"][1] and found.first.here > found.first.recorded
    else:
        assert found.first.name == "label"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("tokenizer.json", "tokenizer.tokenizer.json"),
        ("config.json", "configuration.config.json"),
        ("chat_template.jinja", "chat_template"),
        ("generation_config.json", "generation"),
    ],
)
def test_part_of_a_model_that_changed_is_named(file, name, here):
    record("llama", TEXTS[:1], max_new_tokens=2)
    path = here / "llama" / file
    text = path.read_text()
    path.write_text(text + "." if file.endswith("jinja") else text.replace("\n}", ',\n  "max_length": 30\n}'))
    if file == "tokenizer.json":
        path.write_text(text + "\n")
    found = hm.replay("decisions.jsonl")
    assert name in [change.name for change in found.model] and not found.is_same


def test_another_number_of_threads_is_named_and_is_no_fault(here):
    record()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = hm.replay("decisions.jsonl")
    finally:
        torch.set_num_threads(before)
    assert [(c.name, c.recorded, c.here) for c in found.environment] == [("threads", before, before + 1)]
    assert found.model == () and "OMP_NUM_THREADS" in found.text
    assert found.is_same == (found.same == 3)


def test_other_software_is_named(here, monkeypatch):
    record()
    import hub_magmax.fleet.model_contents as contents

    before = contents.software_used()
    monkeypatch.setattr(contents, "software_used", lambda: {**before, "torch": "1.0"})
    found = hm.replay("decisions.jsonl")
    assert [change.name for change in found.environment] == ["software.torch"] and found.is_same


def test_moved_model_is_found_by_its_new_name(here):
    record()
    Path("bert").rename("moved")
    with pytest.raises(Exception, match="--model names another place"):
        hm.replay("decisions.jsonl")
    assert hm.replay("decisions.jsonl", model="moved").is_same
    image = Image.new("RGB", (8, 8))
    record("a", [image], "images.jsonl")
    Path("a").rename("moved-a")
    assert hm.replay("images.jsonl", model="moved-a").is_same
    with pytest.raises(EvaluationError, match="not those that were recorded"):
        hm.replay("decisions.jsonl", model="llama")
    with pytest.raises(EvaluationError, match="not those that were recorded"):
        hm.replay("decisions.jsonl", model="base")


def test_recording_goes_on_with_a_header_for_what_changed_and_none_for_what_did_not(here):
    record("llama", TEXTS[:1], max_new_tokens=2)
    record("llama", TEXTS[1:2], max_new_tokens=2)
    record("llama", TEXTS[1:2], max_new_tokens=3)
    record("bert", TEXTS[2:])
    record("llama", TEXTS[2:], max_new_tokens=2)
    kinds = ["header" if "contents" in json.loads(line) else "decision" for line in lines()]
    h, d = "header", "decision"
    assert kinds == [h, d, d, h, d, h, d, d]
    found = hm.replay("decisions.jsonl")
    assert (found.decisions, found.same) == (5, 5) and found.is_same


def test_merge_of_a_model_is_recorded_by_its_digests(here, hub):
    recipe = parse_recipe(classifier_recipe(output={"path": "merged"}), folder=here)
    recipe = recipe.model_copy(update={"evaluation": None})
    run(recipe)
    image = Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8))
    record("merged", [image])
    contents = json.loads(lines()[0])["contents"]
    locked = json.loads((here / "merged" / "recipe.lock.json").read_text())
    report = json.loads((here / "merged" / "merge_report.json").read_text())
    assert contents["lock"] == locked["digest"]
    assert (
        contents["recipe"]
        == "sha256:" + hashlib.sha256((here / "merged" / "recipe.yaml").read_bytes()).hexdigest()
    )
    assert contents["weights"] == {s["file"]: f"sha256:{s['sha256']}" for s in report["shards"]}
    assert set(contents["tasks"]) == {"a", "b"} and contents["base"]["commit"] is None
    push(here / "merged", "me/decided")
    record("me/decided", [image], "hub.jsonl")
    header = json.loads(lines("hub.jsonl")[0])
    assert header["model"]["commit"] == hub.head("me/decided") and header["contents"] == contents
    hub.add_repo("me/decided", files={"model.safetensors": (here / "b" / "model.safetensors").read_bytes()})
    assert hm.replay("hub.jsonl").is_same  # by its commit
    assert not hm.replay("hub.jsonl", model="me/decided").is_same
    assert hm.replay("hub.jsonl", model="merged").is_same


@pytest.mark.parametrize("hash_files", [False, True])
def test_digests_of_sources_tell_them_apart_or_say_that_they_are_of_headers(hash_files, here):
    recipe = parse_recipe(classifier_recipe(output={"path": "merged"}), folder=here)
    merge(plan(recipe, lock(recipe, hash_files=hash_files)))
    record("merged", [Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8))])
    contents = json.loads(lines()[0])["contents"]
    digests = [source["files"] for source in (contents["base"], *contents["tasks"].values())]
    found = hm.replay("decisions.jsonl")
    assert found.is_same
    if hash_files:
        assert len({*digests}) == 3 and all(one.startswith("sha256:") for one in digests)
        assert found.by_headers == () and "headers" not in found.text
    else:
        assert len({*digests}) == 1 and digests[0].startswith("header:")
        assert found.by_headers == ("base", "a", "b")
        assert "by the headers of their weights alone, not the values: base, a and b" in found.text


def test_record_of_an_earlier_version_says_sha256_of_headers_and_is_the_same_model(here):
    recipe = parse_recipe(classifier_recipe(output={"path": "merged"}), folder=here)
    merge(plan(recipe, lock(recipe)))
    record("merged", [Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8))])
    ((_, decision),) = decisions("decisions.jsonl")
    (header,) = check_record(Path("decisions.jsonl")).headers.values()
    old = json.loads(json.dumps(header.contents).replace("header:", "sha256:"))
    older = replace(header, contents=old)
    with open_record(Path("old.jsonl")) as writer:
        writer.add(older)
        writer.add(replace(decision, header=older.digest))
    assert hm.replay("old.jsonl").is_same


def forget_merge(repo, commit):
    """Take what tells of the merge out of the local cache, as where an earlier version filled it."""
    for name in ("recipe.yaml", "recipe.lock.json"):
        Path(try_to_load_from_cache(repo, name, revision=commit)).unlink()


def test_model_of_the_hub_is_replayed_from_the_cache_and_the_other_way_round(here, hub, monkeypatch):
    recipe = parse_recipe(classifier_recipe(output={"path": "merged"}), folder=here)
    run(recipe.model_copy(update={"evaluation": None}))
    push(here / "merged", "me/decided-offline")
    commit, image = hub.head("me/decided-offline"), Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8))
    record("me/decided-offline", [image], "online.jsonl")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        found = hm.replay("online.jsonl")
        assert found.is_same and not found.not_seen, "the cache has recipe and lock"
        forget_merge("me/decided-offline", commit)
        found = hm.replay("online.jsonl")
        assert found.is_same and found.not_seen == ("base", "lock", "recipe", "tasks")
        assert "no such file: base, lock, recipe and tasks" in found.text
        record(f"me/decided-offline@{commit}", [image], "offline.jsonl")
    found = hm.replay("offline.jsonl")
    assert found.is_same and found.not_seen == ("base", "lock", "recipe", "tasks")
    found = hm.replay("offline.jsonl", model="merged")
    assert not found.is_same and not found.not_seen, "another place may hold another model"


def test_router_beside_a_model_is_recorded_by_its_digests(here):
    record()
    Path("bert/router.json").write_text("{}")
    Path("bert/router.safetensors").write_bytes(b"x")
    record()
    headers = [values["contents"] for line in lines() if "contents" in (values := json.loads(line))]
    assert headers[0]["router"] is None and len(headers) == 2
    assert headers[1]["router"] == {
        name: "sha256:" + hashlib.sha256(Path("bert", name).read_bytes()).hexdigest()
        for name in ("router.json", "router.safetensors")
    }
    found = hm.replay("decisions.jsonl")
    assert found.same == found.decisions == 6
    assert [change.name for change in found.model] == ["router"]  # the first three had none


def write_lora(folder, network, task, **changes):
    """Write an adapter of random factors as PEFT does, and return the model that PEFT makes of it."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    config = peft.LoraConfig(task_type=task, r=2, init_lora_weights=False, **changes)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's calls of transformers
        adapted = peft.get_peft_model(network, config)
        adapted.save_pretrained(folder)
    return adapted.eval()


def test_adapter_answers_as_with_peft_over_the_base_model_that_it_names(here):
    network = BertForSequenceClassification.from_pretrained("bert")
    adapted = write_lora("lora", network, "SEQ_CLS", target_modules=["query", "dense"])
    found = record("lora")
    words = tokenizer()
    for text, answer in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            logits = adapted(**words(text, return_tensors="pt")).logits[0]
        assert answer["scores"] == pytest.approx(logits.tolist(), abs=1e-5)
        assert answer["label"] == network.config.id2label[int(logits.argmax())]
    assert found != record("bert", path="base.jsonl")
    contents = json.loads(lines()[0])["contents"]
    own = ("adapter_config.json", "adapter_model.safetensors")
    assert contents["adapter"] == {
        name: "sha256:" + hashlib.sha256(Path("lora", name).read_bytes()).hexdigest() for name in own
    }
    assert contents["base"]["name"] == "bert" and contents["base"]["commit"] is None
    assert contents["weights"] == json.loads(lines("base.jsonl")[0])["contents"]["weights"]
    assert hm.replay("decisions.jsonl").is_same
    weights = load_file("lora/adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, "lora/adapter_model.safetensors")
    changes = [change.name for change in hm.replay("decisions.jsonl").model]
    assert changes[0] == "adapter.adapter_model.safetensors" and changes[-1].startswith("parameters.")


def test_adapter_of_a_language_model_answers_over_a_base_model_on_the_hub(here, hub):
    hub.add_repo("me/decided-base", folder=here / "llama")
    commit = hub.head("me/decided-base")
    network = AutoModelForCausalLM.from_pretrained("llama")
    adapted = write_lora("lora", network, "CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    stated = json.loads(Path("lora/adapter_config.json").read_text())
    Path("lora/adapter_config.json").write_text(
        json.dumps(stated | {"base_model_name_or_path": "me/decided-base", "revision": commit})
    )
    (answer,) = record("lora", TEXTS[:1], max_new_tokens=4)
    asked = AutoTokenizer.from_pretrained("llama")(TEXTS[0], return_tensors="pt")
    told = adapted.generate(**asked, max_new_tokens=4, do_sample=False)
    assert answer["tokens"] == told[0, asked["input_ids"].shape[1] :].tolist()
    contents = json.loads(lines()[0])["contents"]
    assert (contents["base"]["name"], contents["base"]["commit"]) == ("me/decided-base", commit)
    hub.add_repo("me/decided-base", files={"config.json": b"{}"})
    assert hm.replay("decisions.jsonl").is_same  # the base model by its commit


# Inputs


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "P", "I;16", "LA"])
def test_image_comes_back_pixel_by_pixel(mode):
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    image = Image.fromarray(pixels).convert(mode if mode != "I;16" else "I").convert(mode)
    stored = stored_input(image, digest_only=False)
    found = restored_input(json.loads(json.dumps(stored)))
    assert found.mode == mode and found.tobytes() == image.tobytes() and digest_of(found) == stored["digest"]


def test_image_that_png_cannot_hold_is_refused_with_a_way_out():
    for mode in ("CMYK", "I;16B", "F"):
        image = Image.new(mode, (2, 2))
        with pytest.raises(EvaluationError, match=rf"mode {mode} cannot be stored as PNG.*digests"):
            stored_input(image, digest_only=False)
        assert stored_input(image, digest_only=True).keys() == {"digest"}


def test_input_that_is_not_that_of_its_digest_is_refused(here):
    stored = stored_input("a", digest_only=False) | {"text": "b"}
    with pytest.raises(RecordError, match="not that of its digest"):
        restored_input(stored)
    assert stored_input("a", digest_only=True) == {"digest": "sha256:" + hashlib.sha256(b"a").hexdigest()}


def test_record_of_digests_is_replayed_with_the_inputs(here):
    code, _, err = call("predict", "bert", "texts.jsonl", "--record", "d.jsonl", "--digest-inputs")
    assert code == 0, err
    assert not any(text.encode() in b"".join(lines("d.jsonl")) for text in TEXTS)
    code, _, err = call("replay", "d.jsonl")
    assert code == 1 and "line 2: the record holds the digest of the input alone" in err and "--inputs" in err
    assert call("replay", "d.jsonl", "--inputs", "texts.jsonl")[0] == 0
    code, _, err = call("replay", "d.jsonl", "--inputs", "texts.jsonl", "--column", "words")
    assert code == 1 and "there is no column 'words'" in err and "Name it with --column" in err


# The command line


def test_predict_and_replay_of_images(here):
    code, out, err = call("predict", "a", "rows.parquet", "--record", "d.jsonl")
    assert code == 0, err
    labels = out.splitlines()[:10]
    assert out.splitlines()[0] == "cat  logit 1" and "wrote 10 decisions to d.jsonl" in out
    code, out, _ = call("replay", "d.jsonl", "--json")
    values = json.loads(out)
    assert code == 0 and values["is_same"] and values["same"] == 10
    assert values["last"] == hashlib.sha256(lines("d.jsonl")[-1]).hexdigest()
    table = parquet.read_table("rows.parquet").replace_schema_metadata(None)
    parquet.write_table(table, "bare.parquet")
    code, again, err = call("predict", "a", "bare.parquet", "--record", "e.jsonl")
    assert code == 0 and again.splitlines()[:10] == labels, err


def test_lines_of_standard_input(here):
    words = ("predict", "bert", "-", "--record", "d.jsonl")
    code, out, err = call(*words, "--json", stdin="good\nschön\r\n".encode())
    assert code == 0, err
    assert len(json.loads(out)["outputs"]) == 2
    assert [decision.input["text"] for _, decision in decisions("d.jsonl")] == ["good", "schön"]
    code, _, err = call(*words, stdin=b"good\n\xff\n")
    assert code == 1 and "standard input, line 2: this is no text in UTF-8" in err


WRONG = {
    "no such model": (["nothing/there/x", "texts.jsonl"], "nothing/there/x"),
    "no such inputs": (["bert", "no.jsonl"], "did you mean texts.jsonl"),
    "no such inputs either": (["nothing/there/x", "no.jsonl"], "did you mean texts.jsonl"),
    "no such data set": (["bert", "me/texts1.0"], "me/texts1.0"),
    "a name too long": (["bert", "x" * 5000], "no name of data"),
    "no such column": (["bert", "texts.jsonl", "--column", "x"], "one of text"),
    "empty place": (["bert", ""], "no such file or folder"),
    "images for texts": (["bert", "rows.parquet", "--column", "image"], "expected a text"),
    "lines for images": (["base", "-"], "expected an image"),
    "temperature of a classifier": (["bert", "texts.jsonl", "--temperature", "1"], "given to a classifier"),
    "temperature of nothing": (["llama", "texts.jsonl", "--temperature", "0"], "a number above 0"),
    "not a number": (["llama", "texts.jsonl", "--temperature", "nan"], "a number above 0"),
    "top-p alone": (["llama", "texts.jsonl", "--top-p", "0.5"], "Give a temperature too"),
    "too long": (["llama", "texts.jsonl", "--max-new-tokens", "510"], "at most 512 tokens"),
    "no template": (["bare", "texts.jsonl", "--chat"], "Leave chat out"),
    "adapter": (["adapter", "texts.jsonl"], "names no base model"),
    "adapter of nothing": (["lost", "texts.jsonl"], "lost names it as its base model"),
    "another kind": (["kind", "texts.jsonl"], "decisions of T5ForConditionalGeneration are not recorded"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_what_cannot_be_asked_is_one_paragraph_and_leaves_no_decision(how, here):
    shutil.copytree("llama", "bare")
    Path("bare/chat_template.jinja").unlink()
    for name, file, text in (
        ("adapter", "adapter_config.json", "{}"),
        ("lost", "adapter_config.json", '{"base_model_name_or_path": "./nowhere"}'),
        ("kind", "config.json", '{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}'),
    ):
        Path(name).mkdir()
        Path(name, file).write_text(text)
    words, message = WRONG[how]
    code, _, err = call("predict", *words, "--record", "d.jsonl", stdin=b"good\n")
    assert code == 1 and message.lower() in err.lower(), err
    assert "Traceback" not in err
    assert not Path("d.jsonl").exists() or not Path("d.jsonl").read_bytes()


def test_record_that_cannot_be_written_is_told_before_the_model_is_loaded(here):
    Path("d.jsonl").write_text("mine\n")
    code, _, err = call("predict", "no-model", "texts.jsonl", "--record", "d.jsonl")
    assert code == 1 and "no record of decisions" in err
    code, _, err = call("predict", "no-model", "texts.jsonl", "--record", "bert")
    assert code == 1 and "this is a folder" in err
    assert Path("d.jsonl").read_text() == "mine\n"


def test_interrupted_predict_says_how_to_go_on(here, monkeypatch):
    from hub_magmax.fleet.recording import Recorder

    asked = Recorder.__call__

    def stop(self, value):
        if self.num_decisions == 1:
            raise KeyboardInterrupt
        return asked(self, value)

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "__call__", stop)
        code, _, err = interrupted("predict", "bert", "texts.jsonl", "--record", "d.jsonl")
    assert (
        code == 130
        and "The record d.jsonl holds 1 decision of this command" in err
        and "--split 'test[1:]'" in err
    )
    assert "goes on from there" not in err
    assert call("predict", "bert", "texts.jsonl", "--record", "d.jsonl", "--split", "test[1:]")[0] == 0
    assert [decision.input["text"] for _, decision in decisions("d.jsonl")] == TEXTS


def test_python_of_the_guide_runs_as_printed(here):
    Path("a").rename("merged")
    guide = (Path(__file__).parents[1] / "docs" / "replay.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    values = {"image": Image.new("RGB", (8, 8))}
    exec(compile(block, "replay.md", "exec"), values)
    assert values["answer"]["label"] == "cat"


def test_record_holds_no_token_and_no_folder_of_this_machine(here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "abcdefgh" * 4)
    record("llama", max_new_tokens=2)
    text = b"".join(lines()).decode()
    assert "hf_abc" not in text and str(here) not in text and str(Path.home()) not in text


# Pipelines


def test_pipeline_is_recorded_and_replayed(here):
    for name, task in (("bert", "text-classification"), ("llama", "text-generation")):
        asked = pipeline(task, model=name)
        outputs = record(asked, path=f"{name}.jsonl")
        assert outputs == record(name, path=f"{name}-by-name.jsonl")
        header, own = (json.loads(lines(path)[0]) for path in (f"{name}.jsonl", f"{name}-by-name.jsonl"))
        assert header["contents"] == own["contents"] and header["model"] == own["model"]
        assert hm.replay(f"{name}.jsonl").is_same
    image = Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8))
    record(pipeline("image-classification", model="a"), [image], "image.jsonl")
    assert hm.replay("image.jsonl").is_same


def test_tokenizer_changed_in_memory_is_named_and_one_that_was_used_is_not(here):
    asked = pipeline("text-classification", model="bert")
    asked(TEXTS, padding=True, truncation=True, max_length=4)
    record(asked)
    assert hm.replay("decisions.jsonl").is_same
    asked.tokenizer.truncation_side = "left"
    record(asked, path="other.jsonl")
    assert [change.name for change in hm.replay("other.jsonl").model] == ["processor"]


def test_weights_changed_in_memory_are_named(here):
    asked = pipeline("text-classification", model="bert")
    with torch.no_grad():
        asked.model.classifier.bias[0] += 1
    record(asked)
    assert [change.name for change in hm.replay("decisions.jsonl").model] == ["parameters.classifier.bias"]


def test_pipeline_of_a_model_without_files_has_null_for_what_is_unknown(here):
    asked = pipeline("text-classification", model="bert")
    asked.model.config._name_or_path = ""
    record(asked)
    header = json.loads(lines()[0])
    assert header["model"]["place"] is None
    assert [header["contents"][k] for k in ("weights", "tokenizer", "lock", "base")] == [None] * 4
    with pytest.raises(RecordError, match=r"does not say where the model was.*--model"):
        hm.replay("decisions.jsonl")
    assert hm.replay("decisions.jsonl", model="bert").is_same


def test_what_is_no_pipeline_or_no_input_is_refused(here):
    with pytest.raises(ArgumentError, match="a pipeline of transformers, or the name of a model"):
        hm.recording(print, "d.jsonl")
    asked = pipeline("text-classification", model="bert")
    asked.task = "fill-mask"
    with pytest.raises(EvaluationError, match="decisions of fill-mask are not recorded"):
        hm.recording(asked, "d.jsonl")
    with hm.recording("bert", "d.jsonl") as ask:
        for wrong in (["a"], None, 1, Image.new("RGB", (2, 2))):
            with pytest.raises(ArgumentError, match="a text"):
                ask(wrong)
        with pytest.raises(EvaluationError, match="no character"):
            ask("\ud800")
    assert Path("d.jsonl").read_bytes() == b""


def test_settings_of_torch_are_as_before_afterwards():
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(7, 0.5, 0.9, chat=True), Decoding(1, 2.0)])
def test_settings_come_back_from_a_record(decoding):
    assert Decoding.from_dict(json.loads(json.dumps(decoding.to_dict()))) == decoding


def test_record_without_decisions_is_no_success(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecordError, match="holds no decision"):
        hm.replay(tmp_path / "empty.jsonl")
