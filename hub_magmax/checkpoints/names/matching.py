"""Names of one checkpoint's tensors that stand for names of another's, found from names and shapes alone.

A name is followed to another one by a step that changes no meaning: a wrapper's segment left out
(`_orig_mod.`), an old name of a parameter (`LayerNorm.gamma`), a run of segments that only one side has
(`bert.`, `language_model.`), or another first segment for a whole part of the model. Nothing is guessed where
two names fit equally well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, TensorInfo
from hub_magmax.recipe.renaming import collapsed

Tensors = Mapping[str, TensorInfo]
Value = TypeVar("Value")

#: Segments that training puts around modules; they name no part of a model.
_WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module")
)

#: Beginnings of all names, where a model was saved inside of another object.
_OUTER = ("module.", "0.auto_model.")

#: Ends of names, old and new.
_OLD_ENDS = (
    (".gamma", ".weight"),
    (".beta", ".bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)

#: A run of segments that one side lacks is at most this long.
_MOST_SEGMENTS = 4

#: Least share of a step's tensors that must have equal shapes; the others differ for another reason.
_LEAST_SHARE = 2 / 3

#: Whether segments are left out or put in, and which.
Step = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Matching:
    """Tensors of two checkpoints that stand for each other under different names.

    Attributes:
        pairs: The second's name by the first's.
        doubtful: Names of the first's that fit several of the second's equally well, with those.
    """

    pairs: Mapping[str, str] = field(default_factory=dict)
    doubtful: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def unwrapped(name: str) -> str:
    """Return a name without wrappers' segments."""
    found = ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)
    while start := next((start for start in _OUTER if found.startswith(start)), ""):
        found = found.removeprefix(start)
    return found


def names_without_wrappers(names: Iterable[str], *, is_outer_known: bool) -> dict[str, str]:
    """Return the names that wrappers changed, with what they were before; none where two would become one.

    Args:
        names: Of all tensors of a checkpoint.
        is_outer_known: Whether a beginning of all names, such as `module.`, is no part of them for sure.
    """
    names = [*names]
    takes_outer = is_outer_known and all(name.startswith(_OUTER) for name in names)
    changed = {
        name: plain
        for name in names
        if (plain := unwrapped(name)) != name and (takes_outer or not name.startswith(_OUTER))
    }
    after = {changed.get(name, name) for name in names}
    return changed if len(after) == len(names) else {}


def common_parts(one: str, other: str) -> int:
    """Return how many parts two names have in common, from the first one on."""
    count = 0
    for first, second in zip(one.split("."), other.split("."), strict=False):
        if first != second:
            break
        count += 1
    return count


def plain_name(name: str) -> str:
    """Return a name without wrappers' segments, and with new names of parameters for old ones."""
    found = unwrapped(name)
    for old, new in _OLD_ENDS:
        if found.endswith(old):
            return found.removesuffix(old) + new
    return found


def fits(one: TensorInfo, other: TensorInfo) -> bool:
    """Say whether two tensors have one shape, and both are floating point or of one dtype."""
    floating = one.dtype in MERGEABLE_DTYPES and other.dtype in MERGEABLE_DTYPES
    return one.shape == other.shape and (floating or one.dtype == other.dtype)


def match_names(own: Tensors, base: Tensors) -> Matching:
    """Return which tensors of `own` stand for which of `base`, where names tell.

    Args:
        own: Tensors whose names the other checkpoint lacks.
        base: Tensors of the other checkpoint whose names this one lacks.
    """
    stored_own, stored_base = _by_plain_name(own), _by_plain_name(base)
    same = stored_own.keys() & stored_base.keys()
    left_own = {name: own[stored] for name, stored in stored_own.items() if name not in same}
    left_base = {name: base[stored] for name, stored in stored_base.items() if name not in same}
    found, doubtful = _by_steps(left_own, left_base)
    found |= _by_first_segment(_without(left_own, found), _without(left_base, found.values()))
    found |= {name: name for name in same}
    pairs = {stored_own[one]: stored_base[other] for one, other in found.items()}
    left = _without(doubtful, found)
    return Matching(
        pairs,
        {stored_own[one]: tuple(stored_base[other] for other in others) for one, others in left.items()},
    )


def _without(values: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    taken = set(names)
    return {name: value for name, value in values.items() if name not in taken}


def _by_plain_name(tensors: Tensors) -> dict[str, str]:
    """Return names by their plain forms; those that would become one keep the forms that they have."""
    plain = {name: plain_name(name) for name in tensors}
    counts = Counter(plain.values())
    return {found if counts[found] == 1 else name: name for name, found in plain.items()}


class _Side:
    """Names of one checkpoint by pattern, and the numbers that occur with each."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.names: dict[tuple[str, ...], dict[tuple[str, ...], str]] = defaultdict(dict)
        for name in tensors:
            pattern, numbers = collapsed(name)
            self.names[tuple(pattern.split("."))][numbers] = name


def _by_steps(own: Tensors, base: Tensors) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Match names of which one is the other with a run of segments in it."""
    mine, theirs = _Side(own), _Side(base)
    pairs: dict[Step, list[tuple[str, str]]] = defaultdict(list)
    for step, one, other in _edges(mine, theirs):
        ones, others = mine.names[one], theirs.names[other]
        pairs[step] += [(ones[numbers], others[numbers]) for numbers in sorted(ones.keys() & others.keys())]
    best: dict[str, dict[str, int]] = defaultdict(dict)
    for found in pairs.values():
        score = sum(fits(own[a], base[b]) for a, b in found)
        for a, b in found if score >= max(1, _LEAST_SHARE * len(found)) else ():
            if score > 1 or "." in min(a, b, key=len):  # one word in common, once, is not enough
                best[a][b] = max(score, best[a].get(b, 0))
    return _decided(best)


def _edges(mine: _Side, theirs: _Side) -> Iterator[tuple[Step, tuple[str, ...], tuple[str, ...]]]:
    """Yield patterns of both sides that differ by a run of segments, and the step from own to base."""
    for longer, shorter, kind in ((mine, theirs, "less"), (theirs, mine, "more")):
        for pattern in longer.names:
            for run, rest in _shortened(pattern):
                if rest in shorter.names:
                    one, other = (pattern, rest) if kind == "less" else (rest, pattern)
                    yield (kind, run), one, other


def _shortened(pattern: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yield runs of segments without numbers, before the last one, and the pattern without each."""
    seen = set()
    for start in range(len(pattern) - 1):
        for stop in range(start + 1, min(start + _MOST_SEGMENTS, len(pattern) - 1) + 1):
            rest = pattern[:start] + pattern[stop:]
            if pattern[stop - 1] == "#":
                break
            if rest not in seen:
                seen.add(rest)
                yield pattern[start:stop], rest


def _decided(best: Mapping[str, Mapping[str, int]]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return the pairs that no other pair disputes, and names with several partners that fit equally."""
    liked = {one: _highest(found) for one, found in best.items()}
    claims: dict[str, dict[str, int]] = defaultdict(dict)
    for one, others in liked.items():
        for other in others[: len(others) == 1]:
            claims[other][one] = best[one][other]
    pairs: dict[str, str] = {}
    doubtful = {one: others for one, others in liked.items() if len(others) > 1}
    for other, found in claims.items():
        ones = _highest(found)
        pairs |= dict.fromkeys(ones[: len(ones) == 1], other)
        doubtful |= {one: (other,) for one in ones if one not in pairs}
    return pairs, doubtful


def _highest(scores: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names with the highest score."""
    top = max(scores.values())
    return tuple(name for name, score in scores.items() if score == top)


def _by_first_segment(own: Tensors, base: Tensors) -> dict[str, str]:
    """Match whole parts of models that differ in the first segment alone, where there is one way to do it."""
    mine, theirs = _by_head(own), _by_head(base)
    alike = {
        one: [other for other in theirs if _is_alike(mine[one], theirs[other], own, base)] for one in mine
    }
    claims = Counter(other for found in alike.values() for other in found)
    pairs: dict[str, str] = {}
    for one, found in alike.items():
        if len(found) == 1 and claims[found[0]] == 1:
            pairs |= {name: theirs[found[0]][rest] for rest, name in mine[one].items()}
    return pairs


def _by_head(tensors: Tensors) -> dict[str, dict[str, str]]:
    """Return names by first segment and by the rest, of segments with enough names to be one part."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        head, _, rest = name.partition(".")
        found[head][rest] = name
    return {
        head: rests for head, rests in found.items() if len(rests) > 1 and any("." in rest for rest in rests)
    }


def _is_alike(mine: Mapping[str, str], theirs: Mapping[str, str], own: Tensors, base: Tensors) -> bool:
    """Say whether two parts have the same names and shapes."""
    return mine.keys() == theirs.keys() and all(fits(own[mine[r]], base[theirs[r]]) for r in mine)
