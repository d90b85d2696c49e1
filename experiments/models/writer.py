"""Reads prompts and writes continuations: the part that all modes of generate share."""

import dataclasses
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from experiments.models.limits import check_tokens
from tptt_jax import CausalLM, DecodingState
from tptt_jax.inference.generate import Stops, TokenStream, stream
from tptt_jax.inference.prefill import read
from tptt_jax.inference.sampling import Sampling
from tptt_jax.inference.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Statistics of reading a prompt."""

    prompt_tokens: int
    """Tokens read by this process, without those of a loaded state."""
    prefill_s: float
    """Compilation included."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """The continuation of one model."""

    text: str
    new_tokens: int
    tokens_per_s: float | None
    """Excludes prefill and compilation; None: too short to measure."""
    context_tokens: int
    """Tokens in the state at the end."""
    state_bytes: int
    """Size of the state in bytes."""


@dataclass(kw_only=True)
class Writer:
    """Reads tokens into a state, and writes text from it."""

    model: CausalLM
    tokenizer: "PreTrainedTokenizerFast"
    sampling: Sampling
    stops: Stops
    max_new_tokens: int
    use_memory: bool
    show: bool
    """Print text as it is generated, not at the end."""
    key: jax.Array
    state: DecodingState | None = None

    def read(self, pieces: Iterable[np.ndarray]) -> Reading:
        """Reads pieces of one text; reports on stderr."""
        start, count = time.perf_counter(), 0
        for piece in pieces:
            if len(piece):
                check_tokens(piece, self.model.config.vocab_size, self.tokenizer)
                self.state = read(
                    self.model, piece[None], state=self.state, use_memory=self.use_memory
                )
                count += len(piece)
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - start
        if count and self.state is not None:
            print(
                f"[read {count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s; "
                f"state {self.state.num_bytes / 1e6:,.2f} MB]",
                file=sys.stderr,
            )
        return Reading(prompt_tokens=count, prefill_s=seconds)

    def write(self) -> tuple[Continuation, list[int]]:
        """Writes until a stop; returns the text and its tokens."""
        if self.state is None:
            raise ValueError("there is nothing to continue: give --prompt or --prompt-file.")
        self.key, key = jax.random.split(self.key)
        blocks = stream(
            self.model,
            np.zeros((1, 0), np.int32),
            self.max_new_tokens,
            key,
            sampling=self.sampling,
            stops=self.stops,
            state=self.state,
            use_memory=self.use_memory,
        )
        tokens, text, marks = self._print(blocks)
        self.state = blocks.state
        speed = _speed(marks)
        shown = "" if speed is None else f", {speed:.1f} tokens/s"
        print(
            f"[{len(tokens)} tokens{shown}; state {self.state.num_bytes / 1e6:,.2f} MB]",
            file=sys.stderr,
        )
        written = Continuation(
            text=text,
            new_tokens=len(tokens),
            tokens_per_s=speed,
            context_tokens=int(self.state.length[0]),
            state_bytes=self.state.num_bytes,
        )
        return written, tokens

    def _print(self, blocks: TokenStream) -> tuple[list[int], str, list[tuple[float, int]]]:
        def decode(tokens: list[int]) -> str:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

        text = TextStream(decode, self.stops.strings)
        tokens: list[int] = []
        marks = []
        for block in blocks:
            kept = int(blocks.lengths[0]) - len(tokens)
            new = block[0, :kept].tolist()
            tokens += new
            marks.append((time.perf_counter(), len(tokens)))
            self._show(text.push(new))
        self._show(text.finish())
        print("" if self.show else text.text, flush=True)
        return tokens, text.text, marks

    def _show(self, text: str) -> None:
        if self.show:
            print(text, end="", flush=True)


def report(reading: Reading, written: Continuation | None) -> dict[str, object]:
    """The --json report of one reading and one continuation."""
    return dataclasses.asdict(reading) | ({} if written is None else dataclasses.asdict(written))


def _speed(marks: list[tuple[float, int]]) -> float | None:
    """Tokens per second after the first two blocks, which wait for compilation."""
    if len(marks) < 3:
        return None
    (start, before), (end, after) = marks[1], marks[-1]
    return (after - before) / max(end - start, 1e-9)
