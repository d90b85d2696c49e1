"""Generation: PEFT directories, long files, saved states, chats."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import export_pretrained, load_pretrained, load_tokenizer
from convert.loading import variables_of
from experiments.command_line import run_configured
from experiments.finetune import finetune
from experiments.generate import GenerateConfig, generate_text
from experiments.training import FinetuneConfig
from tptt_jax import LoraConfig, generate

PROMPT = "The with statement"


@pytest.fixture(scope="module")
def adapted(tiny_model_dir):
    model = load_pretrained(tiny_model_dir, lora=LoraConfig(rank=2, targets=("q_proj", "up_proj")))
    rng = np.random.default_rng(0)
    for _, variable in variables_of(model).values():
        if isinstance(variable, nnx.LoRAParam):
            values = rng.standard_normal(variable.get_value().shape)
            variable.set_value(jnp.asarray(values, jnp.float32))
    nnx.update(model, nnx.from_flat_state(list(variables_of(model).values())))
    return model


@pytest.fixture(scope="module")
def adapter(adapted, tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("peft") / "adapter"
    export_pretrained(adapted, path, "peft", tiny_model_dir)
    return path


def run(function, cls, capsys, *arguments):
    status = run_configured(function, cls, [*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]) if status == 0 else captured.err


def test_generate_with_a_peft_directory(adapted, adapter, tiny_model_dir, capsys):
    tokenizer = load_tokenizer(adapter)
    tokens = jnp.asarray([tokenizer(PROMPT)["input_ids"]])
    result = generate(adapted, tokens, 8, stop_tokens=adapted.config.eos_token_ids)
    wanted = tokenizer.decode(result.tokens[0, : int(result.lengths[0])], skip_special_tokens=True)
    common = ("--prompt", PROMPT, "--max-new-tokens", 8)
    for source in (
        ("--adapter", adapter),
        ("--model", adapter, "--compare"),
        ("--model", tiny_model_dir, "--adapter", adapter),
    ):
        report = run(generate_text, GenerateConfig, capsys, *source, *common)
        assert report["text"] == wanted
        assert report.get("base", {}).get("text") != wanted


def test_an_adapter_that_is_none(tmp_path, capsys):
    error = run(generate_text, GenerateConfig, capsys, "--adapter", tmp_path)
    assert error.startswith(f"error: --adapter {tmp_path} is neither")


def test_training_starts_from_a_peft_directory(adapted, adapter, tmp_path, capsys):
    settings = (
        *("--model", adapter, "--output", tmp_path / "run", "--steps", 1, "--batch-size", 1),
        *("--data", "python-docs", "--data.sequence-length", 32, "--data.eval-tokens", 100),
        *("--sample-tokens", 0, "--no-liza", "--learning-rate", "1e-4", "--warmup-steps", 0),
    )
    error = run(finetune, FinetuneConfig, capsys, *settings)
    assert (
        "--lora.rank 2 --lora.alpha 16 --lora.no-use-rslora --lora.targets q_proj up_proj" in error
    )
    lora = ("--lora.rank", 2, "--lora.targets", "q_proj", "up_proj")
    assert run(finetune, FinetuneConfig, capsys, *settings, *lora)["steps"] == 1
    before, after = (
        {name: np.asarray(v.get_value()) for name, (_, v) in variables_of(model).items()}
        for model in (adapted, load_pretrained(tmp_path / "run"))
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.array_equal(after[name], value) == (".lora." not in name), name
        # One step of Adam moves nothing by more than the rate.
        np.testing.assert_allclose(after[name], value, atol=1.1e-4)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "document.txt"
    path.write_text("The with statement is a statement.\nIt ends.\n" * 80)
    return path


def test_a_saved_document_answers_without_being_read_again(
    document, tiny_model_dir, tmp_path, capsys
):
    settings = ("--model", tiny_model_dir, "--window", 32, "--max-new-tokens", 8)
    saved = tmp_path / "document.state"
    asked = ("--prompt", PROMPT)
    whole = run(
        generate_text,
        GenerateConfig,
        capsys,
        *settings,
        "--prompt-file",
        document,
        *asked,
        "--save-state",
        tmp_path / "asked.state",
    )
    only_read = ("--prompt-file", document, "--save-state", saved, "--max-new-tokens", 0)
    read = run(generate_text, GenerateConfig, capsys, *settings[:-2], *only_read)
    assert read["prompt_tokens"] > 1000
    assert "text" not in read
    loaded = run(generate_text, GenerateConfig, capsys, *settings, "--load-state", saved, *asked)
    assert loaded["text"] == whole["text"]
    assert loaded["prompt_tokens"] == whole["prompt_tokens"] - read["prompt_tokens"]
    assert loaded["context_tokens"] == whole["context_tokens"]
    again = ("--load-state", tmp_path / "asked.state")
    assert run(generate_text, GenerateConfig, capsys, *settings, *again)["text"] == whole["text"]
    other = run(
        generate_text, GenerateConfig, capsys, *settings, "--window", 31, "--load-state", saved
    )
    assert "has read it: liza.softmax_window: 32 in the state, 31 in the model" in other
    spoiled = bytearray(saved.read_bytes())
    spoiled[-1] ^= 1
    (tmp_path / "spoiled.state").write_bytes(spoiled)
    arguments = ("--load-state", tmp_path / "spoiled.state")
    status = run_configured(generate_text, GenerateConfig, [*map(str, (*settings, *arguments))])
    assert status == 2
    assert "has changed since it was saved" in capsys.readouterr().err


def test_a_chat_reads_only_what_is_new(document, tiny_model_dir, capsys, monkeypatch):
    settings = ("--model", tiny_model_dir, "--max-new-tokens", 6, "--chat")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nHow are you?\n"))
    chat = run(generate_text, GenerateConfig, capsys, *settings, "--prompt-file", document)
    assert [turn["message"] for turn in chat["turns"]] == ["Hello", "How are you?"]
    first = chat["turns"][0]
    assert first["context_tokens"] == chat["prompt_tokens"] + first["prompt_tokens"] + 6
    one = run(
        generate_text,
        GenerateConfig,
        capsys,
        *settings,
        "--prompt-file",
        document,
        "--prompt",
        "Hello",
    )
    assert one["turns"][0]["text"] == first["text"]


def test_stop_strings_and_late_printing_cut_exactly(tiny_model_dir, capsys):
    settings = ("--model", tiny_model_dir, "--prompt", PROMPT, "--max-new-tokens", 16)
    free = run(generate_text, GenerateConfig, capsys, *settings)["text"]
    stop = free[3:5]
    for stream in ("--stream", "--no-stream"):
        arguments = [*map(str, (*settings, "--stop", stop, stream)), "--json"]
        assert run_configured(generate_text, GenerateConfig, arguments) == 0
        captured = capsys.readouterr()
        report = json.loads(captured.out.splitlines()[-1])
        assert report["text"] == free[: free.index(stop)]
        assert " MB" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-new-tokens", 0), "--save-state"),
        (("--prompt-file", "/nowhere"), "/nowhere"),
        (("--load-state", "/nowhere"), "no such file: /nowhere"),
        (("--min-p", 2), "min_p"),
        (("--load-state", "x", "--compare"), "--compare"),
        (("--window", 0), "softmax_window"),
        (("--stop", ""), "non-empty"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_bad_input_is_one_line(options, message, tiny_model_dir, capsys):
    error = run(generate_text, GenerateConfig, capsys, "--model", tiny_model_dir, *options)
    assert error.startswith("error: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
