"""``python -m experiments.generate``: continues a prompt of any length, streaming."""

if __name__ == "__main__":
    from experiments.process.starting import start_command

    start_command()

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from convert.sources import DEFAULT_MODEL
from experiments.command_line import run_configured
from experiments.data.prompts import (
    chat_stops,
    chat_tokens,
    check_text_file,
    document_tokens,
    text_tokens,
)
from experiments.models import apply_revision, is_tuned, load_model
from experiments.models.writer import Writer, report
from experiments.process.compilation_cache import prepare_process
from experiments.process.memory_use import peak_gb
from experiments.process.output_folder import check_output_file
from tptt_jax import CausalLM
from tptt_jax.inference.generate import Stops
from tptt_jax.inference.sampling import Sampling
from tptt_jax.inference.snapshot import load_state, save_state
from tptt_jax.model import base_model
from tptt_jax.ops.quantization import BaseDtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROMPT = "The capital of France is"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continues a prompt with a base model, a fine-tuned one, or both.

    All end-of-text tokens of config.json, generation_config.json and GGUF files end the text.
    Sampling settings of generation_config.json are ignored: only the options here apply.
    """

    model: str | None = None
    """"smollm2-135m" or "gemma3-270m", which come as packages; a Hugging Face directory, a Hub id,
    a .gguf file, a PEFT directory, or a run of experiments.finetune. None: what the adapter was
    trained on, or smollm2-135m."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; the same as hub-id@revision."""
    adapter: Path | None = None
    """Output directory of a finetune run, for its adapters and its memory; or a PEFT directory."""
    prompt: str | None = None
    """Text to continue, after the file or the state if there is one; with --chat, the only
    message. None: "The capital of France is" without file and state."""
    prompt_file: Path | None = None
    """UTF-8 text of any length to read first; a regular file, not a pipe."""
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    """Answers messages from stdin, one per line, with the tokenizer's chat template."""
    save_state: Path | None = None
    """File for the state after reading, before generation."""
    load_state: Path | None = None
    """A file of --save-state to start from; the model must be the same."""
    max_new_tokens: int = 64
    """Most tokens to generate; end-of-text tokens end the text earlier. 0: only read."""
    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0: all."""
    top_p: float = 1.0
    """Sample from the most likely tokens with this probability together; 1: all."""
    min_p: float = 0.0
    """Sample from tokens with at least min_p times the highest probability; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred before less likely."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    seed: int = 0
    """Seed of sampling."""
    stream: bool = True
    """Print text as it is generated; False: when it is complete."""
    window: int | None = None
    """Softmax attention sees this many tokens, and the first few; the memory holds those
    that have left the window. None: what the model was trained with."""
    context: int | None = None
    """Fixes rotary frequencies that depend on the length of the text ("dynamic" and "longrope"
    scaling) for this many tokens, prompt and new ones together. Others stay as they are."""
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leaves the memory out."""
    compare: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also prints the base model's continuation, before the fine-tuned one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and activations."""
    base_dtype: BaseDtype | None = None
    """Quantises the base model's matrices, as finetune does; None: they have --dtype, also under
    adapters that were trained on quantised ones."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        least = 0 if self.save_state is not None else 1
        if self.max_new_tokens < least:
            raise ValueError(
                f"max_new_tokens must be at least {least}, got {self.max_new_tokens}; 0 needs "
                "--save-state."
            )
        if self.compare and (self.chat or self.load_state is not None):
            raise ValueError("--compare reads the prompt twice: leave out --chat and --load-state.")
        if self.context is not None and self.context < 0:
            raise ValueError(f"context must be at least 0, got {self.context}.")
        apply_revision(self)
        self.sampling.check()

    @property
    def sampling(self) -> Sampling:
        """The sampling settings."""
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        )


def generate_text(config: GenerateConfig) -> dict[str, Any]:
    """Loads, reads, generates, prints; returns what --json prints."""
    prepare_process()
    if config.save_state is not None:
        check_output_file(config.save_state, "--save-state")
    if config.prompt_file is not None:
        check_text_file(config.prompt_file)
    if config.compare and config.adapter is None and not is_tuned(config.model or DEFAULT_MODEL):
        raise ValueError("--compare needs a fine-tuned model: give --adapter.")
    loaded = load_model(
        config.model,
        config.adapter,
        window=config.window,
        context=config.context,
        dtype=jnp.dtype(config.dtype),
        base_dtype=config.base_dtype,
    )
    model = loaded.model
    written: dict[str, Any] = {"prompt": _prompt(config)}
    if config.compare:
        print("--- base model ---")
        base = _writer(config, base_model(model), loaded.tokenizer, use_memory=False)
        written["base"] = _continue(config, base)
        print("--- fine-tuned ---")
    use_memory = model.liza is not None and not config.no_liza
    writer = _writer(config, model, loaded.tokenizer, use_memory=use_memory)
    if config.load_state is not None:
        writer.state = load_state(config.load_state, model)
    written |= _chat(config, writer) if config.chat else _continue(config, writer)
    return written | {"peak_gb": peak_gb()}


def _writer(
    config: GenerateConfig,
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    use_memory: bool,
) -> Writer:
    stops = model.config.eos_token_ids
    if config.chat:
        stops = chat_stops(tokenizer, stops)
    return Writer(
        model=model,
        tokenizer=tokenizer,
        sampling=config.sampling,
        stops=Stops(tokens=stops, strings=config.stop, decode=tokenizer.decode),
        max_new_tokens=config.max_new_tokens,
        use_memory=use_memory,
        show=config.stream,
        key=jax.random.key(config.seed),
    )


def _prompt(config: GenerateConfig) -> str | None:
    if config.prompt is None and not (config.chat or config.prompt_file or config.load_state):
        return _PROMPT
    return config.prompt


def _continue(config: GenerateConfig, writer: Writer) -> dict[str, Any]:
    prompt = _prompt(config)

    def pieces() -> Iterator[np.ndarray]:
        yield from _document(config, writer)
        if prompt:
            begin = config.prompt_file is None and writer.state is None
            yield text_tokens(writer.tokenizer, prompt, begin=begin)

    reading = writer.read(pieces())
    _save(config, writer)
    if not config.max_new_tokens:
        return report(reading, None)
    print(prompt or "", end="" if config.stream else "\n" * bool(prompt), flush=True)
    return report(reading, writer.write()[0])


def _chat(config: GenerateConfig, writer: Writer) -> dict[str, Any]:
    """Reads messages and answers them; each turn reads only its new tokens."""
    reading = writer.read(_document(config, writer))
    _save(config, writer)
    document, begin = writer.state, writer.state is None
    messages: list[dict[str, str]] = []
    known: list[int] = []
    turns = []
    for message in [config.prompt] if config.prompt else _lines():
        messages.append({"role": "user", "content": message})
        tokens = chat_tokens(writer.tokenizer, messages, begin=begin)
        if tokens[: len(known)] != known:
            # The template renders earlier turns differently now.
            writer.state, known = document, []
        turn = writer.read([np.asarray(tokens[len(known) :], np.int32)])
        written, new = writer.write()
        known = tokens + new
        messages.append({"role": "assistant", "content": written.text.strip()})
        turns.append({"message": message} | report(turn, written))
    return report(reading, None) | {"turns": turns}


def _lines() -> Iterator[str]:
    """Messages from a terminal or a pipe."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _document(config: GenerateConfig, writer: Writer) -> Iterator[np.ndarray]:
    if config.prompt_file is not None:
        begin = writer.state is None
        yield from document_tokens(writer.tokenizer, config.prompt_file, begin=begin)


def _save(config: GenerateConfig, writer: Writer) -> None:
    if config.save_state is None:
        return
    if writer.state is None:
        raise ValueError("--save-state has nothing to save: give --prompt-file or --prompt.")
    save_state(config.save_state, writer.model, writer.state)


def main() -> None:
    """The command."""
    sys.exit(run_configured(generate_text, GenerateConfig, prog="python -m experiments.generate"))


if __name__ == "__main__":
    main()
