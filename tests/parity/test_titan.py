"""The "titan" export in torch against our own models, in float32 on the CPU."""

import copy
import functools
import json
import shutil
import sys
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import export_pretrained, load_pretrained, load_tokenizer
from tests.contracts import (
    logits_of,
    raise_shares,
    random_tokens,
    randomize,
    relative_error,
    remove_shares,
)
from tests.parity.titan_models import own_module_cache, reload_titan
from tests.tiny import BOS, EOS, PAD, make_tokenizer
from tptt_jax import CausalLM, LizaConfig, ModelConfig, generate
from tptt_jax.config import (
    AttentionConfig,
    ExpertsConfig,
    LayerSizes,
    MlpConfig,
    NormConfig,
    RopeConfig,
)
from tptt_jax.model import base_model

torch = pytest.importorskip("torch", reason="runs the exported model in torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

GEMMA: dict[str, Any] = {
    "norm": NormConfig(offset=True, placement="both"),
    "mlp": MlpConfig(activation="gelu_tanh"),
    "attention": AttentionConfig(qk_norm="head", query_scale=0.3, softcap=3.0),
    **{"layer_kinds": ("sliding", "full", "sliding"), "sliding_window": 7},
    **{"sliding_rope": RopeConfig(theta=50.0), "scale_embeddings": True, "final_softcap": 6.0},
}
GPT2: dict[str, Any] = {
    "norm": NormConfig(kind="layer", bias=True),
    "attention": AttentionConfig(bias=True, out_bias=True, fused_qkv=True),
    "mlp": MlpConfig(activation="gelu_tanh", gated=False, bias=True),
    **{"position_embedding": "learned", "max_positions": 40, "num_kv_heads": 4},
}
OPENELM: dict[str, Any] = {
    "per_layer": LayerSizes(num_heads=(2, 4, 4), num_kv_heads=(1, 2, 2), mlp_dim=(24, 40, 48)),
    "attention": AttentionConfig(fused_qkv=True, qk_norm="head"),
}
FULL = AttentionConfig(qk_norm="full")
OLMO: dict[str, Any] = {
    "norm": NormConfig(kind="layer", weight=False),
    "attention": AttentionConfig(clip_qkv=0.5),
}
OLMO2: dict[str, Any] = {"norm": NormConfig(placement="after", float32=True), "attention": FULL}
OLMOE: dict[str, Any] = {
    "experts": ExpertsConfig(number=5, per_token=2),
    "attention": FULL,
    "tie_embeddings": False,
}
NORMALIZED: dict[str, Any] = {
    "experts": ExpertsConfig(number=5, per_token=2, normalize_weights=True),
    "mlp": MlpConfig(gated=False),
}
CLIPPED = OLMO2 | {"attention": AttentionConfig(qk_norm="full", clip_qkv=0.5)}
OUT_BIAS = AttentionConfig(out_bias=True)
LLAMA3 = RopeConfig(scaling="llama3", theta=100.0, factor=4.0, original_max_positions=32)
WINDOW: dict[str, Any] = {"softmax_window": 6, "softmax_sinks": 2, "chunk_size": 8}


def beside(**settings: Any) -> LizaConfig:
    """A memory of every token, beside the softmax."""
    return LizaConfig(writes="all", **settings)


CASES: dict[str, tuple[dict[str, Any], LizaConfig | None]] = {
    "base model": ({"rope": LLAMA3, "attention": AttentionConfig(bias=True)}, None),
    "delta_product": ({"rope": RopeConfig(scaling="linear", factor=2.0)}, beside()),
    "delta_rule_v, unit": ({}, beside(operator="delta_rule_v", linear_scale="unit")),
    "delta_rule_kv, vector": ({}, beside(operator="delta_rule_kv", vector_beta=True)),
    "delta_rule_gelu": ({}, beside(operator="delta_rule_gelu", chunk_size=4)),
    "gated, rank": ({}, beside(operator="gated_delta_product", memory_rank=3, **WINDOW)),
    "rotary, N = 4": ({}, beside(operator="delta_product_r", num_householder=4)),
    "combined, expanded gates": (
        {},
        beside(operator="delta_product_c", num_householder=3, expand_gates=True, vector_beta=True),
    ),
    "constant write gate": ({}, beside(beta_gate="constant", alpha_gate="kv")),
    "projected gates": ({}, beside(beta_gate="projected", alpha_gate="projected")),
    "scheduled, cross gate": ({}, beside(mag="scheduled", mag_init=0.3, cross_gate=True)),
    "projected": ({"attention": OUT_BIAS}, beside(linear_scale="projected", mag_init=0.3)),
    "linear": (
        {"attention": AttentionConfig(qk_norm="head")},
        beside(softmax=False, operator="gated_delta_rule"),
    ),
    "window": ({}, beside(**WINDOW)),
    "window without sinks": ({}, beside(softmax_window=5, softmax_sinks=0)),
    "gemma": (GEMMA, beside(**WINDOW)),
    "gpt2": (GPT2, beside(**WINDOW)),
    "openelm": (OPENELM, beside(**WINDOW)),
    "olmo": (OLMO, beside(mag_init=0.3)),
    "olmo2": (OLMO2, beside()),
    "olmoe": (OLMOE, beside()),
    "olmoe, normalized": (OLMOE | NORMALIZED, None),
    "only a window": ({}, LizaConfig(writes="none", **WINDOW)),
    "a window, kept layers": ({}, LizaConfig(writes="none", full_layers=(0, 2), **WINDOW)),
    "every token, kept layers": ({}, beside(full_layers=(1,), **WINDOW)),
    "evicted, no window": ({"attention": AttentionConfig(bias=True)}, LizaConfig()),
    "evicted, long window": ({"rope": LLAMA3}, LizaConfig(softmax_window=60)),
}
# A memory of what the window has lost.
EVICTED: dict[str, tuple[dict[str, Any], LizaConfig]] = {
    "evicted": ({}, LizaConfig(**WINDOW)),
    "evicted, no sinks": ({}, LizaConfig(softmax_window=5, softmax_sinks=0, chunk_size=8)),
    "evicted, more sinks, nothing forgotten within a horizon": (
        {},
        LizaConfig(
            **{"softmax_window": 3, "softmax_sinks": 7, "memory_rank": 0},
            **{"alpha_gate": "constant", "horizon": 5},
        ),
    ),
    "evicted, order 2": ({}, LizaConfig.named("gated_delta_product", horizon=4, **WINDOW)),
    # Without sinks a difference of tokens reaches back to where the document has none.
    "evicted, combined": (
        {},
        LizaConfig(num_householder=3, trick="combined", softmax_window=6, softmax_sinks=0),
    ),
    "evicted, k gates": ({}, LizaConfig(beta_gate="k", alpha_gate="k", **WINDOW)),
    "evicted, expanded gates": (
        {},
        LizaConfig(
            **{"beta_gate": "kv", "alpha_gate": "v", "num_householder": 3, "trick": "combined"},
            **{"expand_gates": True, "vector_beta": True},
            **WINDOW,
        ),
    ),
    "evicted, gelu": (
        {},
        LizaConfig(
            **{"softmax_window": 6, "softmax_sinks": 2, "chunk_size": 4},
            **{"state_activation": "gelu", "num_householder": 2},
        ),
    ),
    "evicted, learned share": (
        {},
        LizaConfig(mag="learned", linear_scale="match", mag_init=0.3, **WINDOW),
    ),
    "evicted, scheduled share": (
        {"attention": OUT_BIAS},
        LizaConfig(mag="scheduled", linear_scale="unit", mag_init=0.4, **WINDOW),
    ),
    "evicted, gemma": (GEMMA, LizaConfig(**WINDOW)),
    "evicted, kept layers": (
        GEMMA | {"layer_kinds": ("full", "full", "sliding")},
        LizaConfig(full_layers=(1,), **WINDOW),
    ),
    "evicted, gpt2": (GPT2, LizaConfig(**WINDOW)),
    "evicted, openelm": (OPENELM, LizaConfig(**WINDOW)),
    "evicted, olmo2": (CLIPPED, LizaConfig(**WINDOW)),
    "evicted, olmoe": (OLMOE, LizaConfig(**WINDOW)),
}
CASES |= EVICTED
TOKENS = random_tokens((2, 45))


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    with own_module_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(our model, its export in torch) of a case."""

    @functools.cache
    def build(name: str):
        changes, liza = CASES[name]
        config = ModelConfig.tiny(**changes, bos_token_id=BOS, pad_token_id=PAD)
        ours = raise_shares(randomize(CausalLM(config, liza, rngs=nnx.Rngs(0))))
        path = tmp_path_factory.mktemp("titan") / "model"
        export_pretrained(ours, path, "titan")
        return ours, reload_titan(path)

    return build


@torch.no_grad()
def torch_logits(model, tokens, **options) -> np.ndarray:
    return model(torch.as_tensor(np.asarray(tokens)).long(), **options).logits.float().numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits(pair, name):
    ours, theirs = pair(name)
    assert relative_error(torch_logits(theirs, TOKENS), logits_of(ours, TOKENS)) <= 1e-4


@pytest.mark.parametrize("name", EVICTED)
def test_what_is_evicted_matters(pair, name):
    """Or else nothing here would notice a wrong memory."""
    ours, theirs = pair(name)
    logits = torch_logits(theirs, TOKENS)
    without = logits_of(remove_shares(nnx.clone(ours)), TOKENS)
    # From this place on there is something to read.
    first = ours.liza.softmax_window + ours.liza.softmax_sinks
    assert relative_error(logits[:, :first], without[:, :first]) <= 1e-4
    assert relative_error(logits[:, first:], without[:, first:]) >= 0.2


@pytest.mark.parametrize("name", ["evicted", "evicted, gemma", "evicted, no window"])
def test_rows_that_fit_into_the_window_are_the_base_models(pair, name, tmp_path):
    ours, theirs = pair(name)
    export_pretrained(base_model(ours), tmp_path / "base", "titan")
    tokens = TOKENS[:, : ours.liza.softmax_window]
    base = reload_titan(tmp_path / "base")
    np.testing.assert_array_equal(torch_logits(theirs, tokens), torch_logits(base, tokens))


@pytest.mark.parametrize("name", CASES)
def test_cache_and_padding(pair, name):
    """Neither the split into calls nor padding changes what the exported model computes."""
    _, model = pair(name)
    whole = torch_logits(model, TOKENS, use_cache=False)
    size = np.abs(whole).max()
    done, cache, mask = [0, 0], None, np.zeros((2, 0), np.int64)
    # Tokens of both rows in each call, of which some are padding. Calls longer than a window too.
    for counts in ([4, 3], [3, 6], [6, 0], [1, 1], [1, 1], [6, 5], [13, 9], [1, 14], [1, 1]):
        width = max(counts)
        piece, valid = random_tokens((2, width), seed=sum(done)), np.zeros((2, width), np.int64)
        for row, count in enumerate(counts):
            places = np.sort(np.random.default_rng(sum(done)).permutation(width)[:count])
            piece[row, places] = TOKENS[row, done[row] : done[row] + count]
            valid[row, places] = 1
        mask = np.concatenate([mask, valid], axis=1)
        with torch.no_grad():
            output = model(
                torch.as_tensor(piece).long(),
                attention_mask=torch.as_tensor(mask),
                cache=cache,
                use_cache=True,
            )
        cache = output.cache
        for row, count in enumerate(counts):
            got = output.logits[row, valid[row] != 0].numpy()
            want = whole[row, done[row] : done[row] + count]
            assert count == 0 or np.abs(got - want).max() <= 2e-5 * size, (name, row, done)
            done[row] += count


@pytest.mark.parametrize("name", ["base model", "gemma", "evicted"])
def test_blocks_of_queries(pair, name, monkeypatch):
    """Long rows are attended to in blocks, which change nothing."""
    _, model = pair(name)
    whole = torch_logits(model, TOKENS)
    monkeypatch.setattr(sys.modules[type(model).__module__], "QUERY_BLOCK", 7)
    np.testing.assert_allclose(torch_logits(model, TOKENS), whole, rtol=1e-4, atol=1e-4)


GREEDY = (
    *("delta_rule_gelu", "gated, rank", "gemma", "gpt2", "only a window"),
    *("evicted", "evicted, k gates", "evicted, gemma", "evicted, gpt2"),
    "evicted, kept layers",
)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_text_of_unequal_prompts(pair, name):
    ours, theirs = pair(name)
    ids = np.ones((3, 21), np.int64)
    ids[1, :9] = ids[2, :20] = 0
    prompts = random_tokens(ids.shape, seed=5)
    wanted = generate(ours, prompts, max_new_tokens=12, segment_ids=ids)
    tokens, mask = torch.as_tensor(prompts).long(), torch.as_tensor(ids)
    got = theirs.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)
    np.testing.assert_array_equal(got[:, 21:].numpy(), np.asarray(wanted.tokens))


@pytest.mark.parametrize("name", ["gated, rank", "evicted, combined"])
def test_beams_reorder_the_memory(pair, name):
    _, model = pair(name)
    prompts = torch.as_tensor(random_tokens((2, 9), seed=3)).long()
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    with_cache, without = (model.generate(prompts, use_cache=use, **options) for use in (1, 0))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", ["window", "evicted"])
def test_sampling_and_several_sequences(pair, name):
    _, model = pair(name)
    prompts = torch.as_tensor(random_tokens((2, 9), seed=3)).long()
    options = {"max_new_tokens": 7, "do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    with_cache = model.generate(prompts, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompts, use_cache=False, **options), with_cache)


BOUNDED = {
    **{"window": True, "linear": True, "olmo": False},
    **{"evicted": True, "evicted, k gates": True, "evicted, no window": False},
    "evicted, kept layers": False,
}


@pytest.mark.parametrize(("name", "bounded"), BOUNDED.items())
def test_the_cache_is_bounded_by_the_window(pair, name, bounded):
    _, model = pair(name)
    sizes, cache = [], None
    for _ in range(3):
        with torch.no_grad():
            tokens = torch.as_tensor(random_tokens((2, 11))).long()
            cache = model(tokens, cache=cache, use_cache=True).cache
        sizes.append(sum(x.numel() for layer in cache.layers for x in layer.tensors.values()))
    assert (sizes[1] == sizes[2]) == bounded


@pytest.mark.parametrize(("name", "tokens"), [("gemma", 9), ("evicted", 9), ("evicted", 3)])
def test_continuing_a_conversation(pair, name, tokens):
    """What `generate` returns goes on where it stopped, with the new turn's tokens only."""
    _, model = pair(name)
    prompt = torch.as_tensor(random_tokens((1, tokens), seed=3)).long()
    options = {"max_new_tokens": 5, "do_sample": False}
    first = model.generate(prompt, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    again = model.generate(more, cache=first.cache, **options)
    assert torch.equal(again, model.generate(more, **options))


def test_packed_rows_are_refused(pair):
    _, model = pair("window")
    tokens = torch.as_tensor(TOKENS).long()
    positions = torch.arange(45).remainder(20).expand(2, -1)
    with pytest.raises(ValueError, match="packed"):
        model(tokens, position_ids=positions)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(tokens, attention_mask=torch.ones(2, 1, 45, 45))


GRADIENTS = ("gated, rank", "delta_rule_gelu", "gemma")


@pytest.mark.parametrize("name", [*GRADIENTS, "evicted", "evicted, expanded gates"])
def test_gradients(pair, name):
    """In one direction of the embeddings, against the difference quotient in float64."""
    model = reload_titan(pair(name)[1].name_or_path).double()
    tokens = torch.as_tensor(TOKENS[:, :20]).long()
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    weights = torch.randn(2, 20, 97, generator=torch.Generator().manual_seed(1)).double()
    x = model.embed(tokens).detach().requires_grad_()

    def loss(x):
        logits = model(inputs_embeds=x, attention_mask=mask).logits
        return (logits * weights)[mask != 0].mean()

    loss(x).backward()
    trained = [p for name, p in model.layers.named_parameters() if not name.endswith("mag.limit")]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    step = 1e-5
    with torch.no_grad():
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert (x.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)
    assert not x.grad[mask == 0].any()


@pytest.mark.parametrize("name", ["gated, rank", "olmoe", "evicted", "evicted, olmoe"])
def test_training_under_autocast(pair, name):
    model = reload_titan(pair(name)[1].name_or_path).train()
    tokens = torch.as_tensor(TOKENS).long()
    exact = model(tokens, labels=tokens).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.02)
    used = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(used) > 30
    assert all(grad.isfinite().all() for grad in used)


def test_a_cache_of_another_kind_is_refused(pair):
    _, model = pair("window")
    with pytest.raises(ValueError, match="got a DynamicCache"):
        model(torch.as_tensor(TOKENS).long(), cache=transformers.DynamicCache())


@pytest.mark.parametrize("name", ["olmoe", "evicted, gemma"])
def test_gradient_checkpointing_changes_nothing(pair, name):
    model = reload_titan(pair(name)[1].name_or_path).train()
    tokens = torch.as_tensor(TOKENS[:, :20]).long()
    grads = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        # What a mass gate has seen is not trained.
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


OF_PEFT = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@OF_PEFT
@pytest.mark.parametrize("name", ["gated, rank", "evicted"])
def test_lora_of_peft(pair, tmp_path, name):
    peft = pytest.importorskip("peft")
    model = reload_titan(pair(name)[1].name_or_path)
    tokens = torch.as_tensor(TOKENS).long()
    targets = ["q_proj", "v_proj", "down_proj"]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2)
    )
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * len(targets)
    optimizer = torch.optim.Adam((p for p in wrapped.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(5):
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    wanted = torch_logits(wrapped.eval(), TOKENS)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        reload_titan(pair(name)[1].name_or_path), tmp_path / "adapter"
    )
    assert relative_error(torch_logits(again, TOKENS), wanted) <= 1e-5
    # We read the adapter on the Titan that it names, and write it again for PEFT.
    ours = load_pretrained(tmp_path / "adapter")
    assert ours.liza == pair(name)[0].liza
    assert relative_error(logits_of(ours, TOKENS), wanted) <= 1e-4
    export_pretrained(ours, tmp_path / "again", "peft", source=tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        reload_titan(pair(name)[1].name_or_path), tmp_path / "again"
    )
    assert relative_error(torch_logits(again, TOKENS), wanted) <= 1e-5
    merged = wrapped.merge_and_unload()
    assert relative_error(torch_logits(merged, TOKENS), wanted) <= 1e-5
    # transformers writes the merged model with its code, and we read it.
    merged.save_pretrained(tmp_path / "merged")
    assert relative_error(torch_logits(reload_titan(tmp_path / "merged"), TOKENS), wanted) <= 1e-5
    ours = load_pretrained(tmp_path / "merged")
    assert (ours.config, ours.liza) == (pair(name)[0].config, pair(name)[0].liza)
    assert relative_error(logits_of(ours, TOKENS), wanted) <= 1e-4


@OF_PEFT
def test_adapters_on_every_linear_layer_leave_the_memory_alone(pair):
    peft = pytest.importorskip("peft")
    model = reload_titan(pair("evicted")[1].name_or_path)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    )
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 3
    assert not any(".memory." in name for name in trained)


def test_a_new_model_of_the_same_kind(pair):
    """from_config gives random weights from which training can start."""
    theirs = pair("gated, rank")[1]
    model = transformers.AutoModelForCausalLM.from_config(theirs.config, trust_remote_code=True)
    logits = torch_logits(model.eval(), TOKENS)
    assert np.isfinite(logits).all()
    share = model.layers[0].self_attn.mag().detach()
    torch.testing.assert_close(share, torch.full_like(share, 0.05))


@pytest.mark.parametrize("name", ["evicted", "evicted, openelm"])
def test_a_new_memory_starts_as_ours(pair, name):
    model = transformers.AutoModelForCausalLM.from_config(
        pair(name)[1].config, trust_remote_code=True
    )
    changes, liza = CASES[name]
    ours = CausalLM(ModelConfig.tiny(**changes), liza, rngs=nnx.Rngs(0))
    for parameter in (
        *(
            "mag.weight",
            "mag.slope",
            "mag.bias",
            "mag.limit",
            "memory.scale.weight",
            "memory.scale.bias",
        ),
        *("memory.gates.beta.bias", "memory.gates.keep.bias", "memory.v_delta.b"),
    ):
        got = model.layers[0].self_attn.get_parameter(parameter).detach().numpy()
        wanted = attrgetter(parameter)(ours.stacks[0].self_attn).get_value()[0]
        np.testing.assert_allclose(got, wanted, err_msg=parameter)


@pytest.mark.parametrize(
    "liza", [LizaConfig(writes="all", memory_rank=2), LizaConfig(**WINDOW)], ids=["all", "evicted"]
)
def test_halves(tmp_path, liza):
    """bfloat16 weights stay bfloat16; what the memory learns stays float32."""
    ours = CausalLM(ModelConfig.tiny(), liza, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    export_pretrained(raise_shares(randomize(ours)), tmp_path / "m", "titan")
    theirs = reload_titan(tmp_path / "m", dtype="auto")
    for name, parameter in theirs.named_parameters():
        memory = ".mag." in name or ".memory." in name
        assert parameter.dtype == (torch.float32 if memory else torch.bfloat16), name
    with torch.no_grad():
        cache = theirs(torch.as_tensor(TOKENS).long(), use_cache=True).cache
    assert {layer.tensors["state"].dtype for layer in cache.layers} == {torch.float32}
    assert relative_error(torch_logits(theirs, TOKENS), logits_of(ours, TOKENS)) <= 5e-2


@pytest.mark.parametrize("name", ["window", "gemma"])
def test_a_directory_from_before_writes_was_a_choice(pair, tmp_path, name):
    """It means "all"."""
    theirs = pair(name)[1]
    shutil.copytree(theirs.name_or_path, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    assert config["liza"].pop("writes") == "all"
    path.write_text(json.dumps(config))
    np.testing.assert_array_equal(
        torch_logits(reload_titan(tmp_path / "old"), TOKENS), torch_logits(theirs, TOKENS)
    )


@pytest.mark.parametrize(
    "change",
    [
        *({"writes": "some"}, {"mag": "huge"}, {"linear_scale": "bits"}, {"beta_gate": "q"}),
        *({"alpha_gate": "x"}, {"trick": "magic"}, {"operator": "tptt_reference"}),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_file_does_not_know_is_refused(pair, change):
    config = copy.deepcopy(pair("evicted")[1].config)
    config.liza |= change
    with pytest.raises(ValueError, match=next(iter(change))):
        transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """An export with a tokenizer."""
    source, path = (tmp_path_factory.mktemp("talking") / name for name in ("source", "titan"))
    config = ModelConfig.tiny(
        vocab_size=500, bos_token_id=BOS, eos_token_ids=(EOS,), pad_token_id=PAD
    )
    ours = CausalLM(config, LizaConfig(softmax_window=8, softmax_sinks=2), rngs=nnx.Rngs(0))
    ours = raise_shares(randomize(ours))
    export_pretrained(ours, source)
    make_tokenizer(begin=True).save_pretrained(source)
    export_pretrained(ours, path, "titan", source=source)
    return ours, path


def test_text_generation_pipeline(talking):
    ours, path = talking
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    pipeline = transformers.pipeline(
        "text-generation", model=reload_titan(path), tokenizer=tokenizer, device="cpu"
    )
    texts = ["The def statement", "A class is an object that"]
    wanted = []
    for text in texts:
        prompt = load_tokenizer(path)(text).input_ids
        assert prompt[0] == BOS
        new = generate(ours, np.array([prompt]), max_new_tokens=8)
        wanted.append(tokenizer.decode(np.asarray(new.tokens)[0], skip_special_tokens=True))
    got = pipeline(texts, max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=2)
    assert [each["generated_text"] for (each,) in got] == wanted


def test_the_tokenizer_needs_no_trust(talking):
    _, path = talking
    assert transformers.AutoTokenizer.from_pretrained(path)("The def").input_ids[0] == BOS


def test_lm_eval(talking):
    """The harness's Hugging Face backend scores texts as our model does."""
    huggingface = pytest.importorskip(
        "lm_eval.models.huggingface", reason="needs lm-eval: pip install '.[test]'"
    )
    from lm_eval.api.instance import Instance

    ours, path = talking
    harness = huggingface.HFLM(
        pretrained=reload_titan(path),
        tokenizer=transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True),
        batch_size=2,
    )
    texts = [("The def statement", " binds a name"), ("If", " x is an object, then y is one too")]
    requests = [Instance("loglikelihood", {}, text, number) for number, text in enumerate(texts)]
    tokenizer = load_tokenizer(path)
    for (begin, end), (got, _) in zip(texts, harness.loglikelihood(requests), strict=True):
        tokens, first = tokenizer(begin + end).input_ids, len(tokenizer(begin).input_ids)
        logits = logits_of(ours, [tokens])[0, first - 1 : -1]
        scores = jax.nn.log_softmax(logits)[jnp.arange(len(tokens) - first), tokens[first:]]
        assert got == pytest.approx(float(scores.sum()), rel=1e-5)
    until = {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (begin, until), 0) for begin, _ in texts]
    for (begin, _), got in zip(texts, harness.generate_until(requests), strict=True):
        new = generate(ours, np.array([tokenizer(begin).input_ids]), max_new_tokens=6)
        assert got == tokenizer.decode(np.asarray(new.tokens)[0], skip_special_tokens=True)
