"""Inputs and operands of the kernels, and how they are called."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.ops.delta_product.kernels.tiles import Cut

try:
    from jax.experimental.pallas import triton
except ImportError:  # Later releases of JAX will drop it.
    triton = None

# Kernels see arrays by name; absent ones are None.
Refs = SimpleNamespace
# Columns of a tile; wider arrays are processed in parts, as they do not fit into registers.
COLUMNS = 64


class KernelInputs(NamedTuple):
    """Rows of whole chunks; V = T * N virtual tokens; N, D and Dv are powers of 2.

    Attributes:
      q: queries [B, T, H, D].
      k: keys [B, V, K, D].
      v: values [B, V, K, Dv].
      beta: write gate [B, K, V], or [B, V, K, D] per channel.
      state: before the first chunk [B, K, D, Dv], float32.
      log_decay: [B, K, T], float32; None: nothing decays.
      ordinals: document of each token [B, T], counted from 0; None: a row is one document.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B V K D"]
    v: Float[Array, "B V K Dv"]
    beta: Float[Array, "B K V"] | Float[Array, "B V K D"]
    state: Float[Array, "B K D Dv"]
    log_decay: Float[Array, "B K T"] | None
    ordinals: Int[Array, "B T"] | None


class Operand(NamedTuple):
    """An array of a kernel.

    Attributes:
      array: or its shape and dtype, of an output; None: it is absent.
      block: block of one program; axes that are None are dropped.
      place: the block of program (x, KV head, row), in blocks along every axis.
    """

    array: Array | jax.ShapeDtypeStruct | None
    block: tuple[int | None, ...]
    place: Callable[..., tuple[Any, ...]]


class Layout(NamedTuple):
    """Operands of programs (chunk, KV head, row), or of those that see all chunks of a row.

    Attributes:
      cut: of a row.
      inputs: give all sizes.
      whole: whether a program sees all chunks, and `COLUMNS` of the values' channels.
    """

    cut: Cut
    inputs: KernelInputs
    whole: bool = False

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return self.inputs.q.shape[1] // self.cut.tokens

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.inputs.q.shape[2] // self.inputs.k.shape[2]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs."""
        batch, _, kv_heads, value_dim = self.inputs.v.shape
        x = -(-value_dim // self._width(value_dim)) if self.whole else self.chunks
        return x, kv_heads, batch

    def reads(self, array: Any, *, split: bool = False) -> Operand:
        """[B, T, H, X], of which a program sees the heads of its group; split: some columns."""
        return self._rows(array, self.cut.tokens, self.group, split)

    def writes(self, array: Any, *, split: bool = False) -> Operand:
        """[B, V, K, X]."""
        return self._rows(array, self.cut.writes, None, split)

    def intermediate(self, array: Any, *, split: bool = False) -> Operand:
        """[B, K, V, X], the layout of intermediate results."""
        if array is None:
            return Operand(None, (), lambda *_: ())
        size, width = self._size(self.cut.writes), array.shape[-1]
        if self.whole:
            width = self._width(width) if split else width
            return Operand(
                array, (None, None, size, width), lambda x, h, b: (b, h, 0, x if split else 0)
            )
        return Operand(array, (None, None, size, width), lambda c, h, b: (b, h, c, 0))

    def numbers(self, array: Any, of_chunk: int) -> Operand:
        """[B, K, chunks * of_chunk]; a program of one chunk with one number sees a scalar."""
        whole, single = self.whole, of_chunk == 1 and not self.whole
        block = (None, None, None if single else self._size(of_chunk))
        return Operand(array, block, lambda c, h, b: (b, h, 0 if whole else c))

    def documents(self, array: Any, of_chunk: int) -> Operand:
        """[B, chunks * of_chunk], of programs of one chunk."""
        return Operand(array, (None, of_chunk), lambda c, h, b: (b, c))

    def beta(self, array: Any) -> Operand:
        """The write gate."""
        if array.ndim == 3:
            return self.numbers(array, self.cut.writes)
        return self.writes(array)

    def states(self, array: Any) -> Operand:
        """[B, K, n, D, Dv]."""
        *_, dim, width = array.shape
        if self.whole:
            block = (None, None, self.chunks, dim, self._width(width))
            return Operand(array, block, lambda x, h, b: (b, h, 0, 0, x))
        return Operand(array, (None, None, None, dim, width), lambda c, h, b: (b, h, c, 0, 0))

    def state(self, array: Any) -> Operand:
        """[B, K, D, Dv], of programs that see all chunks."""
        *_, dim, width = array.shape
        return Operand(array, (None, None, dim, self._width(width)), lambda x, h, b: (b, h, 0, x))

    def new_intermediate(self, width: int) -> jax.ShapeDtypeStruct:
        """An output for `intermediate`."""
        batch, writes, kv_heads, _ = self.inputs.k.shape
        return jax.ShapeDtypeStruct((batch, kv_heads, writes, width), self.cut.products.dtype)

    def new_states(self) -> jax.ShapeDtypeStruct:
        """An output for `states`."""
        batch, kv_heads, dim, value_dim = self.inputs.state.shape
        shape = (batch, kv_heads, self.chunks, dim, value_dim)
        return jax.ShapeDtypeStruct(shape, self.cut.products.dtype)

    def _rows(self, array: Any, of_chunk: int, heads: int | None, split: bool) -> Operand:
        width = array.shape[-1]
        width = self._width(width) if split else width
        whole = self.whole

        def place(x: Any, h: Any, b: Any) -> tuple[Any, ...]:
            return (b, 0, h, x if split else 0) if whole else (b, x, h, 0)

        return Operand(array, (None, self._size(of_chunk), heads, width), place)

    def _size(self, of_chunk: int) -> int:
        return of_chunk * self.chunks if self.whole else of_chunk

    def _width(self, width: int) -> int:
        return min(COLUMNS, width)


def run_kernel(
    name: str,
    body: Callable[[Refs, Refs], None],
    layout: Layout,
    inputs: Mapping[str, Operand],
    outputs: Mapping[str, Operand],
    *,
    warps: int = 4,
    stages: int = 1,
) -> Refs:
    """Runs `body` with references to its blocks, by name, once for every program of the grid.

    Args:
      name: of the kernel, for profiles.
      body: reads from its first and writes to its second argument.
      layout: gives the grid.
      inputs: by name.
      outputs: by name.
      warps: of a program; eight take longer for every one of the kernels.
      stages: of the compiler's pipeline of loads, for bodies with a loop.

    Returns:
      The outputs by name.
    """
    given = {key: each for key, each in inputs.items() if each.array is not None}
    present = {key: each for key, each in outputs.items() if each.array is not None}
    nothing = dict.fromkeys([*inputs, *outputs])

    def kernel(*refs: Any) -> None:
        sources = dict(zip(given, refs[: len(given)], strict=True))
        targets = dict(zip(present, refs[len(given) :], strict=True))
        body(Refs(**nothing | sources), Refs(**nothing | targets))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(_array, present.values())]
    params = None
    if triton is not None:
        params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    made = pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=[pl.BlockSpec(each.block, each.place) for each in given.values()],
        out_specs=[pl.BlockSpec(each.block, each.place) for each in present.values()],
        out_shape=shapes,
        interpret=layout.cut.products.interpret,
        compiler_params=params,
        name=f"delta_product_{name}",
    )(*map(_array, given.values()))
    return Refs(**nothing | dict(zip(present, made, strict=True)))


def _array(operand: Operand) -> Any:
    return operand.array


def read_wide(ref: Any, *where: Any) -> Any:
    """A block or a part of it, in float32."""
    return (ref[where] if where else ref[...]).astype(jnp.float32)


def columns_of(ref: Any) -> list[slice]:
    """Parts of a block's last axis, to be worked on one after the other."""
    width = ref.shape[-1]
    return [slice(i, min(i + COLUMNS, width)) for i in range(0, width, COLUMNS)]
