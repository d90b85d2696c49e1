"""What the kernels work on, and how they are called."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.ops.kernels.tiles import Cut

try:
    from jax.experimental.pallas import triton
except ImportError:  # Later releases of JAX are to drop it.
    triton = None

# Kernels see arrays by name; what is absent is None.
Refs = SimpleNamespace
# Columns of a tile; wider ones are worked on in parts, or do not fit into registers.
COLUMNS = 64


class Carries(NamedTuple):
    """Factors between a chunk's tokens and its ends; n chunks.

    Attributes:
      into_reads: what token t finds of the state before its chunk [B, K, T].
      into_writes: what virtual token i finds of it [B, K, V].
      out_of_writes: what the state after the chunk holds of what virtual token i wrote.
      through: what it holds of the state before [B, K, n].
    """

    into_reads: Float[Array, "B K T"]
    into_writes: Float[Array, "B K V"]
    out_of_writes: Float[Array, "B K V"]
    through: Float[Array, "B K n"]


class Ordinals(NamedTuple):
    """Documents of tokens [B, T] and of virtual tokens [B, V]."""

    reads: Int[Array, "B T"]
    writes: Int[Array, "B V"]


class KernelInputs(NamedTuple):
    """Rows of whole chunks; V = T * N virtual tokens; sizes are powers of 2 but B, T, H, K.

    Attributes:
      q: queries [B, T, H, D].
      k: keys [B, V, K, D].
      v: values [B, V, K, Dv].
      beta: write gate [B, K, V], or [B, V, K, D] per channel.
      state: before the first chunk [B, K, D, Dv], float32.
      decay: logarithm of what each virtual token leaves [B, K, V]; None: everything.
      carries: factors; None: all are 1.
      ordinals: None: every row is one document.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B V K D"]
    v: Float[Array, "B V K Dv"]
    beta: Float[Array, "B K V"] | Float[Array, "B V K D"]
    state: Float[Array, "B K D Dv"]
    decay: Float[Array, "B K V"] | None
    carries: Carries | None
    ordinals: Ordinals | None


class Operand(NamedTuple):
    """An array of a kernel.

    Attributes:
      array: or its shape and dtype, of an output; None: it is absent.
      block: that one program sees; axes that are None are gone.
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
      whole: whether a program sees all chunks, and `columns` of the values' channels.
      columns: of a program of that kind.
    """

    cut: Cut
    inputs: KernelInputs
    whole: bool = False
    columns: int = COLUMNS

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

    def made(self, array: Any, *, split: bool = False) -> Operand:
        """[B, K, V, X], as kernels write what only they read."""
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

    def new_made(self, width: int) -> jax.ShapeDtypeStruct:
        """An output for `made`."""
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
        return min(self.columns, width)


def run_kernel(
    name: str,
    body: Callable[[Refs, Refs], None],
    layout: Layout,
    inputs: Mapping[str, Operand],
    outputs: Mapping[str, Operand],
    *,
    stages: int = 1,
) -> Refs:
    """Runs `body` with references to its blocks, by name, once for every program of the grid.

    Args:
      name: of the kernel, for profiles.
      body: reads from its first and writes to its second argument.
      layout: gives the grid.
      inputs: by name.
      outputs: by name.
      stages: of the compiler's pipeline of loads, for bodies with a loop.

    Returns:
      The outputs by name.
    """
    given = {key: each for key, each in inputs.items() if each.array is not None}
    wanted = {key: each for key, each in outputs.items() if each.array is not None}
    nothing = dict.fromkeys([*inputs, *outputs])

    def kernel(*refs: Any) -> None:
        sources = dict(zip(given, refs[: len(given)], strict=True))
        targets = dict(zip(wanted, refs[len(given) :], strict=True))
        body(Refs(**nothing | sources), Refs(**nothing | targets))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(_array, wanted.values())]
    # Eight warps take longer for every one of the kernels.
    params = None if triton is None else triton.CompilerParams(num_warps=4, num_stages=stages)
    made = pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=[pl.BlockSpec(each.block, each.place) for each in given.values()],
        out_specs=[pl.BlockSpec(each.block, each.place) for each in wanted.values()],
        out_shape=shapes,
        interpret=layout.cut.products.interpret,
        compiler_params=params,
        name=f"delta_product_{name}",
    )(*map(_array, given.values()))
    return Refs(**nothing | dict(zip(wanted, made, strict=True)))


def _array(operand: Operand) -> Any:
    return operand.array


def read_all(ref: Any) -> Any:
    """The whole block; None if it is absent."""
    return None if ref is None else ref[...]


def read_wide(ref: Any) -> Any:
    """The whole block in float32."""
    return None if ref is None else ref[...].astype(jnp.float32)
