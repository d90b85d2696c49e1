"""Errors of our models against those of transformers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import export_pretrained, load_pretrained
from convert.families import family_of
from convert.loading import plan_for, variables_of
from tests.contracts import logits_of, quick_jit
from tests.parity.torch_models import as_stored, relative_error, reload, torch_logits
from tptt_jax import CausalLM, LizaConfig
from tptt_jax.training.loss import causal_lm_loss

torch = pytest.importorskip("torch", reason="compares with models in torch")

TOKENS = np.random.default_rng(0).integers(3, 101, (2, 77))


def plain_logits(model: CausalLM) -> np.ndarray:
    """Logits of TOKENS without the memory."""
    return logits_of(model, TOKENS, use_memory=False)


def gradient_errors(theirs: Any, ours: CausalLM) -> dict[str, float]:
    """Relative errors of the gradients of the mean loss, by name of the stored tensor."""
    logits = theirs(torch.as_tensor(TOKENS)).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.as_tensor(TOKENS[:, 1:]).flatten()).backward()
    wanted = as_stored({name: p.grad for name, p in theirs.named_parameters()})
    gradients = _loss_gradients(ours)
    plan = plan_for(family_of(ours.config.family).rules(ours.config), ours, variables_of(ours))
    assert {name for move in plan for name in move.sources} == wanted.keys()
    errors = {}
    for move in plan:
        stored = [wanted[name].numpy() for name in move.sources]
        arrays = move.transform.forward(stored, [slot.shape for slot in move.slots])
        for slot, array in zip(move.slots, arrays, strict=True):
            got = gradients[slot.path]
            # A key bias moves all logits of a query alike: its gradient is nothing but rounding.
            scale = max(np.abs(array).max(), 1e-3 * np.abs(got).max(), 1e-6)
            errors[move.sources[0]] = float(np.abs(got[slot.index] - array).max() / scale)
    return errors


def _loss_gradients(model: CausalLM) -> dict[str, np.ndarray]:
    graphdef, state = nnx.split(model)
    tokens = jnp.asarray(TOKENS)

    @quick_jit
    def gradient(state: nnx.State) -> nnx.State:
        def loss(state: nnx.State) -> jax.Array:
            ones = jnp.ones_like(tokens)
            merged = nnx.merge(graphdef, state)
            total, count = causal_lm_loss(merged, tokens, ones, ones == 1, train_head=True)
            return total / count

        return jax.grad(loss)(state)

    flat = nnx.to_flat_state(gradient(state))
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}


def export_error(source: Path, target: Path, wanted: np.ndarray) -> float:
    """Of the logits that transformers computes from our export of `source`."""
    export_pretrained(load_pretrained(source), target, source=source)
    return relative_error(torch_logits(reload(target), TOKENS), wanted)


def adapter_error(source: Path, directory: Path, targets: list[str]) -> float:
    """Of an adapter of PEFT's that we read, wrote, and PEFT read again."""
    import peft

    torch.manual_seed(1)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets)
    theirs = peft.get_peft_model(reload(source), settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(directory / "theirs")
    wanted = torch_logits(theirs, TOKENS)
    ours = load_pretrained(source, adapter=directory / "theirs")
    export_pretrained(ours, directory / "ours", "peft", source)
    again = peft.PeftModel.from_pretrained(reload(source), directory / "ours").eval()
    return max(
        relative_error(plain_logits(ours), wanted),
        relative_error(torch_logits(again, TOKENS), wanted),
    )


def titan_error(source: Path, target: Path) -> float:
    """Of the exported Titan in torch, its memory on."""
    transformers = pytest.importorskip("transformers")
    liza = LizaConfig(writes="all", softmax_window=16, mag_init=0.3)
    ours = load_pretrained(source, liza)
    export_pretrained(ours, target, "titan", source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    return relative_error(torch_logits(theirs.eval(), TOKENS), logits_of(ours, TOKENS))
