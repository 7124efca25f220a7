"""Files beside the weights that belong to a model: what is copied, pinned, published, and left behind."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from hub_magmax.checkpoints.needed_files import needed_files
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.errors import CheckpointError, LockError, OutputError, SourceError
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.rollback import rollback
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.planning.summary import notices
from hub_magmax.publishing.preflight import check_room
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import read_lock
from tests.families import write_recipe

SENTENCE_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def dense(value=1.0):
    return save({"linear.weight": torch.full((4, 6), value)})


def sentence_files(value=1.0):
    """Files of a sentence-transformers model beside its weights, as that library saves them."""
    return {
        "modules.json": json.dumps(SENTENCE_MODULES).encode(),
        "config_sentence_transformers.json": b"{}",
        "sentence_bert_config.json": b'{"max_seq_length": 128}',
        "1_Pooling/config.json": b'{"word_embedding_dimension": 6, "pooling_mode_mean_tokens": true}',
        "2_Dense/config.json": b'{"in_features": 6, "out_features": 4, "bias": false}',
        "2_Dense/model.safetensors": dense(value),
    }


CODE_FILES = {
    "config.json": json.dumps(
        {
            "auto_map": {
                "AutoConfig": "configuration_tiny.TinyConfig",
                "AutoModel": "modeling_tiny.TinyModel",
                "AutoModelForCausalLM": "other/tiny--modeling_far.FarModel",
            },
            "custom_pipelines": {"tiny": {"impl": "tiny_pipeline.TinyPipeline", "pt": ["AutoModel"]}},
        }
    ).encode(),
    "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", null]}}',
    "configuration_tiny.py": b"from transformers import PretrainedConfig\n",
    "modeling_tiny.py": b"import torch\nfrom .configuration_tiny import TinyConfig\n"
    b"from .layers.attention import (\n    Attention,  # fast\n    rotate,\n)\nfrom . import helpers\n",
    "layers/__init__.py": b"",
    "layers/attention.py": b"from ..deep import norm\nfrom .inner.rope import turn\n",
    "layers/inner/rope.py": b"raise RuntimeError('code of a checkpoint is never run')\n",
    "deep.py": b"def norm(:\n",
    "helpers.py": b"try:\n    from . import absent\nexcept ImportError:\n    pass\n",
    "tiny_pipeline.py": b"",
    "tokenization_tiny.py": b"",
    "modeling_far.py": b"",
    "train.py": b"",
}  # fmt: skip
COPIED_CODE = {*CODE_FILES} - {"modeling_far.py", "train.py"}


def put(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def needed(**files):
    return set(needed_files(MemorySource(files)))


def test_code_that_configurations_name_is_needed_with_what_it_imports():
    assert needed(**CODE_FILES) == COPIED_CODE


@pytest.mark.parametrize(
    "path",
    [
        "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "dict.bpe",
        "bpe.codes", "x.tokenizer", "bpe_simple_vocab_16e6.txt.gz", "tokenizer.model.v3",
        "qwen.tiktoken", "vocab.bin", "vocab.txt", "merges.txt", "source.vocab", "preprocessor_config.json",
        "video_preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
        "chat_templates/rag.jinja", "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "hyperparams.yaml",
        "custom_generate/generate.py",
    ],
)  # fmt: skip
def test_files_that_loaders_know_by_name_are_needed(path):
    assert needed(**{path: b"x"}) == {path}


@pytest.mark.parametrize(
    "path",
    [
        "pytorch_model.bin", "optimizer.pt", "train.py", "README.md", ".gitattributes", "picture.png",
        "onnx/config.json", "checkpoint-500/config.json", "runs/events.txt", "con/tokenizer.model",
        "model.safetensors",
    ],
)  # fmt: skip
def test_other_files_are_not(path):
    assert needed(**{path: b"x"}) == set()


def test_files_that_a_configuration_names_by_path_are_needed():
    config = {"voices": {"a": {"prompt": "voices/a.npy", "style": "./voices/b.npy"}}, "state": "state.bin"}
    config |= {"examples": "data/private.csv"}
    names = ("voices/a.npy", "voices/b.npy", "voices/c.npy", "state.bin", "data/private.csv")
    files = dict.fromkeys(names, b"x")
    found = needed(**{"speaker_embeddings_path.json": json.dumps(config).encode()}, **files)
    assert found == {"speaker_embeddings_path.json", "voices/a.npy", "voices/b.npy"}
    trained = {"training_config.json": b'{"data": "data/private.txt"}', "data/private.txt": b"x"}
    assert needed(**trained) == {"training_config.json"}


@pytest.mark.parametrize("written", ["../secret.txt", "/etc/passwd", "a\\b.txt", "C:x.txt", "nul.txt", "", 7])
def test_configuration_cannot_name_files_elsewhere(tmp_path, written):
    from hub_magmax.checkpoints.storage.local import LocalSource

    put(tmp_path, {"secret.txt": b"x", "model/config.json": json.dumps({"name": written}).encode()})
    put(tmp_path / "model", {"modules.json": json.dumps([{"path": written}]).encode()})
    assert set(needed_files(LocalSource(tmp_path / "model"))) == {"config.json", "modules.json"}


def test_link_out_of_a_folder_that_is_needed_is_refused(tmp_path):
    from hub_magmax.checkpoints.storage.local import LocalSource

    put(tmp_path, {"secret/config.json": b"{}", "model/modules.json": b'[{"path": "1_Pooling"}]'})
    (tmp_path / "model" / "1_Pooling").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="'1_Pooling' is a link that leads out of the folder"):
        needed_files(LocalSource(tmp_path / "model"))


def test_folders_in_a_snapshot_of_the_hubs_cache_are_read_through_its_links(tmp_path):
    from hub_magmax.checkpoints.storage.local import LocalSource

    snapshot = tmp_path / "models--me--x" / "snapshots" / ("0" * 40)
    for number, (path, content) in enumerate(sentence_files().items()):
        put(tmp_path / "models--me--x", {f"blobs/{number}": content})
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + path.count("/"))
        (snapshot / path).symlink_to(f"{up}blobs/{number}")
    source = LocalSource(snapshot)
    assert set(needed_files(source)) == {*sentence_files()}
    size = source.size_of("2_Dense/model.safetensors")
    assert source.read_bytes("2_Dense/model.safetensors", 0, size) == dense()


def test_folder_of_a_module_with_thousands_of_files_is_refused():
    files = {f"data/{number}.json": b"{}" for number in range(1001)}
    with pytest.raises(CheckpointError, match=r"data, which modules.json names, holds more than 1,000"):
        needed(**{"modules.json": b'[{"path": "data"}]'}, **files)


def test_merged_sentence_transformer_has_its_modules(family):
    for name, value in (("base", 1.0), ("a", 1.0), ("b", 2.0), ("c", 1.0)):
        put(family / name, sentence_files(value))
    recipe = load_recipe(write_recipe(family))
    merge(plan(recipe))
    assert files_of(family / "merged") >= {*sentence_files()}
    assert (family / "merged" / "2_Dense" / "model.safetensors").read_bytes() == dense()
    assert notices(plan(recipe)) == (
        "2_Dense/model.safetensors is copied from base_model and not merged; that of b differs",
    )
    assert set(verify(str(family / "merged"))) >= {*sentence_files()}
    rebuild(str(family / "merged"), folder=family)


def test_code_that_differs_is_told(family):
    for name in ("base", "a", "b", "c"):
        put(family / name, CODE_FILES | ({"helpers.py": b"def rotate(): ...\n"} if name == "b" else {}))
    told = notices(plan(load_recipe(write_recipe(family))))[0]
    assert told == "helpers.py is copied from base_model and not merged; that of b differs"


def test_files_in_sub_folders_are_pinned(family):
    put(family / "base", sentence_files())
    recipe = load_recipe(write_recipe(family))
    pinned = lock(recipe)
    put(family / "base", {"2_Dense/model.safetensors": dense(3.0)})
    with pytest.raises(LockError, match=r"2_Dense/model.safetensors changed since the lock was written"):
        plan(recipe, pinned)
    (family / "base" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(LockError, match=r"2_Dense/model.safetensors changed"):
        plan(recipe, pinned)


def test_room_is_looked_for_also_for_large_files_in_sub_folders(family):
    put(family / "base", sentence_files())
    with (family / "base" / "2_Dense" / "model.safetensors").open("ab") as file:
        file.truncate(30_000_000)
    planned = plan(load_recipe(write_recipe(family)))
    assert planned.copied_bytes > 30_000_000
    assert check_room(planned) > 50_000_000


@pytest.mark.parametrize("path", ["../secret.txt", "a/../../secret.txt", "/etc/passwd", "link/secret.txt"])
def test_report_cannot_have_files_elsewhere_read(family, path):
    put(family, {"secret.txt": b"x", "elsewhere/secret.txt": b"x"})
    merge(plan(load_recipe(write_recipe(family))))
    (family / "merged" / "link").symlink_to(family / "elsewhere")
    report = json.loads((family / "merged" / "merge_report.json").read_text())
    report["files"][path] = hashlib.sha256(b"x").hexdigest()
    (family / "merged" / "merge_report.json").write_text(json.dumps(report))
    with pytest.raises((SourceError, OutputError)):
        verify(str(family / "merged"))


def test_lock_that_pins_fewer_files_copies_what_it_pins(family):
    """Earlier versions pinned files at the top, by their suffix."""
    put(family / "base", CODE_FILES | {"source.spm": b"x", "LICENSE": b"x"})
    recipe = load_recipe(write_recipe(family))
    found = lock(recipe)
    early = ("config.json", "tokenizer_config.json")
    side_files = {path: found.base_model.side_files[path] for path in early}
    pinned = replace(found, base_model=replace(found.base_model, side_files=side_files))
    merge(plan(recipe, pinned))
    written = files_of(family / "merged")
    assert written >= {*early}
    assert not written & ({*CODE_FILES, "source.spm", "LICENSE"} - {*early})
    rebuild(str(family / "merged"), folder=family)


def test_change_of_a_nested_file_after_the_merge_is_found(family):
    put(family / "base", sentence_files() | CODE_FILES)
    run(load_recipe(write_recipe(family)))
    folder = family / "merged"
    assert files_of(folder) >= COPIED_CODE
    (folder / "layers" / "more.py").write_text("")
    with pytest.raises(OutputError, match=r"layers/more.py: the merge did not write this file"):
        verify(str(folder))
    (folder / "layers" / "more.py").unlink()
    (folder / "layers" / "attention.py").write_text("other")
    with pytest.raises(OutputError, match=r"layers/attention.py: sha256 is"):
        verify(str(folder))


@pytest.mark.parametrize("keep", [True, False])
def test_files_in_sub_folders_come_from_the_hub_and_go_to_it(family, hub, keep):
    name = f"me/modules-{keep}"
    files = {path.name: path.read_bytes() for path in (family / "base").iterdir()}
    hub.add_repo(f"{name}-base", files=files | sentence_files() | CODE_FILES | {"notes/x.txt": b"x"})
    output = {"path": f"out-{keep}", "push_to_hub": name, "keep": keep}
    done = run(load_recipe(write_recipe(family, base_model=f"{name}-base", output=output)))
    expected = {*sentence_files(), *COPIED_CODE}
    assert {*hub.files(name)} >= expected
    assert all(hub.read(name, path) == (sentence_files() | CODE_FILES)[path] for path in expected)
    assert "notes/x.txt" not in hub.files(name)
    assert set(verify(name)) >= expected
    assert set(read_lock_of(hub, name, family).base_model.side_files) >= expected
    first = done.published.commit
    other = {"path": "second", "push_to_hub": name, "keep": keep}
    run(load_recipe(write_recipe(family, output=other)))
    rollback(name, to=first)
    assert {*hub.files(name)} >= expected


def read_lock_of(hub, name, folder):
    (folder / "fetched.json").write_bytes(hub.read(name, "recipe.lock.json"))
    return read_lock(folder / "fetched.json")


def test_what_is_left_behind_is_named_by_kind(family):
    put(
        family / "base",
        CODE_FILES
        | {
            "README.md": b"x", ".gitattributes": b"x", "optimizer.pt": b"x", "rng_state.pth": b"x",
            "pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "picture.png": b"x", "notes.csv": b"x",
            "checkpoint-500/model.safetensors": b"x", "runs/x": b"x", "trainer_state.json": b"{}",
        },
    )  # fmt: skip
    (notice,) = notices(plan(load_recipe(write_recipe(family))))
    assert notice == (
        "left behind from base_model: "
        "state of a training (checkpoint-500/, optimizer.pt, rng_state.pth and 2 more); "
        "weights in other formats (onnx/, pytorch_model.bin); pictures (picture.png); "
        "code that no configuration names (modeling_far.py, train.py); others (notes.csv); "
        "README.md (the merged model gets its own)"
    )
    report = run(load_recipe(write_recipe(family))).report
    assert report.notices == (notice,)
    assert "checkpoint-500/, optimizer.pt" in (family / "merged" / "README.md").read_text()


def test_usual_folder_leaves_nothing_worth_a_line(family):
    put(family / "base", dict.fromkeys((".gitattributes", "README.md", "LICENSE", "recipe.yaml"), b"x"))
    assert notices(plan(load_recipe(write_recipe(family)))) == ()


def test_pickle_of_a_module_is_named_and_its_advice_leads_to_a_whole_model(family):
    files = sentence_files()
    del files["2_Dense/model.safetensors"]
    put(family / "base", files)
    torch.save({"linear.weight": torch.ones(4, 6)}, family / "base" / "2_Dense" / "pytorch_model.bin")
    recipe = load_recipe(write_recipe(family))
    told = notices(plan(recipe))[0]
    assert told.startswith("2_Dense/pytorch_model.bin of base_model is a pickle, which is not copied unread")
    code = told.split('python -c "')[1].split('"')[0]
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], cwd=family / "base" / "2_Dense", check=True)
    assert notices(plan(recipe)) == ()
    merge(plan(recipe))
    assert (family / "merged" / "2_Dense" / "model.safetensors").read_bytes() == dense()


DAMAGED_FILES = (
    "tokenizer.json", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "vocab.txt",
    "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@pytest.mark.parametrize("path", DAMAGED_FILES)
def test_empty_file_that_loaders_read_is_refused(family, path):
    put(family / "base", sentence_files() | {path: b""})
    with pytest.raises(
        CheckpointError, match=rf"base, {path}: .*(0 bytes|character 0).*download or save it again"
    ):
        plan(load_recipe(write_recipe(family)))


def test_empty_file_on_the_hub_is_refused_before_it_is_read(family, hub):
    put(family / "base", sentence_files() | {"1_Pooling/config.json": b""})
    hub.add_repo("acme/hollow", folder=family / "base")
    recipe = load_recipe(write_recipe(family, base_model="acme/hollow"))
    locked = lock(recipe)
    hub.reset_log()
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json: the file is empty \(0 bytes\)"):
        plan(recipe, locked)
    assert not [exchange for exchange in hub.log if "1_Pooling/config.json" in exchange.path]


@pytest.mark.parametrize("path", ["tokenizer.json", "modules.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("content", [b'{"model": {"vocab": {"a": 0', b"<html>", b"\xff\xfe"])
def test_json_that_cannot_be_read_is_refused(family, path, content):
    put(family / "base", sentence_files() | {path: content})
    with pytest.raises(CheckpointError, match=f"base, {path}: not readable as JSON"):
        plan(load_recipe(write_recipe(family)))


def test_files_that_may_be_empty_or_no_json_are_copied(family):
    harmless = {
        "LICENSE": b"",
        "notes.txt": b"",
        "log.json": b'{"a": 1}\n{"a": 2}\n',
        "twice.json": b'{"a": 1, "a": 2}',
    }
    put(family / "base", sentence_files() | harmless | {"2_Dense/__init__.py": b""})
    put(family / "b", {"tokenizer.json": b""})  # which is not copied
    run(load_recipe(write_recipe(family)))
    assert {*harmless, "2_Dense/__init__.py"} <= files_of(family / "merged")
