"""Kill `hub-magmax run` while it merges and pushes; look at every commit that anybody could ever see.

The Hub runs in a process of its own. What it holds is read by plain HTTP, so that the process that forks
the children never has a connection, or a thread, of the client that is attacked.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.victims import STRUCK, Tally, Victim, finish_child, one_paragraph, start_child, strike_at
from hub_magmax.checkpoints.side_files import content_hashes

ROOT = Path(__file__).parents[1]


class _Hub:
    """The repositories of a local Hub, as anybody sees them."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def commits(self, repo: str) -> list[str]:
        """Return all commits of a repository, newest first; none where there is no such repository."""
        try:
            return [commit["id"] for commit in self._get(f"/api/models/{repo}/commits/main")]
        except urllib.error.HTTPError as error:
            if error.code in (401, 404):
                return []
            raise

    def files(self, repo: str, commit: str) -> dict[str, str]:
        """Return the hash of every file at a commit: sha256 of large ones, git's id of small ones."""
        rows = self._get(f"/api/models/{repo}/tree/{commit}?recursive=true")
        return {
            row["path"]: f"sha256:{row['lfs']['oid']}" if "lfs" in row else f"git:{row['oid']}"
            for row in rows
            if row["type"] == "file" and row["path"] != ".gitattributes"
        }

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.endpoint + path, timeout=30) as answer:
            return json.load(answer)


@contextlib.contextmanager
def _running_hub() -> Iterator[_Hub]:
    """Start a Hub, and have this process and its children use it."""
    assert "huggingface_hub" not in sys.modules, "it reads the environment once, when it is imported"
    command = [sys.executable, "-m", "tests.local_hub"]
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process,
    ):
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().strip().partition("=")[2]
            os.environ |= {
                "HF_ENDPOINT": endpoint,
                "HF_HUB_DISABLE_XET": "1",
                "HF_TOKEN": "hf_local",
                "HF_HOME": home,
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            from huggingface_hub import HfApi  # noqa: F401  (loaded before children are forked)

            import hub_magmax.pipeline  # noqa: F401

            yield _Hub(endpoint)
        finally:
            process.terminate()


def kills(victim: Victim, *, count: int = 100, seed: int = 0, keep: bool = True) -> Tally:
    """Kill `hub-magmax run` at random moments, from its start to its end.

    Without `keep` there is no output folder: each file is uploaded while the next one is made.
    """
    tally = Tally()
    generator = random.Random(seed)
    _output(victim, keep)
    with _running_hub() as hub:
        seconds = _undisturbed(victim, hub)
        for number in range(count):
            repo = f"me/kill-{number}"
            child = start_child(victim, arguments=_arguments(victim, repo))
            time.sleep(generator.random() * seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _judge(victim, tally, hub, repo, *finish_child(victim, child))
    return tally


def requests(victim: Victim, *, every: int = 1, keep: bool = True) -> Tally:
    """Kill `hub-magmax run` before and after each request that it sends."""
    tally = Tally()
    _output(victim, keep)
    with _running_hub() as hub:
        _undisturbed(victim, hub)
        for number in range(1, 1000, every):
            repo = f"me/step-{number}"
            child = start_child(victim, _killed_at(number), arguments=_arguments(victim, repo))
            code, said = finish_child(victim, child)
            if STRUCK.decode() not in said:
                victim.reset()
                return tally
            _judge(victim, tally, hub, repo, code, said)
    return tally


def _killed_at(number: int) -> Callable[[], None]:
    def prepare() -> None:
        from huggingface_hub.utils import httpx

        strike = strike_at(number, lambda kind: os.kill(os.getpid(), signal.SIGKILL))
        send = httpx.Client.send

        def watched(*arguments: Any, **options: Any) -> Any:
            strike("before")
            answer = send(*arguments, **options)
            strike("after")
            return answer

        httpx.Client.send = watched

    return prepare


def _output(victim: Victim, keep: bool) -> None:
    if not keep:
        victim.recipe_text = victim.recipe_text.replace("output:", "output:\n  keep: false")


def _arguments(victim: Victim, repo: str) -> list[str]:
    """Have the recipe push to `repo`, and return the command that runs it."""
    victim.recipe.write_text(victim.recipe_text.replace("output:", f"output:\n  push_to_hub: {repo}"))
    return ["run", str(victim.recipe)]


def _undisturbed(victim: Victim, hub: _Hub) -> float:
    """Return how long a run takes that nobody kills; what it leaves is right."""
    started = time.monotonic()
    code, said = finish_child(victim, start_child(victim, arguments=_arguments(victim, "me/undisturbed")))
    seconds = time.monotonic() - started
    assert code == 0, said
    assert _visible(victim, hub, "me/undisturbed") == (1, [])
    victim.reset()
    return seconds


# Complex because it has a condition for each promise that an attack may have broken.
def _judge(victim: Victim, tally: Tally, hub: _Hub, repo: str, code: int, said: str) -> None:
    """Look at what one kill left, run the same command again, and look again."""
    found, problems = _visible(victim, hub, repo)
    first = "complete" if found else "absent"
    if found > 1:
        problems.append(f"{found} commits of one model")
    if code not in (0, -signal.SIGKILL) and not one_paragraph(said):
        problems.append(f"exit code {code}: {said[-300:]}")
    again, said_again = finish_child(victim, start_child(victim, arguments=_arguments(victim, repo)))
    if again != 0:
        problems.append(f"the same command fails: {said_again[-300:]}")
    found, wrong = _visible(victim, hub, repo)
    problems += wrong
    if found != 1:
        problems.append(f"in the end {found} commits hold the model")
    problems += _other_than_local(victim, hub, repo) if again == 0 else []
    if victim.leftovers():
        problems.append(f"leftovers: {victim.leftovers()}")
    how = "killed" if code < 0 else "survived"
    last = "complete in one commit" if found == 1 else "not"
    tally.add(f"{how}, on the Hub {first}, then {last}", "; ".join(f"{repo}: {text}" for text in problems))
    victim.reset()


def _visible(victim: Victim, hub: _Hub, repo: str) -> tuple[int, list[str]]:
    """Return how many commits hold the model, and what is wrong with those that hold a part of it."""
    weights = {
        name: f"sha256:{sha256}" for name, sha256 in victim.expected.items() if name.endswith(".safetensors")
    }
    complete, problems = 0, []
    for commit in hub.commits(repo):
        files = hub.files(repo, commit)
        missing = ({*victim.expected, "README.md"}) - files.keys()
        if files and (missing or any(files.get(name) != sha256 for name, sha256 in weights.items())):
            problems.append(f"a commit that lacks {sorted(missing)} or holds other weights")
        complete += bool(files)
    return complete, problems


def _other_than_local(victim: Victim, hub: _Hub, repo: str) -> list[str]:
    """Return the files on the Hub that are not those of the output folder; its card names the repository."""
    if not victim.output.exists():
        return [] if "keep: false" in victim.recipe_text else ["there is no output"]
    local = {path.name: content_hashes(path.read_bytes()) for path in Path(victim.output).iterdir()}
    files = hub.files(repo, hub.commits(repo)[0])
    differ = [name for name, text in local.items() if files.get(name) not in text.split()]
    return [f"{name} on the Hub differs" for name in differ if name != "README.md"]
