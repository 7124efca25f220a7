"""Files of mergekit's programs: configurations, cards that show one, and files that no merge follows from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from hub_magmax.errors import RecipeError
from hub_magmax.recipe.importing.configuration import Configuration, places_of, read_configuration
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.model_facts import ModelFacts, Models
from hub_magmax.recipe.importing.output_keys import working_dtype
from hub_magmax.recipe.importing.translation import Imported, translate
from hub_magmax.text import listed, shown

#: File of a merged model in which mergekit keeps its configuration, and that of a mixture of experts.
CONFIG_NAME = "mergekit_config.yml"
EXPERTS_NAME = "mergekit_moe_config.yml"

#: Keys of which a configuration has one at least.
_TELLING = frozenset(("merge_method", "models", "slices", "modules"))

#: dtypes in which many numbers are equal.
_OF_16_BITS = frozenset(("F16", "BF16"))

#: What that means where magnitudes are ranked and signs elected.
_COARSE = (
    "in 16 bits many magnitudes are equal: all that equal the smallest kept one stay here, some of them in "
    "mergekit, which rounds task vectors before that; and sums of 0 elect no sign here, and plus there"
)

#: The same for methods that ask whether a task changed an element.
_NEAR_LIMIT = (
    "in 16 bits mergekit rounds models and task vectors before it compares them with epsilon, and some "
    "elements fall to the other side"
)

#: What methods make of 16 bits in mergekit, which computes all steps in them, and not here.
_ROUNDED_STEPS = {
    "arcee_fusion": (
        "in 16 bits mergekit's importance is mostly rounding, so that it keeps other elements than here, and "
        "mostly more of them"
    ),
    "karcher": (
        "in 16 bits mergekit rounds products and angles too, so that between models that are near each other "
        "it ends elsewhere on the way"
    ),
}

#: What numbers of rows mean that differ.
_OTHER_ROWS = (
    "vocabularies of different sizes, and no tokenizer: mergekit 0.1.5 refuses them, older ones cut them"
)

#: A fenced block of a card, which may stand in a list, or end with the card.
_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*\{?([\w.+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[`~]*[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)

#: Languages of such a block, and what shows that it is a configuration.
_LANGUAGES = ("", "yaml", "yml", "json", "text", "txt", "plaintext")
_SHOWS = re.compile(
    r"""^[ \t]*([-{,][ \t]*)?["']?(merge_method|gate_mode|experts|genome)["']?[ \t]*:""", re.MULTILINE
)

#: Files of mergekit's other programs: a key of them, what they are, and other keys that say so.
_PROGRAMS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "experts": (
        "a configuration of mergekit-moe: a mixture of experts, in which layers stand side by side",
        {"gate_mode": "routers that come from prompts or at random: no merge of weights"},
    ),
    "genome": (
        "the search space of mergekit-evolve, from which no weights follow; import the configuration of the "
        "merge that it found",
        {},
    ),
    "layer_slices": ("a configuration of bakllama, which mergekit replaced by slices:", {}),
}


def is_mergekit(values: Marked) -> bool:
    """Say whether a document is a configuration of one of mergekit's programs."""
    keys = {*(values.entries or {})}
    return bool(keys & _TELLING or keys & _PROGRAMS.keys()) and not {"base_model", "tasks"} <= keys - {
        "genome"
    }


def shown_in_card(text: str) -> list[str]:
    """Return the configurations that a card shows, each once, at the lines at which it stands there."""
    found: dict[str, str] = {}
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for block in _FENCE.finditer(text):
        language, body = block[2].lower(), block[3]
        if language in _LANGUAGES and _SHOWS.search(body):
            found.setdefault(body.strip(), "\n" * text.count("\n", 0, block.start(3)) + body)
    return [*found.values()]


def text_of_card(text: str, where: str) -> str:
    """Return the configuration that a card shows, at the lines at which it stands there.

    Raises:
        RecipeError: If it shows none, or several.
    """
    found = shown_in_card(text)
    if len(found) == 1:
        return found[0]
    lines = [str(len(one) - len(one.lstrip("\n")) + 1) for one in found]
    what = (
        f"{len(found)} configurations are shown, on lines {listed(lines)}"
        if found
        else "no configuration is shown"
    )
    raise RecipeError(
        what,
        where=where,
        expected="a block of YAML with merge_method:, as the cards of mergekit have one",
        hint="Copy the one that is meant into a file, and import that.",
    )


def import_mergekit(top: Marked, models: Models, notes: Notes) -> Imported:
    """Return what a configuration of mergekit becomes, line by line."""
    _refuse_programs(top, notes)
    configuration = read_configuration(top, notes) if notes.is_whole else None
    if configuration is None:
        return Imported(notes.sorted(), None)
    recipe = translate(configuration, models, notes)
    is_coarse = _is_coarse(configuration, models)
    if is_coarse:
        why = _COARSE if configuration.method.ranks else _NEAR_LIMIT
        notes.add(configuration.method_at, "in expectation", why)
    precision = working_dtype(configuration, models)
    if precision in _OF_16_BITS and configuration.method_name in _ROUNDED_STEPS:
        # The lowest verdict with a recipe: no recipe rounds these steps, but the formula is the same.
        notes.add(configuration.method_at, "in expectation", _ROUNDED_STEPS[configuration.method_name])
    if _have_other_rows(configuration, models):
        notes.add(configuration.slices[0].at, "warning", _OTHER_ROWS)
    return Imported(
        notes.sorted(),
        recipe if notes.is_whole else None,
        tuple(_flags(configuration, models)),
        configuration.method.is_random or is_coarse,
        precision,
    )


def _is_coarse(configuration: Configuration, models: Models) -> bool:
    """Say whether elements are ranked of which many are equal."""
    stored = (dtype for one in _facts(configuration, models) for dtype in one.dtypes.values())
    method, every = configuration.method, {working_dtype(configuration, models), *stored}
    is_cut = method.ranks or configuration.method_name in ("ram", "ramplus_tl")
    return is_cut and not method.is_random and bool(every & _OF_16_BITS)


def _have_other_rows(configuration: Configuration, models: Models) -> bool:
    """Say whether models have different numbers of rows, which no key puts together."""
    sizes = {frozenset(one.rows.values()) for one in _facts(configuration, models)}
    return len(sizes) > 1 and not {"tokenizer_source", "tokenizer"} & {*(configuration.top.entries or {})}


def _flags(configuration: Configuration, models: Models) -> Iterator[str]:
    """Yield options of mergekit's command that change the weights, and that its file does not hold."""
    if configuration.method.is_random:
        yield "--random-seed, by which mergekit draws; the recipe's seed draws other elements"
    if any(reference.lora for reference in places_of(configuration).values()):
        yield "--lora-merge-dtype, in which mergekit adds adapters to their models; here in float32 or wider"
        yield "--lora-merge-cache, where an adapter that changed since finds its old result"
    if _have_other_rows(configuration, models):
        yield "--unsafe-truncate-embeddings, which cuts vocabularies of different sizes to the shortest one"


def _facts(configuration: Configuration, models: Models) -> Iterator[ModelFacts]:
    for reference in places_of(configuration).values():
        if facts := models.facts(reference.model):
            yield facts


def _refuse_programs(top: Marked, notes: Notes) -> None:
    """Note the keys of files of mergekit's other programs."""
    entries = top.entries or {}
    for program, (what, others) in _PROGRAMS.items():
        if program in entries:
            for key, why in {program: what, **others}.items():
                if key in entries:
                    notes.add(entries[key], "refused", why)


def stage_of(documents: Sequence[Marked], stage: str | None, where: str, notes: Notes) -> Marked | None:
    """Return one merge of a file of mergekit-multi; None, noted, where none is chosen.

    Args:
        documents: Of the file.
        stage: Name of the merge, or its number from 1.
        where: Name of the file in messages.
        notes: Where refusals go.

    Raises:
        RecipeError: If there is no such merge.
    """
    if stage is None:
        _refuse_stages(documents, notes)
        return None
    named = _named(documents)
    found = ({str(number): one for number, one in enumerate(documents, 1)} | named).get(stage)
    if found is None:
        names = listed([*named]) if named else f"a number from 1 to {len(documents)}"
        raise RecipeError(f"there is no merge {shown(stage)} in this file", where=where, expected=names)
    for model in _models(found):
        if model.value in named:
            notes.add(model, "exact", f"the folder that the recipe of the merge {shown(model.value)} writes")
    return found.replaced({name: f"./{name}" for name in named})


def _named(documents: Sequence[Marked]) -> dict[str, Marked]:
    """Return the merges of a file by name."""
    return {str(at.value): one for one in documents if (at := one.get("name"))}


def _refuse_stages(documents: Sequence[Marked], notes: Notes) -> None:
    """Note the stages of a file of mergekit-multi, and which of them need others."""
    named = _named(documents)
    for document in documents:
        at = document.get("name") or document
        why = "one of several merges: --stage imports one, in the order in which they need each other"
        notes.add(at, "refused", why)
        for model in _models(document):
            if isinstance(model.value, str) and model.value in named:
                place = model
                notes.add(place, "refused", f"{shown(model.value)} is a merge of this file, not a model")


def _models(at: Marked) -> Iterator[Marked]:
    """Yield all names of models below."""
    for key, one in (at.entries or {}).items():
        if key in ("model", "base_model"):
            yield one
        else:
            yield from _models(one)
    for one in at.items or ():
        yield from _models(one)
