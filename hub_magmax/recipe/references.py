"""Names of models as people write them: a folder, `org/model@revision`, an hf:// path, a web URL."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hub_magmax.errors import RecipeError
from hub_magmax.text import shown

#: What the Hub accepts as a repository id (huggingface_hub.utils.validate_repo_id, restated).
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEB_URL = re.compile(
    r"https?://(?P<host>[^/@]+)/(?P<id>(?!datasets/|spaces/)[^/]+/[^/]+?)"
    r"(?:/(?:tree|blob|resolve)/(?P<rest>.+?))?/?"
)

#: A file of weights, or the index of several; `variant` is what transformers calls it.
_WEIGHTS = re.compile(
    r"[^/]*?(\.(?P<variant>[\w-]+?))?\.safetensors(\.index(\.(?P<index_variant>[\w-]+))?\.json)?"
)


@dataclass(frozen=True)
class LocalFolder:
    """A checkpoint on this machine. `path` is absolute; `written` is what the recipe says.

    `part` is the one file of weights (or index) that counts, where the recipe names one of several.
    """

    path: Path
    written: str
    part: str = ""

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class HubModel:
    """A checkpoint on the Hub. `revision` is a branch, tag, commit or pull request; None is the default.

    `part` is what counts of a repository that holds several models: a folder, a file of weights, or an
    index of such files. Empty stands for what lies at the top.
    """

    repo_id: str
    revision: str | None
    part: str = ""

    def __str__(self) -> str:
        name = f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id
        return f"{name}/{self.part}" if self.part else name


def split_part(part: str) -> tuple[str, str]:
    """Return the folder, and the file of weights in it, that a part of a repository names; empty for none."""
    folder, _, name = part.rpartition("/")
    return (folder, name) if _WEIGHTS.fullmatch(name) else (part, "")


def variant_of(weights: str) -> str | None:
    """Return what transformers calls the variant of a file of weights; None for the usual one."""
    match = _WEIGHTS.fullmatch(weights)
    return match and (match["index_variant"] or match["variant"])


def relative_path(written: str, folder: Path) -> str:
    """Return an absolute path (or one that starts with ~) as a path relative to `folder`.

    What is stored and published then names no folder of this machine, and a recipe means the
    same wherever its whole tree is moved. Everything else is returned as it is.
    """
    if not written.startswith(("/", "~")):
        return written
    absolute = _expanded(written)
    if not absolute.is_absolute():
        return written
    path = os.path.relpath(absolute, folder.absolute())
    return path if path.startswith(".") else f"./{path}"


def _expanded(written: str) -> Path:
    """Return a path with ~ replaced by the home folder, or as it is where nobody's home is known."""
    try:
        return Path(written).expanduser()
    except RuntimeError:
        return Path(written)


def is_folder(path: Path) -> bool:
    """Say whether `path` is a folder; False where the system cannot even look, as for an overlong name."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Say whether anything is at `path`; False where the system cannot even look."""
    try:
        return path.exists()
    except OSError:
        return False


def parse_reference(written: str, folder: Path) -> LocalFolder | HubModel:
    """Return what `written` names; relative paths start at `folder`.

    An existing folder wins over a repository of the same name. What starts with `./`, `../`, `/`
    or `~` is always a path, and may end in a file of weights. `hf://` paths and pasted web URLs name
    repositories, or a folder or a file of weights in one.

    Raises:
        RecipeError: If it is neither a folder nor a well-formed repository id.
    """
    path = (folder / _expanded(written)).absolute()
    looks_like_path = written.startswith(("./", "../", "/", "~")) or written in (".", "..")
    if looks_like_path or ("://" not in written and is_folder(path)):
        return _local(Path(os.path.normpath(path)), written)
    repo_id, revision, part = _split_hub_name(written)
    if not _REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        raise RecipeError(
            f"{shown(written, 200)} is neither an existing folder nor a repository id",
            expected="org/model, org/model@revision, hf://org/model@revision/part, or a folder",
            hint="Relative folders start at the recipe's own folder; start them with ./"
            + (f" : ./{written}" if written.isprintable() and len(written) <= 200 else ""),
        )
    return HubModel(repo_id, revision, part)


def _local(path: Path, written: str) -> LocalFolder:
    if _WEIGHTS.fullmatch(path.name) and not is_folder(path):
        return LocalFolder(path.parent, written, path.name)
    return LocalFolder(path, written)


def _split_hub_name(written: str) -> tuple[str, str | None, str]:
    if written.startswith("hf://"):
        return _parse_hf_uri(written, written)
    if (url := _WEB_URL.fullmatch(written)) and url["host"] in _hub_hosts():
        return _parse_hf_uri(
            f"hf://{url['id']}@{url['rest']}" if url["rest"] else f"hf://{url['id']}", written
        )
    repo_id, _, revision = written.partition("@")
    return repo_id, revision or None, ""


def _hub_hosts() -> tuple[str, ...]:
    """Return the hosts whose addresses name repositories of the Hub in use."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return ("huggingface.co", "hf.co", urlsplit(endpoint).netloc)


def _parse_hf_uri(uri: str, written: str) -> tuple[str, str | None, str]:
    """Return repository, revision and part; a slash in the name of a branch is written %2F."""
    from huggingface_hub import parse_hf_uri

    try:
        found = parse_hf_uri(uri)
    except ValueError as error:
        raise RecipeError(f"{shown(written, 200)} is not a valid hf:// path ({str(error)[:200]})") from error
    part = unquote(found.path_in_repo or "").strip("/")
    if found.type != "model" or {"", ".", ".."} & set(part.split("/") if part else ()):
        raise RecipeError(
            f"{shown(written, 200)} does not name a model repository, or a part of one",
            expected="hf://org/model@revision, and /folder or /file.safetensors where it holds several",
        )
    return found.id, found.revision, part
