"""Rows that ask for something said long before, and questions of that kind for evaluation.

They teach a memory to recall (docs/memory.md). What is asked for lies so far back that no window
shows it. The answers count, and so does a haystack that is training text as it is: recall rows then
take little text away. Formats, depths and texts that evaluation uses never occur here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.data.packing import Example
from experiments.data.probes import MARGIN, PROBES, Probe, ProbeKind, encode_text, hide, passkey

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

# Tokens of a piece of text, at least and less than.
_PIECE = (4, 33)


def recall_examples(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[Example],
    count: int,
    *,
    length: int,
    window: int,
    seed: int,
    prefix: Sequence[int] = (),
    kinds: Sequence[ProbeKind] = tuple(PROBES),
    weight: float = 0.3,
    packing: bool = False,
) -> list[list[Example]]:
    """Makes rows that ask for things hidden in a text.

    Half of the haystacks are text as it is, a quarter pieces of it in random order, and a quarter
    random tokens: what is said in one kind of text alone is recalled from that kind alone.

    Args:
      tokenizer: of the model.
      texts: the training data, which haystacks are cut from. Where a haystack is text as it is,
        its tokens count as they do there.
      count: rows.
      length: tokens of a row.
      window: what is hidden ends at least so many tokens before its answer.
      seed: chooses haystacks, depths and what is hidden.
      prefix: tokens that every example begins with.
      kinds: what examples ask for, in turn.
      weight: of a row's answers against all tokens of a row of text.
      packing: several examples of different lengths share a row; False: one fills it.

    Returns:
      For each of `count` rows its examples, together `length` tokens; their answers share
      `weight` equally.

    Raises:
      ValueError: if rows of this length cannot hide anything outside of the window.
    """
    haystacks = _Haystacks.of(tokenizer, texts)
    encode = functools.partial(encode_text, tokenizer)

    def example(rng: np.random.Generator, probe: Probe, size: int, share: float) -> Example:
        answer = encode(probe.answer)
        sizes = {"length": size - len(answer), "window": window, "prefix": prefix}
        haystack = haystacks.draw(rng, size)
        prompt = hide(probe, encode, haystack.tokens, rng, **sizes)
        weights = np.zeros(size, np.float32)
        text = np.flatnonzero(prompt.places >= 0)
        weights[text] = haystack.targets[prompt.places[text]]
        weights[0] = 0  # nothing predicts it
        weights[len(prompt.tokens) :] = share * weight * length / len(answer)
        return Example(np.concatenate([prompt.tokens, answer]), weights)

    def row(number: int) -> list[Example]:
        rng = np.random.default_rng([seed, number])

        def draw() -> Probe:
            return PROBES[kinds[number % len(kinds)]](rng)

        if not packing:
            return [example(rng, draw(), length, 1.0)]
        parts: list[tuple[Probe, int]] = []
        free = length
        while free:
            probe = draw()
            least = _least_length(probe, encode, window, len(prefix))
            if parts and least > free:
                parts[-1] = (parts[-1][0], parts[-1][1] + free)
                break
            size = _draw_length(rng, least, length)
            parts.append((probe, min(size, free)))
            free -= parts[-1][1]
        order = rng.permutation(len(parts))
        return [example(rng, *parts[i], 1 / len(parts)) for i in order]

    return [row(number) for number in range(count)]


class _Haystacks(NamedTuple):
    """Where haystacks come from: a text, its pieces, and tokens that are no text."""

    text: Example
    vocabulary: Int[np.ndarray, " V"]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", texts: Sequence[Example]) -> "_Haystacks":
        tokens, targets = (np.concatenate(parts) for parts in zip(*texts, strict=True))
        text = Example(tokens, targets.astype(np.float32))
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        plain = sorted(set(tokenizer.get_vocab().values()) - special)
        return cls(text, np.asarray(plain, np.int32))

    def draw(self, rng: np.random.Generator, size: int) -> Example:
        """A haystack of at least `size` tokens."""
        kind = rng.integers(4)
        if kind < 2:
            return self.text
        if kind == 2:
            return _only_tokens(rng.choice(self.vocabulary, size))
        pieces, found = [], 0
        while found < size:
            start, extent = int(rng.integers(len(self.text.tokens))), int(rng.integers(*_PIECE))
            pieces.append(self.text.tokens[start : start + extent])
            found += len(pieces[-1])
        return _only_tokens(np.concatenate(pieces))


def _only_tokens(tokens: Int[np.ndarray, " L"]) -> Example:
    """Tokens that do not count in the loss."""
    return Example(tokens, np.zeros(len(tokens), np.float32))


def _least_length(
    probe: Probe, encode: Callable[[str], Int[np.ndarray, " L"]], window: int, prefix: int
) -> int:
    """Tokens of the shortest example of a probe whose answer lies beyond the window."""
    question = len(encode(probe.question))
    hidden = sum(len(encode(sentence)) for sentence in probe.hidden)
    apart = max(window + MARGIN - question, 0)
    return prefix + hidden + apart + question + len(encode(probe.answer))


def _draw_length(rng: np.random.Generator, least: int, most: int) -> int:
    """A length from `least` to `most`, with as many tokens in examples of each octave."""
    if most <= least:
        return least
    share = rng.random()
    return int(1 / ((1 - share) / least + share / most))


class Question(NamedTuple):
    """A pass key hidden in a text, and asked for at its end."""

    prompt: Int[np.ndarray, " T"]
    hidden: str
    question: str
    answer: str
    """The digits alone."""


def passkey_questions(
    tokenizer: "PreTrainedTokenizerFast",
    haystack: Int[np.ndarray, " L"],
    count: int,
    *,
    length: int,
    window: int,
    seed: int,
    prefix: Sequence[int] = (),
) -> list[Question]:
    """Asks for pass keys of five digits in texts that nothing was trained on.

    Args:
      tokenizer: of the model.
      haystack: tokens of the texts.
      count: questions.
      length: tokens of each prompt.
      window: the key ends at least so many tokens before the answer.
      seed: chooses texts, depths and keys.
      prefix: tokens that every prompt begins with.

    Raises:
      ValueError: if prompts of this length cannot hide a key outside of the window.
    """

    def ask(number: int) -> Question:
        # Streams of three numbers: none of them makes a training row.
        rng = np.random.default_rng([seed, number, 1])
        probe = passkey(str(rng.integers(10_000, 100_000)))
        encode = functools.partial(encode_text, tokenizer)
        prompt = hide(probe, encode, haystack, rng, length=length, window=window, prefix=prefix)
        return Question(
            prompt.tokens, probe.hidden[0].strip(), probe.question.strip(), probe.answer.strip(" .")
        )

    return [ask(number) for number in range(count)]
