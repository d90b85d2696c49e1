"""The trainable / frozen split: gradients and optimizer state exist for one side only."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tptt_jax.array_typing import Array
from tptt_jax.decoder import is_memory
from tptt_jax.layers.parameters import AddedParam, MemoryParam
from tptt_jax.model import CausalLM, MagShare

TrainMode = Literal["lora", "projections", "full", "memory"]
Path = tuple[Any, ...]

# Parameters by dotted path, e.g. "stacks.0.layers.0.self_attn.q_proj.lora.a".
Trainable = dict[str, Array]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def is_trainable(mode: TrainMode, path: Path, variable: nnx.Variable) -> bool:
    """Whether a parameter is trained.

    Args:
      mode: "lora": adapters and the memory's own parameters;
        "projections": those and the q, k, v, o projections themselves (the paper's
        LoRA-minus); "full": every parameter; "memory": the memory's own parameters alone.
      path: of the variable in the model.
      variable: the variable.
    """
    if mode == "memory":
        return isinstance(variable, MemoryParam)
    if isinstance(variable, AddedParam):
        return True
    if not isinstance(variable, nnx.Param):
        return False
    if mode == "projections":
        return "self_attn" in path and any(name in path for name in _PROJECTIONS)
    return mode == "full"


@dataclass(frozen=True)
class Partition:
    """A model split into trainable and frozen parameters.

    Attributes:
      graphdef: its static side.
      template: abstract variables of the trainable side, by dotted name.
      frozen: all other variables except the scheduled share.
      has_share: whether the model has a scheduled share.
    """

    graphdef: nnx.GraphDef
    template: dict[str, tuple[Path, nnx.Variable]]
    frozen: nnx.State
    has_share: bool

    def names(self, kind: type[nnx.Variable]) -> frozenset[str]:
        """The dotted paths of the trainable parameters of a type, such as `MemoryParam`."""
        return frozenset(
            name for name, (_, variable) in self.template.items() if isinstance(variable, kind)
        )

    def merge(self, trainable: Trainable, share: Array | None, frozen: nnx.State) -> CausalLM:
        """Rebuilds the model with these values; may be called under jit."""
        flat = [
            (path, variable.replace(trainable[name]))
            for name, (path, variable) in self.template.items()
        ]
        states = [nnx.from_flat_state(flat), frozen]
        if share is not None:
            states.append(nnx.State({"mag_share": MagShare(share, axes=())}))
        return nnx.merge(self.graphdef, *states)


def split_trainable(model: CausalLM, mode: TrainMode) -> tuple[Partition, Trainable, Array | None]:
    """Splits a model into trainable and frozen parameters.

    Args:
      model: shares its arrays with the result.
      mode: see `is_trainable`.

    Returns:
      The partition, the trainable parameters in float32 (masters, whatever the
      model's dtype), and the scheduled share or None.

    Raises:
      ValueError: if nothing is trainable, or quantised weights would have to be.
    """
    if mode in ("projections", "full") and model.base_dtype is not None:
        raise ValueError(
            f'train="{mode}" needs base weights in full precision, not in {model.base_dtype}: '
            'train="lora", or load the model without base_dtype.'
        )
    graphdef, chosen, _, frozen = nnx.split(
        model, lambda path, x: is_trainable(mode, path, x), MagShare, ...
    )
    flat = nnx.to_flat_state(chosen)
    if not flat:
        raise ValueError(
            f'train="{mode}" finds nothing to train: give LoRA targets, or use "projections" '
            'or "full".'
        )
    trainable = {dotted(path): x.get_value().astype(jnp.float32) for path, x in flat}
    template = {
        dotted(path): (path, x.replace(jax.ShapeDtypeStruct(x.get_value().shape, jnp.float32)))
        for path, x in flat
    }
    value = None if model.mag_share is None else model.mag_share.get_value()
    return Partition(graphdef, template, frozen, value is not None), trainable, value


def restore_targets(
    model: CausalLM, shapes: dict[str, tuple[int, ...]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Restore targets for saved values of these shapes, with the model's dtypes and shardings.

    Args:
      model: has every parameter that `shapes` names.
      shapes: by dotted path.

    Raises:
      ValueError: if a parameter is missing in the model or has another shape.
    """
    flat = {dotted(path): x.get_value() for path, x in nnx.to_flat_state(nnx.state(model))}
    for name, shape in shapes.items():
        if model.base_dtype is not None and name not in flat and _is_base_weight(name):
            raise ValueError(
                f"the checkpoint has trained {name}, which a base in {model.base_dtype} cannot "
                "hold: leave base_dtype out, or export the run as merged and load that."
            )
        expected = flat[name].shape if name in flat else None
        if expected != tuple(shape):
            raise ValueError(
                f"the checkpoint's {name} has shape {tuple(shape)}, the model expects {expected}: "
                "load it with the model and the settings it was trained with."
            )
    return {name: _like(flat[name]) for name in shapes}


def load_trainable(model: CausalLM, values: Trainable, share: Array | None) -> None:
    """Loads trained values into a model, in place.

    Args:
      model: has every parameter that `values` names.
      values: arrays by dotted path.
      share: the scheduled share, or None.

    Raises:
      ValueError: if a parameter is missing in the model or has another shape.
    """
    restore_targets(model, {name: value.shape for name, value in values.items()})
    flat = {dotted(path): (path, x) for path, x in nnx.to_flat_state(nnx.state(model))}
    changed = [(flat[name][0], flat[name][1].replace(value)) for name, value in values.items()]
    if share is not None and model.mag_share is not None:
        changed.append((("mag_share",), model.mag_share.replace(share)))
    nnx.update(model, nnx.from_flat_state(changed))


def _is_base_weight(name: str) -> bool:
    """Whether a dotted path names a weight of the pretrained model."""
    path = tuple(name.split("."))
    return "lora" not in path and not is_memory(path)


def dotted(path: Path) -> str:
    """("stacks", 0, "layers") -> "stacks.0.layers"."""
    return ".".join(str(part) for part in path)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
