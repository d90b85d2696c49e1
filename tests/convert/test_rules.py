import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert import ConversionError
from convert.formats import TensorInfo
from convert.plan import build_plan, check_tensors, match_names
from convert.rules import (
    IDENTITY,
    MINUS_ONE,
    TRANSPOSE,
    Rule,
    interleaved_rotary,
    linear,
    split,
)

TRANSFORMS = {
    "identity": (IDENTITY, [(6, 8)]),
    "transpose": (TRANSPOSE, [(6, 8)]),
    "minus one": (MINUS_ONE, [(6,)]),
    "rotary weight": (interleaved_rotary(3).then(TRANSPOSE), [(5, 12)]),
    "rotary bias": (interleaved_rotary(3), [(12,)]),
    "split": (split(axis=0), [(2, 5), (3, 5), (4, 5)]),
    "split, transpose": (split(axis=0).then(TRANSPOSE), [(5, 2), (5, 3), (5, 4)]),
}


@pytest.mark.parametrize(("transform", "shapes"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_invert(transform, shapes):
    rng = np.random.default_rng(0)
    # Quarters, so that adding and taking one is exact.
    ours = [rng.integers(-8, 8, shape) / 4 for shape in shapes]
    stored = transform.backward(ours)
    assert [array.shape for array in stored] == [
        tuple(shape) for shape in transform.stored_shapes(shapes)
    ]
    for back, array in zip(transform.forward(stored, shapes), ours, strict=True):
        np.testing.assert_array_equal(back, array)


def llama_cpp_permute(weights, n_head):
    """convert_hf_to_gguf.py of llama.cpp, LlamaModel.permute."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@given(heads=st.integers(1, 5), half=st.integers(1, 4), width=st.integers(1, 3))
def test_rotary_order_is_llama_cpp_s(heads, half, width):
    weight = np.arange(heads * half * 2 * width).reshape(-1, width)
    transform = interleaved_rotary(heads)
    stored = llama_cpp_permute(weight, heads)
    np.testing.assert_array_equal(transform.forward([stored], [weight.shape])[0], weight)
    np.testing.assert_array_equal(transform.backward([weight])[0], stored)


RULES = (
    Rule("embed", "embed.embedding"),
    *linear("h.{layer}.up", "layers.{layer}.mlp.up_proj"),
    Rule(
        "h.{layer}.qk",
        ("layers.{layer}.q.kernel", "layers.{layer}.k.kernel"),
        split(axis=0).then(TRANSPOSE),
    ),
    Rule("h.{layer}.gate", "layers.{layer}.memory.gate"),
    Rule("head", "lm_head.kernel", TRANSPOSE),
)
# Layers 0..3 in one stack, layer 4 alone.
PARAMETERS = {
    "embed.embedding": (7, 3),
    "stacks.0.memory.gate": (2, 6),
    **{
        f"stacks.{stack}.{name}": (repeats, *shape)
        for stack, repeats in ((0, 4), (1, 1))
        for name, shape in {
            "mlp.up_proj.kernel": (3, 5),
            "q.kernel": (3, 4),
            "k.kernel": (3, 2),
        }.items()
    },
}


def locate(layer, target):
    """Layers 1 and 3 have a memory, which lies beside those of other layers without gaps."""
    if ".memory." in target:
        return {1: (0, 0), 3: (0, 1)}.get(layer)
    return (1, 0) if layer == 4 else (0, layer)


def stored_tensors():
    shapes = {"embed": (7, 3)}
    for layer in range(5):
        shapes[f"h.{layer}.up.weight"] = (5, 3)
        shapes[f"h.{layer}.qk"] = (6, 3)
    shapes |= {"h.1.gate": (6,), "h.3.gate": (6,)}
    return {name: TensorInfo(shape, "F32", 0) for name, shape in shapes.items()}


def test_plan_places_every_layer():
    plan = build_plan(RULES, PARAMETERS, 5, locate)
    check_tensors(plan, stored_tensors(), lambda name: False)
    places = {
        move.sources[0]: [(slot.path, slot.index, slot.shape) for slot in move.slots]
        for move in plan
    }
    assert places["embed"] == [("embed.embedding", (), (7, 3))]
    assert places["h.3.up.weight"] == [("stacks.0.mlp.up_proj.kernel", (3,), (3, 5))]
    assert places["h.4.qk"] == [
        ("stacks.1.q.kernel", (0,), (3, 4)),
        ("stacks.1.k.kernel", (0,), (3, 2)),
    ]
    assert places["h.3.gate"] == [("stacks.0.memory.gate", (1,), (6,))]
    assert "h.2.gate" not in places
    assert "head" not in places
    assert "h.0.up.bias" not in places


def test_all_problems_of_a_checkpoint_are_listed():
    tensors = stored_tensors()
    del tensors["h.1.qk"], tensors["embed"]
    tensors["h.0.up.weight"] = TensorInfo((3, 5), "F32", 0)
    tensors["h.2.qk"] = TensorInfo((6,), "F32", 0)
    for name in ("h.5.qk", "h.0.up.bias", "ignored"):
        tensors[name] = TensorInfo((1,), "F32", 0)
    plan = build_plan(RULES, PARAMETERS, 5, locate)
    with pytest.raises(ConversionError) as caught:
        check_tensors(plan, tensors, lambda name: name == "ignored")
    assert str(caught.value).endswith(
        "missing: embed, h.1.qk; unexpected: h.0.up.bias, h.5.qk; misshapen: "
        "h.0.up.weight [3, 5] instead of [5, 3], h.2.qk [6] instead of [6, 3]."
    )


def test_parameters_without_a_rule_are_all_listed():
    extra = {"final_norm.weight": (3,), "stacks.0.norm.weight": (4, 3)}
    with pytest.raises(
        ConversionError, match=r"fills final_norm\.weight, stacks\.0\.norm\.weight\."
    ):
        build_plan(RULES, PARAMETERS | extra, 5, locate)


def test_layers_without_a_rule_are_noticed():
    with pytest.raises(ConversionError, match=r"fills stacks\.0\.k"):
        build_plan(RULES, PARAMETERS, 3, locate)


def test_two_rules_for_one_parameter():
    with pytest.raises(ConversionError, match=r"More than one rule fills embed\.embedding"):
        build_plan((*RULES, Rule("other", "embed.embedding")), PARAMETERS, 5, locate)


def test_a_rule_that_fits_in_part():
    parameters = {k: v for k, v in PARAMETERS.items() if k != "stacks.1.k.kernel"}
    with pytest.raises(ConversionError, match="only in part"):
        build_plan(RULES, parameters, 5, locate)


def test_missing_prefix():
    rules = (Rule("model.a", "a"), Rule("model.b", "b"), Rule("head", "c"))
    plan = build_plan(rules, {"a": (1,), "b": (1,), "c": (1,)}, 0, locate)
    matched = match_names(plan, ["a", "model.b", "b", "head"], "model.")
    assert [move.sources[0] for move in matched] == ["a", "model.b", "head"]
