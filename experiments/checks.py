"""What is checked of a run before anything is loaded or written."""

from pathlib import Path
from typing import TYPE_CHECKING

from convert.demo import PACKAGED_SOURCES
from experiments.arguments import FinetuneConfig
from tptt_jax.training.description import Description, is_checkpoint, read_description

if TYPE_CHECKING:
    from jax.sharding import Mesh


def describe_run(config: FinetuneConfig) -> Description:
    """What a checkpoint of this run needs besides its arrays."""
    source = config.model
    # A relative path means another place from another folder.
    if source not in PACKAGED_SOURCES and Path(source).expanduser().exists():
        source = str(Path(source).expanduser().resolve())
    return Description(
        source=source,
        liza=config.memory,
        lora=config.adapters,
        train=config.train,
        dtype=config.dtype,
    )


def check_output(config: FinetuneConfig, description: Description) -> None:
    """Raises if the output directory holds another run."""
    output = config.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: name a directory.")
    if output.resolve() == Path(description.source):
        raise ValueError(f"--output {output} is the model itself: name another directory.")
    if is_checkpoint(output) and config.resume and read_description(output) != description:
        raise ValueError(
            f"{output} holds a run with another model or other settings: use another --output, "
            "or --no-resume to start again."
        )


def check_rows(batch_size: int, mesh: "Mesh | None") -> None:
    """Raises if a batch cannot be split evenly over the mesh."""
    if mesh is None:
        return
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise ValueError(
            f"--batch-size {batch_size} cannot be split evenly over data x fsdp = {shards} "
            "devices: use a multiple."
        )
