"""The default output is named after model and data."""

from pathlib import Path

import pytest

from experiments.command_line import parse_arguments
from experiments.training import FinetuneConfig
from experiments.training.config import name_output


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ("smollm2-135m", "python-docs", "smollm2-135m-python-docs"),
        ("HuggingFaceTB/SmolLM2-135M@main", "~/chats.JSONL.gz", "smollm2-135m-chats"),
        ("/models/a b/Gemma.Q4_K.gguf", ("x/one.csv", "two.csv"), "gemma.q4_k-one-and-1-more"),
        ("runs/tuned/", "parts/2024/*.jsonl", "tuned-2024"),
        ("../..", "*", "run"),
        ("m" * 200, "d" * 200, "m" * 40 + "-" + "d" * 40),
    ],
)
def test_names(model, data, expected):
    assert name_output(model, data) == Path("runs") / expected


def test_a_given_output_is_kept_and_a_saved_default_is_a_plain_path():
    config = FinetuneConfig(model="m", output=Path("out"))
    assert config.output == Path("out")
    assert parse_arguments(["--model", "a/B"], FinetuneConfig).output == Path("runs/b-python-docs")
