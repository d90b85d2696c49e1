"""Learned gates of the memory: write and forget gates of tokens, read-out of queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tptt_jax.array_typing import Array, Float, Int
from tptt_jax.config import LizaConfig
from tptt_jax.layers.parameters import MagParam, MemoryParam

# Bounds of the read-out's log scale, so that no query can blow up a layer.
_LOG_SCALE = 4.0
# Half-lives of 38 to 280 tokens.
_DECAY_BIAS = (4.0, 6.0)
# log Z of the evicted tokens starts this far below log n: an unfitted memory has a small share.
_MASS_BIAS = -4.0
# Evicted tokens that a mass gate counts, unless a fit has seen more or fewer.
_MOST_COUNTED = 1024.0


class GateLogits(NamedTuple):
    """Logits of the projected gates of tokens; None where a gate is not projected.

    Attributes:
      beta: of the write gate [B, T, N, K], float32.
      keep: of the forget gate [B, T, K], float32.
    """

    beta: Float[Array, "B T N K"] | None = None
    keep: Float[Array, "B T K"] | None = None


class WriteGates(nnx.Module):
    """beta = sigmoid(W_b z + b_b), decay = sigmoid(W_a z + b_a), z = the token's keys and values.

    TPTT computes gates from a token's keys or values by fixed means; here the map is learned, and
    sees all heads.
    """

    def __init__(self, config: LizaConfig, num_kv_heads: int, head_dim: int) -> None:
        """Creates kernels [2 K D, outputs], zero, and biases that give every head a half-life."""
        self.steps, self.num_kv_heads = config.recurrence.num_householder, num_kv_heads
        self.beta = self.keep = nnx.data(None)
        width = 2 * num_kv_heads * head_dim
        if config.beta_gate == "projected":
            self.beta = Affine(width, jnp.zeros(self.steps * num_kv_heads))
        if config.alpha_gate == "projected":
            spread = jnp.linspace(*_DECAY_BIAS, num_kv_heads)
            self.keep = Affine(width, spread if num_kv_heads > 1 else jnp.full(1, 5.0, jnp.float32))

    def __call__(self, joined: Float[Array, "B T Z"]) -> GateLogits:
        """Logits for tokens whose keys and values of all heads lie side by side [B, T, 2 K D]."""
        beta = None if self.beta is None else self.beta(joined)
        if beta is not None:
            beta = beta.reshape(*beta.shape[:2], self.steps, self.num_kv_heads)
        return GateLogits(beta, None if self.keep is None else self.keep(joined))


class Affine(nnx.Module):
    """x W + b in float32."""

    def __init__(self, width: int, bias: Float[Array, "O"]) -> None:
        """Creates a kernel of zeros [width, O] and this bias."""
        self.kernel = MemoryParam(jnp.zeros((width, *bias.shape)), axes=("kv", "gates"))
        self.bias = MemoryParam(bias.astype(jnp.float32), axes=("gates",))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """[..., I] -> [..., O]."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return wide @ self.kernel[...] + self.bias[...]


class ReadScale(nnx.Module):
    """exp(u_h . q + c_h): what a head's read-out is multiplied by.

    The memory reads with queries of unit norm; this factor restores a query-dependent size.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        """Creates u [H, D] and c [H], zero."""
        self.weight = MemoryParam(jnp.zeros((num_heads, head_dim)), axes=("heads", "head_dim"))
        self.bias = MemoryParam(jnp.zeros((num_heads,)), axes=("heads",))

    def __call__(self, q: Float[Array, "B T H D"]) -> Float[Array, "B T H 1"]:
        """The factors for queries before the rotary embedding, float32."""
        log_scale = per_head(q, self.weight[...]) + self.bias[...]
        return jnp.exp(jnp.clip(log_scale, -_LOG_SCALE, _LOG_SCALE))[..., None]


class MassGate(nnx.Module):
    """share = sigmoid(log Z_out - log Z_in): how much of the softmax has left the window.

    Full softmax attention is Z_in o_in + Z_out o_out over their sum, where "in" is what the window
    and the sinks hold. Z_in is known; the gate predicts the other from the query and the number
    of evicted tokens n, log Z_out = w_h . q + a_h log n + b_h. n is capped at the length of the
    rows of the fit: the state forgets the oldest tokens, and a growing share would be extrapolated.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        """Creates w (zeros [H, D]), a (ones [H]), b [H] and the log of the largest n [H]."""
        self.weight = MagParam(jnp.zeros((num_heads, head_dim)), axes=("heads", "head_dim"))
        self.slope = MagParam(jnp.ones((num_heads,)), axes=("heads",))
        most = jnp.full((num_heads,), jnp.log(_MOST_COUNTED), jnp.float32)
        self.limit = MagParam(most, axes=("heads",))
        self.bias = MagParam(jnp.full((num_heads,), _MASS_BIAS, jnp.float32), axes=("heads",))

    def __call__(
        self,
        q: Float[Array, "B T H D"],
        log_mass: Float[Array, "B T H"],
        evicted: Int[Array, "B T"],
    ) -> Float[Array, "B T H 1"]:
        """The memory's share for each query and head, float32; 0 while nothing was evicted.

        Args:
          q: queries after any q norm, before the rotary embedding.
          log_mass: log Z_in, see `tptt_jax.ops.attention.blocks.Attended`.
          evicted: n, the tokens that the memory holds [B, T].
        """
        log_n = jnp.log(jnp.maximum(evicted, 1).astype(jnp.float32))[..., None]
        # The cap is a measurement, not a trained value.
        log_n = jnp.minimum(log_n, jax.lax.stop_gradient(self.limit[...]))
        log_out = per_head(q, self.weight[...]) + self.slope[...] * log_n + self.bias[...]
        share = jax.nn.sigmoid(log_out - log_mass)
        return jnp.where(evicted[..., None] > 0, share, 0)[..., None]


class MemoryGate(nnx.Module):
    """mu = sigmoid(logit), one per head (TPTT's Memory as Gate, learned)."""

    def __init__(self, num_heads: int, init: float) -> None:
        """Creates the logits [H], float32, such that every share starts at `init`."""
        logit = jnp.log(init) - jnp.log1p(-init)
        self.logit = MagParam(jnp.full((num_heads,), logit, jnp.float32), axes=("heads",))

    def __call__(self) -> Float[Array, "H"]:
        """The share of the memory in each head."""
        return jax.nn.sigmoid(self.logit[...])


def per_head(q: Float[Array, "B T H D"], weight: Float[Array, "H D"]) -> Float[Array, "B T H"]:
    """q_h . weight_h of every head, in float32.

    Computed as one product with a block-diagonal matrix [H D, H]: for a product per head XLA first
    transposes the queries, which on CPU takes longer than the zeros do.
    """
    heads, dim = weight.shape
    wide = q.astype(jnp.promote_types(q.dtype, jnp.float32))
    blocks = weight[:, :, None] * jnp.eye(heads, dtype=weight.dtype)[:, None]
    return wide.reshape(*q.shape[:2], -1) @ blocks.reshape(heads * dim, heads)
