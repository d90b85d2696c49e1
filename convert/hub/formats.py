"""Which export of a model is pushed."""

from typing import Literal

from tptt_jax import LizaConfig

PushFormat = Literal["auto", "titan", "merged", "peft", "tptt"]


def choose_format(
    chosen: PushFormat, liza: LizaConfig | None
) -> Literal["titan", "merged", "peft", "tptt"]:
    """The format to push: of those that hold all that was trained, the one that loads most widely.

    Args:
      chosen: what the user asks for.
      liza: the memory or the window that a model was trained with; None: it has neither.
    """
    if chosen != "auto":
        return chosen
    if liza is None:
        return "merged"
    return "tptt" if liza.operator == "tptt_reference" else "titan"
