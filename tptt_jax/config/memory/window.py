"""What softmax attention sees beside the memory."""

from dataclasses import dataclass

from tptt_jax.config.checks import MAX_RANK, check_at_least, check_at_most, is_int32


@dataclass(frozen=True, kw_only=True)
class Window:
    """The window, its sinks, and layers that have none; a part of `LizaConfig`."""

    softmax: bool = True
    """False: a purely linear model (share 1, unit scale) without softmax and KV cache; needs
    writes="all"."""
    softmax_window: int | None = None
    """Tokens that softmax attention sees, the current one included; None: all, and a memory of
    evicted tokens is idle."""
    softmax_sinks: int = 4
    """First tokens of a document that stay visible beside a window (arXiv:2309.17453)."""
    full_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that keep the base model's full softmax attention: they have neither
    a window nor a memory, and their cache holds every token. Sorted after construction."""

    def _check_window(self) -> None:
        """Sorts full_layers; raises ValueError if a size or a layer is impossible."""
        check_at_least(self, 1, "softmax_window")
        check_at_least(self, 0, "softmax_sinks")
        check_at_most(self, MAX_RANK, "softmax_sinks")
        layers = tuple(self.full_layers)
        for layer in layers:
            if not is_int32(layer) or layer < 0:
                raise ValueError(
                    f"full_layers must be numbers of layers, counted from 0, got {layer!r:.99}."
                )
        if len(set(layers)) < len(layers):
            twice = min(layer for layer in layers if layers.count(layer) > 1)
            raise ValueError(f"full_layers names layer {twice} more than once: name it once.")
        object.__setattr__(self, "full_layers", tuple(sorted(layers)))
        if layers and not self.softmax:
            raise ValueError(
                "softmax=False leaves no softmax attention to keep in full_layers: use "
                "softmax=True, with softmax_window=1 for the least of it elsewhere."
            )
