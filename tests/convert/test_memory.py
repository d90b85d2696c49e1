"""Importing needs memory for the model in its dtype and its largest tensor only."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

if not Path("/proc/self/status").exists():
    pytest.skip("the peak of a process is read from /proc", allow_module_level=True)

from tests.convert.checkpoints import LLAMA, hf_shapes, write_directory

# VmHWM and not getrusage, whose ru_maxrss a process inherits from the one that started it, here
# pytest with all that it has loaded. The peak only rises: what starting up takes comes first,
# with a model of the same family, which loads and compiles whatever there is to load.
SCRIPT = """
import json, pathlib, re, sys
from convert import export_pretrained, load_pretrained
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
warm, source, dtype, output = sys.argv[1:]
load_pretrained(warm, dtype=dtype)
before = peak()
model = load_pretrained(source, dtype=dtype)
loaded = peak()
if output:
    export_pretrained(model, output, "merged", source)
print(json.dumps({"load": loaded - before, "import": peak() - before}))
"""
# Compiled programs, scratch space, and what malloc keeps between tensors.
SLACK = 96e6


def write_sparse(path: Path, config: dict[str, Any], shard_bytes: int) -> tuple[int, int]:
    """Shards of bfloat16 zeros that take no room on the disk; bytes of all and of the largest."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Any]] = [{}]
    position = total = largest = 0
    for name, shape in hf_shapes(config).items():
        nbytes = 2 * prod(shape)
        total, largest = total + nbytes, max(largest, nbytes)
        if position and position + nbytes > shard_bytes:
            shards.append({})
            position = 0
        offsets = [position, position := position + nbytes]
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
    weight_map = {}
    for number, header in enumerate(shards):
        file = f"model-{number}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        text = json.dumps(header).encode()
        with (path / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + max(e["data_offsets"][1] for e in header.values()))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total, largest


def measure(tmp_path: Path, source: Path, dtype: str, output: Path | None) -> dict[str, int]:
    warm = write_directory(tmp_path / "warm", LLAMA)
    arguments = [str(warm), str(source), dtype, str(output or "")]
    # Optimised code, as users have it: conftest's saves on what runs only once.
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def llama(embed: int, mlp: int, layers: int, vocab: int) -> dict[str, Any]:
    heads = embed // 64
    sizes = {"hidden_size": embed, "intermediate_size": mlp, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": 64}
    return {**LLAMA, **sizes, **attention, "vocab_size": vocab}


# An untied head is stored transposed: no copy of it may be alive beside ours and the stored one.
@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 1), ("float32", 2)])
def test_300_megabytes(tmp_path, dtype, factor):
    source = tmp_path / "m"
    total, largest = write_sparse(source, llama(1024, 2816, 5, 64_000), 100_000_000)
    assert total > 350e6
    assert largest > SLACK  # So that the bounds below notice a copy of it.
    added = measure(tmp_path, source, dtype, tmp_path / "out")
    # Of each dtype, as the largest tensor is read in the one that it is stored in.
    assert added["load"] < factor * total + largest + SLACK
    assert added["import"] < factor * total + largest + SLACK
    # And the figure means something: the model itself is in it.
    assert added["load"] > factor * total


@pytest.mark.slow
def test_3_gigabytes_in_shards(tmp_path):
    source = tmp_path / "m"
    total, largest = write_sparse(source, llama(2048, 5632, 22, 128_000), 500_000_000)
    assert total > 2.9e9
    added = measure(tmp_path, source, "bfloat16", None)
    assert total < added["load"] < total + largest + SLACK
