"""Generation from PEFT directories, and training that starts from one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import export_pretrained, load_pretrained, load_tokenizer
from convert.loading import variables_of
from experiments.arguments import FinetuneConfig, run_configured
from experiments.finetune import finetune
from experiments.generate import GenerateConfig, generate_text
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
