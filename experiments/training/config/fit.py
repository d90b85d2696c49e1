"""Options for fitting the memory to the base model, before training on text."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro


def _flag(name: str) -> Any:
    return tyro.conf.arg(name=f"fit-{name}", prefix_name=False)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fits the memory to the base model: its own attention, then its own predictions.

    Base weights stay fixed, and the text only provides contexts: its next tokens are not targets.
    """

    steps: Annotated[int | None, _flag("steps")] = None
    """Steps of attention transfer, which moves every layer's output towards that of full softmax
    attention, with gradients inside the layer only. None: 30 if the memory has a window, else
    0."""
    distill_steps: Annotated[int | None, tyro.conf.arg(name="distill-steps", prefix_name=False)] = (
        None
    )
    """Steps of distillation after the transfer, which trains the memory alone towards the base
    model's predictions, through all layers. None: as many as --fit-steps, or 150 if that is not
    given either."""
    data: Annotated[str | tuple[str, ...] | None, _flag("data")] = None
    """Text to fit on, as --data; None: the training data. Other data is read from its split
    "train", with the default columns of its format: --data.split, --data.format, --data.columns
    and the like apply to --data only."""
    length: Annotated[int | None, _flag("length")] = None
    """Tokens per row; None: eight windows, at least 256 and at most 2,048, or the row length of the
    training data if that is longer."""
    batch_size: Annotated[int, _flag("batch-size")] = 2
    """Rows per step of attention transfer, over all devices."""
    distill_batch_size: Annotated[
        int, tyro.conf.arg(name="distill-batch-size", prefix_name=False)
    ] = 1
    """Rows per step of distillation."""
    learning_rate: Annotated[float, _flag("learning-rate")] = 5e-3
    """Peak learning rate of attention transfer."""
    distill_learning_rate: Annotated[
        float, tyro.conf.arg(name="distill-learning-rate", prefix_name=False)
    ] = 3e-3
    """Peak learning rate of distillation."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        if self.data is not None and not isinstance(self.data, str) and len(self.data) < 2:
            if not self.data:
                raise ValueError("fit: data must name a file, a folder or a dataset, got nothing.")
            object.__setattr__(self, "data", self.data[0])
        minima = {"steps": 0, "distill_steps": 0, "length": 2}
        for name, least in (minima | {"batch_size": 1, "distill_batch_size": 1}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"fit: {name} must be at least {least}, got {value}.")
        for name in ("learning_rate", "distill_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"fit: {name} must be above 0, got {getattr(self, name)}.")

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to fit with, if the model has a memory behind a window."""
        return self.steps != 0 or bool(self.distill_steps)

    def row_length(self, window: int, trained: int) -> int:
        """Tokens of a row, see `length`.

        Args:
          window: of the model.
          trained: tokens of a row of the training data.

        Raises:
          ValueError: if rows are too short for anything to leave the window.
        """
        if self.length is not None:
            if self.length <= window:
                raise ValueError(
                    f"fit: length must be above --liza.softmax-window {window}, so that tokens "
                    f"leave the window, got {self.length}."
                )
            return self.length
        return max(trained, min(max(8 * window, 256), 2048))
