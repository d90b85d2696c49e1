"""``python -m experiments.generate``: continues a prompt, streaming."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from convert import load_pretrained, load_tokenizer
from convert.bases import has_base
from convert.sources import find_checkpoint
from experiments.arguments import run_configured
from experiments.process import prepare_process
from tptt_jax import CausalLM
from tptt_jax.inference.generate import stream
from tptt_jax.model import base_model
from tptt_jax.training.checkpoint import is_checkpoint, read_description, restore_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continues a prompt with a base model, a fine-tuned one, or both."""

    model: str | None = None
    """"demo" (Gemma 3 270M), a Hugging Face directory, a Hub id, a .gguf file, a PEFT directory,
    or a run of experiments.finetune; None: what the adapter was trained on, or the demo."""
    adapter: Path | None = None
    """Output directory of a finetune run: its adapters and its memory. Or a PEFT directory."""
    prompt: str = "The capital of France is"
    """Text to continue."""
    max_new_tokens: int = 64
    """Tokens to add at most; the model's end-of-text token ends it earlier."""
    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0: all."""
    top_p: float = 1.0
    """Sample from the most likely tokens with this probability together; 1: all."""
    seed: int = 0
    """Of sampling."""
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave the memory out."""
    compare: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the base model's continuation too, before the fine-tuned one's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and activations."""

    def __post_init__(self) -> None:
        """Rejects values that nothing can be generated with."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What one model wrote."""

    text: str
    new_tokens: int
    tokens_per_s: float | None
    """Without prefill and compilation; None: too short to tell."""


def generate_text(config: GenerateConfig) -> dict[str, Any]:
    """Loads, generates, prints; returns what --json prints."""
    prepare_process()
    if config.compare and config.adapter is None and not _is_tuned(config.model or "demo"):
        raise ValueError("--compare needs a fine-tuned model: give --adapter.")
    model, source = _load(config)
    tokenizer = load_tokenizer(source)
    written: dict[str, Any] = {"prompt": config.prompt}
    if config.compare:
        print("--- base model ---")
        written["base"] = dataclasses.asdict(
            _write(config, base_model(model), tokenizer, use_memory=False)
        )
        print("--- fine-tuned ---")
    use_memory = model.liza is not None and not config.no_liza
    return written | dataclasses.asdict(_write(config, model, tokenizer, use_memory=use_memory))


def _is_tuned(source: str) -> bool:
    return find_checkpoint(source) is not None or has_base(Path(source).expanduser())


def _load(config: GenerateConfig) -> tuple[CausalLM, str]:
    """The model, and where its tokenizer comes from."""
    dtype = jnp.dtype(config.dtype)
    if config.adapter is None:
        source = config.model or "demo"
        return load_pretrained(source, dtype=dtype), source
    if has_base(config.adapter):
        source = config.model or str(config.adapter)
        over = None if config.model is None else config.adapter
        return load_pretrained(source, dtype=dtype, adapter=over), source
    if not is_checkpoint(config.adapter):
        raise ValueError(
            f"--adapter {config.adapter} is neither the --output directory of a finetune run "
            "(checkpoint.json) nor a directory of PEFT's or tptt's."
        )
    described = read_description(config.adapter)
    source = config.model or described.source
    model = load_pretrained(source, described.liza, described.lora, dtype)
    restore_trainable(config.adapter, model)
    return model, source


def _write(
    config: GenerateConfig,
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    use_memory: bool,
) -> Continuation:
    tokens = np.array([tokenizer(config.prompt)["input_ids"]], np.int32)
    blocks = stream(
        model,
        tokens,
        config.max_new_tokens,
        config.temperature,
        jax.random.key(config.seed),
        top_k=config.top_k,
        top_p=config.top_p,
        use_memory=use_memory,
    )
    print(config.prompt, end="", flush=True)
    new, text = [], ""
    marks: list[tuple[float, int]] = []
    for piece in _until_stop(blocks, model.config.eos_token_ids):
        new += piece
        marks.append((time.perf_counter(), len(new)))
        # Decoding all of it each time keeps characters whole that span several tokens.
        longer = str(tokenizer.decode(new, skip_special_tokens=True))
        if not longer.endswith("�"):
            print(longer[len(text) :], end="", flush=True)
            text = longer
    longer = str(tokenizer.decode(new, skip_special_tokens=True))
    print(longer[len(text) :], flush=True)
    speed = _speed(marks)
    if speed:
        print(f"[{len(new)} tokens, {speed:.1f} tokens/s]", file=sys.stderr)
    return Continuation(text=longer, new_tokens=len(new), tokens_per_s=speed)


def _until_stop(blocks: Iterator[np.ndarray], stops: tuple[int, ...]) -> Iterator[list[int]]:
    """The tokens of the only row, up to its stop token."""
    for block in blocks:
        row = block[0].tolist()
        ended = [i for i, token in enumerate(row) if token in stops]
        yield row[: ended[0]] if ended else row
        if ended:
            return


def _speed(marks: list[tuple[float, int]]) -> float | None:
    """Tokens per second after the first two blocks, which wait for prefill and compilation."""
    if len(marks) < 3:
        return None
    (start, before), (end, after) = marks[1], marks[-1]
    return (after - before) / max(end - start, 1e-9)


def main() -> None:
    """The command."""
    sys.exit(run_configured(generate_text, GenerateConfig, prog="python -m experiments.generate"))


if __name__ == "__main__":
    main()
