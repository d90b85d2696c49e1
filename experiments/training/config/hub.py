"""The options of pushing a finished run to the Hugging Face Hub."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from convert.hub import PushFormat, check_name


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Pushes the run to the Hugging Face Hub once it has finished, with a model card."""

    push_to_hub: Annotated[str | None, tyro.conf.arg(name="push-to-hub", prefix_name=False)] = None
    """Repository, e.g. me/my-model; a name alone is below your own. It is made if it does not
    exist. The token is that of HF_TOKEN or `hf auth login`, and is checked before training.
    None: nothing is pushed."""
    private: Annotated[bool, tyro.conf.arg(name="hub-private", prefix_name=False)] = False
    """Make the repository private, if it does not exist yet."""
    revision: Annotated[str | None, tyro.conf.arg(name="hub-revision", prefix_name=False)] = None
    """Branch to push to; it is made if it does not exist. None: main."""
    format: Annotated[PushFormat, tyro.conf.arg(name="push-format", prefix_name=False)] = "auto"
    """What is pushed, as `python -m convert export` writes it: "titan", "merged", "peft", "tptt".
    "auto": "titan" if the run has a window or a memory, else "merged"."""

    def __post_init__(self) -> None:
        """Rejects names that the Hub does not allow."""
        if self.push_to_hub is not None:
            check_name(self.push_to_hub, self.revision)
            return
        given = {"--hub-private": self.private, "--hub-revision": self.revision is not None}
        given |= {"--push-format": self.format != "auto"}
        if names := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{names[0]} is for pushing to the Hub: add --push-to-hub ID.")
