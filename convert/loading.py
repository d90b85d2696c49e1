"""Filling a model's parameters from a checkpoint, one tensor at a time."""

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from convert.errors import ConversionError, listing
from convert.formats.tensors import empty_aligned
from convert.plan import Conversion, Slot, build_plan, check_tensors, match_names
from convert.progress import track
from convert.quantizing import quantize_tensor, quantized_weights
from convert.rules import Rule
from convert.sources import Pretrained
from tptt_jax import CausalLM
from tptt_jax.array_typing import Array
from tptt_jax.decoder import is_memory, layer_location, memory_location
from tptt_jax.layers.parameters import BaseParam
from tptt_jax.layers.quantized import QuantizedWeight
from tptt_jax.ops.devices import platform_of
from tptt_jax.ops.quantization import BaseDtype, are_finite
from tptt_jax.processes import put
from tptt_jax.sharding import RULES, sharding_of

Variables = dict[str, tuple[tuple[Any, ...], nnx.Variable]]
"""Path in the model and variable, by dot-joined path."""

_ELEMENTS_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 64


def variables_of(model: nnx.Module) -> Variables:
    """Every variable of a model, abstract or not."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): (path, variable) for path, variable in flat}


def is_base(variable: nnx.Variable) -> bool:
    """Whether a variable is a weight of the pretrained model."""
    return isinstance(variable, BaseParam)


def plan_for(
    rules: Sequence[Rule], model: CausalLM, variables: Variables, *, memory: bool = False
) -> tuple[Conversion, ...]:
    """Applies a key table to the base weights of a model, abstract or not (see `build_plan`).

    With `memory`, also to the memory's own parameters; adapters of projections never count.
    """
    shapes = {
        name: tuple(variable.get_value().shape)
        for name, (_, variable) in variables.items()
        if is_base(variable) or (memory and ".lora." not in name)
    }

    def locate(layer: int, path: str) -> tuple[int, int] | None:
        if is_memory(tuple(path.split("."))):
            return memory_location(model.config, model.liza, layer)
        return layer_location(model.config, layer)

    return build_plan(rules, shapes, model.config.num_layers, locate)


def load_model(
    pretrained: Pretrained,
    build: Callable[[BaseDtype | None], CausalLM],
    mesh: Mesh | None,
    base_dtype: BaseDtype | None = None,
    rules: Mapping[str, str] = RULES,
) -> CausalLM:
    """Builds a model with the weights of a checkpoint.

    Beside the result, memory holds one tensor at a time. `build` initialises the parameters that
    the checkpoint lacks (adapters; for a base model also shares and the memory's own deltas).

    Args:
      pretrained: the opened checkpoint.
      build: creates the model with random weights, quantised or not; only traced, never run.
      mesh: where the parameters go; None: the default device.
      base_dtype: quantises its matrices, tensor by tensor; None: they stay as they are.
      rules: from axes of parameters to axes of the mesh.

    Returns:
      The model.

    Raises:
      ConversionError: if tensors are missing, unexpected or misshapen, or hold NaN or Inf.
    """
    plain = nnx.eval_shape(lambda: build(None))
    memory = pretrained.liza is not None
    plan = plan_for(pretrained.rules, plain, variables_of(plain), memory=memory)
    plan = match_names(plan, pretrained.tensors.tensors, pretrained.family.prefix)
    check_tensors(plan, pretrained.tensors.tensors, pretrained.is_ignored)
    _check_tied_head(pretrained, plan)
    abstract = plain if base_dtype is None else nnx.eval_shape(lambda: build(base_dtype))
    variables = variables_of(abstract)
    shardings = {
        name: None if mesh is None else sharding_of(variable, mesh, rules)
        for name, (_, variable) in variables.items()
    }
    store = _Store(variables, shardings, quantized_weights(abstract))
    values = _read_parameters(pretrained, plan, store)
    others = [name for name in variables if name not in values]
    values |= _init_others(lambda: build(base_dtype), others, shardings)
    flat = [(path, variable.replace(values[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(nnx.graphdef(abstract), nnx.from_flat_state(flat))


def _check_tied_head(pretrained: Pretrained, plan: Sequence[Conversion]) -> None:
    """Checks that the head of a tied checkpoint, if stored, equals the embedding."""
    names = {target: rule.sources[0] for rule in pretrained.rules for target in rule.targets}
    head = names.get("lm_head.kernel")
    if head is None or not pretrained.config.tie_embeddings:
        return
    # The plan knows whether names in the checkpoint have a prefix.
    (embedding,) = (
        move.sources[0] for move in plan for slot in move.slots if slot.path == "embed.embedding"
    )
    tensors = pretrained.tensors
    if head in tensors.tensors and not np.array_equal(
        tensors.read(head), tensors.read(embedding), equal_nan=True
    ):
        raise ConversionError(
            f"{pretrained.path} ties the head to the embedding (tie_word_embeddings) but stores "
            f"another {head}; if the head is right, set tie_word_embeddings to false in "
            "config.json, otherwise remove the tensor."
        )


def _read_parameters(
    pretrained: Pretrained, plan: Sequence[Conversion], store: "_Store"
) -> dict[str, Array]:
    invalid: list[str] = []
    sizes = [sum(pretrained.tensors.tensors[name].nbytes for name in move.sources) for move in plan]
    for move in track(plan, "Reading weights", sizes):
        stored = [pretrained.tensors.read(name) for name in move.sources]
        arrays = list(move.transform.forward(stored, [slot.shape for slot in move.slots]))
        del stored
        for slot in move.slots:
            # Free the host buffer before copying to the device: hence lists, and the waits.
            if not store.add(slot, [arrays.pop(0)]):
                invalid.extend(move.sources)
    if invalid:
        raise ConversionError(
            f"{pretrained.path} holds NaN or infinite values (or too large ones for the chosen "
            f"dtype) in {listing(set(invalid))}: fetch or train them again, or choose float32."
        )
    return store.values | jax.device_put(store.stacks)


class _Store:
    """Parameters while they are read: on their devices, or stacked in host memory."""

    def __init__(
        self,
        variables: Variables,
        shardings: Mapping[str, NamedSharding | None],
        quantized: Mapping[str, QuantizedWeight],
    ) -> None:
        """Takes the model's abstract variables, where they go, and its quantised matrices."""
        self._variables, self._shardings = variables, shardings
        self._quantized = quantized
        self.values: dict[str, Array] = {}
        self.stacks: dict[str, np.ndarray] = {}

    def add(self, slot: Slot, arrays: list[np.ndarray]) -> bool:
        """Stores a tensor, the only one of the list, which is emptied; False: it is not finite."""
        weight = self._quantized.get(slot.path)
        if weight is None:
            return self._add(slot.path, slot.index, arrays)
        codes, scales = quantize_tensor(arrays.pop(0), weight)
        if not are_finite(scales, weight.format):
            return False
        names = (f"{slot.path}.codes", f"{slot.path}.scales")
        added = [
            self._add(names[0], slot.index, [codes]),
            self._add(names[1], slot.index, [scales]),
        ]
        return all(added)

    def _add(self, name: str, index: tuple[int, ...], arrays: list[np.ndarray]) -> bool:
        template, sharding = self._variables[name][1].get_value(), self._shardings[name]
        on_host = bool(index) and _adopts_host_memory(sharding)
        part = _host_part(self.stacks, name, index, template) if on_host else None
        array, is_finite = _cast(arrays.pop(0), template.dtype, part)
        if not is_finite or on_host:
            return is_finite
        if not index:
            self.values[name] = put(array, sharding).block_until_ready()
        else:
            _put_part(self.values, name, index, template, array, sharding)
        return True


def _adopts_host_memory(sharding: NamedSharding | None) -> bool:
    """Whether parameters stay in the host buffers: no copy, and no program for each shape."""
    return sharding is None and platform_of() == "cpu"


def _host_part(
    stacks: dict[str, np.ndarray], name: str, index: tuple[int, ...], template: Array
) -> np.ndarray:
    """The view of one layer, or of one of its experts, in a stacked parameter."""
    if name not in stacks:
        stacks[name] = empty_aligned(template.shape, template.dtype)
    # Ellipsis: a view even if the part is a single number.
    return stacks[name][(*index, ...)]


def _put_part(
    values: dict[str, Array],
    name: str,
    index: tuple[int, ...],
    template: Array,
    array: np.ndarray,
    sharding: NamedSharding | None,
) -> None:
    """Writes a part into the stacked parameter on its devices."""
    if name not in values:
        values[name] = jnp.zeros(template.shape, template.dtype, device=sharding)
    part = put(array, _part_sharding(sharding, len(index)))
    update, place = _part_update(sharding), np.array(index, np.int32)
    values[name] = update(values[name], part, place).block_until_ready()


def _cast(
    array: np.ndarray, dtype: np.dtype, result: np.ndarray | None = None
) -> tuple[np.ndarray, bool]:
    """The array in the model's dtype and memory order, and whether all of it is finite.

    Works part by part, as NumPy would allocate temporary arrays of the whole size.

    Args:
      array: the stored array.
      dtype: the model's.
      result: the destination; None: a new array, or the given one if it fits.
    """
    if result is None and array.dtype == dtype and array.flags.c_contiguous:
        result = array
    elif result is None:
        result = empty_aligned(array.shape, dtype)
    # Copying a transposed array is twice as fast if its own rows stay in the cache.
    is_transposed = array.flags.f_contiguous and not array.flags.c_contiguous
    source, into = (array.T, result.T) if is_transposed else (array, result)
    if array.ndim == 0:
        source, into = source[None], into[None]
    step = _ROWS_AT_ONCE if is_transposed else _rows_at_once(source)
    is_finite = True
    for begin in range(0, len(source), step):
        part = slice(begin, begin + step)
        if result is not array:
            # A value too large for float16 becomes Inf, which is reported.
            with np.errstate(over="ignore"):
                np.copyto(into[part], source[part], casting="unsafe")
        is_finite = is_finite and bool(np.isfinite(into[part]).all())
    return result, is_finite


def _rows_at_once(array: np.ndarray) -> int:
    return max(1, _ELEMENTS_AT_ONCE // max(1, prod(array.shape[1:])))


def _part_sharding(sharding: NamedSharding | None, depth: int) -> NamedSharding | None:
    """The sharding of one layer, or of one of its experts, in a stacked parameter."""
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[depth:]))


@functools.cache
def _part_update(sharding: Sharding | None) -> Callable[[Array, Array, np.ndarray], Array]:
    """Writes one layer, or one of its experts, into a stacked parameter in place."""

    def update(stack: Array, part: Array, index: Array) -> Array:
        depth = stack.ndim - part.ndim
        start = [index[axis] for axis in range(depth)] + [0] * part.ndim
        return lax.dynamic_update_slice(stack, part[(None,) * depth], start)

    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def _init_others(
    build: Callable[[], CausalLM],
    names: Sequence[str],
    shardings: Mapping[str, NamedSharding | None],
) -> dict[str, Array]:
    """Initialises some variables of a model; XLA removes the computation of the others."""
    if not names:
        return {}

    def init() -> dict[str, Array]:
        variables = variables_of(build())
        return {name: variables[name][1].get_value() for name in names}

    return jax.jit(init, out_shardings={name: shardings[name] for name in names})()
