"""A repository on the Hugging Face hub: its name, and whether the token may write to it."""

import re
from dataclasses import dataclass, replace
from typing import Any

from convert.errors import ConversionError
from convert.hub.failures import endpoint, plain_failures

_BRANCH = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")


@dataclass(frozen=True, kw_only=True)
class HubTarget:
    """Where a model is pushed."""

    name: str
    """E.g. "me/my-model"."""
    private: bool = False
    """Whether a new repository is private."""
    revision: str | None = None
    """A branch; None: main."""


def check_name(name: str, revision: str | None = None) -> None:
    """Refuses names that the hub does not allow; asks nobody.

    Args:
      name: "me/my-model" or "my-model".
      revision: a branch; None: main.

    Raises:
      ConversionError: naming what is wrong.
    """
    # Costs half a second that other commands need not pay.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(
            f"{name!r:.120} cannot be the ID of a repository on the Hugging Face hub "
            f"({str(error).rstrip('.')[:200]}): give YOU/NAME of letters, digits, '-', '_' and '.'."
        ) from None
    if revision is not None and _BRANCH.fullmatch(revision) is None:
        raise ConversionError(f"{revision!r:.120} cannot be a branch of {name}: give another name.")


def check_access(target: HubTarget, again: str = "") -> HubTarget:
    """Asks the hub whose the token is, and whether it may write there.

    Args:
      target: whose name may lack the user.
      again: what is safe and how to go on, for the error.

    Returns:
      The target with its full name.

    Raises:
      ConversionError: if there is no token or no network, or the token may not write there.
    """
    check_name(target.name, target.revision)
    with plain_failures(f"{target.name} cannot be pushed to", target.name, again):
        from huggingface_hub import HfApi

        account = HfApi().whoami()
    user = str(account.get("name", ""))
    name = target.name if "/" in target.name or not user else f"{user}/{target.name}"
    owner, role = name.partition("/")[0], _role(account)
    if role == "read":
        raise ConversionError(
            f"{name} cannot be pushed to: the token can only read; take one with write access from "
            f"{endpoint()}/settings/tokens. {again}".strip()
        )
    owners = [user, *_organisations(account)]
    # The token of a few repositories may not list all organisations; the push will say.
    if role != "fineGrained" and "orgs" in account and owner.lower() not in map(str.lower, owners):
        raise ConversionError(
            f"{name} cannot be pushed to: the token is that of {', '.join(owners)}, not of "
            f"{owner}; give {user}/{name.partition('/')[2]}, or the token of a member of {owner}. "
            f"{again}".strip()
        )
    return replace(target, name=name)


def _role(account: dict[str, Any]) -> str | None:
    try:
        return account["auth"]["accessToken"]["role"]
    except (KeyError, TypeError):
        return None


def _organisations(account: dict[str, Any]) -> list[str]:
    found = account.get("orgs") or []
    return [str(each["name"]) for each in found if isinstance(each, dict) and "name" in each]
