"""Regular expressions from files: results equal those of `re`, within a time limit."""

import json
import re
import time

import pytest

from convert import ConversionError, load_pretrained
from convert.adapters.config import matches
from tests.convert.checkpoints import LLAMA, write_directory
from tests.convert.test_adapters import write_adapter_files
from tptt_jax import LizaConfig, LoraConfig
from tptt_jax.config.patterns import matches_whole
from tptt_jax.training.description import Description, write_description

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 7, 31)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.experts.4.up_proj")
]
# As PEFT's users, Unsloth, TRL and our own export write them.
PATTERNS = (
    r".*\.(q_proj|v_proj)",
    r".*self_attn.*(q|k|v|o)_proj$",
    r"model\.layers\.(?:0|7)(?:\.self_attn\.q_proj|\.mlp\.down_proj)",
    r"(?:.*?(?:language|text|layers).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|up_proj).*?)",
    r"^(?!.*experts).*\.(?:[a-z]+_proj)",
    r"(?i)MODEL\.LAYERS\.\d+\.MLP\..*",
    r"[a-z.]*\d{2}[a-z._]*",
    # Braces that open no quantifier are text to `re`; `regex` matches fuzzily with them.
    r"model\.layers\.\d+\.self_attm{e}\.q_proj",
    r".*(?:q_prox){s<=1}",
    r".*q_proj_{d}",
    r".*q_pro{i}",
    r".*[{e}]proj|.*q\N{LOW LINE}proj|.*\.o_\w{,4}",
)
# `re` needs longer than the age of the universe for each.
ENDLESS = (
    r"(a|a|\w|.)*[!?]",
    r"(.*)*\.nothing",
    r"(\w+\.?)+[!?]",
    r"(?:(?:[a-z._]+)*[0-9]*)*[!?]",
    r".*.*.*.*.*.*.*.*.*.*.*.*.*.*[!?]",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_as_re(pattern):
    for name in NAMES:
        assert matches_whole(pattern, name) == (re.fullmatch(pattern, name) is not None), name


# Endless for short names as well: six ways to take each letter.
SLOW = r"(?:\w|.|[a-z._]|\S|[^!?]|[^0])*[!?]"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pattern", ENDLESS)
def test_endless_patterns_end(pattern):
    """An answer, or a refusal within the budget for all names together."""
    begin = time.process_time()
    refusals = set()
    for number in range(300):
        name = f"model.layers.{number}.self_attn.aaaaaaaaaaaaaaaaaa.q_proj"
        try:
            assert not matches(pattern, name)
        except ConversionError as error:
            refusals.add(str(error))
    assert time.process_time() - begin < 10
    assert all("takes longer than 2 s to match" in each for each in refusals)
    assert refusals or pattern != ENDLESS[0], "this one is always refused"


@pytest.mark.timeout(120)
def test_adapters(tmp_path):
    base = write_directory(tmp_path / "base", LLAMA)
    path = write_adapter_files(tmp_path / "a", target_modules=ENDLESS[0])
    with pytest.raises(ConversionError, match="takes longer than 2 s"):
        load_pretrained(base, adapter=path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (SLOW, "takes longer than 2 s"),
        ("a{99999999999999999999}", "not a valid regular expression"),
        ("(", "not a valid regular expression"),
    ],
)
def test_checkpoints(tmp_path, target, message):
    base = write_directory(tmp_path / "base", LLAMA)
    described = Description(source=str(base), liza=LizaConfig(), lora=LoraConfig(), train="lora")
    write_description(tmp_path / "run", described)
    file = tmp_path / "run" / "checkpoint.json"
    content = json.loads(file.read_text())
    content["lora"]["targets"] = [target]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "run")
