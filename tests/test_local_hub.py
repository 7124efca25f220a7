"""The local Hub, driven by the real clients."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hub_magmax.errors import HubMagmaxError, OutputError, SourceError
from tests.browser import Page, find_browser
from tests.local_hub.__main__ import main
from tests.local_hub.faults import Faults
from tests.local_hub.hub import LocalHub
from tests.local_hub.metadata import validate
from tests.local_hub.objects import belongs_in_lfs
from tests.local_hub.rendering import rendered
from tests.local_hub.wire import Body, FileSlice, RefusalError, Request, file_response

# The client's own upload code still passes files as `data`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parents[1]
WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": b'{"model_type": "tiny"}', "w/model.safetensors": WEIGHTS}
CARD = b"""---
license: mit
library_name: transformers
base_model: me/base
base_model_relation: merge
---
# Hello
"""


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as running:
        running.add_repo("me/model", files=FILES)
        running.reset_log()
        yield running


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def url_of(hub: LocalHub, path: str, repo: str = "me/model") -> str:
    return hf_hub_url(repo, path, endpoint=hub.endpoint)


def location_of(hub: LocalHub, path: str = "w/model.safetensors") -> str:
    return get_hf_file_metadata(url_of(hub, path)).location


def get(url: str, range_header: str = "") -> httpx.Response:
    headers = {"Accept-Encoding": "identity"} | ({"Range": range_header} if range_header else {})
    return get_session().get(url, headers=headers)


def add(api: HfApi, files: dict[str, bytes], repo: str = "me/model", **options: Any) -> Any:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo, operations, commit_message="Add", **options)


# Reading.


def test_a_snapshot_holds_every_file_byte_for_byte(hub: LocalHub) -> None:
    folder = Path(snapshot_download("me/model", endpoint=hub.endpoint))
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert folder.name == hub.head("me/model")


def test_metadata_of_a_large_file_names_its_sha256_and_a_place_on_another_host(hub: LocalHub) -> None:
    metadata = get_hf_file_metadata(url_of(hub, "w/model.safetensors"))
    assert metadata.etag == sha256(WEIGHTS).hexdigest()
    assert (metadata.size, metadata.commit_hash) == (len(WEIGHTS), hub.head("me/model"))
    assert httpx.URL(metadata.location).host == "localhost"
    assert metadata.xet_file_data is None


def test_a_small_file_is_served_by_the_hub_itself_under_its_git_id(hub: LocalHub) -> None:
    hub.add_repo("me/small", files={"a.txt": b"hello\n"})
    metadata = get_hf_file_metadata(url_of(hub, "a.txt", "me/small"))
    # What `git hash-object` says of these six bytes.
    assert metadata.etag == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert metadata.location == url_of(hub, "a.txt", "me/small")


def test_a_commit_has_the_id_that_git_gives_it() -> None:
    files = {"a-x": b"1", "a/b.txt": b"x", "a.b/c": b"y", "a/z/d.txt": b"", "é": b"u"}
    with LocalHub(clock=lambda: 1000.0) as hub:
        # Made once by `git commit` on top of an empty first commit, from the same files, name and date.
        assert hub.add_repo("me/x", files=files) == "7804c20eb0be308554257317bf0378657d9cb44a"


def test_the_client_does_not_show_its_token_to_the_storage_host(hub: LocalHub, tmp_path: Path) -> None:
    hf_hub_download(
        "me/model", "w/model.safetensors", endpoint=hub.endpoint, token=hub.token, cache_dir=tmp_path
    )
    assert [(e.route, e.authenticated) for e in hub.log] == [("resolve", True), ("storage", False)]


def test_the_storage_host_refuses_a_request_that_shows_a_token(hub: LocalHub) -> None:
    headers = {"Authorization": f"Bearer {hub.token}"}
    assert get_session().get(location_of(hub), headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("range_header", "expected", "content_range"),
    [
        ("bytes=0-0", WEIGHTS[:1], f"bytes 0-0/{len(WEIGHTS)}"),
        ("bytes=100-299", WEIGHTS[100:300], f"bytes 100-299/{len(WEIGHTS)}"),
        ("bytes=10000-", WEIGHTS[10000:], f"bytes 10000-10239/{len(WEIGHTS)}"),
        ("bytes=-7", WEIGHTS[-7:], f"bytes 10233-10239/{len(WEIGHTS)}"),
        ("bytes=10239-99999", WEIGHTS[-1:], f"bytes 10239-10239/{len(WEIGHTS)}"),
    ],
)
def test_a_range_gives_its_bytes_and_says_which(
    hub: LocalHub, range_header: str, expected: bytes, content_range: str
) -> None:
    answer = get(location_of(hub), range_header)
    assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["Content-Range"] == content_range


def test_a_range_behind_the_end_is_refused_with_the_size(hub: LocalHub) -> None:
    answer = get(location_of(hub), "bytes=10240-")
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */10240")


@given(size=st.integers(1, 50), first=st.integers(0, 60), length=st.integers(1, 60))
def test_every_range_equals_a_slice(size: int, first: int, length: int) -> None:
    asked = request(headers={"range": f"bytes={first}-{first + length - 1}"})
    if first >= size:
        with pytest.raises(RefusalError, match="not satisfiable"):
            file_response(asked, Path("unused"), size, {})
        return
    content = file_response(asked, Path("unused"), size, {}).content
    assert isinstance(content, FileSlice)
    assert range(size)[first : first + length] == range(content.start, content.start + content.num_bytes)


def test_a_signed_url_ends_when_its_time_is_over() -> None:
    now = [1000.0]
    with LocalHub(clock=lambda: now[0], url_lifetime_seconds=60) as hub:
        hub.add_repo("me/model", files=FILES)
        location = location_of(hub)
        now[0] = 1059.0
        assert get(location).content == WEIGHTS
        now[0] = 1060.0
        refused = get(location)
    assert (refused.status_code, "Request has expired" in refused.text) == (403, True)


def test_a_changed_signed_url_is_refused(hub: LocalHub) -> None:
    location = httpx.URL(location_of(hub))
    later = location.copy_set_param("expires", str(int(location.params["expires"]) + 9))
    other = location.copy_with(path=location.path.replace("model.safetensors", "other.safetensors"))
    assert [get(str(url)).status_code for url in (location, later, other)] == [200, 403, 403]


def test_info_describes_files_card_and_tags(hub: LocalHub, api: HfApi) -> None:
    hub.add_repo("me/model", files={"README.md": CARD})
    found = api.model_info("me/model", files_metadata=True)
    assert found.siblings is not None and found.card_data is not None and found.tags is not None
    large = {file.rfilename: file.lfs for file in found.siblings}["w/model.safetensors"]
    assert large is not None and (large.sha256, large.size) == (sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert (found.card_data.license, found.library_name, found.private, found.gated) == (
        "mit", "transformers", False, False,
    )  # fmt: skip
    assert {"license:mit", "base_model:me/base", "base_model:merge:me/base"} <= set(found.tags)


def test_a_long_listing_comes_in_pages_and_names_each_file_once(hub: LocalHub, api: HfApi) -> None:
    files = {f"d/{number:03}.txt": b"x" for number in range(70)}
    hub.add_repo("me/many", files=files)
    hub.reset_log()
    listed = [item.path for item in api.list_repo_tree("me/many", recursive=True, expand=True)]
    assert sorted(listed) == ["d", *files]
    assert hub.counts["GET tree"] == 2


def test_a_listing_tells_which_commit_changed_a_file_last(hub: LocalHub, api: HfApi) -> None:
    first = hub.head("me/model")
    second = hub.add_repo("me/model", files={"config.json": b"{}"})
    rows: dict[str, Any] = {
        item.path: item.last_commit for item in api.list_repo_tree("me/model", expand=True)
    }
    assert {path: commit.oid for path, commit in rows.items()} == {"config.json": second, "w": first}


def test_paths_info_passes_over_what_does_not_exist(api: HfApi) -> None:
    found: list[Any] = api.get_paths_info("me/model", ["w/model.safetensors", "w", "nowhere.txt"])
    assert [item.path for item in found] == ["w/model.safetensors", "w"]
    assert found[0].lfs.sha256 == sha256(WEIGHTS).hexdigest()


def test_a_missing_file_is_told_apart_from_a_missing_revision_and_repository(hub: LocalHub) -> None:
    download: Callable[..., str] = hf_hub_download
    with pytest.raises(EntryNotFoundError):
        download("me/model", "nowhere.txt", endpoint=hub.endpoint)
    with pytest.raises(RevisionNotFoundError):
        download("me/model", "config.json", revision="nowhen", endpoint=hub.endpoint)
    with pytest.raises(RepositoryNotFoundError):
        download("me/nothing", "config.json", endpoint=hub.endpoint)


def test_a_dataset_and_a_model_of_one_name_are_two_repositories(hub: LocalHub, api: HfApi) -> None:
    hub.add_repo("me/model", repo_type="dataset", files={"train.csv": b"a\n1\n"})
    assert api.list_repo_files("me/model", repo_type="dataset") == ["train.csv"]
    assert api.list_repo_files("me/model") == sorted(FILES)


def test_transformers_and_datasets_load_through_the_environment(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("me/bert", files={"config.json": b'{"model_type": "bert", "hidden_size": 12}'}, private=True)
    hub.add_repo("me/data", repo_type="dataset", files={"train.csv": b"x,y\n1,2\n3,4\n"})
    script = (
        "from transformers import AutoConfig\n"
        "from datasets import load_dataset\n"
        "print(AutoConfig.from_pretrained('me/bert').hidden_size)\n"
        "print(load_dataset('me/data', split='train')[:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "", "HF_HOME": str(tmp_path), **hub.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "12\n{'x': [1, 3], 'y': [2, 4]}\n", done.stderr


# Writing.


def test_a_commit_holds_large_and_regular_files_and_keeps_the_others(hub: LocalHub, api: HfApi) -> None:
    made = add(api, {"new.safetensors": WEIGHTS[:999], "notes.txt": "grüße".encode()})
    assert made.oid == hub.head("me/model") and len(made.oid) == 40
    assert hub.files("me/model") == ("config.json", "new.safetensors", "notes.txt", "w/model.safetensors")
    assert hub.read("me/model", "new.safetensors") == WEIGHTS[:999]
    assert hub.read("me/model", "notes.txt") == "grüße".encode()
    assert [e.bytes_received for e in hub.log if e.method == "PUT"] == [999]


def test_a_new_repository_begins_with_gitattributes(hub: LocalHub, api: HfApi) -> None:
    url = api.create_repo("me/new", private=True)
    assert (url.repo_id, hub.files("me/new")) == ("me/new", (".gitattributes",))
    assert api.model_info("me/new").private
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("me/new")
    assert api.create_repo("me/new", exist_ok=True).repo_id == "me/new"


def test_a_deleted_repository_is_gone(hub: LocalHub, api: HfApi) -> None:
    api.delete_repo("me/model")
    assert not api.repo_exists("me/model")
    with pytest.raises(SourceError, match="Repository not found"):
        hub.head("me/model")


def test_a_file_the_repository_has_is_not_sent_again(hub: LocalHub, api: HfApi) -> None:
    add(api, {"copy.safetensors": WEIGHTS})
    assert hub.read("me/model", "copy.safetensors") == WEIGHTS
    assert hub.counts["PUT storage"] == 0


def test_a_commit_on_a_head_that_moved_is_refused_and_changes_nothing(hub: LocalHub, api: HfApi) -> None:
    stale = hub.head("me/model")
    moved = add(api, {"a.txt": b"1"}, parent_commit=stale).oid
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        add(api, {"a.txt": b"2"}, parent_commit=stale)
    assert caught.value.response.status_code == 412
    assert (hub.head("me/model"), hub.read("me/model", "a.txt")) == (moved, b"1")


def test_a_pull_request_leaves_main_alone_and_takes_further_commits(hub: LocalHub, api: HfApi) -> None:
    main_head = hub.head("me/model")
    made = add(api, {"a.txt": b"1"}, create_pr=True)
    assert (made.pr_revision, made.pr_num) == ("refs/pr/1", 1)
    second = add(api, {"b.txt": b"2"}, revision="refs/pr/1", parent_commit=made.oid)
    refs = api.list_repo_refs("me/model", include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [("refs/pr/1", second.oid)]
    assert hub.head("me/model") == main_head
    assert "b.txt" in hub.files("me/model", "refs/pr/1")


def test_deletions_and_copies_travel_in_one_commit(hub: LocalHub, api: HfApi) -> None:
    operations: list[Any] = [
        CommitOperationCopy("w/model.safetensors", "copy.safetensors"),
        CommitOperationCopy("config.json", "sub/config.json"),
        CommitOperationDelete("w/"),
        CommitOperationDelete("config.json"),
    ]
    api.create_commit("me/model", operations, commit_message="Move\nand more", commit_description="Why")
    assert hub.files("me/model") == ("copy.safetensors", "sub/config.json")
    assert hub.read("me/model", "copy.safetensors") == WEIGHTS
    newest = hub.commits("me/model")[0]
    assert (newest.title, newest.message) == ("Move", "and more\n\nWhy")


def test_one_impossible_change_undoes_the_whole_commit(hub: LocalHub, api: HfApi) -> None:
    before = hub.head("me/model")
    operations: list[Any] = [CommitOperationAdd("a.txt", b"1"), CommitOperationDelete("nowhere.txt")]
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit("me/model", operations, commit_message="Both")
    assert (hub.head("me/model"), hub.files("me/model")) == (before, tuple(sorted(FILES)))


def test_a_path_cannot_be_a_file_and_a_folder(hub: LocalHub, api: HfApi) -> None:
    with pytest.raises(BadRequestError, match="both a file and a folder"):
        add(api, {"config.json/a.txt": b"1"})


def test_a_pointer_to_an_upload_that_was_lost_is_refused_until_it_is_sent_again(
    hub: LocalHub, api: HfApi
) -> None:
    content = WEIGHTS[::-1]
    addition = CommitOperationAdd("late.safetensors", content)
    api.preupload_lfs_files("me/model", [addition])
    assert hub.forget_uploads("me/model") == (sha256(content).hexdigest(),)
    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        api.create_commit("me/model", [addition], commit_message="Late")
    add(api, {"late.safetensors": content})
    assert hub.read("me/model", "late.safetensors") == content


def test_a_file_of_more_than_ten_megabytes_must_go_through_lfs(hub: LocalHub) -> None:
    file = {"key": "file", "value": {"path": "a.txt", "content": "x" * 10_000_001, "encoding": "utf-8"}}
    lines = [{"key": "header", "value": {"summary": "Big"}}, file]
    answer = get_session().post(
        f"{hub.endpoint}/api/models/me/model/commit/main",
        headers={"Authorization": f"Bearer {hub.token}"},
        content="\n".join(map(json.dumps, lines)),
    )
    assert (answer.status_code, "must go through LFS" in answer.json()["error"]) == (400, True)


def put_url(hub: LocalHub, oid: str, num_bytes: int) -> str:
    answer = get_session().post(
        f"{hub.endpoint}/me/model.git/info/lfs/objects/batch",
        headers={"Authorization": f"Bearer {hub.token}"},
        json={"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": num_bytes}]},
    )
    return str(answer.json()["objects"][0]["actions"]["upload"]["href"])


def test_the_storage_host_keeps_only_what_was_announced(hub: LocalHub) -> None:
    oid = sha256(b"right").hexdigest()
    url = put_url(hub, oid, 5)
    sent = [
        get_session().put(url, content=content).status_code for content in (b"wrong", b"too long", b"right")
    ]
    assert sent == [400, 400, 200]
    with pytest.raises(KeyError):
        put_url(hub, oid, 5)  # nothing left to do


def test_an_upload_in_chunks_of_unknown_total_arrives(hub: LocalHub) -> None:
    content = WEIGHTS * 3
    url = put_url(hub, sha256(content).hexdigest(), len(content))
    pieces = (content[start : start + 1000] for start in range(0, len(content), 1000))
    assert get_session().put(url, content=pieces).status_code == 200
    assert hub.log[-1].bytes_received == len(content)


@pytest.mark.parametrize(
    ("path", "content", "large"),
    [
        ("a.txt", b"text", False),
        ("a.safetensors", b"text", True),
        ("a.dat", b"bin\0ary", True),
        ("a.txt", b"\xff\xfe", True),
        ("a.txt", b"x" * 511 + "ü".encode(), False),
        ("empty.bin", b"", False),
    ],
)
def test_large_files_are_told_by_name_or_content(path: str, content: bytes, large: bool) -> None:
    assert belongs_in_lfs(path, len(content), content) is large


def test_size_alone_makes_a_text_large() -> None:
    assert [belongs_in_lfs("a.json", size, b"{}") for size in (10_000_000, 10_000_001)] == [False, True]


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        ("license: [mit, mine]", '"license" must be one of'),
        ("- a\n- b", "must be of type object"),
        ("a: [", "expected"),
        ("base_model: ./local/path", '"base_model" with value "./local/path" is not valid'),
        ("base_model_relation: blend", '"base_model_relation" must be one of'),
        ("tags: one", '"tags" must be an array'),
        ("model-index: {}", '"model-index" must be an array'),
        ("model-index: [{name: a}]", r'"model-index\[0\].results" is required'),
        (
            "model-index: [{name: a, results: [{task: {type: t}, metrics: [{type: acc}]}]}]",
            r'"model-index\[0\].results\[0\].metrics\[0\].value" is required',
        ),
    ],
)
def test_a_card_the_hub_would_refuse_stops_the_commit(
    hub: LocalHub, api: HfApi, front_matter: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add(api, {"README.md": f"---\n{front_matter}\n---\ntext".encode()})
    assert hub.counts["POST commit"] == 0


def test_a_card_written_by_the_client_is_accepted() -> None:
    result = {
        "task": {"type": "t"},
        "dataset": {"type": "d", "name": "D"},
        "metrics": [{"type": "a", "value": 1}],
    }
    index = json.dumps([{"name": "m", "results": [result]}])
    assert validate(f"---\nlicense: other\nmodel-index: {index}\n---\n").errors == ()


def test_a_card_without_metadata_is_accepted_with_a_warning(hub: LocalHub, api: HfApi) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        add(api, {"README.md": b"# Only text"})
    assert hub.read("me/model", "README.md") == b"# Only text"


def test_branches_and_tags_name_commits(hub: LocalHub, api: HfApi) -> None:
    first = hub.head("me/model")
    api.create_tag("me/model", tag="v1")
    api.create_branch("me/model", branch="feature/x")
    second = add(api, {"a.txt": b"1"}, revision="feature/x").oid
    assert [hub.head("me/model", revision=name) for name in ("v1", "main", "feature/x", second[:7])] == [
        first, first, second, second,
    ]  # fmt: skip
    assert [c.commit_id for c in api.list_repo_commits("me/model", revision="feature/x")][:2] == [
        second,
        first,
    ]
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag("me/model", tag="v1")
    api.delete_tag("me/model", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="v1")


def test_a_tag_cannot_be_committed_to(hub: LocalHub, api: HfApi) -> None:
    api.create_tag("me/model", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        add(api, {"a.txt": b"1"}, revision="v1")


# Access.


def test_a_private_repository_does_not_exist_for_others(hub: LocalHub, api: HfApi) -> None:
    hub.add_repo("me/secret", files=FILES, private=True)
    assert api.model_info("me/secret").private
    for token, status in ((False, 401), (hub.add_user("you"), 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            HfApi(endpoint=hub.endpoint, token=token).model_info("me/secret")
        assert caught.value.response.status_code == status


def test_a_gated_repository_shows_its_metadata_but_not_its_files(hub: LocalHub) -> None:
    hub.add_repo("me/gated", files=FILES, gated=True)
    for token, status in ((False, 401), (hub.add_user("you"), 403)):
        other = HfApi(endpoint=hub.endpoint, token=token)
        assert other.model_info("me/gated").gated == "auto"
        with pytest.raises(GatedRepoError) as caught:
            other.hf_hub_download("me/gated", "config.json")
        assert caught.value.response.status_code == status


def test_who_may_see_a_repository_can_be_changed_later(hub: LocalHub, api: HfApi) -> None:
    api.update_repo_settings("me/model", private=True, gated="manual")
    hub.add_repo("me/model", files={"a.txt": b"1"})
    found = api.model_info("me/model")
    assert (found.private, found.gated) == (True, "manual")
    hub.add_repo("me/model", private=False, gated=False)
    assert Path(hf_hub_download("me/model", "a.txt", endpoint=hub.endpoint, token=False)).read_bytes() == b"1"


def test_only_the_owner_writes_but_any_user_may_propose(hub: LocalHub, api: HfApi) -> None:
    you = HfApi(endpoint=hub.endpoint, token=hub.add_user("you"))
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        add(you, {"a.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        you.auth_check("me/model", write=True)
    api.auth_check("me/model", write=True)
    assert add(you, {"a.txt": b"1"}, create_pr=True).pr_num == 1
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        you.create_repo("me/theirs")
    assert you.create_repo("you/own").repo_id == "you/own"


def test_nobody_writes_and_a_wrong_token_reads_nothing(hub: LocalHub) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
        add(HfApi(endpoint=hub.endpoint, token=False), {"a.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.endpoint, token="hf_wrong").model_info("me/model")


# Faults.


def request(method: str = "GET", path: str = "/a", headers: dict[str, str] | None = None) -> Request:
    return Request(method, path, {}, headers or {}, Body(BytesIO(), 0, lambda _: None))


def test_a_status_strikes_so_often_and_no_more(hub: LocalHub) -> None:
    hub.faults.add("*/resolve/*", "status", status=429, retry_after_seconds=7, times=2)
    answers = [get(url_of(hub, "config.json")) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].headers["Retry-After"] == "7"


def test_a_status_can_carry_the_hubs_own_code(hub: LocalHub) -> None:
    hub.faults.add("*", "status", status=403, error_code="GatedRepo", method="HEAD")
    with pytest.raises(GatedRepoError):
        get_hf_file_metadata(url_of(hub, "config.json"))


def receive(url: str) -> tuple[bytes, Exception | None]:
    """Give what arrived of a body, and how it ended."""
    received = b""
    try:
        with get_session().stream("GET", url) as answer:
            for block in answer.iter_raw():
                received += block
    except httpx.TransportError as error:
        return received, error
    return received, None


def test_a_reset_breaks_the_body_off(hub: LocalHub) -> None:
    hub.faults.add("/_storage/*", "reset", after_bytes=5000)
    received, error = receive(location_of(hub))
    assert WEIGHTS.startswith(received) and len(received) <= 5000
    assert isinstance(error, httpx.ReadError)
    assert hub.log[-1].faults == ("reset",)


def test_a_truncated_body_ends_before_what_was_announced(hub: LocalHub) -> None:
    hub.faults.add("/_storage/*", "truncate", after_bytes=5000)
    received, error = receive(location_of(hub))
    assert received == WEIGHTS[:5000]
    assert isinstance(error, httpx.RemoteProtocolError)


def test_a_short_body_looks_complete(hub: LocalHub) -> None:
    hub.faults.add("/_storage/*", "short", after_bytes=10)
    answer = get(location_of(hub), "bytes=100-199")
    assert (answer.status_code, answer.content) == (206, WEIGHTS[100:110])
    assert answer.headers["Content-Range"] == "bytes 100-199/10240"


def test_a_corrupt_body_differs_in_one_byte(hub: LocalHub) -> None:
    hub.faults.add("/_storage/*", "corrupt", after_bytes=321)
    received = get(location_of(hub)).content
    assert [i for i, (a, b) in enumerate(zip(received, WEIGHTS, strict=True)) if a != b] == [321]


def test_an_ignored_range_gives_the_whole_file(hub: LocalHub) -> None:
    hub.faults.add("/_storage/*", "ignore_range")
    answer = get(location_of(hub), "bytes=0-9")
    assert (answer.status_code, answer.content) == (200, WEIGHTS)


def test_an_expired_url_is_refused_once_and_a_new_one_works(hub: LocalHub) -> None:
    hub.faults.add("*", "expired", times=1)
    location = location_of(hub)
    assert [get(location).status_code, get(location_of(hub)).status_code] == [403, 200]


def test_a_lost_response_is_a_commit_that_happened(hub: LocalHub, api: HfApi) -> None:
    hub.faults.add("*/commit/*", "lose_response")
    before = hub.head("me/model")
    with pytest.raises(httpx.RemoteProtocolError):
        add(api, {"a.txt": b"1"}, parent_commit=before)
    assert (hub.commits("me/model")[0].title, hub.commits("me/model")[1].sha) == ("Add", before)
    assert hub.log[-1].status == 0


def test_a_reset_upload_leaves_nothing_behind(hub: LocalHub) -> None:
    hub.faults.add("/_storage/*", "reset_upload", after_bytes=6000, times=1)
    content = WEIGHTS[::-1] * 100
    url = put_url(hub, sha256(content).hexdigest(), len(content))
    with pytest.raises(httpx.TransportError):
        get_session().put(url, content=content)
    assert hub.log[-1].bytes_received >= 6000
    assert get_session().put(url, content=content).status_code == 200


def test_latency_and_bandwidth_take_at_least_their_time(hub: LocalHub) -> None:
    location = location_of(hub)
    hub.faults.add("/_storage/*", "latency", seconds=0.1, times=1)
    hub.faults.add("/_storage/*", "bandwidth", bytes_per_second=len(WEIGHTS) / 0.2, times=1)
    start = time.monotonic()
    assert get(location).content == WEIGHTS
    assert time.monotonic() - start >= 0.3


def test_the_client_repeats_a_download_that_was_truncated(hub: LocalHub) -> None:
    hub.faults.add("/_storage/*", "truncate", after_bytes=4000, times=1)
    path = hf_hub_download("me/model", "w/model.safetensors", endpoint=hub.endpoint)
    assert Path(path).read_bytes() == WEIGHTS
    assert [e.bytes_sent for e in hub.log if e.route == "storage"] == [4000, len(WEIGHTS)]


def test_the_same_seed_gives_the_same_faults_whatever_the_order_of_requests() -> None:
    def struck(paths: list[str], seed: int) -> set[tuple[str, int]]:
        faults = Faults()
        faults.add("*", "status", probability=0.5, seed=seed)
        turns = {path: [bool(faults.before(request(path=path))) for _ in range(2)] for path in paths}
        return {(path, turn) for path, hits in turns.items() for turn, hit in enumerate(hits) if hit}

    paths = [f"/file-{number}" for number in range(50)]
    assert struck(paths, 1) == struck(paths[::-1], 1) != struck(paths, 2)
    assert 25 < len(struck(paths, 1)) < 75  # of 100 requests


def test_faults_of_a_body_wait_for_an_answer_that_has_one(hub: LocalHub) -> None:
    hub.faults.add("*/resolve/*", "corrupt", times=1, after_bytes=0)
    location_of(hub)  # HEAD
    get(url_of(hub, "nowhere.txt"))  # 404
    assert get(url_of(hub, "config.json")).content != FILES["config.json"]
    assert get(url_of(hub, "config.json")).content == FILES["config.json"]


def test_a_function_chooses_requests_and_clearing_ends_all_faults(hub: LocalHub) -> None:
    hub.faults.add(lambda asked: asked.range == "bytes=0-1", "status", status=500)
    location = location_of(hub)
    assert [get(location, r).status_code for r in ("bytes=0-1", "bytes=0-2")] == [500, 206]
    hub.faults.clear()
    assert get(location, "bytes=0-1").status_code == 206


def test_a_bandwidth_of_zero_is_refused() -> None:
    with pytest.raises(HubMagmaxError, match="would never end"):
        Faults().add("*", "bandwidth")


# The server itself.


def test_the_log_counts_requests_and_bytes(hub: LocalHub) -> None:
    location = location_of(hub)
    get(location, "bytes=10-29")
    get(location)
    assert hub.counts == {"HEAD resolve": 1, "GET storage": 2}
    assert [(e.status, e.bytes_sent, e.range) for e in hub.log] == [
        (302, 0, ""),
        (206, 20, "bytes=10-29"),
        (200, len(WEIGHTS), ""),
    ]
    hub.reset_log()
    assert hub.log == ()


def test_commits_of_many_clients_form_one_line(hub: LocalHub, api: HfApi) -> None:
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda n: add(api, {f"{n}.txt": b"x"}).oid, range(12)))
    history = hub.commits("me/model")
    assert {commit.sha for commit in history[:12]} == set(made)
    assert all(newer.parent == older.sha for newer, older in pairwise(history))
    assert set(hub.files("me/model")) == {*FILES, *(f"{n}.txt" for n in range(12))}


def test_of_many_commits_on_one_parent_exactly_one_succeeds(hub: LocalHub, api: HfApi) -> None:
    parent = hub.head("me/model")

    def attempt(number: int) -> int:
        try:
            add(api, {"a.txt": str(number).encode()}, parent_commit=parent)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(attempt, range(8))) == [200] + 7 * [412]


def test_a_folder_keeps_repositories_between_runs(tmp_path: Path) -> None:
    with LocalHub(tmp_path / "root") as first:
        sha = first.add_repo("me/model", files=FILES, private=True)
        endpoint = HfApi(endpoint=first.endpoint, token=first.token)
        endpoint.create_tag("me/model", tag="v1")
    with LocalHub(tmp_path / "root") as second:
        assert second.head("me/model", revision="v1") == sha
        assert second.read("me/model", "w/model.safetensors") == WEIGHTS
        assert HfApi(endpoint=second.endpoint, token=second.token).model_info("me/model").private


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_is_added_with_its_subfolders(hub: LocalHub, tmp_path: Path, link: bool) -> None:
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    hub.add_repo("me/folder", folder=tmp_path, link=link, revision="task-1")
    assert {path: hub.read("me/folder", path, "task-1") for path in hub.files("me/folder", "task-1")} == FILES
    assert hub.files("me/folder") == ()


def test_closing_ends_idle_and_waiting_connections_and_all_threads() -> None:
    threads, reached = set(threading.enumerate()), threading.Event()

    def is_reached(asked: Request) -> bool:
        reached.set()
        return asked.path.endswith("/refs")

    with LocalHub() as hub, httpx.Client() as idle, ThreadPoolExecutor(1) as pool:
        idle.get(f"{hub.endpoint}/api/whoami-v2")
        hub.faults.add(is_reached, "latency", seconds=600)
        waiting = pool.submit(httpx.get, f"{hub.endpoint}/api/models/me/model/refs", timeout=None)
        assert reached.wait(20)
        hub.close()
        assert isinstance(waiting.exception(), httpx.TransportError)
    assert set(threading.enumerate()) <= threads


def test_a_taken_port_and_a_wrong_name_are_explained(
    capsys: pytest.CaptureFixture[str], hub: LocalHub
) -> None:
    port = hub.endpoint.rpartition(":")[2]
    with pytest.raises(OutputError, match="cannot start"):
        LocalHub(port=int(port))
    assert main(["--port", port]) == 1
    assert "cannot start" in capsys.readouterr().err
    with pytest.raises(SourceError, match="is not the name of a repository"):
        hub.add_repo("model")


def test_the_command_prints_what_to_export_and_stops_on_an_interrupt(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "tests.local_hub", "--root", str(tmp_path / "root")]
    imported = tmp_path / "imported"
    with (
        imported.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT) as process,
    ):
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(3)]
        assert get(lines[0].removeprefix("export HF_ENDPOINT=") + "/api/models/me/x").status_code == 401
        assert lines[1].startswith("export HF_TOKEN=hf_local ")
        process.terminate()
        assert process.wait(20) == 0
    names = {line.rpartition("|")[2].strip() for line in imported.read_text().splitlines()}
    assert "tests.local_hub.hub" in names
    assert not {"torch", "pyarrow"} & names


def test_who_asks_may_create_where_whoami_says_so_and_nowhere_else(hub):
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    hub.add_repo("crew/model")
    spaces = {"me", *(org["name"] for org in api.whoami()["orgs"])}
    assert "crew" in spaces and "nobodys" not in spaces
    assert api.create_repo("crew/second").repo_id == "crew/second"
    with pytest.raises(HfHubHTTPError, match="rights to create a model under the namespace"):
        api.create_repo("nobodys/model")
    assert HfApi(endpoint=hub.endpoint, token=hub.add_user("you")).whoami()["orgs"] == []


def test_organisation_without_repositories_is_named_at_the_start():
    with LocalHub(orgs=["acme"]) as hub:
        assert HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("acme/model").repo_id == "acme/model"


HOSTILE_CARD = """---
license: mit
tags: [<b>x</b>]
---
# Title
| a | b |
|---|---|
| `1 < 2` | **x** |

![picture](tradeoff.png) [file](scores.json) [out](https://hub.example/x)

<details>
<summary>All <b>3</b> tasks</summary>

- one

</details>

<script>alert(1)</script>
Text <img src=x onerror=alert(2)> and <details open ontoggle=alert(3)> [bad](javascript:alert(4))
<!-- hub_magmax sha256:0 -->
"""


def test_cards_are_rendered_and_nothing_in_them_runs():
    page = rendered(HOSTILE_CARD, "/me/model/resolve/abc")
    for part in (
        "<h1>Title</h1>",
        "<td><code>1 &lt; 2</code></td>",
        '<img src="/me/model/resolve/abc/tradeoff.png" alt="picture"',
        '<a href="/me/model/resolve/abc/scores.json">file</a>',
        '<a href="https://hub.example/x">out</a>',
        "<details>\n<summary>All &lt;b&gt;3&lt;/b&gt; tasks</summary>",
        "<li>one</li>",
        "<pre>license: mit\ntags: [&lt;b&gt;x&lt;/b&gt;]</pre>",
    ):
        assert part in page, part
    found = {tag.lower() for tag in re.findall(r"<([a-z0-9]+)", page)}
    tables = {"table", "thead", "tbody", "tr", "th", "td"}
    texts = {"h1", "p", "code", "strong", "img", "a", "ul", "li", "pre"}
    assert found <= tables | texts | {"details", "summary", "article"}
    assert not re.search(r"<[^>]*(?:\son\w+=|javascript:)", page)
    assert "sha256:0" not in page


def test_a_card_in_a_browser_shows_its_picture_and_runs_nothing(hub, tmp_path):
    if (browser := find_browser()) is None:
        pytest.skip("no browser is installed")
    picture = BytesIO()
    Image.new("RGB", (30, 20), "red").save(picture, "PNG")
    hub.add_repo("me/shown", files={"README.md": HOSTILE_CARD.encode(), "tradeoff.png": picture.getvalue()})
    with closing(Page(browser, tmp_path / "profile")) as page:
        page.open(f"{hub.endpoint}/me/shown")
        assert page.evaluate("document.images[0].naturalWidth") == 30
        assert page.evaluate("document.scripts.length") == 0
        assert [text for text in page.complaints if "favicon.ico" not in text] == []


def test_a_browser_gets_pages_of_the_repositories(hub):
    hub.add_repo("me/seen", files={"README.md": b"# A <card>", "config.json": b"{}"})
    hub.add_repo("me/hidden", files={"config.json": b"{}"}, private=True)
    listed = get(f"{hub.endpoint}/").text
    assert '<a href="/me/seen">me/seen</a>' in listed and "hidden" not in listed
    page = get(f"{hub.endpoint}/me/seen")
    commit = hub.commits("me/seen")[0].sha
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "<h1>A &lt;card&gt;</h1>" in page.text
    assert "script" not in page.headers["content-security-policy"]
    assert f'<a href="/me/seen/resolve/{commit}/config.json">config.json</a>, 2 B' in page.text
    assert get(f"{hub.endpoint}/me/seen/commit/{commit}").text == page.text
    assert get(f"{hub.endpoint}/me/hidden").status_code == 401
    assert get(f"{hub.endpoint}/api/nothing").status_code == 404
