import json
import re
import shutil
import socket
import time
from collections import namedtuple

import pytest
from huggingface_hub import constants

from hub_magmax.cli import environment
from tests.families import write_recipe
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
    if found["loops"]["kept"] < found["loops"]["all"]:  # the range, and of all together
        assert re.search(r"2 to 60 s each,\s+up to 2 minutes in all", out)
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
    text = " ".join(out.split())
    assert code == 0 and "Merges of folders do without it" in text
    assert text.endswith("nothing here stops a merge, but see the warnings: Hub")
    assert ("no answer in 0.5 s" if kind == "silent" else "ConnectError") in text


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


@pytest.mark.parametrize(
    ("endpoint", "meant"),
    [
        ("huggingface.co", ": did you mean https://huggingface.co?"),
        ("htps://huggingface.co", ": did you mean https://huggingface.co?"),
        ("localhost:8080", ": did you mean https://localhost:8080?"),
        ("https://", "."),
    ],
)
def test_hub_without_an_address_is_told_as_such_and_not_asked(hub, monkeypatch, tmp_path, endpoint, meant):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    code, out, _ = call("doctor")
    text = " ".join(out.split())
    assert code == 1 and f"STOPS '{endpoint}' is no address{meant} Correct HF_ENDPOINT" in text
    path = write_recipe(tmp_path, base_model="acme/x", tasks=[{"name": "a", "model": "acme/y"}])
    started = time.perf_counter()
    code, _, err = call("lock", path)
    assert code == 1 and "is no address" in err
    assert time.perf_counter() - started < 5, "it is not asked again and again"
    assert not hub.log


@pytest.mark.parametrize(
    ("host", "known", "is_wrong"),
    [
        ("huggingfac.e", (), True),  # like the usual name, on a machine that knows no name
        ("hub.example", ("huggingface.co",), True),
        ("hub.example", (), False),  # nothing is known: that is the network
        ("hub.example", ("hub.example",), False),
        ("huggingface.co", (), False),
    ],
)
def test_misspelt_host_is_told_from_a_network_that_fails(hub, monkeypatch, host, known, is_wrong):
    def look_up(name, port):
        if name not in known:
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(constants, "ENDPOINT", f"https://{host}")
    found = json.loads(call("doctor", "--json")[1])["Hub"]
    assert bool(found["problem"]) is is_wrong and bool(found["warning"]) is not is_wrong
    if is_wrong:
        assert found["problem"].startswith(f"no such host as {host}: Correct HF_ENDPOINT")


@pytest.mark.parametrize(("status", "stops"), [(404, True), (503, False)])
def test_answer_of_no_hub_stops_and_one_that_passes_warns(hub, monkeypatch, status, stops):
    monkeypatch.setattr(environment, "ANSWER_SECONDS", 20.0)
    hub.faults.add("/api/whoami-v2", "status", status=status)
    code, out, _ = call("doctor")
    assert code == int(stops) and f"the answer has status {status}" in " ".join(out.split())


def test_folder_that_cannot_be_written_is_told_by_its_name_with_what_does_without(hub, monkeypatch, tmp_path):
    (tmp_path / "file").touch()  # in which no folder can be made, whoever asks
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setattr(constants, name, str(tmp_path / "file" / name))
    monkeypatch.setenv("HUB_MAGMAX_SCORES", str(tmp_path / "file" / "scores"))
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    told = {subject: found[subject]["warning"] for subject in ("Hub cache", "data sets", "scores")}
    assert code == 0 and all("it cannot be written (Not a directory)" in text for text in told.values())
    assert told["Hub cache"].endswith("merges do without it, and models of the Hub are not scored")
    assert "HF_DATASETS_CACHE" in told["data sets"] and "HUB_MAGMAX_SCORES" in told["scores"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    found = json.loads(call("doctor", "--json")[1])
    assert "set TMPDIR to another folder" in found["temporary"]["problem"]


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
