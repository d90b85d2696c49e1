"""`python -m convert`: import, export and inspect pretrained models."""

import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from convert.adapter_config import is_adapter
from convert.adapters import describe_adapter, open_adapter
from convert.command_line import run_command
from convert.files import check_replaceable
from convert.pretrained import export_pretrained, load_pretrained
from convert.sources import find_checkpoint, locate, open_pretrained


def import_model(
    source: tyro.conf.Positional[str],
    output: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a model, e.g. a GGUF file, as a Hugging Face directory.

    Args:
      source: a Hugging Face directory, a hub id, a .gguf file, or demo.
      output: the directory to write.
      dtype: of the weights that are written.
      overwrite: replace an earlier model in that directory.
    """
    check_replaceable(output, overwrite=overwrite)
    model = load_pretrained(source, dtype=np.dtype(dtype))
    export_pretrained(model, output, "merged", source, overwrite=overwrite)
    return {"output": str(output), "format": "merged", "dtype": dtype}


def export_model(
    checkpoint: tyro.conf.Positional[str],
    output: Path,
    format: Literal["merged", "peft"] = "merged",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a checkpoint of our own training for others to load.

    Args:
      checkpoint: the directory that the training wrote.
      output: the directory to write.
      format: merged: a plain Hugging Face model, adapters in the weights, no memory. peft: the
        LoRA adapters alone, for peft.
      dtype: of the weights that are written; those of peft are float32 as they were trained.
      overwrite: replace an earlier model in that directory.
    """
    check_replaceable(output, overwrite=overwrite)
    model = load_pretrained(checkpoint, dtype=np.dtype(dtype))
    export_pretrained(model, output, format, checkpoint, overwrite=overwrite)
    return {
        "output": str(output),
        "format": format,
        "dtype": "float32" if format == "peft" else dtype,
    }


def inspect_model(source: tyro.conf.Positional[str]) -> dict[str, Any]:
    """Says what a model is, from its configuration and headers; reads no weights.

    Args:
      source: a Hugging Face directory, a hub id, a .gguf file, demo, a PEFT directory, or a
        checkpoint.
    """
    if described := find_checkpoint(source):
        adapters = {"liza": described.liza is not None, "lora": described.lora is not None}
        return {"checkpoint": source, **adapters, **inspect_model(described.source)}
    path = locate(source)
    if is_adapter(path):
        return describe_adapter(open_adapter(path))
    opened = open_pretrained(path)
    infos = opened.tensors.tensors.values()
    config = opened.config
    return {
        "source": str(opened.path),
        "family": opened.family.model_type,
        "parameters": sum(prod(info.shape) for info in infos),
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(Counter(info.dtype for info in infos)),
        "num_layers": config.num_layers,
        "embed_dim": config.embed_dim,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp_dim": config.mlp_dim,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "tie_embeddings": config.tie_embeddings,
    }


def main() -> int:
    """Runs the command line and returns its exit status."""
    commands = {"import": import_model, "export": export_model, "inspect": inspect_model}
    return run_command(commands, prog="python -m convert")


if __name__ == "__main__":
    sys.exit(main())
