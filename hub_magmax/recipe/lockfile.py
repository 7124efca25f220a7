"""A lock: checkpoints and data pinned by hash and commit, and the preference as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from hub_magmax.errors import LockError
from hub_magmax.files import digest, json_text, read_json
from hub_magmax.recipe.merge_values import MergeValues, positive_shares
from hub_magmax.recipe.norms import Lengths
from hub_magmax.recipe.renaming import Renaming
from hub_magmax.text import Brief, listed

LOCK_NAME = "recipe.lock.json"

#: Fields of a lock that do not decide the merged bytes.
_ASIDE = ("datasets", "local_data", "replaced_data", "chosen", "versions")

#: Fields of a source that are stored only where they have a value.
_OPTIONAL = (
    "adapter_config",
    "places",
    "added_rows",
    "part",
    "languages",
    "datasets",
    "renamed",
    "ties",
    "label_rows",
)


@dataclass(frozen=True)
class LockedFile:
    """A weight file of a source. `header_sha256` covers the safetensors header.

    `sha256` covers the whole file; the Hub states it, for a folder it is computed on request
    (`pipeline.lock`'s `hash_files`), and then checked before every merge.
    """

    path: str
    size_bytes: int
    header_sha256: str
    sha256: str | None = None


@dataclass(frozen=True)
class LockedSource:
    """A checkpoint pinned to its bytes.

    Attributes:
        reference: As the recipe writes it.
        kind: `hub`, `local`, or the kind of location that another package reads.
        repo_id: Repository on the Hub, else None.
        commit: 40-digit commit of `repo_id`, or another name for bytes that can never change, else None.
        files: Its weight files.
        license: Licence id that the source's own card states, or None.
        model_type, architectures: As its config.json states them; None and empty where it does not.
        side_files: Hashes of the files beside its weights, by name (`side_files.content_hashes`).
        adapter_config: Hashes of `adapter_config.json` where the source is a LoRA adapter, else None.
        places: Where tensors of a LoRA adapter are in the base model's files, where these call them otherwise
            (`adapter_places.find_places`), else None.
        added_rows: Rows of the tensors to which a LoRA adapter adds tokens, by name, else None.
        part: The folder, or the file of weights, that counts where a source holds several models, else None.
        languages, datasets: As the source's own card states them, unchecked, or None.
        renamed: Its tensors that the base model calls by another name, or None.
        ties: Tensors that are one parameter with another one of the source, by name, and the stored one whose
            values they have; None where nothing is tied, and for an adapter that ties as the base model does.
        label_rows: By tensor, which of its rows have the merged model's labels, where their order is another
            one, or None.
    """

    reference: str
    kind: str
    repo_id: str | None
    commit: str | None
    files: tuple[LockedFile, ...]
    license: str | None = None
    model_type: str | None = None
    architectures: tuple[str, ...] = ()
    side_files: Mapping[str, str] = field(default_factory=dict, hash=False)
    adapter_config: str | None = None
    places: Mapping[str, str] | None = field(default=None, hash=False)
    added_rows: Mapping[str, int] | None = field(default=None, hash=False)
    part: str | None = None
    languages: tuple[str, ...] | None = None
    datasets: tuple[str, ...] | None = None
    renamed: Renaming | None = None
    ties: Mapping[str, str] | None = field(default=None, hash=False)
    label_rows: Mapping[str, tuple[int, ...]] | None = field(default=None, hash=False)

    @property
    def label(self) -> str:
        """Name of the source in messages: `org/model@1234567` or the path as written."""
        if not self.repo_id or not self.commit:
            return self.reference
        name = f"{self.repo_id}@{self.commit[:7]}"
        return f"{name}/{self.part}" if self.part else name


def own_base_name(task: str) -> str:
    """Return the name of a task's own base model among the sources, which no task can have."""
    return f"base of {task}"


@dataclass(frozen=True)
class LockedSlice:
    """Blocks of the output that follow each other.

    Attributes:
        take: The source that they are copied from; None where they are merged.
        blocks: By source that counts, its own blocks: from the first to before the last.
        of: Beginning of the blocks' names, without the dot before the number; None of a recipe that does not
            name it, before the checkpoints were looked at.
    """

    take: str | None
    blocks: Mapping[str, tuple[int, int]] = field(hash=False)
    of: str | None = None

    @property
    def num_blocks(self) -> int:
        first, end = next(iter(self.blocks.values()))
        return end - first


@dataclass(frozen=True)
class LockedTokenRow:
    """Whose row a token gets; `recipe.tokenizer.TokenRow` says what the fields mean."""

    take: str
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class LockedTokenizer:
    """Vocabulary and chat template of the output.

    Attributes:
        source: Whose tokens it has, or `union`; None where the recipe says nothing of tokens.
        tokens: Tokens about whose rows the recipe says something.
        pad_to_multiple_of: The number of rows is a multiple of it, or None.
        chat_template: As the recipe says it, or None.
        template: The text of a template that the recipe says by a file, or None.
    """

    source: str | None
    tokens: Mapping[str, LockedTokenRow] = field(default_factory=dict, hash=False)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    template: str | None = None


#: Kind of a preference whose numbers multiply the task vectors.
COEFFICIENTS = "coefficients"


@dataclass(frozen=True)
class ResolvedPreference:
    """The preference as numbers.

    Attributes:
        weights: By task name, in task order; non-negative, summing to 1. Of the kind `coefficients` any
            numbers.
        kind: The recipe's kind of preference, or `uniform` where it names none.
        data_fingerprint: Digest of the examples that were used, or None.
        explanation: Facts of the estimate, as plain values for people and the card.
        spec_digest: Of the recipe's `preference`, as written.
    """

    weights: Mapping[str, float] = field(hash=False)
    kind: str
    data_fingerprint: str | None = None
    explanation: Mapping[str, Any] = field(default_factory=dict, hash=False)
    spec_digest: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """How much each task matters, summing to 1: one that is subtracted does not."""
        if self.kind != COEFFICIENTS:
            return dict(self.weights)
        return dict(zip(self.weights, positive_shares(tuple(self.weights.values())), strict=True))


@dataclass(frozen=True, repr=False)
class Lock(Brief):
    """Everything that decides the bytes of the merged model, pinned.

    Attributes:
        base_model, tasks: The pinned checkpoints; tasks by name, in the order they were learned.
        tokenizer: Vocabulary and chat template of the output, where the recipe says something of them.
        bases: Base models of tasks that were fine-tuned from another one, by task.
        lengths: Of the task vectors, where the recipe's `norms` scales them.
        correction: Of the merged model's representation: `name` and options, and `tensor`, the weight of the
            head, which is multiplied by it; empty where the recipe has none.
        method: `name`, `scaling` and every option, with defaults filled in.
        preference: The resolved preference.
        tensors: The recipe's rules for tensors: (glob, source) pairs, or all keys of a rule that has others.
        seed: The recipe's seed.
        datasets: Commits of the data sets on the Hub that preference and evaluation use, by
            `name@revision`.
        local_data: Digest of the files of every other data set that they use, by its name in the recipe.
        replaced_data: Of the evaluation's data that was corrected after the merge, what was locked then; by
            name, as in `datasets` and `local_data`, which have what was scored on last.
        chosen: Where the recipe left the method or the scaling coefficient to a comparison: what was
            compared, on how many examples, and how each candidate did; otherwise empty.
        adapters: Whether an adapter is added to the base model (`each`), or to the checkpoint of the task
            before it (`sequence`).
        token_rows: Globs over the tensors whose rows are matched by token.
        layers: Of which blocks of which sources the output's stacks of blocks are made, in order; empty where
            they are those of the base model.
        statistics: Files of statistics of the tasks' data, by their kind and by task.
        plugin: `package`, `version` (both empty for a method that the program itself has registered) and
            `code` (a sha256) of a method that is not built in: changed code is another merge. Empty for a
            built-in method.
        is_portable: Whether the merge gives the same bytes on every machine. Where it does not, the bytes are
            those of one processor, device and version of torch, and others give nearly the same numbers.
        versions: Of Python and the packages that wrote the lock. They are for people, and no part of the
            digest: the same merge gives the same bytes whatever the versions, if it is portable.
    """

    base_model: LockedSource
    tasks: Mapping[str, LockedSource] = field(hash=False)
    method: Mapping[str, Any] = field(hash=False)
    preference: ResolvedPreference
    tensors: tuple[tuple[str, str] | Mapping[str, Any], ...] = field(hash=False)
    seed: int
    schema: Literal[1] = 1
    datasets: Mapping[str, str] = field(default_factory=dict, hash=False)
    local_data: Mapping[str, str] = field(default_factory=dict, hash=False)
    replaced_data: Mapping[str, str] = field(default_factory=dict, hash=False)
    chosen: Mapping[str, Any] = field(default_factory=dict, hash=False)
    adapters: Literal["each", "sequence"] = "each"
    token_rows: tuple[str, ...] = ()
    layers: tuple[LockedSlice, ...] = ()
    tokenizer: LockedTokenizer | None = None
    bases: Mapping[str, LockedSource] = field(default_factory=dict, hash=False)
    statistics: Mapping[str, Mapping[str, LockedSource]] = field(default_factory=dict, hash=False)
    lengths: Lengths | None = None
    correction: Mapping[str, Any] = field(default_factory=dict, hash=False)
    plugin: Mapping[str, str] = field(default_factory=dict, hash=False)
    is_portable: bool = True
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def merges_factors(self) -> bool:
        """Whether an adapter is made of factors alone: all tasks are some, and the method merges these."""
        how = self.values.how
        return (how.form == "linear" or how.takes_factors) and all(
            task.adapter_config for task in self.tasks.values()
        )

    @property
    def sources(self) -> dict[str, LockedSource]:
        """The base model and the tasks by name, in order."""
        return {"base_model": self.base_model, **self.tasks}

    @property
    def every_source(self) -> dict[str, LockedSource]:
        """All that is read: the base model, the tasks, and tasks' own base models."""
        return {**self.sources, **{own_base_name(task): base for task, base in self.bases.items()}}

    @property
    def every_file(self) -> dict[str, LockedSource]:
        """All of these, and the statistics of the tasks' data."""
        statistics = {
            f"{kind} of {task}": source
            for kind, by_task in self.statistics.items()
            for task, source in by_task.items()
        }
        return {**self.every_source, **statistics}

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per task; where coefficients are given, these over the number of tasks.

        Methods that take coefficients multiply task vectors by the weight times the number of tasks.
        """
        found = tuple(self.preference.weights[name] for name in self.tasks)
        if self.preference.kind != COEFFICIENTS:
            return found
        return tuple(number / len(found) for number in found)

    @cached_property
    def values(self) -> MergeValues:
        """How tensors are merged about which no rule says more."""
        return MergeValues(self.method, self.weights)

    def factors(self, tensor: str, values: MergeValues) -> tuple[float, ...]:
        """Return what each task vector of a tensor is multiplied by before it is merged by some numbers."""
        return (1.0,) * len(self.tasks) if self.lengths is None else self.lengths.factors(tensor, values)

    @property
    def rules(self) -> list[Mapping[str, Any]]:
        """The rules for tensors, each with its keys."""
        return [
            rule if isinstance(rule, Mapping) else dict(zip(("match", "take"), rule, strict=True))
            for rule in self.tensors
        ]

    @property
    def value_rules(self) -> list[Mapping[str, Any]]:
        """Those by which tensors are merged with numbers of their own."""
        return [rule for rule in self.rules if "take" not in rule and "factor" not in rule]

    @property
    def brief(self) -> str:
        sources = listed([*(source.label for source in self.every_source.values())], 3)
        return f"{self.method['name']} of {sources}, {self.digest[:19]}"

    @cached_property
    def digest(self) -> str:
        """Digest of what decides the merged bytes; the same for a lock made again later."""
        return digest({key: value for key, value in self._said().items() if key not in _ASIDE})

    @cached_property
    def checksum(self) -> str:
        """Digest of everything the lock says."""
        return digest(self._said())

    def _said(self) -> dict[str, Any]:
        """Return all fields but empty ones of later versions: the digests of earlier locks stay the same."""
        values = asdict(self)
        if self.adapters == "each":
            del values["adapters"]
        for key in (
            "token_rows",
            "layers",
            "tokenizer",
            "bases",
            "local_data",
            "replaced_data",
            "plugin",
            "statistics",
            "lengths",
            "correction",
        ):
            if not values[key]:
                del values[key]
        if self.is_portable:
            del values["is_portable"]
        by_task = (values["tasks"], values.get("bases", {}), *values.get("statistics", {}).values())
        for source in (values["base_model"], *(source for found in by_task for source in found.values())):
            for key in _OPTIONAL:
                if source[key] is None:
                    del source[key]
        return values

    def to_json(self) -> str:
        values = {"digest": self.digest, "checksum": self.checksum, **self._said()}
        return json_text(values)


#: What functions take for a lock.
LockLike = Lock | Path | str


@overload
def as_lock(lock: LockLike) -> Lock: ...
@overload
def as_lock(lock: LockLike | None) -> Lock | None: ...
def as_lock(lock: LockLike | None) -> Lock | None:
    """Return a lock as it is, or the one that is stored in a file of this path; None as None.

    Raises:
        LockError: If the file does not hold a lock.
    """
    return read_lock(Path(lock)) if isinstance(lock, Path | str) else lock


def read_lock(path: Path) -> Lock:
    """Return the lock stored in `path`.

    Raises:
        LockError: If the file is missing, malformed, or was edited by hand.
    """
    try:
        return parse_lock(path.read_bytes(), str(path))
    except OSError as error:
        raise LockError(f"the lock cannot be read ({error.strerror})", where=str(path)) from error


def parse_lock(content: bytes, where: str, hint: str = "") -> Lock:
    """Return the lock that `content` holds, or raise LockError with a place and a hint, as `read_lock`."""
    refused = LockError(
        "not a lock of this version", where=where, hint=hint or "Write it again with `hub-magmax lock`."
    )
    lock, (_, stored) = read_json(content, Lock, refused, ("digest", "checksum"))
    if stored != lock.checksum:
        what = "the checksum does not fit the content, so the lock was changed by hand"
        usual = "Change the recipe instead and run `hub-magmax lock` again."
        raise LockError(what, where=where, hint=hint or usual)
    return lock
