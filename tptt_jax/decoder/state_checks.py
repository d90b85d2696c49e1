"""Checks that a decoding state fits a model."""

from tptt_jax.config import LizaConfig, ModelConfig, layer_kinds, runs_memory
from tptt_jax.decoder.places import layer_stacks
from tptt_jax.decoder.state import DecodingState, StateLayout
from tptt_jax.layers.cache_checks import check_equal, check_ring, check_setting


def check_decoding_state(
    config: ModelConfig,
    liza: LizaConfig | None,
    state: DecodingState,
    *,
    dtype: str,
    rows: int,
    use_memory: bool = True,
) -> None:
    """Raises ValueError unless a state fits a model; also inside of `jax.jit`.

    Args:
      config: of the model.
      liza: of its memory; None: the plain base model.
      state: the state.
      dtype: of the model's hidden states.
      rows: B of the tokens.
      use_memory: whether the model is to use its memory.
    """
    check_equal("dtype", str(state.hidden.dtype), dtype)
    if state.batch_size != rows:
        raise ValueError(
            f"the state has {state.batch_size} rows, the prompts have {rows}: "
            "fork_state(state, copies) gives every row copies."
        )
    _check_kinds(config, liza, state)
    expected = StateLayout.of(config, liza, use_memory=state.has_memory)
    rings = {ring.kind: ring for ring in state.layout.rings}
    check_equal("kinds of layers", sorted(rings), sorted(ring.kind for ring in expected.rings))
    for ring in expected.rings:
        check_setting("window", rings[ring.kind].window, ring.window)
        check_setting("softmax_sinks", rings[ring.kind].sinks, ring.sinks)
    for stack in state.stacks:
        for kind, cache in (stack.softmax or {}).items():
            check_ring(config, liza, kind, cache)
    if use_memory and runs_memory(config, liza) and not state.has_memory:
        raise ValueError("the state was read without the memory: continue with use_memory=False.")
    check_equal("writes", state.layout.writes, expected.writes)


def _check_kinds(config: ModelConfig, liza: LizaConfig | None, state: DecodingState) -> None:
    """Raises ValueError unless a state has the stacks of a model and caches of their kinds."""
    stacks, of_layers = layer_stacks(config), layer_kinds(config, liza)
    check_equal("stacks of layers", len(state.stacks), len(stacks))
    has_softmax = liza is None or liza.softmax
    for layers, stack in zip(stacks, state.stacks, strict=True):
        check_equal("softmax attention", stack.softmax is not None, has_softmax)
        if stack.softmax is not None:
            kinds = {of_layers[i] for i in layers}
            check_equal("kinds of layers", sorted(stack.softmax), sorted(kinds))
