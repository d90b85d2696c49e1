"""Tiny random models of transformers, and comparisons with them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with models in torch")
transformers = pytest.importorskip("transformers")


def build(config: Any, seed: int = 0) -> Any:
    """A random model whose norms and biases differ from their initial ones and zeros."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def torch_logits(model: Any, tokens: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens))).logits.float().numpy()


def relative_error(got: Any, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


def reload(path: Path, dtype: Any = None) -> Any:
    """transformers' model of an export, which must fit to the last key."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype or torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


def as_stored(tensors: dict[str, Any]) -> dict[str, Any]:
    """The layout on disk: transformers holds the experts of a layer in two tensors."""
    stored = {}
    for name, tensor in tensors.items():
        base, found, part = name.partition("experts.")
        if not found:
            stored[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if part == "gate_up_proj":
                gate, up = expert.chunk(2)
                stored[f"{base}experts.{number}.gate_proj.weight"] = gate
                stored[f"{base}experts.{number}.up_proj.weight"] = up
            else:
                stored[f"{base}experts.{number}.down_proj.weight"] = expert
    return stored
