"""Loading and exporting models: the public face of `convert`."""

from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from convert.errors import ConversionError
from convert.exporting import write_merged
from convert.files import atomic_directory
from convert.loading import load_model
from convert.sources import Pretrained, Source, find_checkpoint, locate, open_pretrained
from tptt_jax import CausalLM, LizaConfig, LoraConfig
from tptt_jax.training.checkpoint import restore_trainable

ExportFormat = Literal["merged", "titan", "peft", "tptt"]
_DTYPES = ("float32", "bfloat16", "float16")


def load_pretrained(
    source: Source,
    liza: LizaConfig | None = None,
    lora: LoraConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
) -> CausalLM:
    """Loads a pretrained model, and makes a Titan of it if `liza` is given.

    Peak memory is the model plus one tensor.

    Args:
      source: a Hugging Face directory, a hub id, a .gguf file, "demo", or a checkpoint
        directory of our own, which brings its own `liza` and `lora` unless they are given.
      liza: the memory; None: the plain base model.
      lora: adapters; None: none.
      dtype: of the base weights: float32, bfloat16 or float16. Adapters are float32.
      mesh: from `tptt_jax.sharding.make_mesh`; every tensor goes straight to its shards.
        None: the default device.
      seed: of what the source does not hold: adapters, shares, the memory's own deltas.

    Returns:
      The model.

    Raises:
      ConversionError: if the source cannot be read, is of an unknown family, does not fit its
        configuration, or holds NaN or infinite values.
    """
    if np.dtype(dtype).name not in _DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if described := find_checkpoint(source):
        liza, lora = liza or described.liza, lora or described.lora
        model = load_pretrained(described.source, liza, lora, dtype, mesh=mesh, seed=seed)
        restore_trainable(Path(source).expanduser(), model)
        return model
    pretrained = open_pretrained(locate(source))

    def build() -> CausalLM:
        rngs = nnx.Rngs(seed)
        return CausalLM(pretrained.config, liza, lora, dtype=jnp.dtype(dtype), rngs=rngs)

    return load_model(pretrained, build, mesh)


def export_pretrained(
    model: CausalLM,
    path: Source,
    format: ExportFormat = "merged",
    source: Source | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model for others to load.

    The directory appears under its name only when it is complete.

    Args:
      model: the model.
      path: the directory to write.
      format: "merged": a plain Hugging Face model; adapters are merged into the weights, the
        memory is left out.
      source: what the model was loaded from; its tokenizer, its generation settings and what
        its config.json says beyond our configuration go along. None: weights and
        configuration only.
      overwrite: whether an earlier model at `path` is replaced.

    Raises:
      ConversionError: if the format is unknown or not available yet, `path` may not be
        replaced, or the family cannot express the model.
    """
    if format in ("titan", "peft", "tptt"):
        raise ConversionError(f'format "{format}" is not available yet; use "merged".')
    if format != "merged":
        raise ConversionError(f'format must be "merged", got {format!r}.')
    base = None if source is None else _open_base(source)
    with atomic_directory(Path(path).expanduser(), overwrite=overwrite) as directory:
        write_merged(model, directory, base)


def _open_base(source: Source) -> Pretrained:
    while described := find_checkpoint(source):
        source = described.source
    return open_pretrained(locate(source))
