"""Signatures of merged models by OpenSSF model-signing, with key files.

The signature covers the files that `verify` compares and the merge report, and nothing that people write
afterwards: a card that is edited, or a push that puts the repository's name into it, leaves it valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from hub_magmax.errors import MissingDependencyError, OutputError, SignatureError
from hub_magmax.fleet.verifying import verify
from hub_magmax.merging.output.report import REPORT_NAME, SIGNATURE_NAME, read_report
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.model_names import near_sibling


@checked
def sign(folder: Path | str, private_key: Path) -> Path:
    """Write the signature of a merged folder beside its weights, and return its path.

    Args:
        folder: A merged folder; files that people wrote after the merge do not count.
        private_key: PEM file of an elliptic curve key (secp256r1, secp384r1 or secp521r1), not encrypted.

    Raises:
        OutputError: If a file of the folder is not as merged.
        SignatureError: If the key cannot be used.
        MissingDependencyError: If model-signing is not installed.
    """
    folder = _merged_folder(folder)
    module = _model_signing("signing")
    unfinished = folder / f"{SIGNATURE_NAME}.tmp"
    try:
        with signature_errors(str(private_key), "the key cannot be used"):
            config = module.Config().use_elliptic_key_signer(private_key=private_key)
            config.set_hashing_config(_hashing(folder)).sign(folder, unfinished)
            unfinished.replace(folder / SIGNATURE_NAME)
    finally:
        unfinished.unlink(missing_ok=True)
    return folder / SIGNATURE_NAME


def check_key(private_key: Path) -> None:
    """Raise SignatureError for a key that cannot sign; called before a merge, so that it is known early."""
    with signature_errors(str(private_key), "the key cannot be used"):
        _model_signing("signing").Config().use_elliptic_key_signer(private_key=private_key)


def check_signature(folder: Path | str, public_key: Path) -> None:
    """Raise SignatureError unless the owner of `public_key` signed this merged folder.

    Raises:
        OutputError: If a file of the folder is not as merged.
        MissingDependencyError: If model-signing is not installed.
    """
    folder = _merged_folder(folder)
    module = _model_signing("verifying")
    signature = folder / SIGNATURE_NAME
    if not signature.is_file():
        raise SignatureError(
            f"there is no {SIGNATURE_NAME}",
            where=str(folder),
            hint="Sign the folder where it was merged: hub-magmax sign FOLDER --private-key KEY.",
        )
    with signature_errors(str(signature), "the signature does not fit the model and the key"):
        config = module.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_hashing(folder)).verify(folder, signature)


def _merged_folder(folder: Path | str) -> Path:
    """Return the folder as a path, after every file in it was compared with the merge report."""
    if not Path(folder).is_dir():
        raise OutputError(
            "there is no such folder",
            where=str(folder),
            expected="a merged folder",
            hint=near_sibling(str(folder), Path(folder))
            or "Download a model from the Hub first: hf download REPO --local-dir FOLDER.",
        )
    verify(str(folder))
    return Path(folder)


def _hashing(folder: Path) -> Any:
    """Return how the files are hashed: those of the merge and its report, and no others."""
    covered = {*read_report(folder / REPORT_NAME).sha256, REPORT_NAME}
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    ignored = sorted(path for path in files if path not in covered)
    unfinished = f"{SIGNATURE_NAME}.tmp"
    return _model_signing("hashing").Config().set_ignored_paths(paths=[*ignored, SIGNATURE_NAME, unfinished])


def _model_signing(name: str) -> Any:
    try:
        return import_module(f"model_signing.{name}")
    except ImportError as error:
        raise MissingDependencyError(
            "signatures need the package model-signing", hint="Run: pip install 'hub-magmax[signing]'."
        ) from error


@contextmanager
def signature_errors(where: str, what: str) -> Iterator[None]:
    """Turn whatever model-signing and its libraries raise into one SignatureError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # its libraries have no common base for what they raise
        reason = " ".join(str(error).split())[:200]
        raise SignatureError(
            f"{what} ({type(error).__name__}{f': {reason}' if reason else ''})",
            where=where,
            expected="PEM files of one pair of keys on secp256r1, secp384r1 or secp521r1, not encrypted",
            hint="Make a pair: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
            "openssl ec -in key.pem -pubout -out key.pub.",
        ) from error
