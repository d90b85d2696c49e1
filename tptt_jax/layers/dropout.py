"""Decides when dropout is on: by `train()` and `rngs` as in Flax's layers, or by a key."""

from flax import nnx

from tptt_jax.array_typing import Array


def choose_dropout_key(
    key: Array | None, rngs: nnx.Rngs | None, *, deterministic: bool, rates: tuple[float, ...]
) -> Array | None:
    """The dropout key of one call; None: no dropout.

    Args:
      key: turns dropout on by itself.
      rngs: its stream "dropout" is used, unless the module is deterministic.
      deterministic: False after `module.train()`, True after `module.eval()`.
      rates: of all dropout in the module.

    Raises:
      ValueError: if the module is in training mode and has dropout, but `rngs` is missing.
    """
    if key is not None or deterministic or not any(rates):
        return key
    if rngs is None:
        raise ValueError(
            "the model is in training mode and has dropout: give rngs=nnx.Rngs(dropout=0), "
            "or call model.eval()."
        )
    return rngs.dropout()
