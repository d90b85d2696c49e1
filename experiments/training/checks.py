"""Checks of a run before anything is loaded or written."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from convert.overwriting import needed_paths
from convert.sources import PACKAGED_SOURCES
from experiments.process.output_folder import check_path
from experiments.training.config import FinetuneConfig
from experiments.training.stage import STAGES
from tptt_jax.config import LizaConfig, check_context_axis
from tptt_jax.sharding import make_mesh
from tptt_jax.training.description import Description, is_checkpoint, read_description

if TYPE_CHECKING:
    from jax.sharding import Mesh


def describe_run(config: FinetuneConfig) -> Description:
    """The description of a checkpoint of this run, beside its arrays."""
    source = config.model
    # A relative path would change its meaning in another folder.
    if source not in PACKAGED_SOURCES and Path(source).expanduser().exists():
        source = str(Path(source).expanduser().resolve())
    return Description(
        source=source,
        liza=config.memory,
        lora=config.adapters,
        train=config.train,
        dtype=config.dtype,
        base_dtype=config.base_dtype,
    )


def resumed_description(config: FinetuneConfig) -> Description | None:
    """The description of the run to resume; None: a new one starts."""
    if not config.resume or not is_checkpoint(config.output):
        return None
    return read_description(config.output)


def check_output(
    config: FinetuneConfig, description: Description, written: Description | None
) -> None:
    """Raises if the output directory is no place for a run, or holds another one.

    Args:
      config: of the run.
      description: of the run.
      written: of the run that the output directory holds, from `resumed_description`.

    Raises:
      ValueError: if so.
    """
    output = config.output
    check_path(output)
    if output.resolve() == Path(description.source):
        raise ValueError(f"--output {output} is the model itself: choose another directory.")
    for needed in needed_paths(description.source):
        if output.resolve() == needed:
            raise ValueError(
                f"--output {output} is needed by {config.model}, which was trained on it: choose "
                "another directory."
            )
    for stage in STAGES:
        folder = output / stage / "checkpoints"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, but must be a directory: remove it.")
    if written is not None:
        differences = _differences(written, description)
        if differences:
            raise ValueError(
                f"{output} holds another run ({'; '.join(differences)}): use another --output, or "
                "--no-resume to start again."
            )


def _differences(before: Description, now: Description) -> list[str]:
    """Settings that differ between a run and the current call."""
    names = ("source", "train", "dtype", "base_dtype")
    pairs = [(name, getattr(before, name), getattr(now, name)) for name in names]
    for name in ("liza", "lora"):
        old, new = getattr(before, name), getattr(now, name)
        if old is None or new is None:
            pairs.append(
                (name, "none" if old is None else "given", "none" if new is None else "given")
            )
        else:
            values = dataclasses.asdict(old)
            pairs += [(f"{name}.{k}", values.get(k), v) for k, v in dataclasses.asdict(new).items()]
    return [f"{name}: {a} in the run, {b} now" for name, a, b in pairs if a != b]


def make_run_mesh(config: FinetuneConfig) -> "Mesh | None":
    """The mesh of --mesh, or of several processes all devices; None: one device.

    Raises:
      ValueError: if it is invalid, or a batch or its rows cannot be divided over it, or it leaves
        out devices of a process, or there is none for --mesh-rules.
    """
    layout, count = config.mesh, jax.process_count()
    if layout is None and count > 1:
        layout = f"data={jax.device_count()}"
    if layout is None:
        if config.mesh_rules:
            raise ValueError("--mesh-rules say what a mesh divides: add --mesh, or leave them out.")
        return None
    mesh = make_mesh(layout)
    if count > 1 and mesh.size != jax.device_count():
        raise ValueError(
            f"--mesh {layout} has {mesh.size} of the {jax.device_count()} devices of {count} "
            "processes: with --distributed it must have all of them."
        )
    _check_division(mesh, config.batch_size, config.memory)
    return mesh


def _check_division(mesh: "Mesh", batch_size: int, memory: LizaConfig | None) -> None:
    """Raises if a batch or its rows cannot be divided over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise ValueError(
            f"--batch-size {batch_size} cannot be split evenly over data x fsdp = {shards} "
            "devices: use a multiple."
        )
    check_context_axis(memory, mesh.shape["context"])
