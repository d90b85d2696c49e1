import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from convert import load_pretrained
from convert.checks import verify_pretrained
from convert.checks.streaming import Runner
from convert.checks.verify import TOLERANCES, Check
from tests.convert.checkpoints import LLAMA, hf_shapes, random_tensors, write_directory
from tests.convert.test_checkpoints import save_run
from tests.convert.test_command_line import run_main
from tests.convert.test_gguf_io import write_gguf
from tests.tiny import write_tiny_model
from tptt_jax import LizaConfig, LoraConfig

# Tests of one text and one model share their compiled programs.
TOKENS = 16
# The special tokens that `write_gguf` writes.
MODEL = LLAMA | {"bos_token_id": 2, "eos_token_id": [1, 5]}
STREAMING = ["token by token", "segments", "ragged segments", "padding", "packing"]


def failed(checks):
    return {(check.model, check.check) for check in checks if check.result == "FAIL"}


@pytest.mark.parity
def test_a_directory_with_a_tokenizer(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    path = write_tiny_model(tmp_path / "m")
    arguments = ("verify", path, "--tokens", 23, "--json")
    status, output = run_main(monkeypatch, capsys, *arguments)
    report = json.loads(output.out.splitlines()[-1])
    assert (status, report["passed"], output.err) == (0, True, "")
    assert report["text"] == "a built-in paragraph"
    found = [(row["model"], row["check"], row["result"]) for row in report["checks"]]
    base, titan = ["transformers", *STREAMING], [*STREAMING, "other chunk size", "PyTorch export"]
    assert found == [
        *(("base", name, "PASS") for name in base),
        *(("Titan", name, "PASS") for name in titan),
    ]
    # float32 leaves a trace everywhere: no check compares a thing with itself.
    assert all(0 < row["error"] < 1e-5 for row in report["checks"])


@pytest.mark.parity
def test_a_gguf_file_is_compared_through_its_export(tmp_path):
    pytest.importorskip("torch")
    path = write_gguf(tmp_path / "m.gguf", MODEL, random_tensors(hf_shapes(MODEL)))
    checks, text = verify_pretrained(path, num_tokens=TOKENS)
    assert text.startswith("random tokens")
    assert checks[0].note == "on the exported model"
    assert {check.result for check in checks} == {"PASS"}


def test_a_run_is_checked_with_its_own_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    base = write_directory(tmp_path / "base", MODEL)
    liza = LizaConfig(
        writes="all", operator="delta_rule_gelu", softmax_window=5, softmax_sinks=2, chunk_size=3
    )
    save_run(tmp_path / "run", base, liza, LoraConfig(rank=2))
    checks, _ = verify_pretrained(tmp_path / "run", num_tokens=TOKENS)
    results = {(check.model, check.check): check.result for check in checks}
    # Gelu after every chunk: the one operator whose result depends on the chunk size.
    assert results.pop(("this run", "other chunk size")) == "SKIP"
    for left_out in (("base", "transformers"), ("this run", "PyTorch export")):
        assert results.pop(left_out) == "SKIP"
        notes = {(check.model, check.check): check.note for check in checks}
        assert notes[left_out] == "torch is not installed"
    assert set(results) == {(m, c) for m in ("base", "this run") for c in STREAMING}
    assert set(results.values()) == {"PASS"}


def test_the_reference_operator_is_not_blamed_for_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    base = write_directory(tmp_path / "base", MODEL)
    save_run(tmp_path / "run", base, LizaConfig.tptt_reference(), LoraConfig(rank=2))
    checks, _ = verify_pretrained(tmp_path / "run", num_tokens=TOKENS)
    mine = [check for check in checks if check.model == "this run"]
    assert {check.result for check in mine} == {"SKIP"}
    *streaming, export = mine
    assert all("reads padding" in check.note for check in streaming)
    assert "has no such export" in export.note
    assert len(streaming) == len(STREAMING) + 1


def drop_ids(call):
    return lambda self, tokens, ids=None, cache=None: call(self, tokens, None, cache)


def forget(call):
    def broken(self, tokens, ids=None, cache=None):
        logits, cache = call(self, tokens, ids, cache)
        if cache is not None:
            stacks = [
                stack._replace(memory=jax.tree.map(jnp.zeros_like, stack.memory))
                for stack in cache.stacks
            ]
            cache = cache._replace(stacks=tuple(stacks))
        return logits, cache

    return broken


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        # Nothing reads the padding behind the last token, which is all that segments have.
        (drop_ids, {(m, c) for m in ("base", "Titan") for c in STREAMING[2:]}),
        (forget, {("Titan", name) for name in STREAMING[:3]}),
    ],
    ids=["padding is read", "the memory is lost"],
)
def test_what_is_broken_fails(tmp_path, monkeypatch, breakage, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = write_directory(tmp_path / "m", MODEL)
    monkeypatch.setattr(Runner, "__call__", breakage(Runner.__call__))
    assert failed(verify_pretrained(path, num_tokens=TOKENS)[0]) == expected


def test_nan_fails():
    check = Check(model="base", check="padding", error=float("nan"), tolerance=1.0)
    assert check.result == "FAIL"
    assert dataclasses.replace(check, error=None).result == "SKIP"


def test_exit_status_of_a_failure(tmp_path, monkeypatch, capsys):
    checks = [Check(model="base", check="padding", error=0.5, tolerance=1e-4)]
    monkeypatch.setattr("convert.__main__.verify_pretrained", lambda *_, **__: (checks, "text"))
    status, output = run_main(monkeypatch, capsys, "verify", "m")
    assert status == 1
    assert "base   padding  5.0e-01  0.0001           FAIL" in output.out
    assert output.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--tokens", 11), "at least 12"), (("--tolerance", 0), "must be positive")],
)
def test_impossible_settings(tmp_path, monkeypatch, capsys, arguments, message):
    status, output = run_main(monkeypatch, capsys, "verify", tmp_path, *arguments)
    assert status == 2
    assert message in output.err


def test_tolerances_cover_every_dtype(tmp_path):
    path = write_directory(tmp_path / "m", MODEL)
    for dtype in TOLERANCES:
        assert load_pretrained(path, dtype=dtype).dtype.name == dtype
