"""Whole models with operator "tptt_reference" against the package tptt 0.12.1, in float32."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import load_pretrained
from tests.contracts import (
    jitted,
    quick_jit,
    random_tokens,
    randomize,
    relative_error,
    verify_streaming_contract,
)
from tptt_jax import CausalLM, LinearAttention, LizaConfig, ModelConfig, generate, init_cache
from tptt_jax.config import OPERATORS

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")
tptt = pytest.importorskip("tptt")

pytestmark = pytest.mark.parity

MODES = tptt.TpttConfig.RECURRENT_MODES
TOKENS = np.random.default_rng(0).integers(3, 101, (2, 36))


def make_base(**changes):
    """A random Llama with grouped heads, biases and norms that are not one."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 101,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "attention_bias": True,
            # Random logits of the size that trained ones have.
            "initializer_range": 0.3,
        }
        | changes
    )
    # sdpa's boolean masks become additive zeros and ones in the package, which leaks the future.
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = make_base()
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return model, path


def inject(base, mode, **options):
    """The package's model on the same weights."""
    model = copy.deepcopy(base)
    model, _ = tptt.get_tptt_model(
        model, base.config, operator_mode=mode, recurrent_config=MODES[mode], **options
    )
    return model.eval()


def call(model, tokens, segment_ids=None):
    return np.asarray(jitted(model)(jnp.asarray(tokens), segment_ids).logits)


def torch_logits(model, tokens, mask=None):
    mask = None if mask is None else torch.as_tensor(mask)
    with torch.no_grad():
        return model(torch.as_tensor(tokens), attention_mask=mask, use_cache=False).logits.numpy()


def test_the_modes_are_ours():
    assert set(MODES) == set(OPERATORS)


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_every_mode(base, mode):
    """Chunks of 12 tokens, the largest divisor of 36 up to 16."""
    wanted = torch_logits(inject(base[0], mode, max_chunk_size=16), TOKENS)
    ours = load_pretrained(base[1], LizaConfig.tptt_reference(mode, chunk_size=16))
    assert relative_error(call(ours, TOKENS), wanted) <= 1e-4


MIXES = {
    "little memory": ({"mag_weight": 0.1}, {"mag_init": 0.1}),
    "only memory": ({"mag_weight": 1.0}, {"mag_init": 1.0}),
    "scaled": ({"base_scale_attn": True}, {"linear_scale": "projected"}),
    "crossed": ({"cross_gate": True}, {"cross_gate": True}),
    "scaled and crossed": (
        {"base_scale_attn": True, "cross_gate": True, "mag_weight": 0.3},
        {"linear_scale": "projected", "cross_gate": True, "mag_init": 0.3},
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), MIXES.values(), ids=MIXES)
def test_mixing(base, theirs, ours):
    wanted = torch_logits(inject(base[0], "delta_rule", **theirs), TOKENS)
    model = load_pretrained(base[1], LizaConfig.tptt_reference("delta_rule", **ours))
    assert relative_error(call(model, TOKENS), wanted) <= 1e-4


def test_lengths(base):
    """The package's result depends on the divisors of the length, and so does ours."""
    theirs = inject(base[0], "delta_product", max_chunk_size=8)
    ours = load_pretrained(base[1], LizaConfig.tptt_reference(chunk_size=8))
    for length in (1, 8, 31, 33):
        tokens = TOKENS[:, :length]
        assert relative_error(call(ours, tokens), torch_logits(theirs, tokens)) <= 1e-4, length


def test_right_padding(base):
    mask = np.ones(TOKENS.shape, int)
    mask[1, 23:] = 0
    theirs = inject(base[0], "gated_delta_product", max_chunk_size=16)
    ours = load_pretrained(base[1], LizaConfig.tptt_reference("gated_delta_product", chunk_size=16))
    wanted = torch_logits(theirs, TOKENS, mask)
    assert (
        relative_error(call(ours, TOKENS, jnp.asarray(mask))[mask != 0], wanted[mask != 0]) <= 1e-4
    )


@pytest.mark.parametrize("mode", ["delta_rule_gelu", "delta_product_c", "gated_delta_product"])
def test_gradients_of_the_projections(base, mode):
    cotangent = np.random.default_rng(1).standard_normal((*TOKENS.shape, 101)).astype(np.float32)
    theirs = inject(base[0], mode, max_chunk_size=16)
    # The cache of the package is for evaluation; gradients do not depend on the mode.
    logits = theirs(torch.as_tensor(TOKENS), use_cache=False).logits
    logits.backward(torch.as_tensor(cotangent))
    model = load_pretrained(base[1], LizaConfig.tptt_reference(mode, chunk_size=16))
    graphdef, state = nnx.split(model)

    @quick_jit
    def grads(state):
        def score(state):
            return jnp.sum(nnx.merge(graphdef, state)(jnp.asarray(TOKENS)).logits * cotangent)

        return jax.grad(score, allow_int=True)(state)

    got = dict(nnx.to_flat_state(grads(state)))
    for layer in range(2):
        attention = theirs.model.layers[layer].self_attn.base_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            mine = got[("stacks", 0, "self_attn", name, "kernel")].get_value()[layer]
            wanted = getattr(attention, name).weight.grad.numpy().T
            assert relative_error(mine, wanted) <= 1e-3, f"layer {layer}, {name}"


def test_the_layer_of_its_own_in_both_directions():
    torch.manual_seed(0)
    theirs = tptt.LinearAttention(
        24, 4, num_key_value_heads=2, recurrent_config=MODES["gated_delta_product"],
        max_chunk_size=4, bidirectional=True,
    )  # fmt: skip
    config = LizaConfig.tptt_reference("gated_delta_product", chunk_size=4)
    ours = LinearAttention(
        24, 4, num_kv_heads=2, config=config, bidirectional=True, use_bias=True, rngs=nnx.Rngs(0)
    )
    for mine, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
        projection, linear = getattr(ours, f"{mine}_proj"), getattr(theirs, f"{name}_proj")
        projection.kernel[...] = jnp.asarray(linear.weight.detach().numpy().T)
        projection.bias[...] = jnp.asarray(linear.bias.detach().numpy())
    x = np.random.default_rng(0).standard_normal((2, 12, 24)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(x)).numpy()
    assert relative_error(ours(jnp.asarray(x)), wanted) <= 1e-4


def test_decoding_continues_the_memory(base):
    """Token by token, whole chunks give what one call gives; so does generation."""
    model = load_pretrained(base[1], LizaConfig.tptt_reference(chunk_size=12))
    whole = call(model, TOKENS)
    step, cache, got = jitted(model), init_cache(model, *TOKENS.shape), []
    for t in range(TOKENS.shape[1]):
        output = step(jnp.asarray(TOKENS[:, t : t + 1]), cache=cache)
        cache = output.cache
        got.append(np.asarray(output.logits))
    assert relative_error(np.concatenate(got, 1), whole) <= 1e-4
    prompt, new = TOKENS[:, :12], generate(model, TOKENS[:, :12], 1, stop_tokens=()).tokens
    wanted = torch_logits(inject(base[0], "delta_product", max_chunk_size=12), prompt)
    assert np.asarray(new)[:, 0].tolist() == wanted[:, -1].argmax(-1).tolist()


SIZES = {
    **{"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24},
    **{"max_position_embeddings": 128, "initializer_range": 0.3},
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 28, "head_dim": 8}
FAMILIES = {
    "gpt2": transformers.GPT2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**GROUPED),
    "gemma3": transformers.Gemma3TextConfig(**GROUPED, sliding_window=8),
    "olmo2": transformers.Olmo2Config(**SIZES, num_key_value_heads=2, intermediate_size=28),
}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_other_families(tmp_path, config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval().save_pretrained(tmp_path)
    wanted = torch_logits(inject(model, "delta_product", max_chunk_size=16), TOKENS)
    ours = load_pretrained(tmp_path, LizaConfig.tptt_reference(chunk_size=16))
    assert relative_error(call(ours, TOKENS), wanted) <= 1e-4


def test_streaming():
    """Where a row is no longer than a chunk, neither splits nor padding nor packing matter."""
    liza = LizaConfig.tptt_reference("gated_delta_product", linear_scale="projected")
    model = randomize(CausalLM(ModelConfig.tiny(num_layers=2), liza, rngs=nnx.Rngs(0)))
    verify_streaming_contract(model, random_tokens((2, 13)), tolerance=1e-4)
