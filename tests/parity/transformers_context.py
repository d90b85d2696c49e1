"""Times greedy decoding of transformers as the context grows, for `bench context --peer-json`.

    python -m tests.parity.transformers_context DIRECTORY peer.json --contexts 1024 4096
    python -m experiments.bench context --model DIRECTORY --peer-json peer.json

DIRECTORY is a Hugging Face model, e.g. one that `python -m convert export` has written. The cache
holds random keys and values: decoding takes as long whatever they are.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def decode_seconds(model, context: int, new_tokens: int) -> tuple[float, int]:
    """Median time per token at the end of a context, and bytes of the cache."""
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    heads, size = config.num_key_value_heads, config.head_dim
    filled = context - new_tokens
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, 1, heads, filled, size, dtype=model.dtype)
        cache.update(keys, values, layer)
    token, seconds = torch.tensor([[5]]), []
    with torch.no_grad():
        for place in range(filled, context):
            start = time.perf_counter()
            out = model(token, past_key_values=cache, cache_position=torch.tensor([place]))
            token = out.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return statistics.median(seconds[2:]), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    results = []
    for context in arguments.contexts:
        seconds, held = decode_seconds(model, context, arguments.new_tokens)
        results.append({"context": context, "decode_s_per_token": seconds, "state_bytes": held})
        print(results[-1], flush=True)
    arguments.output.write_text(json.dumps({"runs": {"transformers": results}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
