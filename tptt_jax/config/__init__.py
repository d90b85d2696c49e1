"""Configurations of a model, its memory and its adapters: frozen, validated, without I/O.

Offered: `ModelConfig`, `LizaConfig`, `LoraConfig`, their parts, and the values that options have.
"""

from tptt_jax.config.adapters import LoraConfig
from tptt_jax.config.attention import AttentionConfig, QkNorm
from tptt_jax.config.context import check_context_axis
from tptt_jax.config.flat_names import (
    FLAT_NAMES,
    flat_fields,
    flat_settings,
    nest_settings,
    place_of,
)
from tptt_jax.config.layer_sizes import LayerSizes
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
from tptt_jax.config.mlp import Activation, ExpertsConfig, MlpConfig
from tptt_jax.config.model import (
    MAX_LAYERS,
    BaseLayerKind,
    LayerKind,
    ModelConfig,
    Remat,
)
from tptt_jax.config.norm import Norm, NormConfig, NormPlacement
from tptt_jax.config.rope import RopeConfig, RopeScaling

__all__ = [
    "FLAT_NAMES",
    "MAX_LAYERS",
    "OPERATORS",
    "Activation",
    "AttentionConfig",
    "BaseLayerKind",
    "ExpertsConfig",
    "Gate",
    "LayerKind",
    "LayerSizes",
    "LinearScale",
    "LizaConfig",
    "LoraConfig",
    "Mag",
    "MlpConfig",
    "ModelConfig",
    "Norm",
    "NormConfig",
    "NormPlacement",
    "Operator",
    "Precision",
    "QkNorm",
    "Recurrence",
    "Remat",
    "RopeConfig",
    "RopeScaling",
    "Trick",
    "Writes",
    "check_context_axis",
    "flat_fields",
    "flat_settings",
    "layer_kinds",
    "memory_layers",
    "nest_settings",
    "place_of",
    "runs_memory",
]
