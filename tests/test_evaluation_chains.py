"""Grafts and chains on tiny decoders: against plain loops, in batches, alone, and without a cache."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hub_magmax.errors import ArgumentError, EvaluationError
from hub_magmax.evaluation.answer_rules import is_right, is_told
from hub_magmax.evaluation.chains import ChainProtocol, ChainRunner, Item, draw_tokens
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.grafts import DEFAULT_GRAFTS, GRAFTS, Site, block_number, find_blocks
from hub_magmax.kernels.randomness import CounterGenerator
from tests.tiny_llama import tokenizer

#: Decoders whose blocks have other names, other outputs, and other ways to know the place of a token.
DECODERS = {
    "llama": {"intermediate_size": 32, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "bloom": {},
    "mamba": {"state_size": 4, "intermediate_size": 32},
}

PROTOCOL = ChainProtocol(layer=1, max_new_tokens=4, grafts=tuple(GRAFTS), seed=3)


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def decoder(kind, words, **changes) -> LoadedModel:
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": len(words)}
    config = AutoConfig.for_model(kind, **size | DECODERS[kind] | changes, bos_token_id=0, eos_token_id=0)
    config.initializer_range = 0.5
    torch.manual_seed(0)
    return LoadedModel(AutoModelForCausalLM.from_config(config).eval(), words, kind)


@pytest.fixture(scope="module")
def llama(words):
    return decoder("llama", words)


@pytest.fixture(scope="module")
def items(words):
    texts = ("a good film", "a film good", "was it odd and bad?")
    return [Item("films", number, words(text)["input_ids"], "odd") for number, text in enumerate(texts)]


@pytest.mark.parametrize("kind", DECODERS)
def test_batches_single_prompts_and_no_cache_give_the_same(kind, words, items):
    model = decoder(kind, words)
    runner = ChainRunner(model, PROTOCOL)
    blocks, number = runner.blocks(items[2])
    assert (len(blocks), number) == (3, 1)
    alike = [item for item in items if len(item.tokens) == len(items[0].tokens)]
    assert len(alike) == 2
    rows = [(item, chain) for item in alike for chain in (*PROTOCOL.deterministic, 0, 1)]
    together = runner.texts(blocks[number], rows)
    assert len({*together}) > len(rows) / 2  # chains differ
    assert together == [runner.texts(blocks[number], [row])[0] for row in rows]
    assert together == replace(runner, cache=False).texts(blocks[number], rows)
    assert [*reversed(together)] == runner.texts(blocks[number], rows[::-1])


def by_hand(model, item, kind, layer, num_tokens) -> str:
    """Return the greedy answer with a graft: every pass reads all tokens, and a hook puts a vector in."""
    network, last = model.network, len(item.tokens) - 1
    ids = torch.tensor([item.tokens])
    with torch.no_grad():
        states = network(ids, output_hidden_states=True).hidden_states
    own, before = states[layer + 1][0], states[layer][0]  # the first are the embeddings
    vector = {
        "zero": torch.zeros(16), "first": own[0], "mean": own[:last].mean(0), "previous": before[last]
    }[kind]  # fmt: skip

    def put(block, args, output):
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        changed[0, last] = vector
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = network.model.layers[layer].register_forward_hook(put)
    for _ in range(num_tokens):
        with torch.no_grad():
            token = network(ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], 1)
        if token == 0:
            break
    handle.remove()
    return model.processor.decode(ids[0, last + 1 :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["zero", "first", "mean", "previous"])
def test_a_graft_is_what_a_plain_loop_makes_of_it(kind, llama, items):
    runner = ChainRunner(llama, PROTOCOL)
    blocks, _ = runner.blocks(items[0])
    for item in items:
        (found,) = runner.texts(blocks[1], [(item, kind)])
        assert found == by_hand(llama, item, kind, 1, PROTOCOL.max_new_tokens)


def test_each_kind_replaces_the_state_as_it_says():
    states = torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.0, 4.0], [5.0, 6.0, 7.0]])
    site = Site(states, 1, torch.tensor([9.0, 9.0, 9.0]), CounterGenerator(0, "sums, example 0"))
    made = {kind: graft(site).float() for kind, graft in GRAFTS.items()}
    assert made["zero"].tolist() == [0, 0, 0]
    assert made["first"].tolist() == [1, 2, 2]
    assert made["mean"].tolist() == [3, 4, 4.5]  # of the others
    assert made["previous"].tolist() == [9, 9, 9]
    assert sorted(made["shuffled"].tolist()) == [0, 3, 4]
    assert made["random"].norm() == pytest.approx(5)
    alone = Site(states[:1], 0, states[0], site.draws)
    assert torch.equal(GRAFTS["mean"](alone), states[0])


def test_random_states_are_normal_and_of_the_item():
    states = torch.ones(1, 20_000)
    sites = [Site(states, 0, states[0], CounterGenerator(0, f"sums, example {n}")) for n in (0, 1)]
    first, other = (GRAFTS["gaussian"](site) for site in sites)
    assert torch.equal(first, GRAFTS["gaussian"](sites[0]))
    assert (first.std(), other.std()) == pytest.approx((1.9, 1.9), rel=0.02)
    assert first.mean() == pytest.approx(0, abs=0.05)
    assert (first.abs() < 1.9).double().mean() == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.01)
    assert torch.corrcoef(torch.stack([first, other]))[0, 1].abs() < 0.03
    direction = GRAFTS["random"](sites[0])
    assert torch.corrcoef(torch.stack([first, direction]))[0, 1].abs() < 0.03  # streams of their own


def test_the_state_before_a_block_that_adds_nothing_is_the_state_itself(words, items):
    model = decoder("llama", words)
    block = model.network.model.layers[1]
    torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    torch.nn.init.zeros_(block.mlp.down_proj.weight)
    runner = ChainRunner(model, PROTOCOL)
    greedy, previous, zero = runner.texts(block, [(items[2], c) for c in ("greedy", "previous", "zero")])
    assert greedy == previous != zero


def test_what_a_model_prefers_is_left_aside_but_its_last_token(words, items):
    model = decoder("llama", words)
    runner = ChainRunner(model, PROTOCOL)
    block, rows = (
        model.network.model.layers[1],
        [(item, chain) for item in items[:2] for chain in ("greedy", 0)],
    )
    before = runner.texts(block, rows)
    written = words(before[0])["input_ids"]
    own = model.network.generation_config
    own.update(repetition_penalty=50.0, min_new_tokens=4, suppress_tokens=written, no_repeat_ngram_size=1)
    assert runner.texts(block, rows) == before
    assert model.network.generation_config is own
    own.eos_token_id = written
    assert runner.texts(block, rows)[0] != before[0]


def test_tokens_are_drawn_among_the_likeliest_ones():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(4, 3)
    numbers = torch.tensor([0.0, 0.62, 0.63, 0.999])
    # .5 and .3 reach .7, so that a token lies below .625 of their sum, or above.
    assert draw_tokens(logits, numbers, 1.0, 0.7).tolist() == [1, 1, 2, 2]
    assert draw_tokens(logits, numbers, 1.0, 0.5).tolist() == [1, 1, 1, 1]
    assert draw_tokens(logits, numbers, 1.0, 1.0).tolist() == [0, 1, 1, 2]
    assert draw_tokens(torch.zeros(1, 4), torch.tensor([0.8]), 1.0, 0.1).tolist() == [3]  # ties are kept


def test_draws_are_those_of_a_slow_loop(monkeypatch):
    monkeypatch.setattr("hub_magmax.evaluation.chains.MOST_LIKELY", 2)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 30, generator=generator)
    numbers = torch.rand(200, generator=generator, dtype=torch.float64)
    found = draw_tokens(logits, numbers, 0.7, 0.9)
    for row, number, token in zip(logits, numbers.tolist(), found.tolist(), strict=True):
        shares = (row / 0.7).softmax(-1).tolist()
        kept, total = set[int](), 0.0
        for place in sorted(range(30), key=lambda place: -shares[place]):
            kept.add(place)
            total += shares[place]
            if total >= 0.9:
                break
        reached = 0.0
        for place in sorted(kept):
            reached += shares[place]
            if reached > number * total:
                break
        assert token == place


def test_samples_depend_on_seed_item_and_number_alone(llama, items):
    runner = ChainRunner(llama, replace(PROTOCOL, temperature=2.0))
    blocks, _ = runner.blocks(items[0])
    found = runner.texts(blocks[1], [(items[0], number) for number in range(8)])
    assert len({*found}) > 4
    other = ChainRunner(llama, replace(runner.protocol, seed=4))
    assert other.texts(blocks[1], [(items[0], number) for number in range(8)]) != found
    # Blocks and grafts have no part in them.
    assert runner.texts(blocks[0], [(items[0], number) for number in range(8)]) == found


@pytest.mark.parametrize(
    ("layer", "num_blocks", "number"),
    [
        (26, 36, 26),
        (0.65, 40, 26),
        (26 / 28, 28, 26),
        (26 / 36, 36, 26),
        (-1, 4, 3),
        (1.0, 4, 3),
        (0.0, 4, 0),
    ],
)
def test_a_layer_is_a_number_or_a_share(layer, num_blocks, number):
    assert block_number(layer, num_blocks) == number


@pytest.mark.parametrize("layer", [4, -5, 1.5, -0.5])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ArgumentError, match="from -4 to 3, or a share"):
        block_number(layer, 4)


def test_blocks_are_those_that_hand_a_state_on(llama, items):
    assert find_blocks(llama, items[0].tokens) == [*llama.network.model.layers]
    # Lists of other modules do not count, nor one that is as long.
    llama.network.others = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(5)])
    assert find_blocks(llama, items[0].tokens) == [*llama.network.model.layers]
    del llama.network.others

    class Without(torch.nn.Linear):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace()

    bare = LoadedModel(Without(1, 1), None, "bare")
    bare.network.device = "cpu"
    with pytest.raises(EvaluationError, match="no list of blocks"):
        find_blocks(bare, [1, 2])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"grafts": ("zeros",)}, "Did you mean 'zero'"),
        ({"grafts": ()}, "at least one"),
        ({"grafts": ("zero", "zero")}, "each once"),
        ({"answer": "lines"}, "Did you mean 'line'"),
        ({"temperature": 0.0}, "above 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"max_new_tokens": 0}, "from 1"),
        ({"batch_size": 0}, "from 1"),
    ],
)
def test_what_is_no_protocol_is_refused(values, said):
    with pytest.raises(ArgumentError, match=said):
        ChainProtocol(**values)
    assert ChainProtocol().deterministic == ("greedy", *DEFAULT_GRAFTS)


def test_prompts_that_do_not_fit_are_named(llama, items):
    short = ChainRunner(llama, replace(PROTOCOL, position=-40))
    blocks, _ = short.blocks(items[0])
    with pytest.raises(EvaluationError, match="no position -40"):
        short.texts(blocks[1], [(items[0], "zero")])
    long = ChainRunner(llama, replace(PROTOCOL, max_new_tokens=100_000))
    with pytest.raises(EvaluationError, match="more than the model's context"):
        long.texts(blocks[1], [(items[0], "zero")])


@pytest.mark.parametrize(
    ("text", "right", "rule", "expected"),
    [
        (" Paris.\nLondon", "paris", "line", True),
        ("\n\n 42 \n", "42", "line", True),
        ("42 apples", "42", "line", False),
        ("", "42", "line", False),
        ("so 3 + 4 is 7", "7", "final", True),
        ("#### 1,200\nand 3", "1200", "final", True),
        ("<answer>B</answer> since 3", "b", "final", True),
        (r"\boxed{1} then \boxed{12}", "12.0", "final", True),
        ("The answer is: $5.", "5", "final", True),
        ("it takes 3 days", "5 * 1 = 5\n#### 5", "final", False),
        ("no number", "no number", "final", True),
        (".5", "5", "line", False),
        ("'.5.'", "0.5", "line", True),
        ("... 5.", "5", "line", True),
        ("...5", "5", "line", True),
        ("...Paris", "paris", "line", True),
        ("it is -.5", "-0.5", "final", True),
        ("in 3.4.5", "5", "final", True),
        ("see fig.5", "5", "final", True),
        ("", "?!", "line", False),
        ("?!", "?!", "line", True),
        ("\n", "", "line", False),
    ],
)
def test_answers_are_found_and_compared(text, right, rule, expected):
    assert is_right(text, right, rule) == expected


def test_an_answer_is_told_when_no_token_changes_it():
    assert is_told("\n 42\n", "line")
    assert not is_told("\n 42", "line")
    assert not is_told("42\n", "final")
