import json
import shutil
import socket
import time
from collections import namedtuple

import pytest
from huggingface_hub import constants

from hub_magmax.cli import environment
from tests.test_cli import call


@pytest.fixture
def address(monkeypatch):
    """A port at which somebody listens and never answers, as the Hub's endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_doctor_shows_everything_in_one_screen_and_never_the_token(hub, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_TOKEN", hub.add_user("dana"))
    code, out, _ = call("doctor")
    assert code == 0 and out.endswith("nothing here stops a merge\n")
    lines = out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) < 80
    assert "there, from HF_TOKEN: dana, role write" in out
    assert f"{hub.endpoint} answers in" in out
    code, text, _ = call("doctor", "--json")
    found = json.loads(text)
    assert code == 0 and not any(condition["problem"] for condition in found.values())
    assert found["token"]["user"] == "dana"
    assert found["memory"]["free_bytes"] > 0 and found["output"]["free_bytes"] > 0
    assert found["versions"]["torch"] and found["loops"]["all"] > 10
    assert hub.add_user("dana") not in out + text


def test_a_token_that_the_hub_refuses_stops_merges(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody_has_this_token")
    code, out, _ = call("doctor")
    assert code == 1 and "STOPS      the Hub refuses it; run `hf auth login` again" in out
    assert "hf_nobody" not in out


def test_without_a_token_the_hub_answers_all_the_same(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = call("doctor")
    assert code == 0 and "none: public models can be read" in out and "answers in" in out


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_no_failure_of_the_network_hangs_it(address, monkeypatch, kind):
    monkeypatch.setattr(environment, "REQUEST_SECONDS", 60.0)
    monkeypatch.setattr(environment, "ANSWER_SECONDS", 0.5)
    if kind == "closed":
        address.close()
    started = time.perf_counter()
    code, out, _ = call("doctor")
    assert time.perf_counter() - started < 30  # of which torch may take some
    assert code == 1
    assert ("no answer in 0.5 s" if kind == "silent" else "ConnectError") in " ".join(out.split())


def test_offline_nothing_is_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, _ = call("doctor")
    assert code == 0 and "was not asked: HF_HUB_OFFLINE is set" in " ".join(out.split())
    assert not hub.log


def test_a_full_disk_stops_merges(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5, 5))
    code, out, _ = call("doctor")
    assert code == 1 and "the disk is nearly full; go to a folder that you may write to" in " ".join(
        out.split()
    )


def test_plug_ins_of_every_kind_are_shown(hub, tmp_path, monkeypatch):
    info = tmp_path / "many-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: many\nVersion: 1.0\n")
    groups = ("methods", "evaluators", "sources")
    (info / "entry_points.txt").write_text("".join(f"[hub_magmax.{g}]\nmy-{g} = many:x\n" for g in groups))
    monkeypatch.syspath_prepend(tmp_path)
    found = json.loads(call("doctor", "--json")[1])["plug-ins"]["found"]
    names = [name for name, package in found if package == "many"]
    assert names == ["my-evaluators", "my-methods", "my-sources"]
