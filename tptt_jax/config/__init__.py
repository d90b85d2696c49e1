"""Configurations of a model, its memory and its adapters: frozen, validated, without I/O."""

from tptt_jax.config.adapters import LoraConfig
from tptt_jax.config.context import check_context_axis
from tptt_jax.config.memory import (
    OPERATORS,
    Gate,
    LinearScale,
    LizaConfig,
    Mag,
    Operator,
    Precision,
    Recurrence,
    Trick,
    Writes,
    layer_kinds,
    memory_layers,
    runs_memory,
)
from tptt_jax.config.model import (
    MAX_LAYERS,
    BaseLayerKind,
    LayerKind,
    ModelConfig,
    Norm,
    NormPlacement,
    Remat,
)
from tptt_jax.config.rope import RopeConfig, RopeScaling

__all__ = [
    "MAX_LAYERS",
    "OPERATORS",
    "BaseLayerKind",
    "Gate",
    "LayerKind",
    "LinearScale",
    "LizaConfig",
    "LoraConfig",
    "Mag",
    "ModelConfig",
    "Norm",
    "NormPlacement",
    "Operator",
    "Precision",
    "Recurrence",
    "Remat",
    "RopeConfig",
    "RopeScaling",
    "Trick",
    "Writes",
    "check_context_axis",
    "layer_kinds",
    "memory_layers",
    "runs_memory",
]
