"""Agreement of the output's config.json with its weights: which values change, from headers alone.

The output gets a copy of one source's config.json. Where a tensor of that source has the size that a key
states, and the output's tensor has another one, the key follows. A size that is stated and cannot follow is
an error. What a configuration does not state is not judged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.checkpoints.config import (
    CONFIG_NAME,
    LABELS,
    Path,
    counts_at,
    is_count,
    level_at,
    levels,
    stated_config,
)
from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.names.model_classes import TIE_KEY, is_said_untied
from hub_magmax.checkpoints.opening import as_stored
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.ties.tied import ties_of
from hub_magmax.errors import MismatchError
from hub_magmax.planning.fitting.other_heads import other_heads
from hub_magmax.planning.output_config.num_layers import Layers
from hub_magmax.planning.output_config.sizes import (
    CLASSIFIER,
    DTYPES,
    OFTEN_LEFT_OUT,
    POSITIONS,
    ROWS,
    SCALED_BY_TIE,
    most_common,
    of_level,
    side_of,
    sizes_stated,
)
from hub_magmax.planning.plan import ConfigChange, Plan, TensorJob
from hub_magmax.planning.tied import untied
from hub_magmax.planning.tokenizers.token_ids import moved_ids
from hub_magmax.text import rule_text, shown

Level = tuple[Path, Mapping[str, Any]]


def config_changes(plan: Plan, sources: Mapping[str, TensorSource]) -> tuple[ConfigChange, ...]:
    """Return what the output's config.json has to say otherwise than that of `output.files_from`.

    Args:
        plan: Of whole weights.
        sources: The checkpoints by name.

    Raises:
        MismatchError: If a size that config.json states is no longer that of the weights, and cannot follow.
    """
    source = sources[plan.recipe.output.files_from]
    config = stated_config(source)
    if not config:
        return ()
    found = _Agreement(plan, sources, config)
    changes = tuple(found.changes())
    found.refuse_unexplained(changes)
    return (*changes, *_moved(plan, sources, config), *_weights_name(plan, config))


def _moved(
    plan: Plan, sources: Mapping[str, TensorSource], config: Mapping[str, Any]
) -> Iterator[ConfigChange]:
    """Yield the values that name tokens by rows which are others in the output."""
    tokenizer = plan.lock.tokenizer
    theirs = sources.get((tokenizer and tokenizer.source) or "")
    ids = moved_ids(config, plan.tokenizer.ids, stated_config(theirs) if theirs else {})
    for path, new in ids.items():
        yield ConfigChange(path, level_at(config, path[:-1])[path[-1]], new)


def _weights_name(plan: Plan, config: Mapping[str, Any]) -> Iterator[ConfigChange]:
    """Yield the name of the weights where a configuration states another; transformers looks for no other."""
    stated = config.get("transformers_weights")
    written = plan.shards[0].file if len(plan.shards) == 1 else plan.index_name
    if isinstance(stated, str) and stated != written:
        yield ConfigChange(("transformers_weights",), stated, written)


# Complex, and flat: two lines, each of several facts.
def config_notices(plan: Plan) -> Iterator[str]:
    """Yield a line about the values of the output's config.json that are not those of its source's file."""
    files_from = plan.recipe.output.files_from
    changed = [change for change in plan.config_changes if change.path[-1] not in LABELS]
    named = [f"{'.'.join(change.path)} {json.dumps(change.new)}" for change in changed]
    named += ["the labels"] if len(changed) < len(plan.config_changes) else []
    if named:
        yield f"config.json of the merged model is that of {files_from}, but for {', '.join(named)}"
    taken = {job.source for job in plan.jobs if not job.merged} - {"merge", files_from}
    has_tokens = plan.lock.tokenizer is not None and plan.lock.tokenizer.source is not None
    if taken and not has_tokens and any(change.path[-1] == "vocab_size" for change in plan.config_changes):
        yield (
            f"the rows of the embeddings are not those of {files_from}, and its tokenizer is copied: "
            f"output.files_from: {min(taken)} takes that of {min(taken)}"
        )


@dataclass(frozen=True)
class _Rows:
    """One tensor's size along an axis, in the source of the config and in the output."""

    name: str
    before: int
    after: int


class _Agreement:
    """A configuration, the tensors that it was written for, and those of the output."""

    def __init__(self, plan: Plan, sources: Mapping[str, TensorSource], config: Mapping[str, Any]) -> None:
        self.plan, self.sources, self.config = plan, sources, config
        self.files_from = plan.recipe.output.files_from
        self.label = f"{sources[self.files_from].label}, {CONFIG_NAME}"
        self.before: Mapping[str, TensorInfo] = as_stored(sources[self.files_from]).tensors
        self.jobs: dict[str, TensorJob] = {job.name: job for job in plan.jobs}
        ties = ties_of(plan.lock)
        self._tied = ties.copies.keys() | ties.apart.keys()

    def changes(self) -> Iterator[ConfigChange]:
        """Yield the changes, key by key."""
        found = [*levels(self.config)]
        yield from self._dtypes(found)
        if self._is_resized():
            for key, pattern, extras in ROWS:
                yield from self._rows(key, re.compile(rf"(.*\.)?({pattern})"), extras)
            yield from self._image_sizes(found)
        slices = self.plan.lock.layers
        if slices or self.before.keys() != self.jobs.keys():
            configs = {name: stated_config(source) for name, source in self.sources.items()}
            yield from Layers(self.before, self.jobs, self.files_from, configs, slices).changes(found)
        yield from self._labels()
        yield from self._ties(found)
        yield from self._classes()

    def _dtypes(self, nested: Sequence[Level]) -> Iterator[ConfigChange]:
        before = most_common((info.dtype, info.num_elements) for info in self.before.values())
        after = most_common((job.dtype, job.num_elements) for job in self.jobs.values())
        is_asked = self.plan.recipe.output.dtype != "auto"
        wrong = {*DTYPES.values()} if is_asked else {before}
        if after is None or (before == after and not is_asked):
            return
        for path, level in nested:
            for key in ("dtype", "torch_dtype"):
                if str(level.get(key)).removeprefix("torch.") in wrong - {after}:
                    yield ConfigChange((*path, key), level[key], after)

    def _is_resized(self) -> bool:
        """Say whether a tensor has another shape in the output; mostly none has, and no name is looked at."""
        shapes = ((info.shape, self.jobs.get(name)) for name, info in self.before.items())
        return any(job is not None and job.shape != shape for shape, job in shapes)

    def _rows(self, key: str, pattern: re.Pattern[str], extras: Sequence[int]) -> Iterator[ConfigChange]:
        tensors = self._along(0, pattern)
        stated = counts_at(self.config, key)
        for path, old in stated.items():
            fitting, extra = _stating(tensors, old, extras)
            own = of_level(fitting, path)
            yield from self._followed((*path, key), old, [fitting[name] for name in own], extra)
        if not stated and key in OFTEN_LEFT_OUT and self.config.get("model_type"):
            changed = [rows for rows in tensors if rows.before != rows.after]
            above = ("text_config",) if isinstance(self.config.get("text_config"), dict) else ()
            yield from self._followed((*above, key), None, changed, 0)

    def _followed(
        self, path: Path, old: int | None, tensors: Sequence[_Rows], extra: int
    ) -> Iterator[ConfigChange]:
        """Yield the change of a key whose tensors all got another size."""
        sizes = {rows.after for rows in tensors}
        if not any(rows.after != rows.before for rows in tensors):
            return
        if len(sizes) > 1:
            first, other = (
                next(rows for rows in tensors if rows.after == size) for size in sorted(sizes)[:2]
            )
            raise MismatchError(
                f"{shown(first.name)} of the output has {first.after} rows, and {shown(other.name)} "
                f"{other.after}",
                key=("tensors",),
                expected=f"the same number, since `{path[-1]}` of config.json states both",
                hint="Take both from one source, by a rule for each: "
                + ", ".join(rule_text(rows.name, "TASK") for rows in (first, other)),
            )
        yield ConfigChange(path, old, sizes.pop() - extra)

    def _along(self, axis: int, pattern: re.Pattern[str]) -> list[_Rows]:
        """Return the sizes along an axis of tensors that are in the output, too."""
        found = []
        for name, info in self.before.items():
            job = self.jobs.get(name)
            if job is None or not pattern.fullmatch(name):
                continue
            if len(info.shape) == len(job.shape) >= max(1, -axis):
                found.append(_Rows(name, info.shape[axis], job.shape[axis]))
        return found

    def _image_sizes(self, nested: Sequence[Level]) -> Iterator[ConfigChange]:
        """Yield the image sizes of vision models, whose positions are the patches of an image."""
        positions = self._along(-2, POSITIONS)
        for path, level in nested:
            old = level.get("image_size")
            size, patch = side_of(old), side_of(level.get("patch_size"))
            if not size or not patch:
                continue
            fitting, extra = _stating(positions, (size // patch) ** 2, (0, 1, 2))  # tokens beside patches
            for rows in [rows for rows in fitting.values() if rows.before != rows.after][:1]:
                side = math.isqrt(rows.after - extra)
                if side**2 == rows.after - extra:
                    new = [side * patch] * 2 if isinstance(old, list) else side * patch
                    yield ConfigChange((*path, "image_size"), old, new)

    def _labels(self) -> Iterator[ConfigChange]:
        """Yield the labels, where the classifier of the output is that of another source."""
        stated = self.config.get("id2label")
        count = len(stated) if isinstance(stated, dict) else 2
        heads = self._heads(count)
        if not heads:
            return
        after = heads[0].shape[0]
        theirs = self._labels_of({job.source for job in heads}, after)
        own = {} if after == count else _numbered(after)
        for key, new in (theirs or own).items():
            if new != self.config.get(key):
                yield ConfigChange((key,), self.config.get(key), new)
        if self.config.get("num_labels", after) != after:
            yield ConfigChange(("num_labels",), self.config["num_labels"], after)

    def _heads(self, count: int) -> list[TensorJob]:
        """Return the output's classifiers: those that had `count` labels, or that the source has not."""
        known, _ = _stating(self._along(0, CLASSIFIER), count, (0,))
        added = [n for n, job in self.jobs.items() if n not in self.before and CLASSIFIER.fullmatch(n)]
        return [self.jobs[name] for name in [*known, *added] if self.jobs[name].shape]

    def _labels_of(self, taken: set[str], count: int) -> dict[str, Any]:
        """Return the labels of the source that a classifier is copied from, where it states `count`."""
        if len(taken) > 1 or taken & {"merge", self.files_from}:
            return {}
        theirs = stated_config(self.sources[min(taken)])
        labels = theirs.get("id2label")
        if not isinstance(labels, dict) or len(labels) != count:
            return {}
        named = theirs.get("label2id") or {text: int(label) for label, text in labels.items()}
        return {"id2label": labels, "label2id": named}

    def _ties(self, nested: Sequence[Level]) -> Iterator[ConfigChange]:
        """Yield that nothing is tied, where a tensor that a source ties is one of its own in the output."""
        stated = {path: level[TIE_KEY] for path, level in nested if isinstance(level.get(TIE_KEY), bool)}
        if {*stated.values()} == {False} or next(untied(self.plan), None) is None or self._scales_by_tie():
            return
        text = [path for path, _ in nested if path == ("text_config",)]
        for path in sorted({(), *stated, *text}):
            old = level_at(self.config, path).get(TIE_KEY)
            if old is not False:
                yield ConfigChange((*path, TIE_KEY), old, False)

    def _classes(self) -> Iterator[ConfigChange]:
        """Yield the class of a source that has the output's tensors, if the configuration's has others."""
        if self._names(self.files_from) == self.jobs.keys() - self._tied:
            return
        own = self.config.get("architectures")
        fitting = [
            stated
            for name, source in self.sources.items()
            if (stated := stated_config(source).get("architectures"))
            and self._names(name) == self.jobs.keys() - self._tied
        ]
        found = next(iter(fitting or self._of_adapters()), own)
        if found != own:
            yield ConfigChange(("architectures",), own, found)

    def _of_adapters(self) -> Iterator[list[str]]:
        """Yield the classes of adapters whose head is in the output."""
        adapters = {name for name, task in self.plan.lock.tasks.items() if task.adapter_config}
        taken = {job.source for name, job in self.jobs.items() if name not in self.before} & adapters
        if taken:
            heads = other_heads(self.plan.lock, self.sources)
            yield from ([head.model_class] for head in heads if head.task in taken)

    def _names(self, source: str) -> set[str]:
        """Return the tensors of a source, tied ones once."""
        return self.sources[source].index.tensors.keys() - self._tied

    def _scales_by_tie(self) -> bool:
        """Say whether the key decides more than ties, and no source that is untied says false.

        transformers 5 takes two tensors that differ for untied in any case.
        """
        said = map(stated_config, self.sources.values())
        return self.config.get("model_type") in SCALED_BY_TIE and not any(map(is_said_untied, said))

    def refuse_unexplained(self, changes: Sequence[ConfigChange]) -> None:
        """Raise MismatchError at a tensor of another shape, where config.json states a size that it had."""
        stated = {value: path for path, value in sizes_stated(self.config)}
        for name, info in self.before.items():
            job = self.jobs.get(name)
            for before, after in zip(info.shape, job.shape if job else info.shape, strict=False):
                is_settled = before == after or any(_settles(change, before, after) for change in changes)
                if job and before in stated and not is_settled:
                    raise self._unexplained(name, info, job, ".".join(stated[before]))

    def _unexplained(self, name: str, info: TensorInfo, job: TensorJob, key: str) -> MismatchError:
        fitting = [task for task in self.sources if task != self.files_from and self._fits(task)]
        return MismatchError(
            f"{shown(name)} of the output has the shape {list(job.shape)}, and `{key}` says "
            f"{_value(self.config, key)}",
            where=self.label,
            expected=f"{list(info.shape)}, or a configuration of the output's weights",
            hint=f"Take the configuration of {fitting[0]}, whose tensors have these shapes: "
            f"output.files_from: {fitting[0]}"
            if fitting
            else "Take the tensor from a source of the same shape, or leave the rule for it out.",
        )

    def _fits(self, source: str) -> bool:
        """Say whether a whole checkpoint has the tensors of the output, in their shapes."""
        tensors = self.sources[source].index.tensors
        shapes = {name: tensors[name].shape for name in self.jobs if name in tensors}
        is_whole = not self.plan.lock.sources[source].adapter_config
        return is_whole and shapes == {name: job.shape for name, job in self.jobs.items()}


def _value(config: Mapping[str, Any], key: str) -> Any:
    *path, last = key.split(".")
    return level_at(config, tuple(path)).get(last)


def _stating(tensors: Sequence[_Rows], value: int, extras: Sequence[int]) -> tuple[dict[str, _Rows], int]:
    """Return the tensors with as many rows as a value states, by name, and the rows beyond it."""
    for extra in extras:
        if fitting := {rows.name: rows for rows in tensors if rows.before == value + extra}:
            return fitting, extra
    return {}, 0


def _numbered(count: int) -> dict[str, Any]:
    """Return labels without meaning, as transformers numbers them."""
    names = {str(label): f"LABEL_{label}" for label in range(count)}
    return {"id2label": names, "label2id": {text: int(label) for label, text in names.items()}}


def _settles(change: ConfigChange, before: int, after: int) -> bool:
    """Say whether a change of config.json is that of a size."""
    if change.path[-1] in (*LABELS, "image_size"):
        return True
    return (
        is_count(change.new)
        and after - change.new in (0, 2)
        and (change.old is None or before - change.old in (0, 2))
    )
