"""A mixture-of-experts feed-forward sublayer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from tptt_jax.array_typing import Array, Float, Hidden, Int
from tptt_jax.config import LoraConfig, ModelConfig
from tptt_jax.layers.lora import ROUTER, Projection
from tptt_jax.layers.mlp import ACTIVATIONS
from tptt_jax.layers.parameters import BaseParam
from tptt_jax.layers.quantized import QuantizedWeight, StoredWeight, stored
from tptt_jax.ops.grouped_matmul import OwnGroups, group_rows, grouped_matmul
from tptt_jax.ops.placement import ActivationRules, MeshAxes, active_rules
from tptt_jax.ops.quantization import BaseDtype, QuantizedArray, Weight


class ExpertKernels(nnx.Module):
    """The stacked matrices of all experts, [X, I, O]."""

    def __init__(
        self,
        num_experts: int,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str, str],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates them in `dtype`."""
        shape = (num_experts, in_dim, out_dim)
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * in_dim**-0.5
        self.kernel: StoredWeight = BaseParam(kernel.astype(dtype), axes=("experts", *axes))

    def quantize_weights(self, base_dtype: BaseDtype) -> None:
        """Quantises the matrices in place."""
        if isinstance(self.kernel, BaseParam):
            self.kernel = QuantizedWeight(self.kernel, base_dtype, axis=-2)


class _Matrices(NamedTuple):
    """The experts' matrices as they are stored, or those of a device."""

    gate: Weight | None  # [X, E, F]
    up: Weight  # [X, E, F]
    down: Weight  # [X, F, E]


class _Axes(NamedTuple):
    """The mesh axes that divide tokens and experts; None: none."""

    rows: MeshAxes | None
    tokens: MeshAxes | None
    experts: MeshAxes | None
    width: MeshAxes | None

    @classmethod
    def of(cls, rules: ActivationRules, x: Array, up: Weight) -> "_Axes | None":
        """For hidden states [B, T, E] and matrices [X, E, F]; None: XLA decides."""
        # Together, as devices that hold other tokens cannot share them.
        names, sizes = (
            ("rows", "tokens", "experts", "mlp"),
            (*x.shape[:2], up.shape[0], up.shape[2]),
        )
        axes = cls(*rules.spec(names, sizes))
        # Blocks of a quantised `down` lie along the width, and are not taken apart.
        is_cut = isinstance(up, QuantizedArray) and axes.width is not None
        return None if is_cut or rules.mesh.size == 1 else axes


class ExpertsMLP(nnx.Module):
    """sum over the chosen experts x of weight_x * down_x(activation(gate_x(h)) * up_x(h)).

    The router's softmax runs over all experts, in float32; rows are sorted by expert and
    multiplied in groups, so that the work is that of the chosen experts.
    """

    def __init__(
        self, config: ModelConfig, lora: LoraConfig | None, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Creates router and experts; adapters may sit on the router only."""
        embed, width, count = config.embed_dim, config.mlp_dim, config.experts.number
        self.activation, self.config = config.mlp.activation, config.experts
        self.router = Projection(
            embed,
            count,
            path=ROUTER,
            axes=("embed", "experts"),
            lora=lora,
            dtype=dtype,
            rngs=rngs,
        )

        def kernels(in_dim: int, out_dim: int, axes: tuple[str, str]) -> ExpertKernels:
            return ExpertKernels(count, in_dim, out_dim, axes=axes, dtype=dtype, rngs=rngs)

        self.gate_proj = nnx.data(None)
        if config.mlp.gated:
            self.gate_proj = kernels(embed, width, ("embed", "mlp"))
        self.up_proj = kernels(embed, width, ("embed", "mlp"))
        self.down_proj = kernels(width, embed, ("mlp", "embed"))

    def __call__(self, x: Hidden, dropout_key: Array | None = None) -> Hidden:
        """[B, T, E] -> [B, T, E]."""
        gate = None if self.gate_proj is None else stored(self.gate_proj.kernel)
        matrices = _Matrices(gate, stored(self.up_proj.kernel), stored(self.down_proj.kernel))
        rules = active_rules()
        axes = None if rules is None else _Axes.of(rules, x, matrices.up)
        if rules is not None and axes is not None:
            return self._run_divided(x, self._route(x, dropout_key), matrices, rules.mesh, axes)
        rows = x.reshape(-1, x.shape[-1])
        return self._run(rows, self._route(rows, dropout_key), matrices).reshape(x.shape)

    def _route(self, rows: Array, dropout_key: Array | None) -> Array:
        """The router's logits [..., X] for rows [..., E], in at least float32."""
        wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        return self.router(wide, dropout_key)

    def _run(
        self, rows: Array, logits: Array, matrices: _Matrices, own: OwnGroups | None = None
    ) -> Array:
        """Rows [M, E] and logits [M, X] -> [M, E]; with `own` what these experts contribute."""
        weights, experts = self._choose(logits)
        grouping = group_rows(experts.reshape(-1), logits.shape[-1], own)
        repeated = jnp.repeat(rows, self.config.per_token, axis=0)
        activation = ACTIVATIONS[self.activation]
        up = grouped_matmul(repeated, matrices.up, grouping)
        if matrices.gate is None:
            hidden = activation(up)
        else:
            hidden = activation(grouped_matmul(repeated, matrices.gate, grouping)) * up
        out = grouped_matmul(hidden, matrices.down, grouping).reshape(*weights.shape, -1)
        return jnp.sum(out * weights[..., None].astype(out.dtype), axis=1)

    def _choose(self, logits: Float[Array, "M X"]) -> tuple[Float[Array, "M c"], Int[Array, "M c"]]:
        """Weights and numbers of the experts chosen for each row."""
        weights, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), self.config.per_token)
        if self.config.normalize_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    def _run_divided(
        self, x: Hidden, logits: Array, matrices: _Matrices, mesh: Mesh, axes: _Axes
    ) -> Hidden:
        """Each device runs its experts, or its part of each expert, on its rows and tokens.

        The results are summed over the devices that share tokens.
        """
        summed = tuple(axis for axis in (axes.experts, axes.width) if axis is not None)

        def run(x: Array, logits: Array, matrices: _Matrices) -> Array:
            rows, own = x.reshape(-1, x.shape[-1]), None
            if axes.experts is not None:
                count = matrices.up.shape[0]
                own = OwnGroups(lax.axis_index(axes.experts) * count, count)
            out = self._run(rows, logits.reshape(len(rows), -1), matrices, own).reshape(x.shape)
            return lax.psum(out, summed) if summed else out

        tokens = PartitionSpec(*axes[:2])
        up: Any = PartitionSpec(axes.experts, None, axes.width)
        down: Any = PartitionSpec(axes.experts, axes.width, None)
        gate = None if matrices.gate is None else up
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(tokens, tokens, _Matrices(gate, up, down)),
            out_specs=tokens,
            # The loop over blocks does not declare along which axes its results vary.
            check_vma=False,
        )(x, logits, matrices)
