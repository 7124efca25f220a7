"""The stored results of the attacks, and docs/reliability.md, which is written from them alone.

`python -m benchmarks.torture` measures; with `--write` it only writes the page again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "torture.json"
PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"


def load() -> dict[str, Any]:
    """Return the stored results; nothing where none are stored."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return found


# Complex only by count: a condition for each cell that may be empty.
def page(results: dict[str, Any]) -> str:
    """Return docs/reliability.md."""
    rows = [
        "| attack | times | what happened | slowest | growth | failures |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name, title in PARTS.items():
        if (found := results["parts"].get(name)) is None:
            continue
        outcomes = "; ".join(f"{count:,} {text}" for text, count in found["outcomes"].items())
        reading = found["slowest_seconds"] > 0  # only readers are timed one by one
        slowest = f"{found['slowest_seconds']:.2f} s" if reading else ""
        growth = f"{found['memory_growth_bytes'] / 1e6:.0f} MB" if reading else ""
        failures = len(found["failures"])
        rows.append(f"| {title} | {found['attacks']:,} | {outcomes} | {slowest} | {growth} | {failures} |")
    text = _INTRO + "\n".join(rows) + "\n" + _OUTRO
    listed = [f"- {title}: {line}" for p, title in PARTS.items() for line in _failures(results, p)]
    text += "\n## Failures\n\n" + ("\n".join(listed) if listed else "None.") + "\n"
    if missing := results.get("unmeasured"):
        titles = "; ".join(PARTS[name] for name in missing)
        text += (
            f"\nNot measured in the latest run, whose time was over (a row is of an earlier one): {titles}.\n"
        )
    facts = ", ".join(f"{name} {value}" for name, value in results.get("machine", {}).items())
    return text + f"\nMeasured with {facts}.\n"


def _failures(results: dict[str, Any], part: str) -> list[str]:
    found: list[str] = results["parts"].get(part, {}).get("failures", [])
    return found[:10] + ([f"and {len(found) - 10} more"] if len(found) > 10 else [])


#: Targets and kinds of attacks, by name, in the order of the page.
PARTS = {
    "kills": "SIGKILL of a real `hub-magmax merge` at a random moment of its writing",
    "site_kills": "SIGKILL of `hub-magmax run` of three sites at a random moment of its writing",
    "finetune_kills": "SIGKILL of `hub-magmax finetune` of two tasks at a random moment",
    "alternate_kills": "SIGKILL of `hub-magmax alternate` in three rounds at a random moment",
    "hub_kills": "SIGKILL of `hub-magmax run`, which merges and pushes to a local Hub, at a random moment",
    "hub_requests": "SIGKILL of `hub-magmax run` before and after each request that it sends",
    "relay_kills": "SIGKILL of a merge straight to the Hub (`output.keep: false`) at a random moment",
    "relay_requests": "SIGKILL of a merge straight to the Hub before and after each request that it sends",
    "crash_points": "SIGKILL before each change on the disk: open, write, fsync, rename, mkdir, remove",
    "full_disk": "`No space left on device` at each call that needs space",
    "small_disk": "A real file system (tmpfs) that is too small, page by page, and then large enough",
    "size_limits": "The kernel's limit on the size of files, from 0 bytes up",
    "read_errors": "`Input/output error` at each read of a checkpoint",
    "source_changes": "A checkpoint that is changed before each read",
    "no_memory": "`MemoryError` at each call that changes the disk",
    "headers": "Mutated safetensors files",
    "indexes": "Mutated `model.safetensors.index.json`",
    "recipes": "Mutated recipes",
}


_INTRO = """# Reliability, measured

Made by `python -m benchmarks.torture --write` from `benchmarks/results/torture.json`; `make torture`
measures again, in an hour at most. An attack succeeds if it leaves half a model, a wrong byte, a file
behind, a traceback, a hang, or a process that grows by more than 200 MB. The count of these is the last
column.

"""


_OUTRO = """
After each attack on a merge the output is looked at (absent or complete, never half), the same command
runs again, and its output is compared byte for byte with that of an undisturbed merge, with nothing left
beside it. After a kill during a push every commit on the Hub is looked at: none may hold a part of a
model, and after the second run exactly one holds it. A training that was killed goes on after its last
stored step, and rounds in the round that they were in: every checkpoint and every round's model is
compared. Where the process was killed after the rename the model is complete already; `merge` may then
refuse, saying that the output holds a model. An attack on a reader must be answered within ten seconds by
success or by one paragraph that says what is wrong; the table gives the slowest answer and how much the
process grew over the whole part.

## What a merge promises

- **Complete or absent.** Shards are written to `NAME.partial`, forced to the disk, read back, and compared
  with the sha256 of what was written. The folder gets its name by one rename, after all of its files and
  names are on the disk. A killed merge goes on with its first unfinished shard; whatever else lies in
  `NAME.partial` is removed first, so that nothing of an earlier attempt comes into the output.
- **One writer.** A second process on the same output is told so and ends.
- **One version of each source.** Every read is compared with the file as it was when first opened: device,
  inode, size, time of the last change. Times are compared for equality only, so a clock that jumps does not
  matter.
- **NaN and infinity** in a tensor that is merged end the merge, with the tensor, its file and the place. In
  one that is only copied they may be meant: it is copied, and report and card name it. A finite value that
  the output's dtype cannot hold is an error in both.
- **Memory that runs out** ends a command as a full disk does: one paragraph, nothing at the output, and the
  same command goes on.
- **Names of files** from a repository that lead elsewhere on some system (separators, Windows' devices,
  control characters) are not copied, and refused for weights. What is copied is at most 500 MB a file,
  but for weights of sub-folders. Configurations can name files inside the checkpoint only.
- **Whole.** What loaders need beside the weights is copied and pinned, sub-folders and code included
  ([docs/output.md](output.md)); what stays behind is named. Code is read as text to find what it imports,
  and never run; pickles are neither read nor copied. `run` opens the output on torch's meta device as its
  library does, with no network and no code of the checkpoint, before it publishes.
- **Recipes** are at most 1 MB, with 50,000 values, 30 levels and numbers of 100 characters, so that each is
  answered in seconds. One that holds an access token, or an address with a password, is refused, since
  recipes are published. Errors never repeat a token, nor the one in `HF_TOKEN`.
- **Links.** A link in a checkpoint folder is followed only inside that folder, or from a snapshot of the
  Hub's cache to that cache's blobs, those that its repositories share included. A repository that was cloned
  can otherwise hold a link to any file of its reader's, which would be copied into the output, and published.
- **Recognised before it is compared.** A source that is no full checkpoint is refused by name, with the
  step that leads to one, before anything is read but headers: quantised weights of any format (GPTQ, AWQ,
  bitsandbytes, 8 bits with scales, compressed-tensors, MXFP4, NVFP4, HQQ, MLX, torchao, quanto, ComfyUI,
  and all integers that belong to scales), adapters that are not PEFT's (kohya, diffusers, LyCORIS, MLX),
  tensors that ZeRO-3 or FSDP left empty, optimisers' states, models that were saved with an unmerged
  adapter inside, pointers of git-lfs, and files of other programs (GGUF, ONNX, TensorFlow, Flax, pickles).
  No rule is proposed for these, since it would drop what they hold.
- **One set of weights.** A folder with `model.safetensors` and an index of other files, or with whole
  weights and a PEFT adapter, is refused, since loaders differ in what they take; the file that counts can
  be named.
- **Architectures.** Every `config.json` that states a `model_type` must state the same one, since models
  of two types can have tensors of the same names and shapes. Heads that `architectures` names must be for
  the same task, unless the recipe has rules for `tensors`, which say whose head is kept. Other class
  names decide nothing where all tensors agree: those of wrappers (`FSDPLlamaForCausalLM`) are not noted,
  others are. An adapter must fit the base model's layers by name and shape; one that is more than a
  product of matrices is refused.
- **Tokenizers** and chat templates that differ are no error: `plan`, the merge report and the card name the
  sources and the files, and whose tokenizer the merged model gets.
- **Configurations** that differ in a key that changes what is computed (`rope_theta`, activations, norms,
  stop tokens, image sizes) are noted in the same places, one line for each group of equal differences,
  with both values. Names, versions, dtypes, options of training and defaults that only one version of
  transformers writes are not. Other numbers of attention heads in tensors of one shape are a fault.
- **Labels.** Where `id2label` of two classifiers names the same labels in another order, the rows of
  their heads are matched by label, and it is said. Other labels are a fault: rows of two meanings would
  be merged.
- **Faults** of the checkpoints, such as a task that was fine-tuned from another base model, are looked
  for in samples of their values, and refused unless they are [accepted by
  name](diagnosis.md).
- **An adapter of another base model**, by the name in its `adapter_config.json`, is noted with both names.
- **Tied weights.** Tensors that a model uses as one parameter, such as a head and an embedding, are
  merged as one, however often a file stores them. That they are one is known from equal contents where a
  file stores both, and from `tie_word_embeddings` where it lacks one; the lock has it for each source.
  The output stores what the base model stores. Where a task trained them apart, the output has both, each
  merged against the base model's one, and its config.json says `tie_word_embeddings: false`. A rule about
  one of the names is carried out, and unties them too.
- **config.json** of the output is a copy, with the values changed that its weights have otherwise: dtype,
  vocabulary, positions, token types, labels, image size, number of layers, ties. A size that it states,
  and that cannot be changed so simply (such as `intermediate_size`), is an error of `plan`; sizes that it
  does not state are not judged.
- **Headers and indexes** are at most 100 MB, name every tensor once, and may have 64 dimensions. A size is
  believed only where it agrees with the file's, so a header cannot make anything large be allocated.

## What can be checked afterwards

`hub-magmax verify MODEL` compares every file that the merge wrote with the sha256 in `merge_report.json`:
the weights, their index, config, tokenizer, processor, recipe, lock and provenance. A file that loaders
read and that the merge did not write (weights, code, `*.json` and the like) is an error too. The card,
its picture, the scores and a signature may change later and are not compared. Whoever changes a file can
change the report too, so `--rebuild` merges again from the pinned sources and compares every tensor, naming
the first one that differs, and then every file but recipe and lock, which it merges from.

`provenance.json` is an [in-toto statement](https://in-toto.io/Statement/v1) with a [SLSA
provenance](https://slsa.dev/provenance/v1) predicate. Its subjects are the weight files. Its build type
`urn:hub_magmax:merge:1` means: `externalParameters.recipe` is the recipe; `internalParameters` are the
digests of lock and plan, the method with its options, the preference as numbers with the fingerprint of
its data, the seed, and the package of a plug-in; `resolvedDependencies` are the sources (`hf://` names with
their commits, or folders relative to the recipe), their weight files, the files that were copied from one of
them, and the data sets, those on the Hub with their commits, others with a digest of their files. The
versions of the software are the builder's. It names no time and no machine, so a merge that is repeated
states the same.

`hub-magmax sign FOLDER --private-key KEY` writes `model.sig` by [OpenSSF
model-signing](https://github.com/sigstore/model-transparency) (`pip install 'hub-magmax[signing]'`),
with a PEM file of an elliptic curve key, and without the network. It covers what `verify` compares and
the merge report itself. `hub-magmax verify FOLDER --public-key KEY` checks it. The card is not covered,
because a push puts the repository's name into it.

What is not promised: that a write survives a disk that lies about having stored it; that a file changed in
place twice within one tick of the file system's clock (a few milliseconds) is noticed; that a merge ends
where the kernel refuses memory to a thread that is just starting, for which Python may then wait for ever (a
merge that is killed then goes on like any other); POSIX systems only.
"""
