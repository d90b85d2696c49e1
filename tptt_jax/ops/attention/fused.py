"""Softmax attention over whole rows as one cuDNN kernel (FlashAttention-2, arXiv:2307.08691)."""

from typing import Literal

import jax
import jax.numpy as jnp

from tptt_jax.array_typing import Array, Bool, Float, Int
from tptt_jax.ops.attention.blocks import KeyValues
from tptt_jax.ops.devices import compute_capability
from tptt_jax.ops.documents import segment_starts

# cuDNN takes head_dim 256 on Hopper and later, 128 wherever it runs.
_WIDEST_HEAD = 128
_OLDEST_ARCHITECTURE = 8
# Documents are told apart by a bias for every pair of tokens, and the backward pass writes its
# gradient: 256 MiB each in bfloat16. Longer rows take the program whose memory is linear in T.
_MOST_PAIRS = 1 << 27


def can_fuse(
    q: Float[Array, "B T H D"],
    *,
    segment_ids: Int[Array, "B T"] | None,
    sinks: KeyValues | None,
    softcap: float | None,
) -> bool:
    """Whether `fused_attention` runs here and equals `attend_sequence`.

    It does on NVIDIA GPUs from Ampere on, in bfloat16 and float16, for heads of at most 128
    channels (a multiple of 8), without softcap and sinks; never on a CPU. cuDNN computes no
    gradient beside a bias where T is odd.

    Args:
      q: queries [B, T, H, D].
      segment_ids: of the row, None without any.
      sinks: what a window leaves visible, None without any.
      softcap: of the logits.
    """
    batch, tokens, _, head_dim = q.shape
    if sinks is not None or softcap is not None:
        return False
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if head_dim > _WIDEST_HEAD or head_dim % 8:
        return False
    if segment_ids is not None and (tokens % 2 or batch * tokens**2 > _MOST_PAIRS):
        return False
    return _has_flash_attention(q)


def fused_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T H D"]:
    """`attend_sequence` without sinks and softcap, by `jax.nn.dot_product_attention`.

    Our tests compare implementation "xla" with `attend_sequence` and lower "cudnn" for CUDA; its
    kernels need a GPU, where `python -m experiments.bench attention` compares them.

    Args:
      q: rotated queries [B, T, H, D].
      k: rotated keys [B, T, K, D].
      v: values [B, T, K, D].
      segment_ids: [B, T]; a query sees its own document only, 0 is padding.
      window: tokens seen, the current one included; None: all before.
      scale: factor on the logits.
      implementation: "xla" runs anywhere and holds all logits.

    Returns:
      [B, T, H, D] in q's dtype; zero on padding.
    """
    mask = local = None
    if segment_ids is not None:
        # cuDNN before 9.10.2 does not support a window together with a bias.
        mask = _pair_mask(segment_ids, window)
    elif window is not None:
        local = (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=local,
        implementation=implementation,
    )
    return out if segment_ids is None else jnp.where((segment_ids != 0)[..., None, None], out, 0)


def _pair_mask(segment_ids: Int[Array, "B T"], window: int | None) -> Bool[Array, "B 1 T T"]:
    """Same document and inside the window; padding sees padding, as every row must see a key."""
    # Not only the same id: an id that comes back later is another document.
    starts = segment_starts(segment_ids)
    mask = starts[:, None, :, None] == starts[:, None, None, :]
    if window is not None:
        index = jnp.arange(segment_ids.shape[1])
        mask &= index[:, None] - index < window
    return mask


def _has_flash_attention(q: Array) -> bool:
    capability = compute_capability(q)
    return capability is not None and capability[0] >= _OLDEST_ARCHITECTURE
