"""A local Hugging Face Hub, served until it is interrupted: `python -m tests.local_hub` in a clone."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from hub_magmax.errors import HubMagmaxError
from tests.local_hub.hub import DEFAULT_TOKEN, LocalHub


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.local_hub", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="port to listen on (any that is free)")
    parser.add_argument("--root", type=Path, help="folder that keeps the repositories (a temporary one)")
    parser.add_argument("--token", default=DEFAULT_TOKEN, help=f"token of the user 'me' ({DEFAULT_TOKEN})")
    parser.add_argument("--org", action="append", default=[], help="organisation of 'me'; can be repeated")
    options = parser.parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with LocalHub(options.root, port=options.port, token=options.token, orgs=options.org) as hub:
            sys.stdout.write(
                f"export HF_ENDPOINT={hub.endpoint}\n"
                f"export HF_TOKEN={hub.token}  # to write, and to read what is private\n"
                f"# Serving {hub.root}, in a browser too. Stop with Ctrl-C.\n"
            )
            sys.stdout.flush()
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    except HubMagmaxError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
