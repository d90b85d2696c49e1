"""The continuation of a prompt that a run shows before and after training."""

import jax
import numpy as np

from experiments.data.prompts import text_tokens
from experiments.training.run import Run
from tptt_jax import CausalLM, generate

# Samples are not greedy: small models would repeat themselves.
_TEMPERATURE = 0.7
_TOP_P = 0.9


def show_sample(run: Run, when: str, model: CausalLM) -> None:
    """Prints a model's continuation of the run's sample prompt, and adds it to `run.samples`."""
    config = run.config
    if not config.sample_tokens:
        return
    prompt = config.sample_prompt
    tokens = text_tokens(run.tokenizer, prompt)[None]
    key = jax.random.key(config.seed)
    result = generate(model, tokens, config.sample_tokens, _TEMPERATURE, key, top_p=_TOP_P)
    new = np.asarray(result.tokens[0, : int(result.lengths[0])])
    text = run.tokenizer.decode(new, skip_special_tokens=True)
    run.samples[when] = f"{prompt}{text}"
    run.console.print(f"--- {when} ---\n{prompt}{text}\n", markup=False)
