"""Tied tensors of an output: which are copies of one parameter, and which are parameters of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.ties.tied import ties_of
from hub_magmax.errors import MismatchError
from hub_magmax.planning.plan import Plan, TensorJob, TiedJob
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.tensor_rules import TensorRule, deciding, rule_for
from hub_magmax.text import listed, shown


def refuse_lacking(lock: Lock, indexes: Mapping[str, CheckpointIndex], rules: tuple[TensorRule, ...]) -> None:
    """Raise MismatchError for a source that lacks a tensor which others tie, and does not tie it."""
    ties = ties_of(lock)
    base = indexes["base_model"].tensors
    for name, other in {**ties.copies, **{name: of for name, (of, _) in ties.apart.items()}}.items():
        if name not in base or rule_for(name, rules) is not None:
            continue
        for index in indexes.values():
            if name not in index.tensors and other in index.tensors:
                raise _lacking(index.label, name, other, lock)


def _lacking(label: str, name: str, other: str, lock: Lock) -> MismatchError:
    example = next(source.label for source in lock.sources.values() if name in (source.ties or {}))
    return MismatchError(
        f"lacks {shown(name)}, and its config.json does not say that it is tied to {shown(other)}",
        where=label,
        expected=f"tie_word_embeddings: true in its config.json, as {example} has it, or the tensor",
        hint="Correct its config.json if the model is tied; if it was trained untied, save it again with "
        "transformers' `save_pretrained`: its file is not complete.",
    )


def copies_in(lock: Lock, base: Mapping[str, TensorInfo], rules: tuple[TensorRule, ...]) -> dict[str, str]:
    """Return tensors of the output that are one parameter with another one, by name, and that one.

    A rule about the name itself is carried out; what a rule does to the other one holds for both.

    Args:
        lock: Knows the ties.
        base: Tensors of the base model, tied ones included.
        rules: Of the recipe.
    """

    def stays(name: str, of: str) -> bool:
        rule = rule_for(of, rules)
        return rule_for(name, rules) is None and (rule is None or rule.take != "nothing")

    pairs = ties_of(lock).copies.items()
    return {name: of for name, of in pairs if name in base and of in base and stays(name, of)}


def without_copies(
    indexes: Mapping[str, CheckpointIndex], copies: Mapping[str, str]
) -> dict[str, CheckpointIndex]:
    """Return the sources without the tensors that the output copies from others of its own."""
    if not copies:
        return dict(indexes)
    return {
        source: replace(
            index, tensors={name: own for name, own in index.tensors.items() if name not in copies}
        )
        for source, index in indexes.items()
    }


def with_copies(
    names: Iterable[str], jobs: Iterable[TensorJob], copies: Mapping[str, str]
) -> list[TensorJob]:
    """Return jobs together with those of tied tensors, in the order of `names`."""
    made = {job.name: job for job in jobs}
    for name, of in copies.items():
        made[name] = TiedJob(**{**vars(made[of]), "name": name, "of": of})
    return [made[name] for name in names if name in made]


def _numbers_differ(names: Iterable[str], rules: Sequence[TensorRule]) -> bool:
    """Say whether rules give names numbers that are not those of one rule."""
    decided = {deciding(name, rules) for name in names}
    return len(decided) > 1 and any(rules[number].values for number in decided if number is not None)


def untied(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield tensors that a source ties and that are two parameters in the output, with the other one."""
    jobs, ties = {job.name: job for job in plan.jobs}, ties_of(plan.lock)
    known = {name: other for name, (other, _) in ties.apart.items()}
    for name, other in {**ties.copies, **known}.items():
        job, others = jobs.get(name), jobs.get(other)
        if job and others and not _is_one(job, others, is_copy=name not in known):
            yield name, other


def _is_one(job: TensorJob, other: TensorJob, *, is_copy: bool) -> bool:
    """Say whether two jobs give the same values: as one parameter, or copied from a source that ties them."""
    are_copies = (job.source, job.factor) == (other.source, other.factor) and not job.merged
    return is_copy and (isinstance(job, TiedJob) or are_copies)


def tie_notices(plan: Plan) -> Iterator[str]:
    """Yield a line about tensors that are tied in some of the sources or in all, if there are any."""
    ties = ties_of(plan.lock)
    apart = dict(untied(plan))
    by_other: dict[str, list[str]] = {}
    for name, of in ties.copies.items():
        if name not in apart:
            by_other.setdefault(of, []).append(name)
    for of, names in by_other.items():
        copies = listed([shown(name) for name in names], 3)
        by = f" by the numbers of {shown(of)}" if _numbers_differ([of, *names], plan.recipe.tensors) else ""
        yield f"tied weights: {copies} and {shown(of)} are one parameter, merged once{by}"
    for name, other in apart.items():
        _, trained = ties.apart.get(name, (other, ()))
        why = f"{', '.join(trained)} trained it apart" if trained else "a rule is about one of them"
        yield (
            f"tied weights: {shown(name)} is {shown(other)} in a source, and a parameter of its own in the "
            f"merged model ({why})"
        )
