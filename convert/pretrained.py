"""Loading and exporting models: the public interface of `convert`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from convert.adapters import (
    FittedAdapter,
    check_adapter,
    fit_adapter,
    open_adapter,
    without_copies,
    write_adapter,
)
from convert.bases import has_base, locate_base, resolve_base
from convert.errors import ConversionError
from convert.exporting import check_titan, write_merged, write_titan
from convert.families import family_of
from convert.formats.files import atomic_directory
from convert.loading import load_model
from convert.model_card import find_origin, load_results, write_card
from convert.overwriting import check_overwrite
from convert.sources import Pretrained, Source, find_checkpoint, locate, open_pretrained
from convert.tokenizers import export_tokenizer
from convert.tptt import FittedTptt, check_tptt, fit_tptt, is_tptt, open_tptt, write_tptt
from tptt_jax import CausalLM, LizaConfig, LoraConfig
from tptt_jax.ops.quantization import BaseDtype
from tptt_jax.sharding import RULES
from tptt_jax.training.base_weights import same_base_weights

ExportFormat = Literal["merged", "titan", "peft", "tptt"]
_DTYPES = ("float32", "bfloat16", "float16")


def load_pretrained(
    source: Source,
    liza: LizaConfig | None = None,
    lora: LoraConfig | None = None,
    dtype: DTypeLike | Literal["auto"] = jnp.float32,
    *,
    base_dtype: BaseDtype | None = None,
    adapter: Source | None = None,
    mesh: Mesh | None = None,
    rules: Mapping[str, str] = RULES,
    seed: int = 0,
) -> CausalLM:
    """Loads a pretrained model, and makes a Titan of it if `liza` is given.

    Peak memory is the model plus one tensor.

    Args:
      source: a Hugging Face directory, a hub id ("name" or "name@revision"), a .gguf file, a
        packaged model ("smollm2-135m", "gemma3-270m"), a checkpoint
        directory of our own, which brings its own `liza` and `lora` unless they are given, a
        "titan" export, which brings its `liza` likewise, or a PEFT or tptt directory, which names
        its base model.
      liza: the memory; None: the plain base model, or the memory of a tptt directory.
      lora: adapters; None: none, or those of `adapter`, which a `lora` must agree with.
      dtype: of the base weights: float32, bfloat16, float16, or "auto": the one that the source
        stores them in (float32 for float64 and quantised weights). Adapters are float32.
      base_dtype: "int8", "int4" or "nf4" quantises the base model's matrices while they are read;
        `dtype` is then that of everything else. None: they have `dtype`.
      adapter: a PEFT or tptt directory (its LoRA adapters, or its trained weights) to load on top
        of `source`, whatever base model it names. If it adapts only some of the layers that are
        stacked together, the others get a = b = 0, which has no effect and stays so in training.
      mesh: from `tptt_jax.sharding.make_mesh`; every tensor goes straight to its shards.
        None: the default device.
      rules: where the mesh divides axes of parameters, as those of `shard_model`.
      seed: of parameters that the source lacks: adapters, shares, the memory's own deltas.

    Returns:
      The model.

    Raises:
      ConversionError: if the source cannot be read, is of an unknown family, does not fit its
        configuration, or holds NaN or infinite values; if the adapter does not fit the source or
        has unsupported settings, or its base model cannot be found.
    """
    _check_dtypes(dtype, base_dtype)
    options: Any = {"base_dtype": base_dtype, "mesh": mesh, "rules": rules, "seed": seed}
    if described := find_checkpoint(source):
        if adapter is not None:
            raise ConversionError(
                f"{source} is a checkpoint of ours, which does not take a PEFT adapter: export it "
                'as "merged" and give that directory.'
            )
        # Here, as importing orbax takes a quarter of a second.
        from tptt_jax.training.checkpoint import restore_trainable

        run, base = Path(source).expanduser(), described.source
        liza, lora = liza or described.liza, lora or described.lora
        model = load_pretrained(base, liza, lora, dtype, **options)
        with same_base_weights(run, model, described):
            restore_trainable(run, model)
        return model
    path = locate(source)
    if has_base(path):
        if adapter is not None:
            raise ConversionError(
                f"{source} is an adapter itself; give the base model of {adapter}."
            )
        return load_pretrained(locate_base(path), liza, lora, dtype, adapter=path, **options)
    return _load(open_pretrained(path), liza, lora, dtype, adapter, **options)


def _check_dtypes(dtype: DTypeLike | Literal["auto"], base_dtype: BaseDtype | None) -> None:
    if dtype != "auto" and not _is_supported(dtype):
        raise ConversionError(f"dtype must be one of auto, {', '.join(_DTYPES)}, got {dtype!r}.")
    if base_dtype is not None and base_dtype not in get_args(BaseDtype):
        raise ConversionError(
            f"base_dtype must be None or one of {', '.join(get_args(BaseDtype))}, got "
            f"{base_dtype!r}."
        )


def _load(
    pretrained: Pretrained,
    liza: LizaConfig | None,
    lora: LoraConfig | None,
    dtype: DTypeLike | Literal["auto"],
    adapter: Source | None,
    *,
    base_dtype: BaseDtype | None,
    mesh: Mesh | None,
    rules: Mapping[str, str],
    seed: int,
) -> CausalLM:
    """Loads weights that are no checkpoint of ours and no adapter, and an adapter on top."""
    fitted = None if adapter is None else _fit(locate(adapter), pretrained)
    chosen = lora if fitted is None else fitted.agreed(lora)
    memory = liza or pretrained.liza
    if isinstance(fitted, FittedTptt):
        if base_dtype is not None:
            raise ConversionError(
                f"{adapter} has trained weights of its own, which a base in {base_dtype} cannot "
                "hold: leave base_dtype out."
            )
        memory = fitted.liza if memory is None else memory
    weights = pretrained.stored_dtype if dtype == "auto" else jnp.dtype(dtype)

    def build(base_dtype: BaseDtype | None) -> CausalLM:
        options: Any = {"dtype": weights, "base_dtype": base_dtype, "rngs": nnx.Rngs(seed)}
        return CausalLM(pretrained.config, memory, chosen, **options)

    model = load_model(pretrained, build, mesh, base_dtype, rules)
    if fitted is not None:
        fitted.load_into(model)
    return model


def _is_supported(dtype: DTypeLike) -> bool:
    try:
        return np.dtype(dtype).name in _DTYPES
    except TypeError:
        return False


def _fit(adapter: Path, base: Pretrained) -> FittedAdapter | FittedTptt:
    if is_tptt(adapter):
        return fit_tptt(open_tptt(adapter), base.config)
    opened = without_copies(open_adapter(adapter), base)
    return fit_adapter(opened, base.config, base.family)


def export_pretrained(
    model: CausalLM,
    path: Source,
    format: ExportFormat = "merged",
    source: Source | None = None,
    *,
    overwrite: bool = False,
    results: Source | None = None,
) -> None:
    """Writes a model for others to load.

    The directory appears under its name only when it is complete.

    Args:
      model: the model.
      path: the directory to write.
      format: "merged": a plain Hugging Face model; adapters are merged into the weights, the
        memory is left out. "titan": a Hugging Face model with its memory and the PyTorch file
        that runs it (trust_remote_code=True); adapters are merged as well. "peft": the LoRA
        adapters alone, without the memory and without base weights that were trained
        themselves. "tptt": what the package tptt 0.12.1 loads, adapters and changed weights
        around the base model; only for operator "tptt_reference".
      source: the source of the model. "merged" and "titan" copy its tokenizer and generation
        settings, "merged" also unknown settings of its config.json; None: weights and
        configuration only. "peft" records it as the base model; None: the user of the adapter has
        to name its base. "tptt" needs its base model, a Hugging Face directory or a hub id, as
        tptt reads it again.
      overwrite: whether an earlier model at `path` is replaced. Refused if the model is loaded
        from there, or other files than an export's are there.
      results: results.json of experiments.evaluate, which the model card (README.md) then quotes,
        beside what a run has measured itself and what experiments.evaluate left in its directory.

    Raises:
      ConversionError: if the format is unknown or not available yet, `path` may not be
        replaced, the results are of other models, the family cannot express the model, there
        are no adapters for "peft", the base weights are quantised and not left out, or tptt
        cannot express the memory.
    """
    if format not in ("merged", "titan", "peft", "tptt"):
        raise ConversionError(
            f'format must be "merged", "titan", "peft" or "tptt", got {format!r}.'
        )
    if model.base_dtype is not None and format != "peft":
        raise ConversionError(
            f"the base weights are quantised ({model.base_dtype}), but {format} has them in full "
            "precision: load the model without base_dtype, then export it."
        )
    target = Path(path).expanduser()
    if overwrite:
        check_overwrite(target, source)
    found = None if results is None else load_results(Path(results).expanduser(), str(source))
    is_run = source is not None and find_checkpoint(source) is not None
    run = Path(source).expanduser() if source is not None and is_run else None
    base = None if source is None else resolve_base(source)
    opened = None if base is None or format == "peft" else open_pretrained(locate(base))
    origin = find_origin(base, None if opened is None else opened.path)
    with atomic_directory(target, overwrite=overwrite) as directory:
        if format == "peft":
            write_adapter(model, directory, base)
        elif format == "tptt":
            write_tptt(model, directory, base, opened)
            assert opened is not None, "write_tptt refuses what has no base model"
            export_tokenizer(opened.path, directory)
        else:
            write = write_titan if format == "titan" else write_merged
            write(model, directory, opened, source)
        write_card(directory, target.absolute().name, model, format, origin, found, run)


def check_export(model: CausalLM, format: ExportFormat, source: Source) -> None:
    """Refuses what `export_pretrained` would refuse, without the values of any weight.

    Args:
      model: as it will be exported, with other values.
      format: of `export_pretrained`.
      source: the source of the model.

    Raises:
      ConversionError: if the format cannot express the model.
    """
    base = resolve_base(source)
    if format == "peft":
        check_adapter(model, base)
    elif format == "tptt":
        check_tptt(model, base, open_pretrained(locate(base)))
    elif format == "titan":
        check_titan(model)
    else:
        family_of(model.config.family).config_json(model.config)
