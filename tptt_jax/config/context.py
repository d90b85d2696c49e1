"""What context parallelism asks of the memory and of rows."""

from tptt_jax.config.memory import LizaConfig


def check_context_axis(liza: LizaConfig | None, shards: int, tokens: int | None = None) -> None:
    """Raises ValueError if rows cannot be divided along the context axis of a mesh.

    Args:
      liza: the memory; None: none.
      shards: devices of the context axis; with 1 nothing is divided.
      tokens: of a row; None: they will be padded.
    """
    if shards == 1:
        return
    if tokens is not None and tokens % shards:
        raise ValueError(
            f"rows must have a multiple of {shards} tokens, which the mesh's context axis divides "
            f"them among, got {tokens}: pad them with segment_ids 0, or use another mesh."
        )
    if liza is None or liza.writes == "none":
        return
    activation = liza.recurrence.state_activation
    if liza.operator == "tptt_reference" or activation != "none":
        raise ValueError(
            f"a mesh with context={shards} needs an update that is linear in the memory's state, "
            f'got operator="{liza.operator}" with state_activation="{activation}": use another '
            "operator, no activation, or context=1."
        )
