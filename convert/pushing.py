"""`python -m convert push`: a run or an exported directory goes to the Hugging Face hub."""

import shlex
import tempfile
from pathlib import Path
from typing import Any, Literal

import tyro

from convert.errors import ConversionError
from convert.hub import (
    HubTarget,
    PushFormat,
    check_access,
    check_directory,
    choose_format,
    push_directory,
)
from convert.model_card import summary_of
from convert.pretrained import check_export, export_pretrained, load_pretrained
from convert.sources import find_checkpoint
from tptt_jax import fix_context


def push_model(
    source: tyro.conf.Positional[Path],
    hub_id: tyro.conf.Positional[str],
    format: PushFormat = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    private: bool = False,
    revision: str | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Pushes a finished run, or what export wrote, to the Hugging Face hub, with its model card.

    All files go up in one commit. The token is that of HF_TOKEN or `hf auth login`.

    Args:
      source: the directory of a run, or of an export.
      hub_id: the repository, e.g. me/my-model; a name alone is below your own. It is made if it
        does not exist.
      format: what a run is exported as, to a temporary directory (TMPDIR). auto: titan if it has a
        window or a memory, else merged. An exported directory is pushed as it is.
      dtype: of the weights of a run; auto: what the base model is stored in (float32 for float64
        and quantised weights). Those of peft are float32 as they were trained.
      private: make the repository private, if it does not exist yet.
      revision: branch to push to; it is made if it does not exist.
      context: fixes rotary frequencies that depend on the length ("dynamic" and "longrope"
        scaling) for texts of this many tokens, as titan needs it; others stay as they are.
    """
    target = HubTarget(name=hub_id, private=private, revision=revision)
    described = find_checkpoint(source)
    again = push_command(source, target, format)
    if described is None:
        if format != "auto" or context is not None:
            raise ConversionError(
                f"{source} is no run, and is pushed as it is: leave --format and --context out."
            )
        files = check_directory(source)
        return push_directory(source, files, check_access(target, again), again)
    check_finished(source)
    target = check_access(target, again)
    model = load_pretrained(source, dtype=dtype)
    model = model if context is None else fix_context(model, context)
    chosen = choose_format(format, model.liza)
    check_export(model, chosen, source)
    with tempfile.TemporaryDirectory(prefix="tptt_jax_push_") as folder:
        exported = Path(folder) / target.name.partition("/")[2]
        export_pretrained(model, exported, chosen, source)
        return {"format": chosen} | push_directory(
            exported, check_directory(exported), target, again
        )


def check_finished(run: Path) -> None:
    """Refuses a run that has not finished.

    Args:
      run: its directory, or its folder of best weights.

    Raises:
      ConversionError: with the command that finishes it.
    """
    step, summary = summary_of(run)
    if summary is None:
        settings = shlex.quote(str(run / "config.yaml"))
        where = "it has no sound checkpoint" if step is None else f"its last step is {step}"
        raise ConversionError(
            f"the run in {run} has not finished ({where}): finish it with python -m "
            f"experiments.finetune --config {settings}, or export what there is and push that "
            "directory."
        )


def push_command(source: Path, target: HubTarget, format: PushFormat) -> str:
    """Says that nothing is lost, and which command pushes again."""
    flags = ["--private"] if target.private else []
    flags += [] if target.revision is None else ["--revision", target.revision]
    flags += [] if format == "auto" else ["--format", format]
    words = ["python", "-m", "convert", "push", str(source), target.name, *flags]
    return f"{source} is complete on disk; to push it: {shlex.join(words)}"
