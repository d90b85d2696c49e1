"""Sizes that differ by layer."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """One size for each layer, where layers differ; empty: all have the model's own.

    `ModelConfig` has fields of the same names, which are then the maxima.
    """

    num_heads: tuple[int, ...] = ()
    """Query heads."""
    num_kv_heads: tuple[int, ...] = ()
    """Key/value heads."""
    mlp_dim: tuple[int, ...] = ()
    """Width of the MLP."""

    def __post_init__(self) -> None:
        """Makes tuples and rejects sizes below 1."""
        for field in fields(self):
            sizes = tuple(getattr(self, field.name))
            object.__setattr__(self, field.name, sizes)
            if min(sizes, default=1) < 1:
                raise ValueError(f"per_layer {field.name} must be at least 1, got {sizes}.")

    def check(self, num_layers: int, **maxima: int) -> None:
        """Raises ValueError unless there is a size for every layer and the maxima are reached."""
        for name, most in maxima.items():
            sizes = getattr(self, name)
            if not sizes:
                continue
            if len(sizes) != num_layers:
                raise ValueError(
                    f"per_layer {name} has {len(sizes)} entries for num_layers = {num_layers}."
                )
            if max(sizes) != most:
                raise ValueError(
                    f"per_layer {name} must have the maximum {name} ({most}), got {sizes}."
                )
