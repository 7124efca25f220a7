"""Number of layers in the output's config.json, and the lists that have a value for each layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from hub_magmax.checkpoints.config import Path, level_at
from hub_magmax.checkpoints.names.model_classes import as_loaded
from hub_magmax.checkpoints.stacked_layers import numbered_slices, stacks_of
from hub_magmax.errors import MismatchError
from hub_magmax.planning.output_config.sizes import NUM_LAYERS, of_level, of_side, stacks
from hub_magmax.planning.plan import ConfigChange
from hub_magmax.recipe.lockfile import LockedSlice

Level = tuple[Path, Mapping[str, Any]]

#: Keys whose lists have an entry for each layer, where they have as many.
_PER_LAYER = re.compile(
    r"(?!num_|n_)\w*(layer|block|attention|attn|mlp|ffn|heads?|sparsity|window|dilation|intermediate|rope)\w*"
)

#: Keys whose lists are numbers of layers.
_NUMBERS = re.compile(
    r"mlp_only_layers|cross_attention_layers|moe_layers|attn_layer_indices|hybrid_layer_ids|full_attn_idxs|"
    r"full_attention_layers|(global|dense|sparse)_\w*(layers|indices|idxs|ids)"
)

#: A list that says how often each row of attentions is repeated, and the list of layers it stands for.
_REPEATED = ("attention_types", "attention_layers")


def is_per_layer(key: str, value: Any, num_layers: int) -> bool:
    """Say whether a value of a configuration is a list, or a text, with an entry for each layer."""
    is_list = isinstance(value, list) or key.endswith("pattern")
    if not is_list or not isinstance(value, list | str) or len(value) != num_layers:
        return False
    return _PER_LAYER.fullmatch(key) is not None and not is_numbers(key, value)


def is_numbers(key: str, value: Any) -> bool:
    """Say whether a value of a configuration is a list of numbers of layers."""
    return _NUMBERS.fullmatch(key) is not None and isinstance(value, list)


@dataclass(frozen=True)
class Layers:
    """What decides the number of layers in a configuration.

    Attributes:
        before: Tensors that the configuration was written for, by name.
        after: Those of the output.
        files_from: Source of the configuration.
        configs: Configurations by source.
        slices: The lock's stack of layers; empty where there is none.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    files_from: str
    configs: Mapping[str, Mapping[str, Any]]
    slices: tuple[LockedSlice, ...]

    def changes(self, nested: Sequence[Level]) -> Iterator[ConfigChange]:
        """Yield the changes of a configuration's levels.

        Raises:
            MismatchError: If the output lacks a layer before its last one.
        """
        stacked = numbered_slices(self.slices)
        before, after = (_stacks(names, stacked) for names in (self.before, self.after))
        moved = {stack for stack in before if after.get(stack) and after[stack] != before[stack]}
        moved.update(f"{stack}." for stack in stacked)
        counts = {stack: len(numbers) for stack, numbers in before.items()}
        for (path, level), key in product(nested, NUM_LAYERS):
            stack = _counted(counts, level.get(key), (path, key), moved)
            if stack is not None:
                slices = stacked.get(stack.removesuffix("."))
                yield from self._of_stack((path, key), level, (stack, after[stack]), slices)

    def _of_stack(
        self,
        place: tuple[Path, str],
        level: Mapping[str, Any],
        layers: tuple[str, set[int]],
        slices: list[tuple[int, LockedSlice]] | None,
    ) -> Iterator[ConfigChange]:
        """Yield what follows from the layers that a stack has in the output."""
        (path, key), (stack, numbers) = place, layers
        if numbers != set(range(len(numbers))):
            raise _gap(stack, numbers)
        if len(numbers) != level[key]:
            yield ConfigChange((*path, key), level[key], len(numbers))
        if slices is None:
            yield from self._cut(path, level, level[key], len(numbers))
        else:
            yield from _Stack(self, path, key, slices).changes()

    def _cut(self, path: Path, level: Mapping[str, Any], before: int, after: int) -> Iterator[ConfigChange]:
        """Yield the lists with a value per layer, cut, or as a source with `after` layers has them."""
        for key, old in level.items():
            if is_per_layer(key, old, before):
                known = [old[:after]] if after < before else self._as_elsewhere((*path, key), after)
                if known:
                    yield ConfigChange((*path, key), old, known[0])

    def _as_elsewhere(self, path: Path, length: int) -> list[Any]:
        """Return the lists of this length that other sources state."""
        above, key = path[:-1], path[-1]
        found = [level_at(config, above).get(key) for config in self.configs.values()]
        return [own for own in found if isinstance(own, list) and len(own) == length]


@dataclass(frozen=True)
class _Stack:
    """A stack of layers, and the level of a configuration that states its number of layers under `key`."""

    layers: Layers
    path: Path
    key: str
    slices: list[tuple[int, LockedSlice]]

    def changes(self) -> Iterator[ConfigChange]:
        """Yield the lists with a value per layer, and of numbers of layers, as the stack's blocks have them.

        A list that is not stated is written where the library would make another one for this many layers.
        """
        level = level_at(self.layers.configs[self.layers.files_from], self.path)
        found = {
            name: new for name, old in self._own.items() if (new := self._followed(name, old)) is not None
        }
        kinds, one_by_one = _REPEATED
        if kinds in level and one_by_one in found:
            found[kinds] = [[found[one_by_one], 1]]
        made = self._made_for({name: new for name, new in found.items() if name in level})
        for name, new in found.items():
            if new != (level[name] if name in level else made.get(name)):
                yield ConfigChange((*self.path, name), level.get(name), new)

    @cached_property
    def _values(self) -> dict[str, dict[str, Any]]:
        """Values of this level by source: those that are stated, and those that the library adds."""
        configs, path = self.layers.configs, self.path
        return {
            source: {**level_at(as_loaded(config), path), **level_at(config, path)}
            for source, config in configs.items()
        }

    @property
    def _own(self) -> dict[str, Any]:
        return self._values[self.layers.files_from]

    @cached_property
    def _origins(self) -> list[tuple[str, int]]:
        """For each block of the output the source whose configuration tells of it, and its block."""
        found = []
        for _, one in self.slices:
            files_from = self.layers.files_from
            source = one.take or (files_from if files_from in one.blocks else next(iter(one.blocks)))
            told = source if self._values[source] else files_from
            found += [(told, block) for block in range(*one.blocks[source])]
        return found

    def _followed(self, name: str, old: Any) -> Any | None:
        """Return a value that follows the stack; None for one that does not."""
        entries = [(self._values[source].get(name) or old, block) for source, block in self._origins]
        if is_numbers(name, old):
            return [number for number, (numbers, block) in enumerate(entries) if block in numbers]
        return _joined(old, entries) if is_per_layer(name, old, self._own[self.key]) else None

    def _made_for(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the library makes of the configuration with other values for this many layers."""
        config = copy.deepcopy(dict(self.layers.configs[self.layers.files_from]))
        level: Any = config
        for key in self.path:
            level = level[key]
        level.update({**changes, self.key: len(self._origins)})
        return level_at(as_loaded(config), self.path)


def _joined(old: Any, entries: Sequence[tuple[Any, int]]) -> Any | None:
    """Return a list, or a text as the old one is, of one entry of each; None where one has not as many."""
    if any(block >= len(values) for values, block in entries):
        return None
    found = [values[block] for values, block in entries]
    return "".join(found) if isinstance(old, str) else found


def _counted(
    counts: Mapping[str, int], stated: Any, place: tuple[Path, str], moved: Container[str]
) -> str | None:
    """Return the stack that a key states the number of layers of, of those whose layers are others now."""
    (path, key), alike = place, [stack for stack, count in counts.items() if count == stated]
    return next((stack for stack in of_side(of_level(alike, path), key) if stack in moved), None)


def _stacks(names: Mapping[str, Any], also: Iterable[str]) -> dict[str, set[int]]:
    """Return the layers of each stack by the beginning of their names: of usual ones, and of those named."""
    every = stacks_of(names)
    return {**stacks(names), **{f"{stack}.": every[stack] for stack in also if stack in every}}


def _gap(stack: str, layers: set[int]) -> MismatchError:
    lacking = min(set(range(max(layers))) - layers)
    return MismatchError(
        f"the output has {stack}{max(layers)} and lacks {stack}{lacking}",
        key=("tensors",),
        expected="layers that are counted from 0, without a gap",
        hint="Leave out the last layers only, or leave out none.",
    )
