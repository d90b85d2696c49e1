"""Files that earlier versions wrote load, give what they gave then, and can be gone on with.

The archives in tests/older are named by their date. 2026-11-28 is of commit fe70cac. It holds a
random Llama, a run of finetune on it (`python -m experiments.finetune --model base --data text.txt
--steps 4 --checkpoint-every 2 --liza.softmax-window 8 --liza.memory-rank 2 --lora.rank 2
--data.sequence-length 48 --data.eval-tokens 96 --batch-size 2 --fit-steps 2 --distill-steps 1
--fit-length 48 --sample-tokens 0 --output run`), its exports "titan" and "peft", the saved state
after 40 tokens, and logits after 60.
"""

import json
import shutil
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_pretrained
from experiments.command_line import run_configured
from experiments.finetune import finetune
from experiments.training import FinetuneConfig
from experiments.training.metrics import read_metrics
from tests.contracts import jitted
from tptt_jax import load_state
from tptt_jax.training.checkpoint import latest_step

OLDER = Path(__file__).parents[1] / "older"


@pytest.fixture(scope="module", params=sorted(OLDER.glob("*.tar.xz")), ids=lambda path: path.name)
def archive(request):
    return request.param


@pytest.fixture(scope="module")
def files(archive, tmp_path_factory):
    return unpack(archive, tmp_path_factory.mktemp("older"))


def unpack(archive, folder):
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")
    # A run names its base model by the whole path.
    description = folder / "run" / "checkpoint.json"
    description.write_text(description.read_text().replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def expected(files):
    return json.loads((files / "expected.json").read_text())


@pytest.fixture(scope="module")
def titan(files):
    return load_pretrained(files / "run")


def last_logits(model, tokens, cache=None):
    """Through programs that models of one structure share."""
    return np.asarray(jitted(model)(jnp.asarray([tokens]), cache=cache).logits)[0, -1]


def test_a_run_gives_the_same_logits(titan, expected):
    np.testing.assert_allclose(
        last_logits(titan, expected["tokens"]), expected["run"], atol=2e-5, rtol=1e-4
    )
    assert titan.liza.horizon is None


@pytest.mark.parametrize(("name", "same"), [("base", "base"), ("titan", "run")])
def test_an_export_gives_the_same_logits(name, same, files, expected):
    logits = last_logits(load_pretrained(files / name), expected["tokens"])
    np.testing.assert_allclose(logits, expected[same], atol=2e-5, rtol=1e-4)


def test_an_adapter_is_the_run_s(titan, files):
    """PEFT's directory has the adapters without the memory."""
    adapted = load_pretrained(files / "base", adapter=files / "peft")
    tokens = np.arange(3, 11, dtype=np.int32)
    # Nothing has left the window of 8 yet.
    np.testing.assert_allclose(last_logits(adapted, tokens), last_logits(titan, tokens), atol=2e-5)


def test_a_saved_state_is_read_on(titan, files, expected):
    state = load_state(files / "state.safetensors", titan)
    logits = last_logits(titan, expected["tokens"][40:], cache=state)
    np.testing.assert_allclose(logits, expected["run"], atol=2e-4, rtol=1e-3)


def test_a_run_that_was_killed_goes_on(archive, expected, tmp_path, monkeypatch):
    unpack(archive, tmp_path)
    before = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # As a kill after the second of four steps would have left it.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "summary.json").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    assert run_configured(finetune, FinetuneConfig, ["--config", "run/config.yaml"]) == 0
    assert latest_step(tmp_path / "run") == 4
    after = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record.step for record in after] == [1, 2, 3, 4]
    losses = [[record.loss for record in records] for records in (before, after)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    logits = last_logits(load_pretrained(tmp_path / "run"), expected["tokens"])
    np.testing.assert_allclose(logits, expected["run"], atol=2e-4, rtol=1e-3)
