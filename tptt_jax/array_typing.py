"""One table of axis letters, and the array types that public signatures use.

| letter | axis                                    |
|--------|-----------------------------------------|
| B      | batch                                   |
| T      | tokens of the current call              |
| S      | cached tokens (slots of a KV cache)     |
| H      | query heads                             |
| K      | key/value heads                         |
| D      | head dimension; Dv: of the values       |
| E      | embedding (residual stream)             |
| F      | MLP width                               |
| V      | vocabulary                              |
| N      | Householder steps (virtual tokens) per token |
| C      | tokens per chunk; M = C * N virtual tokens |
| R      | LoRA rank                               |

Arrays are time-major: ``[B, T, H, D]``.
"""

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key, Shaped

Tokens = Int[Array, "B T"]
HostTokens = Int[np.ndarray, "B T"]
SegmentIds = Int[Array, "B T"]
Positions = Int[Array, "B T"]
Hidden = Float[Array, "B T E"]
State = Float[Array, "B K D Dv"]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Hidden",
    "HostTokens",
    "Int",
    "Key",
    "Positions",
    "SegmentIds",
    "Shaped",
    "State",
    "Tokens",
]
