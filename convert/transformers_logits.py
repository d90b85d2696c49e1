"""Logits of the original implementation, in torch; only `convert.verify` needs this module."""

from pathlib import Path

import numpy as np
import torch
import transformers


def is_known(model_type: str) -> bool:
    """Whether transformers itself has this model type."""
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
