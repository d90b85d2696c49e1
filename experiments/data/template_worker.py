"""The program of the process that renders chat templates: requests on stdin, replies on stdout.

A request is a pickled dict: seconds, bytes, characters, and for each text the arguments of
transformers' `render_jinja_template`. A reply is a line of JSON, as templates are not to be
trusted: for each text either itself and its spans, or an error and its message.
"""

import contextlib
import importlib
import json
import os
import pickle
import signal
import sys
from typing import Any


def main() -> None:
    """Answers requests until stdin ends."""
    requests = sys.stdin.buffer
    # Whatever else prints to stdout must not end up among the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.path[:] = pickle.load(requests)
    with contextlib.suppress(Exception):  # the first reply says why it fails
        # Takes a second or more, which does not count as time of a template.
        importlib.import_module("transformers.utils.chat_template_utils")
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        # Ends this process even if C code never returns, and even if nobody waits any more.
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        answers = [_answer(request, arguments) for arguments in request["arguments"]]
        replies.write(f"[{', '.join(answers)}]\n".encode())
        replies.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(request: dict[str, Any], arguments: dict[str, Any]) -> str:
    """The part of the reply for one text, as JSON in ASCII."""
    try:
        from transformers.utils.chat_template_utils import render_jinja_template

        from experiments.process.memory_limit import limited_memory

        render: Any = render_jinja_template
        with limited_memory(request["bytes"]):
            (text,), spans = render(**arguments)
            if len(text) > request["characters"]:
                return json.dumps({"error": "length", "message": f"{len(text):,}"})
            return json.dumps({"text": text, "spans": spans[0] if spans else None})
    except MemoryError:
        return json.dumps({"error": "memory", "message": ""})
    except Exception as error:
        name, message = type(error).__name__, " ".join(str(error).split())
        if _is_of_jinja(error):  # what the author of the template has foreseen
            return json.dumps({"error": "refusal", "message": message or name})
        return json.dumps({"error": "failure", "message": f"{name}: {message}"})


def _is_of_jinja(error: Exception) -> bool:
    from jinja2 import TemplateError

    return isinstance(error, TemplateError)


if __name__ == "__main__":
    main()
