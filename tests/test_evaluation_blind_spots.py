"""Blind spots: their numbers by hand, the paper's table, and the verb on a family of tiny decoders."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

import hub_magmax as hm
from benchmarks import blindspots
from hub_magmax.errors import OutputError
from hub_magmax.evaluation.blind_spots import (
    BlindSpots,
    Reached,
    jaccard,
    moves,
    read_blind_spots,
    share,
)
from hub_magmax.evaluation.chains import ChainProtocol
from hub_magmax.files import write_json
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.reporting.card_file import stored_card, write_stored_card
from tests.families import yaml_text
from tests.test_cli import call
from tests.tiny_llama import write_llama_family

#: Published counts: model, data, items that no sample solves, and of these solved by 1, 3, 6 and 8
#: deterministic chains; shares in per cent, and the interval of the third.
PUBLISHED = """
Qwen-3B GSM8K 58 0 5 8 10 0.0 8.6 13.8 17.2 7.2 24.9
Qwen-3B MATH 293 10 23 39 48 3.4 7.8 13.3 16.4 9.9 17.7
Qwen-3B MMLU-Pro 323 14 43 81 100 4.3 13.3 25.1 31.0 20.7 30.1
Llama-3B GSM8K 83 2 12 19 21 2.4 14.5 22.9 25.3 15.2 33.0
Llama-3B MATH 287 11 24 42 50 3.8 8.4 14.6 17.4 11.0 19.2
Llama-3B MMLU-Pro 336 30 66 96 114 8.9 19.6 28.6 33.9 24.0 33.6
Llama-8B GSM8K 51 3 7 10 11 5.9 13.7 19.6 21.6 11.0 32.5
Llama-8B MATH 291 9 22 30 36 3.1 7.6 10.3 12.4 7.3 14.3
Llama-8B MMLU-Pro 252 19 46 72 80 7.5 18.3 28.6 31.7 23.3 34.4
Nemo-12B GSM8K 54 1 8 11 13 1.9 14.8 20.4 24.1 11.8 32.9
Nemo-12B MATH 435 16 39 64 75 3.7 9.0 14.7 17.2 11.7 18.4
Nemo-12B MMLU-Pro 322 11 55 93 109 3.4 17.1 28.9 33.9 24.2 34.1
"""

#: Chains of the paper, in order; which five grafts are in R_6 is not told there.
CHAINS = ("greedy", "zero", "gaussian", "random", "shuffled", "first", "mean", "previous")


def reached(model="base_model", fresh=("----", "----"), **chains) -> Reached:
    """Return four items: greedy solves the first, a sample the second, grafts the third, nothing the last."""
    deterministic = {"greedy": "1000", "zero": "-010", "mean": "-110"} | chains
    return Reached(model, "sums", 1, 3, deterministic, ("0100", "0000"), fresh)


def test_numbers_by_hand():
    own = reached(fresh=("0-01", "0-00"))
    assert own.stratum == (0, 2, 3)
    assert [own.recovered(k) for k in (1, 2, 3)] == [1, 2, 2]
    assert own.resampled == 1
    assert [own.state(item) for item in range(4)] == ["graft-only", "sampled", "graft-only", "unreached"]
    assert (own.fixed("zero"), own.fixed("mean")) == ({2}, {1, 2})
    assert own.overlaps == {("zero", "mean"): 0.5}
    assert jaccard(frozenset(), frozenset()) is None
    assert own.difference is not None
    assert (own.difference.gained, own.difference.lost) == (2, 1)
    assert own.difference.p_value == 1.0
    nothing = Reached("a", "sums", 0, 1, {"greedy": "11", "zero": "--"}, ("11", "10"), ("--", "--"))
    assert nothing.stratum == () and nothing.difference is None and share(0, 0) is None


def test_chains_of_other_items_are_refused():
    with pytest.raises(ValueError, match="not of the same items"):
        reached(zero="-01")
    with pytest.raises(ValueError, match="not of the same items"):
        reached(zero="-012")


@pytest.mark.parametrize("line", PUBLISHED.strip().splitlines())
def test_published_counts_give_the_published_shares(line):
    model, data, *numbers = line.split()
    size, *counts = map(int, numbers[:5])
    shares, interval = [float(n) for n in numbers[5:9]], [float(n) for n in numbers[9:]]
    solved = dict.fromkeys(CHAINS, 0)
    for k, count in zip((1, 3, 6, 8), counts, strict=True):
        solved[CHAINS[k - 1]] = count  # together with those before it
    chains = {name: "1" * count + "0" * (size - count) for name, count in solved.items()}
    own = Reached(model, data, 26, 36, chains, ("0" * size,) * 6, ())
    found = [share(own.recovered(k), len(own.stratum)) for k in (1, 3, 6, 8)]
    assert [round(100 * one.value, 1) for one in found] == pytest.approx(shares)
    assert [round(100 * end, 1) for end in (found[2].low, found[2].high)] == pytest.approx(interval)


def test_moves_by_hand():
    after = Reached(
        "merged", "sums", 1, 3, {"greedy": "1000", "zero": "-100"}, ("0010", "0001"), ("-0--",) * 2
    )
    found = moves(reached(fresh=("0-01", "0-00")), after)
    assert found.counts == {
        ("graft-only", "graft-only"): 1, ("sampled", "graft-only"): 1, ("graft-only", "sampled"): 1,
        ("unreached", "sampled"): 1,
    }  # fmt: skip
    assert (found.num_sampled, found.by_chance) == (1, 1)
    both = BlindSpots((reached(), after), ChainProtocol(grafts=("zero",)))
    assert [own.before for own in both.moves] == ["base_model"]


def test_as_many_leave_what_is_sampled_by_chance_as_fresh_samples_solve():
    draws, size, k = random.Random(0), 4000, 3
    rates = [draws.betavariate(0.5, 1.5) for _ in range(size)]

    def drawn() -> tuple[str, ...]:
        return tuple("".join("01"[draws.random() < rate] for rate in rates) for _ in range(k))

    first, second = (Reached("a", "t", 0, 1, {"greedy": "0" * size}, drawn(), drawn()) for _ in range(2))
    found = moves(first, second)
    left = found.count("sampled", "unreached")
    assert left > 300
    assert abs(left - found.by_chance) < 4 * (2 * left) ** 0.5


def test_results_are_stored_and_read(tmp_path):
    for layer in (1.0, 1):  # all of the depth, and a block
        found = BlindSpots((reached(),), ChainProtocol(layer, grafts=("zero", "mean")), "sha256:1")
        path = write_json(tmp_path / "blind_spots.json", found.to_dict())
        assert read_blind_spots(path) == found
        assert type(read_blind_spots(path).protocol.layer) is type(layer)
    path.write_text(path.read_text().replace("-010", "-01"))
    with pytest.raises(OutputError, match="this is not a list of blind spots of this version"):
        read_blind_spots(path)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spots")
    (folder / "recipe.yaml").write_text(yaml_text(write_llama_family(folder)))
    recipe = load_recipe(folder / "recipe.yaml")
    merge(plan(recipe))
    write_stored_card(recipe, read_lock(recipe.output_path / "recipe.lock.json"))
    return folder


def test_the_verb_measures_writes_and_puts_it_on_the_card(family, monkeypatch):
    recipe = load_recipe(family / "recipe.yaml")
    monkeypatch.chdir(family)
    options = ("--max-new-tokens", "2", "--grafts", "zero,mean", "--layer", "0.5", "--answer", "final")
    code, out, err = call("blindspots", "recipe.yaml", *options, "--json")
    assert code == 0, err
    spots = read_blind_spots(recipe.output_path / "blind_spots.json")
    assert json.loads(out) == json.loads(json.dumps(spots.to_dict()))
    cells = [(own.model, own.task) for own in spots.reached]
    assert cells == [
        ("base_model", "a"), ("base_model", "b"), ("a", "a"), ("b", "b"), ("merged", "a"), ("merged", "b")
    ]  # fmt: skip
    for own in spots.reached:
        assert (own.block, own.num_blocks, len(own.samples), len(own.fresh)) == (1, 2, 3, 3)
        assert all(
            solved != "1" for chain in own.fresh for n, solved in enumerate(chain) if n not in own.stratum
        )
    assert str(family) not in (recipe.output_path / "blind_spots.json").read_text()
    assert call("verify", "answers")[0] == 0  # the file is about the model, and none of its own
    card = (recipe.output_path / "README.md").read_text()
    section = card.split("## What samples never solve\n")[1].split("\n## ")[0]
    assert "fresh R\\_3" in section and "now grafts alone" in section
    assert recipe.evaluation is not None
    evaluation = recipe.evaluation.model_copy(update={"tasks": {"a": recipe.evaluation.tasks["a"]}})
    locked = read_lock(recipe.output_path / "recipe.lock.json")
    for asked in (evaluation, None):
        other = write_stored_card(recipe.model_copy(update={"evaluation": asked}), locked)
        assert "## What samples never solve\n" not in other.read_text()
    assert "## What samples never solve\n" in stored_card(recipe.output_path, "me/answers")
    protocol = replace(spots.protocol, batch_size=1)
    again = hm.blindspots(recipe, lock(recipe), recipe.output_path, protocol=protocol)
    assert again.reached == spots.reached
    assert again.to_frame().shape[0] == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("evaluator=text-classification",), "evaluator is text-classification. Expected log-likelihood or"),
        (("tasks.a.input_column=question",), "a, example 0: there is no prompt"),
    ],
)
def test_what_has_no_prompts_is_refused(family, changes, said, monkeypatch):
    monkeypatch.chdir(family)
    without = [f"tasks.{task}.prompt_column=null" for task in "ab"]
    options = [part for change in (*without, *changes) for part in ("--set", f"evaluation.{change}")]
    code, _, err = call("blindspots", "recipe.yaml", *options)
    assert code == 1
    assert said in err


def test_the_page_is_that_of_the_stored_results():
    text = blindspots.PAGE.read_text(encoding="utf-8")
    assert blindspots.page(text) == text, "write it again: python -m benchmarks.blindspots --render"
