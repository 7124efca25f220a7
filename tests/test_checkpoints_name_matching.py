"""Names that stand for other names, found without asking anybody."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.names.matching import match_names, plain_name

Shapes = Mapping[str, tuple[int, ...]]

#: A small encoder; the last tensor is alone with its name.
ENCODER = {
    "embeddings.word_embeddings.weight": (9, 4),
    "embeddings.LayerNorm.weight": (4,),
    "embeddings.LayerNorm.bias": (4,),
    **{f"encoder.layer.{n}.attention.self.query.weight": (4, 4) for n in range(12)},
    **{f"encoder.layer.{n}.output.LayerNorm.weight": (4,) for n in range(12)},
    **{f"encoder.layer.{n}.output.LayerNorm.bias": (4,) for n in range(12)},
    "pooler.dense.weight": (4, 4),
}


def infos(shapes: Shapes, dtype: str = "F32") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, "f", 0, 0) for name, shape in shapes.items()}


def matched(own: Shapes, base: Shapes) -> Mapping[str, str]:
    """Return what stands for what among the names that differ, and check that it is one to one."""
    mine = infos({name: shape for name, shape in own.items() if name not in base})
    theirs = infos({name: shape for name, shape in base.items() if name not in own})
    pairs = match_names(mine, theirs).pairs
    assert len(set(pairs.values())) == len(pairs)
    assert pairs.keys() <= mine.keys() and set(pairs.values()) <= theirs.keys()
    return pairs


def prefixed(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in shapes.items()}


PREFIXES = (
    "_orig_mod.", "module.", "transformer.", "bert.", "model.", "model.diffusion_model.", "module._orig_mod.",
    "0.auto_model.", "base_model.model.", "net.backbone.text.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefix_on_all_names_is_found_on_either_side(prefix: str) -> None:
    longer = prefixed(prefix, ENCODER)
    assert matched(longer, ENCODER) == {prefix + name: name for name in ENCODER}
    assert matched(ENCODER, longer) == {name: prefix + name for name in ENCODER}


def test_prefix_on_some_names_leaves_heads_alone() -> None:
    base = prefixed("bert.", ENCODER) | {
        "cls.predictions.bias": (9,),
        "cls.predictions.decoder.weight": (9, 4),
    }
    own = ENCODER | {"classifier.weight": (2, 4), "classifier.bias": (2,)}
    assert matched(own, base) == {name: f"bert.{name}" for name in ENCODER}


def test_wrappers_inside_of_names_are_left_out() -> None:
    own = {f"model.layers.{n}._fsdp_wrapped_module.mlp._orig_mod.up.weight": (4, 2) for n in range(3)}
    own |= {"_fsdp_wrapped_module.model.norm.weight": (4,)}
    base = {f"model.layers.{n}.mlp.up.weight": (4, 2) for n in range(3)} | {"model.norm.weight": (4,)}
    assert matched(own, base) == dict(zip(own, base, strict=True))


def test_segments_that_differ_by_part_are_found_for_each_part() -> None:
    layers = {f"layers.{n}.mlp.up_proj.weight": (8, 6) for n in range(3)} | {"norm.weight": (6,)}
    blocks = {f"visual.blocks.{n}.attn.qkv.weight": (12, 4) for n in range(2)}
    old = prefixed("model.", layers) | blocks | {"lm_head.weight": (9, 6)}
    new = prefixed("model.language_model.", layers) | prefixed("model.", blocks) | {"lm_head.weight": (9, 6)}
    expected = {f"model.language_model.{name}": f"model.{name}" for name in layers}
    assert matched(new, old) == expected | {f"model.{name}": name for name in blocks}


def test_text_model_is_found_in_one_with_a_second_tower_of_the_same_shapes() -> None:
    layers = {f"layers.{n}.mlp.up_proj.weight": (8, 6) for n in range(4)} | {"norm.weight": (6,)}
    own = prefixed("model.language_model.", layers)
    own |= {f"model.vision_tower.layers.{n}.mlp.up_proj.weight": (8, 6) for n in range(2)}
    expected = {f"model.language_model.{name}": f"model.{name}" for name in layers}
    assert matched(own, prefixed("model.", layers)) == expected


def test_old_names_of_parameters_are_found() -> None:
    old = {"ln.gamma": (4,), "ln.beta": (4,), "conv.weight_g": (1, 1, 3), "conv.weight_v": (4, 4, 3)}
    pairs = {
        "ln.weight": "ln.gamma",
        "ln.bias": "ln.beta",
        "conv.parametrizations.weight.original0": "conv.weight_g",
        "conv.parametrizations.weight.original1": "conv.weight_v",
    }
    assert matched({new: old[name] for new, name in pairs.items()}, old) == pairs
    wrapped = {f"model.{new}": old[name] for new, name in pairs.items()}
    assert matched(wrapped, old) == {f"model.{new}": name for new, name in pairs.items()}


def test_tensor_of_another_shape_follows_the_others() -> None:
    own = prefixed("_orig_mod.model.", ENCODER) | {
        "_orig_mod.model.embeddings.word_embeddings.weight": (11, 4)
    }
    assert matched(own, ENCODER) == {f"_orig_mod.model.{name}": name for name in ENCODER}


def test_other_first_segment_is_found_where_the_whole_part_agrees() -> None:
    own, base = prefixed("roberta.", ENCODER), prefixed("encoder_q.", ENCODER)
    assert matched(own, base) == {f"roberta.{name}": f"encoder_q.{name}" for name in ENCODER}
    assert matched(own, base | {"encoder_q.more.dense.weight": (4, 4)}) == {}


def test_nothing_is_guessed_where_two_parts_fit() -> None:
    layers = {f"layer.{n}.dense.weight": (4, 4) for n in range(3)} | {"norm.weight": (4,)}
    base = prefixed("encoder.", layers) | prefixed("decoder.", layers)
    found = match_names(infos(layers), infos(base))
    assert found.pairs == {}
    candidates = ("encoder.layer.1.dense.weight", "decoder.layer.1.dense.weight")
    assert found.doubtful["layer.1.dense.weight"] == candidates


@pytest.mark.parametrize(
    ("own", "base"),
    [
        ({"score.weight": (2, 4)}, {"classifier.weight": (2, 4)}),
        ({"layers.3.up.weight": (4, 4)}, {"layers.0.up.weight": (4, 4)}),
        ({"mlp.w1.weight": (4, 4)}, {"mlp.w3.weight": (4, 4)}),
        ({"a.weight": (4, 4)}, {"weight": (4, 4)}),
        ({"model.head.weight": (4, 4)}, {"head.weight": (4, 5)}),
        ({"head.weight": (4, 4)}, {"head.bias": (4, 4)}),
    ],
)
def test_names_of_other_tensors_are_not_followed(own: Shapes, base: Shapes) -> None:
    assert matched(own, base) == {}


def test_integers_stand_for_integers_only() -> None:
    own, base = infos({"model.ids.weight": (4,)}, "I64"), infos({"ids.weight": (4,)})
    assert match_names(own, base).pairs == {}


def test_two_names_that_would_become_one_stay() -> None:
    assert plain_name("ln.gamma") == plain_name("ln.weight")
    own = {"x.ln.gamma": (4,), "x.ln.weight": (4,)}
    base = {"ln.gamma": (4,), "ln.weight": (4,)}
    assert matched(own, base) == {"x.ln.gamma": "ln.gamma", "x.ln.weight": "ln.weight"}


def test_thirty_thousand_names_take_a_moment() -> None:
    shapes = {
        f"blocks.{n}.experts.{e}.w{k}.weight": (4, 4) for n in range(50) for e in range(100) for k in range(6)
    }
    assert len(matched(prefixed("model.", shapes), shapes)) == 30_000
