"""The linear memory as a separate attention layer, for any NNX model."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Bool, Hidden, Int, SegmentIds
from tptt_jax.config import LizaConfig
from tptt_jax.layers.cache import MemoryState, init_memory_state
from tptt_jax.layers.dropout import choose_dropout_key
from tptt_jax.layers.lora import Projection
from tptt_jax.layers.memory import DeltaMemory, MemoryTokens
from tptt_jax.layers.parameters import JoinedHeads
from tptt_jax.ops.placement import constrain


class LinearAttention(nnx.Module):
    """DeltaProduct attention with its own projections, for any NNX model.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = LinearAttention(32, num_heads=4, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 7, 32))).shape
      (2, 7, 32)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        config: LizaConfig | None = None,
        beta_max: float = 1.0,
        bidirectional: bool = False,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates q, k, v and output projections.

        Args:
          embed_dim: width E of the input and output.
          num_heads: query heads.
          num_kv_heads: key/value heads, each with one state; None: num_heads.
          head_dim: None: embed_dim / num_heads.
          config: operator, gates, chunk size, precision; its mixing fields are not used, and
            writes must be "all". None: LizaConfig(writes="all").
          beta_max: upper end of the write gates' range, at most 2. Above 1 a Householder step can
            flip the direction of its key, as tracking a state needs (arXiv:2411.12537).
          bidirectional: for encoders: the mean of a pass forwards and one backwards.
          use_bias: biases on all four projections.
          dtype: of the parameters.
          rngs: for the initial values.

        Raises:
          ValueError: if the head counts do not divide, the config evicts tokens, or beta_max is out
            of range.
        """
        config = LizaConfig(writes="all") if config is None else config
        if config.writes != "all":
            raise ValueError(
                'the layer has no window from which tokens could be evicted: use writes="all".'
            )
        _check_beta_max(beta_max, config)
        num_kv_heads = num_kv_heads or num_heads
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim ({embed_dim}) is no multiple of num_heads ({num_heads}): give head_dim."
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})."
            )
        self.head_dim = head_dim or embed_dim // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.bidirectional = bidirectional
        self.deterministic = True  # train() and eval() change it

        def projection(name: str, size: tuple[int, int], axes: tuple[str, str]) -> Projection:
            return Projection(*size, path=name, axes=axes, bias=use_bias, dtype=dtype, rngs=rngs)

        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        heads, kv_heads = JoinedHeads("heads", num_heads), JoinedHeads("kv_heads", num_kv_heads)
        self.q_proj = projection("q_proj", (embed_dim, width), ("embed", heads))
        self.k_proj = projection("k_proj", (embed_dim, kv_width), ("embed", kv_heads))
        self.v_proj = projection("v_proj", (embed_dim, kv_width), ("embed", kv_heads))
        self.o_proj = projection("o_proj", (width, embed_dim), (heads, "embed"))
        self.memory = DeltaMemory(
            embed_dim,
            num_heads,
            num_kv_heads,
            self.head_dim,
            config,
            beta_max=beta_max,
            bidirectional=bidirectional,
            rngs=rngs,
        )

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        def heads(projection: Projection, axis: str) -> Array:
            y = projection(x).reshape(*x.shape[:2], -1, self.head_dim)
            return constrain(y, "rows", "tokens", axis, None)

        return (
            heads(self.q_proj, "heads"),
            heads(self.k_proj, "kv_heads"),
            heads(self.v_proj, "kv_heads"),
        )

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        dropout_key: Array | None = None,
    ) -> Hidden:
        """Attends within every document of every row.

        Args:
          x: [B, T, E].
          segment_ids: [B, T], 0 = padding; None: every row is one document.
          rngs: after `train()` its stream "dropout" turns the dropout of `config` on.
          dropout_key: turns dropout on in any mode.

        Returns:
          [B, T, E] in x's dtype; before the output bias, padding is zero.

        Raises:
          ValueError: if dropout is on and has no randomness.
        """
        dropout_key = choose_dropout_key(
            dropout_key,
            rngs,
            deterministic=self.deterministic,
            rates=(self.memory.config.dropout,),
        )
        q, k, v = self._project(x)
        args = (x, q, MemoryTokens(k, v, segment_ids))
        out, _ = self.memory(*args, dropout_key=dropout_key)
        if self.bidirectional and self.memory.config.operator != "tptt_reference":
            flipped = jax.tree.map(lambda y: jnp.flip(y, axis=1), args)
            back, _ = self.memory(*flipped, dropout_key=dropout_key)
            out = (out + jnp.flip(back, axis=1)) / 2
        return self.o_proj(out.reshape(*x.shape[:2], -1))

    def init_state(self, batch: int, dtype: DTypeLike = jnp.float32) -> MemoryState:
        """The memory before the first token, for `extend`."""
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim)
        return init_memory_state(self.memory.config, batch, *sizes, dtype)

    def extend(
        self,
        x: Hidden,
        state: MemoryState,
        length: Int[Array, "B"],
        valid: Bool[Array, "B T"] | None = None,
    ) -> tuple[Hidden, MemoryState]:
        """Continues rows whose first `length` tokens are in `state`.

        Args:
          x: the next tokens [B, T, E].
          state: from `init_state` or from the call before.
          length: tokens already seen by each row [B].
          valid: False for padding [B, T].

        Returns:
          [B, T, E], and the state after them.

        Raises:
          ValueError: if the layer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer cannot be extended: it reads the whole row.")
        ids = None if valid is None else valid.astype(jnp.int32)
        q, k, v = self._project(x)
        out, new_state = self.memory(x, q, MemoryTokens(k, v, ids), state=state, length=length)
        assert new_state is not None
        return self.o_proj(out.reshape(*x.shape[:2], -1)), new_state


def _check_beta_max(beta_max: float, config: LizaConfig) -> None:
    if not 0 < beta_max <= 2:
        raise ValueError(f"beta_max must lie above 0 and at most at 2, got {beta_max}.")
    if beta_max != 1 and config.operator == "tptt_reference":
        raise ValueError(
            'operator "tptt_reference" has write gates between 0 and 1: use beta_max=1.'
        )
