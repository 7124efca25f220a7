"""Completion in shells, by the scripts that click writes for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from hub_magmax.cli import VERBS, main
from hub_magmax.methods import method_names

CODE = "import sys; from hub_magmax.cli import main; main(prog_name='hub-magmax')"


def completed(*words):
    """Return what fits the last word."""
    *before, incomplete = words
    found = BashComplete(main, {}, "hub-magmax", "_HUB_MAGMAX_COMPLETE").get_completions(before, incomplete)
    return [(item.value, item.type) for item in found]


def test_verbs_and_options_are_completed():
    assert [value for value, _ in completed("")] == sorted(VERBS)
    assert [value for value, _ in completed("di")] == ["diagnose"]
    assert ("--memory", "plain") in completed("merge", "--m")


def test_recipes_and_folders_are_completed(tmp_path, monkeypatch):
    for name in ("recipe.yaml", "other.yml", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert completed("plan", "") == [("", "dir"), ("other.yml", "plain"), ("recipe.yaml", "plain")]
    assert completed("plan", "re") == [("re", "dir"), ("recipe.yaml", "plain")]
    start = f"{tmp_path}/o"
    assert completed("plan", start) == [(start, "dir"), (f"{tmp_path}/other.yml", "plain")]
    assert completed("push", "m") == [("m", "dir")]
    assert completed("sign", "merged", "--private-key", "k") == [("k", "file")]


def test_names_of_methods_are_completed():
    assert [value for value, _ in completed("methods", "")] == list(method_names())
    assert ("method=ties", "plain") in completed("plan", "recipe.yaml", "--set", "method=t")
    assert completed("plan", "recipe.yaml", "--set", "me") == [("method=", "plain")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_of_a_shell_calls_the_command(shell):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"_HUB_MAGMAX_COMPLETE": f"{shell}_source"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"_HUB_MAGMAX_COMPLETE={shell}_complete" in done.stdout


def test_bash_completes_the_words_of_a_command_line(tmp_path):
    command = tmp_path / "hub-magmax"
    command.write_text(f'#!/bin/sh\nexec \'{sys.executable}\' -c "{CODE}" "$@"\n')
    command.chmod(0o755)
    (tmp_path / "recipe.yaml").touch()
    script = (
        'eval "$(_HUB_MAGMAX_COMPLETE=bash_source hub-magmax)"; cd "$(dirname "$(command -v hub-magmax)")"\n'
        "COMP_WORDS=(hub-magmax plan rec) COMP_CWORD=2; compopt() { :; }; _hub_magmax_completion hub-magmax\n"
        'echo "${COMPREPLY[0]}"'
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        ["bash", "-c", script], env=environment, check=False, capture_output=True, text=True
    )
    assert done.stdout.strip() == "recipe.yaml", done.stderr
