"""The real client with Xet, in a process of its own: settings are read once, and the tests switch Xet off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from tests.local_hub.hub import LocalHub

_PROGRAM = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
api = HfApi()
for line in sys.stdin:
    try:
        said = str(eval(json.loads(line)))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said), flush=True)
"""


def environment(hub: LocalHub, home: Path, **changes: str) -> dict[str, str]:
    """Return the variables of a process that uses `hub` with Xet, and remembers what it sent in `home`."""
    # The pause before a request is sent again is 3 seconds otherwise, and doubles.
    pause = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    return {**os.environ, **hub.xet_environment, **pause, "HF_HOME": str(home), **changes}


class Client:
    """Runs expressions one after the other, with `api` and the functions that download at hand.

    Args:
        hub: Where to.
        home: What the client remembers; its parent is where it runs.
        changes: Variables of the environment, as they should be.
    """

    def __init__(self, hub: LocalHub, home: Path, **changes: str) -> None:
        home.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env=environment(hub, home, **changes),
            cwd=home.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, expression: str) -> str:
        """Return the expression's value as text, or the error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(expression) + "\n")
        self._process.stdin.flush()
        return str(json.loads(self._process.stdout.readline()))

    def upload(self, source: str, path: str, **options: object) -> str:
        arguments = {"path_or_fileobj": source, "path_in_repo": path, "repo_id": "me/model", **options}
        return self.run(f"api.upload_file(**{arguments!r})")

    def download(self, path: str, **options: object) -> bytes:
        found = self.run(f"hf_hub_download('me/model', {path!r}, **{options!r})")
        assert Path(found).is_file(), found
        return Path(found).read_bytes()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()
