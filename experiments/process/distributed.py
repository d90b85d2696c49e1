"""Joins the processes that train one model together."""

import atexit
import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import jax
import tyro

from experiments.process.interrupts import TerminationError
from tptt_jax.processes import (
    FailedElsewhere,
    is_collective_failure,
    is_first_process,
    wait_for_all,
)

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:\[\]]+):(\d{1,5})")
# Processes end together, except after a failure.
_SHUTDOWN_SECONDS = 20
# How runtimes say that another process is gone.
_LOST = re.compile(
    r"Gloo \w+ failed|Connection (reset|closed)|closed by peer|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|coordination service"
)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes that train one model, each with the devices of its host."""

    enabled: Annotated[
        tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name="distributed", prefix_name=False)
    ] = False
    """Train with all processes of the cluster job that this one belongs to (SLURM, Open MPI, TPU
    pods, Kubernetes). Start the same command in each; all must see the same files. Without a
    cluster give the next three."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 can be reached by the others."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0. Process 0 prints, and writes all but the checkpoints."""

    def __post_init__(self) -> None:
        """Rejects what names no group of processes."""
        given = {"coordinator": self.coordinator, "processes": self.processes}
        given |= {"process": self.process}
        missing = [f"--distributed.{name}" for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(
                "--distributed.coordinator, --distributed.processes and --distributed.process go "
                f"together: add {' and '.join(missing)}, or give --distributed alone in a cluster."
            )
        if self.coordinator is None or self.processes is None or self.process is None:
            return
        found = _ADDRESS.fullmatch(self.coordinator)
        if found is None or not 0 < int(found[2]) < 65536:
            raise ValueError(
                f"--distributed.coordinator must be HOST:PORT, such as 10.0.0.1:8476, got "
                f"{self.coordinator!r}."
            )
        if self.processes < 1:
            raise ValueError(f"--distributed.processes must be at least 1, got {self.processes}.")
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"--distributed.process must lie between 0 and {self.processes - 1}, as there are "
                f"{self.processes} processes, got {self.process}."
            )

    @property
    def is_on(self) -> bool:
        """Whether several processes are asked for."""
        return self.enabled or self.coordinator is not None


@contextlib.contextmanager
def joined(config: DistributedConfig, timeout_seconds: int = 300) -> Iterator[None]:
    """Inside the context this process belongs to the group, if `config` asks for one.

    Args:
      config: which group.
      timeout_seconds: how long to wait for the other processes.

    Raises:
      ValueError: if there is no such group, or not every process joined.
      ConnectionError: if another process is lost.
      SystemExit: in other processes than 0, where process 0 prints the error.
    """
    if not config.is_on:
        yield
        return
    _initialize(config, timeout_seconds)
    with contextlib.ExitStack() as silent:
        if not is_first_process():
            nowhere = silent.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silent.enter_context(contextlib.redirect_stdout(nowhere))
        with _ending_together():
            yield


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """Waits for the other processes at the end, unless they are elsewhere."""
    try:
        yield
        # Process 0 writes longest; a process that left earlier would count as lost.
        wait_for_all("the end")
    except FailedElsewhere:
        if is_first_process():
            raise
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        if is_collective_failure(stop):
            wait_for_all("the end")
        else:
            status = 0 if isinstance(stop, TerminationError) else 128 + signal.SIGINT
            _exit_without_barrier(status)
        raise
    except Exception as error:
        if is_collective_failure(error):
            raise
        is_lost = jax.process_count() > 1 and _LOST.search(str(error)) is not None
        is_plain = is_lost or isinstance(error, ValueError | OSError)
        _exit_without_barrier(2 if is_plain else 1)
        if not is_lost:
            raise
        raise ConnectionError(
            f"process {jax.process_index()} has lost another of the {jax.process_count()} "
            "processes: start all of them again; the same command resumes from the last checkpoint."
        ) from error


def _exit_without_barrier(status: int) -> None:
    """At its end the process does not wait for the others, which do not end now."""
    atexit.register(_exit_now, status)


def _exit_now(status: int) -> None:
    """Ends the process before JAX waits for the others, which would end it by a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _initialize(config: DistributedConfig, timeout_seconds: int) -> None:
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.processes,
            process_id=config.process,
            initialization_timeout=timeout_seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            # Explicit flags go before what a cluster says.
            cluster_detection_method="deactivate" if config.coordinator else None,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed finds no cluster here ({error}): start it with srun, mpirun or on a "
            "TPU pod, or give --distributed.coordinator, .processes and .process."
        ) from None
    except jax.errors.JaxRuntimeError as error:
        where = config.coordinator or "the cluster's coordinator"
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"the processes of --distributed did not come together at {where} within "
            f"{timeout_seconds} seconds ({reason}): start all of them, with the same address."
        ) from None
