"""Errors of other libraries in one line."""


def first_line(error: BaseException, length: int | None = None) -> str:
    """The first line of an error's text, or its class name.

    Args:
      error: whose text may have many lines.
      length: most characters; None: the whole line.
    """
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # tensorstore appends the whole specification of the operation.
    return text.partition(" [tensorstore_spec")[0][:length]
