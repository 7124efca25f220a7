"""A merge to attack: a process that is forked, struck at a chosen step, and looked at afterwards.

A child is forked where every module is loaded already: a merge then takes milliseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import hostile

#: Said by a child when the attack strikes, to tell an attack that was survived from one that never came.
STRUCK = b"(struck)\n"

#: For one command under attack, which takes a few seconds on a machine with nothing else to do.
ATTACK_SECONDS = 300

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove")

#: Files that are written when a folder is complete already, or tell how long the merge took.
_TOLD = (".md", "merge_report.json", "provenance.json")

#: Folders of training and merges that go on there.
_UNFINISHED = re.compile(r"\.(training|partial)/")

#: Fields of a merge report that differ from run to run.
_DIFFERS: dict[str, Any] = {"seconds": 0, "peak_memory_bytes": 0, "peak_resident_bytes": 0, "profile": {}}


@dataclass
class Tally:
    """Results of one part: attacks by outcome, and each failure in words."""

    attacks: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    memory_growth_bytes: int = 0

    def add(self, outcome: str, failure: str = "") -> None:
        self.attacks += 1
        self.outcomes[outcome] += 1
        if failure:
            self.failures.append(failure)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"outcomes": dict(sorted(self.outcomes.items()))}


class Victim:
    """A family of checkpoints, a recipe that merges it, and what an undisturbed merge makes of it.

    Attributes:
        more_values: Of the recipe.
    """

    more_values: Mapping[str, Any] = {}

    def __init__(self, folder: Path, *, rows: int = 64, inside: str = ".") -> None:
        self.folder, self.recipe = folder, folder / "recipe.yaml"
        self.output = folder / inside / "merged"
        self.recipe_text = self.write(rows, inside)
        self.recipe.write_text(self.recipe_text)
        self.output.parent.mkdir(exist_ok=True)
        before = set(folder.rglob("*"))
        code, said = merge_in_child(self)
        assert code == 0, said
        self.expected = contents(self.output)
        assert len([name for name in self.expected if name.endswith(".safetensors")]) > 1
        shutil.rmtree(self.output)
        self.at_rest = before
        assert set(folder.rglob("*")) == before

    def write(self, rows: int, inside: str) -> str:
        """Write what the recipe names into the folder, and return the recipe."""
        import yaml

        for number, name in enumerate(("base", "a", "b", "c")):
            hostile.write_checkpoint(self.folder / name, seed=number, rows=rows)
        values = {
            "schema": 1,
            "base_model": "./base",
            "tasks": [{"name": name, "model": f"./{name}"} for name in "abc"],
            "preference": {"weights": {"a": 0.6, "b": 0.3, "c": 0.1}},
            # A file for each large tensor.
            "output": {"path": f"{inside}/merged", "shard_size": f"{32 * rows}B"},
            **self.more_values,
        }
        return yaml.safe_dump(values, sort_keys=False)

    @property
    def arguments(self) -> list[str]:
        return ["merge", str(self.recipe)]

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    def state(self) -> str:
        """Return `absent` or `complete`, or what is wrong with the output."""
        if not self.output.exists():
            return "absent"
        found = contents(self.output)
        if found.keys() != self.expected.keys():
            return f"files {sorted(found.keys() ^ self.expected.keys())} are missing or surplus"
        changed = [name for name in found if found[name] != self.expected[name]]
        return f"other bytes in {changed}" if changed else "complete"

    def leftovers(self) -> list[str]:
        left = {
            path for path in set(self.folder.rglob("*")) - self.at_rest if self.output not in path.parents
        }
        return sorted(str(path.relative_to(self.folder)) for path in left - {self.output})

    def reset(self) -> None:
        for path in (self.output, self.partial):
            shutil.rmtree(path, ignore_errors=True)


class SitesVictim(Victim):
    """The same for a recipe with sites, each of which has to be absent or complete."""

    more_values: Mapping[str, Any] = {
        "sites": {
            "north": {},
            "south": {"method": "average", "preference": {"weights": {"a": 0.1, "b": 0.9}}},
            "west": {"method": "ties"},
        }
    }

    @property
    def arguments(self) -> list[str]:
        return ["run", str(self.recipe)]

    # Complex only by count: conditions on names.
    def state(self) -> str:
        """Return `absent` where sites are missing and the others complete; `complete`; or what is wrong."""
        found = contents(self.output) if self.output.exists() else {}
        there = [site for site in self.more_values["sites"] if (self.output / site).exists()]
        names = [name for name in self.expected if name.split("/")[0] in there and not name.endswith(_TOLD)]
        if wrong := [name for name in names if found.get(name) != self.expected[name]]:
            return f"other bytes in {wrong}"
        if len(there) < len(self.more_values["sites"]):
            return "absent"
        # The folder that a site was written in may still be there, or a report that was written once more;
        # the same command then removes both.
        more = [name for name in found if name not in self.expected and ".partial/" not in name]
        left = [name for name in more if not name.endswith(".tmp")]
        return f"files {left} are surplus" if left else "complete"

    def leftovers(self) -> list[str]:
        ours = (*self.output.glob("*.partial"), *self.output.rglob("*.tmp"))
        return sorted([*super().leftovers(), *(str(path.relative_to(self.folder)) for path in ours)])


class TrainingVictim(Victim):
    """Two tasks that are trained one after the other, in folders of `merged`, as are their states.

    Attributes:
        verb: What is killed.
        more_training: Of the recipe's `training`.
    """

    verb = "finetune"
    more_training: Mapping[str, Any] = {}

    def write(self, rows: int, inside: str) -> str:
        import yaml

        import hub_magmax.training.alternating
        import hub_magmax.training.loop  # noqa: F401  (loaded before children are forked)
        from tests.learners import training_recipe, write_learner

        self.folder.mkdir(parents=True, exist_ok=True)
        write_learner(self.folder)
        training = {"steps": rows, "checkpoint_every": max(rows // 4, 1), "evaluator": "text-classification"}
        values = training_recipe(
            {**training, **self.more_training}, output={"path": f"{inside}/merged/model"}
        )
        del values["evaluation"]
        values["tasks"] = [{"name": task, "model": f"{inside}/merged/{task}"} for task in "ab"]
        return yaml.safe_dump(values, sort_keys=False)

    @property
    def arguments(self) -> list[str]:
        return [self.verb, str(self.recipe)]

    # Complex only by count: conditions on names.
    def state(self) -> str:
        """Return `absent` where folders are missing and the others complete; `complete`; or what is wrong."""
        found = contents(self.output) if self.output.exists() else {}
        wanted = {name: hash for name, hash in self.expected.items() if not name.endswith(_TOLD)}
        finished = {name for name in found if not _UNFINISHED.search(name)}
        folders = {str(Path(name).parent) for name in finished}
        expected = {name for name in wanted if str(Path(name).parent) in folders}
        if wrong := [name for name in sorted(expected) if found.get(name) != wanted[name]]:
            return f"missing, or other bytes: {wrong}"
        return "complete" if expected == set(wanted) else "absent"

    def leftovers(self) -> list[str]:
        found = contents(self.output) if self.output.exists() else {}
        return [*super().leftovers(), *(name for name in found if name not in self.expected)]


class RoundsVictim(TrainingVictim):
    """The same in three rounds, each of which is merged."""

    verb = "alternate"
    more_training: Mapping[str, Any] = {"order": "from_base", "alternate": {"rounds": 3}}


def contents(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below `folder`; of reports, without times and memory."""
    return {
        str(path.relative_to(folder)): _hash(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _hash(path: Path) -> str:
    content = path.read_bytes()
    if path.name == "merge_report.json":
        with contextlib.suppress(ValueError):
            content = json.dumps(json.loads(content) | _DIFFERS).encode()
    return hashlib.sha256(content).hexdigest()


def merge_in_child(victim: Victim, prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run the merge of `victim` in a child; return its exit code (minus the signal) and what it said."""
    return finish_child(victim, start_child(victim, prepare))


def start_child(
    victim: Victim, prepare: Callable[[], None] = lambda: None, arguments: list[str] | None = None
) -> int:
    """Run hub-magmax on `victim` in a child, after `prepare` there; return the child's id."""
    from hub_magmax.cli import main

    child = os.fork()
    if child == 0:
        code = 70
        try:
            descriptor = os.open(_said(victim), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(ATTACK_SECONDS)  # which ends a child that hangs, and counts as a failure
            prepare()
            main(arguments or victim.arguments, standalone_mode=False)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return child


def finish_child(victim: Victim, child: int) -> tuple[int, str]:
    """Wait for a child; return its exit code (minus the signal) and what it said."""
    _, status = os.waitpid(child, 0)
    said = _said(victim).read_text(errors="replace") if _said(victim).exists() else ""
    _said(victim).unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), said


def _said(victim: Victim) -> Path:
    return victim.folder.with_name(victim.folder.name + "-said")


def one_paragraph(said: str) -> bool:
    """Say whether a message is what people get: one paragraph that starts with `Error:`."""
    told = ("merging ", "resuming: ")
    lines = [line for line in said.strip().split("\n") if not line.startswith(told)]
    return len(lines) == 1 and lines[0].startswith("Error: ") and "Traceback" not in said


def strike_at(number: int, action: Callable[[str], None], kinds: tuple[str, ...] = ()) -> Any:
    seen = [0]

    def strike(kind: str) -> None:
        if not kinds or kind in kinds:
            seen[0] += 1
            if seen[0] == number:
                os.write(2, STRUCK)
                action(kind)

    return strike


def watch_changes(folder: Path, strike: Callable[[str], None]) -> None:
    """Call `strike` before each change of the file system below `folder` that this process makes."""
    from hub_magmax.merging.output.shard import ShardFile

    below = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            if arguments[2] & _WRITING and os.fspath(arguments[0]).startswith(below):
                strike("open")
        elif event in _CHANGES:
            strike(event)

    original_write, original_sync = ShardFile.write, os.fsync

    def write(self: Any, content: Any, start: int) -> None:
        strike("write")
        original_write(self, content, start)

    def fsync(fd: Any) -> None:
        strike("fsync")
        original_sync(fd)

    ShardFile.write = write  # type: ignore[method-assign]
    os.fsync = fsync
    sys.addaudithook(hook)


def watch_reads(strike: Callable[[str], None]) -> None:
    """Call `strike` before each read of a checkpoint that this process makes."""
    original = os.preadv

    def preadv(*arguments: Any) -> int:
        strike("read")
        return original(*arguments)

    os.preadv = preadv
