"""When dropout is on: as in Flax's own layers, `train()` and `rngs` decide, or a key does."""

from flax import nnx

from tptt_jax.array_typing import Array


def choose_dropout_key(
    key: Array | None, rngs: nnx.Rngs | None, *, deterministic: bool, rates: tuple[float, ...]
) -> Array | None:
    """The key that dropout uses in one call, None if nothing is dropped.

    Args:
      key: turns dropout on by itself.
      rngs: its stream "dropout" is used, unless the module is deterministic.
      deterministic: False after `module.train()`, True after `module.eval()`.
      rates: of all dropout in the module.

    Raises:
      ValueError: if the module is in training mode and drops something, but no `rngs` came.
    """
    if key is not None or deterministic or not any(rates):
        return key
    if rngs is None:
        raise ValueError(
            "the model is in training mode and has dropout: give rngs=nnx.Rngs(dropout=0), "
            "or call model.eval()."
        )
    return rngs.dropout()
