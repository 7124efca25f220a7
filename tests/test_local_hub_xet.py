"""The local Hub speaking Xet, with the real client and with requests that no good client sends."""

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from huggingface_hub.utils import get_session, httpx
from hypothesis import given
from hypothesis import strategies as st

from tests.local_hub import shards, xorbs
from tests.local_hub.hub import LocalHub
from tests.local_hub.wire import RefusalError
from tests.xet_client import Client

# Of about 60 chunks, packed in all three ways: not, by LZ4, and by LZ4 after sorting.
CONTENT = (
    random.Random(1).randbytes(1_500_000)
    + b"the same words " * 70_000
    + np.random.default_rng(0).normal(size=500_000).astype("float32").tobytes()
)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as running:
        running.add_repo("me/model")
        running.reset_log()
        yield running


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Gives a client that remembers nothing at each call; they run beside a file `a.bin`."""
    (tmp_path / "a.bin").write_bytes(CONTENT)
    numbers = itertools.count()
    with ExitStack() as stack:
        yield lambda hub, **changes: stack.enter_context(
            Client(hub, tmp_path / f"home-{next(numbers)}", **changes)
        )


def sent_bytes(hub: LocalHub) -> int:
    return sum(exchange.bytes_received for exchange in hub.log if exchange.method == "PUT")


# With the real client.


def test_a_file_travels_by_xet_and_is_there_for_clients_without(hub: LocalHub, fresh: Callable) -> None:
    fresh(hub).upload("a.bin", "a.bin")
    assert [hub.counts[f"POST xet-{name}"] for name in ("grant", "commit", "shard")] == [1, 1, 1]
    assert hub.counts["POST lfs-batch"] == 0
    assert hub.read("me/model", "a.bin") == CONTENT
    hub.reset_log()
    assert fresh(hub).download("a.bin") == CONTENT
    assert hub.counts["GET xet-reconstruction"] == 1
    hub.reset_log()
    assert fresh(hub, HF_HUB_DISABLE_XET="1").download("a.bin") == CONTENT
    assert hub.counts == {"HEAD resolve": 1, "GET resolve": 1, "GET storage": 1}


def test_the_client_packs_in_all_three_ways(hub: LocalHub, fresh: Callable) -> None:
    fresh(hub).upload("a.bin", "a.bin")
    (path,) = [path for path in hub.root.glob("blobs/*/*") if path.name != sha256(CONTENT).hexdigest()]
    assert {chunk.packing for chunk in xorbs.layout(path)} == {0, 1, 2}


def test_what_is_known_is_not_sent_again_by_whoever(hub: LocalHub, fresh: Callable, tmp_path: Path) -> None:
    fresh(hub).upload("a.bin", "a.bin")
    first = sent_bytes(hub)
    hub.reset_log()
    other = fresh(hub)
    other.upload("a.bin", "again.bin")
    assert (hub.counts["GET xet-chunk"], sent_bytes(hub)) == (1, 0)
    longer = CONTENT + random.Random(2).randbytes(300_000)
    (tmp_path / "longer.bin").write_bytes(longer)
    hub.reset_log()
    other.upload("longer.bin", "longer.bin")
    assert 300_000 <= sent_bytes(hub) < first / 5
    hub.reset_log()
    # Its chunks are in two xorbs now.
    assert other.download("longer.bin") == longer
    assert hub.counts["GET storage"] == 2


def test_forms_of_earlier_clients_are_served_too(hub: LocalHub, fresh: Callable) -> None:
    client = fresh(
        hub,
        HF_XET_CLIENT_SHARD_API_VERSION="1",
        HF_XET_CLIENT_RECONSTRUCTION_API_VERSION="1",
        HF_XET_CLIENT_LEGACY_DIRECT_XORB_UPLOAD="1",
    )
    client.upload("a.bin", "a.bin")
    assert client.download("a.bin") == CONTENT
    paths = {"/".join(e.path.split("/")[3:5]) for e in hub.log if e.path.startswith("/_xet/")}
    assert paths == {"v1/chunks", "v1/xorbs", "v1/shards", "v1/reconstructions"}


def test_a_file_that_came_by_lfs_is_not_offered_by_xet(hub: LocalHub, fresh: Callable) -> None:
    hub.add_repo("me/model", files={"a.bin": CONTENT})
    assert fresh(hub).download("a.bin") == CONTENT
    assert hub.counts == {"HEAD resolve": 1, "GET storage": 1}


def test_a_folder_arrives_in_a_dataset_and_comes_back_as_a_snapshot(
    hub: LocalHub, fresh: Callable, tmp_path: Path
) -> None:
    files = {"a.parquet": CONTENT[:200_000], "sub/b.bin": CONTENT[-999_999:], "c.txt": b"text\n"}
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    there = "repo_id='me/data', repo_type='dataset'"
    client = fresh(hub)
    client.run(f"api.create_repo({there})")
    client.run(f"api.upload_folder(folder_path='folder', {there})")
    assert {path: hub.read("me/data", path, repo_type="dataset") for path in files} == files
    hub.reset_log()
    folder = Path(client.run(f"snapshot_download({there})"))
    assert {path: (folder / path).read_bytes() for path in files} == files
    assert hub.counts["GET xet-reconstruction"] == 2


def test_any_user_may_propose_by_xet_and_the_owner_alone_writes(hub: LocalHub, fresh: Callable) -> None:
    client = fresh(hub, HF_TOKEN=hub.add_user("you"))
    assert "403 Forbidden" in client.upload("a.bin", "a.bin")
    client.upload("a.bin", "a.bin", create_pr=True)
    assert hub.read("me/model", "a.bin", "refs/pr/1") == CONTENT
    assert "a.bin" not in hub.files("me/model")


def test_an_upload_survives_what_passes(hub: LocalHub, fresh: Callable) -> None:
    client = fresh(hub)
    faults: list[tuple[str, str, dict]] = [
        ("*/xet-write-token/*", "status", {"status": 503}),
        ("/_xet/*", "status", {"status": 500}),
        ("/_xet/*/xorb-grants/*", "status", {"status": 429, "retry_after_seconds": 0}),
        ("/_xet/*/xorb-commits/*", "status", {"status": 404}),
        ("/_xet/*/shards", "lose_response", {}),
        ("/_storage/*", "status", {"status": 500}),
        ("/_storage/*", "expired", {}),
        ("/_storage/*", "lose_response", {}),
        ("/_storage/*", "reset_upload", {"after_bytes": 300_000}),
    ]
    for seed, (pattern, kind, options) in enumerate(faults):
        path, content = f"{seed}.bin", random.Random(seed + 10).randbytes(1_000_000)
        hub.reset_log()
        hub.faults.add(pattern, kind, times=1, **options)
        client.run(f"api.upload_file(path_or_fileobj={content!r}, path_in_repo={path!r}, repo_id='me/model')")
        assert hub.read("me/model", path) == content, (pattern, kind)
        assert [exchange.faults for exchange in hub.log if exchange.faults] == [(kind,)]
        assert hub.counts["POST commit"] == 1


def test_a_download_survives_what_passes(hub: LocalHub, fresh: Callable) -> None:
    client = fresh(hub)
    client.upload("a.bin", "a.bin")
    faults: list[tuple[str, str, dict]] = [
        ("/_xet/*", "status", {"status": 500}),
        ("/_storage/*", "status", {"status": 503}),
        ("/_storage/*", "expired", {}),
        ("/_storage/*", "reset", {"after_bytes": 400_000}),
        ("/_storage/*", "truncate", {"after_bytes": 400_000}),
        ("/_storage/*", "short", {"after_bytes": 400_000}),
        ("/_storage/*", "ignore_range", {}),
        ("/_storage/*", "latency", {"seconds": 0.01}),
        # The first byte of a chunk is a version, and no longer the one that there is.
        ("/_storage/*", "corrupt", {"after_bytes": 0}),
    ]
    for seed, (pattern, kind, options) in enumerate(faults):
        hub.reset_log()
        hub.faults.add(pattern, kind, times=1, **options)
        assert client.download("a.bin", local_dir=str(seed)) == CONTENT, (pattern, kind)
        assert [exchange.faults for exchange in hub.log if exchange.faults] == [(kind,)]


def test_a_flipped_bit_of_a_chunk_that_is_not_packed_passes_the_client(
    hub: LocalHub, fresh: Callable
) -> None:
    # A fact about hf_xet 1.8, and why hashes are compared after reading: it does not check what it fetched.
    client = fresh(hub)
    client.upload("a.bin", "a.bin")
    hub.faults.add("/_storage/*", "corrupt", after_bytes=700_000, times=1)
    received = client.download("a.bin")
    assert len(received) == len(CONTENT) and received != CONTENT


def test_a_refusal_that_stays_makes_no_commit(hub: LocalHub, fresh: Callable) -> None:
    client = fresh(hub)
    for pattern, status in (("*/xet-write-token/*", 401), ("/_xet/*", 401), ("/_xet/*/shards", 400)):
        hub.faults.add(pattern, "status", status=status)
        assert f"({status} " in client.upload("a.bin", "a.bin")
        hub.faults.clear()
    assert hub.counts["POST commit"] == 0


def test_tokens_that_end_are_asked_for_again(fresh: Callable) -> None:
    # The client wants a new one half a minute before the end.
    with LocalHub(url_lifetime_seconds=29) as hub:
        hub.add_repo("me/model")
        client = fresh(hub)
        client.upload("a.bin", "a.bin")
        assert hub.counts["GET xet-token"] > 1
        assert client.download("a.bin") == CONTENT


def test_a_folder_keeps_what_came_by_xet_between_runs(fresh: Callable, tmp_path: Path) -> None:
    with LocalHub(tmp_path / "root") as first:
        first.add_repo("me/model")
        fresh(first).upload("a.bin", "a.bin")
    with LocalHub(tmp_path / "root") as second:
        client = fresh(second)
        assert client.download("a.bin") == CONTENT
        assert second.counts["GET xet-reconstruction"] == 1
        client.upload("a.bin", "again.bin")
        assert sent_bytes(second) == 0


def test_a_new_hub_at_the_same_address_is_not_taken_for_the_old_one(fresh: Callable, tmp_path: Path) -> None:
    port = 0
    for _ in range(2):
        with LocalHub(port=port) as hub:
            port = int(hub.endpoint.rpartition(":")[2])
            hub.add_repo("me/model")
            with Client(hub, tmp_path / "home") as client:
                client.upload("a.bin", "a.bin")
            assert hub.read("me/model", "a.bin") == CONTENT


def test_uploads_that_were_lost_can_be_sent_again(hub: LocalHub, fresh: Callable) -> None:
    client = fresh(hub)
    client.run("api.preupload_lfs_files('me/model', [CommitOperationAdd('a.bin', 'a.bin')])")
    assert hub.forget_uploads("me/model") == (sha256(CONTENT).hexdigest(),)
    client.upload("a.bin", "a.bin")
    assert hub.read("me/model", "a.bin") == CONTENT


# Formats.


def packed(content: bytes, packing: int) -> bytes:
    body = content
    if packing == 2:
        body = b"".join(content[place::4] for place in range(4))
    if packing:
        body = pyarrow.compress(body, codec="lz4", asbytes=True)
    sizes = (len(size).to_bytes(3, "little") for size in (body, content))
    return b"\0" + next(sizes) + bytes([packing]) + next(sizes) + body


def footer(num_bytes: int = 92) -> bytes:
    return b"XETBLOB\1" + bytes(num_bytes - 12) + (num_bytes - 4).to_bytes(4, "little")


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=50), st.integers(0, 2)), min_size=1, max_size=5))
def test_chunks_are_unpacked_whatever_the_packing_and_length(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[bytes, int]]
) -> None:
    path = tmp_path_factory.mktemp("xorb") / "xorb"
    content = b"".join(packed(*chunk) for chunk in chunks)
    for end in (b"", footer()):
        path.write_bytes(content + end)
        found = xorbs.layout(path)
        assert [chunk.num_bytes for chunk in found] == [len(chunk) for chunk, _ in chunks]
        assert list(xorbs.contents(path, found)) == [chunk for chunk, _ in chunks]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no chunk"),
        (footer(), "holds no chunk"),
        (packed(b"abc", 0)[:-1], "ends within chunk 0"),
        (packed(b"abc", 0) + b"\0\0", "no chunk at byte 11"),
        (b"\1" + packed(b"abc", 0)[1:], "no chunk at byte 0"),
        (packed(b"abc", 0) + footer()[:-2], "ends within its footer"),
    ],
)
def test_what_is_no_xorb_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "xorb").write_bytes(content)
    with pytest.raises(RefusalError, match=message):
        xorbs.layout(tmp_path / "xorb")


@pytest.mark.parametrize("changed", [b"no LZ4 at all", pyarrow.compress(b"abcd", codec="lz4", asbytes=True)])
def test_a_body_that_is_not_what_its_header_says_is_told(tmp_path: Path, changed: bytes) -> None:
    size = len(changed).to_bytes(3, "little")
    (tmp_path / "xorb").write_bytes(b"\0" + size + b"\1" + b"\3\0\0" + changed)
    with pytest.raises(RefusalError, match=r"cannot be unpacked|another size"):
        list(xorbs.contents(tmp_path / "xorb", xorbs.layout(tmp_path / "xorb")))


def test_a_hash_is_written_as_four_numbers() -> None:
    # As in the specification, whose example leaves out the number 10.
    text = "07060504030201000f0e0d0c0b0a090817161514131211101f1e1d1c1b1a1918"
    assert shards.text_of(bytes(range(32))) == text


@pytest.mark.parametrize("content", [b"", b"HFRepoMetaData", bytes(500)])
def test_what_is_no_shard_is_told(content: bytes) -> None:
    with pytest.raises(RefusalError, match=r"ends too early|not a shard"):
        shards.parse(content)


def test_what_is_described_is_read_again() -> None:
    chunks = ("01" * 32, "23" * 32)
    (found,) = shards.parse(described("ab" * 32, chunks)).xorbs
    assert (found.hash, found.chunks) == ("ab" * 32, chunks)


# With requests made by hand.


def digest(text: str) -> bytes:
    return struct.pack("<4Q", *(int(text[start : start + 16], 16) for start in range(0, 64, 16)))


def shard(file: str, sha256_text: str, terms: list[tuple[str, int, int, int]], flags: int = 1 << 30) -> bytes:
    """Write a shard of one file, and of no xorb."""
    row = struct.Struct("<32s4I")
    rows = [row.pack(digest(file), flags, len(terms), 0, 0)]
    rows += [row.pack(digest(xorb), 0, num_bytes, start, stop) for xorb, num_bytes, start, stop in terms]
    rows += [row.pack(digest(sha256_text), 0, 0, 0, 0)] if flags else []
    ends = 2 * row.pack(b"\xff" * 32, 0, 0, 0, 0)
    return described("", ())[:48] + b"".join(rows) + ends


def described(xorb: str, chunks: tuple[str, ...]) -> bytes:
    """Write a shard of no file, and of one xorb unless its name is empty."""
    row = struct.Struct("<32s4I")
    rows = [row.pack(digest(xorb), 0, len(chunks), 0, 0)] if xorb else []
    rows += [row.pack(digest(chunk), 0, 0, 0, 0) for chunk in chunks]
    found = shards.XorbRows(xorb, chunks, b"".join(rows))
    return shards.describe(found, made_seconds=0, expires_seconds=0)


XORB, FILE = "ab" * 32, "cd" * 32
CHUNKS = (b"one", b"and two", b"three of them")
WHOLE = b"".join(CHUNKS)
TERMS = [(XORB, len(WHOLE), 0, 3)]


def xet_token(hub: LocalHub, scope: str, repo: str = "me/model") -> str:
    url = f"{hub.endpoint}/api/models/{repo}/xet-{scope}-token/main"
    answer = get_session().get(url, headers={"Authorization": f"Bearer {hub.token}"})
    assert answer.headers["X-Xet-Access-Token"] == answer.json()["accessToken"]
    assert answer.headers["X-Xet-Token-Expiration"] == str(answer.json()["exp"])
    return str(answer.headers["X-Xet-Cas-Url"] + " " + answer.json()["accessToken"])


def ask(
    hub: LocalHub, method: str, path: str, content: bytes = b"", *, scope: str = "write", **options: str
) -> httpx.Response:
    address, _, token = xet_token(hub, scope, options.pop("repo", "me/model")).partition(" ")
    headers = {"Authorization": f"Bearer {options.pop('token', token)}".strip(), **options}
    return get_session().request(method, address + path, content=content, headers=headers)


def send(hub: LocalHub) -> None:
    """Send a file of two terms, the last chunk before the others."""
    xorb = b"".join(packed(chunk, packing) for packing, chunk in enumerate(CHUNKS))
    assert ask(hub, "POST", f"/v1/xorbs/default/{XORB}", xorb).json() == {"was_inserted": True}
    content = CHUNKS[2] + CHUNKS[0] + CHUNKS[1]
    terms = [(XORB, len(CHUNKS[2]), 2, 3), (XORB, len(CHUNKS[0] + CHUNKS[1]), 0, 2)]
    sent = ask(hub, "POST", "/v1/shards", shard(FILE, sha256(content).hexdigest(), terms))
    assert sent.json() == {"result": 1}


def followed(plan: dict, num_bytes: int | None = None) -> bytes:
    """Put a file together as a plan of the second form says."""
    chunks: dict[int, bytes] = {}
    for fetch in plan["xorbs"][XORB]:
        (place,) = fetch["ranges"]
        body = get_session().get(
            fetch["url"], headers={"Range": "bytes={start}-{end}".format(**place["bytes"])}
        )
        position = 0
        for index in range(place["chunks"]["start"], place["chunks"]["end"]):
            size = int.from_bytes(body.content[position + 1 : position + 4], "little") + 8
            assert body.content[position : position + size] == packed(CHUNKS[index], index)
            chunks[index], position = CHUNKS[index], position + size
        assert position == len(body.content)
    parts = [chunks[n] for term in plan["terms"] for n in range(term["range"]["start"], term["range"]["end"])]
    skipped = plan["offset_into_first_range"]
    return b"".join(parts)[skipped : None if num_bytes is None else skipped + num_bytes]


@pytest.mark.parametrize("start", range(0, 23, 3))
def test_a_plan_of_any_range_gives_its_bytes(hub: LocalHub, start: int) -> None:
    send(hub)
    content = CHUNKS[2] + CHUNKS[0] + CHUNKS[1]
    for stop in range(start + 1, len(content) + 2):
        span = {"Range": f"bytes={start}-{stop - 1}"}
        plan = ask(hub, "GET", f"/v2/reconstructions/{FILE}", scope="read", **span).json()
        assert followed(plan, stop - start) == content[start:stop]


def test_a_plan_without_a_range_fetches_every_chunk_once(hub: LocalHub) -> None:
    send(hub)
    plan = ask(hub, "GET", f"/v2/reconstructions/{FILE}", scope="read").json()
    assert followed(plan) == CHUNKS[2] + CHUNKS[0] + CHUNKS[1]
    assert [len(fetches) for fetches in plan["xorbs"].values()] == [1]


def test_a_range_behind_the_end_has_no_plan(hub: LocalHub) -> None:
    send(hub)
    assert ask(hub, "GET", f"/v2/reconstructions/{FILE}", Range="bytes=23-40").status_code == 416


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (shard(FILE, sha256(b"other").hexdigest(), TERMS), "and the shard says"),
        (shard(FILE, sha256(WHOLE).hexdigest(), [(XORB, 5, 0, 3)]), "and the shard says"),
        (shard(FILE, sha256(WHOLE).hexdigest(), [(XORB, len(WHOLE), 0, 4)]), "has 3 chunks"),
        (shard(FILE, sha256(WHOLE).hexdigest(), [(XORB, len(WHOLE), 2, 2)]), "has 3 chunks"),
        (shard(FILE, sha256(WHOLE).hexdigest(), [(FILE, len(WHOLE), 0, 3)]), "There is no xorb"),
        (described(FILE, (FILE,)), "There is no xorb"),
        (shard(FILE, "", TERMS, flags=0), "needs its sha256"),
        (shard(FILE, sha256(WHOLE).hexdigest(), TERMS)[:-90], "ends too early"),
    ],
)
def test_a_shard_that_is_wrong_makes_no_file(hub: LocalHub, content: bytes, message: str) -> None:
    send(hub)
    answer = ask(hub, "POST", "/v2/shards", content)
    assert (answer.status_code, message in answer.json()["error"]) == (400, True)
    known = ask(hub, "GET", f"/v2/reconstructions/{FILE}", scope="read").json()
    assert followed(known) == CHUNKS[2] + CHUNKS[0] + CHUNKS[1]


def test_a_xorb_is_kept_only_whole(hub: LocalHub) -> None:
    xorb = packed(WHOLE, 1)
    grants = f"/v1/xorb-grants/default/{XORB}"
    granted = ask(hub, "POST", grants, b'{"length": %d}' % len(xorb)).json()
    commits = f"/v1/xorb-commits/default/{XORB}/grant/{granted['id']}"
    assert ask(hub, "POST", commits).status_code == 404
    other = httpx.URL(granted["url"]).copy_set_param("size", "5")
    sent = [
        get_session().put(url, content=content).status_code
        for url, content in ((granted["url"], xorb[:-1]), (other, xorb[:5]), (granted["url"], xorb))
    ]
    assert sent == [400, 403, 200]
    assert ask(hub, "POST", commits).status_code == 200
    # What is there need not be sent again.
    assert ask(hub, "POST", grants, b'{"length": 1}').status_code == 200
    assert ask(hub, "POST", f"/v1/xorbs/default/{XORB}", xorb).json() == {"was_inserted": False}
    assert ask(hub, "POST", f"/v1/xorbs/default/{FILE}", xorb[:-1]).status_code == 400


def test_a_token_opens_what_it_is_for_and_nothing_else(hub: LocalHub) -> None:
    hub.add_repo("me/other")
    send(hub)
    plan = f"/v2/reconstructions/{FILE}"
    assert ask(hub, "GET", plan, scope="read").status_code == 200
    assert ask(hub, "GET", plan, scope="read", repo="me/other").status_code == 404
    assert ask(hub, "GET", f"/v2/reconstructions/{XORB}").status_code == 404
    assert ask(hub, "POST", f"/v1/xorbs/default/{XORB}", scope="read").status_code == 403
    for token in ("", hub.token, xet_token(hub, "read").partition(" ")[2].replace("read", "write")):
        assert ask(hub, "GET", plan, token=token).status_code == 401


def test_a_token_ends_when_its_time_is_over() -> None:
    now = [1000.0]
    with LocalHub(clock=lambda: now[0], url_lifetime_seconds=60) as hub:
        hub.add_repo("me/model")
        send(hub)
        token = xet_token(hub, "read").partition(" ")[2]
        statuses = []
        for now[0] in (1059.0, 1060.0):
            statuses.append(ask(hub, "GET", f"/v2/reconstructions/{FILE}", token=token).status_code)
    assert statuses == [200, 401]


def test_tokens_follow_who_may_see_and_write(hub: LocalHub) -> None:
    hub.add_repo("me/secret", private=True)
    hub.add_repo("me/gated", gated=True)
    you = {"Authorization": f"Bearer {hub.add_user('you')}"}

    def status(repo: str, scope: str, revision: str = "main", **headers: str) -> int:
        url = f"{hub.endpoint}/api/models/{repo}/xet-{scope}-token/{revision}"
        return int(get_session().get(url, headers=headers).status_code)

    assert [status("me/model", "read"), status("me/model", "write")] == [200, 401]
    assert [status("me/model", "write", **you), status("me/model", "write", "None?create_pr=1", **you)] == [
        403, 200,
    ]  # fmt: skip
    assert [status("me/secret", "read"), status("me/secret", "read", **you)] == [401, 404]
    assert [status("me/gated", "read"), status("me/gated", "read", **you)] == [401, 403]
    assert status("me/model", "read", "nowhen") == 404


def test_what_the_hub_says_of_a_file_leads_to_its_plan(hub: LocalHub) -> None:
    send(hub)
    content = CHUNKS[2] + CHUNKS[0] + CHUNKS[1]
    lines = (
        '{"key": "header", "value": {"summary": "Add"}}\n'
        f'{{"key": "lfsFile", "value": {{"path": "a.bin", "oid": "{sha256(content).hexdigest()}"}}}}'
    )
    owner = {"Authorization": f"Bearer {hub.token}"}
    get_session().post(f"{hub.endpoint}/api/models/me/model/commit/main", headers=owner, content=lines)
    answer = get_session().head(f"{hub.endpoint}/me/model/resolve/main/a.bin", follow_redirects=False)
    assert answer.headers["X-Xet-Hash"] == FILE
    links = {name: link["url"] for name, link in answer.links.items()}
    auth = get_session().get(links["xet-auth"]).json()
    bearer = {"Authorization": f"Bearer {auth['accessToken']}"}
    plan = get_session().get(links["xet-reconstruction-info"], headers=bearer)
    assert [term["unpacked_length"] for term in plan.json()["terms"]] == [13, 10]
    (row,) = get_session().get(f"{hub.endpoint}/api/models/me/model/tree/main").json()
    assert row["xetHash"] == FILE
