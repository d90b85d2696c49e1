"""Logits of the original implementation, in torch; only `verify` needs this module."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from convert.families.titan import MODELING_FILE


def is_known(model_type: str) -> bool:
    """Whether transformers has this model type built in."""
    return model_type in transformers.CONFIG_MAPPING


def transformers_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Runs a Hugging Face directory in transformers.

    Args:
      directory: the model.
      tokens: [B, T] int32.

    Returns:
      Logits [B, T, V], computed in float32.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def titan_logits(directory: Path, tokens: np.ndarray, *, piece: int) -> list[np.ndarray]:
    """Runs a "titan" export with its own PyTorch file, which is ours.

    The file is imported in place: transformers would copy it into the user's cache.

    Args:
      directory: the export.
      tokens: [B, T] int32.
      piece: tokens of each call of the second run, which keeps a cache.

    Returns:
      Logits [B, T, V] of one call, and of calls of `piece` tokens; float32.
    """
    spec = importlib.util.spec_from_file_location("tptt_titan_verify", directory / MODELING_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # transformers looks up a model's class by its module name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        model = module.TitanForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    finally:
        del sys.modules[spec.name]
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        whole, parts, cache = model(ids, use_cache=False).logits, [], None
        for start in range(0, ids.shape[1], piece):
            output = model(ids[:, start : start + piece], cache=cache, use_cache=True)
            cache = getattr(output, module.CACHE_NAME)
            parts.append(output.logits)
    return [x.float().numpy() for x in (whole, torch.cat(parts, dim=1))]
