"""`LizaConfig`, the configuration of a Titan's memory, and which layers have one.

`liza` joins the parts (update rule, mixing, window, computation), `layers` applies it to a model.
"""

from tptt_jax.config.memory.computation import Precision
from tptt_jax.config.memory.layers import layer_kinds, memory_layers, runs_memory
from tptt_jax.config.memory.liza import LizaConfig, Writes
from tptt_jax.config.memory.mixing import LinearScale, Mag
from tptt_jax.config.memory.update_rule import OPERATORS, Gate, Operator, Recurrence, Trick

__all__ = [
    "OPERATORS",
    "Gate",
    "LinearScale",
    "LizaConfig",
    "Mag",
    "Operator",
    "Precision",
    "Recurrence",
    "Trick",
    "Writes",
    "layer_kinds",
    "memory_layers",
    "runs_memory",
]
