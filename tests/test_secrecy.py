"""No token and no folder of this machine in anything that is written, printed or sent."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hub_magmax import methods
from hub_magmax.cli import VERBS, main
from hub_magmax.errors import HubMagmaxError, RecipeError, SystemRefusalError, explained
from hub_magmax.evaluation import data
from hub_magmax.fleet.signing import signature_errors
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.recipe.values import Data
from hub_magmax.registry import Registry
from hub_magmax.text import holds_token, printable, without_secrets, without_tokens
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.families import recipe_values, write_recipe
from tests.test_cli import call
from tests.test_fleet_signing import stand_in  # noqa: F401  (a fixture)

TOKEN = "hf_" + "aB3" * 12


def secrets(folder: Path) -> dict[str, str]:
    """Return what may stand nowhere, by what it is."""
    homes = {str(Path.home()), str(folder), str(folder.resolve()), str(Path.cwd())} - {"/"}
    return {"token": os.environ["HF_TOKEN"], "written token": TOKEN} | {f"folder {h}": h for h in homes}


def leaks(contents: dict[str, bytes], folder: Path) -> list[str]:
    return [
        f"{name} names the {what}"
        for name, content in contents.items()
        for what, secret in secrets(folder).items()
        if secret.encode() in content
    ]


def written_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def absolute(family: Path) -> dict[str, object]:
    """Return a recipe that names every place in full."""
    return recipe_values(
        base_model=str(family / "base"),
        tasks=[{"name": name, "model": str(family / name)} for name in "abc"],
        output={"path": str(family / "merged"), "shard_size": "1KB", "push_to_hub": "me/secrecy"},
    )


@pytest.mark.parametrize(
    "verbs", [["lock", "diagnose", "run"], ["merge", "card", "plan"]], ids=["run", "merge"]
)
def test_no_file_that_a_command_writes_names_a_token_or_a_folder_of_this_machine(
    family, hub, monkeypatch, verbs
):
    monkeypatch.chdir(family)
    recipe = write_recipe(family, **absolute(family))
    sources = set(written_below(family))
    printed = {}
    for verb in verbs:
        for how in ([], ["--json"]):
            code, out, err = call(verb, "recipe.yaml", *how)
            assert code == 0, err
            printed[f"{verb} {how}"] = (out + err).encode()
    found = {name: content for name, content in written_below(family).items() if name not in sources}
    assert {"merged/merge_report.json", "merged/README.md", "merged/provenance.json"} <= found.keys()
    assert leaks(found, family) == []
    assert not any("token" in leak for leak in leaks(printed, family))  # it may say where something went
    if "run" in verbs:
        names = [path.name for path in (family / "merged").iterdir()]
        assert leaks({name: hub.read("me/secrecy", name) for name in names}, family) == []
    assert leaks({"recipe": recipe.read_bytes()}, family) != [], "what is looked for can be found"


def everything(family: Path) -> dict[str, object]:
    """Return a recipe that names every place in full, for every command there is."""
    rows, others = ({"dataset": str(family / name)} for name in ("rows.parquet", "others.parquet"))
    values = classifier_recipe(
        base_model=str(family / "base"),
        tasks=[{"name": name, "model": str(family / name)} for name in "ab"],
        method="tunable_magmax",
        preference={"labels": {"target": rows, "classes": {"a": ["cat"], "b": ["dog", "emu"]}}},
        output={"path": str(family / "merged"), "push_to_hub": "me/everything"},
        sweep={"budget": 3},
        compare={"tune": rows, "report": others, "methods": ["average", "tunable_magmax"]},
    )
    spec = {"evaluator": "image-classification", "tasks": {"a": rows, "b": others}}
    return values | {"evaluation": spec}


#: Every command that writes, in an order in which it has something to write about.
WRITING = [
    "lock recipe.yaml",
    "prefer recipe.yaml",
    "compare recipe.yaml",
    "sweep recipe.yaml",
    "diagnose recipe.yaml",
    "merge recipe.yaml --output {0}/alone",
    "run recipe.yaml",
    "sweep recipe.yaml",
    "diagnose recipe.yaml",
    "evaluate recipe.yaml",
    "predict-merge recipe.yaml --history merged --rank 1 --examples 1",
    "card recipe.yaml --judgement",
    "sign merged --private-key key",
    "verify merged --public-key key --rebuild --from {0}",
    "canary merged --from {0}",
    "predict merged rows.parquet --record decisions.jsonl",
    "replay decisions.jsonl",
    "run recipe.winner.yaml --output {0}/winner",
    "import mergekit_config.yml --out imported.yaml",
    "push {0}/alone me/everything",
    "rollback me/everything",
    "merge selection.yaml",
    "apply chosen --out {0}/applied --from {0}",
    "fleet me/everything --html fleet.html",
]
WRITING_NOTHING = {"doctor", "history", "validate", "plan", "methods", "schema", "tails"}


def test_every_command_is_looked_at():
    """What the last ones write: see test_training.py, test_training_alternating.py, test_quickstart_demo.py,
    test_fleet_routing.py and test_evaluation_blind_spots.py."""
    looked_at = (
        {words.split()[0] for words in WRITING}
        | WRITING_NOTHING
        | {"alternate", "blindspots", "finetune", "quickstart", "route"}
    )
    assert looked_at == set(VERBS)


@pytest.mark.slow
def test_nothing_that_any_command_writes_names_a_token_or_a_folder_of_this_machine(
    tmp_path,
    hub,
    monkeypatch,
    stand_in,  # noqa: F811
):
    monkeypatch.chdir(tmp_path)
    write_classifiers(tmp_path, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    write_rows(tmp_path / "others.parquet", [0] * 5 + [2] * 3)
    (tmp_path / "key").write_text("key")
    mix = {"model": f"{tmp_path}/a", "parameters": {"weight": 1}}
    (tmp_path / "mergekit_config.yml").write_text(json.dumps({"merge_method": "linear", "models": [mix]}))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(everything(tmp_path)))  # which is YAML too, without anchors
    chosen = {"path": str(tmp_path / "chosen"), "format": "selection"}
    left_out = ("evaluation", "compare", "sweep", "preference")
    values = {k: v for k, v in everything(tmp_path).items() if k not in left_out} | {"output": chosen}
    (tmp_path / "selection.yaml").write_text(json.dumps(values))
    sources, found = set(written_below(tmp_path)), {}
    for words in WRITING:
        code, out, err = call(*words.format(tmp_path).split())
        assert code == 0, f"{words}: {err}"
        for token in (os.environ["HF_TOKEN"], TOKEN):
            assert token not in out + err
        now = written_below(tmp_path)  # a later command may write a file anew
        found |= {f"{name} after {words}": now[name] for name in now.keys() - sources}
    written = {name.split(" ")[0] for name in found}
    results = {"recipe.lock.json", "recipe.winner.yaml", "recipe.comparison.json", "recipe.tradeoffs.html"}
    assert results <= written
    assert {f"merged/{name}" for name in ("diagnosis.json", "model.sig", "outcomes.json")} <= written
    assert not any(".partial" in name for name in written)
    for commit in hub.commits("me/everything"):
        for name in hub.files("me/everything", commit.sha):
            found[f"{name} at {commit.title}"] = hub.read("me/everything", name, commit.sha)
        found[f"text of {commit.title}"] = commit.text.encode()
    assert leaks(found, tmp_path) == []
    assert leaks({"recipe": path.read_bytes()}, tmp_path) != [], "what is looked for can be found"


def test_no_file_of_a_merge_that_was_cut_off_names_a_folder_of_this_machine(family, monkeypatch):
    from hub_magmax.merging import execution

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(execution, "write_beside_weights", fail)
    recipe = write_recipe(family, **absolute(family))
    sources = set(written_below(family))
    code, out, err = call("merge", recipe)
    assert (code, out) == (1, "")
    assert "the memory ran out" in err
    left = {name: content for name, content in written_below(family).items() if name not in sources}
    assert any(name.startswith("merged.partial/journal/") for name in left)
    assert leaks(left, family) == []
    monkeypatch.undo()
    assert call("merge", recipe)[0] == 0
    assert not (family / "merged.partial").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": f"https://me:{TOKEN}@huggingface.co/a/b"},
        {"base_model": f"a/b@{TOKEN}"},
        {"tasks": [{"name": "a", "model": "http://me:pass@localhost/a/b"}]},
        {"output": {"path": f"./{TOKEN}"}},
        {TOKEN: 1},
        {"evaluation": {"evaluator": {"name": "x", "key": [TOKEN]}, "tasks": {}}},
    ],
    ids=["address", "revision", "password", "path", "key", "option"],
)
def test_recipe_with_a_token_is_refused_without_repeating_it(tmp_path, changes):
    path = write_recipe(tmp_path, **changes)
    for how in ([], ["--json"], ["--debug"]):
        code, out, err = call("validate", path, *how)
        assert code == 1
        told = out + err
        assert "holds an access token or a password" in told
        assert TOKEN not in told and "pass@" not in told


def test_output_given_by_an_option_is_looked_at_too(family):
    code, _, err = call("merge", write_recipe(family), "--output", family / TOKEN)
    assert code == 1
    assert "output.path: this holds an access token" in err and TOKEN not in err
    assert not any(TOKEN in path.name for path in family.iterdir())


@pytest.mark.parametrize("how", [[], ["--json"], ["--debug"]], ids=" ".join)
def test_traceback_names_no_token_whatever_it_quotes(family, monkeypatch, how):
    monkeypatch.setenv("HF_TOKEN", "a token of another kind")

    def fail(*arguments):
        try:
            raise OSError(f"http://me:pass@host/x {TOKEN}")
        except OSError as error:
            raise KeyError("a token of another kind \x1b[2J") from error

    monkeypatch.setattr("hub_magmax.recipe.loading.parse_text", fail)
    found = CliRunner().invoke(main, ["validate", str(write_recipe(family)), *how])
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr.startswith("Traceback") and "KeyError: 'hf_… " in found.stderr
    for secret in (TOKEN, "pass@", "another kind", "\x1b"):
        assert secret not in found.stderr


def test_error_names_no_token_whatever_it_quotes(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a token of another kind\n")
    error = HubMagmaxError(f"{TOKEN}", where="http://me:pass@host/x", hint="not a token of another kind")
    assert str(error) == "http://host/x: hf_…. not hf_…."
    assert error.what == "hf_…"


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
@pytest.mark.parametrize("words", [("verify", "me/x"), ("rollback", "me/x"), ("lock", "recipe.yaml")])
def test_token_that_cannot_be_sent_is_named_by_its_variable_and_not_repeated(
    family, monkeypatch, name, words
):
    monkeypatch.chdir(family)
    write_recipe(family, base_model="me/x")
    monkeypatch.delenv("HF_TOKEN")
    token = "hf_geheimnißvollesSchlüsselwort"
    monkeypatch.setenv(name, token)
    code, out, err = call(*words)
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: environment variable {name}: the access token holds characters that no")
    assert err.count("\n") == 1
    assert not any(part in err for part in ("geheim", "Schl", "\\xdf", "ordinal"))


def test_stored_token_that_cannot_be_sent_is_told_too(monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_\u200b" + "a" * 30)
    code, _, err = call("verify", "me/x")
    assert code == 1 and "the token that is stored by `hf auth login`: the access token holds" in err


@pytest.mark.parametrize("text", ["hf_", "hf_hub_download", "org/hf_model", "me@host", "https://host/a@b"])
def test_what_only_looks_like_a_token_stays(monkeypatch, text):
    monkeypatch.setenv("HF_TOKEN", "x")
    assert not holds_token(text)
    assert without_tokens(text) == without_secrets(text) == text


def test_control_characters_of_a_report_do_not_reach_the_terminal(family):
    assert call("merge", write_recipe(family))[0] == 0
    from dataclasses import replace

    from hub_magmax.merging.output.report import read_report

    path = family / "merged" / "merge_report.json"
    report = read_report(path)
    path.write_text(replace(report, files={"\x1b[2J\u202ex": "0" * 64}).to_json())
    code, _, err = call("verify", family / "merged")
    assert code == 1
    assert "\\u001b[2J\\u202ex" in err
    assert err.rstrip("\n").isprintable()


@pytest.mark.parametrize("odd", ["a\0b", "a\nb", "\x1b[2J", "\udcff", "\x9b2J"], ids=ascii)
@pytest.mark.parametrize(
    "words",
    ["merge recipe.yaml --output ?", "plan ?", "plan recipe.yaml --lock ?", "lock recipe.yaml --out ?",
     "sign ? --private-key x", "sign merged --private-key ?", "verify ?", "verify x --rebuild --from ?",
     "verify x --public-key ?", "verify x --revision ?", "canary ?", "canary x --against ?", "push ? me/x",
     "push merged ?", "rollback ?", "rollback me/x --to ?", "quickstart ?", "compare ?",
     "fleet ?", "fleet . --html ?"],
)  # fmt: skip
def test_argument_with_control_characters_is_one_paragraph(family, monkeypatch, words, odd):
    monkeypatch.chdir(family)
    write_recipe(family)
    before = set(written_below(family))
    code, out, err = call(*(word.replace("?", odd) for word in words.split(" ")))
    assert (code, out) == (1, "")
    assert err.startswith("Error: ") and ": this holds control characters, or bytes that are not text." in err
    assert err.endswith("\n") and err[:-1].isprintable()
    assert set(written_below(family)) == before


def test_output_may_hold_any_letters(family):
    assert call("merge", write_recipe(family), "--output", family / "größe \u3000 模型")[0] == 0


def test_text_without_control_characters_is_printed_as_it_is():
    assert printable("naïve ✓\nnext") == "naïve ✓\nnext"


OUT_OF_MEMORY = [
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_missing_memory_is_told_as_such_whatever_raises_it(error):
    try:
        raise RecipeError("the method failed") from error
    except RecipeError as wrapped:
        for found in (explained(error), explained(wrapped)):
            assert isinstance(found, SystemRefusalError)
            assert found.what == "the memory ran out" and found.hint


def test_memory_that_runs_out_in_a_method_is_no_fault_of_the_method():
    @methods.merge_method("hungry", source="a test")
    def hungry(task_vectors):
        raise MemoryError

    chunks = ArrayChunks(torch.zeros(2, 3))
    supplied = {"preference": (0.5, 0.5), "generator": CounterGenerator(0, "x"), "options": {}}
    with pytest.raises(MemoryError):
        hungry.merge_method.rule(chunks, shape=(3,), **supplied)


def hungry(*arguments, **options):
    raise MemoryError


def test_memory_that_runs_out_in_data_a_plugin_or_a_signature_is_no_fault_of_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", hungry)
    (tmp_path / "x").mkdir()
    with pytest.raises(MemoryError):
        data.load_examples(Data(dataset="./x"), tmp_path)
    point = type("Point", (), {"name": "x", "load": hungry})()
    monkeypatch.setattr("hub_magmax.registry.entry_points", lambda group: [point])
    with pytest.raises(MemoryError):
        Registry("method", "group", {}, "attribute").get("x")
    with pytest.raises(MemoryError), signature_errors("x", "no signature"):
        hungry()


def test_mistake_of_the_program_is_no_refusal_of_the_system():
    assert explained(RuntimeError("shapes differ")) is None
    assert explained(KeyError("x")) is None


def test_temporary_file_that_finds_no_room_is_one_paragraph(family, monkeypatch):
    assert call("merge", write_recipe(family))[0] == 0

    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr("hub_magmax.fleet.rebuilding.TemporaryDirectory", full)
    code, out, err = call("verify", family / "merged", "--rebuild", "--from", family)
    assert (code, out) == (1, "")
    assert err.startswith("Error: /tmp/x: the system refuses this (No space left on device).")


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("name", "verb"), [("merge_report.json", "verify"), ("recipe.lock.json", "card"), ("scores.json", "card")]
)
def test_deeply_nested_file_is_told_in_one_paragraph(family, name, verb):
    recipe = write_recipe(family)
    assert call("merge", recipe)[0] == 0
    (family / "merged" / name).write_text(DEEP)
    code, _, err = call(verb, family / "merged" if verb == "verify" else recipe)
    assert code == 1
    assert err.startswith("Error: ") and len(err) < 500


def test_merge_report_that_was_changed_is_refused(family):
    assert call("merge", write_recipe(family))[0] == 0
    path = family / "merged" / "merge_report.json"
    values = json.loads(path.read_text())
    for changed, told in (
        (values | {"plan_digest": "sha256:0"}, "the digest does not fit the content"),
        (values | {"shards": []}, "not a merge report of this version"),
    ):
        path.write_text(json.dumps(changed))
        code, _, err = call("verify", family / "merged")
        assert code == 1 and told in err


def test_file_beside_the_weights_of_any_size_is_not_read(family):
    with (family / "base" / "big.json").open("w") as file:
        file.truncate(10**12)  # takes no room on the disk
    code, _, err = call("merge", write_recipe(family))
    assert code == 1
    assert "./base, big.json: 1,000,000,000,000 bytes long. Expected at most 500,000,000" in err
    assert not (family / "merged").exists() and not (family / "merged.partial").exists()
