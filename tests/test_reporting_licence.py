"""Licences of merged models, case by case."""

import itertools

import pytest

from hub_magmax.reporting.licence import HUB_LICENSES, PERMISSIVE, combined_license


@pytest.mark.parametrize(
    ("stated", "id_", "name"),
    [
        (["apache-2.0", "apache-2.0"], "apache-2.0", None),
        (["Apache-2.0", " apache-2.0 "], "apache-2.0", None),
        (["mit", "apache-2.0"], "apache-2.0", None),
        (["cc0-1.0", "mit", "bsd-3-clause"], "bsd-3-clause", None),
        (["cc-by-4.0", "unlicense", "isc"], "cc-by-4.0", None),
        (["cc-by-nc-4.0", "cc-by-nc-4.0"], "cc-by-nc-4.0", None),
        (["llama3.1", "llama3.1"], "llama3.1", None),
        (["gemma", "apache-2.0"], "other", "gemma-and-apache-2.0"),
        (["cc-by-nc-4.0", "mit"], "other", "cc-by-nc-4.0-and-mit"),
        (["cc-by-sa-4.0", "cc-by-4.0"], "other", "cc-by-sa-4.0-and-cc-by-4.0"),
        (["gpl-3.0", "mit"], "other", "gpl-3.0-and-mit"),
        (["mit", None], "other", "mit-and-unstated"),
        ([None, None], "other", "unstated"),
        (["unknown", "unknown"], "other", "unstated"),
        (["mit", " "], "other", "mit-and-unstated"),
        (["other", "other"], "other", "terms-of-the-sources"),
        (["Our Own Terms", "our own terms"], "other", "our-own-terms"),
        ([f"own-licence-number-{i}" for i in range(9)], "other", "terms-of-the-sources"),
    ],
)
def test_the_licence_follows_from_what_the_sources_state(stated, id_, name):
    found = combined_license(stated)
    assert (found.id, found.name) == (id_, name)


def test_only_a_licence_that_everyone_states_or_a_permissive_one_is_given_a_known_id():
    for first, second in itertools.product(sorted(HUB_LICENSES), repeat=2):
        found = combined_license([first, second])
        if found.id != "other":
            assert first == second or {first, second, found.id} <= set(PERMISSIVE)


def test_an_unknown_licence_is_never_permissive():
    for id_ in PERMISSIVE:
        assert combined_license([id_, None]).id == "other"


def test_every_permissive_licence_is_one_the_hub_knows():
    assert set(PERMISSIVE) <= HUB_LICENSES
    assert len(set(PERMISSIVE)) == len(PERMISSIVE)


@pytest.mark.parametrize(
    "id_", ["cc-by-nc-4.0", "cc-by-sa-4.0", "llama3.1", "gemma", "gpl-3.0", "openrail", "cc"]
)
def test_restricted_licences_are_not_listed_as_permissive(id_):
    assert id_ not in PERMISSIVE


def test_a_mixture_carries_a_warning_and_names_every_licence():
    text = combined_license(["apache-2.0", "llama3.1", None]).explanation
    assert "**Warning:**" in text
    assert "`apache-2.0` and `llama3.1`" in text
    assert "states no licence" in text


def test_permissive_mixtures_ask_to_keep_the_notices():
    assert "notices of every source" in combined_license(["mit", "apache-2.0"]).explanation


def test_no_derivatives_is_pointed_out_even_where_everyone_states_it():
    assert "forbids sharing adapted material" in combined_license(["cc-by-nd-4.0"] * 2).explanation


def test_an_override_wins_and_says_so():
    found = combined_license(["mit", "gemma"], "apache-2.0")
    assert (found.id, found.name) == ("apache-2.0", None)
    assert "The recipe sets `apache-2.0`" in found.explanation
    assert "**Warning:** without this setting it would be `mit-and-gemma`" in found.explanation


def test_a_blank_override_is_none():
    assert combined_license(["mit", "gemma"], " ") == combined_license(["mit", "gemma"])


def test_an_override_that_agrees_carries_no_warning():
    found = combined_license(["mit", "mit"], "MIT")
    assert found.id == "mit"
    assert "Warning" not in found.explanation


def test_an_override_that_the_hub_does_not_know_becomes_a_named_other():
    found = combined_license(["mit"], "Acme Terms 2")
    assert (found.id, found.name) == ("other", "acme-terms-2")


@pytest.mark.parametrize(
    "hostile", ["<script>x</script>", "[a](http://x)", "a|b", "`x`", "a\n---\nb", "\u202e", "—"]
)
def test_a_hostile_licence_leaves_only_a_slug(hostile):
    for found in (
        combined_license([hostile, "mit"]),
        combined_license([hostile]),
        combined_license([None], hostile),
    ):
        assert set(found.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.+-")
        assert not set(found.explanation) & set("<>[]|\n\u202e")
