"""A process of its own for chat templates, which can be ended whatever they do."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).with_name("template_worker.py")


class EndedError(Exception):
    """The process has ended without a reply; the argument is its status, below 0 for a signal."""


class TemplateProcess:
    """Renders templates in another process, which starts with the first request and stays.

    Threads take turns. No exception could end a template here: a single call of C code, such as
    hashing a nested tuple, may take for ever.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Sends a request and returns the reply (see `template_worker`).

        Raises:
          EndedError: if the process ends instead; the next request starts another one.
          OSError: if it cannot be started.
        """
        with self._lock:
            process = self._started()
            assert process.stdin
            assert process.stdout
            try:
                pickle.dump(request, process.stdin)
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:
                self._end()  # its reply must not answer the next request
                raise
            if not line.endswith(b"\n"):
                raise EndedError(self._end())
            return json.loads(line)

    def close(self) -> None:
        """Ends the process, also one that is at work for another thread."""
        process = self._process
        if process is not None and self._owner == os.getpid():
            process.kill()
        with self._lock:
            self._end()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._owner != os.getpid():  # two processes must not share the pipes
            self._process = None
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                # -P: no module beside the program may hide another one.
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process
            )
            self._owner = os.getpid()
            assert self._process.stdin
            pickle.dump(sys.path, self._process.stdin)
        return self._process

    def _end(self) -> int:
        """Ends the process; returns its status."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return 0
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return process.wait()
