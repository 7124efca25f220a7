"""The wrapper around model-signing against a stand-in, and against the package where it is installed."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from hub_magmax.errors import MissingDependencyError, OutputError, SignatureError
from hub_magmax.fleet.signing import SIGNATURE_NAME, check_signature, sign
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import plan
from hub_magmax.recipe.loading import load_recipe
from tests.families import write_recipe
from tests.test_cli import call


@pytest.fixture
def merged(family):
    merge(plan(load_recipe(write_recipe(family))))
    return family / "merged"


class Recorder:
    """Stands for the three `Config` classes: signs by listing the files, with the key as the signature."""

    def __init__(self):
        self.ignored, self.key = frozenset(), None

    def set_ignored_paths(self, *, paths):
        self.ignored = frozenset(paths)
        return self

    def set_hashing_config(self, config):
        self.ignored = config.ignored
        return self

    def use_elliptic_key_signer(self, *, private_key):
        self.key = Path(private_key).read_text()
        return self

    def use_elliptic_key_verifier(self, *, public_key):
        return self.use_elliptic_key_signer(private_key=public_key)

    def text(self, folder):
        paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = sorted(path for path in paths if path not in self.ignored)
        return "\n".join([self.key, *(f"{name} {hash((folder / name).read_bytes())}" for name in names)])

    def sign(self, folder, signature):
        signature.write_text(self.text(folder))

    def verify(self, folder, signature):
        if signature.read_text() != self.text(folder):
            raise ValueError("Signature mismatch: []")


def put_stand_in(monkeypatch):
    """Put `Recorder` in the place of model-signing."""
    package = ModuleType("model_signing")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "model_signing", package)
    for name in ("signing", "verifying", "hashing"):
        monkeypatch.setitem(sys.modules, f"model_signing.{name}", SimpleNamespace(Config=Recorder))


@pytest.fixture
def stand_in(monkeypatch):
    put_stand_in(monkeypatch)


@pytest.fixture
def keys(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).write_text(name)
    return SimpleNamespace(private=tmp_path / "mine", public=tmp_path / "mine", other=tmp_path / "theirs")


@pytest.mark.usefixtures("stand_in")
def test_signature_covers_the_files_of_the_merge_and_its_report(merged, keys):
    (merged / "README.md").write_text("a card")
    path = sign(merged, keys.private)
    names = [line.split(" ")[0] for line in path.read_text().splitlines()[1:]]
    assert names == sorted({path.name for path in merged.iterdir()} - {"README.md", SIGNATURE_NAME})
    assert "merge_report.json" in names and "model.safetensors" in names


@pytest.mark.usefixtures("stand_in")
def test_commands_sign_and_check(merged, keys):
    assert call("sign", merged, "--private-key", keys.private)[0] == 0
    code, out, _ = call("verify", merged, "--public-key", keys.public)
    assert code == 0 and "signed by the owner of" in out
    code, _, err = call("verify", merged, "--public-key", keys.other)
    assert code == 1 and "the signature does not fit the model and the key" in err
    assert sorted(path.suffix for path in merged.glob("model.sig*")) == [".sig"]


def test_missing_package_is_told_with_the_line_that_installs_it(merged, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hub-magmax\[signing\]'"):
        sign(merged, keys.private)


@pytest.mark.usefixtures("stand_in")
def test_folder_that_changed_is_not_signed(merged, keys):
    (merged / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"config\.json: sha256 is"):
        sign(merged, keys.private)
    assert not (merged / SIGNATURE_NAME).exists()


@pytest.mark.usefixtures("stand_in")
def test_what_cannot_be_signed_or_checked_is_one_sentence(merged, keys):
    with pytest.raises(SignatureError, match=r"there is no model\.sig"):
        check_signature(merged, keys.public)
    with pytest.raises(SignatureError, match=r"the key cannot be used \(FileNotFoundError"):
        sign(merged, merged / "none")
    with pytest.raises(OutputError, match="hf download"):
        check_signature("me/some-model", keys.public)


@pytest.fixture
def real_keys(tmp_path):
    pytest.importorskip("model_signing", reason="the extra `signing` is not installed")
    for name in ("mine", "theirs"):
        make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem"]
        subprocess.run(make, cwd=tmp_path, check=True)
        publish = ["openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"]
        subprocess.run(publish, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_real_signature_survives_a_new_card_and_a_new_folder_and_nothing_else(merged, real_keys):
    sign(merged, real_keys / "mine.pem")
    check_signature(merged, real_keys / "mine.pub")
    moved = merged.rename(merged.with_name("elsewhere"))
    (moved / "README.md").write_text("another card")
    check_signature(moved, real_keys / "mine.pub")
    with pytest.raises(SignatureError, match="does not fit"):
        check_signature(moved, real_keys / "theirs.pub")
    with pytest.raises(SignatureError, match="the key cannot be used"):
        sign(moved, real_keys / "mine.pub")
    report = moved / "merge_report.json"
    report.write_text(report.read_text().replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(SignatureError, match=r"merge_report\.json"):
        check_signature(moved, real_keys / "mine.pub")


@pytest.mark.usefixtures("stand_in")
def test_signature_covers_sub_folders_of_the_merge_and_no_others(family, keys):
    (family / "base" / "1_Pooling").mkdir()
    (family / "base" / "1_Pooling" / "config.json").write_text("{}")
    (family / "base" / "modules.json").write_text('[{"path": "1_Pooling"}]')
    merge(plan(load_recipe(write_recipe(family))))
    folder = family / "merged"
    sign(folder, keys.private)
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("written afterwards")
    check_signature(folder, keys.public)
    report = json.loads((folder / "merge_report.json").read_text())
    report["files"].pop("1_Pooling/config.json")
    (folder / "merge_report.json").write_text(json.dumps(report))
    with pytest.raises(SignatureError):
        check_signature(folder, keys.public)
