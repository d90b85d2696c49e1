"""The smallest model around one `LinearAttention` layer: embeddings, the layer, a linear head."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import nnx

from tptt_jax import LinearAttention, LizaConfig
from tptt_jax.array_typing import Array, Float, Int

Keys = Literal["own", "derivative", "rotary", "combined"]


@dataclass(frozen=True)
class Variant:
    """An update rule of the memory."""

    num_householder: int
    """Householder steps per element of a word."""
    beta_max: float
    """Write gates lie between 0 and this."""
    keys: Keys
    """Source of the steps' keys and values. "own": a learned embedding of the element for each
    step, as in DeltaProduct: the element enters the layer once per step. Else the `trick` by which
    the layer derives the steps from one key and one value, as in TPTT."""

    @property
    def label(self) -> str:
        """The name in reports."""
        trick = "" if self.num_householder == 1 or self.keys == "own" else f", {self.keys} keys"
        return f"N = {self.num_householder}, beta up to {self.beta_max:g}{trick}"

    @property
    def places(self) -> int:
        """Places of the layer's input that an element takes."""
        return self.num_householder if self.keys == "own" else 1

    @property
    def liza(self) -> LizaConfig:
        """The layer's memory: no decay, and gates see one element only."""
        trick: dict[str, Any] = {} if self.keys == "own" else {"trick": self.keys}
        steps = self.num_householder // self.places
        return LizaConfig(
            writes="all",
            num_householder=steps,
            beta_gate="projected",
            alpha_gate="constant",
            **trick,
        )


class Tracker(nnx.Module):
    """Logits of the product of all elements so far, from one layer."""

    def __init__(
        self, variant: Variant, num_elements: int, *, dim: int, heads: int, rngs: nnx.Rngs
    ) -> None:
        """Creates embeddings [G, places, E], the layer, and the head [E, G]."""
        self.places = variant.places
        shape = (num_elements, self.places, dim)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.attention = LinearAttention(
            dim, heads, config=variant.liza, beta_max=variant.beta_max, rngs=rngs
        )
        self.head = nnx.Linear(dim, num_elements, rngs=rngs)

    def __call__(self, elements: Int[Array, "B T"]) -> Float[Array, "B T G"]:
        """Reads every product at the last place of its element."""
        x = self.embedding[...][elements]  # [B, T, places, E]
        x = x.reshape(len(elements), -1, x.shape[-1])
        x += self.attention(x)
        return self.head(x[:, self.places - 1 :: self.places])
