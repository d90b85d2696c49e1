"""Scaled rotary embeddings against transformers: logits beyond the trained length, and exports."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest

from convert import ConversionError, export_pretrained, load_pretrained
from convert.families import family_of
from convert.families.fields import Fields
from convert.sources.opening import read_config
from tests.contracts import jitted, logits_of
from tests.convert import tiny_families
from tptt_jax import LizaConfig, fix_context, generate, init_cache
from tptt_jax.ops.attention.rope import rotary_frequencies

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from tests.parity.torch_models import build, relative_error, reload, torch_logits  # noqa: E402

pytestmark = pytest.mark.parity

# Transformers' float32 angles are off by some 1e-6 rad, which larger weights would magnify.
SIZES = tiny_families.SIZES | {"initializer_range": 0.2}
# Texts of 20 tokens are within the trained length, those of 77 beyond it.
POSITIONS = 48
SHORT, LONG = slice(0, 20), slice(0, 77)
TOKENS = np.random.default_rng(0).integers(3, 101, (2, 77))
FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0],
    "long_factor": [1.5, 2.0, 4.0, 9.0, 15.0],
}
ORIGINAL = {"original_max_position_embeddings": 24}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn, ramp": {
        **{"rope_type": "yarn", "factor": 8.0, "beta_fast": 2.0, "beta_slow": 0.1},
        **{"truncate": False, **ORIGINAL},
    },
    "yarn, mscale": {
        **{"rope_type": "yarn", "factor": 4.0, "mscale": 1.5, "mscale_all_dim": 0.5, **ORIGINAL},
    },
    "yarn, factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, **ORIGINAL},
    "longrope": {"rope_type": "longrope", **FACTORS, **ORIGINAL},
    "longrope, factor": {
        **{"rope_type": "longrope", "factor": 6.0, "attention_factor": 1.3, **FACTORS},
        **ORIGINAL,
    },
}
CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
}
# What reading and writing must keep; families read and write alike.
CASES = [
    *(("llama", "dynamic"), ("llama", "longrope"), ("mistral", "yarn, ramp")),
    *(("qwen2", "yarn"), ("qwen3", "longrope, factor")),
]


def settings_of(scaling):
    # A small base, so that channels in the middle of the ramp matter.
    return {"rope_theta": 100.0, **SCALINGS[scaling]}


def config_of(family, scaling):
    sizes = SIZES | {"max_position_embeddings": POSITIONS, "head_dim": 10}
    if family == "mistral":
        sizes["sliding_window"] = None
    return CLASSES[family](**sizes, rope_parameters=settings_of(scaling))


def ours_of(content):
    return family_of("llama").read_config(Fields(content, "config.json"))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_and_factors_are_those_of_transformers(scaling):
    theirs = config_of("llama", scaling)
    rope = ours_of(theirs.to_dict()).rope
    make = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
    for tokens in (20, 24, 25, 48, 49, 77, 1000):
        want, factor = make(theirs, torch.device("cpu"), seq_len=tokens)
        fixed = rope.at_length(tokens, 10)
        assert not fixed.depends_on_length
        np.testing.assert_allclose(rotary_frequencies(fixed, 10), want.numpy(), rtol=1e-6)
        assert fixed.attention_scale == pytest.approx(factor, rel=1e-12)
        assert rope.attention_scale == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(("family", "scaling"), CASES, ids=lambda x: x)
def test_logits(tmp_path, family, scaling):
    build(config_of(family, scaling)).save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    parts = (SHORT, LONG) if family == "llama" else (LONG,)
    for part in parts:
        # A model of its own for each length: transformers' keeps what the last text has left.
        want = torch_logits(reload(tmp_path), TOKENS[:, part])
        assert relative_error(logits_of(ours, TOKENS[:, part]), want) <= 1e-5


@pytest.mark.parametrize("scaling", SCALINGS)
def test_exports_write_the_same_config(scaling):
    want = config_of("llama", scaling).to_dict()["rope_parameters"]
    family, config = family_of("llama"), ours_of(config_of("llama", scaling).to_dict())
    new, old = family.config_json(config), family.write_old_config(config)
    for content in (new, old, new | old):
        content = {"max_position_embeddings": POSITIONS, **content}
        assert transformers.LlamaConfig(**SIZES | content).to_dict()["rope_parameters"] == want
    assert old["rope_theta"] == 100.0
    assert {**old["rope_scaling"], "rope_theta": 100.0} == want


@pytest.mark.parametrize("scaling", SCALINGS)
def test_published_keys(scaling):
    """`rope_scaling` with "type", as before transformers 5, and the length beside it (Phi-3)."""
    content = config_of("llama", scaling).to_dict()
    whole = ours_of(content)
    parameters = dict(content.pop("rope_parameters"))
    content |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    parameters["type"] = parameters.pop("rope_type")
    if parameters.pop("original_max_position_embeddings", None) is not None:
        # transformers prefers the one outside.
        content |= ORIGINAL
        parameters["original_max_position_embeddings"] = 31
        theirs = transformers.LlamaConfig(**copy.deepcopy(content))
        _ = theirs.standardize_rope_params()
        assert theirs.rope_parameters["original_max_position_embeddings"] == 24
    assert ours_of(content) == whole


def test_gemma_scales_each_kind_of_layer(tmp_path):
    sizes = SIZES | {"max_position_embeddings": POSITIONS, "num_hidden_layers": 6}
    ropes = {
        "full_attention": settings_of("yarn"),
        "sliding_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
    }
    config = transformers.Gemma3TextConfig(
        **sizes, head_dim=8, sliding_window=8, rope_parameters=ropes
    )
    build(config).save_pretrained(tmp_path / "a")
    ours = load_pretrained(tmp_path / "a")
    want = torch_logits(reload(tmp_path / "a"), TOKENS)
    assert relative_error(logits_of(ours, TOKENS), want) <= 1e-5
    export_pretrained(ours, tmp_path / "b")
    np.testing.assert_array_equal(torch_logits(reload(tmp_path / "b"), TOKENS), want)


def test_packed_documents_have_their_own_lengths(tmp_path):
    build(config_of("llama", "dynamic")).save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    ends = (20, 75)  # a short document, a long one, padding
    ids = jnp.asarray([[1] * ends[0] + [2] * (ends[1] - ends[0]) + [0] * (77 - ends[1])])
    got = np.asarray(jitted(ours)(jnp.asarray(TOKENS[:1]), ids).logits)
    for part in (slice(0, ends[0]), slice(*ends)):
        want = torch_logits(reload(tmp_path), TOKENS[:1, part])
        assert relative_error(got[:, part], want) <= 2e-5


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_generation_is_fixed_for_a_length(tmp_path, scaling):
    build(config_of("llama", scaling)).save_pretrained(tmp_path / "a")
    ours = load_pretrained(tmp_path / "a")
    prompt, total = TOKENS[:1, :50], 60
    longest = ours.config.rope.original_max_positions
    match = rf"beyond {longest} tokens.*fix_context\(model, {total}\)"
    with pytest.raises(ValueError, match=match):
        generate(ours, prompt, total - 50, stop_tokens=())
    with pytest.raises(ValueError, match=match):
        init_cache(ours, 1, total)
    fixed, whole = fix_context(ours, total), TOKENS[:1, :total]
    if scaling == "dynamic":
        new = np.asarray(generate(fixed, prompt, total - 50, stop_tokens=()).tokens)
        whole = np.concatenate([prompt, new], axis=1)
    logits = torch_logits(reload(tmp_path / "a"), whole)
    if scaling == "dynamic":
        # Every token is the best one by the frequencies of the whole text.
        assert logits[:, 49:-1].argmax(-1).tolist() == whole[:, 50:].tolist()
    # The fixed model is one that transformers can express.
    export_pretrained(fixed, tmp_path / "b", source=tmp_path / "a")
    assert relative_error(torch_logits(reload(tmp_path / "b"), whole), logits) <= 1e-5
    assert fixed.config.rope == load_pretrained(tmp_path / "b").config.rope


@pytest.mark.parametrize("scaling", ["yarn, mscale", "longrope"])
def test_titan_export_follows(tmp_path, scaling):
    build(config_of("llama", scaling)).save_pretrained(tmp_path / "a")
    liza = LizaConfig(softmax_window=16, softmax_sinks=2)
    ours = load_pretrained(tmp_path / "a", liza)
    if scaling == "longrope":
        with pytest.raises(ConversionError, match=r"fix_context\(model, tokens\)"):
            export_pretrained(ours, tmp_path / "titan", "titan", tmp_path / "a")
        assert not (tmp_path / "titan").exists()
        ours = fix_context(ours, 77)
    export_pretrained(ours, tmp_path / "titan", "titan", tmp_path / "a")
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "titan", trust_remote_code=True).eval()
    want = logits_of(ours, TOKENS)
    assert relative_error(torch_logits(theirs, TOKENS), np.asarray(want)) <= 1e-4
    with torch.no_grad():
        first = theirs(torch.as_tensor(TOKENS[:, :40]), use_cache=True)
        rest = theirs(torch.as_tensor(TOKENS[:, 40:]), cache=first.cache)
    assert relative_error(rest.logits.numpy(), np.asarray(want)[:, 40:]) <= 1e-4
    assert load_pretrained(tmp_path / "titan").config.rope == ours.config.rope


REFUSED = {
    "unknown": ({"rope_type": "fancy"}, "rope type 'fancy'"),
    "no factor": ({"rope_type": "dynamic"}, "lacks factor"),
    "short": ({"rope_type": "longrope", **FACTORS, "long_factor": [1.0]}, "as many short factors"),
    "both short": (
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
        "needs 5 factors",
    ),
    "text": ({"rope_type": "longrope", **FACTORS, "long_factor": "abc"}, "a list of numbers"),
    "zero": ({"rope_type": "longrope", **FACTORS, "long_factor": [0.0] * 5}, "must be positive"),
    "turned": ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}, "beta_slow <= beta_fast"),
    "negative": (
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": -1.0},
        "must be positive",
    ),
}


@pytest.mark.parametrize(("rope", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_scalings_are_refused(tmp_path, rope, message):
    content = config_of("llama", "linear").to_dict() | {"rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConversionError, match=message):
        read_config(tmp_path)
