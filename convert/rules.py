"""Rules that move tensors between a checkpoint and our model, in both directions.

A rule names tensors of the checkpoint, parameters of ours, and the invertible transform between
them. It is declared once; `forward` runs when a checkpoint is read, `backward` when one is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]
Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Transform:
    """An invertible map between the stored arrays and ours."""

    name: str
    forward: Callable[[Arrays, Sequence[Shape]], Arrays]
    """Stored arrays and the shapes that ours must have -> our arrays."""
    backward: Callable[[Arrays], Arrays]
    """Our arrays -> stored arrays."""
    stored_shapes: Callable[[Sequence[Shape]], Sequence[Shape]]
    """Shapes of ours -> shapes of the stored arrays."""

    def then(self, second: "Transform") -> "Transform":
        """This transform followed by another, in the direction from the checkpoint to our model.

        Both must preserve the number of arrays.
        """

        def forward(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
            between = second.stored_shapes(shapes)
            return second.forward(self.forward(arrays, between), shapes)

        return Transform(
            name=f"{self.name}, {second.name}",
            forward=forward,
            backward=lambda arrays: self.backward(second.backward(arrays)),
            stored_shapes=lambda shapes: self.stored_shapes(second.stored_shapes(shapes)),
        )


def elementwise(
    name: str,
    forward: Callable[[np.ndarray], np.ndarray],
    backward: Callable[[np.ndarray], np.ndarray],
    stored_shape: Callable[[Shape], Shape] = tuple,
) -> Transform:
    """A transform of each array separately.

    Args:
      name: its name in error messages.
      forward: stored array -> our array.
      backward: our array -> stored array.
      stored_shape: our shape -> the stored shape; the same by default.

    Returns:
      The transform.
    """
    return Transform(
        name=name,
        forward=lambda arrays, _: [forward(array) for array in arrays],
        backward=lambda arrays: [backward(array) for array in arrays],
        stored_shapes=lambda shapes: [stored_shape(shape) for shape in shapes],
    )


IDENTITY = elementwise("as it is", lambda x: x, lambda x: x)
"""The unchanged array."""

TRANSPOSE = elementwise("transposed", np.transpose, np.transpose, lambda shape: shape[::-1])
"""PyTorch's linear weights [out, in] <-> our kernels [in, out]."""

MINUS_ONE = elementwise("minus one", lambda x: x - 1, lambda x: x + 1)
"""Norm weights stored as 1 + w <-> w."""


def interleaved_rotary(num_heads: int) -> Transform:
    """Undoes the row order that llama.cpp gives to q and k of the Llama family.

    It interleaves the two halves of every head as adjacent pairs; Hugging Face rotates halves.

    Args:
      num_heads: heads along the first axis.

    Returns:
      The transform, on weights [H * D, ...] or biases [H * D].
    """

    def forward(stored: np.ndarray) -> np.ndarray:
        pairs = stored.reshape(num_heads, -1, 2, *stored.shape[1:])
        return pairs.swapaxes(1, 2).reshape(stored.shape)

    def backward(ours: np.ndarray) -> np.ndarray:
        halves = ours.reshape(num_heads, 2, -1, *ours.shape[1:])
        return halves.swapaxes(1, 2).reshape(ours.shape)

    return elementwise(f"rotary pairs of {num_heads} heads", forward, backward)


def split(axis: int) -> Transform:
    """Splits a stored array that concatenates several of ours.

    Args:
      axis: the axis of concatenation, in our order.

    Returns:
      The transform; it takes one stored array and gives as many as the rule has targets.
    """

    def forward(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        (joined,) = arrays
        ends = np.cumsum([shape[axis] for shape in shapes])[:-1]
        return np.split(joined, ends, axis=axis)

    def joined_shape(shapes: Sequence[Shape]) -> Sequence[Shape]:
        result = list(shapes[0])
        result[axis] = sum(shape[axis] for shape in shapes)
        return [tuple(result)]

    return Transform(
        name=f"split along axis {axis}",
        forward=forward,
        backward=lambda arrays: [np.concatenate(arrays, axis=axis)],
        stored_shapes=joined_shape,
    )


@dataclass(frozen=True)
class Rule:
    """One line of a family's key table.

    In both templates ``{layer}`` stands for the number of the layer in the checkpoint, and
    ``{expert}`` in the source for the number of an expert; we stack their weights. A rule does not
    apply if the model lacks its target (a bias, an untied head).
    """

    source: str | tuple[str, ...]
    """Names in the checkpoint, e.g. "model.layers.{layer}.self_attn.q_proj.weight"."""
    target: str | tuple[str, ...]
    """Our parameters, with "layers.{layer}." for a layer's place in the stacks."""
    transform: Transform = IDENTITY

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        """`target` as a tuple."""
        return (self.target,) if isinstance(self.target, str) else self.target


def linear(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a PyTorch linear layer: weight [out, in] <-> kernel [in, out], and bias.

    Args:
      source: its name in the checkpoint, e.g. "model.layers.{layer}.mlp.up_proj".
      target: its name in our model, e.g. "layers.{layer}.mlp.up_proj".

    Returns:
      The rule of the weight and the rule of the bias.
    """
    return (
        Rule(f"{source}.weight", f"{target}.kernel", TRANSPOSE),
        Rule(f"{source}.bias", f"{target}.bias"),
    )
