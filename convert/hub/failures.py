"""Failures of the Hugging Face hub in one sentence each, with what to do."""

import contextlib
from collections.abc import Iterator

from convert.errors import ConversionError
from tptt_jax.error_text import first_line

_LATER = "try again later"


def endpoint() -> str:
    """Address of the hub, from HF_ENDPOINT or the public one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextlib.contextmanager
def plain_failures(what: str, name: str, again: str) -> Iterator[None]:
    """Turns whatever the hub's library raises into one sentence.

    The block must hold calls of that library only.

    Args:
      what: the sentence's beginning, such as "me/model was not pushed".
      name: the repository.
      again: what is safe, and how to go on.

    Raises:
      ConversionError: for any failure.
    """
    try:
        yield
    # It passes on exceptions of its HTTP client, of hf_xet and of its threads.
    except Exception as error:
        reason, remedy = _explain(_root(error), name)
        raise ConversionError(f"{what}: {reason}; {remedy}. {again}".strip()) from error


def _root(error: BaseException) -> BaseException:
    """The failure itself, where a thread's error only names the file."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain(error: BaseException, name: str) -> tuple[str, str]:
    """What is wrong, and the remedy."""
    from huggingface_hub import errors

    tokens = f"{endpoint()}/settings/tokens"
    log_in = f"set HF_TOKEN to one with write access from {tokens}, or run hf auth login"
    by_status = {
        401: ("the hub does not accept the token (401)", log_in),
        403: (
            f"the token may not write to {name} (403)",
            f"take one with write access to it from {tokens}, or a repository of your own",
        ),
        404: (
            f"the hub does not find {name} or this revision of it (404)",
            "check the ID, the revision and the rights of the token",
        ),
        429: ("the hub takes no more requests now (429)", _LATER),
    }
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token", log_in
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set", "unset it"
    if status in by_status:
        return by_status[status]
    if isinstance(status, int) and status >= 500:
        return f"the hub has a fault (status {status})", _LATER
    if isinstance(status, int):
        return f"the hub refuses it (status {status}: {_short(error)})", "correct that"
    if isinstance(error, ValueError) or getattr(error, "filename", None) is not None:
        return _short(error), "correct that"
    remedy = f"check the network and HF_ENDPOINT, and {_LATER}"
    return f"no answer from {endpoint()} ({_short(error)})", remedy


def _short(error: BaseException) -> str:
    return first_line(error, 200).rstrip(".")
