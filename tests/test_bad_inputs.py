"""What people see when something is wrong: one expected text per case, in tests/bad_inputs/.

After a change that is meant, write the texts again and read the difference as a user would:

    HUB_MAGMAX_WRITE_EXPECTED=1 python -m pytest tests/test_bad_inputs.py
"""

import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.errors import CheckpointError
from hub_magmax.files import sha256_of
from hub_magmax.merging.output.report import read_report
from tests.families import make_tensors, write_checkpoint, write_recipe
from tests.local_hub.hub import LocalHub
from tests.test_checkpoints_index import entry
from tests.test_cli import call

EXPECTED = Path(__file__).parent / "bad_inputs"
WRITE = "HUB_MAGMAX_WRITE_EXPECTED"

#: Texts that say what and where, and should also say what to do.
SAY_NO_MORE = ("hub-push-to-no-name", "hub-verify-plain-model", "lock-missing")

Words = list[object]
#: Breaks something in the folder of a family, and returns the command that meets it.
Break = Callable[[Path, LocalHub], Words]


def text(content: str | bytes) -> Break:
    """Return the case of a recipe with this very text."""

    def break_it(folder: Path, hub: LocalHub) -> Words:
        (folder / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["validate", "recipe.yaml"]

    return break_it


def recipe(verb: str = "validate", **changes: Any) -> Break:
    """Return the case of a recipe that differs from a good one."""

    def break_it(folder: Path, hub: LocalHub) -> Words:
        write_recipe(folder, **changes)
        return [verb, "recipe.yaml"]

    return break_it


def checkpoint(change: Callable[[Path], object], *, verb: str = "run", **changes: Any) -> Break:
    """Return the case of something wrong in the folder of the task `b`."""

    def break_it(folder: Path, hub: LocalHub) -> Words:
        change(folder / "b")
        write_recipe(folder, **changes)
        return [verb, "recipe.yaml"]

    return break_it


def header(entries: Any, data: bytes = b"", *, length: int | None = None) -> Break:
    """Return the case of a weight file with this header."""

    def change(folder: Path) -> None:
        content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        prefix = struct.pack("<Q", len(content) if length is None else length)
        (folder / "model.safetensors").write_bytes(prefix + content + data)

    return checkpoint(change)


def index(weight_map: Mapping[str, str]) -> Break:
    """Return the case of two shards with this index."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write_checkpoint(folder, tensors, num_shards=2)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"] | weight_map}))

    return checkpoint(change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], **changes: Any) -> Break:
    """Return the case of other tensors in the checkpoint `b`."""

    def on_disk(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return checkpoint(on_disk, **changes)


def replaced(found: dict[str, torch.Tensor], **others: torch.Tensor) -> None:
    del found["layer.0.weight"]
    found.update({f"layer.0.{name}": tensor for name, tensor in others.items()})


def lora_of_kohya(found: dict[str, torch.Tensor]) -> None:
    found.clear()
    found["lora_unet_down.lora_down.weight"] = torch.ones(4, 6)
    found["lora_unet_down.lora_up.weight"] = torch.ones(8, 4)


def write_single(folder: Path) -> None:
    save_file(make_tensors(1), folder / "model.safetensors", metadata={"format": "pt"})


def quantised_config(folder: Path) -> None:
    values = {"model_type": "test", "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(values))


def configured(**values: Any) -> Callable[[Path], object]:
    """Return what gives a checkpoint another configuration than the base model, which gets classes too."""

    def change(folder: Path) -> None:
        good = {"model_type": "test", "architectures": ["TestForMaskedLM"]}
        (folder.parent / "base" / "config.json").write_text(json.dumps(good))
        (folder / "config.json").write_text(json.dumps(good | values))

    return change


def adapter(weights: str = "adapter_model.safetensors", **config: Any) -> Callable[[Path], None]:
    """Turn a checkpoint's folder into that of an adapter, with a configuration where one is given."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / weights)
        if config:
            (folder / "adapter_config.json").write_text(json.dumps(config))

    return change


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def link_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("token")
    (folder / "notes.txt").symlink_to("../secret")


def large_side_file(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(10**12)  # a hole, which takes no room


def after(verb: str, then: Callable[[Path], Words], **changes: Any) -> Break:
    """Return the case of something wrong after a first command that went well."""

    def break_it(folder: Path, hub: LocalHub) -> Words:
        write_recipe(folder, **changes)
        assert call(verb, "recipe.yaml")[0] == 0
        return then(folder)

    return break_it


def edit_lock(folder: Path) -> Words:
    path = folder / "recipe.lock.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    return ["plan", "recipe.yaml"]


def another_lock(folder: Path) -> Words:
    write_recipe(folder, seed=7, method="average")
    return ["card", "recipe.yaml"]


def source_changed(folder: Path) -> Words:
    write_checkpoint(folder / "b", make_tensors(1, shapes={"other": (3,)}))
    return ["merge", "recipe.yaml"]


def lock_text(folder: Path, hub: LocalHub) -> Words:
    write_recipe(folder)
    (folder / "recipe.lock.json").write_text("{}")
    return ["plan", "recipe.yaml"]


def change_shard(folder: Path) -> Words:
    path = folder / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    return ["verify", "merged"]


def change_config(folder: Path) -> Words:
    (folder / "merged" / "config.json").write_text("{}")
    return ["verify", "merged"]


def change_report(folder: Path) -> Words:
    path = folder / "merged" / "merge_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"plan_digest": "sha256:0"}))
    return ["verify", "merged"]


def change_model_and_report(folder: Path) -> Words:
    """Change a file, and the report so that it agrees; only merging again tells."""
    merged = folder / "merged"
    (merged / "config.json").write_text("{}")
    report = read_report(merged / "merge_report.json")
    files = report.files | {"config.json": sha256_of(merged / "config.json")}
    (merged / "merge_report.json").write_text(replace(report, files=files).to_json())
    return ["verify", "merged", "--rebuild", "--from", "."]


def add_file(folder: Path) -> Words:
    (folder / "merged" / "modeling.py").touch()
    return ["verify", "merged"]


def rollback_plain_model(folder: Path, hub: LocalHub) -> Words:
    hub.add_repo("me/bad-inputs-unmerged", folder=folder / "a")
    return ["rollback", "me/bad-inputs-unmerged"]


def output(change: Callable[[Path], object], *words: object, **changes: Any) -> Break:
    """Return the case of a place where no output can be."""

    def break_it(folder: Path, hub: LocalHub) -> Words:
        change(folder)
        write_recipe(folder, **changes)
        return ["run", "recipe.yaml", *words]

    return break_it


def nothing(folder: Path) -> None:
    pass


def labels(path: str, **options: Any) -> Break:
    preference = {
        "labels": {"target": {"dataset": path} | options, "classes": {"a": [0], "b": [1], "c": [2]}}
    }

    def break_it(folder: Path, hub: LocalHub) -> Words:
        (folder / "target.csv").write_text("label,year\n" + "7,1\n8,2\n" * 9)
        write_recipe(folder, preference=preference)
        return ["lock", "recipe.yaml"]

    return break_it


def hub_task(name: str, **options: Any) -> Break:
    """Return the case of a task whose model is a repository that cannot be read."""

    def break_it(folder: Path, hub: LocalHub) -> Words:
        if options:
            hub.add_repo(name.partition("@")[0], folder=folder / "a", **options)
        write_recipe(folder, tasks=[{"name": "a", "model": name}])
        return ["lock", "recipe.yaml"]

    return break_it


def verify_on_hub(folder: Path, hub: LocalHub) -> Words:
    hub.add_repo("me/bad-inputs-plain", folder=folder / "a")
    return ["verify", "me/bad-inputs-plain"]


def command(*words: object) -> Break:
    return lambda folder, hub: list(words)


GOOD_TEXT = "schema: 1\nbase_model: ./base\ntasks:\n  - {name: a, model: ./a}\n"

CASES: dict[str, Break] = {
    "recipe-missing": command("run", "none.yaml"),
    "recipe-is-a-folder": command("run", "base"),
    "recipe-not-yaml": text("schema: 1\n  base_model: ./base\n"),
    "recipe-not-text": text(b"\xff\xfe\x00"),
    "recipe-empty": text(""),
    "recipe-is-a-list": text("- schema: 1\n"),
    "recipe-key-twice": text(GOOD_TEXT + "seed: 1\nseed: 2\n"),
    "recipe-anchor": text(GOOD_TEXT.replace("./base", "&x ./base")),
    "recipe-python-tag": text(GOOD_TEXT + "seed: !!python/object/apply:os.getpid []\n"),
    "recipe-nested-too-deeply": text("a: " + "[" * 2000),
    "recipe-endless-number": text(GOOD_TEXT + f"seed: 0x{'F' * 4000}\n"),
    "recipe-too-many-values": text(GOOD_TEXT + f"tensors: [{'1,' * 60_000}]\n"),
    "recipe-holds-a-token": recipe(base_model=f"https://me:hf_{'a' * 34}@huggingface.co/org/model"),
    "recipe-overlong-path": recipe(base_model="./" + "x" * 5000),
    "recipe-wrong-date": text(GOOD_TEXT + "seed: 2001-02-30\n"),
    "recipe-several-problems": recipe(outptu={}, seed=-1, methd="ties"),
    "recipe-no-tasks": recipe(tasks=[]),
    "recipe-newer-schema": recipe(schema=2),
    "recipe-task-twice": recipe(tasks=[{"name": "a", "model": "./a"}, {"name": "a", "model": "./b"}]),
    "recipe-task-name": recipe(tasks=[{"name": "my task", "model": "./a"}]),
    "recipe-model-name": recipe(tasks=[{"name": "a", "model": "org/group/model"}]),
    "recipe-unknown-method": recipe(method="tie"),
    "recipe-unknown-option": recipe(method={"name": "ties", "densty": 0.5}),
    "recipe-option-out-of-range": recipe(method={"name": "ties", "density": 1.5}),
    "recipe-scaling-not-a-number": recipe(method={"name": "ties", "scaling": float("nan")}),
    "recipe-weights-sum": recipe(preference={"weights": {"a": 0.5, "b": 0.2}}),
    "recipe-weights-negative": recipe(preference={"weights": {"a": 1.5, "b": -0.5}}),
    "recipe-two-preferences": recipe(preference={"weights": {"a": 1}, "geometric": {"ratio": 2}}),
    "recipe-unknown-task": recipe(tensors=[{"match": "*", "take": "d"}]),
    "recipe-shard-size": recipe(output={"shard_size": "5 parsecs"}),
    "recipe-rule-matches-nothing": recipe("plan", tensors=[{"match": "vision.*", "take": "a"}]),
    "recipe-rules-leave-nothing": recipe("plan", tensors=[{"match": "*", "take": "nothing"}]),
    "checkpoint-missing": recipe("lock", base_model="./bsae"),
    "checkpoint-is-a-file": recipe("lock", base_model="./recipe.yaml"),
    "checkpoint-home-of-nobody": recipe("lock", base_model="~nobody-at-all/model"),
    "checkpoint-overlong-name": recipe("lock", base_model="./" + "x" * 300),
    "checkpoint-without-weights": checkpoint(lambda folder: (folder / "model.safetensors").unlink()),
    "checkpoint-pickle-only": checkpoint(pickle_only),
    "checkpoint-two-weights": checkpoint(
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "x.safetensors")
            and (folder / "y.safetensors").write_bytes(b"")
        )
    ),
    "checkpoint-truncated": checkpoint(
        lambda folder: os.truncate(
            folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 9
        )
    ),
    "checkpoint-empty-file": checkpoint(lambda folder: os.truncate(folder / "model.safetensors", 0)),
    "checkpoint-not-safetensors": header(b"PK\x03\x04 not a header", length=2**60),
    "checkpoint-header-not-json": header(b'{"a": }'),
    "checkpoint-header-not-text": header(b'{"\xff": 1}'),
    "checkpoint-header-too-deep": header(b"[" * 100_000),
    "checkpoint-name-twice": header(b'{"a": {}, "a": {}}'),
    "checkpoint-odd-name": header({"\x1b[2J" + "x" * 200: entry("F7")}, bytes(8)),
    "checkpoint-half-a-character": header({"\ud800": entry()}, bytes(8)),
    "checkpoint-dtype-unknown": header({"a": entry("F7")}, bytes(8)),
    "checkpoint-dtype-a-list": header({"a": entry() | {"dtype": []}}, bytes(8)),
    "checkpoint-shape-negative": header({"a": entry(shape=(-2,))}, bytes(8)),
    "checkpoint-shape-huge": header({"a": entry(shape=(10**18, 10**18))}, bytes(8)),
    "checkpoint-shape-endless": header({"a": entry(shape=(2**62,) * 1000)}, bytes(8)),
    "checkpoint-sizes-disagree": header({"a": entry(shape=(3,))}, bytes(8)),
    "checkpoint-overlap": header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "checkpoint-hole": header({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "checkpoint-surplus-bytes": header({"a": entry()}, bytes(20)),
    "checkpoint-metadata": header({"__metadata__": {"format": 1}, "a": entry()}, bytes(8)),
    "checkpoint-without-tensors": header({}),
    "checkpoint-index-missing-shard": index({"scale": "model-00003-of-00002.safetensors"}),
    "checkpoint-index-outside": index({"scale": "../a/model.safetensors"}),
    "checkpoint-index-absolute": index({"scale": "/etc/passwd"}),
    "checkpoint-index-disagrees": index({"surplus": "model-00001-of-00002.safetensors"}),
    "checkpoint-index-not-json": checkpoint(
        lambda folder: (folder / "model.safetensors.index.json").write_text("{")
    ),
    "checkpoint-large-side-file": checkpoint(large_side_file),
    "checkpoint-link-outside": checkpoint(link_out),
    "checkpoint-config-not-json": checkpoint(lambda folder: (folder / "config.json").write_text("{'a': 1}")),
    "checkpoint-config-empty": checkpoint(lambda folder: (folder / "config.json").write_text("")),
    "checkpoint-config-no-mapping": checkpoint(lambda folder: (folder / "config.json").write_text("[]")),
    "quantised-gptq": tensors(
        lambda t: replaced(
            t,
            qweight=torch.ones(2, 8, dtype=torch.int32),
            qzeros=torch.ones(1, 1, dtype=torch.int32),
            scales=torch.ones(1, 8, dtype=torch.float16),
            g_idx=torch.ones(16, dtype=torch.int32),
        )
    ),
    "quantised-bitsandbytes": tensors(
        lambda t: t.update(
            {
                "layer.0.weight": torch.ones(64, 1, dtype=torch.uint8),
                "layer.0.weight.absmax": torch.ones(2),
                "layer.0.weight.quant_map": torch.ones(16),
                "layer.0.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8),
            }
        )
    ),
    "quantised-fp8": tensors(
        lambda t: t.update(
            {
                "layer.0.weight": t["layer.0.weight"].to(torch.float8_e4m3fn),
                "layer.0.weight_scale_inv": torch.ones(1, 1),
            }
        )
    ),
    "quantised-mlx": tensors(
        lambda t: replaced(
            t,
            weight=torch.ones(16, 1, dtype=torch.uint32),
            scales=torch.ones(16, 1, dtype=torch.float16),
            biases=torch.ones(16, 1, dtype=torch.float16),
        )
    ),
    "quantised-says-the-config": checkpoint(quantised_config),
    "recognised-float8": tensors(lambda t: t.update(scale=t["scale"].to(torch.float8_e5m2))),
    "recognised-gguf": checkpoint(
        lambda folder: (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    ),
    "recognised-lora-of-kohya": tensors(lora_of_kohya),
    "recognised-lfs-pointer": checkpoint(
        lambda folder: (folder / "tokenizer.json").write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 17\n"
        )
    ),
    "recognised-two-sets": checkpoint(
        lambda folder: write_checkpoint(folder, make_tensors(9), num_shards=2) and write_single(folder)
    ),
    "recognised-zero-3": tensors(lambda t: t.update({"layer.0.weight": torch.empty(0)})),
    "adapter-without-config": checkpoint(adapter()),
    "adapter-pickled": checkpoint(adapter("adapter_model.bin")),
    "adapter-dora": checkpoint(adapter(r=4, lora_alpha=8, use_dora=True)),
    "adapter-without-rank": checkpoint(adapter(lora_alpha=8)),
    "adapters-none": recipe("plan", adapters="sequence"),
    "adapter-of-whole-checkpoints": recipe("plan", method="average", output={"format": "adapter"}),
    "adapter-of-another-method": recipe("plan", method="ties", output={"format": "adapter"}),
    "mismatch-model-type": checkpoint(configured(model_type="other")),
    "mismatch-model-class": checkpoint(configured(architectures=["TestForTokenClassification"])),
    "mismatch-shape": tensors(lambda t: t.update(scale=torch.ones(3))),
    "mismatch-dtype": tensors(lambda t: t.update(scale=torch.tensor(1, dtype=torch.int8))),
    "mismatch-missing-tensor": tensors(lambda t: t.pop("scale")),
    "mismatch-surplus-tensors": tensors(lambda t: t.update({f"extra.{i}": torch.ones(1) for i in range(5)})),
    "mismatch-integers": tensors(lambda t: t["position_ids"].add_(1)),
    "value-nan": tensors(lambda t: t["embed.weight"].view(-1)[17:18].fill_(torch.nan)),
    "value-infinity": tensors(lambda t: t["scale"].fill_(-torch.inf)),
    "lock-edited": after("lock", edit_lock),
    "lock-of-another-recipe": after("merge", another_lock),
    "lock-source-changed": after("lock", source_changed),
    "lock-not-a-lock": lock_text,
    "lock-missing": after("lock", lambda folder: ["plan", "recipe.yaml", "--lock", "none.json"]),
    "lock-nowhere-to-write": after(
        "validate", lambda folder: ["lock", "recipe.yaml", "--out", "none/lock.json"]
    ),
    "output-holds-a-model": output(lambda folder: write_checkpoint(folder / "merged", {"w": torch.ones(2)})),
    "output-holds-files": output(lambda folder: (folder / "merged").mkdir() or (folder / "merged/x").touch()),
    "output-is-a-file": output(lambda folder: (folder / "merged").write_text("x")),
    "output-is-a-link": output(lambda folder: (folder / "merged").symlink_to("base")),
    "output-is-an-input": output(nothing, "--output", "base"),
    "output-below-a-file": output(nothing, output={"path": "base/config.json/merged"}),
    "output-is-the-root": output(nothing, "--output", "/"),
    "output-overlong-name": output(nothing, output={"path": "x" * 300}),
    "data-missing": labels("./none.csv"),
    "data-without-column": labels("./target.csv", label_column="class"),
    "data-of-no-task": labels("./target.csv"),
    "hub-no-repository": hub_task("me/none-such"),
    "hub-no-revision": hub_task("me/bad-inputs@none", private=False),
    "hub-gated": hub_task("other/bad-inputs-gated", gated=True),
    "hub-private": hub_task("other/bad-inputs-private", private=True),
    "hub-data-set": hub_task("hf://datasets/me/x"),
    "hub-not-writable": recipe("run", output={"push_to_hub": "other/bad-inputs-merged"}),
    "output-keep-nowhere": recipe(output={"keep": False}),
    "hub-push-to-no-name": recipe("run", output={"push_to_hub": "no name"}),
    "hub-verify-plain-model": verify_on_hub,
    "hub-verify-missing": command("verify", "me/none-such"),
    "push-folder-of-no-merge": command("push", "base", "me/bad-inputs-pushed"),
    "push-no-folder": command("push", "none", "me/bad-inputs-pushed"),
    "verify-changed-shard": after("merge", change_shard),
    "verify-changed-config": after("merge", change_config),
    "verify-changed-report": after("merge", change_report),
    "verify-changed-model-and-report": after("merge", change_model_and_report),
    "verify-added-file": after("merge", add_file),
    "sign-folder-of-no-merge": command("sign", "base", "--private-key", "none.pem"),
    "sign-no-folder": command("sign", "none", "--private-key", "none.pem"),
    "canary-without-scores": after("merge", lambda folder: ["canary", "merged", "--from", "."]),
    "rollback-missing": command("rollback", "me/none-such"),
    "rollback-plain-model": rollback_plain_model,
    "verify-folder-of-no-merge": command("verify", "base"),
    "lock-out-is-a-folder": after("validate", lambda folder: ["lock", "recipe.yaml", "--out", "."]),
    "card-before-merge": after("validate", lambda folder: ["card", "recipe.yaml"]),
}


def shown(message: str, folder: Path) -> str:
    """Return a message without what differs from run to run."""
    for path, name in ((folder.resolve(), "FOLDER"), (folder, "FOLDER"), (os.environ["HF_ENDPOINT"], "HUB")):
        message = message.replace(str(path), name)
    message = re.sub(r"@[0-9a-f]{7}\b", "@COMMIT", message)
    message = re.sub(r"\b[0-9a-f]{64}\b", "SHA256", message)
    return re.sub(r"[Rr]equest[ _-]?[Ii][Dd]: ?\S+", "REQUEST", message)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_one_paragraph_and_leaves_nothing(case, family, hub, monkeypatch):
    monkeypatch.chdir(family)
    words = [str(word) for word in CASES[case](family, hub)]
    if case in ("hub-gated", "hub-private", "hub-not-writable"):
        monkeypatch.setenv("HF_TOKEN", hub.add_user("stranger"))
    before = state(family)
    code, out, err = call(*words)
    message = shown(err, family)
    assert (code, out) == (1, "")
    lines = [line for line in message.strip().split("\n") if not _is_progress(line)]
    assert lines[0].startswith("Error: ")
    assert all(line.startswith("  - ") for line in lines[1:])
    assert "Traceback" not in message
    assert message.strip().endswith((".", "?", "!")), "a message is made of sentences"
    assert len(message) < 1200
    assert message.isascii() or all(c.isprintable() or c == "\n" for c in message)
    assert os.environ["HF_TOKEN"] not in err
    assert state(family) == before
    check_text(case, f"$ hub-magmax {' '.join(shorter(word) for word in words)}\n{chr(10).join(lines)}\n")
    check_facts(*call(*words, "--json"), says_more=case not in SAY_NO_MORE)


def _is_progress(line: str) -> bool:
    """Say whether a line tells only that something takes long, as on a busy machine."""
    return line.startswith("merging ") or line.endswith(" so far")


def state(folder: Path) -> dict[Path, object]:
    """Return what is in a folder: every file's content, but of those that are too large for that."""
    sizes = {path: path.is_file() and path.stat().st_size for path in folder.rglob("*")}
    return {path: path.read_bytes() if 0 < size < 10**6 else size for path, size in sizes.items()}


def shorter(word: str) -> str:
    return word if len(word) < 60 else f"{word[:20]}..."


def check_text(case: str, found: str) -> None:
    path = EXPECTED / f"{case}.txt"
    if os.environ.get(WRITE):
        EXPECTED.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert path.is_file(), f"there is no expected text for {case}; see the docstring"
    assert found == path.read_text(encoding="utf-8")


def check_facts(code: int, out: str, err: str, *, says_more: bool) -> None:
    """Check that programs get what is wrong, where, and what was expected or can be done."""
    assert code == 1
    facts = json.loads(out)["error"]
    assert facts["kind"].endswith("Error")
    assert facts["what"]
    assert facts["where"], "says where"
    if facts["kind"] != "RecipeError" and says_more:  # there the text itself says what would have been right
        assert facts["expected"] or facts["hint"], "says what to do"


def test_every_expected_text_belongs_to_a_case():
    assert {path.stem for path in EXPECTED.glob("*.txt")} == set(CASES)
    assert len(CASES) >= 40


def test_weight_file_with_a_backslash_in_its_name_is_refused():
    with pytest.raises(CheckpointError, match="holds a backslash"):
        _ = MemorySource({"..\\x.safetensors": b""}, "model").index


@pytest.mark.parametrize("name", ["a\n.safetensors", "\x1b[2J.safetensors", "\udcff.safetensors"])
def test_weight_file_with_control_characters_in_its_name_is_refused(name):
    with pytest.raises(CheckpointError, match="holds control characters") as caught:
        _ = MemorySource({name: b""}, "model").index
    assert str(caught.value).isprintable()
