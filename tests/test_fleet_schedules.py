"""Schedules in docs/fleet.md: cron lines, a systemd timer and a GitHub workflow that call what there is."""

import configparser
import re
import shutil
import subprocess

import click
import pytest
import yaml

from tests.test_readme import CALL, DOCS, blocks, command_of

PAGE = DOCS["fleet.md"]


def check_commands(text):
    """Have the parser of each verb take the commands in a line; return how many there are."""
    calls = [part for part in re.split(r"\|\||&&|>\s*\S+", text) if CALL.search(part)]
    for line in calls:
        command, arguments = command_of(line.replace("%h", "/home/me"))
        with click.Context(command) as context:
            command.parse_args(context, arguments)
    return len(calls)


def test_cron_lines_have_five_times_and_commands_that_exist():
    (block,) = blocks(PAGE, "cron")
    for line in block.splitlines():
        *times, command = line.split(maxsplit=5)
        assert len(times) == 5 and all(re.fullmatch(r"\*|\d+", time) for time in times)
        assert check_commands(command)
        assert "%" not in command, "cron takes it for a line break"


def units():
    service, timer = blocks(PAGE, "ini")
    return {"hub-magmax-canary.service": service, "hub-magmax-canary.timer": timer}


def test_units_are_a_service_with_a_command_and_its_timer():
    found = {}
    for name, text in units().items():
        parser = configparser.ConfigParser(interpolation=None)
        parser.optionxform = str
        parser.read_string(text)
        found[name] = parser
        assert f"`{name}`" in PAGE.read_text(encoding="utf-8")
    assert check_commands(found["hub-magmax-canary.service"]["Service"]["ExecStart"]) == 1
    assert found["hub-magmax-canary.timer"]["Timer"]["OnCalendar"]


def test_systemd_accepts_the_units(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: install systemd to check the units")
    paths = [tmp_path / name for name in units()]
    for path, text in zip(paths, units().values(), strict=True):
        path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0 and "hub-magmax" not in done.stderr, done.stderr


def test_workflow_is_on_a_schedule_and_calls_what_there_is():
    (block,) = blocks(PAGE, "yml")
    values = yaml.load(block, yaml.BaseLoader)  # which leaves `on` a word
    (schedule,) = values["on"]["schedule"]
    assert len(schedule["cron"].split()) == 5 and "workflow_dispatch" in values["on"]
    (job,) = values["jobs"].values()
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    assert sum(check_commands(step.get("run", "")) for step in job["steps"]) == 3


def test_list_of_models_in_the_docs_is_one():
    (block,) = blocks(PAGE, "json")
    assert all(isinstance(entry, str) for entry in yaml.safe_load(block))
