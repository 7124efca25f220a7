"""Hub client: tokens, repeated requests, and errors that say what to do."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from hub_magmax.errors import HubMagmaxError, HubSettingError, SourceError
from hub_magmax.text import STATE_LEVEL, TOKEN_VARIABLES, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

LOG = logging.getLogger(__name__)

#: How requests name the library that sends them.
LIBRARY_NAME = "hub_magmax"

TIMEOUT_SECONDS = 60.0

#: Pauses before a failed request is sent again.
WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0)

#: What to do about an address of the Hub that is wrong.
ENDPOINT_HINT = "Correct HF_ENDPOINT, or unset it for https://huggingface.co."

#: A pause that a person notices.
_NOTICED_SECONDS = 2.0

#: Longest pause that a server can ask for.
_MAX_WAIT_SECONDS = 300.0

#: Answers that may be others a moment later.
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)


def hub_api() -> HfApi:
    """Return the Hub client, which identifies itself as hub_magmax and follows `HF_*` variables.

    Raises:
        HubSettingError: If HF_ENDPOINT is no address, or the token in use cannot be sent.
    """
    from huggingface_hub import HfApi

    if problem := endpoint_problem():
        raise HubSettingError(problem, where="environment variable HF_ENDPOINT", hint=ENDPOINT_HINT)
    _check_token()
    return HfApi(library_name=LIBRARY_NAME, library_version=version(LIBRARY_NAME))


def endpoint_problem() -> str:
    """Return why the Hub's address in use can be none, as a clause; empty where it can."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if address.scheme in ("http", "https") and address.hostname:
        return ""
    rest = constants.ENDPOINT.rpartition("://")[2]
    return f"{shown(constants.ENDPOINT)} is no address{f': did you mean https://{rest}?' if rest else '.'}"


def is_offline() -> bool:
    """Say whether HF_HUB_OFFLINE is set: nothing is sent, and the local cache answers."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


@contextmanager
def offline() -> Iterator[None]:
    """Send nothing meanwhile, as with HF_HUB_OFFLINE=1: revisions and files come from the local cache."""
    from huggingface_hub import constants

    before, variable = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are not imported yet
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        del os.environ["HF_HUB_OFFLINE"]
        if variable is not None:
            os.environ["HF_HUB_OFFLINE"] = variable


def _check_token() -> None:
    """Raise HubSettingError, which does not repeat it, where the token in use cannot be part of a request."""
    from huggingface_hub import get_token

    token = get_token()
    if token is None or (token.isascii() and token.isprintable()):
        return
    names = [name for name in TOKEN_VARIABLES if os.environ.get(name, "").strip()]
    raise HubSettingError(
        "the access token holds characters that no token has",
        where=f"environment variable {names[0]}" if names else "the token that is stored by `hf auth login`",
        expected="letters, digits and _ only",
        hint=f"Set {names[0]} to a token as the Hub shows it, or unset it."
        if names
        else "Run `hf auth login` again, with a token as the Hub shows it.",
    )


def token_in_use() -> str:
    """Return "this token", or "nobody" where none is sent."""
    from huggingface_hub import get_token

    return "nobody (no token is sent)" if get_token() is None else "this token"


def is_token_empty() -> bool:
    """Say whether no token is sent because a variable that should hold one is empty."""
    from huggingface_hub import get_token

    values = [os.environ[name] for name in TOKEN_VARIABLES if name in os.environ]
    return get_token() is None and bool(values) and not any(value.strip() for value in values)


#: Advice about an option that most commands have.
READ_CACHE = "; --from-cache sends nothing, and reads the local cache"
NOT_FROM_CACHE = " (and leave out --from-cache)"


def without_cache_advice(error: HubMagmaxError) -> HubMagmaxError:
    """Return an error without advice about the local cache, which some questions cannot be answered from."""
    for advice in (READ_CACHE, NOT_FROM_CACHE):
        error.take_from_hints(advice)
    return error


#: What huggingface_hub raises while reading, most special first, with what was wrong and what to do.
_REFUSALS = (
    ("GatedRepoError", "access is gated", "Ask for access on its page, then `hf auth login`."),
    (
        "RepositoryNotFoundError",
        "there is no such repository, or this token may not see it",
        "Check the spelling; for a private repository run `hf auth login` or set HF_TOKEN.",
    ),
    ("RevisionNotFoundError", "there is no such revision", "Name a branch, tag, commit or refs/pr/N."),
    (
        "RevisionResolutionError",
        "nothing is sent offline, and the local cache does not know this revision",
        "Unset HF_HUB_OFFLINE" + NOT_FROM_CACHE + ", or download the model first: hf download REPO.",
    ),
    (
        "LocalEntryNotFoundError",
        "not in the local cache, and the Hub cannot be reached",
        "Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE.",
    ),
    (
        "OfflineModeIsEnabled",
        "not in the local cache, and HF_HUB_OFFLINE is set",
        "Unset HF_HUB_OFFLINE, or download the model first.",
    ),
    ("EntryNotFoundError", "a file is missing at this commit", "Pin another revision."),
    ("HFValidationError", "not a valid repository id", "Write org/model."),
    (
        "HfHubHTTPError",
        "the Hub answered with an error",
        "Check the name (org/model, or ./name for a folder), or try again later" + READ_CACHE + ".",
    ),
)


#: The same where the status says more than the kind of error.
_OTHERWISE: dict[tuple[str, int | None], tuple[str, str]] = {
    ("HfHubHTTPError", 401): (
        "the Hub does not accept this token",
        "Run `hf auth login` again, or set HF_TOKEN to a token that is valid.",
    ),
    ("HfHubHTTPError", 403): (
        "this token may not read it",
        "Ask its owner for access, or use a token that may read it: `hf auth login`, or HF_TOKEN.",
    ),
}


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn what huggingface_hub raises while reading into a SourceError that says what to do."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    known = (errors.HfHubHTTPError, errors.HFValidationError, errors.RevisionResolutionError, OSError)
    try:
        yield
    except known as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        for name, *usual in _REFUSALS:
            if isinstance(error, getattr(errors, name)):
                what, hint = _OTHERWISE.get((name, status), usual)
                if status in (401, 403, 404) and is_token_empty():
                    hint += " HF_TOKEN is set and empty, so no token was sent: unset it."
                raise SourceError(
                    f"{what} (status {status})" if status else what, where=where, hint=hint
                ) from error
        raise
    except httpx.HTTPError as error:
        raise SourceError(
            f"the connection failed ({type(error).__name__})",
            where=where,
            hint="Check the connection and HF_ENDPOINT, then run the same command again" + READ_CACHE + ".",
        ) from error
    except ValueError as error:  # what json and its readers raise
        raise SourceError(
            "the Hub sent an answer that cannot be read, or was changed on the way",
            where=where,
            hint="Run the same command again; if it stays, check HF_ENDPOINT and proxies.",
        ) from error


def is_passing(error: BaseException) -> bool:
    """Say whether the same request may succeed a moment later."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    if isinstance(error, errors.HfHubHTTPError):
        return getattr(error.response, "status_code", None) in PASSING_STATUSES
    # A body that was cut or changed is no JSON.
    return isinstance(error, json.JSONDecodeError | UnicodeDecodeError | ChangedError | httpx.TransportError)


def retry(call: Callable[[], T], passes: Callable[[Exception], bool] = is_passing) -> T:
    """Return the result of `call`, calling it again while connection or Hub fail for a while.

    Waits some seconds in between, or as long as the Hub asks (its answer is the error's `response`).

    Args:
        call: May be carried out twice.
        passes: Says whether the call may succeed later, after an error.
    """
    for number, wait in enumerate((*WAITS_SECONDS, None)):
        try:
            found = call()
        except Exception as error:
            if wait is None or not passes(error):
                raise
            seconds, reason = max(wait, _asked_wait(getattr(error, "response", None))), _reason(error)
            # The first pauses are too short to be noticed.
            level = logging.INFO if seconds >= _NOTICED_SECONDS else logging.DEBUG
            LOG.log(level, "%s; asking again in %g s", reason, seconds, extra={"fails": reason})
            time.sleep(seconds)
        else:
            if number:
                LOG.log(STATE_LEVEL, "a request that failed was answered", extra={"passes": True})
            return found
    raise AssertionError("the last try returns or raises")


def _reason(error: Exception) -> str:
    """Return in a few words why a request failed; huggingface_hub's own take three lines."""
    response = getattr(error, "response", None)
    status, url = getattr(response, "status_code", None), getattr(response, "url", None)
    if status is None:
        words = shown(" ".join(str(error).split())) if str(error) else type(error).__name__
        return f"a request failed ({words})"
    return f"{getattr(url, 'host', '') or 'the Hub'} answered {status}"


class ChangedError(ValueError):
    """A body was changed on its way."""


def _asked_wait(response: Any) -> float:
    """Return the seconds for which an answer asks to wait, 0 by default."""
    try:
        return min(float(response.headers.get("Retry-After", 0)), _MAX_WAIT_SECONDS)
    except (AttributeError, ValueError):
        return 0.0
