"""Gemma 3 270M's real weights, loaded once: perplexity, transformers' logits, Titans in torch.

The whole model runs where its depth counts. Caches, windows and memories are compared on its first
layers and the commonest words, which compile and run in a tenth of the time.
"""

import dataclasses
import pydoc_data.topics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import export_pretrained, load_pretrained, load_tokenizer
from experiments.data import python_docs_text
from tests.contracts import logits_of, raise_shares, relative_error
from tests.parity import torch_models
from tests.parity.titan_models import own_module_cache, reload_titan
from tptt_jax import CausalLM, LizaConfig, generate

torch = pytest.importorskip("torch", reason="compares with models in torch")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

# Five sliding layers and a full one. Words are sorted by how common they are.
LAYERS, WORDS = 6, 10_000


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    with own_module_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def gemma(demo_model_path: Path) -> CausalLM:
    return load_pretrained("demo")


@pytest.fixture(scope="module")
def tokenizer(demo_model_path: Path):
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def common_tokens(tokenizer) -> np.ndarray:
    ids = tokenizer(python_docs_text()[2000:2400]).input_ids
    return np.array([[token for token in ids if token < WORDS][:60]])


def first_layers(model: CausalLM, liza: LizaConfig | None = None) -> CausalLM:
    """The model without its upper layers and rare words, with a sliding window that matters."""
    config = dataclasses.replace(
        model.config,
        num_layers=LAYERS,
        layer_kinds=model.config.layer_kinds[:LAYERS],
        vocab_size=WORDS,
        sliding_window=40,
    )
    assert set(config.layer_kinds) == {"sliding", "full"}
    small = CausalLM(config, liza, rngs=nnx.Rngs(0))
    kept = {"stacks": slice(LAYERS), "embed": slice(WORDS)}
    flat = []
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(small))}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = np.asarray(variable.get_value())[kept.get(path[0], slice(None))]
        assert path in paths
        flat.append((path, variable.replace(jnp.asarray(value))))
    nnx.update(small, nnx.from_flat_state(flat))
    return small


@nnx.jit
def token_losses(model, hidden, targets):
    logits = model.project_logits(hidden).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def test_perplexity_of_the_python_reference(gemma, tokenizer):
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokens = jnp.asarray([tokenizer(text[:20_000]).input_ids[:2000]])
    hidden = nnx.jit(lambda model, tokens: model(tokens).hidden)(gemma, tokens[:, :-1])
    # Logits over 262,144 tokens are computed in pieces: at once they take 2 GB.
    losses = [
        token_losses(gemma, hidden[:, i : i + 250], tokens[:, i + 1 : i + 251])
        for i in range(0, 1999, 250)
    ]
    perplexity = float(jnp.exp(jnp.concatenate(losses, axis=1).mean()))
    assert perplexity == pytest.approx(11.7, abs=0.05)


def test_logits_are_those_of_transformers(gemma, tokenizer, tmp_path):
    """transformers reads our export; of the GGUF file it would take minutes."""
    export_pretrained(gemma, tmp_path / "gemma")
    tokens = np.asarray([tokenizer(python_docs_text()[9_000:10_000]).input_ids[:100]])
    wanted = torch_models.torch_logits(torch_models.reload(tmp_path / "gemma"), tokens)
    assert relative_error(logits_of(gemma, tokens), wanted) <= 1e-4


def test_continues_greedily(gemma, common_tokens, tmp_path):
    ours = first_layers(gemma)
    export_pretrained(ours, tmp_path / "gemma")
    theirs = torch_models.reload(tmp_path / "gemma")
    check_continuation(ours, theirs, common_tokens)


def check_continuation(ours, theirs, tokens) -> None:
    wanted = theirs.generate(
        torch.as_tensor(tokens),
        attention_mask=torch.ones(tokens.shape, dtype=torch.int64),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
    )
    got = generate(ours, jnp.asarray(tokens), max_new_tokens=16, stop_tokens=())
    assert np.asarray(got.tokens)[0].tolist() == wanted[0, tokens.shape[1] :].tolist()


TITANS = {
    "all": LizaConfig(writes="all", softmax_window=16, mag_init=0.1),
    "evicted": LizaConfig(softmax_window=16),
}


@pytest.mark.parametrize("liza", TITANS.values(), ids=TITANS)
def test_titans_in_torch(gemma, common_tokens, tmp_path, liza):
    """With a window, so that the memory, sinks and sliding layers all matter."""
    ours = raise_shares(first_layers(gemma, liza))
    export_pretrained(ours, tmp_path / "gemma", "titan")
    theirs = reload_titan(tmp_path / "gemma")
    wanted = torch_models.torch_logits(theirs, common_tokens)
    assert relative_error(logits_of(ours, common_tokens), wanted) <= 1e-4
    check_continuation(ours, theirs, common_tokens)
