"""The "titan" export as transformers loads it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="runs the exported model in torch")
transformers = pytest.importorskip("transformers")


@contextlib.contextmanager
def own_module_cache(path: Path) -> Iterator[None]:
    """transformers copies remote code into a cache; ours must not stay in the user's."""
    threads = torch.get_num_threads()
    # Matrices of a few hundred numbers only wait for other threads.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(path))
        yield
    torch.set_num_threads(threads)


def reload_titan(path: Path, **options: Any) -> Any:
    """transformers' model of an export, which must fit to the last key."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()
