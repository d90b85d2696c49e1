"""`python -m convert`: import, export, push, inspect and verify pretrained models."""

if __name__ == "__main__":
    from convert.interrupts import exit_on_interrupt

    exit_on_interrupt()

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import tyro

from convert.checks import verify_pretrained
from convert.command_line import run_command
from convert.formats.files import check_export_target
from convert.inspection import describe
from convert.model_card import read_results
from convert.overwriting import check_overwrite
from convert.pretrained import export_pretrained, load_pretrained
from convert.progress import progress_bars
from convert.pushing import push_model
from convert.sources import with_revision
from tptt_jax import fix_context

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def import_model(
    source: tyro.conf.Positional[str],
    output: Path,
    dtype: Dtype = "auto",
    overwrite: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Writes a model, e.g. a GGUF file, as a Hugging Face directory.

    Args:
      source: a Hugging Face directory, a hub id, a .gguf file, "smollm2-135m" or "gemma3-270m".
      output: the directory to write.
      dtype: of the weights that are written; auto: what the source is stored in (float32 for
        float64 and quantised weights).
      overwrite: replace an earlier model in that directory.
      revision: branch, tag or commit of a hub id; the same as hub-id@revision.
    """
    check_export_target(output, overwrite=overwrite)
    source = with_revision(source, revision)
    check_overwrite(output, source)
    model = load_pretrained(source, dtype=dtype)
    export_pretrained(model, output, "merged", source, overwrite=overwrite)
    return {"output": str(output), "format": "merged", "dtype": model.dtype.name}


def export_model(
    checkpoint: tyro.conf.Positional[str],
    output: Path,
    format: Literal["merged", "titan", "peft", "tptt"] = "merged",
    dtype: Dtype = "float32",
    overwrite: bool = False,
    results: Path | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint of our own training for others to load.

    Args:
      checkpoint: the directory that the training wrote.
      output: the directory to write.
      format: merged: a plain Hugging Face model, adapters in the weights, no memory. titan:
        with its memory and the PyTorch file that runs it (trust_remote_code). peft: the LoRA
        adapters alone, for peft. tptt: for the package tptt 0.12.1, if the operator is
        tptt_reference.
      dtype: of the weights that are written; auto: what the source is stored in (float32 for
        float64 and quantised weights). Those of peft are float32 as they were trained.
      overwrite: replace an earlier model in that directory.
      results: results.json of experiments.evaluate, which the model card (README.md) quotes.
      context: fixes rotary frequencies that depend on the length ("dynamic" and "longrope"
        scaling) for texts of this many tokens, as titan needs it; others stay as they are.
    """
    if context is not None and (context < 0 or format not in ("merged", "titan")):
        raise ValueError(
            "--context must be at least 0 and goes with --format merged or titan, whose "
            f"config.json says the frequencies; got {context} with --format {format}."
        )
    check_export_target(output, overwrite=overwrite)
    check_overwrite(output, checkpoint)
    if results is not None:
        # Fail before the weights are loaded.
        read_results(results.expanduser(), checkpoint)
    model = load_pretrained(checkpoint, dtype=dtype)
    if context is not None:
        model = fix_context(model, context)
    export_pretrained(model, output, format, checkpoint, overwrite=overwrite, results=results)
    return {
        "output": str(output),
        "format": format,
        "dtype": "float32" if format == "peft" else model.dtype.name,
    }


def inspect_model(
    source: tyro.conf.Positional[str],
    context: tuple[int, ...] = (1024, 65_536, 1_048_576),
    window: int = 512,
    revision: str | None = None,
) -> dict[str, Any]:
    """Describes a model, and the memory that a Titan of it needs; reads no weights.

    Args:
      source: a Hugging Face directory, a hub id, a .gguf file, "smollm2-135m", "gemma3-270m", a
        PEFT or tptt directory, or a checkpoint.
      context: lengths in tokens for which to report the state of one row.
      window: tokens that softmax attention sees in the windowed Titan.
      revision: branch, tag or commit of a hub id; the same as hub-id@revision.
    """
    return describe(with_revision(source, revision), context, window)


def verify_model(
    source: tyro.conf.Positional[str],
    tokens: int = 40,
    dtype: Dtype = "float32",
    tolerance: float | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Checks a model: against transformers if torch is installed, and against itself.

    The whole text must give the same logits as segments, single tokens, padded and packed rows,
    without a memory and with one. The exit status is 1 if a check fails.

    Args:
      source: a Hugging Face directory, a hub id, a .gguf file, "smollm2-135m", "gemma3-270m", a
        PEFT or tptt directory, or a checkpoint.
      tokens: length of the text.
      dtype: of weights and computation; auto: what the source is stored in.
      tolerance: of every check, relative to the largest logit; None: 1e-4 for float32, 1e-2
        for float16, 5e-2 for bfloat16.
      revision: branch, tag or commit of a hub id; the same as hub-id@revision.
    """
    source = with_revision(source, revision)
    checks, text = verify_pretrained(source, num_tokens=tokens, dtype=dtype, tolerance=tolerance)
    return {
        "source": source,
        "text": text,
        "tokens": tokens,
        "checks": [asdict(check) | {"result": check.result} for check in checks],
        "passed": all(check.result != "FAIL" for check in checks),
    }


def main() -> int:
    """Runs the command line and returns its exit status."""
    commands = {
        "import": import_model,
        "export": export_model,
        "push": push_model,
        "inspect": inspect_model,
        "verify": verify_model,
    }
    with progress_bars(enabled="--json" not in sys.argv):
        return run_command(commands, prog="python -m convert")


if __name__ == "__main__":
    sys.exit(main())
