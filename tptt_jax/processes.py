"""Several processes that compute together (`jax.distributed`): agreement, and values on all hosts.

With one process every function here does nothing but return what it was given.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from tptt_jax.array_typing import Array

_Error = TypeVar("_Error", bound=BaseException)

# A longer message is cut: all processes exchange arrays of one size.
_MESSAGE_BYTES = 1000
_TOGETHER = "in all processes"


class FailedElsewhere(ValueError):
    """Another process has failed, so this one ends too."""


def is_first_process() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Waits until all processes have come to the place of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def sums_of_all(values: Sequence[float]) -> list[float]:
    """Sums over all processes, each of which calls this with as many values."""
    if jax.process_count() == 1:
        return list(values)
    gathered = multihost_utils.process_allgather(np.array(values, np.float32))
    return [float(total) for total in np.asarray(gathered, np.float64).sum(axis=0)]


def from_first(number: int) -> int:
    """The number that process 0 calls this with."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Makes every process raise if one of them fails in the block (ValueError or OSError).

    The block itself must not wait for other processes.

    Raises:
      FailedElsewhere: where the block did not fail, or failed as in process 0; the message is that
        of the first process that failed.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    texts = _texts_of_all("" if error is None else str(error) or type(error).__name__)
    failed = next((index for index, text in enumerate(texts) if text), None)
    if failed is None:
        return
    own = texts[jax.process_index()]
    if error is not None and (is_first_process() or own != texts[0]):
        raise raised_together(error)
    raise FailedElsewhere(texts[0] or f"process {failed}: {texts[failed]}")


def raised_together(error: _Error) -> _Error:
    """Marks an exception that all processes raise at the same place; returns it."""
    if jax.process_count() > 1:
        error.add_note(_TOGETHER)
    return error


def is_collective_failure(error: BaseException) -> bool:
    """Whether all processes raise an exception: by `failing_together`, or as `raised_together`."""
    notes = getattr(error, "__notes__", ())
    return isinstance(error, FailedElsewhere) or _TOGETHER in notes


def _texts_of_all(text: str) -> list[str]:
    room = np.zeros(_MESSAGE_BYTES, np.uint8)
    content = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    room[: len(content)] = content
    rows = np.asarray(multihost_utils.process_allgather(room))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def put(array: Any, sharding: Sharding | None) -> Array:
    """`jax.device_put` of an array that all processes have, without comparing it among them.

    Args:
      array: NumPy's, or on this process's devices.
      sharding: also over the devices of several processes; None: the default device.
    """
    is_local = getattr(array, "is_fully_addressable", True)
    if sharding is None or sharding.is_fully_addressable or not is_local:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(array), sharding))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def fetch(array: Array) -> np.ndarray:
    """The values of an array on the host, also if other processes hold parts of it.

    All processes must call this, in the same order.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
