"""The option --revision of commands that take --model."""

from typing import Any

from convert.sources import with_revision


def apply_revision(config: Any) -> None:
    """Moves the `revision` of a configuration into its `model`, as "name@revision".

    There is one place that says it then, also in files that the configuration is written to.

    Args:
      config: a frozen dataclass with these fields, while it is made.

    Raises:
      ValueError: if there is no model to have it, or it is none of the Hub.
      ConversionError: if the model names another revision itself.
    """
    if config.revision is None:
        return
    if config.model is None:
        raise ValueError(
            f"--revision {config.revision!r:.80} belongs to the model that --model names: give "
            "--model, or write name@revision in --models."
        )
    object.__setattr__(config, "model", with_revision(config.model, config.revision))
    object.__setattr__(config, "revision", None)
